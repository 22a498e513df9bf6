"""Objectives: what a client's steps descend. `(local) -> (losses to descend, losses (B,) to report)`.

`local` (`core.types.Local`) is a batch and the models at hand; the mean of the losses to descend is differentiated by
every trained tensor, those to report are the model's own on the batch, before the step. Objectives are pure tensor
operations, so that they can be traced and vmapped.

A client has a model of its own beside the shared one with the trait `copy`: `local.own`, a copy of every parameter and
float buffer, trained along with the model, which never travels; `init` names further numbers of its own
(`local.extra`). With the trait `last` the copy is not trained: it is the model that the client's last work ended with.
With the trait `start`, `local.start` is what the client began the round with.

Corrections act on the model, and leave what is the client's own alone.

Hooks. `own(model, own, extra, trained) -> tensors`: the model that is the client's, tested as such. `pull(g, v, w0)
-> g`: the gradient of the copy's columns, given the copy and the shared parameters at the round's start; column by
column. `rate() -> float`: the learning rate at which a client's model is tuned before it is tested.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from fedkeel.core.registry import rule
from fedkeel.core.types import Local, Tensors

Strength = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Above0 = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@rule("objective")
def plain(local: Local) -> tuple[Tensor, Tensor]:
    """The loss of the model on the client's examples (McMahan et al. 2017, FedAvg)."""
    losses = local.loss(local.run(local.model, local.x), local.y)
    return losses, losses


def _its_copy(model: Tensors, own: Tensors, extra: Tensors, trained: Sequence[str], *, lam: float) -> Tensors:
    return own


def _ditto_pull(g: Tensor, v: Tensor, w0: Tensor, *, lam: float) -> Tensor:
    return g.add(v, alpha=lam).sub(w0, alpha=lam)


@rule("objective", traits=("copy",), hooks={"own": _its_copy, "pull": _ditto_pull})
def ditto(local: Local, *, lam: Strength) -> tuple[Tensor, Tensor]:
    """A model of its own for each client, held near the shared one by lam/2 * ||v - w0||^2 (Ditto).

    Li et al. 2021 (Fairness and robustness through personalization, algorithm 1): v steps along g(v) + lam * (v - w0),
    w0 the model as it was sent, on the batches of the shared model's own steps, which it leaves as they are. lam 0 is
    training alone. Keeps a model on the client, sends nothing more; twice the computation.
    """
    losses = local.loss(local.run(local.model, local.x), local.y)
    return losses + local.loss(local.run(local.own, local.x), local.y), losses


def _mixture(model: Tensors, own: Tensors, extra: Tensors, trained: Sequence[str], *, alpha: float) -> Tensors:
    share = torch.sigmoid(extra["share"])
    return {name: torch.lerp(model[name].detach(), v, share) if name in trained else v for name, v in own.items()}


def _first_share(*, alpha: float) -> Tensors:
    return {"share": torch.logit(torch.tensor(alpha))}


@rule("objective", traits=("copy",), init=_first_share, hooks={"own": _mixture})
def apfl(
    local: Local, *, alpha: Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)] = 0.5
) -> tuple[Tensor, Tensor]:
    """A mixture of each client's own model and the shared one, whose share the client learns, from `alpha` on (APFL).

    Deng et al. 2020 (Adaptive personalized federated learning, algorithm 1): v steps along the gradient of
    f(a * v + (1 - a) * w), w along that of f(w). The share a is learnt in every step, as a sigmoid that keeps it
    between 0 and 1; the paper moves a itself, once a round, and cuts it off. Keeps a model on the client, sends nothing
    more; twice the computation.
    """
    losses = local.loss(local.run(local.model, local.x), local.y)
    mixed = _mixture(local.model, local.own, local.extra, local.trained, alpha=alpha)
    return losses + local.loss(local.run(mixed, local.x), local.y), losses


def _apart(local: Local) -> Tensors:
    """The model's buffers, to be changed without a trace."""
    return {name: tensor.clone() for name, tensor in local.model.items() if name not in local.trained}


def _adapting_rate(*, alpha: float, exact: bool) -> float:
    return alpha


@rule("objective", hooks={"rate": _adapting_rate})
def per_fedavg(local: Local, *, alpha: Above0, exact: bool = False) -> tuple[Tensor, Tensor]:
    """A model that one step of `alpha` on a client's own data makes good, rather than one that is good (Per-FedAvg).

    Fallah et al. 2020, algorithm 1: half of each batch takes the model a step ahead, the gradient there on the other
    half moves the model: the first-order variant, or with `exact` through the second derivatives. Test it with
    record.fine_tune, as "steps(steps=1)", which steps at that rate. Takes batches apart: not for clients side by side.
    """
    half = max(1, len(local.y) // 2)
    near, far = slice(half), slice(half if len(local.y) > 1 else 0, None)
    parameters = {name: local.model[name] for name in local.trained}
    rest = {name: tensor for name, tensor in local.model.items() if name not in parameters}

    def ahead(parameters: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        losses = local.loss(local.run({**_apart(local), **parameters}, local.x[near]), local.y[near])
        return losses.mean(), losses

    gradients, before = torch.func.grad(ahead, has_aux=True)(parameters)
    moved = {
        name: p.sub(gradients[name] if exact else gradients[name].detach(), alpha=alpha)
        for name, p in parameters.items()
    }
    after = local.loss(local.run({**rest, **moved}, local.x[far]), local.y[far])
    if len(local.y) == 1:
        return after, before
    with torch.no_grad():
        other = local.loss(local.run({**_apart(local), **parameters}, local.x[far]), local.y[far])
    return after, torch.cat([before.detach(), other])


@rule("objective", traits=("last", "start"))
def moon(local: Local, *, mu: Strength = 1.0, temperature: Above0 = 0.5) -> tuple[Tensor, Tensor]:
    """Model-contrastive: features near those of the shared model, far from those of the client's last one (MOON).

    Li et al. 2021, equation 3 and algorithm 1: beside the loss, mu times the cross-entropy of telling the shared
    model's features from the last local model's by their cosines over `temperature`. Features are what the last layer
    is given. Keeps a model on the client, sends nothing more; two more forward passes.
    """
    output, z = local.features(local.model, local.x)
    losses = local.loss(output, local.y)
    with torch.no_grad():
        references = [local.features({**_apart(local), **other}, local.x)[1] for other in (local.start, local.own)]
    similar = [functional.cosine_similarity(z.flatten(1), r.flatten(1), dim=1) for r in references]
    away = (similar[1] - similar[0]) / temperature
    return losses + mu * functional.softplus(away), losses
