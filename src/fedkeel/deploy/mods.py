"""Flower mods for the clients of an app whose strategy is `FedKeel`."""

from __future__ import annotations

import json
import secrets
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from flwr.app import Array, ArrayRecord, Context, Message, MessageType, RecordDict
from flwr.clientapp.typing import ClientAppCallable

from fedkeel.config import Job
from fedkeel.core.errors import DecodeError, FedkeelError
from fedkeel.core.keys import Key
from fedkeel.core.types import ClientMemory
from fedkeel.deploy import messages, weights
from fedkeel.round import device
from fedkeel.round.plan import Plan
from fedkeel.world.federation import build_plan

ORDER = "fedkeel"
"""The name under which the train config holds what a client needs to know of its task, as JSON."""
MEMORY = "fedkeel.memory"
"""The record of a node's state that holds what the client keeps between rounds."""


class Task(NamedTuple):
    """What a client is told of its task. `job` is the job's section `client`, as JSON."""

    client: str
    task: int
    round: int
    version: int
    weighted_by: str
    steps: int
    buffers: tuple[str, ...]
    job: str

    def text(self) -> str:
        """For the train config."""
        return json.dumps(self._asdict())

    @classmethod
    def read(cls, text: str) -> Task:
        """What a server wrote: this release's words, or none. Raises `DecodeError`."""
        try:
            told: dict[str, Any] = json.loads(text)
            return cls(**{**told, "buffers": tuple(told["buffers"])})
        except (ValueError, TypeError, KeyError):
            raise DecodeError("the server's words are another release's: bring both to the same fedkeel") from None


def seal(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Send the update of a training in an envelope: the change of the weights alone, coded as the strategy says.

    First in `ClientApp(mods=[...])`, so that it sees what the others leave. What the codec loses is kept in the node's
    state where the job has error feedback. Under another strategy, and for other messages, it does nothing.
    """
    reply = call_next(message, context)
    text = next((found[ORDER] for found in message.content.config_records.values() if ORDER in found), None)
    if message.metadata.message_type != MessageType.TRAIN or text is None or reply.has_error():
        return reply
    try:
        task = Task.read(str(text))
        plan, memory = _plan(task.job), _recalled(context, task.client)
        envelope = envelope_of(weights.only_arrays(message.content), reply.content, task, plan, memory)
        _keep(context, memory)
        return Message(messages.update_content(envelope), reply_to=message)
    except (FedkeelError, ValueError) as error:
        return Message(messages.failure_content(str(error)), reply_to=message)


def envelope_of(base: ArrayRecord, reply: RecordDict, task: Task, plan: Plan, memory: ClientMemory) -> bytes:
    """What a client's weights are as an envelope, given those that it was sent. Raises `DecodeError`, `ValueError`.

    What rows are rounded by is drawn from the operating system's generator: nobody can foretell it.
    """
    layout, names = weights.layout_of(base, task.buffers), list(base)
    said = weights.told(reply, task.weighted_by, steps=task.steps)
    delta = weights.row_of(weights.only_arrays(reply), layout, names) - weights.row_of(base, layout, names)
    claims = weights.claims_of(said, task.client, task.task, task.version, layout)
    key = Key(secrets.randbits(63))
    return device.prepare(delta[None], [key], [claims], memory, plan, layout, round=task.round)[0]


@lru_cache(maxsize=4)
def _plan(client: str) -> Plan:
    return build_plan(Job(client=json.loads(client)))


def _recalled(context: Context, client: str) -> ClientMemory:
    memory, held = ClientMemory(), context.state.get(MEMORY)
    if isinstance(held, ArrayRecord):
        memory.keep(client, {name: torch.from_numpy(array.numpy()) for name, array in held.items()})
    return memory


def _keep(context: Context, memory: ClientMemory) -> None:
    if held := {name: Array(vector.numpy()) for _, name, vector in memory.items()}:
        context.state[MEMORY] = ArrayRecord(held)
