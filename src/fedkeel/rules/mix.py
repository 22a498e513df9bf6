"""Mixers: what is done to the rows between their weighing and their reduction, `(U (n, P), w (n,), key) -> (V, v)`.

V has m <= n rows, v their weights. A row of weight 0 has no influence, and need not be among V. Whatever a mixer draws
comes from the key, which is the round's own. Inputs are left as they are; V may be U itself where nothing is changed.
Trait "keeps_mean": the weighted mean of V by v is that of U by w. With the traits "by_steps" and "looks_back" the rows
must still be clients' own, and a mixer is called with (U, w, key, tau (n,), params) or (U, w, key, gap) as well: how
many plain SGD steps each row is worth, and which columns are parameters; or how far the server's model has gone since
each row's client began, (P,) each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from fedkeel.core.errors import CohortError
from fedkeel.core.keys import Key
from fedkeel.core.registry import rule
from fedkeel.kernels import combine, distance, neighbours

_FAINT = 1e-6
Hostile = Annotated[int, Field(ge=0)]


@rule("mixer", needs=lambda f: 2 * f + 1)
def nnm(U: Tensor, w: Tensor, key: Key, *, f: Hostile) -> tuple[Tensor, Tensor]:
    """Each row becomes the mean of the n - f rows nearest to it, itself among them: nearest-neighbour mixing.

    Allouah et al. 2023 (Fixing by mixing): it makes trimmed_mean, median, krum and geometric_median
    optimal under heterogeneous data. Rows keep their weights. Holds a second matrix (n, P). Raises `CohortError` with
    fewer than 2 f + 1 rows of weight above 0, or rows that are not finite.
    """
    rows = _used(w, 2 * f + 1, f"nnm(f={f})")
    D = distance.sq_distances(U, rows).cpu()
    if not bool(torch.isfinite(D).all()):
        raise CohortError("nnm met a row that is not finite: put the check 'finite' before it")
    near = neighbours.nearest(D, len(rows) - f)
    M = torch.zeros(len(rows), len(rows), dtype=torch.float64).scatter_(1, near, 1 / near.shape[1])
    return combine.mixed(U, M, rows), w[rows]


@rule("mixer", leaves=lambda rows, size: -(-rows // size), traits=("keeps_mean",))
def bucketing(U: Tensor, w: Tensor, key: Key, *, size: Annotated[int, Field(ge=1)] = 2) -> tuple[Tensor, Tensor]:
    """Buckets of `size` rows are drawn at random, and each becomes its weighted mean (Karimireddy et al. 2022).

    A bucket weighs what its rows weigh together, so the mean stays. A hostile row spoils its bucket: allow for f
    hostile buckets of n / size. Holds a second matrix (n / size, P).
    """
    rows = _used(w, 1, f"bucketing(size={size})")
    order = torch.randperm(len(rows), generator=key.torch())
    buckets = torch.split(order, size)
    V = torch.empty(len(buckets), U.shape[1], dtype=U.dtype, device=U.device)
    together = torch.empty(len(buckets), dtype=torch.float64)
    for i, bucket in enumerate(buckets):
        members = torch.tensor(rows)[bucket]
        counts = w[members].to("cpu", torch.float64)
        together[i] = counts.sum()
        shares = torch.zeros(len(w), dtype=torch.float64).index_copy_(0, members, counts / together[i])
        V[i] = combine.weighted_sum(U, shares)  # reads its own rows alone: a NaN stays in its bucket
    return V, together.to(w)


@rule("mixer")
def norm_cap(
    U: Tensor, w: Tensor, key: Key, *, norm: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
) -> tuple[Tensor, Tensor]:
    """Scale rows longer than `norm` (L2) down to it; by default to the median norm of the rows.

    Sun et al. 2019 (norm thresholding); the median as in FLAME (Nguyen et al. 2022): 0 where half of the rows are.
    Holds a second matrix (n, P) where
    a row is scaled.
    """
    rows = _used(w, 1, "norm_cap")
    lengths = _lengths(U, rows)
    limit = float(lengths.median()) if norm is None else norm
    return _capped(U, rows, lengths, limit), w


@rule("mixer")
def equal_norms(U: Tensor, w: Tensor, key: Key) -> tuple[Tensor, Tensor]:
    """Scale every row, up or down, to the median norm of the rows: none counts for more by its length.

    As FLTrust does with the norm of the server's own update (Cao et al. 2021, equation 3). Rows of zero stay zero, and
    so do those a millionth as long as the median or less: what is left of them is rounding. Holds a second matrix
    (n, P).
    """
    rows = _used(w, 1, "equal_norms")
    lengths = _lengths(U, rows)
    limit, V = float(lengths.median()), U.clone()
    for row, length in zip(rows, lengths.tolist(), strict=True):
        if length <= _FAINT * limit:
            V[row] = 0
        else:
            V[row] *= limit / length if math.isfinite(length) else math.nan
    return V, w


@rule("mixer", needs=lambda f: 2 * f + 1)
def arc(U: Tensor, w: Tensor, key: Key, *, f: Hostile) -> tuple[Tensor, Tensor]:
    """Scale the floor(2 f (n - f) / n) longest rows down to the next one's norm: adaptive robust clipping.

    Allouah et al. 2025: unlike a fixed bound it keeps the guarantee of the robust rule that follows.
    Holds a second matrix (n, P) where a row is scaled. Raises `CohortError` with fewer than 2 f + 1 rows of weight
    above 0.
    """
    rows = _used(w, 2 * f + 1, f"arc(f={f})")
    lengths = _lengths(U, rows)
    cut = 2 * f * (len(rows) - f) // len(rows)
    limit = float(lengths.sort(descending=True).values[cut])
    return _capped(U, rows, lengths, limit), w


@rule("mixer", traits=("by_steps",))
def fednova(U: Tensor, w: Tensor, key: Key, tau: Tensor, params: slice) -> tuple[Tensor, Tensor]:
    """Normalised averaging: row i times tau_eff / tau_i, tau_eff the mean of the tau_i, weighted as the rows are.

    FedNova (Wang et al. 2020, section 4) for the mean: clients that take more steps pull no harder, and the model moves
    as far as before. tau_i is |a_i|_1: the steps, for plain SGD; of momentum and a proximal term what they make of
    them. Buffers stay as they are. A client that claims fewer steps than it took counts for more: put a screen
    on norms before it, or norm_cap after it. Holds a second matrix (n, P) unless all tau_i are equal. Raises
    `CohortError` where a row's steps are 0.
    """
    rows = _used(w, 1, "fednova")
    worth, shares = tau[rows].double().cpu(), w[rows].double().cpu()
    if not bool((worth > 0).all()):
        raise CohortError("fednova met a row of 0 steps: put the check 'claims' before it")
    factors = (shares @ worth) / shares.sum() / worth
    if bool((factors == factors[0]).all()):
        return U, w
    V = U.clone()
    for row, factor in zip(rows, factors.tolist(), strict=True):
        V[row, params] *= factor
    return V, w


@rule("mixer", traits=("looks_back",))
def models(U: Tensor, w: Tensor, key: Key, gap: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows become the way from the server's model to the client's: what is mixed are models, as FedAsync does.

    x_k - x = U_k - (x - x_started) (Xie et al. 2019, algorithm 1): a client that began with an old model pulls back
    what was learned since, by its weight. Without it updates are added to the model as it is now, as FedBuff does. The
    server keeps the models that work began from. Holds a second matrix (n, P) where a row is stale.
    """
    _used(w, 1, "models")
    if not any(bool(torch.count_nonzero(g)) for g in gap):
        return U, w
    return U - torch.stack(tuple(gap)), w


def _used(w: Tensor, needed: int, name: str) -> list[int]:
    """The rows of weight above 0. Raises `CohortError` when they are fewer than `needed`."""
    rows: list[int] = torch.nonzero(w).flatten().tolist()
    if len(rows) < needed:
        raise CohortError(f"{name} needs {needed} rows of weight above 0, not {len(rows)}")
    return rows


def _lengths(U: Tensor, rows: list[int]) -> Tensor:
    """The norms of the picked rows, float64; a row that is not finite is infinitely long."""
    lengths = [math.sqrt(distance.sq_norm(U[i])) for i in rows]
    return torch.tensor(lengths, dtype=torch.float64).nan_to_num(nan=torch.inf)


def _capped(U: Tensor, rows: list[int], lengths: Tensor, limit: float) -> Tensor:
    long = [(row, length) for row, length in zip(rows, lengths.tolist(), strict=True) if length > limit]
    if not long:
        return U
    V = U.clone()
    for row, length in long:
        V[row] *= limit / length if math.isfinite(length) else math.nan
    return V
