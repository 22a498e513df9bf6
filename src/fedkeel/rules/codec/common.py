"""What codecs have in common: rows one by one, the runs of a layout, payloads in several parts."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fedkeel.core.errors import DecodeError
from fedkeel.core.keys import Key
from fedkeel.core.layout import Entry, Layout
from fedkeel.core.types import Codec
from fedkeel.kernels.quantise import Bounds, Codes, Floats, peaks

Per = Literal["row", "tensor", "channel"]
Encode = Callable[[Tensor, Sequence[Key]], list[bytes | memoryview]]
_LENGTH = struct.Struct("<Q")


def by_row(encode: Callable[[Floats, Key], Codes]) -> Encode:
    """An encoder of rows from that of one row, (P,) contiguous."""

    def encode_all(U: Tensor, keys: Sequence[Key]) -> list[bytes | memoryview]:
        rows = U.detach().to("cpu", torch.float32).contiguous().numpy()
        return [encode(row, key).data for row, key in zip(rows, keys, strict=True)]

    return encode_all


def shared(layout: Layout) -> list[tuple[Entry, slice]]:
    """The tensors that travel and have columns, each with its columns of an update."""
    first = layout.shared.start
    return [
        (entry, slice(columns.start - first, columns.stop - first))
        for entry in layout.entries
        if entry.kind != "private" and entry.size
        for columns in (layout.offsets[entry.name],)
    ]


def runs(layout: Layout, per: Per) -> Bounds:
    """Where the runs of columns begin and end that have one scale each: the row, each tensor, or each output channel.

    A channel is an index of the first dimension of a tensor that has two or more; other tensors are one run.
    """
    if per == "row":
        return np.array([0, layout.columns] if layout.columns else [0], np.int64)
    lengths = []
    for entry, columns in shared(layout):
        channels = entry.shape[0] if per == "channel" and len(entry.shape) > 1 else 1
        lengths += [(columns.stop - columns.start) // channels] * channels
    return np.array(list(itertools.accumulate(lengths, initial=0)), np.int64)


def peak(row: Floats) -> float:
    """The largest magnitude of a row, 0 without columns; not finite iff a column is not."""
    return float(peaks(row, np.array([0, row.size]))[0]) if row.size else 0.0


def part(entries: Iterable[Entry]) -> Layout:
    """The layout of some of the tensors that travel."""
    return Layout(tuple(entries))


def flat(columns: int) -> Layout:
    """A layout of one tensor."""
    return Layout((Entry("values", (columns,), "float32", "param", True),))


def numbers(payload: memoryview) -> Codes:
    """The payload's bytes as an array."""
    return np.frombuffer(payload, np.uint8)


def require_size(payload: memoryview, size: int, what: str) -> None:
    """Refuse a payload of another size."""
    if len(payload) != size:
        raise DecodeError(f"the payload has {len(payload)} bytes, {what} take {size}")


def read_scales(payload: memoryview, count: int, least: float) -> Floats:
    """The first numbers of a payload, each at least `least` and finite, or NaN for a run that is not finite."""
    scale = np.frombuffer(payload, "<f4", count).astype(np.float32)
    if not bool((np.isnan(scale) | ((scale >= least) & (scale < np.inf))).all()):
        raise DecodeError(f"a scale is below {least:g} or infinite")
    return scale


def joined(codecs: Sequence[Codec], payloads: Sequence[bytes | memoryview]) -> list[bytes | memoryview]:
    """Payloads one after the other, each that its codec does not tell the length of after its length, 8 bytes."""
    parts: list[bytes | memoryview] = []
    for codec, payload in zip(codecs, payloads, strict=True):
        parts += [payload] if codec.exact else [_LENGTH.pack(len(payload)), payload]
    return parts


def split(codecs: Sequence[Codec], columns: Sequence[int], payload: memoryview) -> list[memoryview]:
    """The payloads that `joined` joined, none above its codec's limit. Raises `DecodeError`."""
    found, at = [], 0
    for codec, width in zip(codecs, columns, strict=True):
        size = limit = codec.max_bytes(width)
        if not codec.exact:
            if len(payload) < at + _LENGTH.size:
                raise DecodeError("the payload ends before the length of a part")
            (size,) = _LENGTH.unpack_from(payload, at)
            at += _LENGTH.size
        if size > limit or at + size > len(payload):
            raise DecodeError(f"a part of {size} bytes is declared, the limit is {min(limit, len(payload) - at)}")
        found.append(payload[at : at + size])
        at += size
    if at != len(payload):
        raise DecodeError(f"{len(payload) - at} bytes follow the last part")
    return found


def joined_bytes(codec: Codec, columns: int) -> int:
    """The most bytes that a codec's part of `joined` takes."""
    return codec.max_bytes(columns) + (0 if codec.exact else _LENGTH.size)
