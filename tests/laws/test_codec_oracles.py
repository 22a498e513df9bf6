"""Codecs of every column or few against slow oracles, by the papers' own equations."""

from __future__ import annotations

import math
import struct

import numpy as np
import pytest
import torch
from codec_cases import FLOATS, KEY, ROWS, by_hand, codec, normal, payload
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkeel.testing.codecs import SMALL, decoded, sent

pytestmark = pytest.mark.usefixtures("kernels")

# -- floats


@given(st.lists(st.floats(-65504, 65504, width=32), min_size=1))
def test_half_floats_are_those_of_numpy(values: list[float]) -> None:
    row = torch.tensor(values)
    assert payload("float16", row) == row.numpy().astype("<f2").tobytes()


@given(ROWS)
def test_bfloat16_is_rounding_to_even_of_the_upper_bits(values: list[float]) -> None:
    bits = np.array(values, np.float32).view(np.uint32).astype(np.int64)
    upper = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    upper = np.where(upper & 0x7FFF == 0x7F80, upper - 1, upper)  # the largest instead of infinity
    assert payload("bfloat16", torch.tensor(values)) == upper.astype("<u2").tobytes()


def test_what_is_beyond_a_half_is_its_largest_and_what_is_infinite_stays_so() -> None:
    row = torch.tensor([1e6, -7e4, 65519.0, math.inf, -math.inf, math.nan])
    found = sent(codec("float16", 6), row)
    assert found[:5].tolist() == [65504, -65504, 65504, math.inf, -math.inf]
    assert bool(found[5].isnan())
    assert float(sent(codec("bfloat16", 1), torch.tensor([-3.4028235e38]))[0]) == -torch.finfo(torch.bfloat16).max


# -- integers


@pytest.mark.parametrize(("text", "levels"), [("int8", 127), ("int4", 7)])
@pytest.mark.parametrize("stochastic", [True, False])
def test_integers_are_the_neighbours_of_the_value_by_its_scale(text: str, levels: int, stochastic: bool) -> None:
    row = normal(5001)
    steps = row.double() / float(row.abs().max()) * levels
    found = sent(codec(f"{text}(stochastic={stochastic})", 5001), row).double() / float(row.abs().max()) * levels
    torch.testing.assert_close(found, found.round(), atol=1e-4, rtol=0)
    if stochastic:
        assert bool(((found.round() >= steps.floor()) & (found.round() <= steps.ceil())).all())
        assert 0.3 < float((found.round() == steps.floor()).double().mean()) < 0.7
    else:
        away = ((steps - steps.floor()) - 0.5).abs() > 1e-4
        assert torch.equal(found.round()[away], steps.round()[away])


def test_runs_have_their_own_scales() -> None:
    row = torch.ones(SMALL.columns)
    for name, size in (("conv.weight", 1e3), ("conv.bias", 1e-3), ("fc.weight", 1.0)):
        row[SMALL.slices(name)[0]] = size
    row[SMALL.slices("conv.weight")[0]][:27] = 1e-5  # one of the four channels
    loss = {per: (sent(codec(f"int8(per='{per}')", SMALL), row) - row).abs() for per in ("row", "tensor", "channel")}
    assert float(loss["channel"].max()) <= 1e-4
    assert float(loss["tensor"][SMALL.slices("conv.bias")[0]].max()) < 1e-6
    assert float(loss["tensor"][SMALL.slices("conv.weight")[0]][:27].max()) >= 0.99e-5
    assert float(loss["row"][SMALL.slices("fc.weight")[0]].max()) > 0.5
    scales = {per: (len(payload(f"int8(per='{per}')", row, SMALL)) - SMALL.columns) // 4 for per in loss}
    assert scales == {"row": 1, "tensor": 5, "channel": 4 + 1 + 12 + 1 + 1}


def test_int4_lies_two_to_a_byte_the_even_column_low() -> None:
    found = payload("int4(stochastic=False)", torch.tensor([7.0, -7.0, 1.0, 0.0, -2.0]))
    assert found == struct.pack("<f", 1.0) + bytes([0x97, 0x01, 0x0E])


def test_signs_and_mean_magnitudes() -> None:
    row = torch.tensor([1.0, -2.0, 0.0, 5.0, -1.0, 0.5, 0.5, 0.0, -8.0])
    assert payload("sign", row) == struct.pack("<f", 2.0) + bytes([0b11101101, 0])
    assert sent(codec("sign", 9), row).tolist() == [2, -2, 2, 2, -2, 2, 2, 2, -2]


@pytest.mark.parametrize(("levels", "bucket"), [(1, 32), (4, 50), (127, 1000)])
def test_qsgd_draws_by_its_equation(levels: int, bucket: int) -> None:
    """xi = l/s with probability 1 - p and (l + 1)/s with p = |x| s / norm - l (Alistarh et al. 2017, section 3.1)."""
    row, times = normal(130), 1500
    built = codec(f"qsgd(levels={levels}, bucket={bucket})", 130)
    sends = built.encode(row.expand(times, -1), [KEY.fold(i) for i in range(times)])
    found = torch.stack([decoded(built, p, 130) for p in sends]).double()
    norms = torch.cat([b.double().norm().expand(len(b)) for b in row.split(bucket)])
    exact = row.double().abs() / norms * levels
    steps = found.abs() / norms * levels
    torch.testing.assert_close(steps, steps.round(), atol=1e-4, rtol=0)
    above = (steps.round() - exact.floor()).double()
    assert bool(((above == 0) | (above == 1)).all())
    assert bool(((found == 0) | (found.sign() == row.sign())).all())
    p = exact - exact.floor()
    assert bool(((above.mean(0) - p).abs() <= 5 * (p * (1 - p) / times).sqrt() + 1e-3).all())


def test_qsgd_travels_in_the_shortest_rice_code() -> None:
    """Against Rice codes written bit by bit, of every width."""
    row = normal(1000)
    for levels, bucket in ((1, 1000), (7, 512), (15, 64), (127, 16)):
        built = codec(f"qsgd(levels={levels}, bucket={bucket})", 1000)
        data = payload(f"qsgd(levels={levels}, bucket={bucket})", row)
        buckets, width = -(-1000 // bucket), (2 * levels).bit_length()
        scale = np.repeat(np.frombuffer(data, "<f4", buckets), bucket)[:1000]
        q = np.rint(decoded(built, data, 1000).numpy() / scale).astype(int).tolist()
        folded = [2 * abs(v) - (v < 0) for v in q]
        codes = [by_hand(folded, low, unary=low < width) for low in range(width + 1)]
        assert data[4 * buckets] == min(range(width + 1), key=lambda low: len(codes[low]))
        assert data[4 * buckets + 1 :] == codes[data[4 * buckets]]


# -- sparse


@settings(max_examples=200)
@given(st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, -2.0, 1e-45]) | FLOATS, min_size=1), st.floats(0.01, 1))
def test_top_k_takes_the_largest_and_of_equals_the_first(values: list[float], share: float) -> None:
    row = torch.tensor(values)
    count = min(max(round(share * len(row)), 1), len(row))
    order = sorted(range(len(row)), key=lambda i: (-abs(float(row[i])), i))[:count]
    wanted = torch.zeros(len(row)).index_copy(0, torch.tensor(order), row[order])
    assert torch.equal(sent(codec(f"top_k(share={share})", len(row)), row), wanted)


