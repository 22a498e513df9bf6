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
from fedkeel.core.types import ClientMemory, RoundReport, ServerState
from fedkeel.round import coordinator as orders
from fedkeel.round import device, secure
from fedkeel.round.coordinator import Command, Coordinator
from fedkeel.round.protect import protect
from fedkeel.round.server import Server
from fedkeel.secagg.groups import GroupSum
from fedkeel.secagg.messages import traffic
from fedkeel.secagg.simulate import group_sums
from fedkeel.secagg.terms import Terms
from fedkeel.sim.clock import Outcome
from fedkeel.sim.flight import Flight
from fedkeel.train import Trainer
from fedkeel.train.pool import RAISED
from fedkeel.world.clients import Base, Clients, Made
from fedkeel.world.evaluation import Figures, measure
from fedkeel.world.federation import Federation


class Recorder(Protocol):
    """Where a simulation writes: the run directory, or nothing."""

    def round(self, report: RoundReport) -> None: ...

    def metrics(self, round: int, version: int, figures: Sequence[Figures]) -> None: ...

    def checkpoint(
        self, state: ServerState, memory: ClientMemory, extra: Mapping[str, Any], attached: Mapping[str, Tensor]
    ) -> None: ...


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
        self._clients = Clients(federation, trainer, memory)
        self._tuner = federation.tuner()
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
            self._clients.close()
        return self.coordinator.snapshot()

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
        groups: tuple[Terms, ...] = ()
        for command in commands:
            started = time.perf_counter()
            match command:
                case orders.Train():
                    given.append(command)
                case orders.Sum(groups):
                    pass
                case orders.Record(report):
                    self.recorder.round(replace(report, seconds=self._seconds))
                    self._seconds = {}
                    self._spent("record", started)  # of the round before: its own row is written already
                case orders.Evaluate(round, version):
                    figures = measure(self.federation, self.server.state.theta, self.memory, self._tuner)
                    self.recorder.metrics(round, version, figures)
                    self._spent("evaluate", started)
                case orders.Checkpoint(_, state):
                    under_way, attached = self._flight.state()
                    extra = {"time": self._now, "flight": under_way}
                    self.recorder.checkpoint(state, self.memory, extra, attached)
                    self._spent("record", started)
                case orders.Wait(until):
                    self._flight.clock.wake(until)
                case orders.Cancel(_, task):
                    self._flight.cancel(task)
                case orders.Done():
                    return True
        self._begin(given)
        return bool(groups) and self._obey(self._timed(self.coordinator.on_sums, self._summed(groups), self._now))

    def _summed(self, groups: Sequence[Terms]) -> list[GroupSum]:
        """The groups' sums: the integers of the protocol without its masks, and the bytes that it would send."""
        rows = {client: secure.take(client, self.memory) for terms in groups for client in terms.members}
        found = group_sums(groups, rows, masked=False)
        return [one._replace(traffic=traffic(terms)) for one, terms in zip(found, groups, strict=True)]

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
        if size and (plan := self.federation.plan).secure is not None:  # the row itself is sent when all are there
            size += plan.secure.row_bytes(self.federation.layout.columns)
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
        seen: list[Made | None] = [None] * len(starting)
        rows = torch.empty(len(starting) if adversary.crafts_rows else 0, federation.layout.columns)
        slots = {o.client: i for i, o in enumerate(starting)}
        for made in self._clients.train(starting, base):
            client, task = made.order.client, made.order.task
            if made.claims is None or made.delta is None:
                self._count_failure(made.failure)
                yield Outcome(client, task, None, made.failure), 0
                continue
            self._raised = 0
            claims = adversary.claim(made.claims)
            if adversary.crafts_rows:
                rows[slots[client]], seen[slots[client]] = made.delta, made._replace(claims=claims, delta=None)
            else:
                yield Outcome(client, task, self._clients.seal(made, claims, base)), claims.steps
        if adversary.crafts_rows:
            kept = [slot for slot, made in enumerate(seen) if made is not None]
            rows = rows if len(kept) == len(rows) else rows[kept]
            yield from self._crafted(rows, [made for made in seen if made is not None], base)

    def _count_failure(self, why: str) -> None:
        """End the run when as many as a cohort have raised, one after another, and nobody got through."""
        self._raised += why.startswith(RAISED)
        if self._raised >= self.federation.plan.cohort:
            raise RunError(f"the last {self._raised} clients failed, one after another: {why}")

    def _crafted(self, rows: Tensor, seen: Sequence[Made], base: Base) -> Iterator[tuple[Outcome, int]]:
        """An attacker that sees everyone's rows (n, P): transform them all, replace the hostile ones, and seal."""
        federation = self.federation
        plan, layout = federation.plan, federation.layout
        claims = [made.claims for made in seen if made.claims is not None]
        clients, keys = [c.client for c in claims], [made.key for made in seen]
        round = seen[0].order.round if seen else 0
        rows = device.transform(rows, keys, clients, self.memory, plan, layout)
        rows, claims = protect(rows, keys, claims, self.memory, plan, base.control)
        rows = federation.adversary.craft_(rows, clients, round, lambda U: self.server.preview(U, claims))
        for i, claim in enumerate(claims):
            row, key = rows[i : i + 1], keys[i]
            honest = claim.client not in federation.adversary.clients
            sealed = device.send(row, [key], [claim], self.memory, plan, layout, base.control, round, honest=honest)
            yield Outcome(claim.client, claim.task, sealed[0]), claim.steps

    def _spent(self, part: str, started: float) -> None:
        self._seconds[part] = self._seconds.get(part, 0.0) + time.perf_counter() - started
