"""What travels between a group's clients and the server.

    magic "FKS1" | header length, u32 LE | SHA-256 of all that follows, 32 bytes | header, msgpack | masked row

The header is a flat map: version, kind, session, sender (empty for the server) and the kind's own fields, all of them
bytes. A table by places is its entries end to end: u32 LE place, rising, then data of a fixed width. Nothing is
allocated before its length was checked against the terms. Any bytes give a message or a `DecodeError`.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import msgpack

from fedkeel.core.errors import DecodeError, InputError
from fedkeel.secagg import shamir
from fedkeel.secagg.crypto import KEY, SIGNATURE, TAG
from fedkeel.secagg.terms import MAX_MEMBERS, MAX_NAME, Terms

MAGIC = b"FKS1"
VERSION = 1
PREFIX = struct.Struct("<4sI32s")
SEALED = 2 * shamir.SHARE + TAG
MAX_TERMS = MAX_MEMBERS * (MAX_NAME + 5) + 1024
_OTHER_FIELDS = 1024
"""Bytes of a header beside its tables, at most."""
_PLACE = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class Advertise:
    """Client: two X25519 public keys, for shares and for masks; the signature of both, empty in an unsigned session."""

    sender: str
    keys: bytes
    signature: bytes


@dataclass(frozen=True, slots=True)
class Keys:
    """Server: keys and signature of each of a client's holders that advertised some, its own among them."""

    keys: Mapping[int, bytes]
    sender: str = ""


@dataclass(frozen=True, slots=True)
class Shares:
    """Client: the SHA-256 of its seed, and sealed for each holder a share of the seed and one of its mask key."""

    sender: str
    commitment: bytes
    sealed: Mapping[int, bytes]


@dataclass(frozen=True, slots=True)
class Delivery:
    """Server: what was sealed for a client, by sender. Those are the neighbours that it shares masks with."""

    sealed: Mapping[int, bytes]
    sender: str = ""


@dataclass(frozen=True, slots=True)
class Masked:
    """Client: its row under its masks, P words, little-endian."""

    sender: str
    row: memoryview


@dataclass(frozen=True, slots=True)
class Survivors:
    """Server: whose masked rows have come, in the whole group."""

    places: frozenset[int]
    sender: str = ""


@dataclass(frozen=True, slots=True)
class Consent:
    """Client, in a signed session: the signature of the survivors that it was told of."""

    sender: str
    signature: bytes


@dataclass(frozen=True, slots=True)
class Consents:
    """Server, in a signed session: the signatures of a client's holders."""

    signatures: Mapping[int, bytes]
    sender: str = ""


@dataclass(frozen=True, slots=True)
class Unmask:
    """Client: shares of the seeds of survivors and of the mask keys of those who were lost; of nobody both."""

    sender: str
    seeds: Mapping[int, bytes]
    mask_keys: Mapping[int, bytes]


Message: TypeAlias = Advertise | Keys | Shares | Delivery | Masked | Survivors | Consent | Consents | Unmask


class _Field(NamedTuple):
    """How a field is written as bytes, and how it is read from bytes of a length that was checked."""

    write: Callable[[Any], bytes]
    read: Callable[[bytes, Terms], Any]


def _fixed(width: Callable[[Terms], int]) -> _Field:
    def read(data: bytes, terms: Terms) -> bytes:
        if len(data) != width(terms):
            raise DecodeError(f"it has {len(data)} bytes, not {width(terms)}")
        return data

    return _Field(bytes, read)


def _table(width: Callable[[Terms], int]) -> _Field:
    def write(table: Mapping[int, bytes]) -> bytes:
        return b"".join(_PLACE.pack(place) + table[place] for place in sorted(table))

    def read(data: bytes, terms: Terms) -> dict[int, bytes]:
        entry = _PLACE.size + width(terms)
        if len(data) % entry:
            raise DecodeError(f"{len(data)} bytes are no table of {entry} bytes a place")
        table: dict[int, bytes] = {}
        last = -1
        for at in range(0, len(data), entry):
            (place,) = _PLACE.unpack_from(data, at)
            if not last < place < len(terms.members):
                raise DecodeError(f"place {place} is out of order or not in the group")
            table[place] = data[at + _PLACE.size : at + entry]
            last = place
        return table

    return _Field(write, read)


