"""Screens: admitted rows against each other, `(cohort, state) -> {row: (reason, score)}`; who is named is refused.

A row that is not finite is refused by every screen. Scores are scale-free, so that thresholds mean the same at every
learning rate. A screen registered with `init` is stateful: `(cohort, state, kept) -> (found, kept)`, kept a mapping of
names to vectors; that of a round which is skipped is dropped. Traits: "length" (refuses rows that are far too long),
"direction" (refuses rows that point against the others), "majority" (keeps the densest majority, and may refuse all
others, honest ones too), "server_data" (asks the cohort's referee: its scores are losses, and not scale-free).
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from fedkeel.core.registry import rule
from fedkeel.core.types import Cohort, ServerState
from fedkeel.kernels import distance, order, sketch

Found = dict[int, tuple[str, float]]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_ROUNDING = 1e-6  # of a loss
_LEAST_VARIANCE = 1e-300
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
    middle, deviation = order.usual(logs)
    deviation = max(deviation, floor)
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


@rule("screen")
def near_duplicates(
    cohort: Cohort, state: ServerState, *, ratio: Annotated[float, Field(gt=0, lt=1)] = 0.25, limit: Positive = 8.0
) -> Found:
    """All but one of the rows that are copies of one another: nearer than `ratio` times what is usual in the cohort.

    What is usual is the median distance of a row to its nearest other; a copy must also be `limit` median absolute
    deviations nearer, or nearer than a tenth of `ratio` (sybils send like rows: Fung et al. 2020). Of copies the client
    whose id sorts first stays, so they count once; as nobody can tell whose the original is, a quarantine does not
    count these refusals. Where half of the rows or more are copies nothing is usual, and nobody is refused.
    """
    found = _not_finite(cohort)
    kept = [i for i in range(len(cohort)) if i not in found]
    if len(kept) < 4:
        return found
    D = cohort.sq_distances.cpu()[kept][:, kept].sqrt().fill_diagonal_(math.inf)
    nearest = D.min(1).values
    usual, spread = order.usual(nearest)
    near = (ratio * usual > D) & ((usual - limit * spread > D) | (0.1 * ratio * usual > D))
    for k in sorted(range(len(kept)), key=lambda k: cohort.client[kept[k]], reverse=True):
        twins = [j for j in torch.nonzero(near[k]).flatten().tolist() if kept[j] not in found]
        if twins:
            first = min(twins, key=lambda j: cohort.client[kept[j]])
            score = float(D[k, first]) / usual
            found[kept[k]] = f"it is a near copy of {cohort.client[kept[first]]}'s: {score:.3g} of a usual gap", score
    return found


@rule("screen", traits=("server_data",))
def loss_gain(cohort: Cohort, state: ServerState, *, limit: Positive = 6.0) -> Found:
    """Rows after which the server's own examples lose more than `limit` deviations beyond the cohort's median.

    The score is Zeno's descent score without its penalty (Xie, Koyejo and Gupta 2019): the loss before a row less the
    loss after it. A deviation is 1.4826 times the median absolute deviation. Costs a pass over the server's examples
    for each row.
    """
    found = _not_finite(cohort)
    kept = [i for i in range(len(cohort)) if i not in found]
    if not kept:
        return found
    models = (state.theta, *(state.theta + cohort.U[i] for i in kept))
    before, *after = cohort.own_examples.judge(models).loss.tolist()
    finite = torch.tensor([loss for loss in after if math.isfinite(loss)], dtype=torch.float64)
    if not len(finite):
        return found | dict.fromkeys(kept, ("the loss after it is no number", -math.inf))
    middle, deviation = order.usual(finite)
    for i, loss in zip(kept, after, strict=True):
        if not loss <= middle + limit * deviation + _ROUNDING * abs(middle):
            gain = before - loss if math.isfinite(loss) else -math.inf
            found[i] = f"the server's loss after it is {loss:.4g}, {middle:.4g} is usual", gain
    return found


@rule("screen")
def gradient_variance(cohort: Cohort, state: ServerState, *, limit: Positive = 4.0) -> Found:
    """Rows whose variance within each tensor is `limit` deviations from what is usual, on the mean of all tensors.

    A deviation is 1.4826 times the median absolute deviation of the cohort's log variances, at least 0.1; the row's
    overall scale is left out, which norm_mad() looks at. So noise of an honest length shows, and so do rows with
    one layer exchanged.
    """
    found = _not_finite(cohort)
    kept = [i for i in range(len(cohort)) if i not in found and float(cohort.norm[i]) > 0]
    layers = [part for part in cohort.layers if part.stop - part.start > 1]
    if len(kept) < 3 or len(layers) < 2:
        return found
    logs = torch.empty(len(kept), len(layers), dtype=torch.float64)
    for j, part in enumerate(layers):
        for k, i in enumerate(kept):
            logs[k, j] = float((cohort.U[i, part].double() / cohort.norm[i]).var()) + _LEAST_VARIANCE
    logs.log_()
    off = (logs - logs.quantile(0.5, dim=0)).abs()
    scores = (off / (order.NORMAL * off.quantile(0.5, dim=0)).clamp(min=0.1)).mean(1)
    for i, score in zip(kept, scores.tolist(), strict=True):
        if score > limit:
            found[i] = f"its variances by layer are {score:.1f} deviations from what is usual", score
    return found


@rule("screen", init=lambda **_: {})
def forecast(
    cohort: Cohort,
    state: ServerState,
    kept: Mapping[str, Tensor],
    *,
    limit: Positive = 5.0,
    memory: Annotated[float, Field(gt=0, lt=1)] = 0.5,
) -> tuple[Found, Mapping[str, Tensor]]:
    """Rows far from what their clients sent before: `limit` deviations above the cohort's median distance.

    In the manner of FLANDERS (Gabrielli et al. 2023): a client's next row is forecast by the moving average of its
    past ones (`memory` of it is the past), here of their sketches; the paper's forecast is autoregressive. A client
    without a past is not judged, so who is hostile from the first round on is only seen to change. What is refused is
    not learned.
    """
    found = _not_finite(cohort)
    rows = [i for i in range(len(cohort)) if i not in found]
    kept = sketch.keyed(kept, cohort.key.fold("sketch").value)
    short = sketch.sketch(cohort.U, kept)
    known = [i for i in rows if cohort.client[i] in kept]
    if len(known) >= 3:
        gaps = torch.tensor([float((short[i] - kept[cohort.client[i]]).norm()) for i in known], dtype=torch.float64)
        logs = gaps.clamp(min=_LEAST_VARIANCE).log()
        middle, deviation = order.usual(logs)
        deviation = max(deviation, 0.1)
        for i, value in zip(known, logs.tolist(), strict=True):
            score = (value - middle) / deviation
            if score > limit:
                away = math.exp(value - middle)
                found[i] = f"it is {away:.3g} times as far from its client's past as usual", score
    news = {cohort.client[i]: short[i] for i in rows if i not in found}
    past = {c: memory * kept[c] + (1 - memory) * row if c in kept else row for c, row in news.items()}
    return found, {**kept, **past}


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
