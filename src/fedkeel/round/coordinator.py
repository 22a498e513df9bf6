"""The coordinator: messages and the time go in, commands come out. The simulator and the network drive the same one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fedkeel.core.errors import RunError
from fedkeel.core.keys import Key
from fedkeel.core.registry import Rule
from fedkeel.core.roster import Candidates, Register, Roster
from fedkeel.core.types import InFlight, Refusal, RoundReport, ServerState, Stage, View
from fedkeel.round.plan import Plan
from fedkeel.round.server import Server
from fedkeel.secagg.groups import GroupSum
from fedkeel.secagg.terms import Terms


@dataclass(frozen=True, slots=True)
class Train:
    """Have the client train from the model version; its answer carries the task. `deadline` in seconds, or None.

    Rounds count from 1. `settled` is the latest of its tasks whose update was used: what its corrections made of that
    one is what they keep (`device.recall`). `factor` scales its steps, where the stopping rule goes by the device's
    speed. `have` is the version of the model that it was given last, -1 for none: it is sent steps from there.
    """

    client: str
    task: int
    round: int
    version: int
    deadline: float | None
    settled: int | None = None
    factor: float = 1.0
    have: int = -1


@dataclass(frozen=True, slots=True)
class Cancel:
    """The client's task was given up: it may stop, as its answer will not be used."""

    client: str
    task: int


@dataclass(frozen=True, slots=True)
class Sum:
    """Have each group add up the rows that its members hold, under masks; `on_sums` tells what came of it."""

    groups: tuple[Terms, ...]


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
    """Write the state down; `round` rounds are closed."""

    round: int
    state: ServerState


@dataclass(frozen=True, slots=True)
class Wait:
    """Call `on_tick` at this time (seconds), if nothing comes before."""

    until: float


@dataclass(frozen=True, slots=True)
class Done:
    """The federation is over; no more commands follow."""

    reason: str


_LARGE = 3e38
_MOST_SHORT = 1000  # times that too few are free for the privacy budget, after which it counts as spent
MOST_STRETCH = 64.0
"""The most that an interval rule lengthens or shortens a client's work by."""
Command = Train | Cancel | Sum | Record | Evaluate | Checkpoint | Wait | Done


class Presence(Protocol):
    """Which clients are there: what the transport knows, or a simulator's devices."""

    def here(self, now: float) -> NDArray[np.bool_] | None:
        """A mask over the roster's clients; None: all are."""

    def next_change(self, now: float) -> float:
        """When that changes next, in seconds; infinity: never, or nobody knows."""


