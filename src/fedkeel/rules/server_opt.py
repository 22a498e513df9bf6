"""Server optimisers: the model's step along the aggregate, `(theta (p,), d (p,), s) -> (theta, s)`.

d points where the clients moved: the step adds it. theta holds the parameters alone; buffers are plain averages. s maps
names to vectors (p,); `init(theta)` makes the first one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from fedkeel.core.registry import rule

State = Mapping[str, Tensor]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@rule("server_optimiser")
def sgd(theta: Tensor, d: Tensor, s: State, *, lr: Rate = 1.0) -> tuple[Tensor, State]:
    """theta + lr * d; with lr = 1 that is FedAvg (McMahan et al. 2017)."""
    return torch.add(theta, d, alpha=lr), s


def _velocity(theta: Tensor, *, lr: float, beta: float) -> State:
    return {"v": torch.zeros_like(theta)}


@rule("server_optimiser", init=_velocity)
def momentum(
    theta: Tensor, d: Tensor, s: State, *, lr: Rate = 1.0, beta: Annotated[float, Field(ge=0, lt=1)] = 0.9
) -> tuple[Tensor, State]:
    """v = beta * v + d; theta + lr * v: FedAvgM (Hsu, Qi and Brown 2019, section 4.4)."""
    v = torch.add(d, s["v"], alpha=beta)
    return torch.add(theta, v, alpha=lr), {"v": v}
