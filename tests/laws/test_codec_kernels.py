"""The codecs' kernels: the same bits in every instruction set and by numpy, within their memory; and fair draws."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from fedkeel.core.keys import Key
from fedkeel.core.registry import parse
from fedkeel.kernels import bits, largest, native, quantise
from fedkeel.testing.codecs import LAYOUTS, hard_rows, same

SIZES = [1, 2, 7, 15, 16, 17, 33, 255, 4095, 4096, 4097, 9001]
TEXTS = [
    *(f"int{b}(per='{per}', stochastic={s})" for b in (8, 4) for per in ("row", "channel") for s in (True, False)),
    "sign",
    "qsgd",
    "qsgd(levels=1)",
    "qsgd(levels=127, bucket=7)",
    "top_k(share=0.02)",
    "top_k(share=0.3, values='int4')",
    "random_k",
    "adaptive(ratio=10)",
]


def path() -> Path:
    (found,) = Path(native.__file__).parent.glob("_native*")
    return found


@pytest.fixture(params=native.SETS)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[native.Library]:
    """The compiled kernels with one instruction set."""
    if isinstance(native.library(), str):
        pytest.skip(str(native.library()))
    try:
        library = native.Library(path(), request.param)
    except OSError as error:
        pytest.skip(str(error))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "library", lambda: library)
        yield library
    native.Library(path(), None)


class plain:  # noqa: N801 - reads as a word: with plain():
    """Without the compiled kernels."""

    def __enter__(self) -> None:
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(native, "library", lambda: "as if they were not built")

    def __exit__(self, *_: object) -> None:
        self.patch.undo()


@pytest.mark.parametrize("text", TEXTS)
def test_every_instruction_set_gives_the_bits_of_numpy(text: str, instruction_set: native.Library) -> None:
    for layout in LAYOUTS[:1] if text.startswith("adaptive") else LAYOUTS:
        columns = layout.columns
        codec, keys = parse("codec", text)(layout), [Key.root(3)]
        for what, row in [*hard_rows(columns), ("not finite", torch.full((columns,), torch.nan))]:
            compiled, by_numpy = torch.empty(columns), torch.empty(columns)
            data = bytes(codec.encode(row[None], keys)[0])
            codec.decode(memoryview(data), compiled)
            with plain():
                assert data == bytes(codec.encode(row[None], keys)[0]), what
                codec.decode(memoryview(data), by_numpy)
            assert same(compiled.nan_to_num(), by_numpy.nan_to_num()), what
            assert torch.equal(compiled.isnan(), by_numpy.isnan()), what


def guarded(size: int, dtype: type) -> tuple[np.ndarray, np.ndarray]:
    """An array between two runs of a magic number, and the whole of it."""
    whole = np.full(size + 128, 77, dtype)
    return whole[64 : 64 + size], whole


def untouched(whole: np.ndarray) -> bool:
    return bool((whole[:64] == 77).all() and (whole[-64:] == 77).all())


@pytest.mark.parametrize("size", SIZES)
def test_nothing_is_written_outside(size: int, instruction_set: native.Library) -> None:
    row = np.random.default_rng(size).standard_normal(size).astype(np.float32)
    bounds = np.unique(np.array([0, size // 3, size // 2, size], np.int64))
    for width, levels in ((8, 127), (4, 7)):
        scale = quantise.scales(quantise.peaks(row, bounds), levels)
        codes, whole = guarded(quantise.packed_bytes(size, width), np.uint8)
        quantise.quantise(row, bounds, scale, levels, width, 5, codes)
        assert untouched(whole)
        out, whole = guarded(size, np.float32)
        quantise.dequantise(codes, bounds, scale, width, out)
        assert untouched(whole)
        assert (np.abs(out - row) <= np.repeat(scale, np.diff(bounds)) * 1.001).all()
    places, whole = guarded(size + 17, np.uint32)
    least = int(np.float32(0.5).view(np.int32))
    count = instruction_set.above(row.ctypes.data, size, least, size, places.ctypes.data)
    assert untouched(whole)
    assert places[:count].tolist() == np.flatnonzero(np.abs(row) >= 0.5).tolist()
    few, whole = guarded(3 + 17, np.uint32)
    count = instruction_set.above(row.ctypes.data, size, 1, 3, few.ctypes.data)
    assert untouched(whole)
    assert (count > 3) == (size > 3)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("width", [1, 3, 8, 13, 31])
def test_bits_go_in_and_out(size: int, width: int, instruction_set: native.Library) -> None:
    values = np.random.default_rng(width).integers(0, 2**width, size).astype(np.uint32)
    packed = bits.pack(values, width)
    few = values % 50
    coded = bits.unary(few)
    with plain():
        assert np.array_equal(bits.pack(values, width), packed)
        assert np.array_equal(bits.unpack(packed, size, width), values)
        assert np.array_equal(bits.unary(few), coded)
        assert np.array_equal(bits.from_unary(coded, size), few)
    assert np.array_equal(bits.unpack(packed, size, width), values)
    assert np.array_equal(bits.from_unary(coded, size), few)
    for wrong in (size - 1, size + 1):
        with pytest.raises(ValueError, match="are wanted"):
            bits.from_unary(coded, wrong)
    with pytest.raises(ValueError, match="follow"):
        bits.from_unary(np.append(coded, np.uint8(0)), size)


def test_long_runs_of_zeros_are_one_number(instruction_set: native.Library) -> None:
    values = np.array([1_000_000, 0, 600_000, 3], np.uint32)
    coded = bits.unary(values)
    assert np.array_equal(bits.from_unary(coded, 4), values)
    with plain():
        assert np.array_equal(bits.unary(values), coded)
        assert np.array_equal(bits.from_unary(coded, 4), values)


def test_where_a_sample_misleads_the_largest_are_found_all_the_same() -> None:
    row = np.zeros(1_000_000, np.float32)
    row[7::15] = 1.0  # never in the sample
    assert np.array_equal(largest.largest(row, 10), np.arange(7, 157, 15))
    row[:] = 1.0  # all in the sample
    assert np.array_equal(largest.largest(row, 10), np.arange(10))


# -- the draws


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63 + 12345, Key.root(1).value, Key.root(2).value])
def test_scrambled_columns_look_random(seed: int) -> None:
    """Chi-square of high and middle bits, single bits, and correlation with neighbours near and far."""
    n = 1 << 20
    h = quantise.scrambled(seed, slice(0, n))
    for shift in (24, 16, 10):
        counts = np.bincount((h >> np.uint32(shift)) & 255, minlength=256)
        chi = float(((counts - n / 256) ** 2 / (n / 256)).sum())
        assert abs(chi - 255) < 5 * np.sqrt(2 * 255)
    u = h.astype(np.float64) / 2**32 - 0.5
    assert abs(u.mean()) < 5 * np.sqrt(1 / 12 / n)
    for lag in (1, 2, 3, 16, 512, 4096, 65536):
        assert abs(float((u[lag:] * u[:-lag]).mean())) < 5 / 12 / np.sqrt(n)
    pairs = np.bincount((h[::2] >> np.uint32(28)) * 16 + (h[1::2] >> np.uint32(28)), minlength=256)
    chi = float(((pairs - n / 512) ** 2 / (n / 512)).sum())
    assert abs(chi - 255) < 5 * np.sqrt(2 * 255)


def test_keys_have_streams_of_their_own() -> None:
    n = 1 << 16
    streams = np.stack([quantise.scrambled(Key.root(i).value, slice(0, n)) for i in range(30)])
    u = streams.astype(np.float64) / 2**32 - 0.5
    corr = 12 * (u @ u.T) / n
    assert float(np.abs(corr - np.eye(30)).max()) < 6 / np.sqrt(n)
    across = np.bincount(streams.T[:2000].reshape(-1) >> np.uint32(24), minlength=256)
    assert abs(float(((across - 60000 / 256) ** 2 / (60000 / 256)).sum()) - 255) < 5 * np.sqrt(2 * 255)
