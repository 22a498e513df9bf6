"""Membership inference on a finished model: was this example among those that the clients trained on?

By the loss alone (Yeom et al. 2018), and by its likelihood under shadow federations that did not have the example: the
offline variant of LiRA (Carlini et al. 2022), with the job's own model, rules and rounds.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import functional_call

from fedkeel.audit.bounds import clopper_pearson
from fedkeel.core.keys import Key
from fedkeel.core.types import ClientMemory, RoundReport, ServerState
from fedkeel.sim.simulator import Simulator
from fedkeel.train import ClientData
from fedkeel.train.evaluate import evaluating
from fedkeel.world.evaluation import Z95, Figures
from fedkeel.world.federation import Federation
from fedkeel.world.starting import first_model

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]
OWN_DEVIATION = 32
"""Shadows without an example from which on it has a deviation of its own; with fewer all share one (section VI.C)."""
_BATCH = 500


class Candidates(NamedTuple):
    """All examples there are, as stored, with who holds them, or would in a shadow; and those asked about.

    x (A, ...), y (A,), client (A,) are the federation's own examples, then others. `asked` (N,) are places among them,
    `member` (N,) whether the federation trained on those.
    """

    x: Tensor
    y: Tensor
    client: Tensor
    asked: Tensor
    member: Tensor


class Rate(NamedTuple):
    """The share of members that are told at thresholds with at most so many false alarms, its 95% interval."""

    fpr: float
    tpr: float
    low: float
    high: float


class Membership(NamedTuple):
    """How well a score tells members: AUC with its 95% interval, rates at low FPR, the curve (FPR, TPR)."""

    auc: float
    low: float
    high: float
    rates: tuple[Rate, ...]
    curve: list[tuple[float, float]]


def candidates(federation: Federation, most: int, key: Key) -> Candidates:
    """As many members as others, at most so many of each: training examples of honest clients, the pool's tests.

    Of hostile clients' examples the labels may not be their own.
    """
    data, pool = federation.data, federation.pool
    client = torch.repeat_interleave(torch.arange(len(data)), data.offsets.diff())
    hostile = [federation.names.index(name) for name in federation.adversary.clients if name in federation.names]
    honest = torch.nonzero(~torch.isin(client, torch.tensor(hostile, dtype=torch.int64))).flatten()
    count = min(most, len(honest), len(pool.test_y))
    mine = honest[torch.randperm(len(honest), generator=key.fold("members").torch())[:count]]
    other = torch.randperm(len(pool.test_y), generator=key.fold("others").torch())[:count]
    owner = client[mine[torch.randperm(count, generator=key.fold("owners").torch())]]
    return Candidates(
        torch.cat([data.x, pool.test_x[other]]),
        torch.cat([data.y, pool.test_y[other]]),
        torch.cat([client, owner]),
        torch.cat([mine, len(client) + torch.arange(count)]),
        torch.arange(2 * count) < count,
    )


def confidences(federation: Federation, theta: Tensor, x: Tensor, y: Tensor) -> Floats:
    """How sure a model (P,) is of each label: log p_y / (1 - p_y), which is near a normal (Carlini et al., section V).

    Minus the job's loss where it is not a classifier's, (N,).
    """
    views, found = federation.layout.views(theta), []
    tensors = {e.name: views[e.name].to(getattr(torch, e.dtype)) for e in federation.layout.entries if e.name in views}
    with torch.inference_mode(), evaluating(federation.module):
        for at in range(0, len(y), _BATCH):
            target = y[at : at + _BATCH]
            output = functional_call(federation.module, tensors, (federation.pool.prepare(x[at : at + _BATCH]),))
            if federation.pool.classes and output.ndim == 2 and target.ndim == 1:
                logits = output.double()
                right = logits.gather(1, target[:, None]).squeeze(1)
                others = logits.scatter(1, target[:, None], -math.inf).logsumexp(1)
                found.append(right - others)
            else:
                found.append(-federation.work.loss(output, target).double())
    return torch.cat(found).numpy()


def by_loss(federation: Federation, theta: Tensor, among: Candidates) -> Floats:
    """Yeom et al. 2018: the lower the loss, the more likely a member. (N,)"""
    return confidences(federation, theta, among.x[among.asked], among.y[among.asked])


def lira(target: Floats, shadows: Floats, without: Mask) -> Floats:
    """Offline LiRA, (N,): how far the target's confidences (N,) lie above those of shadows (S, N) without the example.

    A normal is fitted to the confidences of the shadows that `without` (S, N) names, with a deviation common to all
    examples where those are few. Monotone in the likelihood ratio's one-sided test, 1 - Pr[Z > target]. An example
    that no shadow lacks says nothing: 0.
    """
    count = without.sum(0)
    mean = np.where(without, shadows, 0.0).sum(0) / np.maximum(count, 1)
    squares = np.where(without, shadows - mean, 0.0) ** 2
    common = squares.sum() / max(int(np.maximum(count - 1, 0).sum()), 1)
    own = squares.sum(0) / np.maximum(count - 1, 1)
    variance = np.where(count >= OWN_DEVIATION, own, common)
    return np.where(count > 0, (target - mean) / np.sqrt(np.maximum(variance, 1e-12)), 0.0)


def shadow(federation: Federation, among: Candidates, key: Key) -> tuple[Tensor, Mask]:
    """The final model of a federation like this one on a random half of all examples, and which were there, (N,).

    Clients have those of their examples that a coin lets in, and the job's own rounds, rules and first model.
    """
    held = torch.rand(len(among.y), generator=key.fold("half").torch()) < 0.5
    for client in range(len(federation.names)):  # nobody is left with none
        mine = torch.nonzero(among.client == client).flatten()
        if len(mine) and not bool(held[mine].any()):
            held[mine[0]] = True
    rows = torch.nonzero(held).flatten()
    rows = rows[torch.argsort(among.client[rows], stable=True)]
    counts = torch.bincount(among.client[rows], minlength=len(federation.names))
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    data = ClientData(among.x[rows], among.y[rows], offsets, federation.data.prepare)
    job = federation.job.with_settings([f"record.evaluate_every={federation.job.rounds}"])
    alike = replace(federation, job=job, key=key.fold("federation"), data=data)
    with contextlib.closing(alike.trainer()) as trainer:
        final = Simulator(alike, trainer, ServerState(first_model(federation)[0]), ClientMemory(), _Nothing()).run()
    return final.theta, held[among.asked].numpy()


def packed(array: Floats) -> bytes:
    """An array as the bytes of a .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


