"""The envelope: what an update looks like as bytes, and the door that opens it.

    magic "FKU1" | header length, u32 LE | SHA-256 of the header, 32 bytes | header, msgpack | payload

The header holds the claims, the codec's name, the payload's lengths before and after zstd and its SHA-256, so every
byte of an envelope is covered by a digest. Nothing is allocated before its length was checked, nothing is unpickled.
Any bytes give a `Sealed` or a `DecodeError`.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import msgpack
import zstandard
from torch import Tensor

from fedkeel.core.errors import DecodeError
from fedkeel.core.layout import Layout
from fedkeel.core.registry import Rule
from fedkeel.core.types import Claims, Codec

MAGIC = b"FKU1"
PREFIX = struct.Struct("<4sI32s")
MAX_HEADER = 32 * 1024
MAX_METRICS = 32
MAX_NAME = 256
MAX_LABELS = 2048
_INT64 = 2**63


@dataclass(frozen=True, slots=True)
class Sealed:
    """An envelope whose header is read and whose payload is still closed."""

    claims: Claims
    codec: str
    raw_bytes: int
    zstd: bool
    digest: bytes
    payload: memoryview


@lru_cache(maxsize=16)
def built(rule: Rule, layout: Layout) -> tuple[str, Codec]:
    """A plan's codec for a layout, and its name in envelopes: the rule as written, or the SHA-256 of a long one."""
    text = repr(rule)
    if len(text.encode()) > MAX_NAME:
        text = f"{rule.name} {hashlib.sha256(text.encode()).hexdigest()}"
    return text, rule(layout)


def seal(claims: Claims, codec: str, payload: bytes | memoryview, zstd: int = 0) -> bytes:
    """One envelope. `zstd` is a compression level, 0 for none."""
    raw = len(payload)
    body: bytes | memoryview = zstandard.ZstdCompressor(level=zstd).compress(payload) if zstd else payload
    fields = {
        "client": claims.client,
        "task": claims.task,
        "base": claims.base_version,
        "layout": claims.layout_digest,
        "examples": claims.num_examples,
        "steps": claims.steps,
        "metrics": dict(claims.metrics),
        "labels": struct.pack(f"<{len(claims.labels)}f", *claims.labels),
        "codec": codec,
        "raw": raw,
        "zstd": bool(zstd),
        "sha256": hashlib.sha256(body).digest(),
    }
    for name, valid in _FIELDS.items():
        if not valid(fields[name]):
            raise ValueError(f"the envelope's field '{name}' = {str(fields[name])[:80]!r} would be refused at the door")
    header: bytes = msgpack.packb(fields)
    return b"".join((PREFIX.pack(MAGIC, len(header), hashlib.sha256(header).digest()), header, body))


def packed(payload: bytes | memoryview, zstd: int) -> bytes:
    """A payload after zstd, at a level, 0 for none."""
    return zstandard.ZstdCompressor(level=zstd).compress(payload) if zstd else bytes(payload)


def unpacked(data: bytes, zstd: bool, limit: int) -> memoryview:
    """What `packed` was given, of `limit` bytes at most. Raises `DecodeError`."""
    if not zstd:
        raw = len(data)
    elif not 0 <= (raw := _declared(memoryview(data))) <= limit:  # -1: it does not say
        raise DecodeError(f"it declares {raw} bytes, the limit is {limit}")
    if raw > limit or len(data) > zstd_bound(limit):
        raise DecodeError(f"it has {len(data)} bytes, the limit is {limit}")
    return _decompressed(memoryview(data)) if zstd else memoryview(data)


