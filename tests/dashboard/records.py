"""Ledgers for the tests of the dashboard, and a dashboard to look at them with."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedkeel.core.types import ClientRow, Refusal, RoundReport
from fedkeel.ship.ledger import Ledger

USED = ClientRow("a", None, weight=1.0, trust=1.25, staleness=1, bytes_up=100, bytes_down=40)
REFUSED = ClientRow("b", Refusal("screen", "cosine", "its cosine is -0.4, below 0", -0.4), bytes_up=100)
LOST = ClientRow("c", Refusal("transport", "gone", "no answer"))


def write(ledger: Ledger, round: int, *rows: ClientRow, accuracy: float | None = None, **fields: Any) -> None:
    """Write a round, and what an evaluation after it found."""
    fields = {"bytes_down": 40, "seconds": {"train": 0.25, "aggregate": 0.05}, **fields}
    ledger.write_round(RoundReport(round, round, 2.0 * round, rows or (USED, REFUSED, LOST), **fields), {"b"})
    if accuracy is not None:
        ledger.write_metrics(round, round, {"accuracy": (accuracy, accuracy - 0.02, accuracy + 0.02), "loss": 1.0}, 100)


def begin(path: Path, devices: Mapping[str, str] | None = None, **facts: Any) -> Ledger:
    """A ledger with what a run writes before its first round."""
    ledger = Ledger(path)
    ledger.write_meta({"job": "watched", "rounds": 100, "headline": "global", "fedkeel": "0.1.0", **facts})
    ledger.write_clients({"a": "phone", "b": "phone", "c": "board"} if devices is None else devices)
    return ledger


def many(path: Path, rounds: int, clients: int, updates: int) -> None:
    """A long run of a large federation, written by SQLite itself."""
    begin(path, {f"client-{i:05}": "ABC"[i % 3] for i in range(clients)}, rounds=2 * rounds).close()
    db = sqlite3.connect(path)
    db.execute("PRAGMA synchronous = OFF")
    with db:
        db.execute(
            "WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r WHERE n < ?) INSERT INTO rounds SELECT "
            """n, n, n * 2.0, NULL, 0.1, 10000, 9000, NULL, '{"train":0.5,"aggregate":0.1}', 1.7e9 + n, NULL FROM r""",
            (rounds,),
        )
        refused = "(round + j) % 17 = 0"
        db.execute(
            "WITH RECURSIVE k(j) AS (SELECT 0 UNION ALL SELECT j + 1 FROM k WHERE j < :k - 1) INSERT INTO updates "
            "SELECT round, printf('client-%05d', (round * 7919 + j * 104729) % :n), "
            f"iif({refused}, 'screen', NULL), iif({refused}, 'cosine', NULL), iif({refused}, 'below 0', NULL), NULL, "
            f"iif({refused}, 0, 1.0 / :k), 1.0, 0.5, 0.1, ((round * 31 + j) % 100) / 50.0, NULL, 100, 5, j % 4, "
            "1000, 900, 1.0, '{}', NULL FROM rounds CROSS JOIN k",
            {"k": updates, "n": clients},
        )
        for name, value in (("accuracy", "1 - 1.0 / (1 + round / 1000.0)"), ("loss", "1.0 / (1 + round / 1000.0)")):
            db.execute(
                f"INSERT INTO metrics SELECT round, 'global', '{name}', round, {value}, {value} - 0.01, "
                f"{value} + 0.01, 1000 FROM rounds WHERE round % 2 = 0"
            )
    db.close()


@contextmanager
def dashboard(directory: Path | str, *options: str) -> Iterator[str]:
    """The command as its user starts it, on a free port; its address."""
    port = () if "--port" in options else ("--port", "0")
    command = [sys.executable, "-W", "error", "-m", "fedkeel", "dashboard", str(directory), *port, *options]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as started:
        try:
            assert started.stdout is not None
            line = started.stdout.readline()
            assert line.startswith("dashboard: http://"), (line, started.stderr and started.stderr.read())
            yield line.split()[1]
        finally:
            started.terminate()
            started.communicate(timeout=20)


def get(address: str, **headers: str) -> tuple[int, Mapping[str, str], bytes]:
    """Status, headers and body, whatever the status."""
    try:
        with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=20) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, error.read()


def state(address: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(get(f"{address}api/state")[2])
    return found
