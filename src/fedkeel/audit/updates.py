"""What the wire carries of a client with a given batch: its update, what the job makes of it, and with noise."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from fedkeel.core.keys import Key
from fedkeel.core.registry import build
from fedkeel.core.types import Claims, ClientMemory
from fedkeel.core.work import LocalWork
from fedkeel.round import device, secure, wire
from fedkeel.round.protect import norm_of
from fedkeel.train import ClientData, Task, make_trainer
from fedkeel.world.federation import Federation


class Batch(NamedTuple):
    """All that a client holds: x (B, ...) as stored, labels y (B,), and whose they are."""

    client: str
    x: Tensor
    y: Tensor


class Sent(NamedTuple):
    """An update (P,) and the work behind it, which a server knows: its steps, and the job's rules for them."""

    delta: Tensor
    steps: int
    work: LocalWork


def one_step(federation: Federation, size: int) -> LocalWork:
    """The job's work cut down to a single step, on the whole of a batch."""
    return replace(federation.work, stopping=build("stopping", "steps", steps=1), batch_size=size)


def trained(federation: Federation, theta: Tensor, batch: Batch, work: LocalWork, key: Key) -> Sent:
    """The update of a client that holds this batch and nothing else, by the job's own trainer."""
    offsets = torch.tensor([0, len(batch.y)])
    data = ClientData(batch.x, batch.y, offsets, federation.pool.prepare)
    by_checks = "validation" in work.stopping.definition.traits  # such a rule looks at what there is
    trainer = make_trainer(
        "loop", federation.module, federation.layout, data, work, workers=1, validation=data if by_checks else None
    )
    with contextlib.closing(trainer):
        done = next(iter(trainer.train(theta, [Task(0, key)])))
        return Sent(done.delta.clone(), done.steps, work)


def sent_by_job(
    federation: Federation,
    rows: Tensor,
    clients: list[str],
    key: Key,
    steps: int = 1,
    control: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Rows (n, P) as the server has them after the job's row transforms, privacy and codec: clients without a past.

    `control` is what the server sent beside the model. Under masks the server has their sums alone: rows as they enter.
    """
    plan, layout = federation.plan, federation.layout
    claims = [Claims(client, i, 0, layout.digest, 1, steps) for i, client in enumerate(clients)]
    keys = [key.fold("client", client) for client in clients]
    name, codec = wire.built(plan.codec, layout)
    arrived, memory = torch.empty_like(rows), ClientMemory()
    envelopes = device.prepare(rows.clone(), keys, claims, memory, plan, layout, control)
    for claim, envelope, out in zip(claims, envelopes, arrived, strict=True):
        if plan.secure is None:
            wire.open_payload(wire.read(envelope), name, codec, out, intact=True)
            continue
        whole = plan.secure.grid(norm_of(plan, control or {})).decode(secure.take(claim.client, memory), 1)
        out.copy_(torch.from_numpy(whole / secure.weight_of(plan.own_weighers, claim)))
    return arrived


def noised(delta: Tensor, params: slice, multiplier: float, key: Key) -> Tensor:
    """An update (P,) with Gaussian noise on its parameters, in units of their own norm: clipped to just what it has."""
    found = delta.clone()
    part = found[params]
    part += multiplier * float(part.norm()) * torch.randn(part.shape, generator=key.torch())
    return found
