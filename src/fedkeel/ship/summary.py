"""What a run's record says, in figures small enough to show: SQLite aggregates, whatever the size of the federation."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from fedkeel.ship import own, pace
from fedkeel.ship.ledger import Ledger, Row
from fedkeel.ship.rundir import RunDir

POINTS = 300  # the most points of a curve
DOTS = 240  # the most dots of one sort, on average
CLIENTS = 25  # the most lines of a table of clients
CELLS = 150  # the most cells of a picture along one side
FIGURES = ("norm", "cosine", "trust", "contribution", "staleness")  # of an update
LINES = 40  # the most lines of the table of rounds

# An update that never came to be judged is lost, not refused: nobody is accused.
_VERDICT = (
    "CASE WHEN stage IS NULL THEN 'admitted' WHEN stage IN ('train', 'transport', 'late') THEN 'lost' "
    "ELSE 'refused' END"
)
_NO_NORM = (
    f"SELECT count(*) AS n FROM updates WHERE (norm IS NULL OR norm > 1e300) AND {_VERDICT} != 'lost' "
    "AND stage IS NOT 'quarantine'"
)


class Point(NamedTuple):
    """A figure with its interval, at a round (or a moment, or so many bytes). None: it was no number, or has none."""

    round: float
    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Counts:
    """Updates by what the simulator knew (hostile or not) and by verdict. Unknown truth counts as honest."""

    truth: bool = False
    hostile_clients: int = 0
    clients: int = 0
    honest_admitted: int = 0
    honest_refused: int = 0
    hostile_admitted: int = 0
    hostile_refused: int = 0
    lost: int = 0

    @property
    def hostile(self) -> int:
        return self.hostile_admitted + self.hostile_refused

    @property
    def honest(self) -> int:
        return self.honest_admitted + self.honest_refused

    @property
    def refused(self) -> int:
        return self.honest_refused + self.hostile_refused

    @property
    def precision(self) -> float | None:
        """Of the refused updates, the share that was hostile."""
        return self.hostile_refused / self.refused if self.truth and self.refused else None

    @property
    def recall(self) -> float | None:
        """Of the hostile updates, the share that was refused."""
        return self.hostile_refused / self.hostile if self.truth and self.hostile else None


@dataclass(frozen=True)
class Grid:
    """Client x round, both binned: mean share of the weight, and the share of updates refused; NaN where none came.

    `hostile` of the first rows are hostile clients.
    """

    weight: list[list[float]]
    refused: list[list[float]]
    first: int
    last: int
    hostile: int
    clients: int


@dataclass(frozen=True)
class Run:
    """One run's figures, ready to be shown."""

    label: str
    path: Path
    job: str
    meta: dict[str, Any]
    rounds: int
    skipped: list[Row]
    series: dict[str, list[Point]]
    counts: Counts
    verdicts: list[Row]  # per bin of rounds: round, honest_admitted, honest_refused, hostile_admitted, hostile_refused
    refusals: list[Row]  # stage, rule, updates, hostile, clients, reason
    accused: list[Row]  # the clients refused most
    dots: dict[str, dict[str, list[tuple[int, float]]]]  # figure -> sort of update -> (round, figure)
    without_norm: int
    grid: Grid | None
    traffic: list[Row]
    bytes_up: int
    bytes_down: int
    seconds: tuple[list[int], dict[str, list[float]]]  # rounds, and part -> mean seconds at each
    parts: dict[str, float]  # part -> seconds in all
    epsilon: float | None
    spent: list[Point]  # epsilon over the rounds
    own: own.Own
    pace: pace.Pace
    table: list[Row] = field(default_factory=list)

    @property
    def main(self) -> str | None:
        """The metric that tells how good the model is: accuracy if there is one."""
        return next((name for name in ("accuracy", *self.series) if name in self.series), None)

    @property
    def final(self) -> Point | None:
        return self.series[self.main][-1] if self.main else None


_SPENT = "SELECT round, epsilon FROM rounds WHERE epsilon IS NOT NULL ORDER BY round"


