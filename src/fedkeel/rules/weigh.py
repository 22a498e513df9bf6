"""Weighers: what each admitted row counts, `(cohort, state) -> (n,) float64 >= 0`. Weighers multiply; 0 excludes.

A weigher registered with `init` is stateful: `(cohort, state, kept) -> (weights, kept)`, kept a mapping of names to
vectors; that of a round which is skipped is dropped. Traits: "server_data" (asks the cohort's referee), "trust" (keeps
each client's trust under its name, one figure), "per_row" (a row's weight depends on that row alone, so a server may
weigh rows as they come), "by_examples" (by how many examples clients say they have), "absolute" (the step is as long as
its weights are on the mean: a row that is worth little does not weigh more because the others are worth as little). The
hook `most()` is the most that a row can weigh: a weigher per row that has it may stand before noise on a sum.
"""

from __future__ import annotations

import fnmatch
import math
from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedkeel.core.errors import CohortError
from fedkeel.core.registry import rule
from fedkeel.core.types import Cohort, ServerState
from fedkeel.kernels import combine, distance, neighbours, order, sketch

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Kept = Mapping[str, Tensor]
_LEAST = 1e-2  # of the largest weight: less is none
_TINY = 1e-300
_PRIOR = 5.0  # rounds' worth of updates that even_share begins with
_ONE = torch.ones((), dtype=torch.float64)


@rule("weigher", traits=("per_row", "by_examples"), hooks={"most": lambda cap: math.inf if cap is None else float(cap)})
def examples(cohort: Cohort, state: ServerState, *, cap: Annotated[int, Field(ge=1)] | None = None) -> Tensor:
    """The number of examples a client says it trained on (McMahan et al. 2017), at most `cap`.

    It is the client's own claim: without a cap one client can outweigh all others.
    """
    counts = cohort.num_examples.to(torch.float64)
    return counts.clone() if cap is None else counts.clamp(max=cap)


@rule("weigher", traits=("per_row",), hooks={"most": lambda: 1.0})
def equal(cohort: Cohort, state: ServerState) -> Tensor:
    """Every row counts the same."""
    return torch.ones(len(cohort), dtype=torch.float64)


@rule("weigher", traits=("per_row", "absolute"), hooks={"most": lambda **_: 1.0})
def staleness(
    cohort: Cohort,
    state: ServerState,
    *,
    form: Literal["polynomial", "hinge", "constant"] = "polynomial",
    a: Positive = 0.5,
    b: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 4.0,
) -> Tensor:
    """What an update of a model that is s versions old is worth: (1 + s)^-a, or by another form (Xie et al. 2019, 5.2).

    polynomial: (1 + s)^-a, with a = 0.5 FedBuff's. hinge: 1 up to s = b, then 1 / (a (s - b) + 1). constant: 1. The
    step is shortened with the weights (FedBuff divides by the number of updates, FedAsync mixes by alpha s): a buffer
    of which all is stale moves the model less.
    """
    s = cohort.staleness
    if form == "polynomial":
        return (1 + s) ** -a
    return torch.ones_like(s) if form == "constant" else 1 / (a * (s - b).clamp(min=0) + 1)


@rule("weigher", init=lambda **_: {}, traits=("absolute",))
def even_share(
    cohort: Cohort,
    state: ServerState,
    kept: Kept,
    *,
    memory: Annotated[float, Field(ge=0, lt=1)] = 0.98,
    cap: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 10.0,
) -> tuple[Tensor, Kept]:
    """Each class of devices by its part of all clients, over its part of the updates of late: slow ones count as much.

    Where clients answer at their own pace the model leans to fast devices. The updates of about 1 / (1 - memory) rounds
    are counted by class; before there are so many, as if classes had come by their parts. Weights lie between 1 / cap
    and cap. A step to which rare devices came is longer for it: of all steps together every class has its part
    (importance weighting), at the price of steps that vary. Without classes all weigh 1.
    """
    if len(cohort.population) < 2:
        return torch.ones(len(cohort), dtype=torch.float64), kept
    clients, now = sum(cohort.population.values()), state.round
    parts = {name: size / clients for name, size in cohort.population.items()}
    came: dict[str, float] = {}
    for name, part in parts.items():
        count, then = kept[name].tolist() if name in kept else (_PRIOR * len(cohort) * part, now)
        came[name] = float(count * memory ** (now - then))
    total = sum(came.values())
    factors = {
        name: min(max(part * total / came[name], 1 / cap), cap) if came[name] > 0 else cap
        for name, part in parts.items()
    }
    weights = [factors[name] for name in cohort.device]
    counts = Counter(cohort.device)
    found = {name: torch.tensor([came[name] + counts[name], now], dtype=torch.float64) for name in parts}
    return torch.tensor(weights, dtype=torch.float64), found


