"""Server optimisers: the model's step along the aggregate, `(theta (p,), d (p,), s, share) -> (theta, s)`.

d points where the clients moved: the step adds it. theta holds the parameters alone; buffers are plain averages. s maps
names to vectors (p,); `init(theta)` makes the first one. share: of all clients, those whose updates made d.
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
Share = Annotated[float, Field(ge=0, lt=1)]
Small = Annotated[float, Field(ge=1e-15, allow_inf_nan=False)]


@rule("server_optimiser")
def sgd(theta: Tensor, d: Tensor, s: State, share: float, *, lr: Rate = 1.0) -> tuple[Tensor, State]:
    """theta + lr * d; with lr = 1 that is FedAvg (McMahan et al. 2017)."""
    return torch.add(theta, d, alpha=lr), s


def _velocity(theta: Tensor, *, lr: float, beta: float) -> State:
    return {"v": torch.zeros_like(theta)}


@rule("server_optimiser", init=_velocity)
def momentum(
    theta: Tensor, d: Tensor, s: State, share: float, *, lr: Rate = 1.0, beta: Share = 0.9
) -> tuple[Tensor, State]:
    """v = beta * v + d; theta + lr * v: FedAvgM (Hsu, Qi and Brown 2019, section 4.4)."""
    v = torch.add(d, s["v"], alpha=beta)
    return torch.add(theta, v, alpha=lr), {"v": v}


@rule("server_optimiser", init=_velocity)
def averaged_momentum(
    theta: Tensor, d: Tensor, s: State, share: float, *, lr: Rate = 1.0, beta: Share = 0.9
) -> tuple[Tensor, State]:
    """v = beta * v + (1 - beta) * d; theta + lr * v: a step is a mean of the rounds' aggregates, the latest most.

    The same path as `momentum` with lr * (1 - beta) in the place of lr.
    """
    v = torch.lerp(d, s["v"], beta)
    return torch.add(theta, v, alpha=lr), {"v": v}


def _moments(theta: Tensor, *, lr: float, tau: float, **_: float) -> State:
    return {"m": torch.zeros_like(theta), "v": torch.full_like(theta, tau**2)}


def _adaptive(theta: Tensor, m: Tensor, v: Tensor, lr: float, tau: float) -> tuple[Tensor, State]:
    return torch.addcdiv(theta, m, v.sqrt().add_(tau), value=lr), {"m": m, "v": v}


@rule("server_optimiser", init=_moments)
def adagrad(
    theta: Tensor, d: Tensor, s: State, share: float, *, lr: Rate = 0.1, beta1: Share = 0.0, tau: Small = 1e-3
) -> tuple[Tensor, State]:
    """m = beta1 * m + (1 - beta1) * d; v = v + d^2; theta + lr * m / (sqrt(v) + tau): FedAdagrad.

    Reddi et al. 2021 (Adaptive federated optimization, algorithm 2): no bias correction, v begins at tau^2.
    """
    m = torch.lerp(d, s["m"], beta1)
    return _adaptive(theta, m, torch.addcmul(s["v"], d, d), lr, tau)


@rule("server_optimiser", init=_moments)
def yogi(
    theta: Tensor,
    d: Tensor,
    s: State,
    share: float,
    *,
    lr: Rate = 0.01,
    beta1: Share = 0.9,
    beta2: Share = 0.99,
    tau: Small = 1e-3,
) -> tuple[Tensor, State]:
    """FedAdagrad with v = v - (1 - beta2) * d^2 * sign(v - d^2): FedYogi (Reddi et al. 2021, algorithm 2)."""
    m, square = torch.lerp(d, s["m"], beta1), d.square()
    v = torch.addcmul(s["v"], square, torch.sign(s["v"] - square), value=beta2 - 1)
    return _adaptive(theta, m, v, lr, tau)


@rule("server_optimiser", init=_moments)
def adam(
    theta: Tensor,
    d: Tensor,
    s: State,
    share: float,
    *,
    lr: Rate = 0.01,
    beta1: Share = 0.9,
    beta2: Share = 0.99,
    tau: Small = 1e-3,
) -> tuple[Tensor, State]:
    """FedAdagrad with v = beta2 * v + (1 - beta2) * d^2: FedAdam (Reddi et al. 2021, algorithm 2)."""
    m, v = torch.lerp(d, s["m"], beta1), torch.lerp(d.square(), s["v"], beta2)
    return _adaptive(theta, m, v, lr, tau)


def _dual(theta: Tensor, *, alpha: float) -> State:
    return {"h": torch.zeros_like(theta)}


@rule("server_optimiser", init=_dual, traits=("partner",))
def feddyn(theta: Tensor, d: Tensor, s: State, share: float, *, alpha: Rate) -> tuple[Tensor, State]:
    """h = h - alpha * share * d; theta + d - h / alpha: the server's half of FedDyn (Acar et al. 2021, algorithm 1).

    Needs the correction `feddyn` with the same alpha.
    """
    h = torch.sub(s["h"], d, alpha=alpha * share)
    return torch.sub(theta + d, h, alpha=1 / alpha), {"h": h}
