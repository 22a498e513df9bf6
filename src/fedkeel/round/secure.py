"""Secure aggregation in a round: updates enter sums under masks, and rules see the groups' means and no update."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedkeel.core.errors import CohortError, DecodeError, RunError
from fedkeel.core.keys import Key
from fedkeel.core.noise import unit_of
from fedkeel.core.registry import Rule
from fedkeel.core.types import Claims, ClientMemory, Cohort, ServerState
from fedkeel.secagg.groups import GroupSum, deal
from fedkeel.secagg.quantise import Grid
from fedkeel.secagg.terms import ProtocolError, Terms, Words, threshold_of

MASKED = "masked"
"""What an envelope says in the place of a codec: its row is not in it."""
ROW = "secure/row"
"""Under what name a client keeps the row that it will add to a sum."""


@dataclass(frozen=True)
class Secure:
    """Sums in groups of `size` clients or more, of updates scaled down to the L2 norm `norm` at most.

    More than two thirds of `size` must stay to the end, so a sum is of that many clients at least. `noised`: noise is
    added to the sums, which are whole numbers of the noise's own unit then.
    """

    size: int
    norm: float
    noised: bool = False

    @property
    def least(self) -> int:
        """How many clients a sum is of at least."""
        return threshold_of(self.size)

    def groups(self, rows: int) -> int:
        """How many groups so many clients come to."""
        return max(1, rows // self.size)

    def row_bytes(self, columns: int) -> int:
        """What a masked row has."""
        return columns * (8 if self.noised else 4)

    def grid(self, norm: float) -> Grid:
        """Whole numbers that a client's row, of a norm at most, is written in."""
        if self.noised:  # what is noised is cut towards zero: no norm grows. 64 bits wrap as the sum with noise does
            return Grid(norm, unit_of(norm), "norm", "zero", 64)
        return self._grid if norm == self.norm else Grid.finest(norm, 2 * self.size, "norm")

    @cached_property
    def _grid(self) -> Grid:
        return Grid.finest(self.norm, 2 * self.size, "norm")

    def terms(self, clients: Sequence[str], columns: int, key: Key) -> tuple[Terms, ...]:
        """A session for each group of those clients. Raises `CohortError` where they are too few for one."""
        bits = 64 if self.noised else 32
        dealt = deal(clients, self.size, key, self.least)
        return tuple(Terms.drawn(group, columns, threshold=self._threshold(len(group)), bits=bits) for group in dealt)

    def check(self, terms: Terms, columns: int) -> None:
        """Raise `ProtocolError` for a session that a client of this job takes no part in."""
        size = len(terms.members)
        right = Terms(terms.session, terms.members, self._threshold(size), columns, 64 if self.noised else 32)
        if size < self.least or terms != right:
            raise ProtocolError(f"its group of {size} is not one of secagg.size = {self.size} in this job")

    def _threshold(self, size: int) -> int:
        return min(max(self.least, threshold_of(size)), size)

    def __repr__(self) -> str:
        norm = "" if self.noised else f", norm={self.norm:g}"
        return f"groups(size={self.size}{norm})"


def weight_of(weighers: Sequence[Rule], claims: Claims) -> float:
    """What an update counts in its group's sum, of the most that any may: 0 to 1. Client and server reckon alike."""
    none = torch.zeros(1, dtype=torch.float64)
    alone = Cohort(
        torch.empty(1, 0),
        (claims.client,),
        none + claims.num_examples,
        none,
        none + claims.steps,
        none,
        slice(0, 0),
        (),
        (claims.metrics,),
        (claims.labels,),
        Key(0),
    )
    state = ServerState(torch.empty(0))
    given = [float(rule(alone, state)[0]) / most(rule) for rule in weighers]
    return min(max(math.prod(given), 0.0), 1.0)


def most(rule: Rule) -> float:
    """The most that a client can weigh by a weigher; infinity where nothing bounds it."""
    hook = rule.hook("most")
    return math.inf if hook is None or "per_row" not in rule.definition.traits else float(hook())


def hold(row: Tensor, weight: float, grid: Grid, client: str, memory: ClientMemory, *, honest: bool = True) -> None:
    """Keep a row (P,), times its weight, for the sum that it will enter. Raises `ValueError` if it is not finite.

    A client that is not honest scales nothing down: its row is of any norm that the words hold.
    """
    if not honest:
        row = row.nan_to_num()
        grid = Grid(grid.unit * 2.0 ** min(grid.bits - 2, 52), grid.unit, "column", grid.rounding, grid.bits)
    words = grid.encode(row * weight)
    memory.keep(client, {ROW: torch.from_numpy(words.view(f"<i{grid.bits // 8}"))})


def take(client: str, memory: ClientMemory) -> Words:
    """The row that a client holds for a sum, once. Raises `RunError` where it has none."""
    held = memory.of(client).get(ROW)
    if held is None:
        raise RunError(f"'{client}' has no row to add: it was added before, or is of before a restart")
    memory.forget(client, [ROW])
    return held.numpy().view(f"<u{held.element_size()}")


class Summed(NamedTuple):
    """What came of a round's sums: whose updates are in which, and of whom there is none, with the reason.

    `rows`: the groups' means (g, P), or where noise follows their sum alone (1, P), int64, in the grid's units;
    `weights` of the groups.
    """

    rows: Tensor
    weights: Tensor
    members: tuple[tuple[str, ...], ...]
    lost: Mapping[str, str]


def means(groups: Sequence[Terms], sums: Sequence[GroupSum], weights: Mapping[str, float], grid: Grid) -> Summed:
    """The groups' means, of clients who weigh so much (`weight_of`). Raises `CohortError` where there is none."""
    rows, kept, members = [], [], []
    lost = _left(groups, sums)
    for terms, found in zip(groups, sums, strict=True):
        weight = math.fsum(weights[client] for client in found.survivors)
        reason = found.reason or "it has no weight"
        try:
            if found.total is not None and weight > 0:
                rows.append(grid.decode(found.total, len(found.survivors)) / weight)
                kept.append(weight)
                members.append(found.survivors)
                continue
        except DecodeError as error:
            reason = str(error)
        lost |= _group_lost(terms, reason)
    if not rows:
        raise CohortError("no group's sum came about" + (f": {next(iter(lost.values()))}" if lost else ""))
    U = torch.from_numpy(np.stack(rows)).to(torch.float32)
    return Summed(U, torch.tensor(kept, dtype=torch.float64), tuple(members), lost)


def total(groups: Sequence[Terms], sums: Sequence[GroupSum], columns: int) -> Summed:
    """All groups' sums as one, mod 2^64: what noise is added to, and nothing is looked at before."""
    rows = torch.zeros(1, columns, dtype=torch.int64)
    members = []
    lost = _left(groups, sums)
    for terms, found in zip(groups, sums, strict=True):
        if found.total is None:
            lost |= _group_lost(terms, found.reason)
            continue
        rows[0] += torch.from_numpy(found.total.view("<i8"))
        members.append(found.survivors)
    return Summed(rows, torch.ones(len(members), dtype=torch.float64), tuple(members), lost)


def _left(groups: Sequence[Terms], sums: Sequence[GroupSum]) -> dict[str, str]:
    pairs = zip(groups, sums, strict=True)
    return {c: "it left before its row was summed" for t, found in pairs for c in t.members if c not in found.survivors}


def _group_lost(terms: Terms, reason: str | None) -> dict[str, str]:
    return dict.fromkeys(terms.members, f"the sum of its group of {len(terms.members)} is lost: {reason}")
