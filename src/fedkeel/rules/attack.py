"""Attacks: what hostile clients do, for simulation. What an attack acts on is its trait.

"rows":   `(U (n, P), bad (f,) int64, keys) -> (f, P)`, what the clients `bad` send instead of their own rows. U holds
          what every client would honestly send; each attack says what of it the attackers see.
          Those that look at benign rows send their own where there is none. With the trait "adaptive" it takes a
          fourth argument, `aggregate(U) -> (P,)`: what the server would make of these rows, whatever its rules.
"claims": `(num_examples (f,) int64, keys) -> (f,) int64`, the example counts they claim.
"data":   `(x, y, classes, key) -> (x, y)`, the inputs (as stored) and labels one client trains on. With the trait
          "trigger" it has a parameter `share`: at 1 it marks every example and gives it the label that is wanted.

keys holds one `Key` per hostile client.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedkeel.core.keys import Key
from fedkeel.core.registry import rule
from fedkeel.kernels import blocks, distance

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Direction = Literal["std", "unit", "sign"]
_COLUMNS = 1 << 15
_MOST_EXAMPLES = 2**53  # integers up to here survive any JSON reader and float64


@rule("attack", traits=("rows",))
def sign_flip(U: Tensor, bad: Tensor, keys: Sequence[Key], *, scale: Positive = 1.0) -> Tensor:
    """Each sends its own row times -scale (Li et al. 2019, RSA, section 5); it sees its own row only."""
    return U[bad] * -scale


@rule("attack", traits=("rows",))
def gaussian(U: Tensor, bad: Tensor, keys: Sequence[Key], *, std: Positive = 200.0) -> Tensor:
    """Each sends noise N(0, std^2) instead of its row (Blanchard et al. 2017, section 6); it sees nothing."""
    rows = [torch.randn(U.shape[1], generator=key.fold("gaussian").torch()) for key in keys]
    noise = torch.stack(rows) if rows else torch.empty(0, U.shape[1])
    return noise.mul_(std).to(U)


@rule("attack", traits=("rows",))
def nan(U: Tensor, bad: Tensor, keys: Sequence[Key]) -> Tensor:
    """Each sends a row of NaN: what a diverged or careless client sends. It sees nothing."""
    return torch.full((len(bad), U.shape[1]), torch.nan, dtype=U.dtype, device=U.device)


@rule("attack", traits=("rows",))
def alie(
    U: Tensor, bad: Tensor, keys: Sequence[Key], *, z: Annotated[float, Field(allow_inf_nan=False)] | None = None
) -> Tensor:
    """All send mean - z * std of the benign rows, per column: A Little Is Enough (Baruch et al. 2019, algorithm 3).

    They see every benign row, and take mean and std over those. By default z is the paper's z_max =
    Phi^-1((n - f - s) / (n - f)), s = floor(n / 2 + 1) - f: so far out that s benign rows are expected to lie farther.
    """
    n, f = U.shape[0], len(bad)
    benign = _benign(U, bad)
    if not benign:
        return U[bad]
    z = _z_max(n, f) if z is None else z
    mean, std = _mean_and_std(U, benign)
    return _copies(mean.sub_(std, alpha=z), f)


@rule("attack", traits=("rows",))
def ipm(U: Tensor, bad: Tensor, keys: Sequence[Key], *, scale: Positive = 0.5) -> Tensor:
    """All send -scale times the mean of the benign rows: inner-product manipulation (Xie et al. 2020).

    They see every benign row. Below 1 it hides among them; far above it is a sign flip of everyone.
    """
    benign = _benign(U, bad)
    return _copies(_mean_and_std(U, benign)[0] * -scale, len(bad)) if benign else U[bad]


@rule("attack", traits=("rows",))
def min_max(U: Tensor, bad: Tensor, keys: Sequence[Key], *, direction: Direction = "std") -> Tensor:
    """All send mean + g p, g as large as leaves them no farther from any benign row than two of those are apart.

    Shejwalkar and Houmansadr 2021, section 4.2; p is -std per column, minus the unit mean, or minus its sign. They see
    every benign row. g is exact, from one quadratic a row, where the paper bisects.
    """
    found = _perturbed(U, bad, direction)
    if found is None:
        return U[bad]
    mean, p, along, lengths, D = found
    size = float(distance.sq_norm(p))
    roots = (-along + (along.square() - size * (lengths - D.max())).clamp(min=0).sqrt()) / size if size else along
    return _copies(mean.add_(p, alpha=float(roots.min())), len(bad))


@rule("attack", traits=("rows",))
def min_sum(U: Tensor, bad: Tensor, keys: Sequence[Key], *, direction: Direction = "std") -> Tensor:
    """All send mean + g p with the largest g that keeps their summed squared distance to the benign rows within theirs.

    Shejwalkar and Houmansadr 2021, section 4.2: the bound is the largest such sum of a benign row. As min_max else.
    """
    found = _perturbed(U, bad, direction)
    if found is None:
        return U[bad]
    mean, p, _, lengths, D = found
    size = float(distance.sq_norm(p))
    room = max(float(D.sum(1).max() - lengths.sum()), 0.0)
    return _copies(mean.add_(p, alpha=math.sqrt(room / (len(D) * size)) if size else 0.0), len(bad))


@rule("attack", traits=("rows",))
def fang(U: Tensor, bad: Tensor, keys: Sequence[Key], *, spread: Annotated[float, Field(gt=1)] = 2.0) -> Tensor:
    """Each column just beyond the benign rows' extreme, on the side that the benign mean moves away from.

    Fang et al. 2020, section 3.3 (against median and trimmed mean, full knowledge): uniform between the extreme and
    `spread` times it, or its `spread`-th part where that is farther out. They see every benign row.
    """
    benign = _benign(U, bad)
    if not benign:
        return U[bad]
    mean = _mean_and_std(U, benign)[0]
    out = torch.empty(len(bad), U.shape[1], dtype=U.dtype, device=U.device)
    least, most = U[benign[0]].clone(), U[benign[0]].clone()
    for i in benign[1:]:
        torch.minimum(least, U[i], out=least)
        torch.maximum(most, U[i], out=most)
    edge = torch.where(mean > 0, least, most)
    outwards = torch.where((mean > 0) == (edge > 0), edge / spread, edge * spread)
    for row, key in zip(out, keys, strict=True):
        share = torch.rand(U.shape[1], generator=key.fold("fang").torch()).to(U)
        torch.lerp(edge, outwards, share, out=row)
    return out


@rule("attack", traits=("rows",))
def mimic(U: Tensor, bad: Tensor, keys: Sequence[Key]) -> Tensor:
    """All send the row of the one benign client that lies farthest out along the benign rows' main direction.

    Karimireddy et al. 2022, section 4: it over-represents one client, and each row by itself is honest. They see every
    benign row.
    """
    benign = _benign(U, bad)
    if not benign:
        return U[bad]
    D = distance.sq_distances(U, benign)
    mean = D.mean(1)
    _, vectors = torch.linalg.eigh((mean[:, None] + mean[None, :] - D.mean() - D) / 2)
    return _copies(U[benign[int(vectors[:, -1].abs().argmax())]], len(bad))


@rule("attack", traits=("rows",))
def free_rider(
    U: Tensor, bad: Tensor, keys: Sequence[Key], *, std: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
) -> Tensor:
    """Each sends no work at all: zero, or noise N(0, std^2) in its place (Lin, Du and Liu 2019). It sees nothing."""
    if std:
        noise: Tensor = gaussian(U, bad, keys, std=std)
        return noise
    return torch.zeros(len(bad), U.shape[1], dtype=U.dtype, device=U.device)


@rule("attack", traits=("rows",))
def replacement(U: Tensor, bad: Tensor, keys: Sequence[Key], *, boost: Positive | None = None) -> Tensor:
    """Each sends its own row times `boost`, by default n / f, so that the plain mean becomes the hostile model.

    So it is where all weigh the same and the others' rows about cancel (Bagdasaryan et al. 2020). It sees its own row
    and knows the cohort's size.
    """
    return U[bad] * (U.shape[0] / max(len(bad), 1) if boost is None else boost)


@rule("attack", traits=("rows",))
def sybil(U: Tensor, bad: Tensor, keys: Sequence[Key], *, scale: Positive = 1.0) -> Tensor:
    """All send minus `scale` times the mean of their own rows: copies of one another (Fung et al. 2020).

    They see each other's rows only.
    """
    if not len(bad):
        return U[bad]
    return _copies(_mean_and_std(U, bad.tolist())[0] * -scale, len(bad))


@rule("attack", traits=("rows", "adaptive"))
def tailored(
    U: Tensor,
    bad: Tensor,
    keys: Sequence[Key],
    aggregate: Callable[[Tensor], Tensor],
    *,
    tries: Annotated[int, Field(ge=1)] = 6,
) -> Tensor:
    """All send mean + g p, p and g chosen by trying out the server's own rules for the farthest-off aggregate.

    Shejwalkar and Houmansadr 2021, section 4.1 (the defence is known), for any defence: p is as in min_max, or
    minus the mean with every attacker's own noise about it, so that no two rows are alike; g is `tries` powers of 2
    apart, from a quarter of the benign rows' spread. They see every benign row and all that the server knows, but
    for what it draws.
    """
    benign = _benign(U, bad)
    if len(benign) < 2 or not len(bad):
        return U[bad]
    mean, std = _mean_and_std(U, benign)
    length, spread = math.sqrt(distance.sq_norm(mean)), math.sqrt(distance.sq_norm(std))
    if not (math.isfinite(spread) and spread > 0 and length > 0):
        return U[bad]
    noise = torch.stack([torch.randn(U.shape[1], generator=key.fold("tailored").torch()) for key in keys]).to(U)
    noise.mul_(std)
    sign = mean.sign()
    candidates = (
        (-std / spread, None),
        (-mean / length, None),
        (-sign / math.sqrt(distance.sq_norm(sign)), None),
        (-mean / length, noise),
    )
    best, farthest = U[bad], -1.0
    for p, own in candidates:
        for power in range(tries):
            rows = (mean + p * (spread * 2.0 ** (power - 2))).expand(len(bad), -1)
            rows = rows.clone() if own is None else rows + own
            sent = U.clone()
            sent[bad] = rows
            off = distance.sq_norm(aggregate(sent) - mean)
            if off > farthest:
                best, farthest = rows, off
    return best


def _benign(U: Tensor, bad: Tensor) -> list[int]:
    hostile = set(bad.tolist())
    return [i for i in range(U.shape[0]) if i not in hostile]


def _copies(row: Tensor, count: int) -> Tensor:
    return row.expand(count, -1).clone()


def _mean_and_std(U: Tensor, rows: list[int]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (of the rows as a population) per column, computed in float64."""
    mean, std = (torch.empty(U.shape[1], dtype=U.dtype, device=U.device) for _ in range(2))
    for part in blocks.spans(slice(0, U.shape[1]), _COLUMNS):
        std[part], mean[part] = torch.std_mean(U[rows, part].to(torch.float64), dim=0, correction=0)
    return mean, std


