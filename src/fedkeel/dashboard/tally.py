"""What is known of a run so far: sums that grow with each round that is read, bounded however long it runs."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from fedkeel.dashboard.bins import POINTS, Bins, Point, Span
from fedkeel.ship.summary import natural

END = ("late", "end")  # work that was under way when the run ended: nothing went wrong
LOST = frozenset(("train", "transport", "sum", "late"))  # nobody is accused
RECENT = 20  # rounds that tell how it goes now
NEWEST = 20  # clients whose newest refusal is kept word by word
CURVES = 8  # metrics, and classes of devices, that are drawn
CLASS = "class/"  # scopes of metrics, one a class of devices
_MOST_CURVES = 60
_MOST_REASON = 300


@dataclass(slots=True, eq=False)
class Client:
    """All that the page says of one client. `round` is the last one with news of it, 0 before the first."""

    name: str
    device: str = ""
    used: int = 0
    unused: int = 0
    refused: int = 0
    lost: int = 0
    weight: float = 0.0
    up: int = 0
    down: int = 0
    stale: int = 0
    aged: int = 0
    staleness: int | None = None
    version: int | None = None  # the model that its newest judged work began from
    trust: float | None = None
    round: int = 0
    wall: float | None = None
    state: str = "unseen"  # unseen, used, unused, refused, lost, shut out
    reason: str = ""
    reason_round: int = 0
    hostile: bool | None = None
    key: list[tuple[int, int, str]] = field(init=False)

    def __post_init__(self) -> None:
        self.key = natural(self.name)


@dataclass(slots=True)
class Rule:
    """What one rule at one stage turned away. `outcome`: refused, lost, or given up as the run ended."""

    outcome: str
    updates: int = 0
    clients: set[str] = field(default_factory=set)
    round: int = 0
    reason: str = ""


class Refusal(NamedTuple):
    """A refusal, word by word as the ledger has it (up to 300 characters)."""

    round: int
    client: str
    stage: str
    rule: str
    reason: str


class RoundLine(NamedTuple):
    """A line of the ledger's rounds, as `ROUND_COLUMNS` names them."""

    round: int
    version: int
    time: float
    skipped: str | None
    bytes_up: int
    bytes_down: int
    epsilon: float | None
    seconds: str
    wall: float


ROUND_COLUMNS = ", ".join(RoundLine._fields)
UPDATE_COLUMNS = (
    "round, client, stage, rule, reason, weight, trust, staleness, bytes_up, bytes_down, CAST(hostile AS INTEGER)"
)


