"""The server's side of Flower's grid: who is there, orders out, replies in, one at a time."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple

import httpx
from flwr.app import ArrayRecord, Message, MessageType, RecordDict
from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE, SUPERLINK_NODE_ID, ErrorCode
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, Metadata, PullObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import GetNodesRequest, PullAppMessagesRequest
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.superlink.grid import HttpGrid

from fedkeel.core.errors import DecodeError
from fedkeel.core.types import Stage
from fedkeel.deploy import keys, messages
from fedkeel.deploy.driver import Arrived, Echo, Said, Told, Way
from fedkeel.deploy.parts import Parts
from fedkeel.deploy.summing import Asked, Seat
from fedkeel.round.coordinator import Train
from fedkeel.world.clients import Base

TTL = 30 * 86_400.0
"""Seconds that Flower keeps a message and its reply: deadlines are the coordinator's, and a late reply must arrive."""
_AROUND = 64 * 1024
"""Bytes that Flower's records add to an envelope, at most."""
_FEW = 50
"""Parts that a reply may have beside the chunks that Flower cuts its array into."""
_SUM = "sum"
_SERVER = Node(node_id=SUPERLINK_NODE_ID)


class _To(NamedTuple):
    """Whose task a message was sent for, and to which node. `kind` is the message's, or that it is part of a sum."""

    client: str
    task: int
    node: int
    kind: str


@dataclass(slots=True, eq=False)
class _Coming:
    """A reply of which Flower has the head, and maybe all parts."""

    to: _To
    metadata: Metadata
    parts: list[str]
    held: Parts = field(default_factory=Parts)