@pytest.mark.parametrize("columns", [200_000, 131_072])
@pytest.mark.parametrize("what", ["normal", "heavy", "few", "equal", "a period", "at the end"])
def test_top_k_of_a_long_row_is_that_of_torch(what: str, columns: int) -> None:
    """Rows for which a sample tells the threshold, and rows for which it misleads."""
    row = normal(columns)
    if what == "heavy":
        row = row**5
    elif what == "few":
        row[normal(columns, seed=1) < 2.8] = 0
    elif what == "equal":
        row = row.sign()
    elif what == "a period":
        row[::2] *= 1e3
        row[::3] *= 1e-3
    elif what == "at the end":
        row[-5000:] *= 1e6
    for share in (0.0001, 0.01, 0.2, 0.6):
        found = sent(codec(f"top_k(share={share})", columns), row)
        count = round(share * columns)
        wanted = torch.topk(row.abs(), count).values.sort().values
        assert torch.equal(found.abs().sort().values[-count:], wanted)
        assert bool(((found == 0) | (found == row)).all())
        if what == "equal":
            assert torch.equal(found[:count], row[:count])


@pytest.mark.parametrize("share", [0.5, 0.1, 0.01, 0.001])
def test_an_index_costs_the_logarithm_of_the_density_and_a_half_more(share: float) -> None:
    columns = 300_000
    row = torch.rand(columns, generator=torch.Generator().manual_seed(0))
    size = len(payload(f"top_k(share={share}, values='sign')", row))
    count = round(share * columns)
    bits = 8 * (size - 4 - (count + 7) // 8) / count
    assert bits < math.log2(1 / share) + 1.6
    entropy = -(share * math.log2(share) + (1 - share) * math.log2(1 - share)) / share
    assert bits < 1.04 * entropy + 0.01


@settings(max_examples=100)
@given(st.sets(st.integers(0, 999), min_size=1, max_size=200))
def test_positions_are_golomb_rice_codes_of_their_gaps(places: set[int]) -> None:
    row = torch.zeros(1000)
    row[sorted(places)] = 1.0
    data = payload(f"top_k(share={len(places) / 1000})", row)[4 * len(places) :]
    gaps = [b - a - 1 for a, b in zip([-1, *sorted(places)], sorted(places), strict=False)]
    density = len(places) / 1000
    best = min(range(12), key=lambda w: 1 + w + 1 / math.expm1(density * 2**w))
    assert data == by_hand(gaps, best)


def test_random_k_draws_every_column_equally_often() -> None:
    times, columns = 4000, 23
    built = codec("random_k(share=0.3, scaled=False)", columns)
    rows = built.encode(torch.ones(times, columns), [KEY.fold(i) for i in range(times)])
    hits = torch.stack([decoded(built, p, columns) for p in rows])
    assert bool((hits.sum(1) == 7).all())
    share = torch.tensor([1 / (b - a) for a, b in ((i * columns // 7, (i + 1) * columns // 7) for i in range(7))])
    wanted = share.repeat_interleave((1 / share).round().long())
    assert bool(((hits.mean(0) - wanted).abs() < 5 * (wanted * (1 - wanted) / times).sqrt()).all())
    assert rows[0][:8].tobytes() == struct.pack("<Q", KEY.fold(0).value)