class Tally:
    """The sums. `add_round` once for each round in order, with all its updates; `set_metrics` after it."""

    def __init__(self, devices: dict[str, str]) -> None:
        """`devices`: client -> class of its device, as far as the ledger names them."""
        self.devices = len(devices)
        self.clients = {name: Client(name, device) for name, device in devices.items()}
        self.total = Span()
        self.spans: Bins[Span] = Bins(Span)
        self.recent: deque[Span] = deque(maxlen=RECENT)
        self.walls: deque[float] = deque(maxlen=RECENT + 1)
        self.last: RoundLine | None = None
        self.why_skipped = ""
        self.ended = False
        self.rules: dict[tuple[str, str], Rule] = {}
        self.newest: dict[str, Refusal] = {}  # client -> its newest; those of late, the newest last
        self.parts: dict[str, float] = {}
        self.curves: dict[tuple[str, str], Bins[Point]] = {}
        self.best: dict[tuple[str, str], Point] = {}  # where each metric was highest
        self.open: dict[tuple[str, str], Point] = {}  # metrics of the last evaluated round: more may come
        self.evaluated = -1

    @property
    def round(self) -> int:
        return self.last.round if self.last else 0

    def add_round(self, line: RoundLine, updates: Iterable[tuple[Any, ...]]) -> int:
        """Take in a round; how many updates it had."""
        seconds = {part: value or 0.0 for part, value in json.loads(line.seconds).items()}
        for part, value in seconds.items():
            self.parts[part] = self.parts.get(part, 0.0) + value
        span = Span(rounds=1, up=line.bytes_up, down=line.bytes_down, round=line.round, time=line.time)
        span.seconds, span.epsilon, span.skipped = sum(seconds.values()), line.epsilon, int(line.skipped is not None)
        began = line.version - (0 if line.skipped is not None else 1)
        count = 0
        for update in updates:
            self._add(span, line, began, update)
            count += 1
        self.why_skipped = line.skipped or self.why_skipped
        self.last = line
        self.walls.append(line.wall)
        self.recent.append(span)
        self.total.merge(span)
        self.spans.at(line.round).merge(span)
        return count

    def _add(self, span: Span, line: RoundLine, began: int, update: tuple[Any, ...]) -> None:
        """Take in an update; `began` is the version that the round's work was added to."""
        _, name, stage, rule, reason, weight, trust, staleness, up, down, hostile = update
        client = self.clients.get(name)
        if client is None:
            client = self.clients[name] = Client(name)
        client.up += up
        client.down += down
        if (stage, rule) == END:
            self.ended = True
            self._count(stage, rule, line.round, name, reason)
            return
        client.round, client.wall = line.round, line.wall
        if trust is not None:
            client.trust = trust
        if hostile is not None:
            client.hostile = bool(hostile)
        if staleness is not None:
            client.staleness, client.version = staleness, began - staleness
            client.stale += staleness
            client.aged += 1
            span.stale += staleness
            span.aged += 1
            span.oldest = max(span.oldest, staleness)
        if stage is not None:
            self._turn_away(span, client, self._count(stage, rule, line.round, name, reason))
        elif weight:
            client.used += 1
            client.weight += weight
            client.state = "used"
            span.used += 1
            span.classes[client.device] = span.classes.get(client.device, 0) + 1
        else:
            client.unused += 1
            client.state = "unused"
            span.unused += 1

    def _count(self, stage: str, rule: str | None, round: int, client: str, reason: str | None) -> Refusal:
        """Count an update that was not used at the rule that it was turned away by."""
        refusal = Refusal(round, client, stage, rule or "", (reason or "")[:_MOST_REASON])
        found = self.rules.get((stage, refusal.rule))
        if found is None:
            lost = "given up" if (stage, rule) == END else "lost"
            found = self.rules[stage, refusal.rule] = Rule(lost if stage in LOST else "refused")
        found.updates += 1
        found.clients.add(client)
        found.round, found.reason = round, refusal.reason
        return refusal

    def _turn_away(self, span: Span, client: Client, refusal: Refusal) -> None:
        """Take in a client's update that was refused or lost."""
        client.reason, client.reason_round = f"{refusal.rule}: {refusal.reason}", refusal.round
        if refusal.stage in LOST:
            client.lost += 1
            client.state = "lost"
            span.lost += 1
            return
        client.refused += 1
        client.state = "shut out" if refusal.stage == "quarantine" else "refused"
        span.refused += 1
        self.newest.pop(client.name, None)
        self.newest[client.name] = refusal
        if len(self.newest) > NEWEST:
            del self.newest[next(iter(self.newest))]

    def set_metrics(self, rows: Iterable[tuple[Any, ...]]) -> None:
        """Take in (round, time, scope, name, value, low, high) by round, from round `evaluated` on, that one anew."""
        self.open = {}
        for round, time, scope, name, *figures in rows:
            if round != self.evaluated:
                self._settle()
                self.evaluated = round
            key = (scope, name)
            known = self.curves.keys() | self.open.keys()
            if key in known or (len(known) < _MOST_CURVES and sum(k[0] == scope for k in known) < CURVES):
                self.open[key] = Point(round, time, *figures)

    def _settle(self) -> None:
        """What is open gets its place in its curve: its round is over."""
        for key, point in self.open.items():
            if key not in self.curves:
                self.curves[key] = Bins(Point, POINTS // 2 if key[0].startswith(CLASS) else POINTS)
            self.curves[key].at(point.round).merge(point)
            best = self.best.get(key)
            if point.value is not None and (best is None or best.value is None or point.value > best.value):
                self.best[key] = point
        self.open = {}

    def points(self, scope: str, name: str) -> list[Point]:
        """A metric's curve, its newest point among it."""
        curve = self.curves.get((scope, name))
        newest = self.open.get((scope, name))
        return (curve.items if curve else []) + ([newest] if newest else [])
