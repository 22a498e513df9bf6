"""What clients measured, as one figure each: weighed and reduced by the plan's own rules."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedkeel.core.errors import CohortError
from fedkeel.core.keys import Key
from fedkeel.core.types import Claims, Cohort, Refusal, ServerState, Update
from fedkeel.round.plan import Plan
from fedkeel.round.server import Server


def refusal(plan: Plan, server: Server, claims: Claims) -> Refusal | None:
    """Why what a client measured does not count: the plan's check of claims says so."""
    for check in plan.checks:
        if check.name == "claims" and (why := check(Update(claims, b"", 0), server.door)) is not None:
            return Refusal("check", check.name, f"evaluation: {why}")
    return None


def weights(plan: Plan, state: ServerState, measured: Sequence[Claims]) -> Tensor:
    """The weights (n,) that the plan's weighers give to so many examples; those that look at updates have no say."""
    n = len(measured)
    zero = torch.zeros(n, dtype=torch.float64)
    counts = torch.tensor([claims.num_examples for claims in measured], dtype=torch.float64)
    cohort = Cohort(
        torch.zeros(n, 0),
        tuple(claims.client for claims in measured),
        num_examples=counts,
        staleness=zero,
        steps=torch.ones_like(zero),
        norm=zero,
        params=slice(0, 0),
        layers=(),
        metrics=tuple(claims.metrics for claims in measured),
        labels=((),) * n,
        key=Key.root(0),
    )
    found = torch.ones_like(zero)
    for weigher in plan.weighers:
        if "per_row" in weigher.definition.traits:
            found = found * weigher(cohort, state)
    return found


def reduced(plan: Plan, told: Sequence[Mapping[str, float]], w: Tensor) -> dict[str, float]:
    """Each figure that more than half of them tell, by the plan's reducer over those who do; weights (n,).

    A figure of which too few are told for the reducer is left out.
    """
    counts = Counter(name for metrics in told for name in metrics)
    found = {}
    for name in sorted(name for name, count in counts.items() if 2 * count > len(told)):
        rows = [row for row, metrics in enumerate(told) if name in metrics]
        column = torch.tensor([[told[row][name]] for row in rows], dtype=torch.float64)
        if len(rows) < plan.reducer.needs:
            continue
        try:
            value = float(plan.reducer(column, w[rows])[0])
        except CohortError:
            continue
        if math.isfinite(value):
            found[name] = value
    return found
