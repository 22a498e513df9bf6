"""Quarantine: clients that are refused again and again are left out for a while, and let in again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from typing import Any

from fedkeel.core.types import ClientRow, Refusal

OFFENCES = ("decode", "check", "screen")
_BLAMELESS = (
    "task",
    "duplicate",
    "identity",
    "flood",
    "near_duplicates",
)  # what a network, or somebody else, may cause
_FORGOTTEN = 1e-3


@dataclass(frozen=True, slots=True)
class Quarantine:
    """A refused update (decode, check, screen; one a round) adds 1 to its client's record; records shrink by `decay` in
    every round in which the client had work, or was shut out.

    A record of `limit` shuts its client out until it has shrunk below half of that. A client that is refused in more
    than limit (1 - decay) of its rounds is shut out in the end; one that is refused now and then is not, unless its
    refusals come in a row.
    """

    limit: float
    decay: float

    def __repr__(self) -> str:
        return f"quarantine(limit={self.limit:g}, decay={self.decay:g})"


@dataclass(frozen=True, slots=True)
class Entry:
    """A client's record; `since` is the round that shut it out, None while it is in."""

    record: float
    since: int | None = None


class Book:
    """The records of all clients, as JSON in the server's state. Without a quarantine it stays empty."""

    def __init__(self, rule: Quarantine | None, kept: Mapping[str, Any]) -> None:
        self._rule = rule
        self._entries = {client: Entry(*values) for client, values in kept.items()}

    def __len__(self) -> int:
        return len(self._entries)

    def to_json(self) -> dict[str, list[float | int | None]]:
        return {client: [entry.record, entry.since] for client, entry in sorted(self._entries.items())}

    def shut_out(self, clients: Iterable[str], least: int) -> dict[str, Refusal]:
        """Who of the clients is in quarantine, and why; of the worst records first, and never so many that fewer than
        half of the clients, or than `least`, are left."""
        known = set(clients)
        shut = [(c, e) for c, e in self._entries.items() if e.since is not None and c in known]
        room = len(known) - max((len(known) + 1) // 2, least)
        shut.sort(key=lambda pair: (-pair[1].record, pair[0]))
        return {client: self._why(entry) for client, entry in shut[: max(room, 0)]}

    def _why(self, entry: Entry) -> Refusal:
        assert self._rule is not None
        below = self._rule.limit / 2
        reason = f"in quarantine since round {entry.since}: its record is {entry.record:.2f}, out below {below:g}"
        return Refusal("quarantine", "quarantine", reason, entry.record)

    def close(self, round: int, rows: Iterable[ClientRow], asked: Set[str]) -> None:
        """A round ends in which the tasks of `asked` ended: their records shrink, offences are added.

        Who is over the limit is shut out; who was, and is far enough below it, is let in.

        What comes from anybody else, under whatever name, leaves no record.
        """
        if self._rule is None:
            return
        offenders = {r.client for r in rows if r.client in asked and r.refusal is not None and _offends(r.refusal)}
        entries: dict[str, Entry] = {}
        for client in sorted(self._entries.keys() | offenders):
            old = self._entries.get(client, Entry(0.0))
            counted = client in asked or old.since is not None
            record = old.record * (self._rule.decay if counted else 1.0) + (client in offenders)
            since = old.since if old.since is not None else round if record >= self._rule.limit else None
            if since is not None and record < self._rule.limit / 2:
                since = None
            if record > _FORGOTTEN:
                entries[client] = Entry(record, since)
        self._entries = entries


def _offends(refusal: Refusal) -> bool:
    return refusal.stage in OFFENCES and refusal.rule not in _BLAMELESS
