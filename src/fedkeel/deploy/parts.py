"""Flower messages out of their parts, each byte of a large one held once.

Flower 1.41's own way holds a large array three times while it is put together, and joins chunks as often as an array
names them: sixty bytes a repetition make five million.
"""

from __future__ import annotations

import itertools
import json
from typing import Any

from flwr.app import Array, ArrayRecord, Message
from flwr.supercore.inflatable.inflatable_object import (
    InflatableObject,
    get_object_children_ids_from_object_content,
    get_object_type_from_object_content,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from fedkeel.core.errors import DecodeError

_RECORD, _ARRAY, _CHUNK = "ArrayRecord", "Array", b"ArrayChunk "
_HEAD = b"\x00"
"""What ends the head of a part."""


class Parts:
    """What has come of a message; chunks of arrays lie one after another, as they came."""

    def __init__(self) -> None:
        self._held: dict[str, bytes] = {}
        self._data = bytearray()
        self._chunks: dict[str, slice] = {}

    def __contains__(self, number: str) -> bool:
        return number in self._held or number in self._chunks

    @property
    def size(self) -> int:
        """Bytes that are held."""
        return len(self._data) + sum(map(len, self._held.values()))

    def add(self, number: str, content: bytes) -> None:
        """The part of that id."""
        if content.startswith(_CHUNK) and _HEAD in content:
            start = len(self._data)
            self._data += _body(content)
            self._chunks[number] = slice(start, len(self._data))
        else:
            self._held[number] = content

    def joined(self, identity: str, limit: int | None = None) -> Message:
        """The message of that id; nothing is held any more. Raises `DecodeError` for parts that are none, or too many.

        `limit`: bytes that its arrays may have in all.
        """
        held, self._held = self._held, {}
        try:
            message = inflate_object_from_contents(identity, held, objects=self._records(held, limit))
        except DecodeError:
            raise
        except Exception as error:  # hostile bytes meet Flower's own decoder
            raise DecodeError(f"it is no Flower message ({type(error).__name__})") from None
        finally:
            self._data, self._chunks = bytearray(), {}
        if not isinstance(message, Message):
            raise DecodeError(f"it is a {type(message).__name__}, not a message")
        return message

    def _records(self, held: dict[str, bytes], limit: int | None) -> dict[str, InflatableObject]:
        """The array records among the parts, by their ids; they and their arrays are taken out of `held`."""
        kinds = {number: get_object_type_from_object_content(content) for number, content in held.items()}
        taken = {kind: {n: held.pop(n) for n, k in kinds.items() if k == kind} for kind in (_RECORD, _ARRAY)}
        orders = {number: self._order(content) for number, content in taken[_ARRAY].items()}
        size = sum(part.stop - part.start for order in orders.values() for part in order)
        if limit is not None and size > limit:
            raise DecodeError(f"it has {size} bytes, the limit is {limit}")
        arrays = {number: _array(content, self._bytes(orders[number])) for number, content in taken[_ARRAY].items()}
        records: dict[str, InflatableObject] = {}
        for number, content in taken[_RECORD].items():
            record = ArrayRecord()
            for name, array in _told(content).items():
                record[name] = arrays[array]
            records[number] = record
        return records

    def _order(self, content: bytes) -> list[slice]:
        """Where an array's chunks lie, in its order."""
        children = get_object_children_ids_from_object_content(content)
        return [self._chunks[children[at]] for at in _told(content)["arraychunk_ids"]]

    def _bytes(self, order: list[slice]) -> memoryview:
        """An array's bytes: not copied where its chunks came in its order."""
        data = memoryview(self._data).toreadonly()
        if order and all(one.stop == next_.start for one, next_ in itertools.pairwise(order)):
            return data[order[0].start : order[-1].stop]
        return memoryview(b"".join(data[part] for part in order))


def _array(content: bytes, data: memoryview) -> Array:
    info = _told(content)
    array = Array(str(info["dtype"]), tuple(map(int, info["shape"])), str(info["stype"]), b"")
    array.__dict__["data"] = data
    return array


def _told(content: bytes) -> dict[str, Any]:
    """What a record or an array says of its parts."""
    told: dict[str, Any] = json.loads(bytes(_body(content)))
    return told


def _body(content: bytes) -> memoryview:
    return memoryview(content)[content.index(_HEAD) + 1 :]