@rule("weigher")
def device_share(
    cohort: Cohort,
    state: ServerState,
    *,
    shares: Mapping[str, Share] | None = None,
) -> Tensor:
    """What share each group of devices has in the population, as the job declares it: `shares={'phone-*': 0.7}`.

    Groups are patterns of client names, the first that fits counts; a group's share is split evenly among those of its
    clients that are there, so that a group which is selected too rarely weighs what it should (post-stratification).
    A client of no group is left out. Without shares all rows count the same.
    """
    patterns = {"*": 1.0} if shares is None else shares
    group = [next((p for p in patterns if fnmatch.fnmatchcase(name, p)), None) for name in cohort.client]
    members = Counter(group)
    found = [0.0 if p is None else patterns[p] / members[p] for p in group]
    return torch.tensor(found, dtype=torch.float64)


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


@rule("weigher", init=lambda **_: {}, traits=("server_data", "trust"))
def learned(
    cohort: Cohort,
    state: ServerState,
    kept: Kept,
    *,
    keep: Annotated[float, Field(gt=0, le=1)] = 0.5,
    steps: Annotated[int, Field(ge=2)] = 20,
    memory: Annotated[float, Field(ge=0, lt=1)] = 0.5,
) -> tuple[Tensor, Kept]:
    """The weights that make the aggregate best on the server's own examples, smoothed over rounds.

    After Li et al. 2023 (FedLAW), who learn weights on proxy data. What is against hostile rows is ours: the descent
    gives no row more than 1 / (keep n), so `keep` of the rows share it and few examples are not overfitted; a row that
    points against the aggregate gets nothing, and the others share what it had; and `memory` of a client's weight
    comes from the rounds before, so that it takes some rounds to fall, or to rise. Projected
    gradient descent on the mean loss over {w >= 0, sum w = 1, w <= cap}, from the weights kept, in `steps` steps of at
    most 1 / n a row; the mean of the later half counts. The slope is that of theta + sum_i w_i U_i, rows longer than
    the median scaled down to it; a step is taken only if the model that the plan's mixers and reducer make of the new
    weights is no worse, and else halved: rows that the mean would bear may move a trimmed mean. Put the screen
    norm_mad() before it. A step costs a gradient and a loss on the server's examples, a pass over the rows, and the
    mixers and the reducer once.
    """
    n, referee = len(cohort), cohort.own_examples
    rows = _finite(cohort, "learned")
    cap = max(1 / max(math.floor(keep * n), 1), 1 / len(rows))
    scale = torch.zeros(n, dtype=torch.float64)
    scale[rows] = (cohort.norm[rows].median() / cohort.norm[rows]).nan_to_num(nan=1.0).clamp(max=1.0)
    before = torch.zeros(n, dtype=torch.float64)
    before[rows] = _shares(torch.stack([kept.get(cohort.client[i], _ONE) for i in rows]).clamp(min=_LEAST))

    def model(w: Tensor) -> Tensor:
        return combine.weighted_sum(cohort.U, w * scale)

    def loss(w: Tensor) -> float:
        try:
            found = float(referee.judge([state.theta + cohort.reduced(w)]).loss)
        except CohortError:  # too few rows have weight
            return math.inf
        return found if math.isfinite(found) else math.inf

    w, total, size, least, slope = before, torch.zeros_like(before), 1 / n, loss(before), None
    for step in range(steps):
        if slope is None:
            slope = distance.along(cohort.U, referee.gradient(state.theta + model(w))).cpu()[rows] * scale[rows]
            slope -= slope.mean()
            if not bool(torch.isfinite(slope).all()) or not bool(slope.any()):
                break
            slope /= slope.abs().max()
        tried = w.index_copy(0, torch.tensor(rows), _on_capped_simplex(w[rows] - slope * size, cap))
        found = loss(tried)
        if found <= least:
            w, least, slope, size = tried, found, None, min(1.5 * size, 1 / n)
        else:
            size /= 2
        if step >= steps // 2:
            total += w
    w = _shares(total) if bool(total.any()) else w
    for _ in range(2):  # who is left out moves the aggregate
        against = torch.nan_to_num(distance.along(cohort.U, model(w)).cpu()) < 0
        w = _shares(torch.where(against, 0.0, w))
    w = memory * before + (1 - memory) * w
    kept = {**kept, **{cohort.client[i]: w[i] * len(rows) for i in rows}}
    return torch.where(w > _LEAST * w.max(), w, 0.0), kept


