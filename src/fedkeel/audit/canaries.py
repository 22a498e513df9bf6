"""Canaries: updates along directions that nobody else's takes, put into a release and looked for in what comes out.

A release is what an observer sees of a round, `(rows (n, P)) -> (P,)`: clip, sum, noise, divide, as the server does it.
It is called again and again, must draw its noise anew each time, and may not keep its rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fedkeel.audit import bounds
from fedkeel.core.keys import Key
from fedkeel.kernels import distance

Release = Callable[[Tensor], Tensor]
Watch = Callable[[int, int], None]
CONFIDENCES = (0.95, 0.99)
_GUESSED = (0.9, 0.25, 0.0625)
"""Shares of one run's canaries that are guessed: a bound of each, together at the confidence. Never all: coins are not
even, and who must name as many "in" as "out" would be wrong of some."""


class Trials(NamedTuple):
    """Scores of independent releases with the canary and without, and the bounds that they give."""

    inside: list[float]
    outside: list[float]
    bounds: tuple[bounds.Bound, ...]


class OneRun(NamedTuple):
    """Many canaries in one run: their cosines with what it released, and what follows.

    `bounds` are those of Steinke et al. 2023, `estimate` is Andrew et al.'s 2023: no bound, but the epsilon of normals
    as the cosines'.
    """

    inside: list[float]
    outside: list[float]
    correct: int
    guesses: int
    bounds: tuple[bounds.Bound, ...]
    estimate: float


def directions(count: int, columns: int, key: Key) -> Tensor:
    """(count, columns) rows of length 1, each along a direction of its own, drawn evenly from all of them.

    Where columns are many, two of them, or one and an honest row, are all but orthogonal.
    """
    rows = torch.randn(count, columns, generator=key.torch())
    return rows / distance.sq_norms(rows).sqrt().to(rows.dtype)[:, None]


def in_trials(
    release: Release,
    rows: Tensor,
    *,
    norm: float,
    delta: float,
    key: Key,
    trials: int = 1000,
    rounds: int = 1,
    watch: Watch = lambda done, total: None,
) -> Trials:
    """Release the rows (n, P) so often without a canary and so often with one more row, of this norm.

    The score is the inner product with the canary (Nasr et al. 2021), summed over `rounds` releases a trial: what is
    known of a run of so many rounds in which the canary's client takes part.
    """
    canary = directions(1, rows.shape[1], key.fold("canary"))
    joined = torch.cat([rows, norm * canary])
    scores: tuple[list[float], list[float]] = ([], [])
    for trial in range(trials):
        for given, kept in zip((joined, rows), scores, strict=True):
            kept.append(sum(float(release(given).double() @ canary[0].double()) for _ in range(rounds)))
        watch(trial + 1, trials)
    return Trials(*scores, tuple(bounds.from_scores(*scores, delta, c) for c in CONFIDENCES))


def in_one_run(
    release: Release,
    rows: Tensor,
    *,
    norm: float,
    delta: float,
    key: Key,
    canaries: int = 1000,
    rounds: int = 1,
    watch: Watch = lambda done, total: None,
) -> OneRun:
    """Release the rows (n, P) once, or in so many rounds, with canary clients that a fair coin lets in or leaves out.

    A canary whose cosine with the sum of the releases is among the highest is guessed to be in, among the lowest to be
    out. `rounds` releases are summed before.
    """
    vectors = directions(canaries, rows.shape[1], key.fold("canaries"))
    coins = torch.rand(canaries, generator=key.fold("coins").torch()) < 0.5
    joined = torch.cat([rows, norm * vectors[coins]])
    total = torch.zeros(rows.shape[1], dtype=torch.float64)
    for done in range(rounds):
        total += release(joined)
        watch(done + 1, rounds)
    length = math.sqrt(distance.sq_norm(total))
    cosines = vectors.double() @ total / (length or 1.0)
    inside, outside = cosines[coins].tolist(), cosines[~coins].tolist()
    order = torch.argsort(cosines, stable=True)
    tried = []
    for share in _GUESSED:
        each = int(canaries * share / 2)
        low, high = coins[order[:each]], coins[order[canaries - each :]]
        tried.append((2 * each, int((~low).sum() + high.sum())))
    found, best = [], (0, 0)
    for confidence in CONFIDENCES:
        each_at = 1 - (1 - confidence) / len(tried)
        reached = [bounds.one_run(canaries, *guess, delta, each_at) for guess in tried]
        epsilon = max(reached)
        best = tried[reached.index(epsilon)]
        found.append(bounds.Bound(confidence, epsilon, epsilon))
    return OneRun(inside, outside, best[1], best[0], tuple(found), _estimate(inside, rows.shape[1], delta))


def _estimate(cosines: list[float], columns: int, delta: float) -> float:
    """Epsilon between the normal of these cosines and that of a random direction's, N(0, 1 / columns).

    The cosines' own deviation tends to the same 1 / sqrt(columns) (Andrew et al. 2023, theorem 3.3), which is taken for
    it: measured on a few hundred canaries, its error alone would decide the tails.
    """
    mean = sum(cosines) / len(cosines) if cosines else 0.0
    return bounds.gaussian_epsilon(mean * math.sqrt(columns), delta)
