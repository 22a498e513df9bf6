"""What a client does to its update, and to what it says of it, so that it is private when it leaves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedkeel.core.keys import Key
from fedkeel.core.noise import Noise, cut, rounded, unit_of
from fedkeel.core.types import Claims, ClientMemory
from fedkeel.kernels import distance
from fedkeel.round.plan import Plan
from fedkeel.round.privacy import NORM, WITHIN, Privacy

USES = "privacy/uses"
"""Under what name a client remembers how many of its updates have left."""
_SHAVED = 1 - 2.0**-20  # of a norm: its computation is right to float32


def used_up(client: str, memory: ClientMemory, plan: Plan) -> bool:
    """Whether a client's privacy budget is spent, by its own count: it need not believe the server's."""
    most = None if plan.privacy is None or plan.privacy.central else plan.privacy.most_uses
    return most is not None and int(memory.of(client).get(USES, torch.zeros(()))) >= most


def protect(
    rows: Tensor,
    keys: Sequence[Key],
    claims: Sequence[Claims],
    memory: ClientMemory,
    plan: Plan,
    control: Mapping[str, Tensor],
) -> tuple[Tensor, list[Claims]]:
    """Rows (n, P) and claims as the plan's mechanism lets them leave: clipped, noised where the noise is the client's.

    Row i depends on row i, claim i and key i alone. A row that is not finite stays so, for the check at the door; where
    the noise is the client's it is as a row of zeros, as the server is not trusted to look at it.
    """
    privacy = plan.privacy
    if privacy is None:
        return rows, list(claims)
    mechanism = privacy.mechanism
    norm = norm_of(plan, control)
    told = [_told(claim, privacy, plan, key) for claim, key in zip(claims, keys, strict=True)]
    if mechanism.place != "server":
        for claim in claims:
            uses = memory.of(claim.client).get(USES, torch.zeros((), dtype=torch.int64))
            memory.keep(claim.client, {USES: uses + 1})
    if mechanism.place == "step":
        return rows, told
    out = rows.clone()
    for i, (row, key) in enumerate(zip(out, keys, strict=True)):
        length = math.sqrt(distance.sq_norm(row))
        if not math.isfinite(length):
            if mechanism.place != "client":
                continue
            row.zero_()
            length = 0.0
        if mechanism.quantile is not None:
            told[i] = replace(told[i], metrics={**told[i].metrics, WITHIN: float(length <= norm)})
        if length > norm * _SHAVED:
            row.mul_(norm * _SHAVED / length)
        if mechanism.place == "client":
            secret = None if privacy.secret is None else key.fold("privacy")
            row.copy_(_noised(row, norm, privacy.noise, Noise(secret)))
    return out, told


def norm_of(plan: Plan, control: Mapping[str, Tensor]) -> float:
    """What updates are scaled down to, by what a client is sent; infinity where nothing says."""
    if NORM in control:
        return float(control[NORM])
    if plan.privacy is not None and (plan.secure is None or plan.secure.noised):
        return plan.privacy.mechanism.norm
    return math.inf if plan.secure is None else plan.secure.norm


def _noised(row: Tensor, norm: float, multiplier: float, noise: Noise) -> Tensor:
    """A clipped row (P,) on the grid, with noise on the same grid."""
    unit = unit_of(norm)
    whole = cut(row, unit).add_(rounded(noise.normals(len(row)).mul_(multiplier * norm), unit))
    return (whole.to(torch.float64) * unit).to(torch.float32)


def _told(claim: Claims, privacy: Privacy, plan: Plan, key: Key) -> Claims:
    """What a client says beside its update: a server that is trusted hears all, another what tells nothing of data."""
    if privacy.central:
        return claim
    same_for_all = plan.work is not None and plan.work.stopping.name == "steps"
    hidden = privacy.mechanism.place == "client"
    return replace(
        claim,
        num_examples=1 if hidden else claim.num_examples,
        steps=claim.steps if same_for_all or not hidden else 1,
        metrics=_figures(claim.metrics, privacy, key),
        labels=claim.labels if privacy.beside.labels else (),
    )


def _figures(metrics: Mapping[str, float], privacy: Privacy, key: Key) -> dict[str, float]:
    """The figures that are told, with their noise, on a grid. One that is not there or not finite counts as the bound:
    that it is missing would tell as well."""
    beside = privacy.beside
    if not beside.names:
        return {}
    known = torch.tensor([metrics.get(name, math.inf) for name in beside.names], dtype=torch.float64)
    values = known.nan_to_num(math.inf).clamp(0.0, beside.bound)
    noise = Noise(None if privacy.secret is None else key.fold("privacy", "figures"))
    unit = unit_of(beside.bound)
    whole = cut(values, unit) + rounded(noise.normals(len(values)) * beside.deviation, unit)
    return dict(zip(beside.names, (whole.to(torch.float64) * unit).tolist(), strict=True))
