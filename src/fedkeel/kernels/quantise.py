"""Rows as small integers, each run of columns with its scale. One row (P,) float32 at a time, P below 2^32.

`bounds` (s + 1,) int64 are where the s runs begin and end, none of them empty. The compiled kernels and numpy give the
same bits: what is rounded is rounded by integers.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedkeel.kernels import native

Floats = NDArray[np.float32]
Codes = NDArray[np.uint8]
Bounds = NDArray[np.int64]

FINEST = 2.0**-100
"""The smallest scale: below it a value is rounded to 0 or to this."""
LARGEST = float(np.finfo(np.float32).max)
_FRACTION = 22  # bits after the point of a value that is being rounded: codec.h has the same
_BLOCK = 1 << 16  # columns at a time without the compiled kernels, an even number


def packed_bytes(columns: int, bits: int) -> int:
    """Bytes that codes of so many columns take, of 8 or 4 bits each."""
    return (columns * bits + 7) // 8


def peaks(row: Floats, bounds: Bounds) -> Floats:
    """The largest magnitude in each run, (s,); not finite iff a value of it is not."""
    found = np.zeros(len(bounds) - 1, np.int32)
    compiled = native.library()
    if not isinstance(compiled, str):
        compiled.peaks(row.ctypes.data, bounds.ctypes.data, len(found), found.ctypes.data)
    elif len(found):
        np.maximum.reduceat(row.view(np.int32) & 0x7FFFFFFF, bounds[:-1], out=found)
    return found.view(np.float32)


def scales(size: NDArray[np.float32] | NDArray[np.float64], levels: int) -> Floats:
    """What one level stands for, (s,), where values up to `size` (s,) are to have so many; NaN where it is not finite.

    Never so small that its inverse overflows, nor so large that a value does when it is decoded.
    """
    largest = float(np.nextafter(np.float32(LARGEST / levels), np.float32(0)))
    step = np.clip(size.astype(np.float64) / levels, FINEST, largest).astype(np.float32)
    return np.where(np.isfinite(size), step, np.float32(np.nan))


def quantise(row: Floats, bounds: Bounds, scale: Floats, levels: int, bits: int, seed: int | None, out: Codes) -> None:
    """Fill `out` with codes from -levels to levels, of 8 or 4 bits: the nearest, a half up, or with a seed (64 bits)
    one of the two nearest, drawn so that its mean is value / scale, to 2^-22 of a level.

    A run whose scale is NaN gets zeros. Of 4 bits the even column is the low half of its byte.
    """
    factor = np.where(np.isnan(scale), np.float32(0), np.float32(2**_FRACTION) / scale)
    low, high = (0, 0) if seed is None else (seed & 0xFFFFFFFF, seed >> 32)
    compiled = native.library()
    if not isinstance(compiled, str):
        described = _described(bounds, factor, levels, seed is not None, bits, low, high)
        compiled.quantise(described.ctypes.data, row.ctypes.data, out.ctypes.data)
        return
    for start in range(0, row.size, _BLOCK):
        part = slice(start, min(start + _BLOCK, row.size))
        codes = _rounded(row[part], _per_column(factor, bounds, part), levels)
        if seed is None:
            codes += np.int32(1 << (_FRACTION - 1))
        else:
            codes += (scrambled(seed, part) >> np.uint32(32 - _FRACTION)).view(np.int32)
        codes >>= _FRACTION
        _store(np.clip(codes, -levels, levels, out=codes).astype(np.int8), out, start, bits)


def dequantise(codes: Codes, bounds: Bounds, scale: Floats, bits: int, out: Floats) -> None:
    """Fill `out` (P,) with code * scale."""
    compiled = native.library()
    if not isinstance(compiled, str):
        described = _described(bounds, scale, 0, False, bits, 0, 0)
        compiled.dequantise(described.ctypes.data, codes.ctypes.data, out.ctypes.data)
        return
    for start in range(0, out.size, _BLOCK):
        part = slice(start, min(start + _BLOCK, out.size))
        with np.errstate(over="ignore", invalid="ignore"):  # of scales that nobody sends in good faith
            np.multiply(_loaded(codes, part, bits), _per_column(scale, bounds, part), out=out[part])


def scrambled(seed: int, columns: slice) -> NDArray[np.uint32]:
    """32 bits of each column that look random: two rounds of multiply and shift (lowbias32) of the seed's halves."""
    h = np.arange(columns.start, columns.stop, dtype=np.uint32)
    h += np.uint32(seed & 0xFFFFFFFF)
    h ^= h >> np.uint32(16)
    h *= np.uint32(0x7FEB352D)
    h ^= np.uint32(seed >> 32)
    h ^= h >> np.uint32(15)
    h *= np.uint32(0x846CA68B)
    h ^= h >> np.uint32(16)
    return h


def _described(
    bounds: Bounds, factor: Floats, levels: int, stochastic: bool, bits: int, low: int, high: int
) -> NDArray[np.void]:
    places = (bounds.ctypes.data, factor.ctypes.data)
    return np.array([(len(factor), levels, stochastic, bits == 4, *places, low, high)], native.ROUNDING)


def _rounded(values: Floats, factor: Floats, levels: int) -> NDArray[np.int32]:
    """values * factor, towards 0; zeros where the factor is 0, whatever the values."""
    with np.errstate(invalid="ignore", over="ignore"):
        product = np.where(factor == 0, np.float32(0), values * factor)
    return product.astype(np.int32)


def _per_column(values: Floats, bounds: Bounds, part: slice) -> Floats:
    """A run's value for each column of the part."""
    first = int(np.searchsorted(bounds, part.start, "right")) - 1
    last = int(np.searchsorted(bounds, part.stop, "left"))
    inside = np.clip(bounds[first : last + 1], part.start, part.stop)
    return np.repeat(values[first:last], np.diff(inside))


def _store(codes: NDArray[np.int8], out: Codes, start: int, bits: int) -> None:
    if bits == 8:
        out[start : start + codes.size] = codes.view(np.uint8)
        return
    pairs = np.zeros((codes.size + 1) // 2 * 2, np.uint8)
    pairs[: codes.size] = codes.view(np.uint8) & 15
    out[start // 2 : start // 2 + pairs.size // 2] = pairs[::2] | pairs[1::2] << 4


def _loaded(codes: Codes, part: slice, bits: int) -> NDArray[np.int8]:
    if bits == 8:
        return codes[part].view(np.int8)
    packed = codes[part.start // 2 : (part.stop + 1) // 2]
    pairs = np.empty(2 * packed.size, np.uint8)
    pairs[::2], pairs[1::2] = packed << 4, packed & 0xF0
    return pairs.view(np.int8)[: part.stop - part.start] >> 4
