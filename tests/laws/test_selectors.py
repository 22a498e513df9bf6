"""What particular selectors promise; the laws of all of them are in fedkeel.testing."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkeel.core.errors import InputError
from fedkeel.core.keys import Key
from fedkeel.core.registry import build
from fedkeel.core.roster import Candidates, Register, Roster

NAMES = [f"client-{i:02d}" for i in range(13)]


def federation(sizes: dict[str, int]) -> Roster:
    groups = {f"{group}-{i:03d}": group for group, size in sizes.items() for i in range(size)}
    return Roster(Register(list(groups), groups))


def test_a_roster_is_sorted_and_refuses_a_name_given_twice() -> None:
    assert Roster(["b", "a", "c"]).names == ("a", "b", "c")
    with pytest.raises(InputError, match="3 clients have 2 different ids"):
        Roster(["a", "b", "a"])


def test_uniform_is_uniform_over_pairs() -> None:
    """Pearson's chi-square over all ordered pairs of 5 clients, the keys fixed; 99.9% quantile at 19 degrees: 43.8."""
    select, who, draws = build("selector", "uniform"), Candidates.of(list("abcde")), 4000
    seen = Counter(tuple(select(who, 2, turn, Key.root(7)).tolist()) for turn in range(draws))
    expected = draws / 20
    assert len(seen) == 20
    assert sum((count - expected) ** 2 / expected for count in seen.values()) < 43.8


