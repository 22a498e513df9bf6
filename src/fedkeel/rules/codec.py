"""Codecs: a row to bytes and back, with a stated error bound and an exact byte count."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fedkeel.core.errors import DecodeError
from fedkeel.core.keys import Key
from fedkeel.core.registry import rule
from fedkeel.core.types import Codec


@rule("codec")
def float32() -> Codec:
    """Every column as a little-endian float32: 4 bytes a column, no error."""

    def encode(U: Tensor, keys: Sequence[Key]) -> list[bytes | memoryview]:
        rows = np.ascontiguousarray(U.detach().cpu().numpy(), dtype="<f4")
        return [row.data.cast("B") for row in rows]

    def decode(payload: memoryview, out: Tensor) -> None:
        if len(payload) != 4 * out.numel():
            raise DecodeError(
                f"the payload has {len(payload)} bytes, {out.numel()} float32 columns take {4 * out.numel()}"
            )
        np.copyto(out.numpy(), np.frombuffer(payload, dtype="<f4"))

    return Codec(encode, decode, lambda columns: 4 * columns, torch.zeros_like)
