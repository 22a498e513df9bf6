"""Where admitted rows wait for the close: a matrix, or for a mean too large to keep, a running sum.

Rows end in the order of their tasks, whatever order they came in, so that results do not depend on arrival.
"""

from __future__ import annotations

import bisect
import math

import torch
from torch import Tensor

_BLOCK = 2**18
"""Columns that are added at a time."""
_KEPT = 2**22
"""Columns of a row up to which its memory is used again, rather than let go of between two rows."""


class RowStore:
    """Rows of P columns: `slot(task)` is one to decode a task's answer into, `admit(task)` keeps it.

    Tasks are numbered one after another: each has its place from `first` on, so that most rows need not move.
    """

    def __init__(self, columns: int, capacity: int, first: int = 0) -> None:
        self.columns = columns
        self._rows = torch.empty(capacity, columns)
        self._first = first
        self._taken: dict[int, int] = {}  # row: task
        self._open = 0  # the row that was handed out last

    def slot(self, task: int) -> Tensor:
        """(P,), to be overwritten. Its content counts only after `admit`."""
        if len(self._taken) == len(self._rows):
            grown = torch.empty(2 * len(self._rows), self.columns)
            grown[: len(self._rows)] = self._rows
            self._rows = grown
        place = task - self._first
        if not 0 <= place < len(self._rows) or place in self._taken:
            place = next(row for row in reversed(range(len(self._rows))) if row not in self._taken)
        self._open = place
        return self._rows[place]

    def admit(self, task: int) -> None:
        """Keep what `slot` handed out for this task."""
        self._taken[self._open] = task

    def in_order(self) -> Tensor:
        """The admitted rows (n, P) by ascending task, moved in place: no second matrix."""
        order = sorted(self._taken, key=self._taken.__getitem__)
        permute_(self._rows, order)
        self._taken = {row: self._taken[was] for row, was in enumerate(order)}
        return self._rows[: len(order)]

    def clear(self, first: int) -> None:
        """Begin anew, with tasks from `first` on."""
        self._first = first
        self._taken.clear()


class RowSum:
    """The same door for a streaming mean: rows are added in the order of their tasks.

    A row waits only while an earlier task is still open, so rows that come in order need no memory but the sum
    (P,), float64. `scaled` (P,) is the sum of the same rows, each also times a factor of its own, where one is wanted.
    """

    def __init__(self, columns: int, *, scaled: bool = False) -> None:
        self.columns = columns
        self._total: Tensor | None = None
        self.scaled = torch.zeros(columns if scaled else 0, dtype=torch.float64)
        self._spare: Tensor | None = None
        self._waiting: list[tuple[int, float, float, Tensor]] = []

    def slot(self, task: int) -> Tensor:
        if self._spare is None:
            self._spare = torch.empty(self.columns)
        return self._spare

    def admit(self, task: int, weight: float, factor: float = 1.0) -> None:
        bisect.insort(self._waiting, (task, weight, factor, self.slot(task)), key=lambda item: item[0])
        self._spare = None

    def fold(self, first_open: float) -> None:
        """Add the rows whose tasks come before `first_open`, the earliest task that may still be answered."""
        ready = bisect.bisect_left(self._waiting, first_open, key=lambda item: item[0])
        if not ready:
            return
        if self._total is None:
            self._total = torch.zeros(self.columns, dtype=torch.float64)
        for _, weight, factor, row in self._waiting[:ready]:
            for at in range(0, self.columns, _BLOCK):  # torch makes a float64 row of what it adds
                part = slice(at, at + _BLOCK)
                self._total[part].add_(row[part], alpha=weight)
                if len(self.scaled):
                    self.scaled[part].add_(row[part], alpha=weight * factor)
            self._spare = row if self.columns <= _KEPT else None
        del self._waiting[:ready]

    def over(self, divisor: float) -> Tensor:
        """The sum of all rows, of which there must be some, over a number: (P,) float32.

        It is the last that is asked of them, and all memory is let go of.
        """
        self.fold(math.inf)
        assert self._total is not None
        total, self._spare, self._total = self._total, None, None
        return total.div_(divisor).to(torch.float32)

    def clear(self) -> None:
        self._total = None
        self.scaled.zero_()
        self._waiting.clear()


def permute_(rows: Tensor, order: list[int]) -> None:
    """Row i becomes what row order[i] was, in place, with one spare row; rows past len(order) may change.

    `order` holds distinct indices.
    """
    at = list(range(len(rows)))  # at[j]: where original row j lies now
    held = list(range(len(rows)))  # held[p]: which original row lies at p
    for i, j in enumerate(order):
        p = at[j]
        if p != i:
            spare = rows[i].clone()
            rows[i] = rows[p]
            rows[p] = spare
            other = held[i]
            at[other], held[p] = p, other
            at[j], held[i] = i, j
