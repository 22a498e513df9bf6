"""What a watcher should look at, told by the tally alone: how long it has been silent is the page's own to say."""

from __future__ import annotations

import statistics
from itertools import pairwise
from typing import NamedTuple

from fedkeel.dashboard.bins import Point, Span
from fedkeel.dashboard.tally import Tally
from fedkeel.ship import words

SKIPPED, REFUSED, LOST, FALLEN = 0.2, 0.3, 0.3, 0.05
"""From here on: share of recent rounds skipped, of recent updates refused or lost, and how far accuracy fell."""
_QUIET = (30.0, 3600.0)


class Concern(NamedTuple):
    """`level` is "act" where the model suffers, else "watch"."""

    level: str
    what: str
    why: str


def recent(tally: Tally) -> Span:
    """The last rounds together."""
    total = Span()
    for span in tally.recent:
        total.merge(span)
    return total


def pace(tally: Tally) -> float | None:
    """The usual time between two rounds, in seconds of the wall clock."""
    gaps = [max(b - a, 0.0) for a, b in pairwise(tally.walls)]
    return statistics.median(gaps) if gaps else None


def quiet_after(tally: Tally) -> float:
    """After how many seconds without a round the page says that there is no news."""
    usual = pace(tally)
    return _QUIET[0] if usual is None else min(max(6 * usual, _QUIET[0]), _QUIET[1])


def concerns(tally: Tally, headline: str) -> list[Concern]:
    """What is not as it should be, the gravest first."""
    found = [*_rounds(tally), *_updates(tally), *_quality(tally, headline)]
    return sorted(found, key=lambda concern: concern.level != "act")


def _rounds(tally: Tally) -> list[Concern]:
    lately = recent(tally)
    if not lately.skipped:
        return []
    level = "act" if lately.skipped >= SKIPPED * lately.rounds else "watch"
    what = f"{lately.skipped} of the last {words.count(lately.rounds, 'round')} skipped"
    return [Concern(level, what, f"the model was kept: {words.short(tally.why_skipped, 200)}")]


def _updates(tally: Tally) -> list[Concern]:
    lately, found = recent(tally), []
    sent = lately.used + lately.unused + lately.refused + lately.lost
    for name, number, most in (("refused", lately.refused, REFUSED), ("lost", lately.lost, LOST)):
        if number > most * sent:
            what = f"{100 * number / sent:.0f}% of the updates of the last {words.count(lately.rounds, 'round')} {name}"
            found.append(Concern("watch", what, f"more than {100 * most:.0f}%: see below by whom, and why"))
    return found


def _quality(tally: Tally, headline: str) -> list[Concern]:
    found = []
    for name in ("accuracy", "loss"):
        point = tally.open.get((headline, name))
        if point is not None and point.value is None:
            found.append(Concern("act", f"{name} is no number", f"the model of round {point.round} has diverged"))
    point, best = tally.open.get((headline, "accuracy")), tally.best.get((headline, "accuracy"))
    if point and best and _fell(point, best):
        what = f"accuracy fell by {100 * ((best.value or 0) - (point.value or 0)):.1f} points"
        now, then = words.number(point.value, True), words.number(best.value, True)
        found.append(Concern("act", what, f"{then} in round {best.round}, {now} in round {point.round}"))
    return found


def _fell(point: Point, best: Point) -> bool:
    """Whether an accuracy is well below the best, and their intervals, where they are known, lie apart."""
    if point.value is None or best.value is None:
        return False
    apart = point.high is None or best.low is None or point.high < best.low
    return apart and best.value - point.value > FALLEN
