"""Codecs: the laws with and without the compiled kernels, and slow oracles by the papers' own equations."""

from __future__ import annotations

import math
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedkeel import testing
from fedkeel.core.errors import DecodeError, InputError
from fedkeel.core.keys import Key
from fedkeel.core.layout import Entry, Layout
from fedkeel.core.registry import build, parse
from fedkeel.core.types import Codec
from fedkeel.testing.codecs import SMALL, decoded, sent

pytestmark = pytest.mark.usefixtures("kernels")

KEY = Key.root(7)
VARIANTS = [
    "float32",
    "float16",
    "bfloat16",
    "int8",
    "int8(per='channel', stochastic=False)",
    "int8(per='row')",
    "int4(per='channel')",
    "int4(per='row', stochastic=False)",
    "sign",
    "sign(per='channel')",
    "qsgd(levels=1, bucket=64)",
    "qsgd(levels=127)",
    "top_k",
    "top_k(share=1.0, values='int8')",
    "top_k(share=0.1, values='int4')",
    "top_k(share=0.3, values='sign')",
    "random_k(share=0.07)",
    "random_k(scaled=False)",
    "power_sgd(rank=1, iterations=1)",
    "layered(layers={'*': 'qsgd(bucket=100)'})",
    "adaptive(ratio=6)",
]
FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
ROWS = st.lists(
    FLOATS | st.sampled_from([0.0, -0.0, 1.0, 0.5, -1.5, 3.4028235e38, 1e-45, 65504.0, 65520.0]), min_size=1
)


def flat(columns: int) -> Layout:
    return Layout((Entry("values", (columns,), "float32", "param", True),))


def codec(text: str, layout: Layout | int) -> Codec:
    built: Codec = parse("codec", text)(flat(layout) if isinstance(layout, int) else layout)
    return built


def payload(text: str, row: Tensor, layout: Layout | None = None, key: Key = KEY) -> bytes:
    return bytes(codec(text, layout or len(row)).encode(row[None], [key])[0])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("text", VARIANTS)
def test_a_codec_keeps_the_laws_whatever_its_parameters(text: str) -> None:
    testing.check("codec", parse("codec", text))


@pytest.mark.parametrize("text", VARIANTS)
@settings(max_examples=40, deadline=None)
@given(values=ROWS, seed=st.integers(0, 3))
def test_any_finite_row_comes_back_within_the_error(text: str, values: list[float], seed: int) -> None:
    row = torch.tensor(values)
    built = codec(text, len(row))
    gap = (sent(built, row, Key.root(seed)).double() - row.double()).abs()
    assert bool((gap <= built.error(row)).all())


