"""The virtual clock: what happens when. It jumps from event to event; nothing sleeps."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from fedkeel.round.coordinator import Train


@dataclass(frozen=True, slots=True)
class Outcome:
    """What reaches the server from a client: bytes, or a failure and why. `lost`: on the way, not in training."""

    client: str
    task: int
    data: bytes | None
    why: str = ""
    lost: bool = False


Event = Train | Outcome | None
"""The end of a client's work, an answer at the server, or a moment that the coordinator waits for."""


class Clock:
    """Events by time. At one moment work ends before answers arrive, those in the order of their tasks."""

    def __init__(self) -> None:
        self._events: list[tuple[float, int, int, Event]] = []
        self._ticks = itertools.count()

    def expect(self, at: float, event: Event) -> None:
        """Something will happen at a time, in seconds."""
        rank = 2 if event is None else int(isinstance(event, Outcome))
        heapq.heappush(self._events, (at, rank, next(self._ticks) if event is None else event.task, event))

    @property
    def next(self) -> float:
        """When something happens next; infinity: never."""
        return self._events[0][0] if self._events else math.inf

    def due(self, now: float) -> Iterator[Event]:
        """What happens now, in order, those events among it that are added meanwhile."""
        while self._events and self._events[0][0] <= now:
            yield heapq.heappop(self._events)[3]

    def pending(self) -> Iterator[tuple[float, Train | Outcome]]:
        """(time, event) of everything to come, but for the coordinator's own moments; in no order."""
        return ((at, event) for at, _, _, event in self._events if event is not None)
