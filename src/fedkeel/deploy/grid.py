"""Flower's grid for a run that must go on: one reply that cannot be read costs that reply, not the run."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import httpx
from flwr.app import Error, Message
from flwr.common.constant import ErrorCode
from flwr.serverapp.grid import Grid

POLL = 0.5
"""Seconds between two looks for replies."""


class PatientGrid:
    """A grid whose `send_and_receive` fails for no message; everything else is the grid's own.

    Flower's pulls all replies in one call, which raises where one of them is no Flower message; and it waits for the
    answer to a message that was never taken, as its node had left, until time is up.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def __getattr__(self, name: str) -> Any:
        return getattr(self._grid, name)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """The replies that come in time; in the place of those that cannot be, errors that say why."""
        sent = list(messages)
        if not sent:
            return []
        given = list(self._grid.push_messages(sent))
        found = [_error(m, "Flower did not take the message: its node has left") for m in sent[len(given) :]]
        waiting: dict[str, Message] = {}
        for message, number in zip(sent, given, strict=False):
            if number:
                waiting[number] = message
            else:
                found.append(_error(message, "Flower did not take the message: its node has left"))
        until = None if timeout is None else time.monotonic() + timeout
        while waiting and (until is None or time.monotonic() < until):
            for number in list(waiting):
                if replies := self._pulled(number, waiting[number]):
                    found += replies
                    del waiting[number]
            if waiting:
                time.sleep(POLL)
        return found

    def _pulled(self, number: str, message: Message) -> list[Message]:
        """The reply to a message, if there is one."""
        try:
            return list(self._grid.pull_messages([number]))
        except httpx.HTTPError:  # the SuperLink itself, after Flower's own tries
            raise
        except Exception as error:  # hostile bytes meet Flower's decoder
            why = f"its reply is no Flower message ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
            return [_error(message, why, ErrorCode.UNKNOWN)]


def _error(message: Message, why: str, code: int = ErrorCode.NODE_UNAVAILABLE) -> Message:
    return Message(Error(code, why), reply_to=message)
