"""Contributions: what each row was worth, `(cohort, w (n,), state) -> (n,) float64`, by the server's own examples.

A value is a drop of the server's mean loss, in the loss's own unit: above 0 helped, about 0 rode for free, below 0 did
harm. The rows' aggregate is their mean by weight. Contributions are recorded, and change nothing. All have the trait
"server_data"; a row of weight 0 is worth 0. Trait "efficient": the values sum to what all rows together are worth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from fedkeel.core.registry import rule
from fedkeel.core.types import Cohort, Referee, ServerState
from fedkeel.kernels import combine


@rule("contribution", traits=("server_data",))
def leave_one_out(cohort: Cohort, w: Tensor, state: ServerState) -> Tensor:
    """The loss without a row less the loss with all. Costs n + 1 passes over the server's examples.

    Of two rows that say the same neither is worth much, as the other is still there: gtg_shapley() shares it out.
    """
    rows = _used(w)
    values = torch.zeros(len(cohort), dtype=torch.float64)
    others = [w.clone().index_fill_(0, torch.tensor([i]), 0.0) for i in rows]
    losses = cohort.own_examples.judge(_model(cohort, shares, state) for shares in (w, *others)).loss
    values[rows] = losses[1:] - losses[0]
    return values


@rule("contribution", traits=("server_data", "efficient"))
def gtg_shapley(
    cohort: Cohort,
    w: Tensor,
    state: ServerState,
    *,
    orders: Annotated[int, Field(ge=1)] | None = None,
    truncate: Annotated[float, Field(ge=0)] = 0.01,
) -> Tensor:
    """Shapley values: what a row adds, on average over the orders in which rows could come (Liu et al. 2022).

    GTG-Shapley: as many random `orders` as there are rows by default, each beginning with another row; an order is
    left as soon as its rows have all but `truncate` of what all together are worth, and the rest of it shares that
    remainder, so that the values still sum to the whole (the paper gives the rest 0). Costs at most
    orders * (n - 1) + 2 passes over the server's examples.
    """
    rows, referee = _used(w), cohort.own_examples
    values = torch.zeros(len(cohort), dtype=torch.float64)
    before, after = referee.judge((state.theta, _model(cohort, w, state))).loss.tolist()
    whole = before - after
    if not math.isfinite(whole) or whole == 0:
        return values
    count = len(rows) if orders is None else orders
    for number in range(count):
        first = rows[number % len(rows)]
        rest = [i for i in rows if i != first]
        draw = torch.randperm(len(rest), generator=cohort.key.fold("shapley", number).torch()).tolist()
        _walk(cohort, w, state, referee, [first, *(rest[k] for k in draw)], (before, after, truncate), values)
    return values / count


def _walk(
    cohort: Cohort,
    w: Tensor,
    state: ServerState,
    referee: Referee,
    order: Sequence[int],
    known: tuple[float, float, float],
    values: Tensor,
) -> None:
    """Add to `values` what each row adds in this order; `known`: the losses of none and of all, and the truncation."""
    before, after, truncate = known
    last, total, weight = before, torch.zeros_like(state.theta), 0.0
    for place, i in enumerate(order):
        left = order[place:]
        if place and abs(last - after) <= truncate * abs(before - after):
            values[left] += (last - after) / len(left)
            return
        if len(left) == 1:
            loss = after
        else:
            total, weight = total + float(w[i]) * cohort.U[i], weight + float(w[i])
            loss = float(referee.judge([state.theta + total / weight]).loss[0])
        values[i] += last - loss
        last = loss


def _model(cohort: Cohort, w: Tensor, state: ServerState) -> Tensor:
    """The model after the weighted mean; as it was where no weight is left."""
    total = float(w.sum())
    return state.theta + combine.weighted_sum(cohort.U, w / total) if total > 0 else state.theta


def _used(w: Tensor) -> list[int]:
    return torch.nonzero(w).flatten().tolist()
