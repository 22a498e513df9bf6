"""A dashboard of a dashboard: two real servers on loopback, and what stands in for one that misbehaves."""

from __future__ import annotations

import http.server
import json
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import records

from fedkeel.core.errors import InputError
from fedkeel.dashboard import relay


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(ledger, address there, address here)."""
    folder = tmp_path_factory.mktemp("there")
    with records.begin(folder / "ledger.sqlite") as ledger:
        records.write(ledger, 1, accuracy=0.5)
        with records.dashboard(folder) as there, records.dashboard(there) as here:
            yield ledger, there, here


@contextmanager
def standing(answers):
    """A server that answers as told: path -> (status, headers, body), or a function that makes it. Its address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.path, dict(self.headers)))
            status, headers, body = answers(self.path.partition("?")[0], self.headers)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    asked = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", asked
        finally:
            server.shutdown()
            thread.join()


JSON = {"content-type": "application/json"}
HEALTH = (200, JSON, b'{"status":"running","round":1,"behind":0}')


def until(wanted, seconds=20):
    end = time.monotonic() + seconds
    while not wanted():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_the_same_answers(pair):
    ledger, there, here = pair
    records.write(ledger, 2, accuracy=0.75)
    until(lambda: records.state(here)["now"]["round"] == 2)
    for path in ("api/state", "api/clients?search=b&sort=trust&order=asc&limit=5", "metrics", "healthz"):
        mine, theirs = records.get(here + path), records.get(there + path)
        assert (mine[0], mine[2]) == (theirs[0], theirs[2]) == (200, theirs[2])
        assert [mine[1][name] for name in ("content-type", "etag")] == [
            theirs[1][name] for name in ("content-type", "etag")
        ]
        assert len(mine[1].get_all("date")) == 1
    tag = records.get(f"{there}api/state")[1]["etag"]
    assert records.get(f"{here}api/state", **{"if-none-match": tag})[::2] == (304, b"")
    for path, headers in (("", {}), ("app.js", {}), ("api/state", {})):
        assert "default-src 'none'" in records.get(here + path, **headers)[1]["content-security-policy"]
    assert records.get(f"{here}api/state", host="evil.example")[0] == 421
    for path in ("api/clients?sort=nme", "api/clients?limit=x", "api/clients?limit=5000"):
        assert records.get(here + path)[::2] == records.get(there + path)[::2]
    assert records.get(f"{here}ledger.sqlite")[0] == 404


def test_many_viewers_are_one_request_a_poll():
    state = {"tag": 'W/"a-1"', "body": b'{"revision":1}'}

    def answers(path, headers):
        if path == "/healthz":
            return HEALTH
        time.sleep(0.2)
        if headers.get("if-none-match") == state["tag"]:
            return 304, {"etag": state["tag"]}, b""
        return 200, JSON | {"etag": state["tag"]}, state["body"]

    with standing(answers) as (there, asked), records.dashboard(there) as here, ThreadPoolExecutor(16) as viewers:
        asked.clear()
        began = time.monotonic()
        found = list(viewers.map(lambda _: records.get(f"{here}api/state"), range(64)))
        assert {(status, body) for status, _, body in found} == {(200, state["body"])}
        assert len(asked) <= 1 + (time.monotonic() - began)
        time.sleep(1.1)
        assert records.get(f"{here}api/state")[2] == state["body"]
        assert asked[-1][1]["if-none-match"] == state["tag"]
        state |= {"tag": 'W/"a-2"', "body": b'{"revision":2}'}
        until(lambda: records.get(f"{here}api/state")[2] == state["body"])


def test_away_and_back(tmp_path):
    records.begin(tmp_path / "ledger.sqlite").close()
    with records.dashboard(tmp_path) as there:
        pass
    with records.dashboard(there) as here:  # it may be started before the other end is there
        status, _, body = records.get(f"{here}api/state")
        assert status == 502
        assert f"{there.rstrip('/')} does not answer" in json.loads(body)["error"]
        assert [records.get(here + path)[0] for path in ("api/clients", "metrics", "healthz", "")] == [
            502,
            502,
            502,
            200,
        ]
        with records.dashboard(tmp_path, "--port", there.rstrip("/").rpartition(":")[2]):
            until(lambda: records.get(f"{here}healthz")[0] == 200)


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ((200, JSON, b"[" + b"1," * relay.MOST), "answers with more than 8.39 MB"),
        ((200, {"content-type": "text/html"}, b"<p>"), "answers with status 200, but not as a fedkeel dashboard"),
        ((302, JSON | {"location": "http://127.0.0.1:1/"}, b""), "answers with status 302, but not as"),
        ((500, JSON, b"{}"), "answers with status 500, but not as"),
        ((200, JSON | {"content-encoding": "gzip"}, b"no gzip"), "Error -3 while decompressing"),
    ],
)
def test_what_misbehaves_is_not_passed_on(answer, why):
    with (
        standing(lambda path, _: HEALTH if path == "/healthz" else answer) as (there, _),
        records.dashboard(there) as here,
    ):
        status, headers, body = records.get(f"{here}api/state")
        assert status == 502
        assert why in json.loads(body)["error"]
        assert "location" not in headers


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("ftp://host:8600", "'ftp://host:8600' has the scheme 'ftp': write http://HOST:PORT"),
        ("http://me:secret@host:8600", "the address of 'host' holds a name or a password: write http://HOST:PORT"),
        ("http://host:8600/runs/a", "'http://host:8600/runs/a' is no address of a dashboard"),
        ("http://host:8600?a=b", "is no address of a dashboard"),
        ("http://host:99999", "the address is no URL (Port out of range 0-65535)"),
        ("http://", "'http://' is no address of a dashboard"),
    ],
)
def test_what_is_no_address(address, sentence):
    with pytest.raises(InputError) as told:
        relay.Relay(address, 1.0)
    assert sentence in str(told.value)
    assert "secret" not in str(told.value)


def test_what_answers_and_is_no_dashboard():
    for answer in ((200, {"content-type": "text/html"}, b"<p>"), (200, JSON, b"[1]"), (404, JSON, b"{}")):
        with standing(lambda *_, answer=answer: answer) as (there, _):
            done = subprocess.run(
                [sys.executable, "-W", "error", "-m", "fedkeel", "dashboard", there, "--port", "0"],
                capture_output=True,
                text=True,
                check=False,
                timeout=60,
            )
        assert done.returncode == 2
        assert f"'{there}' is no fedkeel dashboard: name the address that" in done.stderr
        assert done.stderr.count("\n") == 1
