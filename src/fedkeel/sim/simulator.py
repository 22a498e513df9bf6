"""The simulator: drives the coordinator with a virtual clock, trains in between, and writes the record."""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from fedkeel.core.keys import Key
from fedkeel.core.types import Claims, ClientMemory, RoundReport, ServerState
from fedkeel.round import coordinator as orders
from fedkeel.round import device
from fedkeel.round.coordinator import Command, Coordinator
from fedkeel.round.server import Server
from fedkeel.sim.federation import Federation, Value
from fedkeel.train import Task, Trained, Trainer

ROUND_SECONDS = 1.0
"""Virtual seconds that a client's work takes, until devices differ."""


class Recorder(Protocol):
    """Where a simulation writes: the run directory, or nothing."""

    def round(self, report: RoundReport) -> None: ...

    def metrics(self, round: int, version: int, values: Mapping[str, Value], examples: int) -> None: ...

    def checkpoint(self, state: ServerState, memory: ClientMemory) -> None: ...


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What reaches the server from a client: bytes, or a failure and why."""

    client: str
    task: int
    data: bytes | None
    why: str = ""


class Simulator:
    """One federation in one process. `run` carries out the coordinator's commands until it says that it is done."""

    def __init__(
        self,
        federation: Federation,
        trainer: Trainer,
        state: ServerState,
        memory: ClientMemory,
        recorder: Recorder,
    ) -> None:
        self.federation = federation
        self.trainer = trainer
        self.memory = memory
        self.recorder = recorder
        record = federation.job.record
        self.server = Server(federation.plan, federation.layout, state)
        self.coordinator = Coordinator(
            federation.plan,
            self.server,
            federation.names,
            federation.key,
            rounds=federation.job.rounds,
            evaluate_every=record.evaluate_every,
            checkpoint_every=record.checkpoint_every,
        )
        self._index = {name: i for i, name in enumerate(federation.names)}
        self._private = federation.private()
        self._events: list[tuple[float, int, _Outcome | None]] = []
        self._order = itertools.count()
        self._seconds: dict[str, float] = {}
        self._sent_down = 0

    def run(self) -> ServerState:
        """To the end. The clock is virtual: it jumps from event to event."""
        now = float(self.server.state.round) * ROUND_SECONDS
        pending = self.coordinator.start(now)
        while True:
            if self._carry_out(pending, now):
                return self.server.snapshot()
            now, _, outcome = heapq.heappop(self._events)
            started = time.perf_counter()
            if outcome is None:
                pending = self.coordinator.on_tick(now)
            elif outcome.data is None:
                pending = self.coordinator.on_failure(outcome.client, outcome.task, outcome.why, now, stage="train")
            else:
                pending = self.coordinator.on_message(outcome.client, outcome.data, now)
            self._spent("aggregate", started)

    def _carry_out(self, commands: Iterable[Command], now: float) -> bool:
        """Carry out commands in order; True once the federation is over. All who start together train together."""
        starting: list[orders.Train] = []
        for command in commands:
            match command:
                case orders.Train():
                    starting.append(command)
                case orders.Record(report):
                    self.recorder.round(replace(report, seconds=self._seconds, bytes_down=self._sent_down))
                    self._seconds, self._sent_down = {}, 0
                case orders.Evaluate(round, version):
                    started = time.perf_counter()
                    values, examples = self.federation.evaluate(self.server.state.theta, self.memory)
                    self.recorder.metrics(round, version, values, examples)
                    self._spent("evaluate", started)
                case orders.Checkpoint():
                    started = time.perf_counter()
                    self.recorder.checkpoint(self.server.snapshot(), self.memory)
                    self._spent("checkpoint", started)
                case orders.Wait(until):
                    heapq.heappush(self._events, (until, next(self._order), None))
                case orders.Done():
                    return True
        if starting:
            started = time.perf_counter()
            for outcome in self._train(starting):
                heapq.heappush(self._events, (now + ROUND_SECONDS, outcome.task, outcome))
            self._sent_down += 4 * self.federation.layout.columns * len(starting)
            self._spent("train", started)
        return False

    def _train(self, starting: list[orders.Train]) -> Iterator[_Outcome]:
        """Train all who start from the current version, and seal what each one sends."""
        federation, adversary = self.federation, self.federation.adversary
        by_index = {self._index[o.client]: o for o in starting}
        keys = {o.client: federation.key.fold("client", o.round, o.client) for o in starting}
        seen: list[Claims | None] = [None] * len(starting)
        rows = torch.empty(len(starting) if adversary.crafts_rows else 0, federation.layout.columns)
        slots = {o.client: i for i, o in enumerate(starting)}
        tasks = [self._task(o.client, keys[o.client]) for o in starting]
        for done in self.trainer.train(self.server.state.theta, tasks, self.server.state.control):
            order = by_index[done.client]
            if done.failure is not None:
                yield _Outcome(order.client, order.task, None, done.failure)
                continue
            if done.private is not None:
                self.memory.keep(order.client, {"private": done.private})
            claims = adversary.claim(self._claims(order, done))
            if adversary.crafts_rows:
                slot = slots[order.client]
                rows[slot], seen[slot] = done.delta, claims
            else:
                row, key = done.delta[None], keys[order.client]
                sealed = device.prepare(row, [key], [claims], self.memory, federation.plan, federation.layout)
                yield _Outcome(order.client, order.task, sealed[0])
        if adversary.crafts_rows:
            kept = [slot for slot, claims in enumerate(seen) if claims is not None]
            rows = rows if len(kept) == len(rows) else rows[kept]
            yield from self._crafted(rows, [c for c in seen if c is not None], keys, starting[0].round)

    def _crafted(self, rows: Tensor, claims: list[Claims], keys: dict[str, Key], round: int) -> Iterator[_Outcome]:
        """An attacker that sees everyone's rows (n, P): transform them all, replace the hostile ones, and seal."""
        federation = self.federation
        clients = [c.client for c in claims]
        row_keys = [keys[c] for c in clients]
        rows = device.transform(rows, row_keys, clients, self.memory, federation.plan, federation.layout)
        rows = federation.adversary.craft_(rows, clients, round)
        for i, claim in enumerate(claims):
            sealed = device.encode(rows[i : i + 1], [row_keys[i]], [claim], federation.plan)
            yield _Outcome(claim.client, claim.task, sealed[0])

    def _task(self, client: str, key: Key) -> Task:
        memory = self.memory.of(client)
        return Task(self._index[client], key, memory.get("private", self._private), memory)

    def _claims(self, order: orders.Train, done: Trained) -> Claims:
        digest = self.federation.layout.digest
        metrics = {"loss": done.loss}
        return Claims(order.client, order.task, order.version, digest, done.num_examples, done.steps, metrics)

    def _spent(self, part: str, started: float) -> None:
        self._seconds[part] = self._seconds.get(part, 0.0) + time.perf_counter() - started
