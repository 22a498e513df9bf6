"""Work in flight: what was given out and is not yet at the server, trained or not, so that a checkpoint can hold it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedkeel.round.coordinator import Train
from fedkeel.sim.clock import Clock, Outcome
from fedkeel.world.clients import Base

Start = tuple[int, int]
"""(version, round): those who start alike train together."""


class Flight:
    """Work is trained no sooner than the first of those who started from the same model would be done."""

    def __init__(self) -> None:
        self.clock = Clock()
        self._waiting: dict[Start, dict[int, Train]] = {}
        self._bases: dict[Start, Base] = {}
        self._trained: dict[int, Outcome] = {}
        self._cancelled: set[int] = set()

    def give(self, order: Train, ends: float, base: Base) -> None:
        """Work that begins now, with that, and ends then."""
        start = order.version, order.round
        self._waiting.setdefault(start, {})[order.task] = order
        self._bases.setdefault(start, base)
        self.clock.expect(ends, order)

    def take(self, order: Train) -> tuple[list[Train], Base]:
        """All who wait for their training and started as this one did, itself among them, in the order of tasks."""
        start = order.version, order.round
        return list(self._waiting.pop(start).values()), self._bases.pop(start)

    def waits(self, order: Train) -> bool:
        """Whether it is not trained yet."""
        return order.task in self._waiting.get((order.version, order.round), ())

    def cancel(self, task: int) -> None:
        """It was given up: its device stops, and sends nothing."""
        self._cancelled.add(task)
        self._trained.pop(task, None)
        for start, waiting in self._waiting.items():
            if waiting.pop(task, None) is not None and not waiting:
                del self._waiting[start], self._bases[start]
                break

    def cancelled(self, task: int) -> bool:
        """Whether what happens now is of a task that was given up; asked once of each."""
        if task in self._cancelled:
            self._cancelled.remove(task)
            return True
        return False

    def keep(self, outcome: Outcome) -> None:
        """What came of a training, until its work ends."""
        self._trained[outcome.task] = outcome

    def collect(self, order: Train) -> Outcome | None:
        """What came of the order's training; None where it was delivered already."""
        return self._trained.pop(order.task, None)

    # -- checkpoints

    def state(self) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
        """JSON values and tensors that `restored` makes the same of."""
        info: list[dict[str, Any]] = []
        tensors: dict[str, Tensor] = {}
        for at, event in self.clock.pending():
            if event.task in self._cancelled:
                continue
            row: dict[str, Any] = {"at": at}
            if isinstance(event, Train):
                if event.task not in self._trained and not self.waits(event):
                    continue  # it was delivered before its time on the clock
                row["order"] = {name: getattr(event, name) for name in Train.__slots__}
                outcome = self._trained.get(event.task)
            else:
                outcome = event
            if outcome is not None:
                row["outcome"] = [outcome.client, outcome.task, outcome.why, outcome.lost]
                if outcome.data is not None:
                    tensors[f"data/{outcome.task}"] = torch.from_numpy(np.frombuffer(outcome.data, np.uint8).copy())
            info.append(row)
        for (version, round), base in self._bases.items():
            tensors[f"theta/{version}/{round}"] = base.theta
            tensors |= {f"control/{version}/{round}/{name}": value for name, value in base.control.items()}
        return info, tensors

    @classmethod
    def restored(cls, info: list[dict[str, Any]], tensors: Mapping[str, Tensor]) -> Flight:
        """What `state` described."""
        flight = cls()
        controls: dict[Start, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            kind, *parts = key.split("/", 3)
            if kind == "control":
                controls.setdefault((int(parts[0]), int(parts[1])), {})[parts[2]] = value
        for row in info:
            outcome = None
            if "outcome" in row:
                client, task, why, lost = row["outcome"]
                data = tensors.get(f"data/{task}")
                outcome = Outcome(client, task, None if data is None else data.numpy().tobytes(), why, lost)
            order = Train(**row["order"]) if "order" in row else None
            if order is None:
                assert outcome is not None
                flight.clock.expect(row["at"], outcome)
            elif outcome is None:
                start = order.version, order.round
                theta = tensors["theta/{}/{}".format(*start)]
                flight.give(order, row["at"], Base(theta, controls.get(start, {})))
            else:
                flight.clock.expect(row["at"], order)
                flight.keep(outcome)
        for start, waiting in flight._waiting.items():
            flight._waiting[start] = dict(sorted(waiting.items()))
        return flight