def read(data: bytes | memoryview) -> Sealed:
    """The header of an envelope, every field checked. Its cost does not depend on the payload's size."""
    view = memoryview(data).cast("B") if len(data) else memoryview(b"")
    if len(view) < PREFIX.size:
        raise DecodeError(f"{len(view)} bytes are shorter than an envelope")
    magic, length, digest = PREFIX.unpack_from(view)
    if magic != MAGIC:
        raise DecodeError("this is no fedkeel envelope (wrong magic)")
    if length > MAX_HEADER or PREFIX.size + length > len(view):
        raise DecodeError(f"a header of {length} bytes is declared, the limit is {min(MAX_HEADER, len(view))}")
    header = bytes(view[PREFIX.size : PREFIX.size + length])
    if hashlib.sha256(header).digest() != digest:
        raise DecodeError("the header does not match its digest")
    try:
        fields = msgpack.unpackb(
            header,
            strict_map_key=True,
            max_str_len=MAX_NAME,
            max_bin_len=4 * MAX_LABELS,
            max_map_len=MAX_METRICS,
            max_array_len=0,
        )
    except Exception as error:  # msgpack raises many types on hostile bytes
        raise DecodeError(f"the header is not msgpack ({type(error).__name__})") from None
    if not isinstance(fields, dict) or fields.keys() != _FIELDS.keys():
        raise DecodeError("the header has other fields than an envelope's")
    for name, valid in _FIELDS.items():
        if not valid(fields[name]):
            raise DecodeError(f"the header's field '{name}' is not valid")
    claims = Claims(
        fields["client"],
        fields["task"],
        fields["base"],
        fields["layout"],
        fields["examples"],
        fields["steps"],
        {k: float(v) for k, v in fields["metrics"].items()},
        struct.unpack(f"<{len(fields['labels']) // 4}f", fields["labels"]),
    )
    payload = view[PREFIX.size + length :]
    return Sealed(claims, fields["codec"], fields["raw"], fields["zstd"], fields["sha256"], payload)


def open_payload(sealed: Sealed, codec_name: str, codec: Codec, out: Tensor, *, intact: bool = False) -> None:
    """Verify, decompress and decode the payload into `out` (P,). Raises `DecodeError`.

    `intact` leaves out the digest, for bytes that have not left the process that sealed them.
    """
    limit = codec.max_bytes(out.numel())
    if sealed.codec != codec_name:
        raise DecodeError(f"it is encoded with '{sealed.codec[:64]}', this federation uses '{codec_name}'")
    if sealed.raw_bytes > limit or len(sealed.payload) > zstd_bound(limit):
        raise DecodeError(f"it declares {sealed.raw_bytes} bytes in {len(sealed.payload)}, the limit is {limit}")
    if not intact and hashlib.sha256(sealed.payload).digest() != sealed.digest:
        raise DecodeError("the payload does not match its digest")
    payload = _decompress(sealed) if sealed.zstd else sealed.payload
    if len(payload) != sealed.raw_bytes:
        raise DecodeError(f"the payload has {len(payload)} bytes, {sealed.raw_bytes} were declared")
    try:
        codec.decode(payload, out)
    except DecodeError:
        raise
    except Exception as error:  # a user's codec met bytes that it did not expect
        raise DecodeError(f"codec '{codec_name}' raised {type(error).__name__}: {error}") from None


def zstd_bound(raw: int) -> int:
    """The most bytes that zstd makes of `raw` incompressible ones (its own ZSTD_compressBound)."""
    return raw + (raw >> 8) + 1024


def _decompress(sealed: Sealed) -> memoryview:
    # The frame's own size is what the library allocates: it must be the one that was checked.
    if _declared(sealed.payload) != sealed.raw_bytes:
        raise DecodeError("the zstd frame declares another size than the header")
    return _decompressed(sealed.payload)


def _declared(frame: memoryview) -> int:
    try:
        return int(zstandard.frame_content_size(bytes(frame[:18])))
    except zstandard.ZstdError as error:
        raise DecodeError(f"the payload is no zstd frame ({error})") from None


def _decompressed(frame: memoryview) -> memoryview:
    try:
        return memoryview(zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False))
    except zstandard.ZstdError as error:
        raise DecodeError(f"the payload is no zstd frame ({error})") from None


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value < _INT64


def _text(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value.encode(errors="replace")) <= MAX_NAME


def _metrics(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and len(value) <= MAX_METRICS
        and all(_text(k) and type(v) in (int, float) and math.isfinite(v) for k, v in value.items())
    )


def _labels(value: Any) -> bool:
    """Shares of classes, float32: each 0 or more, in all 1 or less by rounding; or none."""
    if not isinstance(value, bytes) or len(value) % 4 or len(value) > 4 * MAX_LABELS:
        return False
    shares = struct.unpack(f"<{len(value) // 4}f", value)
    return not shares or (all(0 <= share <= 1 for share in shares) and abs(math.fsum(shares) - 1) < 1e-3)


_FIELDS: dict[str, Callable[[Any], bool]] = {
    "client": _text,
    "task": _count,
    "base": _count,
    "layout": _text,
    "examples": _count,
    "steps": _count,
    "metrics": _metrics,
    "labels": _labels,
    "codec": _text,
    "raw": _count,
    "zstd": lambda v: isinstance(v, bool),
    "sha256": lambda v: isinstance(v, bytes) and len(v) == 32,
}
