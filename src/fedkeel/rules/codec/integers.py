"""Each column as a small whole number, and scales for runs of columns."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from fedkeel.core.errors import DecodeError
from fedkeel.core.keys import Key
from fedkeel.core.layout import Layout
from fedkeel.core.registry import rule
from fedkeel.core.types import Codec
from fedkeel.kernels.bits import from_unary, pack, unary, unpack
from fedkeel.kernels.quantise import (
    FINEST,
    Bounds,
    Codes,
    Floats,
    dequantise,
    packed_bytes,
    peaks,
    quantise,
    scales,
)
from fedkeel.rules.codec.common import Per, by_row, numbers, read_scales, require_size, runs

_SLACK = 2.0**-12  # of a step: what float32 products add to the rounding, at 127 levels
_BLOCK = 1 << 16  # columns that are looked at at a time


@rule("codec")
def int8(layout: Layout, *, per: Per = "tensor", stochastic: bool = True) -> Codec:
    """A signed byte a column, from -127 to 127, times a scale for each tensor, output channel or the whole row.

    A run's scale is its largest magnitude / 127 (Jacob et al. 2018, symmetric), at least 2^-100. Stochastic: rounded
    down or up so that the mean is right (unbiased), off by up to 1 scale; else to the nearest, off by up to half.
    Payload: a float32 scale for each of s runs, P bytes: P + 4 s bytes.
    """
    return _integers(layout, 127, 8, per, stochastic)


@rule("codec")
def int4(layout: Layout, *, per: Per = "tensor", stochastic: bool = True) -> Codec:
    """Half a byte a column, from -7 to 7, times a scale for each tensor, output channel or the whole row.

    A run's scale is its largest magnitude / 7; all else as int8. Payload: a float32 scale for each of s runs, two
    columns a byte, the even one in the low half: ceil(P / 2) + 4 s bytes.
    """
    return _integers(layout, 7, 4, per, stochastic)


def _integers(layout: Layout, levels: int, bits: int, per: Per, stochastic: bool) -> Codec:
    bounds = runs(layout, per)
    ahead, columns = 4 * (len(bounds) - 1), layout.columns
    size = ahead + packed_bytes(columns, bits)

    def encode(row: Floats, key: Key) -> Codes:
        payload = np.empty(size, np.uint8)
        scale = scales(peaks(row, bounds), levels)
        payload[:ahead] = scale.astype("<f4").view(np.uint8)
        quantise(row, bounds, scale, levels, bits, key.value if stochastic else None, payload[ahead:])
        return payload

    def decode(payload: memoryview, out: Tensor) -> None:
        require_size(payload, size, f"{len(bounds) - 1} scales and {columns} columns of {bits} bits")
        scale = read_scales(payload, len(bounds) - 1, FINEST)
        dequantise(numbers(payload)[ahead:], bounds, scale, bits, out.numpy())

    def error(row: Tensor) -> Tensor:
        scale = scales(peaks(row.numpy(), bounds), levels)
        return _spread(scale, bounds) * (1 + _SLACK if stochastic else 0.5 + _SLACK)

    return Codec(by_row(encode), decode, lambda _: size, error, unbiased=stochastic, exact=True)


@rule("codec")
def sign(layout: Layout, *, per: Per = "tensor") -> Codec:
    """The sign of each column, 1 bit, times the mean magnitude of its tensor: scaled sign, for use with error feedback.

    Karimireddy et al. 2019, "Error feedback fixes SignSGD": C(v) = |v|_1 / d sign(v). Zero counts as plus.
    Off by | |x| - mean magnitude |. Payload: a float32 scale for each of s runs, 8 columns a byte, the first in the
    lowest bit, 1 for plus: ceil(P / 8) + 4 s bytes.
    """
    bounds = runs(layout, per)
    ahead, columns = 4 * (len(bounds) - 1), layout.columns
    size = ahead + packed_bytes(columns, 1)

    def encode(row: Floats, key: Key) -> Codes:
        payload = np.empty(size, np.uint8)
        payload[:ahead] = _means(row, bounds).astype("<f4").view(np.uint8)
        payload[ahead:] = np.packbits(row >= 0, bitorder="little")
        return payload

    def decode(payload: memoryview, out: Tensor) -> None:
        require_size(payload, size, f"{len(bounds) - 1} scales and {columns} signs")
        scale = read_scales(payload, len(bounds) - 1, 0.0)
        signs = np.unpackbits(numbers(payload)[ahead:], count=columns, bitorder="little")
        signs += signs
        signs -= np.uint8(1)
        dequantise(signs, bounds, scale, 8, out.numpy())

    def error(row: Tensor) -> Tensor:
        return (row.abs() - _spread(_means(row.numpy(), bounds), bounds)).abs() * (1 + _SLACK)

    return Codec(by_row(encode), decode, lambda _: size, error, exact=True)


def _means(row: Floats, bounds: Bounds) -> Floats:
    """The mean magnitude of each run; NaN where a value is not finite."""
    means = [float(np.abs(row[a:b]).mean(dtype=np.float64)) for a, b in pairwise(bounds.tolist())]
    return np.where(np.isfinite(means), means, np.nan).astype(np.float32)


@rule("codec")
def qsgd(
    layout: Layout, *, levels: Annotated[int, Field(ge=1, le=127)] = 15, bucket: Annotated[int, Field(ge=1)] = 512
) -> Codec:
    """QSGD: columns in buckets, each value drawn to one of `levels` steps of its bucket's L2 norm; unbiased.

    Alistarh et al. 2017, section 3.1, by buckets: x becomes norm / levels times the whole number below or above
    levels x / norm, drawn so that the mean is right; off by up to norm / levels. The numbers q travel as 2 |q|, less 1
    where q is negative, in the Rice code that is smallest for the row: with w bits a column for 2 levels + 1 values,
    at most ceil(P w / 8) bytes. Payload: norm / levels as a float32 for each of b = ceil(P / bucket) buckets, the
    number r of low bits (1 byte), these of all columns, and unless r = w the rest in unary, so many zeros and a one: at
    most 4 b + 1 + ceil(P w / 8) bytes.
    """
    columns, width = layout.columns, (2 * levels).bit_length()
    bounds = np.array([*range(0, columns, bucket), columns], np.int64)
    ahead = 4 * (len(bounds) - 1)
    most = ahead + 1 + packed_bytes(columns, width)

    def encode(row: Floats, key: Key) -> Codes:
        scale = scales(_norms(row, bounds, bucket), levels)
        codes = np.empty(columns, np.uint8)
        quantise(row, bounds, scale, levels, 8, key.value, codes)
        low, parts = _rice(codes.view(np.int8), width)
        return np.concatenate([scale.astype("<f4").view(np.uint8), np.array([low], np.uint8), *parts])

    def decode(payload: memoryview, out: Tensor) -> None:
        if not ahead < len(payload) <= most:
            raise DecodeError(f"the payload has {len(payload)} bytes, {columns} columns take {ahead + 1} to {most}")
        scale = read_scales(payload, len(bounds) - 1, FINEST)
        found = _from_rice(numbers(payload)[ahead:], columns, width, 2 * levels)
        dequantise(found.view(np.uint8), bounds, scale, 8, out.numpy())

    def error(row: Tensor) -> Tensor:
        return _spread(scales(_norms(row.numpy(), bounds, bucket), levels), bounds) * (1 + _SLACK)

    return Codec(by_row(encode), decode, lambda _: most, error, unbiased=True)


def _spread(values: Floats, bounds: Bounds) -> Tensor:
    """A run's value for each of its columns, (P,)."""
    return torch.from_numpy(np.repeat(values, np.diff(bounds)))


