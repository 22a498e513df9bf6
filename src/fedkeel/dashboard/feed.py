"""The incremental reader: remembers where it stood in a ledger and reads on from there, a bounded piece at a time."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from fedkeel.core.errors import InputError
from fedkeel.dashboard.tally import CLASS, ROUND_COLUMNS, UPDATE_COLUMNS, RoundLine, Tally
from fedkeel.ship.ledger import Ledger

ROWS = 20_000  # updates read at a step, a round's more at most
_ROUNDS = 2_000  # rounds, and evaluations, read at a step
_FACTS = ("job", "rounds", "seed", "headline", "backend", "fedkeel", "plan", "verdicts")
_METRICS = f"""
WITH RECURSIVE evaluated(round) AS (
    SELECT min(round) FROM metrics WHERE round >= ?
    UNION ALL
    SELECT (SELECT min(m.round) FROM metrics m WHERE m.round > evaluated.round)
    FROM evaluated WHERE evaluated.round < ? LIMIT ?),
some AS (
    SELECT m.* FROM evaluated e CROSS JOIN metrics m ON m.round = e.round AND m.scope = ?
    UNION ALL
    SELECT m.* FROM evaluated e CROSS JOIN metrics m
    ON m.round = e.round AND m.scope >= '{CLASS}' AND m.scope < '{CLASS[:-1]}0' AND m.name IN ('accuracy', 'loss'))
SELECT some.round, coalesce(r.time, 0), scope, name, value, low, high
FROM some LEFT JOIN rounds r ON r.round = some.round WHERE some.round <= ? ORDER BY some.round, scope, name
"""


class Feed:
    """A ledger as it grows. `step` reads what is new; between steps nothing is open, and nothing is asked of the disk.

    A ledger that was rewound by a resume, or replaced, is read anew from its beginning.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.tally = Tally({})
        self.facts: dict[str, Any] = {}
        self.problem = ""
        self.there = False
        self.behind = 0  # rounds in the ledger that are not read yet
        self.revision = 0  # grows whenever anything here changes
        self.read = 0  # updates read since this object was made
        self._seen: object = None

    @property
    def headline(self) -> str:
        """The scope of metrics that the run is about."""
        return str(self.facts.get("headline", "global"))

    def step(self, rows: int = ROWS) -> bool:
        """Read on, at most about so many updates; whether there is more. Never raises for what a file holds."""
        try:
            self.there = self.path.is_file()
            if self.there:
                with Ledger(self.path, readonly=True) as ledger, ledger.snapshot():
                    self._read(ledger, rows)
            elif self.facts:
                self.tally, self.facts, self.behind = Tally({}), {}, 0
            self.problem = ""
        except (InputError, OSError, sqlite3.Error) as error:
            self.problem = str(error)
        except Exception as error:
            # A reader that died in silence would leave old figures standing as if they were new.
            self.tally = Tally({})  # half a round may be in it
            self.problem = f"{self.path} has a line that can not be understood ({type(error).__name__}: {error})"
        tally = self.tally
        seen = (id(tally), tally.round, tally.evaluated, tally.open, self.facts, self.problem, self.there, self.behind)
        if seen != self._seen:
            self._seen = seen
            self.revision += 1
        return not self.problem and self.behind > 0

    def _read(self, ledger: Ledger, rows: int) -> None:
        marks = ",".join("?" * len(_FACTS))
        found = ledger.scan(f"SELECT key, value FROM meta WHERE key IN ({marks})", *_FACTS)
        self.facts = {key: json.loads(value) for key, value in found}
        if not self._same(ledger):
            self.tally = Tally(dict(ledger.scan("SELECT client, device FROM clients")))
        tally = self.tally
        lines = ledger.scan(
            f"SELECT {ROUND_COLUMNS} FROM rounds WHERE round > ? ORDER BY round LIMIT {_ROUNDS}", tally.round
        )
        news = [RoundLine(*line) for line in lines]
        if news:
            self.read += _add(tally, news, _updates(ledger, news), rows)
        last = ledger.query("SELECT max(round) AS round FROM rounds")[0]["round"] or 0
        self.behind = last - tally.round
        most = _ROUNDS + 2  # those of the rounds just read, the one that is read anew, and round 0
        values = (max(tally.evaluated, 0), tally.round, most, self.headline, tally.round)
        tally.set_metrics(ledger.scan(_METRICS, *values))

    def _same(self, ledger: Ledger) -> bool:
        """Whether what was read still stands: its last round was written when it was, and the clients are as many."""
        last = self.tally.last
        if last is not None:
            found = list(ledger.scan("SELECT wall FROM rounds WHERE round = ?", last.round))
            if found != [(last.wall,)]:
                return False
        (count,) = next(ledger.scan("SELECT count(*) FROM clients"))
        return bool(self.tally.devices == count)


def _updates(ledger: Ledger, news: list[RoundLine]) -> Iterator[tuple[Any, ...]]:
    return ledger.scan(
        f"SELECT {UPDATE_COLUMNS} FROM updates WHERE round BETWEEN ? AND ? ORDER BY round, rowid",
        news[0].round,
        news[-1].round,
    )


def _add(tally: Tally, news: list[RoundLine], updates: Iterator[tuple[Any, ...]], most: int) -> int:
    """Take in rounds until there were `most` updates; how many there were."""
    count = 0
    groups = groupby(updates, key=lambda row: row[0])
    group = next(groups, None)
    for line in news:
        if group is not None and group[0] == line.round:
            count += tally.add_round(line, group[1])
            group = next(groups, None)
        else:
            tally.add_round(line, ())
        if count >= most:
            break
    return count


def find(directory: Path | str) -> Path:
    """Where the ledger of a run is, or will be: DIR is a run, or a folder that `fedkeel deploy init` wrote.

    Raises `InputError` where there can be none.
    """
    path = Path(directory)
    if not path.is_dir():
        problem = "is a file" if path.exists() else "does not exist"
        raise InputError(
            f"directory '{path}' {problem}: name the directory of a run, or a folder of `fedkeel deploy init`"
        )
    for run in (path, path / "run", path / "server" / "run"):
        if (run / "ledger.sqlite").is_file():
            return run / "ledger.sqlite"
    if (path / "server" / "server.toml").is_file():
        return path / "server" / "run" / "ledger.sqlite"
    if (path / "server.toml").is_file():
        return path / "run" / "ledger.sqlite"
    if (path / "job.toml").is_file() or (path / "checkpoints").is_dir() or not any(path.iterdir()):
        return path / "ledger.sqlite"
    raise InputError(
        f"directory '{path}' holds no run: name the directory of a run, or a folder of `fedkeel deploy init`"
    )
