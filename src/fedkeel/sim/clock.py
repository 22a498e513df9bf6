"""The virtual clock: what happens when. It jumps from event to event; nothing sleeps."""

from __future__ import annotations

import heapq
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


Event = Train | Outcome
"""The end of a client's work, or an answer at the server."""


class Clock:
    """Events by time. At one moment work ends before answers arrive, those in the order of their tasks."""

    def __init__(self) -> None:
        self._events: list[tuple[float, int, int, Event]] = []
        self._wake = math.inf

    def expect(self, at: float, event: Event) -> None:
        """Something will happen at a time, in seconds."""
        heapq.heappush(self._events, (at, int(isinstance(event, Outcome)), event.task, event))

    def wake(self, at: float) -> None:
        """The coordinator wants to be asked at a time, if nothing happens before."""
        self._wake = at

    def advance(self) -> float:
        """When something happens next; infinity: never. What the coordinator waits for it says again then."""
        at = min(self._wake, self._events[0][0] if self._events else math.inf)
        self._wake = math.inf
        return at

    def due(self, now: float) -> Iterator[Event]:
        """What happens now, in order, those events among it that are added meanwhile."""
        while self._events and self._events[0][0] <= now:
            yield heapq.heappop(self._events)[3]

    def pending(self) -> Iterator[tuple[float, Event]]:
        """(time, event) of everything to come; in no order."""
        return ((at, event) for at, _, _, event in self._events)
