"""Laws of contributions."""

from __future__ import annotations

import torch
from torch import Tensor

from fedkeel.core.registry import Rule
from fedkeel.core.types import Cohort, ServerState
from fedkeel.testing.harness import KEY, cohort, hold, law, near, repeatable, rows


def _values(rule: Rule, given: Cohort, w: Tensor | None = None) -> Tensor:
    w = torch.ones(len(given), dtype=torch.float64) if w is None else w
    found: Tensor = repeatable(rule, given, w, ServerState(torch.zeros(given.U.shape[1])))
    return found


def _helpful(n: int) -> Tensor:
    """Rows on the way from 0 to the referee's optimum, 1."""
    return 0.5 + 0.1 * rows(n, 40)


@law("contribution")
def gives_each_row_a_finite_value(rule: Rule) -> None:
    for n in (1, 2, 9):
        values = _values(rule, cohort(_helpful(n)))
        hold(values.shape == (n,) and values.dtype == torch.float64, f"{values.dtype} of shape {tuple(values.shape)}")
        hold(bool(torch.isfinite(values).all()), f"values {values.tolist()}")


@law("contribution")
def counts_a_row_that_was_not_used_as_nothing(rule: Rule) -> None:
    U, w = _helpful(6), torch.ones(6, dtype=torch.float64)
    w[2] = 0
    U[2] = torch.nan
    values = _values(rule, cohort(U), w)
    hold(float(values[2]) == 0 and bool(torch.isfinite(values).all()), f"a row of weight 0 is worth {values.tolist()}")


@law("contribution")
def ranks_harm_below_free_riding_below_help(rule: Rule) -> None:
    U = _helpful(9)
    U[1], U[4] = 0, -U[4]
    values = _values(rule, cohort(U)).tolist()
    helped = min(v for i, v in enumerate(values) if i not in (1, 4))
    hold(values[4] < values[1] < helped, f"harm {values[4]:.3g}, free ride {values[1]:.3g}, help from {helped:.3g}")


@law("contribution")
def values_equal_rows_alike(rule: Rule) -> None:
    U = _helpful(5)
    U[3] = U[1]
    values = _values(rule, cohort(U))
    scale = float(values.abs().max())
    near(values[3], values[1], scale, "two equal rows", 0.2 if "efficient" in rule.definition.traits else 1e-5)


@law("contribution", "efficient")
def shares_out_what_all_are_worth(rule: Rule) -> None:
    for n in (1, 2, 7):
        given = cohort(_helpful(n))
        assert given.referee is not None
        before, after = given.referee.judge((torch.zeros(40), given.U.mean(0))).loss.tolist()
        near(_values(rule, given).sum(), torch.tensor(before - after), before, "the sum of all values", 1e-5)


@law("contribution")
def follows_the_round_not_the_order_of_asking(rule: Rule) -> None:
    U = _helpful(6)
    hold(bool((_values(rule, cohort(U)) == _values(rule, cohort(U))).all()), f"asked again with key {KEY} it differs")