def _signature(terms: Terms) -> int:
    return SIGNATURE if terms.signed else 0


_PLACES = _table(lambda terms: 0)
_SHARES = _table(lambda terms: shamir.SHARE)
_FIELDS: dict[type[Message], dict[str, _Field]] = {
    Advertise: {"keys": _fixed(lambda terms: 2 * KEY), "signature": _fixed(_signature)},
    Keys: {"keys": _table(lambda terms: 2 * KEY + _signature(terms))},
    Shares: {"commitment": _fixed(lambda terms: 32), "sealed": _table(lambda terms: SEALED)},
    Delivery: {"sealed": _table(lambda terms: SEALED)},
    Masked: {},
    Survivors: {
        "places": _Field(
            lambda places: _PLACES.write(dict.fromkeys(places, b"")),
            lambda data, terms: frozenset(_PLACES.read(data, terms)),
        )
    },
    Consent: {"signature": _fixed(lambda terms: SIGNATURE)},
    Consents: {"signatures": _table(lambda terms: SIGNATURE)},
    Unmask: {"seeds": _SHARES, "mask_keys": _SHARES},
}
_KINDS: dict[str, type[Message]] = {kind.__name__.lower(): kind for kind in _FIELDS}


def write(message: Message, terms: Terms) -> bytes:
    """A message as bytes."""
    kind = type(message)
    fields = {name: field.write(getattr(message, name)) for name, field in _FIELDS[kind].items()}
    common = {"version": VERSION, "kind": kind.__name__.lower(), "session": terms.session, "sender": message.sender}
    return _framed(common | fields, message.row if isinstance(message, Masked) else b"")


def read(data: bytes | memoryview, terms: Terms) -> Message:
    """A message of this session. Raises `DecodeError`; the row of a masked one is a view of `data`."""
    header_limit = _OTHER_FIELDS + len(terms.members) * (2 * _PLACE.size + max(2 * KEY + SIGNATURE, SEALED))
    fields, row = _opened(data, header_limit, terms.row_bytes)
    if type(fields.get("version")) is not int or fields["version"] != VERSION:
        raise DecodeError(f"it has version {str(fields.get('version'))[:20]}, this is {VERSION}")
    kind = _KINDS.get(fields["kind"]) if isinstance(fields.get("kind"), str) else None
    if kind is None:
        raise DecodeError("its kind is unknown")
    if fields.get("session") != terms.session:
        raise DecodeError("it is of another session")
    sender = fields.get("sender")
    if not isinstance(sender, str) or (sender and sender not in terms.places):
        raise DecodeError("its sender is not in the group")
    own = _FIELDS[kind]
    if fields.keys() != {"version", "kind", "session", "sender", *own}:
        raise DecodeError(f"it has other fields than '{kind.__name__.lower()}' has")
    if len(row) != (terms.row_bytes if kind is Masked else 0):
        raise DecodeError(f"it has a row of {len(row)} bytes")
    values: dict[str, Any] = {"row": row} if kind is Masked else {}
    for name, field in own.items():
        if not isinstance(fields[name], bytes):
            raise DecodeError(f"its field '{name}' is not bytes")
        try:
            values[name] = field.read(fields[name], terms)
        except DecodeError as error:
            raise DecodeError(f"its field '{name}' is not valid: {error}") from None
    return kind(sender=sender, **values)


def write_terms(terms: Terms) -> bytes:
    """What the server sends a client before all else."""
    fields = {
        "version": VERSION,
        "kind": "terms",
        "session": terms.session,
        "members": list(terms.members),
        "threshold": terms.threshold,
        "columns": terms.columns,
        "bits": terms.bits,
        "degree": terms.degree,
        "signed": terms.signed,
    }
    return _framed(fields, b"")


