"""The clients' half of a federation, for one client or for all of them: work in, updates out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from fedkeel.core.keys import Key
from fedkeel.core.types import Claims, ClientMemory
from fedkeel.round import device
from fedkeel.round.coordinator import Train
from fedkeel.round.protect import used_up
from fedkeel.train import Task, Trained, Trainer
from fedkeel.world.federation import Federation


class Base(NamedTuple):
    """What clients begin with: the model (P,) and what corrections take from the server."""

    theta: Tensor
    control: Mapping[str, Tensor]


class Made(NamedTuple):
    """What came of one client's work: its update (P,) and what it claims of it, or why there is none."""

    order: Train
    key: Key
    claims: Claims | None = None
    delta: Tensor | None = None
    failure: str = ""


class Clients:
    """Trains those clients whose examples the federation holds, and seals what they send.

    The simulator has all of them, a device itself alone: the same bytes leave either.
    """

    def __init__(self, federation: Federation, trainer: Trainer, memory: ClientMemory) -> None:
        self.federation = federation
        self.trainer = trainer
        self.memory = memory
        self._given = trainer
        self._index = {name: i for i, name in enumerate(federation.names)}
        self._private = federation.private()
        self._lr = federation.work.at(1).lr
        self._labels = federation.label_shares(memory)

    def close(self) -> None:
        """Let go of a trainer that was made on the way; the one that was given is the caller's to close."""
        if self.trainer is not self._given:
            self.trainer.close()

    def train(self, orders: Sequence[Train], base: Base) -> Iterator[Made]:
        """Train those who start from the same model in the same round; in the order in which they are done."""
        by_index = {self._index[order.client]: order for order in orders}
        keys = {order.client: self.federation.key.fold("client", order.round, order.client) for order in orders}
        for order in orders:
            device.recall(order.client, order.settled, self.memory)
        unwilling = {o.client: why for o in orders if (why := self._unwilling(o.client))}
        for order in orders:
            if order.client in unwilling:
                yield Made(order, keys[order.client], failure=unwilling[order.client])
        tasks = [self._task(order, keys[order.client]) for order in orders if order.client not in unwilling]
        self._tune(orders[0].round)
        for done in self.trainer.train(base.theta, tasks, base.control):
            order = by_index[done.client]
            key = keys[order.client]
            if done.failure is not None:
                yield Made(order, key, failure=done.failure)
                continue
            if self.federation.plan.secure is not None and not bool(done.delta.isfinite().all()):
                yield Made(order, key, failure="its update is not finite, which nobody could see in a sum")
                continue
            if done.private is not None:
                self.memory.keep(order.client, {"private": done.private})
            yield Made(order, key, self._claims(order, done), done.delta)

    def seal(self, made: Made, claims: Claims, base: Base) -> bytes:
        """The envelope of an update, with these claims."""
        assert made.delta is not None
        plan, layout = self.federation.plan, self.federation.layout
        rows, round = made.delta[None], made.order.round
        return device.prepare(rows, [made.key], [claims], self.memory, plan, layout, base.control, round)[0]

    def _unwilling(self, client: str) -> str | None:
        """Why a client does not work, whatever the server asks; None: it does."""
        if used_up(client, self.memory, self.federation.plan):
            return "its privacy budget is spent"
        least = self.federation.job.privacy.least_examples or 0
        if (count := self.federation.data.count(self._index[client])) < least:
            return f"it has {count} examples, and privacy.least_examples is {least}"
        return None

    def _tune(self, round: int) -> None:
        """Train at the round's learning rate: a step is recorded with its rate in it, so it is recorded anew."""
        work = self.federation.work.at(round)
        if work.lr != self._lr:
            self.trainer.close()
            self.trainer, self._lr = self.federation.trainer(self.trainer.name, round), work.lr
            if self.federation.referee is not None:
                self.federation.referee.follow(work)

    def _task(self, order: Train, key: Key) -> Task:
        client = order.client
        memory = self.memory.of(client)
        kept = {r.name: memory.get(device.CORRECTION + r.name) for r in self.federation.work.corrections}
        known = {name: vector for name, vector in kept.items() if vector is not None}
        own = memory.get("private", self._private)
        speed = order.factor * self.federation.devices.speed(client)
        return Task(self._index[client], key, own, known, speed)

    def _claims(self, order: Train, done: Trained) -> Claims:
        digest = self.federation.layout.digest
        losses = {"loss": done.loss, "global_loss": done.first_loss, "local_loss": done.last_loss}
        metrics = {name: loss for name, loss in losses.items() if math.isfinite(loss)}
        labels = self._labels.get(order.client, ())
        return Claims(order.client, order.task, order.version, digest, done.num_examples, done.steps, metrics, labels)