def load(path: Path | str, label: str | None = None) -> Run:
    """Read a run directory. Raises `InputError` when there is none, or its ledger is not whole.

    Of the ledger's meta the report knows: job (name), plan ((stage, rules), ...), label_histogram (clients x classes),
    labels (names of the classes); what else is short is shown as it is.
    """
    run = RunDir(path)
    with run.ledger(readonly=True) as ledger:
        meta = ledger.meta
        counts = _counts(ledger)
        span = ledger.query(
            "SELECT count(*) AS n, min(round) AS first, max(round) AS last, total(bytes_up) AS up, "
            "total(bytes_down) AS down, max(epsilon) AS epsilon FROM rounds"
        )[0]
        first, last = span["first"] or 0, span["last"] or 0
        scope = meta.get("headline", "global")
        series = _series(ledger, scope)
        accused = _accused(ledger)
        step = max(1, math.ceil((last - first + 1) / CELLS))
        return Run(
            label=label or str(meta.get("job") or run.path.resolve().name),
            path=run.path.resolve(),
            job=run.job.read_text("utf-8", errors="replace"),
            meta=meta,
            rounds=span["n"],
            skipped=ledger.query(
                "SELECT skipped AS reason, count(*) AS rounds, min(round) AS first FROM rounds "
                "WHERE skipped IS NOT NULL GROUP BY skipped ORDER BY rounds DESC LIMIT 10"
            ),
            series=series,
            counts=counts,
            verdicts=_verdicts(ledger, first, step),
            refusals=_refusals(ledger),
            accused=accused,
            dots={column: _dots(ledger, counts, column) for column in FIGURES},
            without_norm=ledger.query(_NO_NORM)[0]["n"],
            grid=_grid(ledger, first, last),
            traffic=ledger.query(
                "SELECT min(round) AS round, avg(bytes_up) AS up, avg(bytes_down) AS down FROM rounds "
                "GROUP BY (round - ?) / ? ORDER BY 1",
                first,
                step,
            ),
            bytes_up=int(span["up"]),
            bytes_down=int(span["down"]),
            seconds=_seconds(ledger, first, step),
            parts=_parts(ledger),
            epsilon=max((e for e in (span["epsilon"], meta.get("epsilon")) if e is not None), default=None),
            spent=thin(
                [Point(row["round"], row["epsilon"]) for row in ledger.query(_SPENT)],
                POINTS,
            ),
            own=own.load(ledger, step, [row["client"] for row in accused]),
            pace=pace.load(ledger, scope, next(iter(series), None)),
            table=_table(ledger, series),
        )


def _series(ledger: Ledger, scope: str) -> dict[str, list[Point]]:
    """Every metric of what the run is about, accuracy and loss first, the first and last point always kept."""
    found: dict[str, list[Point]] = {}
    kept = None if scope == "global" else ("accuracy", "loss")  # what else is known of clients has its own place
    for row in ledger.metrics(scope=scope):
        if kept is not None and row["name"] not in kept:
            continue
        found.setdefault(row["name"], []).append(Point(row["round"], row["value"], row["low"], row["high"]))
    order = {"accuracy": 0, "loss": 1}
    return {name: thin(found[name], POINTS) for name in sorted(found, key=lambda n: (order.get(n, 2), n))}


