"""The envelope: what goes in comes out; any other bytes are a DecodeError, at no cost beyond their own length."""

from __future__ import annotations

import hashlib
import struct
import tracemalloc

import msgpack
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkeel.core.errors import DecodeError
from fedkeel.core.keys import Key
from fedkeel.core.layout import Entry, Layout
from fedkeel.core.registry import parse
from fedkeel.core.types import Claims
from fedkeel.round import wire

COLUMNS = 64
CODEC = parse("codec", "float32")(Layout((Entry("x", (COLUMNS,), "float32", "param", True),)))
CLAIMS = Claims("a", 3, 7, "d" * 64, 20, 5, {"loss": 0.5})


def seal(row: torch.Tensor, claims: Claims = CLAIMS, zstd: int = 0) -> bytes:
    return wire.seal(claims, "float32", CODEC.encode(row[None], [Key(0)])[0], zstd)


def open_(data: bytes, columns: int = COLUMNS) -> tuple[Claims, torch.Tensor]:
    out = torch.empty(columns)
    sealed = wire.read(data)
    wire.open_payload(sealed, "float32", CODEC, out)
    return sealed.claims, out


def reheader(data: bytes, **changes: object) -> bytes:
    """The same envelope with fields of its header changed, and the header's digest made right again."""
    _, length, _ = wire.PREFIX.unpack_from(data)
    header = msgpack.unpackb(data[wire.PREFIX.size : wire.PREFIX.size + length])
    for name, value in changes.items():
        if value is ...:
            del header[name]
        else:
            header[name] = value
    packed = msgpack.packb(header)
    prefix = wire.PREFIX.pack(wire.MAGIC, len(packed), hashlib.sha256(packed).digest())
    return prefix + packed + data[wire.PREFIX.size + length :]


@given(
    st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=50),
    st.text(min_size=1, max_size=wire.MAX_NAME).filter(lambda t: len(t.encode(errors="ignore")) <= wire.MAX_NAME),
    st.integers(0, 2**62),
    st.dictionaries(st.text(min_size=1, max_size=20), st.floats(allow_nan=False, allow_infinity=False), max_size=5),
    st.integers(0, 5),
)
def test_what_goes_in_comes_out(values, client, number, metrics, zstd):
    try:
        client.encode()
        "".join(metrics).encode()
    except UnicodeEncodeError:
        return
    row = torch.tensor(values)
    claims = Claims(client, number, number, "x", number, number, metrics)
    found, out = open_(seal(row, claims, zstd), len(row))
    assert found == claims
    assert out.numpy().tobytes() == row.numpy().tobytes()


def test_an_envelope_is_its_stated_size():
    data = seal(torch.zeros(COLUMNS))
    header = wire.PREFIX.unpack_from(data)[1]
    assert len(data) == wire.PREFIX.size + header + 4 * COLUMNS


@pytest.mark.parametrize("zstd", [0, 3])
def test_a_hundred_thousand_mutations_are_refused(zstd):
    """Every flip, cut, insertion and splice of an envelope is a DecodeError, never another update, never a crash."""
    row = torch.linspace(-1, 1, COLUMNS)
    data = seal(row, zstd=zstd)
    other = seal(torch.ones(COLUMNS), Claims("b", 4, 7, "d" * 64, 9, 9))
    draws = Key.root(zstd).numpy()
    refused = 0
    for _ in range(50_000):
        mutated = bytearray(data)
        kind = draws.integers(5)
        at = int(draws.integers(len(data)))
        if kind == 0:
            mutated[at] ^= 1 << int(draws.integers(8))
        elif kind == 1:
            del mutated[at:]
        elif kind == 2:
            mutated[at:at] = draws.bytes(int(draws.integers(1, 9)))
        elif kind == 3:
            mutated[at : at + 8] = draws.bytes(8)
        else:
            mutated[at:] = other[int(draws.integers(len(other))) :]
        if bytes(mutated) in (data, other):
            continue
        with pytest.raises(DecodeError):
            open_(bytes(mutated))
        refused += 1
    assert refused > 49_000


@given(st.binary(max_size=400))
def test_any_bytes_are_refused(data):
    with pytest.raises(DecodeError):
        open_(data)


