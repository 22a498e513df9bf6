"""The columns of a row that are largest in magnitude."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from fedkeel.kernels import native
from fedkeel.kernels.quantise import Floats

_STEP = 127  # of the columns that the first guess is made of: no power of two, as rows of matrices have
_MAGNITUDE = np.int32(0x7FFFFFFF)


def largest(row: Floats, count: int) -> NDArray[np.int64]:
    """The `count` columns of largest magnitude, rising; of equal ones the first. NaN is above infinity.

    Magnitudes are compared as integers. A sample says which can not be among them, and the few that are left are put
    in order; where the sample misleads, all are.
    """
    if count >= row.size:
        return np.arange(row.size)
    if not count:
        return np.zeros(0, np.int64)
    sample = np.ascontiguousarray(row[::_STEP]).view(np.int32) & _MAGNITUDE
    wanted = count * sample.size / row.size
    rank = math.ceil(wanted + 4 * math.sqrt(wanted)) + 1
    if 2 * rank < sample.size:
        least = int(np.partition(sample, sample.size - rank)[sample.size - rank])
        room = 2 * rank * _STEP + 64
        found = _above(row, max(least, 1), room)
        if found is not None and found.size >= count:
            return found[_of_equals_the_first(row[found].view(np.int32) & _MAGNITUDE, count)]
    return _of_equals_the_first(row.view(np.int32) & _MAGNITUDE, count)


def _of_equals_the_first(sizes: NDArray[np.int32], count: int) -> NDArray[np.int64]:
    """Where the `count` largest are."""
    last = np.partition(sizes, sizes.size - count)[sizes.size - count]
    chosen = sizes > last
    chosen[np.flatnonzero(sizes == last)[: count - np.count_nonzero(chosen)]] = True
    return np.flatnonzero(chosen)


def _above(row: Floats, least: int, room: int) -> NDArray[np.int64] | None:
    """The columns whose magnitude, as an integer, is at least so much; None where there are more than `room`."""
    compiled = native.library()
    if isinstance(compiled, str):
        found = np.flatnonzero((row.view(np.int32) & _MAGNITUDE) >= least)
        return found if found.size <= room else None
    out = np.empty(room + 17, np.uint32)
    count = compiled.above(row.ctypes.data, row.size, least, room, out.ctypes.data)
    return out[:count].astype(np.int64) if count <= room else None
