"""The sums of one round under masks: a session for each group, over answers that come late, twice or never. No IO."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from fedkeel.core.errors import CohortError
from fedkeel.secagg.groups import GroupSum
from fedkeel.secagg.messages import write_terms
from fedkeel.secagg.server import Server
from fedkeel.secagg.terms import Terms

_log = logging.getLogger("fedkeel")


class Seat(NamedTuple):
    """A node that is connected, since when."""

    node: int
    since: str


class Asked(NamedTuple):
    """What a client was asked, at which node; the driver counts what it asks."""

    seat: Seat
    number: int


Say = Callable[[Mapping[str, bytes]], Mapping[str, Asked]]


class _Session:
    """One group's; a client that is lost is asked nothing more."""

    def __init__(self, terms: Terms, now: float) -> None:
        self.server = Server(terms)
        self.since = now
        self.lost: set[str] = set()
        self.failed: str | None = None
        self.orders = dict.fromkeys(terms.members, write_terms(terms))
        self.traffic = dict.fromkeys(terms.members, (0, 0))

    @property
    def over(self) -> bool:
        return self.failed is not None or self.server.stage == "done"

    @property
    def waiting(self) -> list[str]:
        """Whose answers are still to come in this stage."""
        return [] if self.over else [c for c in self.server.waiting if c in self.orders and c not in self.lost]

    def count(self, client: str, down: int, up: int) -> None:
        before = self.traffic[client]
        self.traffic[client] = before[0] + down, before[1] + up

    def advance(self, now: float) -> None:
        """Close the stage that everybody has answered, or time is up for."""
        try:
            self.orders, self.since = self.server.advance(), now
        except CohortError as error:
            self.failed = str(error)

    def sum(self) -> GroupSum:
        if self.failed is not None:
            return GroupSum((), None, self.failed, self.traffic)
        return GroupSum(self.server.survivors, self.server.total(), None, self.traffic)


class Summing:
    """`step` it, tell it what was `heard`, who is there (`look`), who has lost something (`echo`); `sums` once `over`.

    `say` sends clients their messages, and tells under what numbers at which nodes; of those who are there. A stage
    waits for `seconds` at most, then goes on with those who have answered.
    """

    def __init__(self, groups: Sequence[Terms], seconds: float, now: float, say: Say):
        self._sessions = [_Session(terms, now) for terms in groups]
        self._of = {client: session for session in self._sessions for client in session.server.terms.members}
        self._seconds, self._say = seconds, say
        self._asked: dict[str, tuple[str, Asked]] = {}

    @property
    def over(self) -> bool:
        return all(session.over for session in self._sessions)

    @property
    def waiting(self) -> set[str]:
        """Who has been asked for something and has not answered."""
        return {client for session in self._sessions for client in session.waiting} & self._asked.keys()

    def step(self, now: float) -> None:
        """Close the stages whose time has come, and send what is to be sent."""
        for session in self._sessions:
            if not session.over and (not session.waiting or now - session.since >= self._seconds):
                session.advance(now)
        due = [client for session in self._sessions for client in session.waiting if self._is_due(session, client)]
        if due:
            self._ask(due)

    def _is_due(self, session: _Session, client: str) -> bool:
        return client not in self._asked or self._asked[client][0] != session.server.stage

    def _ask(self, clients: Sequence[str]) -> None:
        """Send what the clients are to answer now."""
        said = self._say({client: self._of[client].orders[client] for client in clients})
        for client in clients:
            session = self._of[client]
            if client in said:
                session.count(client, len(session.orders[client]), 0)
                self._asked[client] = session.server.stage, said[client]
            else:
                self._lose(session, client, "its node is gone")

    def heard(self, client: str, number: int, data: memoryview | None, why: str) -> None:
        """An answer has come, or why there is none. What answers no question of now is let lie."""
        session = self._of.get(client)
        if session is None or client not in self.waiting or self._asked[client][1].number != number:
            return
        if data is None:
            self._lose(session, client, why)
            return
        session.count(client, 0, len(data))
        if (refusal := session.server.offer(client, data)) is not None:
            self._lose(session, client, refusal.reason)

    def look(self, seats: Mapping[str, Seat]) -> None:
        """Who is gone, or was started anew, has lost its row and its keys."""
        for client in self.waiting:
            if seats.get(client) != self._asked[client][1].seat:
                self._lose(self._of[client], client, "its node is gone, or was started anew")

    def echo(self, client: str, number: int) -> None:
        """A client is done with all that it was asked before a number: what it has not answered is asked once more."""
        if client in self.waiting and self._asked[client][1].number < number:
            self._ask([client])

    def _lose(self, session: _Session, client: str, why: str) -> None:
        _log.warning("secure aggregation goes on without %s: %s", client, why)
        session.lost.add(client)

    def sums(self) -> list[GroupSum]:
        """What came of each group, once all is over."""
        return [session.sum() for session in self._sessions]
