"""A tiny federation on the wire: three columns, and clients that answer by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedkeel.core.keys import Key
from fedkeel.core.layout import Layout
from fedkeel.core.registry import parse
from fedkeel.core.types import Claims, ClientMemory, ServerState
from fedkeel.round import device
from fedkeel.round.coordinator import Coordinator, Train
from fedkeel.round.plan import Plan
from fedkeel.round.server import Server

CHECKS = ("layout", "version", "claims", "duplicate", "replayed", "finite")


def make_plan(cohort: int = 3, *, schedule: str = "sync", reduce: str = "mean", **extra: Any) -> Plan:
    checks = extra.pop("checks", CHECKS)
    weigh = extra.pop("weigh", ("examples",))
    return Plan(
        select=parse("selector", "round_robin"),
        schedule=parse("scheduler", schedule),
        codec=parse("codec", extra.pop("codec", "float32")),
        reducer=parse("reducer", reduce),
        optimiser=parse("server_optimiser", extra.pop("optimiser", "sgd")),
        cohort=cohort,
        checks=tuple(parse("check", c) for c in checks),
        weighers=tuple(parse("weigher", w) for w in weigh),
        **extra,
    )


def make_layout(columns: int = 3) -> Layout:
    return Layout.of(nn.Linear(columns, 1, bias=False))


def make_server(plan: Plan, layout: Layout | None = None) -> Server:
    layout = layout or make_layout()
    return Server(plan, layout, ServerState(torch.zeros(layout.columns)), Key.root(0))


def make_coordinator(
    plan: Plan, clients: Sequence[str], rounds: int = 3, layout: Layout | None = None, **extra: Any
) -> Coordinator:
    return Coordinator(plan, make_server(plan, layout), clients, Key.root(0), rounds=rounds, **extra)


def answer(
    plan: Plan, layout: Layout, order: Train, row: Tensor, *, examples: int = 1, steps: int = 1, **claimed: Any
) -> bytes:
    """The envelope an honest client would send for this order, unless `claimed` says otherwise."""
    fields: dict[str, Any] = {
        "client": order.client,
        "task": order.task,
        "base_version": order.version,
        "layout_digest": layout.digest,
        "num_examples": examples,
        "steps": steps,
        **claimed,
    }
    return device.send(row[None], [Key.root(order.task)], [Claims(**fields)], ClientMemory(), plan, layout)[0]
