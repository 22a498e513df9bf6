"""The simulator: drives the coordinator with a virtual clock, trains in between, and writes the record."""

from __future__ import annotations

import heapq
import itertools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from fedkeel.core.errors import RunError
from fedkeel.core.keys import Key
from fedkeel.core.types import Claims, ClientMemory, RoundReport, ServerState
from fedkeel.round import coordinator as orders
from fedkeel.round import device
from fedkeel.round.coordinator import Command, Coordinator
from fedkeel.round.server import Server
from fedkeel.sim.evaluation import Figures, measure
from fedkeel.sim.federation import Federation
from fedkeel.train import Task, Trained, Trainer
from fedkeel.train.pool import RAISED

ROUND_SECONDS = 1.0
"""Virtual seconds that a client's work takes, until devices differ."""


class Recorder(Protocol):
    """Where a simulation writes: the run directory, or nothing."""

    def round(self, report: RoundReport) -> None: ...

    def metrics(self, round: int, version: int, figures: Sequence[Figures]) -> None: ...

    def checkpoint(self, state: ServerState, memory: ClientMemory, now: float) -> None: ...


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
        now: float = 0.0,
    ) -> None:
        self.federation = federation
        self.trainer = trainer
        self.memory = memory
        self.recorder = recorder
        record = federation.job.record
        self.server = Server(federation.plan, federation.layout, state, federation.key, federation.referee)
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
        self._tuner = federation.tuner()
        self._lr = federation.work.at(1).lr
        self._labels = federation.label_shares(memory)
        self._now = now
        self._events: list[tuple[float, int, int, _Outcome | None]] = []
        self._ticks = itertools.count()
        self._seconds: dict[str, float] = {}
        self._sent_down = 0

    def run(self) -> ServerState:
        """To the end. The clock is virtual: it jumps from event to event."""
        given = self.trainer
        pending: list[Command] | None = self.coordinator.start(self._now)
        try:
            while pending is not None:
                pending = self.advance(pending)
        finally:
            if self.trainer is not given:  # that one is the caller's to close
                self.trainer.close()
        return self.server.snapshot()

    def advance(self, pending: list[Command]) -> list[Command] | None:
        """Carry out what is pending and go on to what follows; None when the federation is over."""
        starting = [c for c in pending if isinstance(c, orders.Train)]
        if any(self._obey(c) for c in pending):
            return None
        following = self._work(starting) if starting else []
        if not following:
            self._now, *_, outcome = heapq.heappop(self._events)
            following = self._deliver(outcome)
        return following

    def _obey(self, command: Command) -> bool:
        """Carry out a command other than Train; True when the federation is over."""
        started = time.perf_counter()
        match command:
            case orders.Record(report):
                self.recorder.round(replace(report, seconds=self._seconds, bytes_down=self._sent_down))
                self._seconds, self._sent_down = {}, 0
                self._spent("record", started)  # of the round before: its own row is written already
            case orders.Evaluate(round, version):
                figures = measure(self.federation, self.server.state.theta, self.memory, self._tuner)
                self.recorder.metrics(round, version, figures)
                self._spent("evaluate", started)
            case orders.Checkpoint():
                self.recorder.checkpoint(self.server.snapshot(), self.memory, self._now)
                self._spent("record", started)
            case orders.Wait(until):
                self._expect(until, None)
        return isinstance(command, orders.Done)

    def _work(self, starting: list[orders.Train]) -> list[Command]:
        """Train all who start together, and return what the coordinator wants done about their answers.

        Where the scheduler waits for all, an answer that nothing on the clock comes before is delivered while the
        others still train, and its bytes let go: at most the server's own matrix of rows is held.
        """
        arrival = self._now + ROUND_SECONDS
        self._sent_down += self.server.bytes_down * len(starting)
        eager = "waits_for_all" in self.federation.plan.schedule.definition.traits
        wanted: list[Command] = []
        started, before = time.perf_counter(), self._seconds.get("aggregate", 0.0)
        for outcome in self._train(starting):
            if wanted or not eager or (self._events and self._events[0][0] <= arrival):
                self._expect(arrival, outcome)
                continue
            self._now = arrival
            for command in self._deliver(outcome):
                if isinstance(command, orders.Wait):
                    self._expect(command.until, None)
                else:
                    wanted.append(command)
        self._spent("train", started + self._seconds.get("aggregate", 0.0) - before)
        return wanted

    def _expect(self, at: float, outcome: _Outcome | None) -> None:
        """Put an event on the clock. At the same time, answers come before ticks, in the order of their tasks."""
        rank = (1, next(self._ticks)) if outcome is None else (0, outcome.task)
        heapq.heappush(self._events, (at, *rank, outcome))

    def _deliver(self, outcome: _Outcome | None) -> list[Command]:
        """Tell the coordinator what happened: an answer, a failure, or (None) that the time has come."""
        started = time.perf_counter()
        if outcome is None:
            commands = self.coordinator.on_tick(self._now)
        elif outcome.data is None:
            commands = self.coordinator.on_failure(outcome.client, outcome.task, outcome.why, self._now, stage="train")
        else:
            commands = self.coordinator.on_message(outcome.client, outcome.data, self._now, intact=True)
        self._spent("aggregate", started)
        return commands

    def _train(self, starting: list[orders.Train]) -> Iterator[_Outcome]:
        """Train all who start from the current version, and seal what each one sends."""
        federation, adversary = self.federation, self.federation.adversary
        by_index = {self._index[o.client]: o for o in starting}
        keys = {o.client: federation.key.fold("client", o.round, o.client) for o in starting}
        seen: list[Claims | None] = [None] * len(starting)
        rows = torch.empty(len(starting) if adversary.crafts_rows else 0, federation.layout.columns)
        slots = {o.client: i for i, o in enumerate(starting)}
        broken = 0
        for order in starting:
            device.recall(order.client, order.settled, self.memory)
        tasks = [self._task(o.client, keys[o.client]) for o in starting]
        control = self.server.state.control
        self._tune(starting[0].round)
        for done in self.trainer.train(self.server.state.theta, tasks, control):
            order = by_index[done.client]
            if done.failure is not None:
                broken += done.failure.startswith(RAISED)
                if broken == len(starting):
                    raise RunError(f"every client of round {order.round} failed: {done.failure}")
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
                plan, layout = federation.plan, federation.layout
                sealed = device.prepare(row, [key], [claims], self.memory, plan, layout, control, order.round)
                yield _Outcome(order.client, order.task, sealed[0])
        if adversary.crafts_rows:
            kept = [slot for slot, claims in enumerate(seen) if claims is not None]
            rows = rows if len(kept) == len(rows) else rows[kept]
            yield from self._crafted(rows, [c for c in seen if c is not None], keys, starting[0].round, control)

    def _tune(self, round: int) -> None:
        """Train at the round's learning rate: a step is recorded with its rate in it, so it is recorded anew."""
        work = self.federation.work.at(round)
        if work.lr != self._lr:
            self.trainer.close()
            self.trainer, self._lr = self.federation.trainer(self.trainer.name, round), work.lr
            if self.federation.referee is not None:
                self.federation.referee.follow(work)

    def _crafted(
        self,
        rows: Tensor,
        claims: list[Claims],
        keys: dict[str, Key],
        round: int,
        control: Mapping[str, Tensor],
    ) -> Iterator[_Outcome]:
        """An attacker that sees everyone's rows (n, P): transform them all, replace the hostile ones, and seal."""
        federation = self.federation
        clients = [c.client for c in claims]
        row_keys = [keys[c] for c in clients]
        rows = device.transform(rows, row_keys, clients, self.memory, federation.plan, federation.layout)
        device.remember(rows, claims, self.memory, federation.plan, control, round)
        rows = federation.adversary.craft_(rows, clients, round, lambda U: self.server.preview(U, claims))
        for i, claim in enumerate(claims):
            sealed = device.encode(rows[i : i + 1], [row_keys[i]], [claim], federation.plan, federation.layout)
            yield _Outcome(claim.client, claim.task, sealed[0])

    def _task(self, client: str, key: Key) -> Task:
        memory = self.memory.of(client)
        kept = {r.name: memory.get(device.CORRECTION + r.name) for r in self.federation.work.corrections}
        known = {name: vector for name, vector in kept.items() if vector is not None}
        own = memory.get("private", self._private)
        return Task(self._index[client], key, own, known, self.federation.speed(client))

    def _claims(self, order: orders.Train, done: Trained) -> Claims:
        digest = self.federation.layout.digest
        losses = {"loss": done.loss, "global_loss": done.first_loss, "local_loss": done.last_loss}
        metrics = {name: loss for name, loss in losses.items() if math.isfinite(loss)}
        labels = self._labels.get(order.client, ())
        return Claims(order.client, order.task, order.version, digest, done.num_examples, done.steps, metrics, labels)

    def _spent(self, part: str, started: float) -> None:
        self._seconds[part] = self._seconds.get(part, 0.0) + time.perf_counter() - started
