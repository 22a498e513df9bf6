"""The client's half of a round: rows to envelopes. n rows in the simulator, one row on a device; the same function."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedkeel.core.keys import Key
from fedkeel.core.layout import Layout
from fedkeel.core.noise import cut, rounded, unit_of
from fedkeel.core.types import Claims, ClientMemory
from fedkeel.kernels import distance
from fedkeel.round import secure, wire
from fedkeel.round.plan import Plan
from fedkeel.round.protect import norm_of, protect

_draw = random.SystemRandom()
CORRECTION = "correction/"
"""What a client's memory has before the names of corrections."""
LABEL_NOISE = "label_noise"
"""Under what name a client remembers the noise on its labels: it must not be drawn again."""
_PENDING = "pending/"
_RESIDUAL = "residual"
_TASK = _PENDING + "task"


def label_shares(
    client: str, counts: Tensor, noise: float, memory: ClientMemory, *, whole: bool = False
) -> tuple[float, ...]:
    """The shares of the classes among a client's examples, of its counts (C,), for its claims.

    `noise` is the scale of the Laplace noise on each count, which hides an example, or, to hide the `whole` client, on
    each share: two clients' shares are apart by 2 at most (L1). It comes from the operating system's generator, never
    the run's seed, and is drawn once, as fresh noise would be averaged away; the client remembers it. Values and noise
    lie on one grid, so that low bits tell nothing. What noise makes negative is 0; no examples, or more classes than an
    envelope holds, tell nothing.
    """
    told = counts.to(torch.float64)
    if whole:
        told = told / told.sum().clamp(min=1)
    if noise:
        unit = unit_of(min(noise, 1.0))
        if LABEL_NOISE not in memory.of(client):
            drawn = [noise * _draw.expovariate(1.0) * _draw.choice((-1, 1)) for _ in range(len(counts))]
            kept = rounded(torch.tensor(drawn, dtype=torch.float64), unit).to(torch.float64) * unit
            memory.keep(client, {LABEL_NOISE: kept})
        told = cut(told, unit).to(torch.float64) * unit + memory.of(client)[LABEL_NOISE]
    told = told.clamp(min=0)
    if not 0 < len(counts) <= wire.MAX_LABELS or not float(told.sum()) > 0:
        return ()
    return tuple((told / told.sum()).tolist())


def recall(client: str, settled: int | None, memory: ClientMemory) -> None:
    """Settle what the client's last task left pending: keep it if its update was used, else let go of it.

    A row that was in no sum is let go of.

    Client and server stay of one mind so: a control variate that moved on the client moves at the server as well.
    """
    held = memory.of(client)
    pending = [name for name in held if name.startswith(_PENDING)]
    if pending and settled is not None and int(held[_TASK]) == settled:
        for name in pending:
            if name != _TASK:
                memory.rename(client, name, name.removeprefix(_PENDING))
    memory.forget(client, [*pending, secure.ROW])


def remember(
    rows: Tensor,
    claims: Sequence[Claims],
    memory: ClientMemory,
    plan: Plan,
    control: Mapping[str, Tensor],
    round: int,
) -> None:
    """What corrections make of the rows (n, P) that the server will see: pending until `recall` settles it.

    Of the rows as they arrive, so that the server, which sees no others, makes the same of them.
    """
    afters = {rule.name: after for rule in plan.corrections if (after := rule.hook("after"))}
    if not afters or plan.work is None:
        return
    zero = torch.zeros(rows.shape[1])
    work = plan.work.at(round)
    worth = work.worth(torch.tensor([claim.steps for claim in claims])).tolist()
    for row, claim, tau in zip(rows, claims, worth, strict=True):
        held = memory.of(claim.client)
        made = {
            _PENDING + CORRECTION + name: after(
                held.get(CORRECTION + name, zero), control.get(name, zero), row, tau, work.lr
            )
            for name, after in afters.items()
            if tau
        }
        memory.keep(claim.client, {**made, _TASK: torch.tensor(claim.task)})


