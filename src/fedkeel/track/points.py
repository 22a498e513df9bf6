"""What trackers are told: the ledger's rounds and metrics as points, read a piece at a time."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from fedkeel.dashboard.tally import END, LOST
from fedkeel.ship.ledger import Ledger

LATE = 100  # rounds for which figures of clients are looked for as the run goes on; all are once it is over
_ROUNDS, _FEW = 500, 10  # rounds read at a step; with the figures of every client
_STAGES = ("decode", "check", "screen", "weigh", "quarantine")  # where an update is refused
_PLAIN = re.compile(r"\w[\w .-]*", re.ASCII)
_TAKEN = re.compile(r"\.(low|high)$|-[0-9a-f]{8}$")  # names that we make ourselves
_MOST = 75  # characters of a part of a name; MLflow takes 250 in all

Figures = dict[int, dict[str, float]]
"""Round -> name -> value."""


@dataclass(frozen=True)
class Line:
    """Points of one round. `wall` is when it closed, in seconds since 1970."""

    round: int
    wall: float
    values: Mapping[str, float]


class Target(Protocol):
    """Where points go. It knows by itself what it holds, and so goes on wherever an earlier process was killed."""

    walls: dict[int, float]  # rounds that it holds points of, at least the last, and when they closed
    upto: int  # rounds up to this one are there, but for metrics that came late

    def rewind(self, round: int) -> None:
        """From this round on the points that are there no longer count."""

    def write(self, lines: list[Line]) -> None:
        """Add points by round, but none that is there already."""


@dataclass
class Reader:
    """Reads on for one target. The ledger is open only while it is read, never while a tracker is waited for."""

    path: Path
    target: Target
    clients: bool = False
    _counts: dict[int, int] = field(default_factory=dict)  # metrics read, by round

    def step(self, over: bool) -> bool:
        """Hand on some rounds; whether there are more. Until the run is `over` more may come of its newest round."""
        target = self.target
        with Ledger(self.path, readonly=True) as ledger, ledger.snapshot():
            walls = _walls(ledger)
            wrong = [round for round, wall in target.walls.items() if walls.get(round) != wall]
            if wrong:
                target.rewind(min(wrong))
                self._counts = {}
            settled = max(walls, default=0) - (not over)
            last = min(settled, target.upto + (_FEW if self.clients else _ROUNDS))
            found = self._late(ledger, 0 if over and target.upto >= settled else target.upto - LATE)
            if last > target.upto:
                _add(found, _rounds(ledger, target.upto + 1, last))
                _add(found, self._metrics(ledger, 0 if target.upto == 0 else target.upto + 1, last))
                if not found:  # a ledger that begins late
                    target.upto = last
        if found:
            try:
                target.write([Line(round, walls[round], found[round]) for round in sorted(found) if round in walls])
            except BaseException:
                self._counts = {}  # what was read was not written
                raise
        return target.upto < settled

    def _late(self, ledger: Ledger, first: int) -> Figures:
        """Metrics of rounds, from `first` on, that were written without them: clients may tell theirs late."""
        found: Figures = {}
        last = self.target.upto
        counted = f"SELECT round, count(*) FROM metrics WHERE round BETWEEN ? AND ? AND {self._wanted} GROUP BY round"
        for round, count in list(ledger.scan(counted, first, last)) if last else ():
            if self._counts.get(round) != count:
                _add(found, self._metrics(ledger, round, round))
        return found

    @property
    def _wanted(self) -> str:
        return "1" if self.clients else "NOT (scope >= 'client/' AND scope < 'client0')"

    def _metrics(self, ledger: Ledger, first: int, last: int) -> Figures:
        """Every metric, and the ends of its interval. One that was no number is NaN."""
        found: Figures = {}
        counts: dict[int, int] = {}
        sql = f"SELECT round, scope, name, value, low, high FROM metrics WHERE round BETWEEN ? AND ? AND {self._wanted}"
        for round, scope, metric, value, low, high in ledger.scan(sql, first, last):
            values, called = found.setdefault(round, {}), name(*scope.split("/", 1), metric)
            values[called] = math.nan if value is None else value
            values |= {f"{called}.{end}": v for end, v in (("low", low), ("high", high)) if v is not None}
            counts[round] = counts.get(round, 0) + 1
        self._counts |= counts
        return found


def name(*parts: str) -> str:
    """A name that every tracker takes, another for other parts, whoever chose them."""
    return "/".join(_part(part) for part in parts)


def _part(text: str) -> str:
    if _PLAIN.fullmatch(text) and len(text) <= _MOST and not _TAKEN.search(text):
        return text
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"x{re.sub(r'[^A-Za-z0-9_. -]', '_', text)}"[: _MOST - 9] + f"-{digest}"


def _walls(ledger: Ledger) -> dict[int, float]:
    """Round -> when it closed; round 0 stands for the moment when the first began."""
    walls: dict[int, float] = dict(ledger.scan("SELECT round, wall FROM rounds ORDER BY round"))
    for wall, seconds in ledger.scan("SELECT wall, seconds FROM rounds WHERE round = 1"):
        walls[0] = wall - sum(value or 0.0 for value in json.loads(seconds).values())
    return walls


def _rounds(ledger: Ledger, first: int, last: int) -> Figures:
    """What each round was."""
    (up, down), *_ = ledger.scan(
        "SELECT coalesce(sum(bytes_up), 0), coalesce(sum(bytes_down), 0) FROM rounds WHERE round < ?", first
    )
    found: Figures = {}
    for row in ledger.query("SELECT * FROM rounds WHERE round BETWEEN ? AND ? ORDER BY round", first, last):
        up, down = up + row["bytes_up"], down + row["bytes_down"]
        parts = {part: value or 0.0 for part, value in json.loads(row["seconds"]).items()}
        values: dict[str, Any] = {
            "round/version": row["version"],
            "round/skipped": int(row["skipped"] is not None),
            "round/time": row["time"],
            "round/update_norm": row["update_norm"],
            "bytes/up": row["bytes_up"],
            "bytes/down": row["bytes_down"],
            "bytes/up_total": up,
            "bytes/down_total": down,
            "privacy/epsilon": row["epsilon"],
            "seconds/total": sum(parts.values()),
            **{name("seconds", part): value for part, value in parts.items()},
            **dict.fromkeys(("updates/used", "updates/unused", "updates/refused", "updates/lost"), 0),
            **{f"refused/{stage}": 0 for stage in _STAGES},
        }
        found[row["round"]] = {key: value for key, value in values.items() if value is not None}
    for round, stage, used, count, stale, aged, oldest in ledger.scan(
        "SELECT round, stage, sum(weight > 0), count(*), total(staleness), count(staleness), max(staleness) "
        "FROM updates WHERE round BETWEEN ? AND ? AND (stage IS NULL OR (stage, rule) != (?, ?)) GROUP BY round, stage",
        first,
        last,
        *END,
    ):
        values = found[round]
        if stage is None:
            values["updates/used"], values["updates/unused"] = used or 0, count - (used or 0)
        else:
            values["updates/lost" if stage in LOST else "updates/refused"] += count
            if stage not in LOST:
                values[name("refused", stage)] = count
        if aged:
            # The mean over the stages, each by as many as tell it.
            values["staleness/told"] = values.get("staleness/told", 0) + aged
            values["staleness/mean"] = values.get("staleness/mean", 0) + stale
            values["staleness/max"] = max(values.get("staleness/max", 0), oldest)
    for values in found.values():
        if told := values.pop("staleness/told", 0):
            values["staleness/mean"] /= told
    return found


def _add(found: Figures, more: Figures) -> None:
    for round, values in more.items():
        found.setdefault(round, {}).update(values)
