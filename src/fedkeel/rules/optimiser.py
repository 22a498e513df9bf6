"""A client's optimiser: `(theta, g, slots, t, lr) -> None`, one step of the local model, in place.

theta, g (..., k): some columns of the local model, for one client or several as leading rows, and their gradient.
`slots` are what the rule keeps of those columns from step to step, tensors like theta that `init` names the first value
of: they start afresh in every round, as nothing of them is sent. t, of no dimensions or (..., 1), float64: the number
of the step, from 1. Column j depends on column j alone, so that backends may step tensor by tensor; g is never changed.
Trait "linear": what it does to theta is linear in the gradients so far, for slots that start from 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field
from torch import Tensor

from fedkeel.core.errors import InputError
from fedkeel.core.registry import rule

Share = Annotated[float, Field(ge=0, lt=1)]


def _velocity(*, momentum: float, nesterov: bool) -> tuple[float, ...]:
    if nesterov and not momentum:
        raise InputError("optimiser 'sgd(nesterov=True)' has no momentum to look ahead with: give momentum, as 0.9")
    return (0.0,) if momentum else ()


@rule("optimiser", init=_velocity, traits=("linear",))
def sgd(
    theta: Tensor,
    g: Tensor,
    slots: Sequence[Tensor],
    t: Tensor,
    lr: float,
    *,
    momentum: Share = 0.0,
    nesterov: bool = False,
) -> None:
    """theta - lr * v with v = momentum * v + g; with nesterov=True, theta - lr * (g + momentum * v).

    Without momentum v is g: the fastest, as the step is then part of the product that makes the gradient. Heavy ball
    (Polyak 1964), and as PyTorch writes Nesterov's (Sutskever et al. 2013).
    """
    if not slots:
        theta.sub_(g, alpha=lr)
        return
    (v,) = slots
    v.mul_(momentum).add_(g)
    if nesterov:
        theta.sub_(g, alpha=lr).sub_(v, alpha=lr * momentum)
    else:
        theta.sub_(v, alpha=lr)


def _moments(*, beta1: float, beta2: float, eps: float, decay: float) -> tuple[float, ...]:
    return 0.0, 0.0


@rule("optimiser", init=_moments)
def adam(
    theta: Tensor,
    g: Tensor,
    slots: Sequence[Tensor],
    t: Tensor,
    lr: float,
    *,
    beta1: Share = 0.9,
    beta2: Share = 0.999,
    eps: Annotated[float, Field(ge=1e-30, le=1)] = 1e-8,
    decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0,
) -> None:
    """Steps of about lr in every column, whatever the gradient's size; use a small lr, as 0.001.

    Adam (Kingma and Ba 2015, algorithm 1). A column whose gradient is 0 but for rounding steps along that rounding, so
    that there two backends may differ by a few lr. `decay` first shrinks theta by lr * decay, apart from the gradient:
    AdamW (Loshchilov and Hutter 2019).
    """
    m, v = slots
    if decay:
        theta.mul_(1 - lr * decay)
    m.mul_(beta1).add_(g, alpha=1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    size = (lr / (1 - beta1**t)).to(g.dtype)
    scale = (1 - beta2**t).sqrt().to(g.dtype)
    theta.sub_(m / v.sqrt().div_(scale).add_(eps) * size)
