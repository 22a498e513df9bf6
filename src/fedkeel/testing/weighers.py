"""Laws of weighers."""

from __future__ import annotations

import torch
from torch import Tensor

from fedkeel.core.errors import CohortError
from fedkeel.core.registry import Rule
from fedkeel.testing.harness import KEY, asked, cohort, hold, law, near, rows


def _cohorts(rule: Rule) -> list[Tensor]:
    """Rows about one offset; such as help the server where its own examples decide."""
    given = [rows(n, columns) for n in (rule.needs, rule.needs + 1, rule.needs + 9) for columns in (1, 50)]
    return [U.abs() for U in given] if "server_data" in rule.definition.traits else given


@law("weigher")
def gives_each_row_a_finite_weight_of_zero_or_more(rule: Rule) -> None:
    for U in _cohorts(rule):
        w = asked(rule, cohort(U))
        hold(w.shape == (len(U),) and w.dtype == torch.float64, f"{len(U)} rows: {w.dtype} of shape {tuple(w.shape)}")
        hold(bool((torch.isfinite(w) & (w >= 0)).all()), f"weights {w.tolist()}")
        hold(float(w.sum()) > 0, "no row was given a weight above 0")


@law("weigher")
def leaves_at_most_the_rows_that_it_declares(rule: Rule) -> None:
    for U in _cohorts(rule):
        left = int((asked(rule, cohort(U)) > 0).sum())
        hold(left <= rule.leaves(len(U)), f"{left} of {len(U)} rows have a weight, it declares {rule.leaves(len(U))}")


@law("weigher")
def follows_rows_into_another_order(rule: Rule) -> None:
    for U in _cohorts(rule):
        order = torch.randperm(len(U), generator=KEY.torch())
        tolerance = 1e-4 if "server_data" in rule.definition.traits else 1e-9  # gradients are float32
        here, there = asked(rule, cohort(U)), asked(rule, cohort(U, order.tolist()))
        near(there, here[order], float(here.max()), "rows in another order", tolerance)


@law("weigher")
def weighs_no_rows_or_raises_cohort_error(rule: Rule) -> None:
    for n in {0, rule.needs - 1}:
        try:
            w = asked(rule, cohort(rows(n, 3)))
        except CohortError:
            continue
        hold(w.shape == (n,) and n >= rule.needs - 1 and rule.needs <= 1, f"it needs {rule.needs} rows but took {n}")


@law("weigher", "per_row")
def weighs_a_row_by_itself(rule: Rule) -> None:
    whole = cohort(rows(6, 10))
    for i, weight in enumerate(asked(rule, whole).tolist()):
        alone = float(asked(rule, cohort(rows(6, 10), [i]))[0])
        hold(alone == weight, f"row {i} weighs {weight} among others and {alone} alone")


@law("weigher")
def weighs_no_row_by_more_than_it_says(rule: Rule) -> None:
    most = rule.hook("most")
    if most is None:
        return
    hold("per_row" in rule.definition.traits, "it bounds its weights, so it must have the trait per_row")
    for n in (1, 5, 40):
        given = asked(rule, cohort(rows(n, 3)))
        hold(bool((given <= most()).all()), f"it gave {float(given.max()):g}, and says {most():g} at most")
