"""Corrections of a client's gradient: `(g, theta, theta0, c_i, c) -> g`, over the trainable columns, any leading rows.

g, theta, theta0 (..., T): the batch's gradient, the local model, the model the client started from. c_i, c (..., T):
what the client keeps and what the server sends under the correction's name, zero at first; None for a correction that
does not claim the trait `memory` or `control`. The law of the trait `elementwise` is that column j of the result
depends on column j alone; the backends then correct tensor by tensor, inside the cache. Corrections are pure tensor
operations, so that they can be traced and vmapped, and never change their arguments.
"""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge
from torch import Tensor

from fedkeel.core.registry import rule


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
