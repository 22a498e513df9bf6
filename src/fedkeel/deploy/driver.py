"""Drives the coordinator by the wall clock, over nodes that come and go. It knows nothing of Flower."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from fedkeel.core.types import ClientMemory, ServerState, Stage
from fedkeel.deploy.summing import Asked, Seat, Summing
from fedkeel.deploy.surveys import Survey, Surveys
from fedkeel.round import coordinator as orders
from fedkeel.round.coordinator import Command, Coordinator
from fedkeel.round.server import Server
from fedkeel.world.clients import Base
from fedkeel.world.evaluation import asked_of_clients, of_shared
from fedkeel.world.federation import Federation
from fedkeel.world.record import Record

_log = logging.getLogger("fedkeel")
LOOK = 2.0
"""Seconds between two looks at who is there."""
POLL = 0.2
"""Seconds between two looks for replies."""
_DOUBLINGS = 8
"""Of the time between two probes that have no answer."""


@dataclass(frozen=True, slots=True)
class Arrived:
    """A reply to a task: its bytes, or why there are none. `stage` as `Coordinator.on_failure` has it."""

    client: str
    task: int
    data: memoryview | None
    why: str = ""
    stage: Stage = "transport"


class Told(NamedTuple):
    """What a client measured of its own model after a round, and on how many examples; or why it did not."""

    client: str
    round: int
    figures: tuple[dict[str, float], int] | None
    why: str = ""


class Said(NamedTuple):
    """A client's message of secure aggregation, in answer to what it was asked under a number; or why there is none."""

    client: str
    number: int
    data: memoryview | None
    why: str = ""


class Echo(NamedTuple):
    """A client's node has answered a probe: it is done with all that it was asked before that."""

    client: str
    number: int


@dataclass(slots=True)
class _Work:
    """What a client is at, as far as anybody knows; `closed`: its answer will not be used, but it is still at it."""

    task: int
    seat: Seat
    number: int
    closed: bool = False


Way = Callable[[int], Sequence[bytes] | None]
"""From a version that a node has to the model: the coded steps, or None where it is sent in full."""


class Nodes(Protocol):
    """The nodes of a federation, however they are reached."""

    def seats(self) -> Mapping[str, Seat]:
        """Client -> its node, of those who are there."""

    def send(self, given: Sequence[orders.Train], base: Base, seats: Mapping[str, Seat], way: Way) -> None:
        """Give out work that begins with one model. `way` to it from a version, or None: it is sent in full."""

    def ask(self, clients: Sequence[str], round: int, version: int, base: Base, seats: Mapping[str, Seat]) -> None:
        """Have clients measure their own models, of this model."""

    def probe(self, client: str, number: int, seat: Seat) -> None:
        """Ask a node for a sign of life, after all that it was asked before."""

    def say(self, told: Mapping[str, bytes], asked: Mapping[str, Asked]) -> None:
        """Send clients messages of secure aggregation."""

    def silence(self) -> None:
        """No message of secure aggregation is waited for any more."""

    def forget(self, client: str, task: int) -> None:
        """No reply to this task is waited for any more."""

    def replies(self) -> Iterator[Arrived | Told | Said | Echo]:
        """What has come since the last time."""


class _Present:
    """Who is there, for the coordinator, as of the last look. Nobody knows when that changes: it looks again soon."""

    def __init__(self, index: Mapping[str, int], patience: float) -> None:
        self._index = index
        self._mask = np.zeros(len(index), bool)
        self.patience = patience
        self._alone = math.inf

    def look(self, clients: Iterable[str]) -> None:
        self._mask[:] = False
        self._mask[[self._index[client] for client in clients]] = True

    def given(self) -> None:
        """Somebody was there to be given work."""
        self._alone = math.inf

    def here(self, now: float) -> NDArray[np.bool_]:
        return self._mask

    def next_change(self, now: float) -> float:
        """Infinity, which skips the round, once nobody could be given work for as long as patience lasts."""
        self._alone = min(self._alone, now)
        if now - self._alone < self.patience and not self._mask.all():
            return now + LOOK
        self._alone = math.inf  # the next round waits again
        return math.inf


