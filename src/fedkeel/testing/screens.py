"""Laws of screens."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedkeel.core.registry import Rule
from fedkeel.core.types import Cohort
from fedkeel.testing.harness import KEY, asked, cohort, hold, law, rows, same


def _refused(rule: Rule, given: Cohort) -> dict[int, tuple[str, float]]:
    found: dict[int, tuple[str, float]] = asked(rule, given)
    return found


def _sizes(rule: Rule) -> list[int]:
    return sorted({max(rule.needs, 1), rule.needs + 4, 20, 51})


def _honest(n: int) -> Tensor:
    return rows(n, 400)


@law("screen")
def names_rows_with_a_reason_and_a_score(rule: Rule) -> None:
    for n in _sizes(rule):
        given = cohort(_honest(n))
        found = _refused(rule, given)
        hold(set(found) <= set(range(n)), f"of {n} rows it names {sorted(found)}")
        for row, (reason, score) in found.items():
            hold(bool(reason) and isinstance(score, float), f"row {row}: reason '{reason}', score {score!r}")


@law("screen")
def leaves_most_of_an_honest_cohort(rule: Rule) -> None:
    """A rule with `f` may refuse the f rows it is told to expect, one of the trait "majority" half; others a tenth."""
    for n in (20, 51):
        found = _refused(rule, cohort(_honest(n)))
        allowed = (
            n // 2
            if "majority" in rule.definition.traits
            else max(int(rule.parameters.get("f", 0)) * int(rule.parameters.get("repeats", 1)), n // 10)
        )
        hold(len(found) <= allowed, f"of {n} honest rows it refuses {len(found)}")


@law("screen")
def refuses_rows_that_are_not_finite_and_copes_without_others(rule: Rule) -> None:
    for value in (torch.nan, torch.inf):
        U = _honest(20)
        U[[3, 11]] = value
        found = _refused(rule, cohort(U))
        hold({3, 11} <= set(found), f"rows of {value} pass")
    hold(set(_refused(rule, cohort(torch.full((3, 5), torch.nan)))) == {0, 1, 2}, "rows of NaN alone pass")


@law("screen")
def copes_with_rows_that_agree_and_rows_of_zero(rule: Rule) -> None:
    for U in (torch.ones(20, 30), torch.zeros(20, 30), torch.ones(1, 1), rows(2, 7)):
        found = _refused(rule, cohort(U))
        hold(set(found) <= set(range(len(U))), f"of {len(U)} rows it names {sorted(found)}")


@law("screen")
def decides_alike_at_any_scale(rule: Rule) -> None:
    U = _honest(20)
    U[5] *= 30
    U[9] *= -1
    wanted = set(_refused(rule, cohort(U)))
    for factor in (1e-6, 1e6):
        hold(set(_refused(rule, cohort(U * factor))) == wanted, f"all rows times {factor:g} are judged otherwise")


@law("screen")
def follows_rows_into_another_order(rule: Rule) -> None:
    U = _honest(20)
    U[5] *= 30
    U[9] *= -1
    order = torch.randperm(20, generator=KEY.torch()).tolist()
    there = _refused(rule, cohort(U))
    again = _refused(rule, cohort(U, order))
    hold({order[i] for i in again} == set(there), "rows in another order are judged otherwise")


@law("screen", "length")
def refuses_rows_that_are_far_too_long(rule: Rule) -> None:
    for factor in (30.0, 1e6, 1e30):
        U = _honest(20)
        U[[2, 7, 8]] *= factor
        found = _refused(rule, cohort(U))
        hold(set(found) == {2, 7, 8}, f"rows {factor:g} times too long: it refuses {sorted(found)}, not 2, 7, 8")


@law("screen", "direction")
def is_not_blinded_by_one_long_row(rule: Rule) -> None:
    for columns in (400, 60_000):
        for factor in (1e9, 1e20, 1e30):
            U = rows(20, columns)
            U[[2, 7, 8]] *= -1
            U[2] *= factor
            found = _refused(rule, cohort(U))
            hold({2, 7, 8} <= set(found), f"one row {factor:g} times as long: it refuses {sorted(found)}, not 2, 7, 8")


@law("screen", "direction")
def refuses_rows_that_point_the_other_way(rule: Rule) -> None:
    U = _honest(20)
    U[[2, 7, 8]] *= -1
    found = _refused(rule, cohort(U))
    hold({2, 7, 8} <= set(found), f"rows turned round: it refuses {sorted(found)}, not 2, 7, 8")
    hold(all(math.isfinite(score) for _, score in found.values()), "a score is not finite")
    hold(same(found, _refused(rule, cohort(U))), "asked again it decides otherwise")