def thin(items: Sequence[Any], most: int) -> list[Any]:
    """At most `most` items, evenly spread, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _counts(ledger: Ledger) -> Counts:
    rows = ledger.query(f"SELECT hostile, {_VERDICT} AS verdict, count(*) AS n FROM updates GROUP BY 1, 2")
    number = {(bool(row["hostile"]), row["verdict"]): 0 for row in rows}
    for row in rows:
        number[bool(row["hostile"]), row["verdict"]] += row["n"]
    who = ledger.query(
        "SELECT count(DISTINCT client) AS clients, count(DISTINCT CASE WHEN hostile = 1 THEN client END) AS hostile, "
        "max(hostile) IS NOT NULL AS truth FROM updates"
    )[0]
    return Counts(
        truth=bool(who["truth"]),
        hostile_clients=who["hostile"],
        clients=who["clients"],
        honest_admitted=number.get((False, "admitted"), 0),
        honest_refused=number.get((False, "refused"), 0),
        hostile_admitted=number.get((True, "admitted"), 0),
        hostile_refused=number.get((True, "refused"), 0),
        lost=number.get((False, "lost"), 0) + number.get((True, "lost"), 0),
    )


def _verdicts(ledger: Ledger, first: int, step: int) -> list[Row]:
    """Mean updates per round of each sort, per bin of rounds."""
    sorts = ", ".join(
        f"1.0 * sum(h = {h} AND v = '{verdict}') / count(DISTINCT round) AS {truth}_{verdict}"
        for h, truth in enumerate(("honest", "hostile"))
        for verdict in ("admitted", "refused")
    )
    judged = f"SELECT round, ifnull(hostile, 0) AS h, {_VERDICT} AS v FROM updates"
    return ledger.query(
        f"SELECT min(round) AS round, {sorts} FROM ({judged}) GROUP BY (round - ?) / ? ORDER BY 1",
        first,
        step,
    )


def _refusals(ledger: Ledger) -> list[Row]:
    return ledger.query(
        "SELECT stage, rule, count(*) AS updates, total(hostile) AS hostile, count(DISTINCT client) AS clients, "
        "reason FROM updates WHERE stage IS NOT NULL GROUP BY stage, rule ORDER BY updates DESC LIMIT 50"
    )


def _accused(ledger: Ledger) -> list[Row]:
    """The clients refused most, then hostile ones, then those of the most weight."""
    rows = ledger.query(
        f"SELECT client, max(hostile) AS hostile, count(*) AS updates, total({_VERDICT} = 'refused') AS refused, "
        f"total({_VERDICT} = 'lost') AS lost, avg(weight) AS weight, "
        "avg(CASE WHEN norm < 1e300 THEN norm END) AS norm, avg(CASE WHEN variance < 1e300 THEN variance END) "
        "AS variance, avg(cosine) AS cosine, avg(trust) AS trust, total(contribution) AS contribution "
        "FROM updates GROUP BY client ORDER BY refused DESC, hostile DESC, weight DESC, client LIMIT ?",
        CLIENTS,
    )
    for row in rows:
        last = ledger.query(
            "SELECT rule, reason FROM updates WHERE client = ? AND stage IS NOT NULL ORDER BY round DESC LIMIT 1",
            row["client"],
        )
        row["reason"] = f"{last[0]['rule']}: {last[0]['reason']}" if last else ""
    return rows


def _dots(ledger: Ledger, counts: Counts, column: str) -> dict[str, list[tuple[int, float]]]:
    """A figure of about `DOTS` updates of each sort, picked by a hash of their place in the ledger."""
    least = 0 if column == "norm" else -1e300  # a norm goes on a logarithmic scale
    result = {}
    for sort in ("honest_admitted", "honest_refused", "hostile_admitted", "hostile_refused"):
        truth, verdict = sort.split("_")
        stride = max(1, math.ceil(getattr(counts, sort) / DOTS))
        rows = ledger.query(
            f"SELECT round, {column} AS figure FROM updates WHERE {column} > ? AND {column} < 1e300 "
            f"AND ifnull(hostile, 0) = ? AND {_VERDICT} = ? AND (rowid * 7919 % 1000003) % ? = 0 "
            "ORDER BY rowid LIMIT ?",
            least,
            int(truth == "hostile"),
            verdict,
            stride,
            2 * DOTS,
        )
        if rows:
            result[sort] = [(row["round"], row["figure"]) for row in rows]
    return result


def _grid(ledger: Ledger, first: int, last: int) -> Grid | None:
    clients = ledger.query("SELECT client, max(ifnull(hostile, 0)) AS hostile FROM updates GROUP BY client")
    if not clients:
        return None
    clients.sort(key=lambda row: (-row["hostile"], natural(row["client"])))
    width = max(1, math.ceil((last - first + 1) / CELLS))
    height = max(1, math.ceil(len(clients) / CELLS))
    place = {row["client"]: i // height for i, row in enumerate(clients)}
    shape = (max(place.values()) + 1, (last - first) // width + 1)
    weight, refused, number = ([[0.0] * shape[1] for _ in range(shape[0])] for _ in range(3))
    for row in ledger.query(
        "SELECT client, (round - ?) / ? AS bin, total(weight) AS weight, count(*) AS n, "
        f"total({_VERDICT} = 'refused') AS refused FROM updates GROUP BY 1, 2",
        first,
        width,
    ):
        i, j = place[row["client"]], row["bin"]
        weight[i][j] += row["weight"]
        refused[i][j] += row["refused"]
        number[i][j] += row["n"]
    for i in range(shape[0]):
        for j in range(shape[1]):
            share = 1 / number[i][j] if number[i][j] else math.nan
            weight[i][j] *= share
            refused[i][j] *= share
    hostile = sum(row["hostile"] for row in clients)
    return Grid(weight, refused, first, last, math.ceil(hostile / height), len(clients))


def natural(name: str) -> list[tuple[int, int, str]]:
    """Sort key under which 'client 2' comes before 'client 10'."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d{1,18})", name) if part]


def _seconds(ledger: Ledger, first: int, step: int) -> tuple[list[int], dict[str, list[float]]]:
    """Rounds, one per bin, and part of a round -> its mean seconds in each, the costliest part first."""
    rows = ledger.query(
        "SELECT (round - ?) / ? AS bin, min(round) AS round, part.key AS part, avg(part.value) AS s "
        "FROM rounds, json_each(rounds.seconds) AS part GROUP BY 1, 3 ORDER BY 1",
        first,
        step,
    )
    rounds = {row["bin"]: row["round"] for row in reversed(rows)}
    place = {number: i for i, number in enumerate(sorted(rounds))}
    parts: dict[str, list[float]] = {}
    for row in rows:
        parts.setdefault(row["part"], [0.0] * len(place))[place[row["bin"]]] = row["s"] or 0.0
    return [rounds[number] for number in place], dict(sorted(parts.items(), key=lambda item: -sum(item[1])))


def _parts(ledger: Ledger) -> dict[str, float]:
    rows = ledger.query("SELECT key, total(value) AS s FROM rounds, json_each(rounds.seconds) GROUP BY key")
    return {row["key"]: row["s"] for row in rows}


def _table(ledger: Ledger, series: dict[str, list[Point]]) -> list[Row]:
    """Some rounds in figures, for those who read figures: the rounds that were evaluated, evenly spread."""
    values = {name: {p.round: p for p in points} for name, points in series.items()}
    numbers = sorted({p.round for points in series.values() for p in points})
    rows = []
    for number in thin(numbers, LINES):
        row: Row = {"round": number, "metrics": {name: points.get(number) for name, points in values.items()}}
        sums = ledger.query(
            f"SELECT total({_VERDICT} = 'admitted') AS admitted, total({_VERDICT} = 'refused') AS refused, "
            f"total({_VERDICT} = 'lost') AS lost FROM updates WHERE round = ?",
            number,
        )
        line = ledger.query("SELECT update_norm, bytes_up, bytes_down, skipped FROM rounds WHERE round = ?", number)
        rows.append(row | sums[0] | (line[0] if line else {}))
    return rows
