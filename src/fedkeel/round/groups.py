"""A round's sums under masks: who adds up with whom, and what the plan's rules make of the groups' means."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from torch import Tensor

from fedkeel.core.errors import CohortError
from fedkeel.core.keys import Key
from fedkeel.core.types import Claims, ClientMemory, Cohort, Refusal, ServerState
from fedkeel.round import secure
from fedkeel.round.aggregate import Outcome, aggregate
from fedkeel.round.plan import Plan
from fedkeel.round.secure import Secure, Summed
from fedkeel.secagg.groups import GroupSum
from fedkeel.secagg.simulate import group_sums
from fedkeel.secagg.terms import Terms

Described = Callable[[Tensor, Sequence[Claims]], Cohort]
"""The cohort of rows (g, P) and what is claimed of each."""


@dataclass(frozen=True, slots=True)
class Added:
    """What came of a round's sums, by client: shares of weight, and who is refused; `outcome`, of the groups."""

    outcome: Outcome
    weights: dict[str, float]
    refused: dict[str, Refusal]


class Groups:
    """The groups of one round after another."""

    def __init__(self, plan: Plan, rule: Secure, columns: int, key: Key, described: Described) -> None:
        self._plan, self._rule, self._columns, self._key, self._described = plan, rule, columns, key, described
        self.terms: tuple[Terms, ...] = ()

    def deal(self, claims: Sequence[Claims], round: int) -> tuple[Terms, ...]:
        """Who of these clients add up with whom; nobody where they are too few."""
        self.terms = ()
        with suppress(CohortError):
            names = [claim.client for claim in claims]
            self.terms = self._rule.terms(names, self._columns, self._key.fold("groups", round))
        return self.terms

    def clear(self) -> None:
        self.terms = ()

    def add_up(self, sums: Sequence[GroupSum], claims: Sequence[Claims], state: ServerState) -> Added:
        """The aggregate of the groups' means; what becomes of a group becomes of all in it. Raises `CohortError`."""
        if not self.terms:
            raise CohortError(f"{len(claims)} updates were admitted, too few to add up under masks")
        weights = {claim.client: secure.weight_of(self._plan.own_weighers, claim) for claim in claims}
        found = secure.means(self.terms, sums, weights, self._rule.grid(self._rule.norm))
        gone: dict[int, Refusal] = {}
        told = self._of_groups(found, claims)
        outcome = aggregate(self._plan, self._described(found.rows, told), state, gone, found.weights)
        refused = _lost(found)
        shares: dict[str, float] = {}
        for group, members in enumerate(found.members):
            if group in gone:
                why = f"the sum of its group of {len(members)} was refused: {gone[group].reason}"
                refused |= dict.fromkeys(members, gone[group]._replace(reason=why))
            of = math.fsum(weights[client] for client in members)
            share = outcome.weights.get(group, 0.0) / of
            shares |= {client: share * weights[client] for client in members}
        return Added(replace(outcome, weights={}, cosines={}, trust={}, used=None), shares, refused)

    def total(self, sums: Sequence[GroupSum], clients: Sequence[str]) -> tuple[Tensor, dict[str, Refusal]]:
        """All groups' sums as one (P,), int64, for noise to be added to, and who of the clients is not in it."""
        found = secure.total(self.terms, sums, self._columns)
        if not self.terms:
            found = found._replace(lost=dict.fromkeys(clients, "too few were there to add up under masks"))
        return found.rows[0], _lost(found)

    def preview(self, rows: Sequence[Tensor], claims: Sequence[Claims], state: ServerState) -> Tensor:
        """What the round would come to (P,) if these rows were all, as they are: hostile clients scale nothing down."""
        memory, grid, words = ClientMemory(), self._rule.grid(self._rule.norm), {}
        for row, claim in zip(rows, claims, strict=True):
            weight = secure.weight_of(self._plan.own_weighers, claim)
            secure.hold(row, weight, grid, claim.client, memory, honest=False)
            words[claim.client] = secure.take(claim.client, memory)
        try:
            sums = group_sums(self.deal(claims, state.round), words, masked=False)
            return self.add_up(sums, claims, state).outcome.direction
        finally:
            self.clear()

    def _of_groups(self, found: Summed, claims: Sequence[Claims]) -> list[Claims]:
        """What is known of each group, as if it were a client."""
        told = {claim.client: claim for claim in claims}
        made = []
        for place, members in enumerate(found.members):
            of = [told[client] for client in members]
            counts = sum(claim.num_examples for claim in of), round(statistics.fmean(claim.steps for claim in of))
            made.append(Claims(f"group {place}", place, of[0].base_version, of[0].layout_digest, *counts))
        return made


def _lost(found: Summed) -> dict[str, Refusal]:
    return {client: Refusal("sum", "secagg", why) for client, why in found.lost.items()}