class Network:
    """The nodes of one federation, by the keys that they sign with."""

    def __init__(
        self, grid: HttpGrid, clients: Mapping[str, str], agreed: Mapping[str, str], limit: int, figures: Set[str]
    ) -> None:
        """`clients`: client -> the public key of its node, as OpenSSH writes it. `limit`: bytes of an envelope.
        `figures`: names of what a client measures of its own model.
        """
        self._figures = figures
        self._grid = grid
        self._runtime = grid._runtime_client  # its own methods load all replies at once, and ask for nodes without keys
        self._by_key = {keys.public_bytes(key): client for client, key in clients.items()}
        self._agreed = agreed
        self._limit = limit + _AROUND
        self._waiting: dict[str, _To] = {}
        self._most_parts = self._limit // FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE + _FEW
        self._coming: list[_Coming] = []
        self._base: Base | None = None
        self._records: dict[int, ArrayRecord] = {}

    def seats(self) -> dict[str, Seat]:
        """Client -> its node, of those who are there. Nodes with a key that nobody here has are not."""
        found = self._runtime.GetNodes(GetNodesRequest()).nodes
        known = ((self._by_key.get(node.public_key), node) for node in found)
        return {client: Seat(node.node_id, node.last_activated_at) for client, node in known if client is not None}

    def send(self, given: Sequence[Train], base: Base, seats: Mapping[str, Seat], way: Way) -> None:
        """Give out work that begins with one model."""
        self._push(given, base, seats, MessageType.TRAIN, way)

    def ask(self, clients: Sequence[str], round: int, version: int, base: Base, seats: Mapping[str, Seat]) -> None:
        """Have clients measure their own models, as the model now is."""
        self._forget({(client, round) for client in clients}, MessageType.EVALUATE)
        asked = [Train(client, round, round, version, None) for client in clients]
        self._push(asked, base, seats, MessageType.EVALUATE, lambda have: None)

    def probe(self, client: str, number: int, seat: Seat) -> None:
        """Ask a node for a sign of life, after all that it was asked before."""
        self._waiting = {
            at: to for at, to in self._waiting.items() if (to.client, to.kind) != (client, MessageType.QUERY)
        }
        message = Message(RecordDict(), seat.node, MessageType.QUERY, ttl=TTL)
        for given in self._grid.push_messages([message]):
            if given is not None:
                self._waiting[given] = _To(client, number, seat.node, MessageType.QUERY)

    def say(self, told: Mapping[str, bytes], asked: Mapping[str, Asked]) -> None:
        """Send clients messages of secure aggregation."""
        made = [
            Message(messages.sum_content(data), asked[client].seat.node, MessageType.QUERY, ttl=TTL)
            for client, data in told.items()
        ]
        for client, given in zip(told, self._grid.push_messages(made), strict=True):
            if given is not None:
                self._waiting[given] = _To(client, asked[client].number, asked[client].seat.node, _SUM)

    def silence(self) -> None:
        """No message of secure aggregation is waited for any more."""
        self._forget({(to.client, to.task) for to in self._waiting.values() if to.kind == _SUM}, _SUM)

    def forget(self, client: str, task: int) -> None:
        """No reply to this task is waited for any more."""
        self._forget({(client, task)}, MessageType.TRAIN)

    def _forget(self, asked: Set[tuple[str, int]], kind: str) -> None:
        def meant(to: _To) -> bool:
            return to.kind == kind and (to.client, to.task) in asked

        for at in [at for at, to in self._waiting.items() if meant(to)]:
            del self._waiting[at]
            self._confirm(self._grid.run.run_id, at)
        for coming in [one for one in self._coming if meant(one.to)]:
            self._let_go(coming)

    def _push(self, given: Sequence[Train], base: Base, seats: Mapping[str, Seat], kind: str, way: Way) -> None:
        made = []
        for order in given:
            content = messages.order_content(order, self._record(base, order.have, way), self._agreed)
            node = seats[order.client].node
            made.append(Message(content, node, kind, ttl=TTL, group_id=str(order.round)))
        for order, message in zip(given, self._grid.push_messages(made), strict=True):
            if message is not None:
                node = seats[order.client].node
                self._waiting[message] = _To(order.client, order.task, node, kind)

    def _record(self, base: Base, have: int, way: Way) -> ArrayRecord:
        """One for all who are sent the same, as long as the model is the same."""
        if self._base is not base:
            self._base, self._records = base, {}
        steps = way(have)
        key = -1 if steps is None else have
        if key not in self._records:
            self._records[key] = messages.model_record(base, steps)
        return self._records[key]

    def replies(self) -> Iterator[Arrived | Told | Said | Echo]:
        """What has come, one reply at a time in memory. One that is still being uploaded is waited for by nobody."""
        if self._waiting:
            found = self._runtime.PullMessages(PullAppMessagesRequest(message_ids=list(self._waiting)))
            for proto, tree in zip(found.messages_list, found.message_object_trees, strict=True):
                told = self._waiting.pop(proto.metadata.reply_to_message_id, None)
                if told is not None:
                    self._confirm(proto.metadata.run_id, proto.metadata.reply_to_message_id)
                    parts = list(dict.fromkeys(part.object_id for part in iterate_object_tree(tree)))
                    self._coming.append(_Coming(told, proto.metadata, parts))
        # Replies to tasks before those to probes, which say that there are none.
        for coming in sorted(self._coming, key=lambda one: one.to.kind == MessageType.QUERY):
            if coming not in self._coming:
                continue  # it was forgotten in the meantime
            try:
                done = self._fetch(coming)
            except (LookupError, httpx.HTTPError) as error:
                self._let_go(coming)
                yield _nothing(coming.to, f"its reply was not uploaded in full ({error})")
            except DecodeError as error:
                self._let_go(coming)
                yield _nothing(coming.to, str(error), "decode")
            else:
                if done:
                    self._let_go(coming)
                    read = self._read(coming)
                    _give_back()
                    yield read
                    del read  # the next one is fetched now, and each may be large

    def _let_go(self, coming: _Coming) -> None:
        """Nothing more is asked of a reply; the SuperLink deletes what it has of it."""
        self._coming.remove(coming)
        self._confirm(coming.metadata.run_id, coming.metadata.message_id)

    def _confirm(self, run: int, message: str) -> None:
        """Nobody needs a message's parts any more: the SuperLink, which waits for that, deletes them."""
        confirm = ConfirmMessageReceivedRequest(node=_SERVER, run_id=run, message_object_id=message)
        with suppress(httpx.HTTPError):
            self._runtime.ConfirmMessageReceived(confirm)

    def _fetch(self, coming: _Coming) -> bool:
        """Get what is there of a reply; True when that is all of it. The last part first: then most wait no longer."""
        if len(coming.parts) > self._most_parts:
            raise DecodeError(f"it has {len(coming.parts)} parts, the limit is {self._most_parts}")
        for part in [coming.parts[-1], *coming.parts[:-1]]:
            if part in coming.held:
                continue
            run = coming.metadata.run_id
            got = self._runtime.PullObject(PullObjectRequest(node=_SERVER, run_id=run, object_id=part))
            if not got.object_found:
                raise LookupError("a part of it is gone")
            if not got.object_available:
                return False
            coming.held.add(part, got.object_content)
            if coming.held.size > self._limit:
                raise DecodeError(f"it has {coming.held.size} bytes and more, the limit is {self._limit}")
        return True

    def _read(self, coming: _Coming) -> Arrived | Told | Said | Echo:
        to = coming.to
        try:
            reply = coming.held.joined(coming.metadata.message_id, self._limit)
        except DecodeError as error:
            return _nothing(to, str(error), "decode")
        if reply.has_error():
            # Flower itself answers with the server's own id, where a node is gone.
            stage: Stage = "train" if reply.error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION else "transport"
            why = messages.in_words(reply.error.reason)
            return _nothing(to, why, stage)
        if coming.metadata.src_node_id != to.node:
            why = f"node {coming.metadata.src_node_id} answered in the place of node {to.node}"
            return _nothing(to, why, "decode")
        if to.kind == MessageType.QUERY:
            return _nothing(to, "")
        try:
            if to.kind == _SUM:
                said = messages.read_sum(reply.content)
                return _nothing(to, said) if isinstance(said, str) else Said(to.client, to.task, said)
            if to.kind == MessageType.EVALUATE:
                return Told(to.client, to.task, messages.read_figures(reply.content, self._figures))
            said = messages.read_reply(reply.content)
        except DecodeError as error:
            return _nothing(to, str(error), "decode")
        return _nothing(to, said, "train") if isinstance(said, str) else Arrived(to.client, to.task, said)


def _give_back() -> None:
    """What a message's parts were in, to the system: glibc would keep as much again as the message has."""
    with suppress(AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _nothing(to: _To, why: str, stage: Stage = "transport") -> Arrived | Told | Said | Echo:
    if to.kind == MessageType.QUERY:
        return Echo(to.client, to.task)  # it is done with what it was sent before, whatever it says
    if to.kind == _SUM:
        return Said(to.client, to.task, None, why)
    if to.kind == MessageType.EVALUATE:
        return Told(to.client, to.task, None, why)
    return Arrived(to.client, to.task, None, why, stage)
