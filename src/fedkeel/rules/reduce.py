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
from fedkeel.kernels import combine, distance, neighbours, order

Hostile = Annotated[int, Field(ge=0)]


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


@rule("reducer", traits=("coordinatewise", "robust", "weighted"))
def weighted_trimmed_mean(U: Tensor, w: Tensor, *, share: Annotated[float, Field(ge=0, le=0.49)] = 0.2) -> Tensor:
    """Weighted mean of each column without the `share` of the weight at either end; near 0.5 about the weighted median.

    Yin et al. 2018, definition 2, by weight instead of by count: what hostile rows weigh together must stay below
    `share` of all. Less than a millionth of the weight is rounding, and does not count.
    """
    rows = _used(U, w, 1, "weighted_trimmed_mean")
    return order.weighted_trimmed_mean(U, _shares(w)[rows].tolist(), share, rows)


@rule("reducer", needs=lambda f: 2 * f + 1, traits=("coordinatewise", "robust", "unweighted"))
def mean_around_median(U: Tensor, w: Tensor, *, f: Hostile) -> Tensor:
    """Mean of each column's n - f values nearest to its median; weights above 0 are ignored.

    Xie, Koyejo and Gupta 2018 (Generalized Byzantine-tolerant SGD). Raises `CohortError` with fewer than
    2 f + 1 rows of weight above 0.
    """
    rows = _used(U, w, 2 * f + 1, f"mean_around_median(f={f})")
    return order.mean_around_median(U, len(rows) - f, rows)


@rule("reducer", needs=lambda f: 4 * f + 3, traits=("robust", "unweighted"))
def bulyan(U: Tensor, w: Tensor, *, f: Hostile) -> Tensor:
    """Krum chooses n - 2 f rows one after another; of those, the n - 4 f values nearest to each column's median count.

    El Mhamdi, Guerraoui and Rouault 2018. Weights above 0 are ignored. Raises `CohortError` with fewer
    than 4 f + 3 rows of weight above 0.
    """
    rows = _used(U, w, 4 * f + 3, f"bulyan(f={f})")
    D = _distances(U, rows, "bulyan")
    chosen = sorted(rows[i] for i in neighbours.krum_order(D, f, len(rows) - 2 * f))
    return order.mean_around_median(U, len(rows) - 4 * f, chosen)


@rule("reducer", needs=lambda f: 2 * f + 1, traits=("robust", "unweighted"))
def mda(U: Tensor, w: Tensor, *, f: Hostile) -> Tensor:
    """Mean of the n - f rows whose two farthest are the least apart; weights above 0 are ignored.

    Minimum-diameter averaging (El Mhamdi, Guerraoui and Rouault 2018). Of several such subsets, the one whose distances
    sum to the least. Exact, by a search that is fast while f is small.

    Raises `CohortError` with fewer than 2 f + 1 rows of weight above 0, or where the search takes too long.
    """
    rows = _used(U, w, 2 * f + 1, f"mda(f={f})")
    try:
        chosen = neighbours.least_diameter(_distances(U, rows, "mda"), f)
    except RuntimeError as error:
        raise CohortError(f"mda(f={f}) of {len(rows)} rows: {error}; choose nnm and trimmed_mean") from None
    c = torch.zeros(len(rows), dtype=torch.float64)
    c[chosen] = 1 / len(chosen)
    return _combined(U, rows, c)


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
    D = _distances(U, rows, "geometric_median").to(U.device)
    lengths = D.sqrt()
    centre = int((lengths @ shares).argmin())
    typical = float(_weighted_medians(lengths[centre][None], shares)[0])
    if typical == 0:  # most of the weight lies there: no other point is nearer to all
        return U[rows[centre]].clone()
    c = _weiszfeld(distance.gram_about(U, centre, rows, D), shares, lengths[centre], typical, tolerance, max_steps)
    return _combined(U, rows, c)