class Coordinator:
    """Gives out work, lets answers in, closes rounds when its scheduler says so, for `rounds` rounds.

    `now` is the caller's clock in seconds and never runs backwards; at `until` the run ends, and the round that is open
    then is skipped. Every method returns the commands to carry out, in order. A skipped round counts, so the run always
    ends; a message after the end changes nothing. A server whose state has work in flight goes on with it.
    """

    def __init__(
        self,
        plan: Plan,
        server: Server,
        clients: Register | Sequence[str],
        key: Key,
        *,
        rounds: int,
        evaluate_every: int = 1,
        checkpoint_every: int = 1,
        until: float = math.inf,
        presence: Presence | None = None,
        now: float = 0.0,
    ) -> None:
        self.plan = plan
        self.server = server
        self.rounds = rounds
        self.roster = Roster(clients, server.state.roster)
        if server.account is not None:
            server.account.privacy.check_population(len(self.roster.names))
        self._key = key
        self._evaluate_every = evaluate_every
        self._checkpoint_every = checkpoint_every
        self._until = until
        self._presence = presence
        server.roster = self.roster
        self._in_flight = {order.client: order for order in server.state.in_flight}
        for client in self._in_flight:
            self.roster.busy[self.roster.index[client]] = True
        self._earlier = set(self._in_flight)
        self._resting: list[int] = []
        self._started = self._lost = 0
        self._began = now
        self._over = False
        self._summing: bool | None = None  # while sums are awaited: whether the round is the last
        self._nobody = False  # was drawn, where each client is drawn by itself
        self._short = 0  # times in a row that too few were free for the budget
        self._spent = server.account is not None and server.account.spent(self.roster.names)

    def start(self, now: float) -> list[Command]:
        """The first commands; on a resumed server, those of the round it stands at."""
        first: list[Command] = [Evaluate(0, self.server.state.version)] if self.server.state.round == 0 else []
        return first + self._advance(now)

    def on_message(
        self, client: str, data: bytes | memoryview, now: float, *, intact: bool = False, more: bool = False
    ) -> list[Command]:
        """Bytes came from a client; `intact` as in `Server.offer`.

        `more`: other news of this very moment follows, and `on_tick` after it; no work is given out until then.
        """
        if self._over:
            return []
        refusal = self.server.offer(client, data, now, intact=intact)
        if client in self._in_flight and not self.server.awaits(client):
            order = self._ended(client)
            self._lost += refusal is not None
            if refusal is None:
                claims = self.server.newest
                loss = min(max(claims.metrics.get("loss", math.nan), -_LARGE), _LARGE)  # NaN stays
                self.roster.answered(self.roster.index[client], now - order.since, claims.num_examples, loss)
        return self._advance(now, more)

    def on_failure(
        self, client: str, task: int, why: str, now: float, *, stage: Stage = "transport", more: bool = False
    ) -> list[Command]:
        """The client's work will have no answer: lost on the way (`transport`), failed in its training (`train`), or
        what came was no message (`decode`).
        """
        if self._over or client not in self._in_flight or self._in_flight[client].task != task:
            return []
        self._abandon(client, Refusal(stage, "failure", why), now)
        return self._advance(now, more)

    def on_sums(self, sums: Sequence[GroupSum], now: float) -> list[Command]:
        """What came of the groups of the last `Sum`, in their order."""
        if self._over or self._summing is None:
            return []
        last, self._summing = self._summing, None
        return self._closed(now, None, last, sums) + self._advance(now)

    def on_tick(self, now: float) -> list[Command]:
        """The time has come that a `Wait` named; harmless at any other time."""
        return [] if self._over else self._advance(now)

    def snapshot(self) -> ServerState:
        """The state to go on from."""
        return self.server.snapshot().replace(roster=self.roster.state())

    def _ended(self, client: str) -> InFlight:
        """The client's task has ended. It rests until the buffer closes: none fills or spoils it with many tasks."""
        self._earlier.discard(client)
        self._resting.append(self.roster.index[client])
        return self._in_flight.pop(client)

    def _abandon(self, client: str, refusal: Refusal, now: float) -> None:
        self._ended(client)
        self._lost += 1
        self.roster.version[self.roster.index[client]] = -1  # nobody knows whether the model reached it
        self.server.give_up(client, refusal, now)

    def _advance(self, now: float, more: bool = False) -> list[Command]:
        """Ask the scheduler until it is content: start, close, or wait."""
        commands: list[Command] = []
        while True:
            if self._summing is not None:
                return commands
            if self.server.state.round >= self.rounds:
                self._over = True
                return [*commands, Done(f"{self.rounds} rounds are done")]
            if self._spent:
                self._over = True
                return [*commands, Done("the privacy budget is spent")]
            if now >= self._until and not more:
                self._over = True
                # What has come of a round is who is fast: no model moves by that.
                why = f"{self._until:g} seconds are over"
                return [*commands, *self._close(now, f"{why}, and the round was open", last=True), Done(why)]
            decision = self.plan.schedule(self._view(now, more))
            if decision.close:
                commands += self._close(now, self._why(decision.skip))
            elif more:
                return commands
            elif decision.start:
                given = self._give(decision.start, decision.wake, now)
                commands += given
                if given or self._spent:
                    continue
                if self._nobody:
                    commands += self._close(now, None)
                    continue
                change = self._change(now)
                if not self._in_flight and (self.server.received or not math.isfinite(change)):
                    short = None if self.server.received else "no client is free, and none will be"
                    commands += self._close(now, self._why(short))
                    continue
                wake = min(change, self._until)
                return [*commands, Wait(wake)] if math.isfinite(wake) else commands
            elif decision.wake is not None and decision.wake > now:
                return [*commands, Wait(min(decision.wake, self._until))]
            elif decision.wake is None and self._in_flight:
                return [*commands, Wait(self._until)] if math.isfinite(self._until) else commands
            else:
                raise RunError(f"scheduler '{self.plan.schedule!r}' neither starts, closes nor waits: no round can end")

    def _view(self, now: float, more: bool) -> View:
        counts = (self.plan.cohort, self._started, len(self._in_flight), len(self._earlier))
        return View(*counts, self.server.received, self._lost, self._began, now, more)

    def _change(self, now: float) -> float:
        """When somebody comes or goes; after now."""
        change = math.inf if self._presence is None else self._presence.next_change(now)
        return max(change, math.nextafter(now, math.inf))

    def _free(self, now: float) -> NDArray[np.int64]:
        free = ~self.roster.busy
        here = None if self._presence is None else self._presence.here(now)
        if here is not None:
            free &= here
        for client in self.server.shut_out(self.roster.names):
            free[self.roster.index[client]] = False
        if (account := self.server.account) is not None:
            rest, last = account.privacy.mechanism.bands, self.roster.last
            free &= (last == 0) | (self.server.state.round + 1 - last >= rest)
            free[[self.roster.index[client] for client in account.used_up]] = False
        return np.flatnonzero(free)

    def _give(self, count: int, deadline: float | None, now: float) -> list[Command]:
        free = self._free(now)
        if not len(free):
            return []
        drawn = "poisson" in self.plan.select.definition.traits
        if self.server.account is not None and not self.server.account.affords(len(free), min(count, len(free))):
            self._short += 1  # of so few each is seen more clearly: others may come, but not for ever
            self._spent = self._short >= _MOST_SHORT
            return []
        self._short = 0
        state = self.server.state
        number = state.round + 1
        commands: list[Command] = []
        chosen = self._chosen(free, count if drawn else min(count, len(free)), number)
        self._nobody = drawn and not chosen
        if self.server.account is not None:
            self.server.account.sampled(len(free), len(chosen))
        for place in chosen:
            client = self.roster.names[place]
            have = int(self.roster.version[place])
            task = self.server.give(client, now, have)
            self._in_flight[client] = self.server.given(client)
            self.roster.select(place, number, state.version)
            settled, factor = self.server.settled(client), float(self.roster.factor[place])
            commands.append(Train(client, task, number, state.version, deadline, settled, factor, have))
        self._began = now if self._started == 0 else self._began
        self._started += len(commands)
        return commands

    def _chosen(self, free: NDArray[np.int64], count: int, number: int) -> list[int]:
        """Places in the roster: who has waited for too long, then whom the selector chooses."""
        first: list[int] = []
        if self.plan.longest_wait is not None:
            overdue = self.roster.overdue(free, number, self.plan.rows, self.plan.longest_wait)
            first = overdue[:count].tolist()
            free, count = np.setdiff1d(free, first), count - len(first)
        if not count:
            return first
        key = self._key.fold("select", number, self._started)
        if self.plan.privacy is not None and self.plan.privacy.secret is None:
            key = Key.secret()  # what a draw hides it hides from those who do not know it
        chosen = np.asarray(self.plan.select(Candidates(self.roster, free), count, number, key))
        at_most, at_least = (len(free), 0) if "poisson" in self.plan.select.definition.traits else (count, 1)
        known = chosen.dtype.kind in "iu" and chosen.ndim == 1 and at_least <= len(chosen) <= at_most
        if not known or len(np.unique(chosen)) < len(chosen) or not bool(((chosen >= 0) & (chosen < len(free))).all()):
            raise RunError(
                f"selector '{self.plan.select!r}' chose {chosen.tolist()[:5]}: it must choose positions of free "
                f"clients, once each, {at_most} at most"
            )
        return [*first, *free[chosen].tolist()]

    def _stretch(self, rule: Rule, report: RoundReport) -> None:
        """How long those whose updates were used will work the next time."""
        roster = self.roster
        for row in report.clients:
            if row.weight > 0 and row.cosine is not None:
                place = roster.index[row.client]
                known = float(roster.factor[place]), row.cosine, float(roster.before[place]), float(roster.loss[place])
                roster.factor[place] = min(max(float(rule(*known)), 1 / MOST_STRETCH), MOST_STRETCH)

    def _why(self, short: str | None) -> str | None:
        """Why a round is skipped. With noise on sums the sum of nobody is released too: no skip tells who was there."""
        return None if self.plan.noised else short

    def _close(self, now: float, skip: str | None, *, last: bool = False) -> list[Command]:
        if (account := self.server.account) is not None:
            account.count()
            self._spent = account.spent(self.roster.names)
        last = last or self._spent or self.server.state.round + 1 >= self.rounds
        given_up: list[Command] = []
        if last or self.plan.max_staleness == 0:  # nothing that comes later could be used
            for client, order in list(self._in_flight.items()):
                given_up.append(Cancel(client, order.task))
                why = f"no answer within {now - order.since:g} s"
                self._abandon(client, Refusal("late", "end" if last else "deadline", why), now)
        if skip is None and (groups := self.server.groups()):
            self._summing = last
            return [*given_up, Sum(groups)]
        return [*given_up, *self._closed(now, skip, last)]

    def _closed(self, now: float, skip: str | None, last: bool, sums: Sequence[GroupSum] = ()) -> list[Command]:
        report = self.server.close(now, skip, sums)
        if self.plan.interval is not None:
            self._stretch(self.plan.interval, report)
        self.roster.busy[self._resting] = False
        self._resting.clear()
        self._earlier = set(self._in_flight)
        self._started = self._lost = 0
        self._began = now
        self._nobody = False
        done = self.server.state.round
        commands: list[Command] = []
        if last or done % self._evaluate_every == 0:
            commands.append(Evaluate(done, self.server.state.version))
        commands.append(Record(report))
        if last or done % self._checkpoint_every == 0:
            commands.append(Checkpoint(done, self.snapshot()))
        return commands
