"""Corrections of a client's gradient: `(g, theta, theta0, c_i, c) -> g`, over the trainable columns, any leading rows.

g, theta, theta0 (..., T): the batch's gradient, the local model, the model the client started from. c_i, c (..., T):
what the client keeps and what the server sends under the correction's name, zero at first; None for a correction that
does not claim the trait `memory` or `control`. With the trait `dial` c is a short vector (..., k), `init` its first
value. The law of the trait `elementwise` is that column j of the result depends on column j alone; the backends then
correct tensor by tensor, inside the cache. Private columns are among them, with c_i and c of 0; the trait `shared_only`
refuses models that have any. Corrections are pure tensor operations, so that they can be traced and vmapped, and never
change their arguments.

Hooks. `shift(c_i, c) -> (..., T)`: a gradient that stays the same during a round, so that the correction is called
without c_i and c. It is added to the gradient for an optimiser that is linear in it; any other, as Adam, which would
make steps of lr of what is left of both, it acts beside: theta - lr * shift. `after(c_i, c, delta, tau, lr) -> c_i`,
all (P,), tau the plain SGD steps that the client's are worth: what it keeps once its update is used. `control(c,
closed) -> c`: what the server sends from now on, of a round that was applied (`core.types.Closed`).
"""

from __future__ import annotations

from typing import Annotated

import torch
from annotated_types import Ge
from pydantic import Field
from torch import Tensor

from fedkeel.core.registry import rule
from fedkeel.core.types import Closed

Strength = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Above0 = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@rule("correction", traits=("elementwise",))
def none(g: Tensor, theta: Tensor, theta0: Tensor, c_i: Tensor | None, c: Tensor | None) -> Tensor:
    """The gradient as it is: plain local SGD (McMahan et al. 2017, FedAvg)."""
    return g


@rule("correction", traits=("elementwise",))
def l2(
    g: Tensor, theta: Tensor, theta0: Tensor, c_i: Tensor | None, c: Tensor | None, *, coef: Annotated[float, Ge(0)]
) -> Tensor:
    """Weight decay: adds coef * theta, the gradient of coef/2 * ||theta||^2, over every trainable column."""
    return g.add(theta, alpha=coef)


@rule("correction", traits=("elementwise",))
def fedprox(g: Tensor, theta: Tensor, theta0: Tensor, c_i: Tensor | None, c: Tensor | None, *, mu: Strength) -> Tensor:
    """Holds the local model near the global one: adds mu * (theta - theta0), of mu/2 * ||theta - theta0||^2.

    Li et al. 2020 (Federated optimization in heterogeneous networks, algorithm 2), the local problem solved by SGD.
    Private layers are held to where they began the round.
    """
    return g.add(theta, alpha=mu).sub(theta0, alpha=mu)


def _first_mu(*, mu: float, step: float, patience: int) -> Tensor:
    return torch.tensor([mu, torch.inf, 0.0])


def _next_mu(c: Tensor, closed: Closed, *, mu: float, step: float, patience: int) -> Tensor:
    now, before, falls = c.tolist()
    loss = float(torch.tensor(closed.loss))  # as it is kept: in float32 a loss that stays must not seem to move
    falls = falls + 1 if loss < before else 0
    if loss > before:
        now += step
    elif falls >= patience:
        now, falls = max(0.0, now - step), 0
    return torch.tensor([now, loss, falls])


@rule("correction", traits=("elementwise", "dial"), init=_first_mu, hooks={"control": _next_mu})
def adaptive_fedprox(
    g: Tensor,
    theta: Tensor,
    theta0: Tensor,
    c_i: Tensor | None,
    c: Tensor | None,
    *,
    mu: Strength = 0.0,
    step: Above0 = 0.1,
    patience: Annotated[int, Field(ge=1)] = 5,
) -> Tensor:
    """FedProx whose mu starts at `mu`, grows by `step` when the loss rises, and falls after `patience` rounds of less.

    Li et al. 2020, section 5.3.2. The loss is the median of the training losses that the round's clients claim, so
    that a lie of a few moves nothing. What the server sends beside the model: mu, that loss, the falls in a row.
    """
    assert c is not None
    return g + c[..., :1] * (theta - theta0)


def _scaffold_shift(c_i: Tensor, c: Tensor) -> Tensor:
    return c - c_i


def _scaffold_after(c_i: Tensor, c: Tensor, delta: Tensor, tau: float, lr: float) -> Tensor:
    return torch.sub(c_i, c).sub_(delta, alpha=1 / (tau * lr))


def _scaffold_control(c: Tensor, closed: Closed) -> Tensor:
    return torch.lerp(c, closed.per_step(), closed.share)


@rule(
    "correction",
    traits=("elementwise", "memory", "control"),
    hooks={"shift": _scaffold_shift, "after": _scaffold_after, "control": _scaffold_control},
)
def scaffold(g: Tensor, theta: Tensor, theta0: Tensor, c_i: Tensor | None, c: Tensor | None) -> Tensor:
    """Control variates against client drift: every step goes along g - c_i + c.

    SCAFFOLD, option II (Karimireddy et al. 2020, algorithm 1): c_i becomes c_i - c - delta / (tau * lr), tau the steps,
    and c moves by the mean change of the c_i times the share of clients. That change is -delta / (tau * lr) - c, so the
    server has it from the update itself: nothing is sent up beside it, and what is screened, weighed and reduced is
    what moves c. tau is what the steps are worth under a local momentum, so that c_i is a gradient. Exact for the mean
    with equal weights; where weights differ and not all clients take part, c is the weighted mean of the c_i but for
    sampling, and robust reducers and caps make of it what they make of the updates. Keeps 1 vector a client, sends 1.
    """
    return g


def _feddyn_after(c_i: Tensor, c: Tensor, delta: Tensor, tau: float, lr: float, *, alpha: float) -> Tensor:
    return c_i.sub(delta, alpha=alpha)


@rule("correction", traits=("elementwise", "memory", "partner"), hooks={"after": _feddyn_after})
def feddyn(g: Tensor, theta: Tensor, theta0: Tensor, c_i: Tensor | None, c: Tensor | None, *, alpha: Above0) -> Tensor:
    """Dynamic regularisation: g - c_i + alpha * (theta - theta0), where c_i becomes c_i - alpha * delta.

    FedDyn (Acar et al. 2021, algorithm 1). Needs the server optimiser `feddyn` with the same alpha. Keeps 1 vector a
    client, sends none.
    """
    assert c_i is not None
    return (g - c_i).add(theta, alpha=alpha).sub(theta0, alpha=alpha)


def _fedcm_shift(c_i: Tensor, c: Tensor, *, alpha: float) -> Tensor:
    return (1 - alpha) * c


def _fedcm_control(c: Tensor, closed: Closed, *, alpha: float) -> Tensor:
    return closed.per_step()


@rule(
    "correction",
    traits=("elementwise", "control", "shared_only"),
    hooks={"shift": _fedcm_shift, "control": _fedcm_control},
)
def fedcm(
    g: Tensor,
    theta: Tensor,
    theta0: Tensor,
    c_i: Tensor | None,
    c: Tensor | None,
    *,
    alpha: Annotated[float, Field(gt=0, le=1)] = 0.1,
) -> Tensor:
    """Client-level momentum: every step goes along alpha * g + (1 - alpha) * c, c the last round's mean step.

    FedCM (Xu et al. 2021, algorithm 2): the same c for all, so nothing is kept on clients and any may take part.
    c is what the reducer makes of the updates, each divided by -tau * lr, tau its steps. Sends 1 vector.
    """
    return g * alpha
