"""Whole numbers in few bits. The first bit is the lowest of the first byte; a last byte is filled up with zeros.

Rising positions travel as the Golomb-Rice codes of their gaps: the low bits of all gaps one after the other, and then
what is above these in unary, so many zeros and a one. Bounded for any positions: k of them below n take at most
k (1 + width) + (n - k) / 2^width bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fedkeel.kernels import native

Numbers = NDArray[np.uint32]
Bytes = NDArray[np.uint8]

_BLOCK = 1 << 16  # values at a time without the compiled kernels, a multiple of 8
MAX_WIDTH = 31


def pack(values: Numbers, width: int) -> Bytes:
    """Values below 2^width, `width` bits each."""
    out = np.empty((values.size * width + 7) // 8, np.uint8)
    compiled = native.library()
    if not width or not values.size:
        return out
    if not isinstance(compiled, str):
        compiled.pack(values.ctypes.data, values.size, width, out.ctypes.data)
        return out
    places = np.arange(width, dtype=np.uint32)
    for part, held in _parts(values.size, width):
        out[held] = np.packbits((values[part, None] >> places & np.uint32(1)).astype(np.uint8), bitorder="little")
    return out


def unpack(data: Bytes, count: int, width: int) -> Numbers:
    """The values that `pack` packed; `data` holds exactly so many bytes."""
    out = np.zeros(count, np.uint32)
    compiled = native.library()
    if not width or not count:
        return out
    if not isinstance(compiled, str):
        compiled.unpack(data.ctypes.data, count, width, out.ctypes.data)
        return out
    places = np.arange(width, dtype=np.uint32)
    for part, held in _parts(count, width):
        n = part.stop - part.start
        found = np.unpackbits(data[held], count=n * width, bitorder="little").reshape(n, width)
        out[part] = (found.astype(np.uint32) << places).sum(axis=1, dtype=np.uint32)
    return out


def unary(values: Numbers) -> Bytes:
    """Each value as so many zeros and a one."""
    total = int(values.sum(dtype=np.int64)) + values.size
    out = np.zeros((total + 7) // 8, np.uint8)
    compiled = native.library()
    if not isinstance(compiled, str):
        compiled.unary(values.ctypes.data, values.size, out.ctypes.data)
        return out
    ones = np.cumsum(values.astype(np.int64) + 1) - 1
    np.bitwise_or.at(out, ones >> 3, (1 << (ones & 7)).astype(np.uint8))
    return out


def from_unary(data: Bytes, count: int) -> Numbers:
    """The values that `unary` wrote. Raises `ValueError` for any bytes that it would not have written for so many."""
    out = np.empty(count, np.uint32)
    compiled = native.library()
    if not isinstance(compiled, str):
        ones = compiled.from_unary(data.ctypes.data, data.size, count, out.ctypes.data)
    else:
        last = places = np.full(1, -1)
        ones = 0
        for start in range(0, data.size, _BLOCK):
            places = np.flatnonzero(np.unpackbits(data[start : start + _BLOCK], bitorder="little")) + 8 * start
            gaps = np.diff(places, prepend=last) - 1
            kept = gaps[: max(count - ones, 0)]
            out[ones : ones + kept.size] = kept
            ones += places.size
            last = places[-1:] if places.size else last
    if ones != count:
        raise ValueError(f"{ones} numbers are coded, {count} are wanted")
    if data.size and not data[-1]:
        raise ValueError("bytes follow the last number")
    return out


@lru_cache(maxsize=1024)
def gap_width(count: int, columns: int) -> int:
    """The bits of a gap that are kept as they are: the best number for `count` positions spread evenly over columns."""
    if not count:
        return 0
    density = count / columns
    sizes = [1 + w + 1 / math.expm1(min(density * 2.0**w, 700)) for w in range(MAX_WIDTH + 1)]
    return sizes.index(min(sizes))


def positions_bound(count: int, columns: int) -> int:
    """The most bytes of `count` positions below `columns`, in the width of `gap_width`."""
    width = gap_width(count, columns)
    return (count * width + 7) // 8 + (((columns - count) >> width) + count + 7) // 8


def positions(places: NDArray[np.int64], columns: int) -> list[Bytes]:
    """Rising positions (k,) below `columns`, as two runs of bytes: the low bits of their gaps, the rest in unary."""
    width = gap_width(places.size, columns)
    gaps = (np.diff(places, prepend=-1) - 1).astype(np.uint32)
    return [pack(gaps & np.uint32((1 << width) - 1), width), unary(gaps >> np.uint32(width))]


def from_positions(data: Bytes, count: int, columns: int) -> NDArray[np.int64]:
    """The positions, rising and below `columns`. Raises `ValueError` for bytes that `positions` would not write."""
    width = gap_width(count, columns)
    low = (count * width + 7) // 8
    if data.size < low:
        raise ValueError(f"{data.size} bytes do not hold {count} positions")
    gaps = from_unary(data[low:], count).astype(np.int64) << width
    gaps += unpack(data[:low], count, width)
    places = np.cumsum(gaps + 1) - 1
    if count and int(places[-1]) >= columns:
        raise ValueError(f"a position is {int(places[-1])} of {columns} columns")
    return places


def _parts(count: int, width: int) -> Iterator[tuple[slice, slice]]:
    """Blocks of values, and the bytes that they are in."""
    for start in range(0, count, _BLOCK):
        stop = min(start + _BLOCK, count)
        yield slice(start, stop), slice(start * width // 8, (stop * width + 7) // 8)