@pytest.mark.parametrize("text", VARIANTS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_bytes_are_a_row_or_a_decode_error(text: str, data: st.DataObject) -> None:
    built, out = codec(text, SMALL), torch.empty(SMALL.columns)
    good = bytes(built.encode(normal(1, SMALL.columns), [KEY])[0])
    given_bytes = data.draw(st.binary(max_size=40) | st.binary(min_size=len(good), max_size=len(good)))
    at = data.draw(st.integers(0, len(good)))
    for bad in (given_bytes, good[:at], given_bytes + good, good[:at] + given_bytes + good[at + len(given_bytes) :]):
        try:
            built.decode(memoryview(bad), out)
        except DecodeError:
            continue


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


def by_hand(values: list[int], low: int, *, unary: bool = True) -> bytes:
    """Rice codes as text: the low bits of all, then the rest in unary; each part filled up to whole bytes."""
    parts = ["".join(f"{v & (1 << low) - 1:0{low}b}"[::-1] if low else "" for v in values)]
    parts += ["".join("0" * (v >> low) + "1" for v in values)] if unary else []
    filled = [part + "0" * (-len(part) % 8) for part in parts]
    return b"".join(int(part[::-1], 2).to_bytes(len(part) // 8, "little") for part in filled if part)


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


# -- low rank


MATRICES = Layout(
    (
        Entry("conv.weight", (12, 6, 3, 3), "float32", "param", True),
        Entry("fc.weight", (40, 30), "float32", "param", True),
        Entry("fc.bias", (40,), "float32", "param", True),
    )
)


def test_power_sgd_gives_back_matrices_of_its_rank() -> None:
    row = torch.cat([(normal(m, 3) @ normal(3, n, seed=1)).flatten() for m, n in ((12, 54), (40, 30))] + [normal(40)])
    found = sent(codec("power_sgd(rank=3)", MATRICES), row)
    torch.testing.assert_close(found, row, atol=1e-4, rtol=1e-4)
    assert torch.equal(found[-40:], row[-40:])
    assert len(payload("power_sgd(rank=3)", row, MATRICES)) == 4 * (1 + 3 * 66 + 1 + 3 * 70 + 40)


def test_power_sgd_is_near_the_best_of_its_rank() -> None:
    """Eckart and Young: none of rank r is nearer than the first r singular values."""
    spectrum = torch.diag(0.7 ** torch.arange(30.0))
    M = torch.linalg.qr(normal(40, 30)).Q @ spectrum @ torch.linalg.qr(normal(30, 30, seed=1)).Q
    row = torch.cat([torch.zeros(648), M.flatten(), torch.zeros(40)])
    best = float(torch.linalg.svdvals(M)[4:].norm())
    errors = [float((sent(codec(f"power_sgd(rank=4, iterations={i})", MATRICES), row) - row).norm()) for i in (1, 2, 4)]
    assert best * 0.999 <= errors[2] <= 1.02 * best
    assert errors[1] <= 1.2 * best
    assert errors[2] <= errors[1] <= errors[0]


# -- mixed


def test_layered_gives_each_layer_the_first_codec_that_fits() -> None:
    row = normal(SMALL.columns)
    layers = {"*.bias": "float32", "conv": "top_k(share=0.1)", "*weight": "float16"}
    built = build("codec", "layered", layers=layers, rest="sign")(SMALL)
    found = sent(built, row)

    def of(vector: Tensor, name: str) -> Tensor:
        return vector[SMALL.slices(name)[0]]

    assert torch.equal(of(found, "conv.bias"), of(row, "conv.bias"))
    assert torch.equal(of(found, "fc.weight"), of(row, "fc.weight").half().float())
    conv = of(row, "conv.weight")
    wanted = sent(codec("top_k(share=0.1)", 108), conv)
    assert torch.equal(of(found, "conv.weight"), wanted)
    assert not built.exact
    assert not built.unbiased
    size = 4 * 4 + 8 + len(payload("top_k(share=0.1)", conv)) + 2 * 300 + (2 * 4 + 1)
    assert len(built.encode(row[None], [KEY])[0]) == size


def test_layered_claims_what_its_parts_claim() -> None:
    built = codec("layered(layers={'fc': 'int4', 'conv': 'random_k(share=0.5)'}, rest='float32')", SMALL)
    assert (built.lossless, built.unbiased, built.exact) == (False, True, True)
    assert codec("layered(layers={'*': 'float32'})", SMALL).lossless


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("layered(layers={'convv.*': 'float16'})", "fits no tensor of the model: did you mean 'conv"),
        ("layered(layers={'*': 'float17'})", "did you mean 'float16'"),
        ("layered(layers={'*': 'int8(stochastc=True)'})", "did you mean 'stochastic'"),
        ("layered(layers={'*': 16})", "'layers'"),
        ("layered", "needs parameter 'layers'"),
        ("adaptive(bytes=4)", "below one for each of 5 tensors"),
        ("adaptive(ratio=0)", "'ratio'"),
        ("top_k(share=0.0)", "'share'"),
        ("top_k(values='float64')", "'values'"),
        ("random_k(share=1.5)", "'share'"),
        ("int8(per='layer')", "'per'"),
        ("qsgd(levels=128)", "'levels'"),
        ("power_sgd(rank=0)", "'rank'"),
    ],
)
def test_a_user_is_told_what_is_wrong(text: str, said: str) -> None:
    with pytest.raises(InputError, match=said) as error:
        codec(text, SMALL)
    assert "\n" not in str(error.value)


@settings(max_examples=30, deadline=None)
@given(st.floats(0.5, 500), st.integers(0, 20), st.sampled_from([1e-20, 1.0, 1e30]))
def test_adaptive_never_exceeds_its_budget(ratio: float, seed: int, size: float) -> None:
    row = normal(SMALL.columns, seed=seed) * size
    row[SMALL.slices("fc.weight")[0]] *= 100
    budget = max(int(4 * SMALL.columns / ratio), 5)
    assert len(payload(f"adaptive(ratio={ratio})", row, SMALL)) <= budget
    assert len(payload(f"adaptive(bytes={budget})", row, SMALL)) <= budget


def test_adaptive_spends_its_bytes_where_they_save_most() -> None:
    """It is at least as near as any one codec of its menu of the same size, and nearer the more bytes it has."""
    layout = Layout(tuple(Entry(f"{i}", (50, 40), "float32", "param", True) for i in range(4)))
    row = torch.cat([normal(2000) * 0.01, normal(2000) ** 5, normal(2000).sign() * 3, normal(2000)])
    for text in (
        "top_k(share=0.01, values='int8')",
        "top_k(share=0.1, values='int4')",
        "sign",
        "int4(stochastic=False)",
    ):
        single = codec(f"layered(layers={{'*': {text!r}}})", layout)
        budget = len(single.encode(row[None], [KEY])[0]) + 4 + 3 * 8  # its own bookkeeping
        mixed = sent(codec(f"adaptive(bytes={budget})", layout), row)
        assert float((mixed - row).norm()) <= float((sent(single, row) - row).norm())
    errors = [
        float((sent(codec(f"adaptive(bytes={b})", layout), row) - row).norm()) for b in (4, 100, 1000, 9000, 40000)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] == pytest.approx(float(row.norm()))
    assert errors[-1] == 0


def test_adaptive_sends_a_tensor_that_is_not_finite_as_one() -> None:
    row = normal(SMALL.columns)
    row[SMALL.slices("conv.bias")[0].start] = math.inf
    found = sent(codec("adaptive(ratio=3)", SMALL), row)
    assert bool(found[SMALL.slices("conv.bias")[0]].isnan().all())
    assert int(found.isnan().sum()) == 4


# -- what is refused


def test_forged_payloads_are_refused_with_their_reason() -> None:
    row = normal(100)
    bad = struct.pack("<f", math.inf)
    cases = [
        ("int8", bad + payload("int8", row)[4:], "scale"),
        ("int8", struct.pack("<f", -1.0) + payload("int8", row)[4:], "scale"),
        ("int8", struct.pack("<f", 0.0) + payload("int8", row)[4:], "scale"),
        ("sign", bad + payload("sign", row)[4:], "scale"),
        ("qsgd", bad + payload("qsgd", row)[4:], "scale"),
        ("qsgd", payload("qsgd", row)[:4] + b"\x09" + payload("qsgd", row)[5:], "low bits"),
        ("qsgd", payload("qsgd", row)[:4] + b"\x05" + b"\xff" * 63, "above|largest"),
        ("top_k(share=0.02)", payload("top_k(share=0.02)", row)[:8] + b"\xff\xff", "numbers are coded|position"),
        ("top_k(share=0.02)", payload("top_k(share=0.02)", row)[:8], "take|hold|coded"),
        ("adaptive", b"\x77" + payload("adaptive", row)[1:], "number 119"),
        ("adaptive(bytes=100)", b"\x06" + struct.pack("<Q", 2**60) + b"1234", "bytes is declared|number"),
        ("adaptive(bytes=300)", b"\x17" + struct.pack("<Q", 2**60) + b"1234", "bytes is declared"),
        ("layered(layers={'*': 'top_k'})", struct.pack("<Q", 2**63) + b"1234", "is declared"),
        ("layered(layers={'*': 'top_k'})", b"1234", "ends before"),
        ("layered(layers={'*': 'top_k'})", payload("layered(layers={'*': 'top_k'})", row) + b"1", "follow"),
    ]
    for text, data, said in cases:
        with pytest.raises(DecodeError, match=said):
            codec(text, 100).decode(memoryview(data), torch.empty(100))


def test_a_low_rank_factor_that_is_not_finite_is_refused() -> None:
    data = bytearray(payload("power_sgd", normal(MATRICES.columns), MATRICES))
    for number in (math.nan, math.inf):
        data[40:44] = struct.pack("<f", number)
        with pytest.raises(DecodeError, match="not finite"):
            codec("power_sgd", MATRICES).decode(memoryview(data), torch.empty(MATRICES.columns))
