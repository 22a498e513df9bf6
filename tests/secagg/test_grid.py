"""Quantised rows: bounded, never wrapped, and what their sum is read as."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkeel.core.errors import DecodeError, InputError
from fedkeel.core.keys import Key
from fedkeel.secagg.quantise import Grid

ROUNDINGS = ["zero", "nearest", "stochastic"]
VALUES = st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=30)


def signed(words):
    return words.view(f"<i{words.itemsize}").astype(object)


@settings(max_examples=150, deadline=None)
@given(
    VALUES,
    st.floats(1e-20, 1e20),
    st.integers(1, 10_000),
    st.sampled_from(ROUNDINGS),
    st.sampled_from(["column", "norm"]),
    st.sampled_from([32, 64]),
)
def test_a_row_is_within_a_unit_of_its_clipped_self(values, bound, rows, rounding, by, bits):
    grid = Grid.finest(bound, rows, by, rounding, bits)
    row = torch.tensor(values)
    found = grid.decode(grid.encode(row, Key(3)), 1)
    exact = row.double().numpy()
    if by == "norm":
        exact = exact * min(1.0, bound / float(np.linalg.norm(exact))) if exact.any() else exact
    wanted = np.clip(exact, -bound, bound)
    far = {"zero": 1, "nearest": 0.5, "stochastic": 1}[rounding] * grid.unit
    # Beside the rounding: the bound is cut to whole units, and a norm is scaled to a hair less.
    assert np.all(np.abs(found - wanted) <= np.maximum(far, grid.unit * (1 - 1e-9)) + 2.0**-29 * np.abs(wanted))
    if rounding == "zero":
        assert np.all(np.abs(found) <= np.abs(wanted))
        if by == "norm":
            assert math.fsum(v * v for v in found / bound) <= 1


def test_rounding_towards_zero_keeps_the_norm_to_the_last_bit():
    """In integers, on a grid so fine that rounding itself would not make up for an error of float64."""
    grid = Grid.finest(1.0, 1, by="norm", rounding="zero", bits=64)
    for row in torch.randn(500, 40, generator=Key(2).torch()) * 3:
        assert sum(int(q) ** 2 for q in signed(grid.encode(row))) <= grid.levels**2


@settings(max_examples=60, deadline=None)
@given(st.floats(1e-30, 1e30), st.integers(1, 2**20), st.sampled_from([32, 64]))
def test_the_finest_grid_is_the_finest_power_of_two_that_holds_the_sum(bound, rows, bits):
    grid = Grid.finest(bound, rows, bits=bits)
    assert math.frexp(grid.unit)[0] == 0.5
    assert rows * grid.levels <= min(2 ** (bits - 1) - 1, 2**53)
    with pytest.raises(InputError, match="does not fit"):
        Grid(bound, grid.unit / 2, bits=bits).check(rows)


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sum_does_not_wrap_and_one_more_row_is_refused(bits, sign):
    grid = Grid.finest(1.0, 7, bits=bits)
    most = min(2 ** (bits - 1) - 1, 2**53) // grid.levels
    assert most >= 7
    words = grid.encode(torch.full((3,), 5.0 * sign))
    total = np.zeros_like(words)
    for _ in range(most):
        total += words
    assert grid.decode(total, most).tolist() == [sign * float(most)] * 3
    with pytest.raises(InputError, match=rf"sum of {most + 1} rows .* does not fit .* smaller, the unit coarser"):
        grid.decode(total, most + 1)


def test_the_sum_is_exact():
    grid = Grid.finest(3.0, 50, rounding="nearest")
    rows = torch.randn(50, 1000, generator=Key(1).torch())
    words = [grid.encode(row) for row in rows]
    total = sum(words[1:], words[0].copy())
    by_hand = [sum(int(signed(w)[c]) for w in words) * grid.unit for c in range(1000)]
    assert grid.decode(total, 50).tolist() == by_hand


def test_rounding_to_nearest_and_by_chance():
    grid = Grid(8.0, 1.0, rounding="nearest")
    row = torch.tensor([0.4, 0.6, -0.4, -0.6, 2.5, 3.5, 7.9, -7.9])
    assert signed(grid.encode(row)).tolist() == [0, 1, 0, -1, 2, 4, 8, -8]
    zero = Grid(8.0, 1.0, rounding="zero")
    assert signed(zero.encode(row)).tolist() == [0, 0, 0, 0, 2, 3, 7, -7]
    chance = Grid(8.0, 1.0, rounding="stochastic")
    many = signed(chance.encode(torch.full((100_000,), -2.75), Key(5)))
    assert set(many.tolist()) == {-2, -3}
    assert abs(float(many.mean()) + 2.75) < 6 * math.sqrt(0.75 * 0.25 / 100_000)
    assert signed(chance.encode(torch.full((100_000,), -2.75), Key(5))).tolist() == many.tolist()
    assert set(signed(chance.encode(torch.full((1000,), 9.0), Key(5))).tolist()) == {8}
    with pytest.raises(ValueError, match="needs a key"):
        chance.encode(row)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_stays_with_its_client(bad):
    row = torch.zeros(100_000)
    row[70_000] = bad
    with pytest.raises(ValueError, match="not finite"):
        Grid.finest(1.0, 3).encode(row)


def test_what_bounded_rows_can_not_sum_to_is_refused():
    grid = Grid(1.0, 1 / 8)
    assert grid.decode(np.array([24, 2**32 - 24], "<u4"), 3).tolist() == [3.0, -3.0]
    for word in (25, 2**32 - 25, 2**31):
        with pytest.raises(DecodeError, match="beyond what 3 rows"):
            grid.decode(np.array([0, word], "<u4"), 3)
    by_norm = Grid(1.0, 1 / 8, by="norm", rounding="zero")
    assert by_norm.decode(np.array([24, 0], "<u4"), 3).tolist() == [3.0, 0.0]
    with pytest.raises(DecodeError, match="longer than 3 rows"):
        by_norm.decode(np.array([24, 24], "<u4"), 3)


@pytest.mark.parametrize(
    ("bound", "unit", "more", "said"),
    [
        (0.0, 1.0, {}, "bound = 0.0"),
        (math.nan, 1.0, {}, "bound = nan"),
        (math.inf, 1.0, {}, "bound = inf"),
        (1.0, 0.0, {}, "unit = 0.0"),
        (1.0, 2.0, {}, "unit = 2.0"),
        (1.0, 1e-30, {}, "unit = 1e-30"),
        (1.0, 2.0**-31, {}, "does not fit 32 bits"),
        (1.0, 0.5, {"bits": 16}, "bits = 16"),
        (1.0, 0.5, {"rounding": "up"}, "rounding = 'up'"),
        (1.0, 0.5, {"by": "layer"}, "by = 'layer'"),
    ],
)
def test_a_grid_that_makes_no_sense_is_one_sentence(bound, unit, more, said):
    with pytest.raises(InputError, match=said):
        Grid(bound, unit, **more)


def test_finest_of_nothing():
    with pytest.raises(InputError, match="rows = 0"):
        Grid.finest(1.0, 0)
