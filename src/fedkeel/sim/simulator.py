"""The simulator: drives the coordinator with a virtual clock, trains in between, and writes the record."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from fedkeel.core.errors import RunError
from fedkeel.core.keys import Key
from fedkeel.core.types import Claims, ClientMemory, RoundReport, ServerState
from fedkeel.round import coordinator as orders
from fedkeel.round import device
from fedkeel.round.coordinator import Command, Coordinator
from fedkeel.round.server import Server
from fedkeel.sim.clock import Outcome
from fedkeel.sim.evaluation import Figures, measure
from fedkeel.sim.federation import Federation
from fedkeel.sim.flight import Base, Flight
from fedkeel.train import Task, Trained, Trainer
from fedkeel.train.pool import RAISED


class Recorder(Protocol):
    """Where a simulation writes: the run directory, or nothing."""

    def round(self, report: RoundReport) -> None: ...

    def metrics(self, round: int, version: int, figures: Sequence[Figures]) -> None: ...

    def checkpoint(self, state: ServerState, memory: ClientMemory, now: float, flight: Flight) -> None: ...


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
        flight: Flight | None = None,
    ) -> None:
        self.federation = federation
        self.trainer = trainer
        self.memory = memory
        self.recorder = recorder
        job, devices = federation.job, federation.devices
        self.server = Server(federation.plan, federation.layout, state, federation.key, federation.referee)
        self.coordinator = Coordinator(
            federation.plan,
            self.server,
            devices.register,
            federation.key,
            rounds=job.rounds,
            evaluate_every=job.record.evaluate_every,
            checkpoint_every=job.record.checkpoint_every,
            until=math.inf if job.schedule.seconds is None else job.schedule.seconds,
            presence=devices,
            now=now,
        )
        self._given = trainer
        known = devices.register
        same = federation.names == known.names
        self._index = known.index if same else {name: i for i, name in enumerate(federation.names)}
        self._private = federation.private()
        self._tuner = federation.tuner()
        self._lr = federation.work.at(1).lr
        self._labels = federation.label_shares(memory)
        self._now = now
        self._flight = flight or Flight()
        self._begun = False
        self._seconds: dict[str, float] = {}
        self._raised = 0

    def run(self) -> ServerState:
        """To the end. The clock is virtual: it jumps from event to event."""
        try:
            while not self.step():
                pass
        finally:
            self.close()
        return self.coordinator.snapshot()

    def close(self) -> None:
        """Let go of a trainer that was made on the way; the one that was given is the caller's to close."""
        if self.trainer is not self._given:
            self.trainer.close()

    def step(self) -> bool:
        """All that happens at the next moment; True when the federation is over."""
        if not self._begun:  # a resumed run may stand in the middle of a moment
            self._begun = True
            return self._happen() or self._obey(self.coordinator.start(self._now))
        self._now = self._flight.clock.advance()
        if not math.isfinite(self._now):
            raise RunError("nothing is under way, and the federation is not over: its scheduler waits for nobody")
        return self._happen() or self._obey(self._timed(self.coordinator.on_tick, self._now))

    def _happen(self) -> bool:
        """Deliver what arrives at this moment; True when the federation is over."""
        for event in self._flight.clock.due(self._now):
            if self._flight.cancelled(event.task):
                continue
            if self._finish(event) if isinstance(event, orders.Train) else self._deliver(event):
                return True
        return False

    def _obey(self, commands: Sequence[Command]) -> bool:
        """Carry out commands, in order; True when the federation is over."""
        given: list[orders.Train] = []
        for command in commands:
            started = time.perf_counter()
            match command:
                case orders.Train():
                    given.append(command)
                case orders.Record(report):
                    self.recorder.round(replace(report, seconds=self._seconds))
                    self._seconds = {}
                    self._spent("record", started)  # of the round before: its own row is written already
                case orders.Evaluate(round, version):
                    figures = measure(self.federation, self.server.state.theta, self.memory, self._tuner)
                    self.recorder.metrics(round, version, figures)
                    self._spent("evaluate", started)
                case orders.Checkpoint(_, state):
                    self.recorder.checkpoint(state, self.memory, self._now, self._flight)
                    self._spent("record", started)
                case orders.Wait(until):
                    self._flight.clock.wake(until)
                case orders.Cancel(_, task):
                    self._flight.cancel(task)
                case orders.Done():
                    return True
        self._begin(given)
        return False

    def _begin(self, given: Sequence[orders.Train]) -> None:
        """Put work on the clock. Where its time depends on its steps, it is done now to know them."""
        devices = self.federation.devices
        base = Base(self.server.theta, self.server.state.control)
        found: dict[int, tuple[Outcome, int]] = {}
        if devices.by_steps and given:
            found = {outcome.task: (outcome, steps) for outcome, steps in self._train(given, base)}
        for order in given:
            outcome, steps = found.get(order.task, (None, 0))
            sent = self.server.given(order.client).bytes_down
            trip = devices.trip(order.client, order.task, self._now, sent, steps)
            if trip.lost is not None:
                lost = Outcome(order.client, order.task, None, trip.why, lost=True)
                self._flight.clock.expect(trip.lost, lost)
            elif outcome is not None:
                self._flight.keep(outcome)
                self._flight.clock.expect(trip.ends, order)
            else:
                self._flight.give(order, trip.ends, base)

    def _finish(self, order: orders.Train) -> bool:
        """A client's work ends: train it with all that started alike, and send what came of it.

        Where the scheduler waits for all, and all are done at once, an answer is delivered while the others still
        train, and its bytes let go: at most the server's own matrix of rows is held.
        """
        devices = self.federation.devices
        if self._flight.waits(order):
            eager = devices.level and "waits_for_all" in self.federation.plan.schedule.definition.traits
            started, before = time.perf_counter(), self._seconds.get("aggregate", 0.0)
            over = False
            for found, _ in self._train(*self._flight.take(order)):
                if not eager:
                    self._flight.keep(found)
                elif self._deliver(found):
                    over = True
                    break
            self._spent("train", started + self._seconds.get("aggregate", 0.0) - before)
            if over:
                return True
        outcome = self._flight.collect(order)
        if outcome is None:
            return False
        size = 0 if outcome.data is None else len(outcome.data)
        self._flight.clock.expect(devices.arrival(order.client, self._now, size), outcome)
        return False

    def _deliver(self, outcome: Outcome) -> bool:
        """Tell the coordinator what came of a task; True when the federation is over."""
        client, task, data = outcome.client, outcome.task, outcome.data
        if data is None:
            stage = "transport" if outcome.lost else "train"
            return self._obey(
                self._timed(self.coordinator.on_failure, client, task, outcome.why, self._now, stage=stage, more=True)
            )
        return self._obey(self._timed(self.coordinator.on_message, client, data, self._now, intact=True, more=True))

    def _timed(self, ask: Callable[..., list[Command]], *args: Any, **options: Any) -> list[Command]:
        started = time.perf_counter()
        commands = ask(*args, **options)
        self._spent("aggregate", started)
        return commands

    def _train(self, starting: Sequence[orders.Train], base: Base) -> Iterator[tuple[Outcome, int]]:
        """Train all who start from the same version, and seal what each one sends; with the steps that it took."""
        federation, adversary = self.federation, self.federation.adversary
        by_index = {self._index[o.client]: o for o in starting}
        keys = {o.client: federation.key.fold("client", o.round, o.client) for o in starting}
        seen: list[Claims | None] = [None] * len(starting)
        rows = torch.empty(len(starting) if adversary.crafts_rows else 0, federation.layout.columns)
        slots = {o.client: i for i, o in enumerate(starting)}
        for order in starting:
            device.recall(order.client, order.settled, self.memory)
        tasks = [self._task(o, keys[o.client]) for o in starting]
        round, control = starting[0].round, base.control
        self._tune(round)
        for done in self.trainer.train(base.theta, tasks, control):
            order = by_index[done.client]
            if done.failure is not None:
                self._count_failure(done.failure)
                yield Outcome(order.client, order.task, None, done.failure), 0
                continue
            self._raised = 0
            if done.private is not None:
                self.memory.keep(order.client, {"private": done.private})
            claims = adversary.claim(self._claims(order, done))
            if adversary.crafts_rows:
                slot = slots[order.client]
                rows[slot], seen[slot] = done.delta, claims
            else:
                row, key = done.delta[None], keys[order.client]
                plan, layout = federation.plan, federation.layout
                sealed = device.prepare(row, [key], [claims], self.memory, plan, layout, control, round)
                yield Outcome(order.client, order.task, sealed[0]), done.steps
        if adversary.crafts_rows:
            kept = [slot for slot, claims in enumerate(seen) if claims is not None]
            rows = rows if len(kept) == len(rows) else rows[kept]
            yield from self._crafted(rows, [c for c in seen if c is not None], keys, round, control)

    def _count_failure(self, why: str) -> None:
        """End the run when as many as a cohort have raised, one after another, and nobody got through."""
        self._raised += why.startswith(RAISED)
        if self._raised >= self.federation.plan.cohort:
            raise RunError(f"the last {self._raised} clients failed, one after another: {why}")

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
    ) -> Iterator[tuple[Outcome, int]]:
        """An attacker that sees everyone's rows (n, P): transform them all, replace the hostile ones, and seal."""
        federation = self.federation
        clients = [c.client for c in claims]
        row_keys = [keys[c] for c in clients]
        rows = device.transform(rows, row_keys, clients, self.memory, federation.plan, federation.layout)
        rows = federation.adversary.craft_(rows, clients, round, lambda U: self.server.preview(U, claims))
        for i, claim in enumerate(claims):
            plan, layout = federation.plan, federation.layout
            row, key = rows[i : i + 1], row_keys[i]
            sealed = device.send(row, [key], [claim], self.memory, plan, layout, control, round)
            yield Outcome(claim.client, claim.task, sealed[0]), claim.steps

    def _task(self, order: orders.Train, key: Key) -> Task:
        client = order.client
        memory = self.memory.of(client)
        kept = {r.name: memory.get(device.CORRECTION + r.name) for r in self.federation.work.corrections}
        known = {name: vector for name, vector in kept.items() if vector is not None}
        own = memory.get("private", self._private)
        speed = order.factor * self.federation.devices.speed(client)
        return Task(self._index[client], key, own, known, speed)

    def _claims(self, order: orders.Train, done: Trained) -> Claims:
        digest = self.federation.layout.digest
        losses = {"loss": done.loss, "global_loss": done.first_loss, "local_loss": done.last_loss}
        metrics = {name: loss for name, loss in losses.items() if math.isfinite(loss)}
        labels = self._labels.get(order.client, ())
        return Claims(order.client, order.task, order.version, digest, done.num_examples, done.steps, metrics, labels)

    def _spent(self, part: str, started: float) -> None:
        self._seconds[part] = self._seconds.get(part, 0.0) + time.perf_counter() - started
