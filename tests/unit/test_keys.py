"""Keys: a stream depends on its key alone, and no global generator moves."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedkeel.core.keys import Key

PARTS = st.lists(st.integers(0, 2**40) | st.text(max_size=5), max_size=4)


@given(PARTS, PARTS)
def test_different_paths_give_different_keys(a, b):
    root = Key.root(0)
    assert (root.fold(*a) == root.fold(*b)) == (a == b)


def test_a_number_and_its_text_are_different_purposes():
    assert Key.root(0).fold(1) != Key.root(0).fold("1")
    assert Key.root(0).fold("ab") != Key.root(0).fold("a", "b")


def test_folding_is_pinned():
    """Golden: recorded runs must stay reproducible across versions."""
    assert Key.root(7).fold(3, "client", 12).value == 3160566067188496305


def test_the_same_key_gives_the_same_draws_and_touches_nothing_global():
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    key = Key.root(1).fold("x")
    assert torch.equal(torch.randn(5, generator=key.torch()), torch.randn(5, generator=key.torch()))
    assert np.array_equal(key.numpy().normal(size=5), key.numpy().normal(size=5))
    assert not torch.equal(torch.randn(5, generator=key.torch()), torch.randn(5, generator=key.fold(1).torch()))
    assert torch.equal(torch_state, torch.get_rng_state())
    assert np.array_equal(numpy_state, np.random.get_state()[1])  # noqa: NPY002


def test_streams_of_neighbouring_keys_are_uncorrelated():
    draws = np.stack([Key.root(0).fold(i).numpy().normal(size=2000) for i in range(20)])
    correlation = np.corrcoef(draws) - np.eye(20)
    assert np.abs(correlation).max() < 0.1