class Driver:
    """One federation on a network: asks the coordinator, carries out what it says, until it says that it is done."""

    def __init__(
        self,
        federation: Federation,
        nodes: Nodes,
        record: Record,
        state: ServerState,
        *,
        patience: float,
        gather: float,
        probe: float,
        now: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`now` is how many seconds of the federation are over already, `clock` any clock that never runs backwards.

        `patience`: seconds that a round waits while nobody is there; `gather`: seconds to wait for all before the
        first; `probe`: seconds of silence after which a node that is at work is asked for a sign of life.
        """
        job = federation.job
        self.federation = federation
        self.server = Server(federation.plan, federation.layout, state, federation.key, federation.referee)
        register = federation.devices.register
        self._present = _Present(register.index, patience)
        self.coordinator = Coordinator(
            federation.plan,
            self.server,
            register,
            federation.key,
            rounds=job.rounds,
            evaluate_every=job.record.evaluate_every,
            until=math.inf if job.schedule.seconds is None else job.schedule.seconds,
            presence=self._present,
            now=now,
        )
        self._nodes = nodes
        self._record = record
        self._gather, self._probe = gather, probe
        self._asks = asked_of_clients(federation)
        self._surveys = Surveys(federation, self._ask, record.metrics, patience)
        self._summing: Summing | None = None
        self._clock, self._sleep = clock, sleep
        self._began = clock() - now
        self._seats: Mapping[str, Seat] = {}
        self._at: dict[str, _Work] = {}
        self._number = 0
        self._quiet: dict[str, float] = {}
        self._tries: dict[str, int] = {}
        self._looked = self._wake = -math.inf
        self._seconds: dict[str, float] = {}
        self._base = Base(self.server.theta, self.server.state.control)

    @property
    def now(self) -> float:
        """Seconds of the federation."""
        return self._clock() - self._began

    def run(self, *, measured: bool = True) -> ServerState:
        """To the end. `measured`: whether the figures of the last round that is closed are written down."""
        self._wait_for_all()
        if not measured:
            self._evaluate(self.server.state.round, self.server.state.version)
        lost = self.coordinator.server.state.in_flight  # of a server that was killed: nobody works at them any more
        over = self._obey(self.coordinator.start(self.now))
        for order in lost:
            over = over or self._fail(order.client, order.task, "the server was started anew while it was at work")
        while not over:
            over = self._step()
        while self._surveys:  # of the last rounds: nothing is trained any more
            self._step()
        return self.coordinator.snapshot()

    def _wait_for_all(self) -> None:
        """Until every node is there, or some are and time is up."""
        began = self.now
        while True:
            self._look()
            waited = self.now - began
            if len(self._seats) == len(self.coordinator.roster.names) or (waited >= self._gather and self._seats):
                break
            if waited >= self._gather + self._present.patience:
                break
            self._sleep(POLL)
        self._began += self.now - began  # the federation's clock starts with its first round
        self._looked = self.now

    def _step(self) -> bool:
        """All that happens now, and a moment's rest; True when the federation is over."""
        for arrived in self._nodes.replies():
            over = self._hear(arrived)
            del arrived  # the next one is fetched now, and each may be large
            if over:
                return True
        if self._summing is not None and self._add_up(self._summing):
            return True
        if self.now - self._looked >= LOOK and self._look():
            return True
        if self.now >= self._wake:
            self._wake = math.inf
            if self._obey(self._timed(self.coordinator.on_tick, self.now)):
                return True
        self._sleep(min(POLL, max(self._wake - self.now, 0.0)))
        return False

    def _hear(self, arrived: Arrived | Told | Said | Echo) -> bool:
        """Something has come from a node; True when the federation is over."""
        self._tries.pop(arrived.client, None)
        if isinstance(arrived, Told):
            self._surveys.told(*arrived)
            return False
        if isinstance(arrived, Said):
            if self._summing is not None:
                self._summing.heard(*arrived)
            return False
        if isinstance(arrived, Echo):
            return self._lost(arrived.client, arrived.number)
        work = self._at.get(arrived.client)
        if work is not None and work.task == arrived.task:
            del self._at[arrived.client]
        if arrived.data is None and arrived.stage == "transport":  # seen to be gone before the next look
            self._seats = {client: seat for client, seat in self._seats.items() if client != arrived.client}
        self._present.look(self._free())
        if arrived.data is None:
            return self._fail(arrived.client, arrived.task, arrived.why, arrived.stage)
        return self._obey(self._timed(self.coordinator.on_message, arrived.client, arrived.data, self.now))

    def _look(self) -> bool:
        """See who is there; tasks of nodes that are gone, or were started anew, have no answer. True: it is over."""
        self._looked = self.now
        self._seats = self._nodes.seats()
        self._present.look(self._free())
        self._surveys.look(self._seats, self.now)
        if self._summing is not None:
            self._summing.look(self._seats)
        for client, work in list(self._at.items()):
            if (found := self._seats.get(client)) == work.seat:
                continue
            del self._at[client]
            why = "its node is gone" if found is None else "its node was started anew while it was at work"
            if not work.closed and self._fail(client, work.task, why):
                return True
        for client in {*self._at, *self._surveys.waiting, *(self._summing.waiting if self._summing else ())}:
            tries = self._tries.get(client, 0)
            if self.now - self._quiet[client] >= self._probe * 2 ** min(tries, _DOUBLINGS):
                self._nodes.probe(client, self._next(client), self._seats[client])
                self._tries[client] = tries + 1
        return False

    def _next(self, client: str) -> int:
        """The number of what a client is asked now."""
        self._number += 1
        self._quiet[client] = self.now
        return self._number

    def _free(self) -> list[str]:
        """Who is there, and not at work that was given up: a node does one thing after another."""
        return [client for client in self._seats if client not in self._at]

    def _lost(self, client: str, number: int) -> bool:
        """A node is done with what it was asked before, and no reply may have come; True when the federation is over.

        Figures are asked for again. Work is not: its round may be closed, and what the client keeps has moved on.
        """
        self._surveys.echo(client, number, self._seats)
        if self._summing is not None:
            self._summing.echo(client, number)
        work = self._at.get(client)
        if work is None or work.number > number:
            return False
        del self._at[client]
        self._nodes.forget(client, work.task)
        self._present.look(self._free())
        return not work.closed and self._fail(client, work.task, "its order, or its reply, was lost on the way")

    def _fail(self, client: str, task: int, why: str, stage: Stage = "transport") -> bool:
        return self._obey(self.coordinator.on_failure(client, task, why, self.now, stage=stage))

    def _obey(self, commands: Sequence[Command]) -> bool:
        """Carry out commands, and what follows from them; True when the federation is over."""
        left = deque(commands)
        while left:
            given: list[orders.Train] = []
            while left and isinstance(left[0], orders.Train):
                order = left.popleft()
                assert isinstance(order, orders.Train)
                given.append(order)
            if given:
                left.extend(self._give(given))
                continue
            if isinstance(left[0], orders.Evaluate) and len(left) > 1 and isinstance(left[1], orders.Record):
                left[0], left[1] = left[1], left[0]  # what a round cost is written down before its model leaves
            command = left.popleft()
            started = time.perf_counter()
            match command:
                case orders.Record(report):
                    self._record.round(replace(report, seconds=self._seconds))
                    self._seconds = {}
                case orders.Evaluate(round, version):
                    self._evaluate(round, version)
                    self._spent("evaluate", started)
                case orders.Checkpoint(_, state):
                    self._record.checkpoint(state, ClientMemory(), {"time": self.now, "flight": []})
                    self._spent("record", started)
                case orders.Cancel(client, task):
                    if (work := self._at.get(client)) is not None and work.task == task:
                        work.closed = True
                case orders.Sum(groups):
                    self._summing = Summing(groups, self.federation.job.secagg.seconds, self.now, self._say)
                case orders.Wait(until):
                    self._wake = until
                case orders.Done():
                    return True
        return False

    def _add_up(self, summing: Summing) -> bool:
        """What the open sums need now; True when the federation is over."""
        started = time.perf_counter()
        summing.step(self.now)
        self._spent("sum", started)
        if not summing.over:
            return False
        self._summing = None
        self._nodes.silence()
        return self._obey(self._timed(self.coordinator.on_sums, summing.sums(), self.now))

    def _say(self, told: Mapping[str, bytes]) -> Mapping[str, Asked]:
        """Send clients messages of secure aggregation; what was asked of those who are there."""
        asked = {client: Asked(self._seats[client], self._next(client)) for client in told if client in self._seats}
        self._nodes.say({client: told[client] for client in asked}, asked)
        return asked

    def _evaluate(self, round: int, version: int) -> None:
        """Measure the model, on the server's test examples and, where clients hold some back, at all who are there."""
        theta = self.server.state.theta
        if not self._asks or not self._seats:
            self._record.metrics(round, version, of_shared(self.federation, theta, []))
            return
        base = self._based() if self.server.theta is theta else Base(theta, {})  # the model, not its coded double
        self._surveys.begin(round, version, base, self._seats, self.now)

    def _ask(self, survey: Survey, clients: Sequence[str]) -> Mapping[str, Asked]:
        """Ask clients who are there for their figures."""
        asked = {client: Asked(self._seats[client], self._next(client)) for client in clients}
        self._nodes.ask(clients, survey.round, survey.version, survey.base, self._seats)
        return asked

    def _based(self) -> Base:
        """What clients begin with, one object as long as it is the same."""
        theta, control = self.server.theta, self.server.state.control
        if self._base.theta is not theta or self._base.control is not control:
            self._base = Base(theta, control)
        return self._base

    def _give(self, given: Sequence[orders.Train]) -> list[Command]:
        """Send work out; what follows for those who have left in the meantime."""
        started = time.perf_counter()
        there = [order for order in given if order.client in self._seats]
        self._present.given()
        if there:
            self._record.given(there[0].round, [order.client for order in there])
        self._nodes.send(there, self._based(), self._seats, self.server.way_down)
        self._spent("send", started)
        for order in there:
            self._at[order.client] = _Work(order.task, self._seats[order.client], self._next(order.client))
        commands: list[Command] = []
        for order in given:
            if order.client not in self._seats:
                why = "its node left before it could be given work"
                commands += self.coordinator.on_failure(order.client, order.task, why, self.now)
        return commands

    def _timed(self, ask: Callable[..., list[Command]], *args: Any) -> list[Command]:
        started = time.perf_counter()
        commands = ask(*args)
        self._spent("aggregate", started)
        return commands

    def _spent(self, part: str, started: float) -> None:
        self._seconds[part] = self._seconds.get(part, 0.0) + time.perf_counter() - started
