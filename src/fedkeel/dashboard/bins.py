"""Curves of bounded length: rounds fall into bins, and bins grow two by two as the run goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, Protocol, Self, TypeVar

POINTS = 600  # the most points of a curve


class Bin(Protocol):
    """What a curve is made of."""

    def merge(self, later: Self) -> None:
        """Take in the bin that follows."""


T = TypeVar("T", bound=Bin)


class Bins(Generic[T]):
    """At most `most` bins, each of `width` rounds, in the order of their rounds.

    What is in them depends on the rounds alone, not on how many were read at a time.
    """

    def __init__(self, make: Callable[[], T], most: int = POINTS) -> None:
        self.width = 1
        self._make, self._most = make, most
        self._bins: dict[int, T] = {}

    def at(self, round: int) -> T:
        """The bin of a round that is no earlier than those before."""
        while round // self.width >= self._most:
            self._halve()
        found = self._bins.get(round // self.width)
        if found is None:
            found = self._bins[round // self.width] = self._make()
        return found

    def _halve(self) -> None:
        old, self._bins, self.width = self._bins, {}, 2 * self.width
        for index, found in old.items():
            if index // 2 in self._bins:
                self._bins[index // 2].merge(found)
            else:
                self._bins[index // 2] = found

    def __len__(self) -> int:
        return len(self._bins)

    @property
    def items(self) -> list[T]:
        return list(self._bins.values())


@dataclass(slots=True)
class Point:
    """A metric: its last value in the bin, and the widest of the intervals around all that were there."""

    round: int = 0
    time: float = 0.0
    value: float | None = None
    low: float | None = None
    high: float | None = None

    def merge(self, later: Point) -> None:
        lows = [v for v in (self.low, self.value, later.low, later.value) if v is not None]
        highs = [v for v in (self.high, self.value, later.high, later.value) if v is not None]
        self.low, self.high = min(lows, default=None), max(highs, default=None)
        self.round, self.time, self.value = later.round, later.time, later.value


@dataclass(slots=True)
class Span:
    """Some rounds on end: sums of what they hold, and where the last of them stood."""

    rounds: int = 0
    skipped: int = 0
    used: int = 0
    unused: int = 0
    refused: int = 0
    lost: int = 0
    up: int = 0
    down: int = 0
    stale: int = 0  # models behind, over all judged updates that tell it
    aged: int = 0  # how many of them tell it
    oldest: int = 0
    seconds: float = 0.0
    round: int = 0
    time: float = 0.0
    epsilon: float | None = None
    classes: dict[str, int] = field(default_factory=dict)  # class of devices -> updates used

    def merge(self, later: Span) -> None:
        for name in ("rounds", "skipped", "used", "unused", "refused", "lost", "up", "down", "stale", "aged"):
            setattr(self, name, getattr(self, name) + getattr(later, name))
        self.seconds += later.seconds
        self.oldest = max(self.oldest, later.oldest)
        self.round, self.time = later.round, later.time
        self.epsilon = self.epsilon if later.epsilon is None else later.epsilon
        for device, used in later.classes.items():
            self.classes[device] = self.classes.get(device, 0) + used