@rule("reducer", traits=("robust", "weighted"))
def centered_clip(
    U: Tensor,
    w: Tensor,
    *,
    radius: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None,
    steps: Annotated[int, Field(ge=1)] = 3,
) -> Tensor:
    """v <- v + sum_i w_i (U_i - v) min(1, radius / |U_i - v|), `steps` times (Karimireddy, He and Jaggi 2021).

    It begins at the row with the least median distance to the others, where the paper begins at the last aggregate. The
    default radius is, at every step, the median distance of the rows from v. v is a convex combination of rows, kept by
    its coefficients as in geometric_median.
    """
    rows = _used(U, w, 1, "centered_clip")
    shares = _shares(w.to(U.device)[rows])
    D = _distances(U, rows, "centered_clip").to(U.device)
    lengths = D.sqrt()
    centre = _central(lengths, shares)
    G = distance.gram_about(U, centre, rows, D)
    c = torch.zeros(len(rows), dtype=torch.float64, device=U.device)
    c[centre] = 1
    away = lengths[centre]
    for _ in range(steps):
        limit = float(_weighted_medians(away[None], shares)[0]) if radius is None else radius
        pull = shares * (limit / away.clamp(min=max(limit, torch.finfo(torch.float64).tiny)))
        c = pull + (1 - pull.sum()) * c
        away = _lengths(G, c)
    return _combined(U, rows, c)


@rule("reducer", needs=lambda f: 2 * f + 1, traits=("robust", "unweighted"))
def caf(U: Tensor, w: Tensor, *, f: Hostile) -> Tensor:
    """Mean after a filter along the directions of largest variance: CAF (Allouah et al. 2025).

    Rows begin with c_i = 1 (weights above 0 are ignored). As long as they sum to more than n - 2 f, each loses in
    proportion to its squared distance from the mean by c along the covariance's first eigenvector; the result is the
    mean that had the least largest eigenvalue. The spectrum comes from the rows' Gram matrix. Raises `CohortError` with
    fewer than 2 f + 1 rows of weight above 0.
    """
    rows = _used(U, w, 2 * f + 1, f"caf(f={f})")
    D = _distances(U, rows, "caf")
    left = torch.ones(len(rows), dtype=torch.float64)
    best, least = left / len(rows), torch.inf
    G = distance.gram_about(U, _central(D.sqrt(), best), rows, D).cpu()
    while float(left.sum()) > len(rows) - 2 * f:
        c = left / left.sum()
        # With A = G centred at the mean, the covariance's eigenvalues are those of sqrt(c) A sqrt(c).
        Gc = G @ c
        A = G - Gc[:, None] - Gc[None, :] + c @ Gc
        root = c.sqrt()
        values, vectors = torch.linalg.eigh(root[:, None] * A * root[None, :])
        if float(values[-1]) < least:
            least, best = float(values[-1]), c
        along = (A @ (root * vectors[:, -1])).square()
        along = torch.where(left > 0, along, 0.0)
        if not float(along.max()) > 0:
            break
        left = left * (1 - along / along.max())
    return _combined(U, rows, best)


def _distances(U: Tensor, rows: list[int], name: str) -> Tensor:
    """Squared distances between the picked rows, on the CPU. Raises `CohortError` for rows that are not finite."""
    D = distance.sq_distances(U, rows).cpu()
    if not bool(torch.isfinite(D).all()):
        raise CohortError(f"{name} met a row that is not finite: put the check 'finite' before it")
    return D


def _combined(U: Tensor, rows: list[int], c: Tensor) -> Tensor:
    """sum_i c_i U_rows[i]."""
    everywhere = torch.zeros(U.shape[0], dtype=torch.float64, device=U.device)
    everywhere[rows] = c.to(U.device)
    return combine.weighted_sum(U, everywhere)


def _lengths(G: Tensor, c: Tensor) -> Tensor:
    """Distances of the rows from their combination c, by their Gram matrix about any row."""
    Gc = G @ c
    return (c @ Gc - 2 * Gc + G.diagonal()).clamp_(min=0).sqrt_()


def _central(lengths: Tensor, shares: Tensor) -> int:
    """The row with the least weighted median of its distances to all (n, n); of equal ones, the nearest to all."""
    medians, sums = _weighted_medians(lengths, shares).tolist(), (lengths @ shares).tolist()
    return min(range(len(medians)), key=lambda i: (medians[i], sums[i]))


def _weighted_medians(values: Tensor, shares: Tensor) -> Tensor:
    """Of each row of values (m, n): the least that, with those below it, has more than half of the shares (n,)."""
    ordered, index = values.sort(dim=1)
    reached = shares[index].cumsum(1) > 0.5 + 1e-9
    return ordered.gather(1, reached.to(torch.int8).argmax(1, keepdim=True)).squeeze(1)


def _weiszfeld(G: Tensor, w: Tensor, lengths: Tensor, typical: float, tolerance: float, max_steps: int) -> Tensor:
    """Coefficients (n,) of the geometric median; `lengths` are the rows' distances from the Gram matrix's centre."""
    smooth = 1e-6 * typical
    c = _shares(w / lengths.clamp(min=typical))
    for _ in range(max_steps):
        lengths = _lengths(G, c)
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
