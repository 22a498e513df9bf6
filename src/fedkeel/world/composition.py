"""`aggregate.reduce = "auto"`: rules that are known to be sound for so many hostile clients, and why."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedkeel.config import Aggregate, Job
from fedkeel.core.errors import InputError

AUTO = "auto"
RISK = 1e-3
LEAST_EXAMPLES = 100
"""Examples of its own from which on a server judges with them."""
MOST_TRIMMED = 0.2
"""Share of the weight that is trimmed at each end beside learned weights, at most: enough against a fifth's mark."""
ALIKE = 0.15
"""Mean total variation between a client's label shares and all clients', up to which their data counts as alike."""


def hostile_in_cohort(hostile: int, clients: int, cohort: int, rounds: int) -> int:
    """How many hostile clients to allow for in a round: more come in one of all rounds with probability `RISK` at most.

    Cohorts are drawn without replacement, so their number is hypergeometric.
    """
    from scipy.stats import hypergeom

    if cohort == clients:
        return hostile
    return min(hostile, int(hypergeom.isf(RISK / rounds, clients, hostile, cohort)))


def heterogeneity(histogram: Tensor) -> float:
    """Mean total variation distance, 0 to 1, of the clients' label shares from those of all: counts (clients, C)."""
    counts = histogram.to(torch.float64)
    counts = counts[counts.sum(1) > 0]
    shares, whole = counts / counts.sum(1, keepdim=True), counts.sum(0) / counts.sum()
    return float((shares - whole).abs().sum(1).mean() / 2)


def choose(job: Job, histogram: Tensor | None = None) -> tuple[Aggregate, str]:
    """The [aggregate] section that "auto" stands for, and why in a sentence.

    Raises `InputError` where the job names rules beside it, or expects more hostile clients than any rule withstands.
    """
    section = job.aggregate
    named = [key for key in ("screens", "weigh", "mix") if getattr(section, key) != getattr(Aggregate(), key)]
    if named:
        raise InputError(f"aggregate.reduce = 'auto' chooses aggregate.{named[0]} itself: leave out one of the two")
    n, clients = job.cohort, job.data.clients
    hostile = clients // 5 if section.hostile is None else section.hostile
    if hostile > clients:
        raise InputError(f"aggregate.hostile = {hostile} is more than data.clients = {clients}: lower it")
    f = hostile_in_cohort(hostile, clients, n, job.rounds)
    drawn = "" if n == clients else f" (of {hostile} among {clients}; more in some round with probability {RISK:g})"
    expected = f"{f} of {n} updates a round may be hostile{drawn}"
    if f == 0:
        return section.model_copy(update={"reduce": "mean"}), f"{expected}: the plain mean"
    if n <= 2 * f:
        raise InputError(
            f"aggregate.hostile = {hostile}: {expected}, and no rule withstands half or more: "
            "lower it, or raise select.cohort"
        )
    if job.server.examples >= LEAST_EXAMPLES:
        rules: dict[str, object] = {
            "screens": ("norm_mad",),
            "weigh": ("learned",),
            "reduce": f"weighted_trimmed_mean(share={min(MOST_TRIMMED, math.ceil(1000 * f / n) / 1000)})",
        }
        why = f"the server's own {job.server.examples} examples tell which rows help; the trim is for backdoors"
    else:
        spread = None if histogram is None else heterogeneity(histogram)
        rules = {"screens": (), "weigh": ("equal",), "mix": (f"nnm(f={f})",), "reduce": f"trimmed_mean(trim={f})"}
        why = (
            f"n > 2 f, and mixing keeps the trimmed mean near the honest one where clients' data differ{_seen(spread)}"
        )
        if spread is not None and spread <= ALIKE:
            rules["mix"] = ()
            why = f"n > 2 f, and the clients' data are alike{_seen(spread)}, so a trimmed mean needs no mixing"
        why += f"; with server.examples = {LEAST_EXAMPLES} or more it would judge by them"
    return section.model_copy(update=rules), f"{expected}: {why}"


def _seen(spread: float | None) -> str:
    return "" if spread is None else f" (label shares are {100 * spread:.0f}% apart)"
