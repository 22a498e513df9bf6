"""Weighers: what each admitted row counts, `(cohort, state) -> (n,) float64 >= 0`. Weighers multiply; 0 excludes.

Trait "per_row": a row's weight depends on that row alone, so a server may weigh rows as they come.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from fedkeel.core.errors import CohortError
from fedkeel.core.registry import rule
from fedkeel.core.types import Cohort, ServerState
from fedkeel.kernels import neighbours


@rule("weigher", traits=("per_row",))
def examples(cohort: Cohort, state: ServerState, *, cap: Annotated[int, Field(ge=1)] | None = None) -> Tensor:
    """The number of examples a client says it trained on (McMahan et al. 2017), at most `cap`.

    It is the client's own claim: without a cap one client can outweigh all others.
    """
    counts = cohort.num_examples.to(torch.float64)
    return counts.clone() if cap is None else counts.clamp(max=cap)


@rule("weigher", traits=("per_row",))
def equal(cohort: Cohort, state: ServerState) -> Tensor:
    """Every row counts the same."""
    return torch.ones(len(cohort), dtype=torch.float64)


@rule("weigher", needs=lambda f: 2 * f + 3, leaves=lambda rows, f: 1)
def krum(cohort: Cohort, state: ServerState, *, f: Annotated[int, Field(ge=0)]) -> Tensor:
    """Only the row nearest to its n - f - 2 nearest others counts; withstands `f` hostile rows (Blanchard et al. 2017).

    Of rows with equal scores, the client whose id sorts first. Raises `CohortError` when n < 2 f + 3.
    """
    return _best(cohort, f, 1, f"krum(f={f})")


@rule("weigher", needs=lambda f, m: max(2 * f + 3, m or 1), leaves=lambda rows, f, m: m or rows - f)
def multi_krum(
    cohort: Cohort, state: ServerState, *, f: Annotated[int, Field(ge=0)], m: Annotated[int, Field(ge=1)] | None = None
) -> Tensor:
    """The `m` rows with the best Krum scores count equally, n - f by default (Blanchard et al. 2017, section 4).

    Of rows with equal scores, the clients whose ids sort first. Raises `CohortError` when n < 2 f + 3 or n < m.
    """
    m = len(cohort) - f if m is None else m
    return _best(cohort, f, m, f"multi_krum(f={f}, m={m})")


def _best(cohort: Cohort, f: int, m: int, name: str) -> Tensor:
    """Weight 1 for the m rows of the least Krum score: the sum of the n - f - 2 smallest squared distances to others.

    Distances are those of the parameter columns. A row that is not finite scores infinity; when such rows would have
    to be chosen, `CohortError`.
    """
    n = len(cohort)
    needed = max(2 * f + 3, m)
    if n < needed:
        raise CohortError(f"{name} needs {needed} rows, not {n}")
    D = cohort.sq_distances.cpu()
    scores = neighbours.krum_scores(D, f).tolist()
    ranked = sorted(range(n), key=lambda i: (scores[i], cohort.client[i]))[:m]
    if scores[ranked[-1]] == torch.inf:
        raise CohortError(f"{name} met too many rows that are not finite: put the check 'finite' before it")
    weights = torch.zeros(n, dtype=torch.float64)
    weights[ranked] = 1.0
    return weights