@given(st.binary(max_size=300), st.binary(max_size=64))
def test_any_header_with_a_right_digest_is_refused(header, payload):
    """The digest is no secret: a hostile client computes it, so the header's content is checked as well."""
    prefix = wire.PREFIX.pack(wire.MAGIC, len(header), hashlib.sha256(header).digest())
    with pytest.raises(DecodeError):
        open_(prefix + header + payload)


JSONISH = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=40),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=300)
@given(st.sampled_from(sorted(wire._FIELDS)), JSONISH)
def test_any_value_in_any_field_gives_claims_or_a_refusal(name, value):
    data = reheader(seal(torch.zeros(COLUMNS)), **{name: value})
    try:
        claims, _ = open_(data)
    except DecodeError:
        return
    assert all(isinstance(n, int) and 0 <= n < 2**63 for n in (claims.task, claims.num_examples, claims.steps))
    assert all(isinstance(v, float) for v in claims.metrics.values())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"raw": 2**40}, "limit"),
        ({"raw": 4 * COLUMNS - 4}, "declared"),
        ({"codec": "float16"}, "encoded with"),
        ({"sha256": b"\0" * 32}, "digest"),
        ({"zstd": True}, "zstd"),
        ({"examples": -1}, "examples"),
        ({"examples": True}, "examples"),
        ({"steps": 1.5}, "steps"),
        ({"client": ""}, "client"),
        ({"metrics": {"loss": float("nan")}}, "metrics"),
        ({"more": 1}, "other fields"),
        ({"task": ...}, "other fields"),
    ],
)
def test_a_forged_header_is_refused_with_its_reason(changes, said):
    with pytest.raises(DecodeError, match=said):
        open_(reheader(seal(torch.zeros(COLUMNS)), **changes))


def test_a_payload_of_another_length_is_refused():
    with pytest.raises(DecodeError, match=r"declared|limit|take"):
        open_(seal(torch.zeros(COLUMNS - 1)))


def bomb(frame: bytes, raw: int) -> bytes:
    return (
        reheader(seal(torch.zeros(COLUMNS)), zstd=True, raw=raw, sha256=hashlib.sha256(frame).digest())[: -4 * COLUMNS]
        + frame
    )


def test_a_zstd_bomb_is_refused_before_it_is_opened():
    """64 MB of zeros in a few kB, and frames that lie about their size: nothing of that size is ever allocated."""
    big = zstandard.ZstdCompressor().compress(bytes(64 * 2**20))
    streamed = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(64 * 2**20))
    lying = bytearray(zstandard.ZstdCompressor().compress(bytes(70_000)))
    at = bytes(lying).index(struct.pack("<I", 70_000))
    lying[at : at + 4] = struct.pack("<I", 4 * COLUMNS)
    tracemalloc.start()
    try:
        for frame in (big, streamed, bytes(lying)):
            for raw in (4 * COLUMNS, 64 * 2**20):
                with pytest.raises(DecodeError):
                    open_(bomb(frame, raw))
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_a_huge_declared_header_is_not_read():
    with pytest.raises(DecodeError, match="limit"):
        wire.read(wire.PREFIX.pack(wire.MAGIC, 2**32 - 1, b"\0" * 32) + b"x" * 100)


@pytest.mark.parametrize(
    "claims",
    [
        Claims("a" * (wire.MAX_NAME + 1), 0, 0, "x", 1, 1),
        Claims("é" * wire.MAX_NAME, 0, 0, "x", 1, 1),
        Claims("a", 0, 0, "x", -1, 1),
        Claims("a", 0, 0, "x", 1, 2**63),
        Claims("a", 0, 0, "x", 1, 1, {f"m{i}": 0.0 for i in range(wire.MAX_METRICS + 1)}),
        Claims("a", 0, 0, "x", 1, 1, {"loss": float("inf")}),
    ],
)
def test_a_sender_is_told_what_the_door_would_refuse(claims):
    with pytest.raises(ValueError, match="would be refused at the door"):
        wire.seal(claims, "float32", b"")


def test_the_largest_header_that_may_be_sent_can_be_read():
    long = "a" * wire.MAX_NAME
    metrics = {f"{i:02d}" + "m" * (wire.MAX_NAME - 2): 1.0 for i in range(wire.MAX_METRICS)}
    claims = Claims(long, 2**63 - 1, 2**63 - 1, long, 2**63 - 1, 2**63 - 1, metrics)
    assert wire.read(wire.seal(claims, long, b"")).claims == claims
