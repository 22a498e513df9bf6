"""clip: the norm is a promise, for any finite row."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkeel.core.errors import InputError
from fedkeel.core.keys import Key
from fedkeel.core.registry import build

KEYS = [Key.root(0)]


@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=30),
    st.floats(1e-44, 1e39),
)
@settings(max_examples=300, deadline=None)
def test_no_finite_row_leaves_longer_than_the_norm(values: list[float], norm: float) -> None:
    U = torch.tensor([values], dtype=torch.float32)
    before = U.clone()
    out, _ = build("row_transform", "clip", norm=norm)(U, KEYS, [{}])
    length = math.sqrt(math.fsum(v * v for v in out[0].double().tolist()))
    assert length <= norm
    assert torch.equal(U, before)
    if math.sqrt(math.fsum(v * v for v in values)) < norm * (1 - 1e-9):
        assert torch.equal(out, U)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e20, 3e38])
def test_a_clipped_row_keeps_its_direction(size: float) -> None:
    U = size * torch.randn(3, 1000, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    out, _ = build("row_transform", "clip", norm=1e-20)(U, KEYS * 3, [{}] * 3)
    cosine = torch.nn.functional.cosine_similarity(out.double() * 1e20, U.double() / size, dim=1)
    torch.testing.assert_close(cosine, torch.ones(3, dtype=torch.float64), atol=1e-9, rtol=0)
    torch.testing.assert_close(
        out.double().norm(dim=1), torch.full((3,), 1e-20, dtype=torch.float64), rtol=1e-6, atol=0
    )


def test_clipping_twice_changes_nothing() -> None:
    U = 100 * torch.randn(4, 3000, generator=torch.Generator().manual_seed(0))
    clip = build("row_transform", "clip", norm=2.5)
    once, _ = clip(U, KEYS * 4, [{}] * 4)
    assert torch.equal(clip(once, KEYS * 4, [{}] * 4)[0], once)


def test_nan_does_not_pass_a_clip_as_a_finite_row_and_zero_stays() -> None:
    """Traps: min(1, C / nan) is 1; a zero update divides by zero."""
    U = torch.zeros(3, 5)
    U[1, 2], U[2, 0] = torch.nan, -torch.inf
    memory = [{"kept": torch.ones(5)}, {}, {}]
    out, kept = build("row_transform", "clip", norm=1.0)(U, KEYS * 3, memory)
    assert torch.equal(out[0], torch.zeros(5))
    assert bool(out[1, 2].isnan())
    assert float(out[2, 0]) == -torch.inf
    assert kept is memory


@pytest.mark.parametrize("norm", [0.0, -1.0, math.inf, math.nan])
def test_a_norm_must_be_positive_and_finite(norm: float) -> None:
    with pytest.raises(InputError, match="'norm'"):
        build("row_transform", "clip", norm=norm)
