"""Messages out of their parts, and the store that a SuperLink keeps parts in."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.object_store import NoObjectInStoreError
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import given
from hypothesis import strategies as st

from fedkeel.core.errors import DecodeError
from fedkeel.deploy import parts, store

pytestmark = pytest.mark.filterwarnings("default")  # Flower's own dependencies warn
TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
LARGE = np.random.default_rng(0).integers(0, 256, 12_000_000, np.uint8).tobytes()


def message(*contents: bytes) -> Message:
    record = ArrayRecord({f"a{n}": Array("uint8", (len(data),), "raw", data) for n, data in enumerate(contents)})
    return Message(RecordDict({"it": record, "c": ConfigRecord({"k": 1})}), 7, "train")


def joined(identity: str, held: dict[str, bytes], limit: int | None = None) -> Message:
    came = parts.Parts()
    for number, content in held.items():
        came.add(number, content)
        assert number in came
    assert came.size <= sum(map(len, held.values()))
    try:
        return came.joined(identity, limit)
    finally:
        assert came.size == 0  # whatever it was, its memory is let go of


def taken_apart(whole: Message) -> dict[str, bytes]:
    return {number: part.deflate() for number, part in get_all_nested_objects(whole).items()}


SMALL = message(b"some bytes", b"others")


@pytest.mark.parametrize("contents", [(LARGE,), (b"",), (b"x", LARGE, b"x"), (bytes(11_000_000),), ()])
@pytest.mark.parametrize("backwards", [False, True])
def test_a_message_is_what_flower_makes_of_its_parts(contents: tuple[bytes, ...], backwards: bool) -> None:
    sent = message(*contents)
    held = taken_apart(sent)
    if backwards:  # then nothing lies where it belongs
        held = dict(reversed(held.items()))
    ours, flowers = joined(sent.object_id, held), inflate_object_from_contents(sent.object_id, dict(held))
    assert isinstance(flowers, Message)
    assert ours.content["c"] == flowers.content["c"]
    ours_, theirs = ours.content["it"], flowers.content["it"]
    assert isinstance(ours_, ArrayRecord)
    assert isinstance(theirs, ArrayRecord)
    assert list(ours_) == list(theirs)
    for name, array in theirs.items():
        assert bytes(ours_[name].data) == array.data
        assert (ours_[name].dtype, ours_[name].shape, ours_[name].stype) == (array.dtype, array.shape, array.stype)


def test_a_chunk_that_is_named_a_thousand_times_is_refused_before_it_is_joined() -> None:
    sent = message(LARGE[:5_000_000])
    held = taken_apart(sent)
    number, content = next((n, c) for n, c in held.items() if c.startswith(b"Array "))
    head, _, body = content.partition(b"\0")
    told = json.loads(body) | {"arraychunk_ids": [0] * 1000}
    held[number] = head + b"\0" + json.dumps(told).encode()
    with pytest.raises(DecodeError, match="5000000000 bytes, the limit is 6000000"):
        joined(sent.object_id, held, 6_000_000)


@given(st.data())
def test_any_bytes_are_a_message_or_refused(data: st.DataObject) -> None:
    held = taken_apart(SMALL)
    number = data.draw(st.sampled_from(sorted(held)))
    content = bytearray(held[number])
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] = data.draw(st.integers(0, 255))
    held[number] = bytes(content[: data.draw(st.integers(0, len(content)))])
    with suppress(DecodeError):
        assert isinstance(joined(SMALL.object_id, held, 1000), Message)


def test_the_store_keeps_large_parts_in_files_through_a_kill(tmp_path: Path) -> None:
    def opened() -> store.FileObjectStore:
        found = store.FileObjectStore(str(tmp_path / "link.db"))
        found.initialize()
        return found

    def files() -> int:
        return len(list(found.folder.iterdir()))

    sent = message(LARGE, b"small")
    held, found = taken_apart(sent), opened()
    large = {number for number, content in held.items() if len(content) >= store.LARGE}
    with pytest.raises(NoObjectInStoreError):
        found.put(sent.object_id, held[sent.object_id])
    assert set(found.preregister(1, get_object_tree(sent))) == set(held)
    assert found.get(min(large)) == b""  # announced, not there yet
    for number, content in held.items():
        found.put(number, content)
        with pytest.raises(ValueError, match="does not match"):
            found.put(number, content + b"x")
    assert files() == len(large) == 3
    assert (tmp_path / "link.db").stat().st_size < 1_000_000
    (found.folder / f"{max(large)}.1f").write_bytes(b"half a part of a process that was killed")
    found = opened()
    assert files() == len(large)
    assert {number: found.get(number) for number in held} == held
    other = message(LARGE)  # shares its chunks
    found.preregister(2, get_object_tree(other))
    found.delete(sent.object_id)
    assert files() == len(large)
    assert found.get(sent.object_id) is None
    (found.folder / max(large)).write_bytes(b"cut off as power failed")
    assert found.get(max(large)) is None
    assert max(large) in found.preregister(3, get_object_tree(other))  # whoever has it is asked for it
    found.put(max(large), held[max(large)])
    (found.folder / max(large)).write_bytes(b"")
    assert max(large) in opened().preregister(3, get_object_tree(other))
    for strange in ("../link.db", str(tmp_path / "link.db"), "..", ".", "a" * 300, "\0", ""):
        found.delete(strange)
        assert found.get(strange) is None
        found._sweep()
    assert (tmp_path / "link.db").exists()
    with suppress(MemoryError), found.session():  # a transaction that does not come to its end
        found.delete(other.object_id)
        raise MemoryError
    found._sweep()
    assert files() == len(large)
    found.delete_objects_in_run(3)
    found.delete_objects_in_run(1)
    found.delete_objects_in_run(2)
    assert files() == len(found) == 0
