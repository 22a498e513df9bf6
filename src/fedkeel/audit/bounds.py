"""Lower bounds on epsilon from what a distinguisher got right. Pure functions of counts and scores.

A mechanism is (epsilon, delta)-private when no event is e^epsilon times as likely with somebody's data as without, but
for delta. So an attack that succeeds too often refutes a claim, with a confidence that depends on its trials alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
MOST = 200.0
"""Beyond this an epsilon is not told apart from any other: e^200 to 1."""
_CANDIDATES = 400  # thresholds that are tried
_PROMISE = 0.025  # what the limits leave by which a threshold is chosen, at every confidence the same


class Counts(NamedTuple):
    """What a distinguisher said in independent trials: how often "in", of those with and of those without."""

    true_positives: int
    inside: int
    false_positives: int
    outside: int


class Bound(NamedTuple):
    """A lower bound on epsilon at a confidence. `gaussian` supposes that the noise is Gaussian, `epsilon` nothing."""

    confidence: float
    epsilon: float
    gaussian: float


def clopper_pearson(hits: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """The exact interval of a share, of so many hits in so many trials (Clopper & Pearson 1934); [0, 1] of none."""
    if not trials:
        return 0.0, 1.0
    tail = (1 - confidence) / 2
    return 1 - float(_upper(trials - hits, trials, tail)), float(_upper(hits, trials, tail))


def _upper(hits: ArrayLike, trials: int, tail: float) -> Any:
    """What a share exceeds with probability `tail` at most, one-sided."""
    from scipy.special import betaincinv

    hits = np.asarray(hits, dtype=np.float64)
    return np.where(hits < trials, betaincinv(hits + 1, np.maximum(trials - hits, 0.5), 1 - tail), 1.0)


def from_counts(counts: Counts, delta: float, confidence: float = 0.95) -> Bound:
    """The bound that counts give (Jagielski, Ullman & Oprea 2020; Nasr et al. 2021).

    FPR and FNR each get half of what the confidence leaves, and what (epsilon, delta) says of every test is solved for
    epsilon: FPR >= (1 - delta - FNR) e^-epsilon, and the same with the two exchanged. `gaussian` asks which mu-GDP the
    two refute, and for its epsilon at delta (Nasr et al. 2023): far tighter, where the mechanism is Gaussian.
    """
    tail = (1 - confidence) / 2
    epsilon, mu = _of_rates(
        _upper(counts.false_positives, counts.outside, tail),
        _upper(counts.inside - counts.true_positives, counts.inside, tail),
        delta,
    )
    return Bound(confidence, float(epsilon), gaussian_epsilon(float(mu), delta))


def _of_rates(fpr: Floats, fnr: Floats, delta: float) -> tuple[Floats, Floats]:
    """The epsilon and the mu that upper limits of both rates refute; 0 where they refute none."""
    from scipy.special import ndtri

    with np.errstate(divide="ignore", invalid="ignore"):
        either = [np.log(np.maximum(1 - delta - a, 0.0) / b) for a, b in ((fnr, fpr), (fpr, fnr))]
    mu = ndtri(1 - fpr) - ndtri(fnr)
    return np.maximum(np.maximum(*either), 0.0), np.maximum(np.nan_to_num(mu, nan=0.0, neginf=0.0), 0.0)


def from_scores(inside: ArrayLike, outside: ArrayLike, delta: float, confidence: float = 0.95) -> Bound:
    """The bound that scores of independent trials give, higher saying "in".

    Thresholds are chosen on the first half of each and judged on the second, so that the choice costs no confidence:
    for `epsilon` the one that promises most, for `gaussian` the median, where a normal's rates say most of its mean.
    """
    inside, outside = np.asarray(inside, dtype=np.float64), np.asarray(outside, dtype=np.float64)
    (tried, judged), (tried_out, judged_out) = _halves(inside), _halves(outside)
    both = np.concatenate([tried, tried_out])
    values = np.unique(both)
    if len(values) < 2 or not len(judged) or not len(judged_out):
        return Bound(confidence, 0.0, 0.0)
    places = np.unique(np.linspace(0, len(values) - 2, _CANDIDATES).astype(int))
    thresholds = (values[places] + values[places + 1]) / 2
    fnr = _upper(np.searchsorted(np.sort(tried), thresholds, "right"), len(tried), _PROMISE)
    fpr = _upper(len(tried_out) - np.searchsorted(np.sort(tried_out), thresholds, "right"), len(tried_out), _PROMISE)
    best = float(thresholds[int(np.argmax(_of_rates(fpr, fnr, delta)[0]))])
    found = [
        from_counts(
            Counts(int((judged > at).sum()), len(judged), int((judged_out > at).sum()), len(judged_out)),
            delta,
            confidence,
        )
        for at in (best, float(np.median(both)))
    ]
    return Bound(confidence, found[0].epsilon, found[1].gaussian)


def _halves(scores: Floats) -> tuple[Floats, Floats]:
    half = len(scores) // 2
    return scores[:half], scores[half:]


def one_run_p(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """How likely so many correct guesses are at most, if one run is (epsilon, delta)-private.

    Each of `canaries` is in the run or out of it by its own fair coin; of them `guesses` were guessed, `correct` of
    them rightly (Steinke, Nasr & Jagielski 2023, theorem 5.2): with W binomial of guesses draws at
    e^epsilon / (1 + e^epsilon) and f(v) = P[W >= v], it is f(v) + 2 m delta max_i (f(v - i) - f(v)) / i.
    """
    from scipy.stats import binom

    if not 0 <= correct <= guesses <= canaries:
        raise ValueError(f"{correct} correct of {guesses} guesses of {canaries} canaries")
    chance = 1 / (1 + math.exp(-epsilon))
    beyond = float(binom.sf(correct - 1, guesses, chance))
    if not delta or not correct:
        return min(1.0, beyond)
    steps = np.arange(1, correct + 1)
    slack = np.cumsum(binom.pmf(correct - steps, guesses, chance)) / steps
    return min(1.0, beyond + 2 * canaries * delta * float(slack.max()))


def one_run(canaries: int, guesses: int, correct: int, delta: float, confidence: float = 0.95) -> float:
    """The lower bound on epsilon that guesses of one run give: the largest one that they refute."""
    return _largest(lambda e: one_run_p(canaries, guesses, correct, e, delta) <= 1 - confidence)


def gaussian_epsilon(mu: float, delta: float) -> float:
    """The epsilon at delta of a Gaussian mechanism with sensitivity mu times its noise (Balle & Wang 2018, theorem 8).

    That is what mu-GDP comes to (Dong, Roth & Su 2022, corollary 2.13); `MOST` where delta can not be reached.
    """
    from scipy.special import log_ndtr

    def reached(epsilon: float) -> float:
        below, above = log_ndtr(mu / 2 - epsilon / mu), log_ndtr(-mu / 2 - epsilon / mu)
        return math.exp(below) - math.exp(epsilon + above)

    if mu <= 0:
        return 0.0
    return _largest(lambda e: reached(e) > delta) if math.isfinite(mu) else MOST


def _largest(holds: Callable[[float], bool]) -> float:
    """The largest epsilon at which `holds`, by bisection; 0 where it does nowhere, `MOST` where it does everywhere."""
    low, high = 0.0, 1.0
    if not holds(0.0):
        return 0.0
    while holds(high):
        low, high = high, 2 * high
        if low >= MOST:
            return MOST
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
