"""Laws of every registered selector."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkeel.core.errors import InputError
from fedkeel.core.keys import Key
from fedkeel.core.registry import build, names

SELECTORS = names("selector")
CLIENTS = [f"client-{i:02d}" for i in range(13)]


@pytest.mark.parametrize("name", SELECTORS)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_selection_is_so_many_distinct_known_clients(name: str, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.text(min_size=1, max_size=4), min_size=1, max_size=20, unique=True))
    count = data.draw(st.integers(1, len(ids)))
    turn, key = data.draw(st.integers(0, 10**6)), Key.root(data.draw(st.integers(0, 100)))
    select = build("selector", name)
    chosen = select(ids, count, turn, key)
    assert isinstance(chosen, tuple)
    assert len(chosen) == len(set(chosen)) == count
    assert set(chosen) <= set(ids)
    assert select(data.draw(st.permutations(ids)), count, turn, key) == chosen


@pytest.mark.parametrize("name", SELECTORS)
def test_everyone_is_chosen_sooner_or_later(name: str) -> None:
    select = build("selector", name)
    seen = {c for turn in range(100) for c in select(CLIENTS, 3, turn, Key.root(0))}
    assert seen == set(CLIENTS)


@pytest.mark.parametrize("name", SELECTORS)
@pytest.mark.parametrize("count", [0, -1, 14])
def test_an_impossible_count_is_refused(name: str, count: int) -> None:
    with pytest.raises(InputError, match=f"{count} clients per round of 13"):
        build("selector", name)(CLIENTS, count, 0, Key.root(0))


@pytest.mark.parametrize("name", SELECTORS)
def test_an_id_given_twice_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="3 clients have 2 different ids"):
        build("selector", name)(["a", "b", "a"], 1, 0, Key.root(0))


@pytest.mark.parametrize("name", SELECTORS)
def test_the_global_generators_are_neither_read_nor_moved(name: str) -> None:
    import torch

    select = build("selector", name)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first = select(CLIENTS, 5, 3, Key.root(1))
    assert torch.equal(before, torch.get_rng_state())
    assert (numpy_before == np.random.get_state()[1]).all()  # noqa: NPY002
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(99)
        assert select(CLIENTS, 5, 3, Key.root(1)) == first


def test_uniform_is_uniform_over_pairs() -> None:
    """Pearson's chi-square over all ordered pairs of 5 clients, the keys fixed; 99.9% quantile at 19 degrees: 43.8."""
    select, ids, draws = build("selector", "uniform"), list("abcde"), 4000
    seen = Counter(select(ids, 2, turn, Key.root(7)) for turn in range(draws))
    expected = draws / 20
    assert len(seen) == 20
    assert sum((count - expected) ** 2 / expected for count in seen.values()) < 43.8


def test_uniform_depends_on_key_and_round() -> None:
    select = build("selector", "uniform")
    draws = {select(CLIENTS, 6, turn, Key.root(seed)) for turn in range(10) for seed in range(10)}
    assert len(draws) > 95


@given(n=st.integers(1, 15), count=st.integers(1, 15), start=st.integers(0, 50))
@settings(max_examples=60, deadline=None)
def test_round_robin_takes_everyone_once_before_anyone_twice(n: int, count: int, start: int) -> None:
    ids, count = CLIENTS[:n] if n <= 13 else CLIENTS, min(count, n, 13)
    select = build("selector", "round_robin")
    sequence = [c for turn in range(start, start + len(ids)) for c in select(ids, count, turn, Key.root(0))]
    for i in range(len(sequence) - len(ids) + 1):
        assert len(set(sequence[i : i + len(ids)])) == len(ids)