def transform(
    rows: Tensor, keys: Sequence[Key], clients: Sequence[str], memory: ClientMemory, plan: Plan, layout: Layout
) -> Tensor:
    """Apply the plan's row transforms to the parameter columns of rows (n, P); buffers pass as they are."""
    if not plan.transforms:
        return rows
    params = layout.params
    moved = rows[:, params]
    for rule in plan.transforms:
        name = f"transform/{rule.name}"
        kept = [
            {k.removeprefix(name + "/"): v for k, v in memory.of(c).items() if k.startswith(name + "/")}
            for c in clients
        ]
        folded = [key.fold("transform", rule.name) for key in keys]
        moved, kept = rule(moved, folded, kept)
        for client, values in zip(clients, kept, strict=True):
            memory.keep(client, {f"{name}/{k}": v for k, v in values.items()})
    return moved if params.stop == rows.shape[1] else torch.cat([moved, rows[:, params.stop :]], dim=1)


def send(
    rows: Tensor,
    keys: Sequence[Key],
    claims: Sequence[Claims],
    memory: ClientMemory,
    plan: Plan,
    layout: Layout,
    control: Mapping[str, Tensor] | None = None,
    round: int = 1,
    *,
    honest: bool = True,
) -> list[bytes]:
    """Seal rows (n, P), one envelope each, and keep what is to be kept of what arrives.

    For a sum under masks an envelope has no row: the client keeps it (`secure.take`). Raises `ValueError` there for a
    row that is not finite; `honest` as in `secure.hold`. With error feedback what the codec loses of a row is added to
    the client's next one (Karimireddy et al. 2019, algorithm 2), whether the update is used or not. A row that is not
    finite leaves nothing behind.
    """
    if plan.secure is not None:
        grid = plan.secure.grid(norm_of(plan, control or {}))
        for row, claim in zip(rows, claims, strict=True):
            weight = secure.weight_of(plan.own_weighers, claim)
            secure.hold(row, weight, grid, claim.client, memory, honest=honest)
        remember(rows, claims, memory, plan, control or {}, round)
        return [wire.seal(claim, secure.MASKED, b"") for claim in claims]
    name, codec = wire.built(plan.codec, layout)
    if plan.error_feedback:
        zero = torch.zeros(rows.shape[1])
        rows = rows + torch.stack([memory.of(c.client).get(_RESIDUAL, zero) for c in claims])
    payloads = codec.encode(rows, [key.fold("codec") for key in keys])
    arrived = rows
    if not codec.lossless and (plan.error_feedback or plan.remembers):
        arrived = torch.empty_like(rows)
        for payload, out in zip(payloads, arrived, strict=True):
            codec.decode(memoryview(payload), out)
    if plan.error_feedback:
        for claim, lost in zip(claims, rows - arrived, strict=True):
            if math.isfinite(distance.sq_norm(lost)):
                memory.keep(claim.client, {_RESIDUAL: lost})
    remember(arrived, claims, memory, plan, control or {}, round)
    return [wire.seal(c, name, p, plan.zstd) for c, p in zip(claims, payloads, strict=True)]


def prepare(
    rows: Tensor,
    keys: Sequence[Key],
    claims: Sequence[Claims],
    memory: ClientMemory,
    plan: Plan,
    layout: Layout,
    control: Mapping[str, Tensor] | None = None,
    round: int = 1,
) -> list[bytes]:
    """Row transforms, privacy, error feedback, codec, envelope for rows (n, P) of the clients that `claims` name.

    `control` is what the server sent to the corrections with the model, `round` the round that it was sent in.
    """
    rows = transform(rows, keys, [c.client for c in claims], memory, plan, layout)
    rows, claims = protect(rows, keys, claims, memory, plan, control or {})
    return send(rows, keys, claims, memory, plan, layout, control, round)
