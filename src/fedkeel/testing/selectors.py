"""Laws of selectors."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fedkeel.core.registry import Rule
from fedkeel.core.roster import Candidates, Register, Roster
from fedkeel.testing.harness import KEY, hold, law


def candidates(count: int, *, round: int = 5, busy: int = 0) -> Candidates:
    """Clients of three classes of devices, of whom some have worked; the last `busy` are at work."""
    names = [f"client-{i:03d}" for i in range(count)]
    roster = Roster(Register(names, {name: "ABC"[i % 3] for i, name in enumerate(names)}))
    draw = KEY.fold("roster", count).numpy()
    for place in np.flatnonzero(draw.random(count) < 0.6).tolist():
        roster.select(place, int(draw.integers(1, round + 1)))
        roster.busy[place] = False
        if draw.random() < 0.8:
            roster.answered(place, float(draw.exponential(3)), float(draw.integers(1, 99)), float(draw.exponential()))
    return Candidates(roster, np.arange(count - busy))


def _given() -> Iterator[tuple[Candidates, int]]:
    for n in (1, 2, 3, 7, 40):
        for count in {1, 2, n // 2, n - 1, n}:
            if 1 <= count <= n:
                yield candidates(n + 2, busy=2), count
                yield Candidates.of([f"client-{i}" for i in range(n)]), count


@law("selector")
def chooses_so_many_distinct_positions(rule: Rule) -> None:
    for who, count in _given():
        for round in (1, 5, 1000):
            chosen = np.asarray(rule(who, count, round, KEY))
            words = f"{count} of {len(who)} clients in round {round}: {chosen.tolist()}"
            known = chosen.ndim == 1 and chosen.dtype.kind in "iu"
            hold(known and ("poisson" in rule.definition.traits or len(chosen) == count), words)
            hold(len(set(chosen.tolist())) == len(chosen), words)
            hold(bool(((chosen >= 0) & (chosen < len(who))).all()), words)


@law("selector", "poisson")
def each_is_drawn_by_itself_at_the_rate_of_the_cohort_to_all(rule: Rule) -> None:
    who, rounds = Candidates.of([f"client-{i:02d}" for i in range(20)]), 2000
    drawn = np.zeros((rounds, 20))
    for round in range(rounds):
        drawn[round, np.asarray(rule(who, 5, round, KEY))] = 1
    hold(bool((np.abs(drawn.mean(0) - 0.25) < 5 * np.sqrt(0.25 * 0.75 / rounds)).all()), f"rates {drawn.mean(0)}")
    together = np.abs(np.corrcoef(drawn.T) - np.eye(20)).max()
    hold(bool(together < 6 / np.sqrt(rounds)), f"two clients are drawn together with a correlation of {together:.3f}")
    away = Candidates(who.roster, np.arange(10))
    mean = np.mean([len(np.asarray(rule(away, 5, round, KEY))) for round in range(rounds)])
    hold(bool(abs(mean - 2.5) < 0.2), f"with half of the clients away it draws {mean:.2f} of 5: others in their place")


@law("selector")
def depends_on_what_is_known_and_the_key_alone(rule: Rule) -> None:
    for who, count in _given():
        before = {name: value.clone() for name, value in who.roster.state().items()}
        first, again = (np.asarray(rule(who, count, 5, KEY)).tolist() for _ in range(2))
        hold(first == again, f"{count} of {len(who)}: called again it chose {again}, not {first}")
        known = all(bool((value.isnan() | (value == before[name])).all()) for name, value in who.roster.state().items())
        hold(known, "it changed what is known of the clients")


@law("selector")
def chooses_everyone_sooner_or_later(rule: Rule) -> None:
    who = Candidates.of([f"client-{i:02d}" for i in range(13)])
    for round in range(1, 300):
        for place in np.asarray(rule(who, 3, round, KEY.fold(round))).tolist():
            who.roster.select(place, round)
            who.roster.answered(place, 1.0 + place, 10.0, 1.0 / (1 + place))
    never = [name for name, count in zip(who.names, who.selected.tolist(), strict=True) if not count]
    hold(not never, f"in 300 rounds of 3 of 13 clients {', '.join(never)} never had work")
