"""Screens: admitted rows against each other, `(cohort, state) -> {row: (reason, score)}`; who is named is refused.

A row that is not finite is refused by every screen. Scores are scale-free, so that thresholds mean the same at every
learning rate. Traits: "length" (refuses rows that are far too long), "direction" (refuses rows that point against the
others), "majority" (keeps the densest majority, and may refuse all others, honest ones too).
"""

from __future__ import annotations

import math
import random
from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from fedkeel.core.registry import rule
from fedkeel.core.types import Cohort, ServerState
from fedkeel.kernels import distance, order

Found = dict[int, tuple[str, float]]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_NORMAL = 1.4826  # the MAD of normal values times this is their standard deviation
_NO_NUMBER = "it holds NaN or infinity"


@rule("screen", traits=("length",))
def norm_mad(
    cohort: Cohort, state: ServerState, *, limit: Positive = 4.0, floor: Positive = 0.1, small: bool = False
) -> Found:
    """Rows whose log norm is more than `limit` deviations above the cohort's median; with `small`, below it as well.

    A deviation is 1.4826 times the median absolute deviation of the log norms (Hampel's rule), at least `floor`: where
    clients clip to one norm, the MAD is 0.
    """
    found = _not_finite(cohort)
    kept = [i for i in range(len(cohort)) if i not in found and float(cohort.norm[i]) > 0]
    if not kept:
        return found
    logs = cohort.norm[kept].log()
    middle = float(logs.quantile(0.5))
    deviation = max(_NORMAL * float((logs - middle).abs().quantile(0.5)), floor)
    for i, value in zip(kept, logs.tolist(), strict=True):
        score = (value - middle) / deviation
        if score > limit or (small and score < -limit):
            ratio = math.exp(value - middle)
            found[i] = f"its norm is {ratio:.3g} times the median, {abs(score):.1f} deviations away", score
    if small:
        for i in set(range(len(cohort))) - set(kept) - set(found):
            found[i] = "it is zero", -math.inf
    return found


@rule("screen", traits=("direction",))
def cosine(cohort: Cohort, state: ServerState, *, least: Annotated[float, Field(ge=-1, lt=1)] = 0.0) -> Found:
    """Rows whose cosine with the coordinate-wise median of the cohort is below `least`. A zero row has cosine 0.

    It looks at directions alone: put `norm_mad` beside it, as one row that is long enough moves a mean anywhere.
    """
    found = _not_finite(cohort)
    kept = [i for i in range(len(cohort)) if i not in found]
    if not kept:
        return found
    median = order.trimmed_mean(cohort.U, (len(kept) - 1) // 2, kept)
    length = math.sqrt(distance.sq_norm(median))
    inner = distance.along(cohort.U, median / length if length > 0 else median).tolist()
    for i in kept:
        norm = float(cohort.norm[i])
        score = inner[i] / norm if norm > 0 and length > 0 else 0.0
        if not score >= least:
            found[i] = f"its cosine with the median is {score:.3f}, below {least:g}", score
    return found


@rule(
    "screen",
    needs=lambda f, share, repeats: max(math.ceil(share * f) * repeats, 2 * f) + 1,
    leaves=lambda rows, f, share, repeats: rows - math.ceil(share * f) * repeats,
)
def dnc(
    cohort: Cohort,
    state: ServerState,
    *,
    f: Annotated[int, Field(ge=0)],
    share: Positive = 1.0,
    repeats: Annotated[int, Field(ge=1)] = 1,
) -> Found:
    """The share * f rows that lie farthest out along the cohort's first principal direction, `repeats` times over.

    Divide and conquer (Shejwalkar and Houmansadr 2021), over all columns where the paper samples some: the direction
    comes from the rows' distances, so nothing is drawn. Each repeat refuses again among those that are left. It refuses
    so many whoever is hostile, and nobody where all rows agree.
    """
    found = _not_finite(cohort)
    cut = math.ceil(share * f)
    for _ in range(repeats):
        kept = [i for i in range(len(cohort)) if i not in found]
        if cut == 0 or len(kept) <= cut:
            break
        D = cohort.sq_distances.cpu()[kept][:, kept]
        mean = D.mean(1)
        values, vectors = torch.linalg.eigh((mean[:, None] + mean[None, :] - D.mean() - D) / 2)
        outlying = vectors[:, -1].square() * values[-1].clamp(min=0)
        typical = float(outlying.mean())
        if not typical > 0:
            break
        for i in outlying.sort(descending=True, stable=True).indices[:cut].tolist():
            score = float(outlying[i]) / typical
            found[kept[i]] = f"it lies {score:.1f} times as far out as the mean row along the main direction", score
    return found


@rule("screen", needs=lambda: 3, traits=("direction", "majority"))
def flame(cohort: Cohort, state: ServerState) -> Found:
    """Rows outside the majority's cluster by direction: HDBSCAN over cosine distances (Nguyen et al. 2022, FLAME).

    Clusters have at least n / 2 + 1 rows, as in the paper. For its clipping put the mixer norm_cap() after it; its
    noise is a matter of privacy. Zero rows have no direction and are refused. It may refuse up to half of an honest
    cohort: where all rows lie about equally far apart, the densest majority is a matter of chance.
    """
    found = _not_finite(cohort)
    found |= {i: ("it is zero", 0.0) for i in range(len(cohort)) if i not in found and float(cohort.norm[i]) == 0}
    kept = [i for i in range(len(cohort)) if i not in found]
    if len(kept) < 3:
        return found
    apart = (1 - distance.cosines(cohort.U, cohort.norm, kept)).fill_diagonal_(0).cpu().numpy()
    inside = _majority(apart)
    if not inside:
        return found
    for k in sorted(set(range(len(kept))) - set(inside)):
        score = float(apart[k, inside].mean())
        found[kept[k]] = f"its direction is outside the majority's cluster, at cosine distance {score:.3f}", score
    return found


def _majority(apart: NDArray[np.float64]) -> list[int]:
    """The rows of the one cluster that more than half of them can make, by their distances (n, n)."""
    before = random.getstate()
    from sklearn.cluster import HDBSCAN  # importing it draws from the global generator

    random.setstate(before)
    settings = {"min_samples": 1, "metric": "precomputed", "allow_single_cluster": True, "copy": True}
    clusters = HDBSCAN(min_cluster_size=len(apart) // 2 + 1, **settings).fit_predict(np.ascontiguousarray(apart))
    return [i for i, cluster in enumerate(clusters) if cluster >= 0]


def _not_finite(cohort: Cohort) -> Found:
    return {i: (_NO_NUMBER, math.nan) for i, norm in enumerate(cohort.norm.tolist()) if not math.isfinite(norm)}
