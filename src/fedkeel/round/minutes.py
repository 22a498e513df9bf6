"""The minutes of a round: what became of every message and every task, as lines of its report."""

from __future__ import annotations

import math
from dataclasses import replace

from fedkeel.core.types import ClientRow, InFlight, Refusal, Update

MESSAGES_KEPT = 8
"""Refused messages of one client that a round keeps in words; of more only the number is kept."""
_OTHERS = "(others)"


class Minutes:
    """Refusals as they come; of a flood of messages a count."""

    def __init__(self, cohort: int) -> None:
        self._most = MESSAGES_KEPT * (cohort + MESSAGES_KEPT)
        self._lines: list[ClientRow] = []
        self._messages: dict[str, tuple[int, int]] = {}

    def given_up(self, order: InFlight, refusal: Refusal, now: float) -> None:
        """A task that will have no answer."""
        self._lines.append(_ended(ClientRow(order.client, refusal), order, now))

    def refused(
        self,
        client: str,
        size: int,
        update: Update | None,
        refusal: Refusal,
        ended: InFlight | None,
        now: float,
        known: bool,
    ) -> None:
        """A message of so many bytes that was not let in, and the task that it ended; `known`: the client has one."""
        row = ClientRow(client, refusal, bytes_up=size) if update is None else described(update)
        row = replace(row, client=client, refusal=refusal)
        if ended is not None:  # there are no more of these than tasks
            self._lines.append(_ended(row, ended, now))
            return
        count, more = self._messages.get(client, (0, 0))
        over = count >= MESSAGES_KEPT or len(self._lines) >= self._most
        if count == 0 and over and not known:
            client = _OTHERS  # senders beyond counting: one line for all
            count, more = self._messages.get(client, (0, 0))
        self._messages[client] = (count + 1, more + size if over else 0)
        if not over:
            self._lines.append(row)

    def lines(self) -> tuple[ClientRow, ...]:
        """All of them, floods last."""
        floods = []
        for client, (count, size) in self._messages.items():
            kept = 0 if client == _OTHERS else MESSAGES_KEPT
            if count > kept:
                flood = Refusal("check", "flood", f"{count - kept} more refused messages")
                floods.append(ClientRow(client, flood, bytes_up=size))
        return (*self._lines, *floods)

    def clear(self) -> None:
        self._lines.clear()
        self._messages.clear()


def described(update: Update) -> ClientRow:
    """What an update says of itself."""
    claims = update.claims
    return ClientRow(
        claims.client,
        None,
        norm=update.norm if update.delta is not None and math.isfinite(update.norm) else None,
        variance=update.variance if update.delta is not None and math.isfinite(update.variance) else None,
        num_examples=claims.num_examples,
        steps=claims.steps,
        bytes_up=update.bytes_up,
        metrics=claims.metrics,
    )


def _ended(row: ClientRow, order: InFlight, now: float) -> ClientRow:
    return replace(row, bytes_down=order.bytes_down, seconds=now - order.since)
