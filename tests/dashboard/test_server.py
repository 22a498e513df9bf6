"""The server over loopback: what it answers, to whom, what it costs when nothing is new; what Prometheus is told."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import time

import pytest
import records

from fedkeel.dashboard import prometheus


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.sqlite"


def until(address, wanted, seconds=15):
    """The state, as soon as it is as wanted."""
    end = time.monotonic() + seconds
    while not wanted(found := records.state(address)):
        assert time.monotonic() < end, found
        time.sleep(0.1)
    return found


def test_from_before_the_run_to_a_rewind(tmp_path, path):
    with records.dashboard(tmp_path) as address:
        until(address, lambda s: s["status"] == "waiting")
        with records.begin(path) as ledger:
            until(address, lambda s: s["status"] == "empty")
            records.write(ledger, 1, accuracy=0.5)
            records.write(ledger, 2, accuracy=0.75)
            found = until(address, lambda s: s["now"]["round"] == 2)
            assert found["metrics"]["accuracy"]["value"] == [0.5, 0.75]
            assert found["total"] | {"oldest": 1} == {
                "rounds": 2, "skipped": 0, "used": 2, "unused": 0, "refused": 2, "lost": 2, "up": 400, "down": 80,
                "oldest": 1, "staleness": 1.0, "epsilon": None, "clients": 3, "seen": 3,
            }  # fmt: skip
            ledger.rewind(1)
            found = until(address, lambda s: s["now"]["round"] == 1)
            assert found["metrics"]["accuracy"]["value"] == [0.5]
            assert found["total"]["refused"] == 1


def test_nothing_new_costs_nothing(tmp_path, path):
    with records.begin(path) as ledger, records.dashboard(tmp_path) as address:
        records.write(ledger, 1)
        until(address, lambda s: s["now"]["round"] == 1)
        for route in ("api/state", "api/clients?sort=name"):
            status, headers, _ = records.get(address + route)
            assert (status, headers["content-type"]) == (200, "application/json")
            again = records.get(address + route, **{"if-none-match": headers["etag"]})
            assert (again[0], again[2]) == (304, b"")
        records.write(ledger, 2)
        until(address, lambda s: s["now"]["round"] == 2)
        assert records.get(f"{address}api/state", **{"if-none-match": headers["etag"]})[0] == 200


def test_a_page_elsewhere_gets_nothing(tmp_path, path):
    records.begin(path).close()
    with records.dashboard(tmp_path) as address:
        port = address.rstrip("/").rpartition(":")[2]
        assert records.get(f"{address}api/state", host="evil.example")[0] == 421
        assert records.get(f"{address}api/state", host=f"localhost:{port}")[0] == 200
        for route in ("", "app.js", "base.css", "api/state", "metrics", "healthz"):
            status, headers, _ = records.get(address + route)
            assert status == 200, route
            assert "default-src 'none'" in headers["content-security-policy"]
            assert "unsafe" not in headers["content-security-policy"]
            assert headers["x-content-type-options"] == "nosniff"
            assert "access-control-allow-origin" not in headers
        assert records.get(f"{address}../../etc/passwd")[0] == 404
        assert records.get(f"{address}.lock")[0] == 404


@pytest.mark.parametrize(
    ("query", "sentence"),
    [
        ("sort=nme", "sort='nme' is no column: did you mean 'name'?"),
        ("order=up", "order='up' is unknown: write asc or desc"),
        ("limit=x", "limit='x' is no number: write 0 or more"),
        ("limit=5000", "limit=5000 is out of range: write 1 to 100"),
        ("offset=-1", "offset='-1' is no number: write 0 or more"),
    ],
)
def test_what_is_asked_wrongly_is_told(standing, query, sentence):
    status, _, body = records.get(f"{standing}api/clients?{query}")
    assert (status, json.loads(body)["error"]) == (400, sentence)


@pytest.fixture(scope="module")
def standing(tmp_path_factory):
    """A dashboard of a run of three rounds."""
    folder = tmp_path_factory.mktemp("standing")
    with records.begin(folder / "ledger.sqlite", backend="native") as ledger:
        for round in range(1, 4):
            records.write(ledger, round, accuracy=0.9 - round / 10, epsilon=round / 2)
        with records.dashboard(folder) as address:
            until(address, lambda s: s["now"]["round"] == 3)
            yield address


def test_prometheus(standing):
    status, headers, body = records.get(f"{standing}metrics")
    assert status == 200
    assert headers["content-type"].startswith("text/plain")
    lines = dict(line.rsplit(" ", 1) for line in body.decode().splitlines() if not line.startswith("#"))
    wanted = {
        "fedkeel_ledger_up": 1, "fedkeel_ledger_behind_rounds": 0, "fedkeel_round": 3, "fedkeel_rounds_planned": 100,
        "fedkeel_rounds_total": 3, "fedkeel_rounds_skipped_total": 0, "fedkeel_run_ended": 0, "fedkeel_loss": 1,
        "fedkeel_accuracy_best": 0.8, "fedkeel_privacy_epsilon": 1.5, "fedkeel_staleness_models": 1,
        'fedkeel_updates_total{outcome="used",rule="",stage=""}': 3,
        'fedkeel_updates_total{outcome="refused",rule="cosine",stage="screen"}': 3,
        'fedkeel_updates_total{outcome="lost",rule="gone",stage="transport"}': 3,
        'fedkeel_bytes_total{direction="up"}': 600, 'fedkeel_bytes_total{direction="down"}': 120,
        'fedkeel_round_seconds_sum{part="train"}': 0.75, 'fedkeel_round_seconds_count{part="train"}': 3,
        'fedkeel_clients{device="phone",state="refused"}': 1,
    }  # fmt: skip
    assert {name: float(lines.get(name, "nan")) for name in wanted} == wanted
    assert float(lines["fedkeel_accuracy"]) == pytest.approx(0.6)
    assert abs(float(lines["fedkeel_last_round_timestamp_seconds"]) - time.time()) < 600


def test_alerts_ask_for_what_is_told(standing):
    told = set(re.findall(r"^(fedkeel_\w+)", records.get(f"{standing}metrics")[2].decode(), re.MULTILINE))
    text = prometheus.ALERTS.read_text()
    asked = set(re.findall(r"\bfedkeel_\w+", text))
    assert asked
    assert asked <= told
    for section in text.split("- alert: ")[1:]:
        assert all(f"\n        {key}:" in section for key in ("expr", "for", "labels", "annotations")), section
        assert "summary: " in section
        assert "description: " in section


def test_the_last_verdict_of_each_stage_is_told(path):
    records.many(path, 3, 10, 2)
    from fedkeel.dashboard.feed import Feed
    from fedkeel.ship.ledger import Ledger

    def verdict(passed: bool) -> dict[str, object]:
        found = [{"rule": "accuracy(least=0.9)", "passed": passed, "text": "", "figures": {}}]
        return {"stage": "production", "version": "1.2.0", "passed": passed, "findings": found}

    with Ledger(path) as ledger:
        ledger.write_meta({"verdicts": [verdict(True), verdict(False)]})
    feed = Feed(path)
    feed.step()
    told = prometheus.exposition(feed).decode()
    assert 'fedkeel_release_passed{stage="production",version="1.2.0"} 0.0' in told
    assert 'fedkeel_release_rule_passed{rule="accuracy(least=0.9)",stage="production"} 0.0' in told


def test_half_a_count_is_not_told(tmp_path, path):
    records.many(path, 300, 10, 2)
    from fedkeel.dashboard.feed import Feed

    feed = Feed(path)
    feed.step(rows=10)
    told = prometheus.exposition(feed).decode()
    assert "fedkeel_ledger_behind_rounds 295.0" in told
    assert "fedkeel_updates_total" not in told


def test_health(tmp_path, path):
    path.write_text("no ledger at all")
    with records.dashboard(tmp_path) as address:
        end = time.monotonic() + 15
        while records.get(f"{address}healthz")[0] != 503:
            assert time.monotonic() < end
        path.unlink()
        records.begin(path).close()
        until(address, lambda s: s["status"] == "empty")
        status, _, body = records.get(f"{address}healthz")
        assert (status, json.loads(body)) == (200, {"status": "empty", "round": 0, "behind": 0})


def fedkeel(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "fedkeel", "dashboard", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )


def test_wrong_input_is_one_sentence(tmp_path):
    (tmp_path / "notes.txt").touch()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        (tmp_path / "empty").mkdir()
        for arguments, sentence in (
            ([], "DIRECTORY is missing: name the directory of a run"),
            ([tmp_path / "no"], "does not exist: name the directory of a run"),
            ([tmp_path], "holds no run: name the directory of a run"),
            ([tmp_path / "empty", "--port", port], f"--port {port} cannot be listened at (Address already in use)"),
            (
                [tmp_path / "empty", "--host", "no.such.invalid"],
                "--host no.such.invalid --port 8600 cannot be listened",
            ),
        ):
            done = fedkeel(*arguments)
            assert done.returncode == 2, arguments
            assert sentence in done.stderr
            assert done.stderr.count("\n") == 1


def test_alert_rules_are_written(tmp_path):
    done = fedkeel("--alerts", tmp_path / "alerts.yml")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "alerts.yml").read_text() == prometheus.ALERTS.read_text()


def test_logs_are_json_lines(tmp_path, path):
    records.begin(path).close()
    command = [sys.executable, "-m", "fedkeel", "dashboard", str(tmp_path), "--port", "0", "--log-json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1) as started:
        address = started.stdout.readline().split()[1]
        records.get(f"{address}healthz?a=%22")
        started.terminate()
        lines = [json.loads(line) for line in started.communicate(timeout=20)[1].splitlines()]
    (request,) = [line for line in lines if line["event"] == "request"]
    assert (request["method"], request["path"], request["status"]) == ("GET", "/healthz?a=%22", 200)
    assert abs(request["time"] - time.time()) < 600
    assert {line["level"] for line in lines} == {"info"}


def test_an_interrupt_ends_it_well(tmp_path, path):
    records.begin(path).close()
    command = [sys.executable, "-u", "-m", "fedkeel", "dashboard", str(tmp_path), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as started:
        address = started.stdout.readline().split()[1]
        assert records.get(f"{address}healthz")[0] == 200
        started.send_signal(2)
        _, said = started.communicate(timeout=20)
    assert (started.returncode, said) == (0, "")