@rule("weigher", traits=("server_data",))
def fltrust(cohort: Cohort, state: ServerState) -> Tensor:
    """The cosine of each row with the server's own update, 0 where it is negative (Cao et al. 2021, FLTrust).

    The server's update is the job's local work on the server's examples. The paper scales every row to its norm:
    put the mixer equal_norms() after it, which scales all rows to one. Raises `CohortError` when every weight is 0.
    """
    rows = _finite(cohort, "fltrust")
    own = cohort.own_examples.update(state.theta, cohort.key.fold("fltrust"))
    w = torch.zeros(len(cohort), dtype=torch.float64)
    w[rows] = _cosines_with(cohort, rows, own).clamp(0, 1)
    if not bool(w.any()):
        raise CohortError("fltrust found no row that points the way of the server's own update")
    return w


@rule("weigher", init=lambda **_: {}, traits=("server_data", "trust"))
def trust(
    cohort: Cohort,
    state: ServerState,
    kept: Kept,
    *,
    temperature: Positive = 0.2,
    floor: Positive = 1.0,
    memory: Annotated[float, Field(ge=0, lt=1)] = 0.5,
) -> tuple[Tensor, Kept]:
    """Accuracy gain x similarity / KL divergence, by softmax over the cohort, smoothed over rounds.

    Gain: the accuracy on the server's own examples after a row (less its loss where there are no classes), from 0 for
    the worst row, or four deviations below the median, to 1 for the best. Similarity: the cosine with the
    coordinate-wise median, 0 where negative. KL divergence, in nats and at least `floor`: of the label shares a client
    claims from the cohort's mean (client.labels = true); 1 where a client claims none. At the default floor a claim
    can lower a score and never raise it, as it can not be verified. The score, over the cohort's largest, goes through
    a softmax of `temperature` across the cohort; `memory` of a client's trust comes from the rounds before. 1 is the
    mean trust. Costs a pass over the server's examples for each row.
    """
    rows = _finite(cohort, "trust")
    found = cohort.own_examples.judge(state.theta + cohort.U[i] for i in rows)
    good = torch.where(found.accuracy.isnan(), -found.loss, found.accuracy).nan_to_num(nan=-math.inf)
    score = _gain(good)
    median = order.trimmed_mean(cohort.U, (len(rows) - 1) // 2, rows)
    score = score * _cosines_with(cohort, rows, median).clamp(min=0) / _divergence(cohort, rows).clamp(min=floor)
    score = score / score.max() if float(score.max()) > 0 else torch.ones_like(score)
    now = torch.softmax(score / temperature, 0) * len(rows)
    before = torch.stack([kept.get(cohort.client[i], _ONE) for i in rows])
    w = torch.zeros(len(cohort), dtype=torch.float64)
    w[rows] = memory * before + (1 - memory) * now
    return w, {**kept, **{cohort.client[i]: w[i] for i in rows}}


def _gain(good: Tensor) -> Tensor:
    """Figures to 0..1: the largest is 1; 0 the least, or four deviations below the median where that is more."""
    finite = good[good > -math.inf]
    if not len(finite):
        return torch.ones_like(good)
    middle, deviation = order.usual(finite)
    low = max(float(finite.min()), middle - 4 * deviation) if deviation > 0 else float(finite.min())
    gain = (good - low).clamp(min=0)
    return gain / gain.max() if float(gain.max()) > 0 else torch.ones_like(gain)


def _cosines_with(cohort: Cohort, rows: list[int], direction: Tensor) -> Tensor:
    """Cosines of the picked rows with a direction (P,), float64; 0 where one of the two is zero."""
    lengths = cohort.norm[rows] * math.sqrt(distance.sq_norm(direction))
    along = distance.along(cohort.U, direction).cpu()[rows]
    return torch.where(lengths > 0, along / lengths.clamp(min=_TINY), 0.0)


def _divergence(cohort: Cohort, rows: list[int]) -> Tensor:
    """KL(claimed label shares || the cohort's mean of them) in nats; 1 without a claim, or one of other classes."""
    claimed = [cohort.labels[i] for i in rows]
    classes = max(len(shares) for shares in claimed)
    given = torch.tensor([list(s) for s in claimed if len(s) == classes], dtype=torch.float64)
    mean = given.mean(0).clamp(min=_TINY)
    found = torch.ones(len(rows), dtype=torch.float64)
    for k, shares in enumerate(claimed):
        if classes and len(shares) == classes:
            p = torch.tensor(shares, dtype=torch.float64)
            found[k] = float(torch.special.xlogy(p, p / mean).sum())
    return found


@rule("weigher", init=lambda **_: {})
def foolsgold(cohort: Cohort, state: ServerState, kept: Kept, *, confidence: Positive = 1.0) -> tuple[Tensor, Kept]:
    """Less for rows that go together: 1 less the largest cosine between clients' summed updates (FoolsGold).

    Fung, Yoon and Beschastnikh 2020, algorithm 1, with its pardoning and its logit (`confidence` is kappa), over all
    columns. The sums are kept as sketches of 2,048 columns (kernels/sketch.py), so cosines are off by some 2%. It is
    against many copies only: where clients' data are alike honest rows go together as well, and one row unlike all
    others gets the most weight, whatever it holds. Rows of zero weigh nothing.
    """
    rows = _finite(cohort, "foolsgold")
    kept = sketch.keyed(kept, cohort.key.fold("sketch").value)
    short = sketch.sketch(cohort.U, kept)
    sums = {cohort.client[i]: kept.get(cohort.client[i], torch.zeros_like(short[i])) + short[i] for i in rows}
    S = torch.stack([sums[cohort.client[i]] for i in rows])
    lengths = S.norm(dim=1)
    C = torch.where(lengths[:, None] * lengths > 0, S @ S.T / (lengths[:, None] * lengths).clamp(min=_TINY), 0.0)
    C = C.fill_diagonal_(0.0).clamp(min=0)
    most = C.max(1).values
    pardon = torch.where(most[None] > most[:, None], most[:, None] / most[None].clamp(min=_TINY), 1.0)
    v = torch.where(lengths > 0, (1 - (C * pardon).max(1).values).clamp(0, 1), 0.0)
    v = (v / v.max()).clamp(max=0.99) if float(v.max()) > 0 else torch.full_like(v, 0.5)
    w = torch.zeros(len(cohort), dtype=torch.float64)
    w[rows] = (confidence * (torch.log(v.clamp(min=_TINY) / (1 - v)) + 0.5)).clamp(0, 1)
    return w, {**kept, **sums}


def _finite(cohort: Cohort, name: str) -> list[int]:
    """The rows that are finite. Raises `CohortError` when there are none."""
    rows: list[int] = torch.nonzero(torch.isfinite(cohort.norm)).flatten().tolist()
    if not rows:
        raise CohortError(f"{name} met no row that is finite: put the check 'finite' before it")
    return rows


def _shares(w: Tensor) -> Tensor:
    return w / w.sum()


def _on_capped_simplex(v: Tensor, cap: float) -> Tensor:
    """The nearest point to v (n,) of {w >= 0, sum w = 1, w <= cap}, n cap >= 1: v less a shift, cut at both ends."""
    low, high = float(v.min()) - cap, float(v.max())
    for _ in range(64):  # the sum falls with the shift: halve the interval
        middle = (low + high) / 2
        low, high = (middle, high) if float((v - middle).clamp(0, cap).sum()) > 1 else (low, middle)
    w = (v - low).clamp(0, cap)
    return w / w.sum()


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
