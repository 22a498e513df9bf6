"""Flower messages out of their parts, each byte of a large one held once.

Flower 1.41's own way holds a large array three times while it is put together, and joins chunks as often as an array
names them: sixty bytes a repetition make five million.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from flwr.app import Array, ArrayRecord, Message
from flwr.supercore.inflatable.inflatable_object import (
    InflatableObject,
    get_object_children_ids_from_object_content,
    get_object_type_from_object_content,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from fedkeel.core.errors import DecodeError

_RECORD, _ARRAY, _CHUNK = "ArrayRecord", "Array", "ArrayChunk"
_HEAD = b"\x00"
"""What ends the head of a part."""


def joined(identity: str, held: dict[str, bytes], limit: int | None = None) -> Message:
    """The message of that id; `held` is emptied. Raises `DecodeError` for any bytes that are none, or are too many.

    `limit`: bytes that its arrays may have in all.
    """
    try:
        message = inflate_object_from_contents(identity, held, objects=_records(held, limit))
    except DecodeError:
        raise
    except Exception as error:  # hostile bytes meet Flower's own decoder
        raise DecodeError(f"it is no Flower message ({type(error).__name__})") from None
    finally:
        held.clear()
    if not isinstance(message, Message):
        raise DecodeError(f"it is a {type(message).__name__}, not a message")
    return message


def _records(held: dict[str, bytes], limit: int | None) -> dict[str, InflatableObject]:
    """The array records among the parts, by their ids; all that they are made of is taken out."""
    kinds = {number: get_object_type_from_object_content(content) for number, content in held.items()}
    taken = {
        kind: {n: held.pop(n) for n, found in kinds.items() if found == kind} for kind in (_RECORD, _ARRAY, _CHUNK)
    }
    arrays = _arrays(taken[_ARRAY], {number: _body(content) for number, content in taken.pop(_CHUNK).items()}, limit)
    records: dict[str, InflatableObject] = {}
    for number, content in taken[_RECORD].items():
        record = ArrayRecord()
        for name, array in _told(content).items():
            record[name] = arrays[array]
        records[number] = record
    return records


def _arrays(contents: dict[str, bytes], chunks: dict[str, memoryview], limit: int | None) -> dict[str, Array]:
    """Arrays of their chunks, each of which is let go of when it was used for the last time."""
    orders: dict[str, list[str]] = {}
    for number, content in contents.items():
        children = get_object_children_ids_from_object_content(content)
        orders[number] = [children[at] for at in _told(content)["arraychunk_ids"]]
    left = Counter(chunk for order in orders.values() for chunk in order)
    size = sum(times * len(chunks[chunk]) for chunk, times in left.items())
    if limit is not None and size > limit:
        raise DecodeError(f"it has {size} bytes, the limit is {limit}")
    found: dict[str, Array] = {}
    for number, order in orders.items():
        whole, at = bytearray(sum(len(chunks[chunk]) for chunk in order)), 0
        for name in order:
            left[name] -= 1
            chunk = chunks[name] if left[name] else chunks.pop(name)
            whole[at : at + len(chunk)] = chunk
            at += len(chunk)
        info = _told(contents[number])
        array = Array(str(info["dtype"]), tuple(map(int, info["shape"])), str(info["stype"]), b"")
        array.__dict__["data"] = memoryview(whole).toreadonly()
        found[number] = array
    return found


def _told(content: bytes) -> dict[str, Any]:
    """What a record or an array says of its parts."""
    told: dict[str, Any] = json.loads(bytes(_body(content)))
    return told


def _body(content: bytes) -> memoryview:
    return memoryview(content)[content.index(_HEAD) + 1 :]