def _norms(row: Floats, bounds: Bounds, bucket: int) -> NDArray[np.float64]:
    """The L2 norm of each bucket."""
    found = np.empty(len(bounds) - 1)
    step = max(_BLOCK // bucket, 1)
    whole = row.size // bucket
    for first in range(0, whole, step):
        last = min(first + step, whole)
        block = row[first * bucket : last * bucket].reshape(-1, bucket)
        found[first:last] = np.square(block, dtype=np.float64).sum(axis=1)
    found[whole:] = np.square(row[whole * bucket :], dtype=np.float64).sum()
    return np.sqrt(found)


def _rice(codes: NDArray[np.int8], width: int) -> tuple[int, list[Codes]]:
    """Codes in the shortest Rice code: the number of low bits, and the runs of bytes."""
    folded = ((codes << 1) ^ (codes >> 7)).view(np.uint8)
    counts = np.zeros(256, np.int64)
    for start in range(0, folded.size, _BLOCK):
        counts += np.bincount(folded[start : start + _BLOCK], minlength=256)
    sizes = [packed_bytes(folded.size, low) + _unary_bytes(counts, low) for low in range(width)]
    low = int(np.argmin([*sizes, packed_bytes(folded.size, width)]))
    values = folded.astype(np.uint32)
    packed = [pack(values & np.uint32((1 << low) - 1), low)] if low else []
    if low < width:
        values >>= np.uint32(low)
        packed.append(unary(values))
    return low, packed


def _unary_bytes(counts: NDArray[np.int64], low: int) -> int:
    """Bytes in unary of values that occur so often, without their low bits."""
    return packed_bytes(int(((np.arange(counts.size) >> low) + 1) @ counts), 1)


def _from_rice(data: Codes, columns: int, width: int, most: int) -> NDArray[np.int8]:
    """The codes that `_rice` wrote, after a byte for the number of low bits. Raises `DecodeError`."""
    low, data = int(data[0]), data[1:]
    ahead = packed_bytes(columns, low)
    if low > width or data.size < ahead or (low == width and data.size > ahead):
        raise DecodeError(f"{data.size} bytes do not hold {columns} numbers with {low} low bits")
    values = unpack(data[:ahead], columns, low)
    if low < width:
        try:
            high = from_unary(data[ahead:], columns)
        except ValueError as error:
            raise DecodeError(str(error)) from None
        if columns and int(high.max()) > most:
            raise DecodeError(f"a number is above {most}")
        high <<= np.uint32(low)
        values = np.bitwise_or(values, high, out=high) if low else high
    if low and columns and int(values.max()) > most:
        raise DecodeError(f"a number is {int(values.max())}, the largest is {most}")
    folded = values.astype(np.uint8)
    signs = -(folded & 1)
    folded >>= 1
    folded ^= signs
    return folded.view(np.int8)