def test_uniform_is_uniform_where_it_does_not_list_all() -> None:
    """Chi-square over tenths of 10,000 clients; 99.9% quantile at 9 degrees: 27.9."""
    select, who = build("selector", "uniform"), Candidates.of([f"{i:05d}" for i in range(10_000)])
    drawn = np.concatenate([select(who, 10, turn, Key.root(3)) for turn in range(400)])
    counts = np.bincount(drawn // 1000, minlength=10)
    assert float(((counts - 400) ** 2 / 400).sum()) < 27.9


def test_uniform_depends_on_key_and_round() -> None:
    select, who = build("selector", "uniform"), Candidates.of(NAMES)
    draws = {tuple(select(who, 6, turn, Key.root(seed)).tolist()) for turn in range(10) for seed in range(10)}
    assert len(draws) > 95


@given(n=st.integers(1, 13), count=st.integers(1, 13))
@settings(max_examples=60, deadline=None)
def test_round_robin_takes_everyone_once_before_anyone_twice(n: int, count: int) -> None:
    who, count = Candidates.of(NAMES[:n]), min(count, n)
    select = build("selector", "round_robin")
    for round in range(1, 10):
        for place in select(who, count, round, Key.root(0)).tolist():
            who.roster.select(place, round)
        assert who.selected.max() - who.selected.min() <= 1


@pytest.mark.parametrize("count", [1, 4, 10])
def test_stratified_keeps_every_class_within_one_client_of_its_share(count: int) -> None:
    roster = federation({"A": 50, "B": 30, "C": 20})
    who = Candidates(roster, np.arange(100))
    select = build("selector", "stratified")
    for round in range(1, 40):
        for place in select(who, count, round, Key.root(round)).tolist():
            roster.select(place, round)
        wanted = np.array([0.5, 0.3, 0.2]) * round * count
        assert (np.abs(roster.given - wanted) <= 1).all(), (round, roster.given)


def test_stratified_by_quotas_and_what_is_left_of_a_class() -> None:
    roster = federation({"A": 4, "B": 4, "C": 1})
    who = Candidates(roster, np.arange(9))
    chosen = build("selector", "stratified", quotas={"A": 1, "B": 3})(who, 4, 1, Key.root(0))
    assert np.bincount(who.group[chosen], minlength=3).tolist() == [1, 3, 0]
    chosen = build("selector", "stratified", quotas={"C": 1})(who, 3, 1, Key.root(0))  # there is but one C
    assert np.bincount(who.group[chosen], minlength=3)[2] == 1
    with pytest.raises(InputError, match="quota for class 'D', the classes of devices are A, B, C"):
        build("selector", "stratified", quotas={"D": 1})(who, 3, 1, Key.root(0))
    with pytest.raises(InputError, match="sum to 0"):
        build("selector", "stratified", quotas={"A": 0})(who, 3, 1, Key.root(0))


def test_power_of_choice_takes_the_highest_losses_of_those_that_it_draws() -> None:
    roster = Roster(NAMES)
    for place in range(13):
        roster.select(place, 1)
        roster.answered(place, 1.0, 10.0, float(place))
    who = Candidates(roster, np.arange(13))
    everyone = build("selector", "power_of_choice", among=13)(who, 4, 2, Key.root(0))
    assert everyone.tolist() == [12, 11, 10, 9]
    first = Counter(int(build("selector", "power_of_choice", among=2)(who, 1, t, Key.root(0))[0]) for t in range(3000))
    # The larger of two: client i with probability 2 i / (13 * 12).
    assert all(abs(first[i] / 3000 - 2 * i / 156) < 0.03 for i in range(13))
    roster.loss[3] = np.nan  # nothing is known of it: it comes first
    assert int(build("selector", "power_of_choice", among=13)(who, 1, 2, Key.root(0))[0]) == 3


def test_power_of_choice_draws_by_examples() -> None:
    roster = Roster(NAMES[:2])
    for place, examples in enumerate((10.0, 30.0)):
        roster.answered(place, 1.0, examples, 1.0)
    who, select = Candidates(roster, np.arange(2)), build("selector", "power_of_choice", among=1)
    drawn = sum(int(select(who, 1, turn, Key.root(0))[0]) for turn in range(4000))
    assert abs(drawn / 4000 - 0.75) < 0.03


def test_oort_explores_then_prefers_useful_and_fast_clients() -> None:
    roster = Roster([f"{i:03d}" for i in range(60)])
    for place in range(30):
        roster.select(place, 1)
        roster.answered(place, 10.0 if place < 10 else 1.0, 10.0, 0.01 if place < 20 else 2.0)
    who = Candidates(roster, np.arange(60))
    early, late = ([build("selector", "oort")(who, 10, r, Key.root(k)) for k in range(60)] for r in (1, 500))
    assert 0.83 < np.mean([(c >= 30).mean() for c in early]) < 0.93  # 0.9 * 0.98 of the places
    assert 0.15 < np.mean([(c >= 30).mean() for c in late]) < 0.25
    exploited = np.concatenate([c[c < 30] for c in late])
    assert (exploited >= 20).mean() > 0.95, "losses count"
    slow = build("selector", "oort", explore=0.0, least=0.0, pace=0.5)
    roster.loss[:30] = 1.0
    assert (slow(who, 10, 500, Key.root(0)) >= 10).all(), "slow devices are held back"


@given(clients=st.integers(1, 30), rows=st.integers(1, 8), spare=st.integers(0, 3), seed=st.integers(0, 99))
@settings(max_examples=80, deadline=None)
def test_nobody_waits_longer_than_the_bound(clients: int, rows: int, spare: int, seed: int) -> None:
    """Whatever the selector wants for the places that are left."""
    rows = min(rows, clients)
    longest = -(-clients // rows) + spare
    roster = Roster([f"{i:02d}" for i in range(clients)])
    favourites = Key.root(seed).numpy().permutation(clients)
    for round in range(1, 6 * longest):
        free = np.arange(clients)
        first = roster.overdue(free, round, rows, longest)
        assert len(first) <= rows
        others = [int(i) for i in favourites if i not in first]
        for place in [*first.tolist(), *others[: rows - len(first)]]:
            roster.select(place, round)
        assert (round - roster.last < longest).all() or round < longest, (round, roster.last)
        assert (round + 1 - roster.last <= longest).all()


def test_the_bound_leaves_places_to_the_selector_as_long_as_it_can() -> None:
    roster = Roster(NAMES)
    assert len(roster.overdue(np.arange(13), 1, 3, 20)) == 0
