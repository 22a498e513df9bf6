"""Each column as a floating-point number, rounded to the nearest."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fedkeel.core.keys import Key
from fedkeel.core.layout import Layout
from fedkeel.core.registry import rule
from fedkeel.core.types import Codec
from fedkeel.kernels.quantise import Codes, Floats
from fedkeel.rules.codec.common import by_row, peak, require_size


@rule("codec")
def float32(layout: Layout) -> Codec:
    """Every column as a little-endian float32: 4 bytes a column, no error.

    Payload: 4 P bytes, the row.
    """

    def encode(U: Tensor, keys: Sequence[Key]) -> list[bytes | memoryview]:
        rows = np.ascontiguousarray(U.detach().cpu().numpy(), dtype="<f4")
        return [row.data.cast("B") for row in rows]

    def decode(payload: memoryview, out: Tensor) -> None:
        require_size(payload, 4 * out.numel(), f"{out.numel()} float32 columns")
        np.copyto(out.numpy(), np.frombuffer(payload, dtype="<f4"))

    return Codec(
        encode, decode, lambda columns: 4 * columns, torch.zeros_like, lossless=True, unbiased=True, exact=True
    )


@rule("codec")
def float16(layout: Layout) -> Codec:
    """Every column as an IEEE 754 half, to the nearest, ties to even: 2 bytes a column.

    Payload: 2 P bytes, little-endian. Off by at most 2^-11 of the value, or 2^-25 for values below 2^-14. Finite values
    beyond 65504 become 65504, with their sign: no finite row becomes an infinite one.
    """
    return _half(torch.float16, 2.0**-11, 2.0**-25)


@rule("codec")
def bfloat16(layout: Layout) -> Codec:
    """Every column as a bfloat16, to the nearest, ties to even: 2 bytes a column, the range of float32.

    Payload: 2 P bytes, little-endian. Off by at most 2^-8 of the value, or 2^-134 for values below 2^-126. Finite
    values beyond 3.3895e38 become that, with their sign.
    """
    return _half(torch.bfloat16, 2.0**-8, 2.0**-134)


def _half(dtype: torch.dtype, relative: float, absolute: float) -> Codec:
    largest = torch.finfo(dtype).max

    def encode(row: Floats, key: Key) -> Codes:
        values = torch.from_numpy(row)
        halves = values.to(dtype)
        if not peak(row) <= largest:
            limited = values.clamp(-largest, largest).to(dtype)
            halves = torch.where(torch.isfinite(values), limited, halves)
        return halves.view(torch.int16).numpy().astype("<i2", copy=False).view(np.uint8)

    def decode(payload: memoryview, out: Tensor) -> None:
        require_size(payload, 2 * out.numel(), f"{out.numel()} columns of 2 bytes")
        words = np.frombuffer(payload, "<i2").astype(np.int16)
        out.copy_(torch.from_numpy(words).view(dtype))

    def error(row: Tensor) -> Tensor:
        size = row.abs()
        return torch.maximum((size * relative).clamp(min=absolute), (size - largest) * (1 + 2.0**-20))

    return Codec(by_row(encode), decode, lambda columns: 2 * columns, error, exact=True)
