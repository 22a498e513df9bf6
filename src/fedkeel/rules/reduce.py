"""Reducers: admitted rows to one row, `(U (n, P), w (n,) float64 >= 0, *, ...) -> (P,)`.

Weights need no normalisation, and a row of weight 0 has no influence on any reducer, whatever it holds. Traits:
"coordinatewise" (each column by itself, inside its rows' hull); "robust" (bounded whatever a minority sends: `trim` or
`f` rows where there is such a parameter); "weighted" (a row of weight 2 counts as two rows) or "unweighted" (weights
above 0 are ignored); "streams" (the weighted mean: a server may sum rows as they come).
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from fedkeel.core.errors import CohortError, InputError
from fedkeel.core.registry import rule
from fedkeel.kernels import combine, distance, order


@rule("reducer", traits=("coordinatewise", "weighted", "streams"))
def mean(U: Tensor, w: Tensor) -> Tensor:
    """Weighted mean, w @ U / sum(w): FedAvg (McMahan et al. 2017). One hostile row moves it anywhere."""
    _used(U, w, 1, "mean")
    return combine.weighted_sum(U, _shares(w))


@rule("reducer", traits=("coordinatewise", "robust", "unweighted"))
def median(U: Tensor, w: Tensor) -> Tensor:
    """Median of each column (Yin et al. 2018, definition 1); weights above 0 are ignored.

    Of an even number of rows: the mean of the middle two.
    """
    rows = _used(U, w, 1, "median")
    return order.trimmed_mean(U, (len(rows) - 1) // 2, rows)


@rule("reducer", needs=lambda trim: 2 * trim + 1, traits=("coordinatewise", "robust", "unweighted"))
def trimmed_mean(U: Tensor, w: Tensor, *, trim: Annotated[int, Field(ge=0)]) -> Tensor:
    """Mean of each column without its `trim` smallest and largest values; weights above 0 are ignored.

    Yin et al. 2018, definition 2.

    Raises `CohortError` with fewer than 2 * trim + 1 rows of weight above 0.
    """
    rows = _used(U, w, 2 * trim + 1, f"trimmed_mean(trim={trim})")
    return order.trimmed_mean(U, trim, rows)


@rule("reducer", traits=("robust", "weighted"))
def geometric_median(
    U: Tensor,
    w: Tensor,
    *,
    tolerance: Annotated[float, Field(gt=0, lt=1)] = 1e-7,
    max_steps: Annotated[int, Field(ge=1)] = 1000,
) -> Tensor:
    """The point with the least weighted sum of distances to the rows: RFA (Pillutla, Kakade and Harchaoui 2022).

    Their smoothed Weiszfeld iteration (algorithm 2). The point is kept as a convex combination c of the rows, so a step
    costs n^2, not n * P: with G the Gram matrix about a central row, |z - U_j|^2 = c'Gc - 2 (Gc)_j + G_jj. It ends with
    a step shorter than `tolerance` times the typical distance from the central row; distances are smoothed at 1e-6 of
    that (the paper's nu is absolute), so the result scales with the rows. The paper stops by the sum of distances,
    whose digits one far row takes.
    """
    rows = _used(U, w, 1, "geometric_median")
    shares = _shares(w.to(U.device)[rows])
    D = distance.sq_distances(U, rows)
    if not bool(torch.isfinite(D).all()):
        raise CohortError("geometric_median met a row that is not finite: put the check 'finite' before it")
    lengths = D.sqrt()
    centre = int((lengths @ shares).argmin())
    typical = lengths[centre].median()
    if typical == 0:  # half of the rows agree with the central one
        typical = lengths[centre].max()
    c = _weiszfeld(distance.gram(U, centre, rows), shares, lengths[centre], float(typical), tolerance, max_steps)
    everywhere = torch.zeros(U.shape[0], dtype=torch.float64, device=U.device)
    everywhere[rows] = c
    return combine.weighted_sum(U, everywhere)


def _weiszfeld(G: Tensor, w: Tensor, lengths: Tensor, typical: float, tolerance: float, max_steps: int) -> Tensor:
    """Coefficients (n,) of the geometric median; `lengths` are the rows' distances from the Gram matrix's centre."""
    if typical == 0:
        return w
    smooth = 1e-6 * typical
    c = _shares(w / lengths.clamp(min=typical))
    for _ in range(max_steps):
        Gc = G @ c
        lengths = (c @ Gc - 2 * Gc + G.diagonal()).clamp_(min=0).sqrt_()
        before, c = c, _shares(w / lengths.clamp_(min=smooth))
        step = c - before
        if float(step @ (G @ step)) <= (tolerance * typical) ** 2:
            break
    return c


def _used(U: Tensor, w: Tensor, needed: int, name: str) -> list[int]:
    """The rows of weight above 0. Raises `CohortError` when they are fewer than `needed`."""
    if U.ndim != 2 or w.shape != (U.shape[0],):
        raise InputError(f"{name} takes rows (n, P) and weights (n,), not {tuple(U.shape)} and {tuple(w.shape)}")
    if not bool((torch.isfinite(w) & (w >= 0)).all()):
        raise InputError(f"{name} takes finite weights of 0 or more, not {w.min().item():g} to {w.max().item():g}")
    rows: list[int] = torch.nonzero(w).flatten().tolist()
    if len(rows) < needed:
        raise CohortError(f"{name} needs {needed} rows of weight above 0, not {len(rows)}")
    return rows


def _shares(w: Tensor) -> Tensor:
    """w / sum(w), float64, for sums that float64 itself could not hold."""
    w = w.to(torch.float64)
    w = w / w.max()
    return w / w.sum()
