"""The coordinator: messages and the time go in, commands come out. The simulator and the network drive the same one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedkeel.core.errors import RunError
from fedkeel.core.keys import Key
from fedkeel.core.types import Refusal, RoundReport, View
from fedkeel.round.plan import Plan
from fedkeel.round.server import Server


@dataclass(frozen=True, slots=True)
class Train:
    """Have the client train from the model version; its answer carries the task. `deadline` in seconds, or None.

    Rounds count from 1. `settled` is the latest of its tasks whose update was used: what its corrections made of that
    one is what they keep (`device.recall`).
    """

    client: str
    task: int
    round: int
    version: int
    deadline: float | None
    settled: int | None = None


@dataclass(frozen=True, slots=True)
class Record:
    """A round closed: write its report."""

    report: RoundReport


@dataclass(frozen=True, slots=True)
class Evaluate:
    """Measure the server's current model; `round` rounds are closed."""

    round: int
    version: int


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Write the server's snapshot down; `round` rounds are closed."""

    round: int


@dataclass(frozen=True, slots=True)
class Wait:
    """Call `on_tick` at this time (seconds), if nothing comes before."""

    until: float


@dataclass(frozen=True, slots=True)
class Done:
    """The federation is over; no more commands follow."""

    reason: str


Command = Train | Record | Evaluate | Checkpoint | Wait | Done


class Coordinator:
    """Gives out work, lets answers in, closes rounds when its scheduler says so, for `rounds` rounds.

    `now` is the caller's clock in seconds and never runs backwards. Every method returns the commands to carry out,
    in order. A skipped round counts, so the run always ends; a message after the end changes nothing.
    """

    def __init__(
        self,
        plan: Plan,
        server: Server,
        clients: Sequence[str],
        key: Key,
        *,
        rounds: int,
        evaluate_every: int = 1,
        checkpoint_every: int = 1,
    ) -> None:
        self.plan = plan
        self.server = server
        self.rounds = rounds
        self._clients = tuple(clients)
        self._key = key
        self._evaluate_every = evaluate_every
        self._checkpoint_every = checkpoint_every
        self._in_flight: dict[str, int] = {}
        self._started = 0
        self._opened = 0.0
        self._over = False

    def start(self, now: float) -> list[Command]:
        """The first commands; on a resumed server, those of the round it stands at."""
        self._opened = now
        first: list[Command] = [Evaluate(0, self.server.state.version)] if self.server.state.round == 0 else []
        return first + self._advance(now)

    def on_message(self, client: str, data: bytes, now: float, *, intact: bool = False) -> list[Command]:
        """Bytes came from a client; `intact` as in `Server.offer`."""
        if self._over:
            return []
        self.server.offer(client, data, intact=intact)
        if not self.server.awaits(client):
            self._in_flight.pop(client, None)
        return self._advance(now)

    def on_failure(self, client: str, task: int, why: str, now: float, *, stage: str = "transport") -> list[Command]:
        """The client's work will have no answer: lost on the way (`transport`), or failed in its training (`train`)."""
        if self._over or self._in_flight.get(client) != task:
            return []
        self._abandon(client, Refusal("train" if stage == "train" else "transport", "failure", why))
        return self._advance(now)

    def on_tick(self, now: float) -> list[Command]:
        """The time has come that a `Wait` named; harmless at any other time."""
        return [] if self._over else self._advance(now)

    def _abandon(self, client: str, refusal: Refusal) -> None:
        del self._in_flight[client]
        self.server.give_up(client, refusal)

    def _advance(self, now: float) -> list[Command]:
        """Ask the scheduler until it is content: start, close, or wait."""
        commands: list[Command] = []
        while True:
            if self.server.state.round >= self.rounds:
                self._over = True
                return [*commands, Done(f"{self.rounds} rounds are done")]
            decision = self.plan.schedule(
                View(
                    self.plan.cohort,
                    self._started,
                    len(self._in_flight),
                    self.server.received,
                    self._opened,
                    now,
                )
            )
            if decision.close:
                commands += self._close(now, decision.skip)
            elif decision.start:
                given = self._give(decision.start, decision.wake)
                if not given:
                    return commands
                commands += given
            elif decision.wake is not None and decision.wake > now:
                return [*commands, Wait(decision.wake)]
            elif decision.wake is None and self._in_flight:
                return commands
            else:
                raise RunError(f"scheduler '{self.plan.schedule!r}' neither starts, closes nor waits: no round can end")

    def _give(self, count: int, deadline: float | None) -> list[Command]:
        shut = self.server.shut_out(self._clients)
        free = [c for c in self._clients if c not in self._in_flight and c not in shut]
        state = self.server.state
        if not free:
            return []
        number = state.round + 1
        key = self._key.fold("select", number, self._started)
        chosen = self.plan.select(free, min(count, len(free)), number, key)
        if not chosen or len(set(chosen)) < len(chosen) or not set(chosen) <= set(free):
            raise RunError(
                f"selector '{self.plan.select!r}' chose {list(chosen)[:5]}: it must choose free clients, once each"
            )
        commands: list[Command] = []
        for client in chosen:
            task = self.server.give(client)
            self._in_flight[client] = task
            settled = self.server.settled(client)
            commands.append(Train(client, task, number, state.version, deadline, settled))
        self._started += len(chosen)
        return commands

    def _close(self, now: float, skip: str | None) -> list[Command]:
        if self.plan.max_staleness == 0:  # nothing that comes later could be used
            for client in list(self._in_flight):
                waited = now - self._opened
                self._abandon(client, Refusal("late", "deadline", f"no answer within {waited:g} s"))
        report = self.server.close(now, skip)
        self._started = 0
        self._opened = now
        done = self.server.state.round
        last = done >= self.rounds
        commands: list[Command] = []
        if last or done % self._evaluate_every == 0:
            commands.append(Evaluate(done, self.server.state.version))
        commands.append(Record(report))
        if last or done % self._checkpoint_every == 0:
            commands.append(Checkpoint(done))
        return commands
