"""Few columns of a row: the largest, or ones drawn from the key."""

from __future__ import annotations

import math
import struct
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from fedkeel.core.errors import DecodeError
from fedkeel.core.keys import Key
from fedkeel.core.layout import Layout
from fedkeel.core.registry import build, rule
from fedkeel.core.types import Codec
from fedkeel.kernels.bits import from_positions, positions, positions_bound
from fedkeel.kernels.largest import largest
from fedkeel.kernels.quantise import LARGEST, Codes, Floats, scrambled
from fedkeel.rules.codec.common import by_row, flat, numbers, peak, require_size

Share = Annotated[float, Field(gt=0, le=1)]
Values = Literal["float32", "float16", "int8", "int4", "sign"]
_SEED = struct.Struct("<Q")
_KEY = Key(0)  # of codecs that draw nothing


@rule("codec")
def top_k(layout: Layout, *, share: Share = 0.01, values: Values = "float32") -> Codec:
    """The k = share P columns of largest magnitude (at least 1); the others are 0. For use with error feedback.

    Stich et al. 2018, "Sparsified SGD with memory", top_k; of equal magnitudes the first column. The values travel as
    that codec has them (int8, int4 to the nearest, one scale), the columns as Golomb-Rice codes of the gaps between
    them, about log2(P / k) + 1.5 bits each where they lie evenly. Payload: the k values; the u low bits of each gap, u
    being the best for gaps of mean P / k; the rest of the gaps in unary, so many zeros and a one: at most
    ceil(k u / 8) + ceil((k + floor((P - k) / 2^u)) / 8) bytes beside the values.
    """
    columns = layout.columns
    count = _count(share, columns)
    nested = _values(values, count)
    ahead = nested.max_bytes(count)
    most = ahead + positions_bound(count, columns)

    def encode(row: Floats, key: Key) -> Codes:
        places = largest(row, count)
        (kept,) = nested.encode(torch.from_numpy(row[places])[None], [_KEY])
        return np.concatenate([np.frombuffer(kept, np.uint8), *positions(places, columns)])

    def decode(payload: memoryview, out: Tensor) -> None:
        if not ahead <= len(payload) <= most:
            raise DecodeError(f"the payload has {len(payload)} bytes, {count} columns take {ahead} to {most}")
        try:
            places = from_positions(numbers(payload)[ahead:], count, columns)
        except ValueError as error:
            raise DecodeError(str(error)) from None
        kept = torch.empty(count)
        nested.decode(payload[:ahead], kept)
        _scatter(places, kept, out)

    def error(row: Tensor) -> Tensor:
        places = torch.from_numpy(largest(row.numpy(), count))
        return row.abs().index_copy(0, places, nested.error(row[places]))

    return Codec(by_row(encode), decode, lambda _: most, error)


@rule("codec")
def random_k(layout: Layout, *, share: Share = 0.01, scaled: bool = True) -> Codec:
    """k = share P columns (at least 1) drawn from the key, one in each of k runs of equal length; the others are 0.

    Wangni et al. 2018, "Gradient sparsification", with equal probabilities: scaled, a value is multiplied by the length
    of its run, about 1 / share, and the row is right in the mean (unbiased; finite values stay so, at most 3.4e38).
    Each column is drawn about as often as by a draw of any k columns, so its variance is the same. Payload: the seed, 8
    bytes, and k float32 values: 8 + 4 k bytes, no indices. A row that is not finite sends NaN alone.
    """
    columns = layout.columns
    count = _count(share, columns)
    starts = np.arange(count + 1, dtype=np.int64) * columns // max(count, 1)
    lengths = np.diff(starts)
    size = _SEED.size + 4 * count

    def drawn(seed: int) -> NDArray[np.int64]:
        bits = scrambled(seed, slice(0, count)).astype(np.int64)
        return starts[:-1] + (bits * lengths >> 32)

    def encode(row: Floats, key: Key) -> Codes:
        kept = row[drawn(key.value)]
        if scaled:
            kept = np.clip(kept.astype(np.float64) * lengths, -LARGEST, LARGEST).astype(np.float32)
        if not math.isfinite(peak(row)):
            kept = np.full(count, np.nan, np.float32)
        return np.frombuffer(_SEED.pack(key.value) + kept.astype("<f4").tobytes(), np.uint8)

    def decode(payload: memoryview, out: Tensor) -> None:
        require_size(payload, size, f"a seed and {count} float32 values")
        (seed,) = _SEED.unpack_from(payload)
        kept = np.frombuffer(payload, "<f4", offset=_SEED.size).astype(np.float32)
        _scatter(drawn(seed), torch.from_numpy(kept), out)

    def error(row: Tensor) -> Tensor:
        if not scaled:
            return row.abs()
        factor = torch.from_numpy(np.repeat(lengths - 1, lengths)).clamp(min=1)
        return (row.abs() * factor) * (1 + 2.0**-20)

    return Codec(by_row(encode), decode, lambda _: size, error, unbiased=scaled, exact=True)


def _count(share: float, columns: int) -> int:
    return min(max(round(share * columns), 1), columns)


def _values(name: Values, count: int) -> Codec:
    """The codec of the values that are sent: deterministic, as what is left out makes the row biased anyway."""
    whole = {"per": "row", "stochastic": False} if name in ("int8", "int4") else {}
    codec: Codec = build("codec", name, **whole)(flat(count))
    return codec


def _scatter(places: NDArray[np.int64], values: Tensor, out: Tensor) -> None:
    row = out.numpy()  # numpy: torch's own threads would wait for each other
    row.fill(0)
    row[places] = values.numpy()