class _Nothing:
    """A record that nobody keeps."""

    def round(self, report: RoundReport) -> None: ...

    def metrics(self, round: int, version: int, figures: Sequence[Figures]) -> None: ...

    def checkpoint(
        self, state: ServerState, memory: ClientMemory, extra: Mapping[str, Any], attached: Mapping[str, Tensor]
    ) -> None: ...


def judged(scores: Floats, member: Mask, at: Sequence[float] = (0.01, 0.001)) -> Membership:
    """How well scores (N,), higher for members, tell them from the others.

    A rate at an FPR is that of the lowest threshold which at most this share of the others reaches. Its interval is
    Clopper and Pearson's, the AUC's that of Hanley & McNeil 1982.
    """
    from scipy.stats import rankdata

    scores = np.nan_to_num(scores)
    inside, outside = np.sort(scores[member]), np.sort(scores[~member])
    ranks = rankdata(scores)
    n, m = len(inside), len(outside)
    auc = float((ranks[member].sum() - n * (n + 1) / 2) / (n * m))
    q1, q2 = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    spread = auc * (1 - auc) + (n - 1) * (q1 - auc**2) + (m - 1) * (q2 - auc**2)
    half = Z95 * math.sqrt(max(spread, 0.0) / (n * m))
    thresholds = np.unique(scores)[::-1]
    fpr = 1 - np.searchsorted(outside, thresholds, "left") / m
    tpr = 1 - np.searchsorted(inside, thresholds, "left") / n
    rates = []
    for share in at:
        reached = tpr[fpr <= share]
        hits = round(float(reached[-1]) * n) if len(reached) else 0
        rates.append(Rate(share, hits / n, *clopper_pearson(hits, n)))
    keep = np.unique(np.concatenate([np.linspace(0, len(fpr) - 1, 200).astype(int), np.flatnonzero(fpr < 0.05)[:200]]))
    curve = [(float(fpr[i]), float(tpr[i])) for i in keep]
    return Membership(auc, max(0.0, auc - half), min(1.0, auc + half), tuple(rates), curve)
