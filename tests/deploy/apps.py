"""Flower apps without a network: a grid of functions, with Flower's own messages."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

Client = Callable[[Message, Context], Message | list[Message] | None]


def identify() -> None:
    """Flower's messages want to know whose process this is."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1


class Loop(Grid):
    """Nodes that answer at once: node id -> function; each has a context that lasts."""

    def __init__(self, clients: Mapping[int, Client]) -> None:
        identify()
        self.clients = dict(clients)
        self.contexts = {node: Context(1, node, {}, RecordDict(), {}) for node in clients}
        self.waiting: dict[str, Message] = {}
        self.bytes_up = 0

    def set_run(self, run: Any) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Any:
        raise NotImplementedError

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return list(self.clients)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        for message in messages:
            message.metadata.__dict__["_message_id"] = message.object_id  # as HttpGrid does
            self.waiting[message.object_id] = message
        return [message.metadata.message_id for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        found: list[Message] = []
        for number in message_ids:
            message = self.waiting.pop(number)
            node = message.metadata.dst_node_id
            said = self.clients[node](message, self.contexts[node])
            found += said if isinstance(said, list) else [] if said is None else [said]
        self.bytes_up += sum(size(reply) for reply in found)
        return found

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        return self.pull_messages(self.push_messages(list(messages)))


def size(reply: Message) -> int:
    """Bytes of the arrays in a reply."""
    if not reply.has_content():
        return 0
    return sum(len(array.data) for record in reply.content.array_records.values() for array in record.values())


def model(seed: int = 0) -> dict[str, np.ndarray]:
    """Some weights: two layers, a counter and a statistic, as PyTorch would name them."""
    draw = np.random.default_rng(seed)
    return {
        "fc.weight": draw.normal(size=(30, 20)).astype(np.float32),
        "fc.bias": draw.normal(size=30).astype(np.float32),
        "bn.running_mean": draw.normal(size=30).astype(np.float32),
        "bn.num_batches_tracked": np.array(3 + seed, np.int64),
        "out.weight": draw.normal(size=(4, 30)).astype(np.float32),
    }


def record(arrays: Mapping[str, np.ndarray]) -> ArrayRecord:
    return ArrayRecord({name: Array(value) for name, value in arrays.items()})


def moved(message: Message, seed: int, scale: float = 0.1) -> dict[str, np.ndarray]:
    """The weights that were sent, some way on; a little different for every seed."""
    sent = {name: array.numpy() for name, array in message.content["arrays"].items()}
    draw = np.random.default_rng(seed)
    made = {}
    for name, value in sent.items():
        step = 1 if name.endswith("tracked") else scale * draw.normal(size=value.shape)
        made[name] = np.asarray(value + step, value.dtype)
    return made


def reply(message: Message, arrays: Mapping[str, np.ndarray], **metrics: Any) -> Message:
    """What a stock client answers."""
    content = {"arrays": record(arrays), "metrics": MetricRecord({k.replace("_", "-"): v for k, v in metrics.items()})}
    return Message(RecordDict(content), reply_to=message)


def honest(seed: int, examples: int = 10) -> Client:
    """A stock client: it moves the weights, and measures what it is asked to."""

    def client(message: Message, context: Context) -> Message:
        if message.metadata.message_type == MessageType.EVALUATE:
            metrics = MetricRecord({"accuracy": 0.5 + seed / 100, "num-examples": examples})
            return Message(RecordDict({"metrics": metrics}), reply_to=message)
        return reply(message, moved(message, seed), loss=float(seed), num_examples=examples)

    return client


def config(message: Message) -> ConfigRecord:
    found = message.content["config"]
    assert isinstance(found, ConfigRecord)
    return found