def traffic(terms: Terms) -> dict[str, tuple[int, int]]:
    """Bytes to and from each member of an unsigned session in which nobody drops out: as many as the messages have."""
    found = {}
    everybody = len(write(Survivors(frozenset(terms.places.values())), terms)) + len(write_terms(terms))
    for name, place in terms.places.items():
        near = terms.holders(place)
        keys, sealed = dict.fromkeys(near, bytes(2 * KEY)), dict.fromkeys(near - {place}, bytes(SEALED))
        down = (Keys(keys), Delivery(sealed))
        up = (
            Advertise(name, bytes(2 * KEY), b""),
            Shares(name, bytes(32), sealed),
            Masked(name, memoryview(b"")),
            Unmask(name, dict.fromkeys(near, bytes(shamir.SHARE)), {}),
        )
        sizes = [sum(len(write(message, terms)) for message in messages) for messages in (down, up)]
        found[name] = everybody + sizes[0], terms.row_bytes + sizes[1]
    return found


def read_terms(data: bytes | memoryview) -> Terms:
    """The terms of a session; a client looks at them before it takes part. Raises `DecodeError`."""
    fields, _ = _opened(data, MAX_TERMS, 0, MAX_MEMBERS)
    types = {"session": bytes, "members": list, "threshold": int, "columns": int, "bits": int, "degree": int}
    types |= {"signed": bool, "version": int, "kind": str}
    if fields.keys() != types.keys() or any(type(fields[name]) is not kind for name, kind in types.items()):
        raise DecodeError("these are no terms of a session")
    if fields.pop("version") != VERSION or fields.pop("kind") != "terms":
        raise DecodeError(f"these are no terms of a session of version {VERSION}")
    if not all(isinstance(name, str) for name in fields["members"]):
        raise DecodeError("a member's name is no text")
    try:
        return Terms(**fields | {"members": tuple(fields["members"])})
    except InputError as error:
        raise DecodeError(str(error)) from None


def is_terms(data: bytes | memoryview) -> bool:
    """Whether these are the terms of a session, and no message of one."""
    try:
        read_terms(data)
    except DecodeError:
        return False
    return True


def _framed(fields: Mapping[str, Any], row: bytes | memoryview) -> bytes:
    header: bytes = msgpack.packb(fields)
    digest = hashlib.sha256(header)
    digest.update(row)
    return b"".join((PREFIX.pack(MAGIC, len(header), digest.digest()), header, row))


def _opened(
    data: bytes | memoryview, header_limit: int, row_limit: int, array_limit: int = 0
) -> tuple[dict[str, Any], memoryview]:
    """The header and what follows it, their lengths checked before anything is hashed or unpacked."""
    view = memoryview(data).cast("B") if len(data) else memoryview(b"")
    if not PREFIX.size <= len(view) <= PREFIX.size + header_limit + row_limit:
        raise DecodeError(f"{len(view)} bytes are no message of this session")
    magic, length, digest = PREFIX.unpack_from(view)
    if magic != MAGIC:
        raise DecodeError("this is no message of secure aggregation (wrong magic)")
    if length > header_limit or PREFIX.size + length > len(view):
        raise DecodeError(f"a header of {length} bytes is declared, the limit is {min(header_limit, len(view))}")
    if hashlib.sha256(view[PREFIX.size :]).digest() != digest:
        raise DecodeError("the message does not match its digest")
    try:
        fields = msgpack.unpackb(
            view[PREFIX.size : PREFIX.size + length],
            strict_map_key=True,
            max_str_len=MAX_NAME,
            max_bin_len=header_limit,
            max_map_len=16,
            max_array_len=array_limit,
            max_ext_len=0,
        )
    except Exception as error:  # msgpack raises many types on hostile bytes
        raise DecodeError(f"the header is not msgpack ({type(error).__name__})") from None
    if not isinstance(fields, dict):
        raise DecodeError("the header is no map")
    return fields, view[PREFIX.size + length :]