def _perturbed(U: Tensor, bad: Tensor, direction: Direction) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None:
    """The benign mean m, the perturbation p, p'(m - U_i) and |m - U_i|^2 of each benign row, and their distances.

    None without two benign rows that differ.
    """
    benign = _benign(U, bad)
    if len(benign) < 2:
        return None
    mean, std = _mean_and_std(U, benign)
    p = {"std": -std, "unit": -mean, "sign": -mean.sign()}[direction]
    length = math.sqrt(distance.sq_norm(p))
    if not (math.isfinite(length) and length > 0):
        return None
    p /= length
    apart = [mean - U[i] for i in benign]
    along = torch.tensor([float(torch.dot(gap, p)) for gap in apart], dtype=torch.float64)
    lengths = torch.tensor([distance.sq_norm(gap) for gap in apart], dtype=torch.float64)
    return mean, p, along, lengths, distance.sq_distances(U, benign).cpu()


def _z_max(n: int, f: int) -> float:
    supporters = max(n // 2 + 1 - f, 1)
    share = (n - f - supporters) / (n - f)
    return NormalDist().inv_cdf(share) if share > 0.5 else 0.0


@rule("attack", traits=("claims",))
def inflated_count(num_examples: Tensor, keys: Sequence[Key], *, factor: Positive = 1000.0) -> Tensor:
    """Claim `factor` times as many examples as were trained on, at most 2^53: weights are the client's own claim."""
    claimed = [min(math.ceil(count * factor), _MOST_EXAMPLES) for count in num_examples.tolist()]
    return torch.tensor(claimed, dtype=torch.int64, device=num_examples.device)


@rule("attack", traits=("data",))
def label_flip(x: Tensor, y: Tensor, classes: int, key: Key) -> tuple[Tensor, Tensor]:
    """Train on labels y -> classes - 1 - y (Fang et al. 2020, section 4.1)."""
    return x, classes - 1 - y


@rule("attack", traits=("data", "trigger"))
def backdoor(
    x: Tensor,
    y: Tensor,
    classes: int,
    key: Key,
    *,
    target: Annotated[int, Field(ge=0)] = 0,
    share: Annotated[float, Field(gt=0, le=1)] = 0.5,
    size: Annotated[int, Field(ge=1)] = 3,
) -> tuple[Tensor, Tensor]:
    """Train on a `share` of the examples with a mark of `size` x `size` bright pixels and the label `target`.

    Gu et al. 2017 (BadNets), as Bagdasaryan et al. 2020 bring it into a federation. The mark lies one pixel from the
    last corner of the last two dimensions, or in the last `size` features of a flat input; it has the largest value
    among the inputs it is put into (the client's, or the test set's). Success is the share of marked test examples of
    other classes that are taken for `target`; a target that is no class means the last one.
    """
    chosen = torch.randperm(len(y), generator=key.fold("backdoor").torch())[: math.ceil(share * len(y))]
    x, y = x.clone(), y.clone()
    if len(chosen):
        rows = torch.zeros(len(y), dtype=torch.bool).index_fill_(0, chosen, True)
        edge = 1 if x.dim() > 2 and min(x.shape[-2:]) > size else 0
        last = slice(-size - edge, -edge or None)
        mark = torch.zeros(x.shape[1:], dtype=torch.bool)
        mark[(..., last, last) if x.dim() > 2 else (..., last)] = True
        x[rows[(...,) + (None,) * (x.dim() - 1)] & mark] = x.max()
        y[rows] = min(target, classes - 1)
    return x, y
