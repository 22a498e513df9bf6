"""Laws of reducers."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from fedkeel.core.errors import CohortError
from fedkeel.core.registry import Rule
from fedkeel.testing.harness import KEY, hold, law, near, repeatable, rows, same

HUGE = 1e38


def _sizes(rule: Rule) -> list[tuple[int, int]]:
    needs = rule.needs
    return [(needs, 1), (needs, 33), (needs + 1, 1), (needs + 4, 257), (max(needs, 20), 1000)]


def _weights(n: int) -> Tensor:
    return torch.linspace(1, 2, n, dtype=torch.float64)


@law("reducer")
def gives_one_row_of_the_same_dtype_and_device(rule: Rule) -> None:
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    for (n, columns), device, dtype in product(_sizes(rule), devices, (torch.float32, torch.float64)):
        U = rows(n, columns).to(device, dtype)
        z = repeatable(rule, U, _weights(n).to(device))
        hold(z.shape == (columns,), f"of rows {n} x {columns} it made shape {tuple(z.shape)}")
        hold(z.dtype == dtype and z.device == U.device, f"{dtype} on {device} became {z.dtype} on {z.device}")
        hold(bool(torch.isfinite(z).all()), "of finite rows it made a value that is not finite")


@law("reducer")
def does_not_depend_on_the_order_of_rows(rule: Rule) -> None:
    for n, columns in _sizes(rule):
        U, w = rows(n, columns), _weights(n)
        for again in range(1 if n > 6 else 12):  # few rows tie more often
            order = torch.randperm(n, generator=KEY.fold("order", n, again).torch())
            near(rule(U[order], w[order]), rule(U, w), float(U.abs().max()), f"{n} rows in another order")


@law("reducer")
def moves_and_grows_with_the_rows(rule: Rule) -> None:
    for n, columns in _sizes(rule):
        U, w, shift = rows(n, columns), _weights(n), rows(1, columns, seed=1)[0]
        z, scale = rule(U, w), float(U.abs().max() + shift.abs().max())
        near(rule(U + shift, w), z + shift, scale, "all rows shifted")
        # A length in the rows' own unit does not grow with them.
        for factor in () if rule.parameters.get("radius") is not None else (1e-6, 3.7, 1e6):
            near(rule(U * factor, w), z * factor, scale * factor, f"all rows times {factor}")


@law("reducer")
def returns_what_all_rows_agree_on(rule: Rule) -> None:
    for (n, columns), size in product(_sizes(rule), (0.0, 1e-30, 1.0, HUGE / 10)):
        row = rows(1, columns)[0] * size
        near(rule(row.expand(n, -1), _weights(n)), row, float(row.abs().max()), f"{n} rows equal", 1e-6)


@law("reducer")
def ignores_rows_of_weight_zero(rule: Rule) -> None:
    for (n, columns), value in product(_sizes(rule), (0.0, HUGE, torch.inf, torch.nan)):
        U, w = rows(n + 2, columns), _weights(n + 2)
        U[[0, n]], w[[0, n]] = value, 0.0
        kept = w > 0
        near(rule(U, w), rule(U[kept], w[kept]), float(U[kept].abs().max()), f"two rows of {value} with weight 0")


@law("reducer")
def takes_weights_of_any_scale(rule: Rule) -> None:
    for (n, columns), factor in product(_sizes(rule), (1e-12, 600.0, 2.0**53)):
        U, w = rows(n, columns), _weights(n)
        near(rule(U, w * factor), rule(U, w), float(U.abs().max()), f"all weights times {factor:g}")


@law("reducer")
def refuses_too_few_rows(rule: Rule) -> None:
    w = _weights(rule.needs + 2)
    w[rule.needs - 1 :] = 0
    try:
        rule(rows(len(w), 3), w)
    except CohortError:
        return
    raise AssertionError(f"it needs {rule.needs} rows, but took {rule.needs - 1} of weight above 0")


@law("reducer")
def says_what_weights_do(rule: Rule) -> None:
    claims = rule.definition.traits & {"weighted", "unweighted"}
    hold(len(claims) == 1, "it must claim one of the traits 'weighted' and 'unweighted'")
    if "unweighted" in claims:
        hold("ignored" in rule.definition.doc, "weights are ignored, and its docstring does not say so")


@law("reducer", "weighted")
def counts_a_row_of_weight_two_as_two_rows(rule: Rule) -> None:
    for n, columns in _sizes(rule):
        U, w = rows(n, columns), torch.ones(n, dtype=torch.float64)
        w[0] = 2
        twice = torch.cat([U[:1], U])
        near(rule(U, w), rule(twice, torch.ones(n + 1, dtype=torch.float64)), float(U.abs().max()), "a row doubled")


@law("reducer", "unweighted")
def ignores_weights_above_zero(rule: Rule) -> None:
    for n, columns in _sizes(rule):
        U = rows(n, columns)
        hold(same(rule(U, _weights(n)), rule(U, torch.ones(n, dtype=torch.float64))), "weights changed the result")


@law("reducer", "coordinatewise")
def stays_inside_the_hull_of_each_column(rule: Rule) -> None:
    for (n, columns), size in product(_sizes(rule), (1e-30, 1.0, HUGE / 10)):
        U = rows(n, columns) * size
        slack = 2e-6 * U.abs().amax(0)
        z = rule(U, _weights(n))
        hold(bool((z >= U.amin(0) - slack).all() and (z <= U.amax(0) + slack).all()), f"{n} rows: outside their hull")


@law("reducer", "coordinatewise")
def treats_each_column_by_itself(rule: Rule) -> None:
    n = max(rule.needs, 5)
    U, w = rows(n, 70_001), _weights(n)
    whole = rule(U, w)
    for part in (slice(0, 1), slice(5, 9000), slice(32_767, 70_001)):
        near(rule(U[:, part], w), whole[part], float(U.abs().max()), f"columns {part.start}:{part.stop} alone", 1e-6)


def _hostile(rule: Rule, n: int) -> int:
    """How many of n rows of equal weight the rule is to withstand."""
    if "share" in rule.parameters:
        return int(rule.parameters["share"] * n)
    return int(rule.parameters.get("f", rule.parameters.get("trim", (n - 1) // 2)))


@law("reducer", "robust")
def is_bounded_whatever_a_minority_sends(rule: Rule) -> None:
    """The distance from the honest mean is at most 2 (n - f) / (n - 2 f) times the honest radius (Minsker 2015)."""
    for (n, columns), value in product(_sizes(rule), (HUGE, -HUGE, 1e6, 30.0)):
        f = _hostile(rule, n)
        honest = rows(n - f, columns).double()
        centre = honest.mean(0)
        radius = float((honest - centre).norm(dim=1).max())
        for spread in (False, True):
            liars = torch.full((f, columns), value)
            if spread:
                liars = liars * torch.randn(f, columns, generator=KEY.fold("liars").torch()).clamp(-1, 1)
            z = rule(torch.cat([liars, honest.float()]), torch.ones(n, dtype=torch.float64))
            gap, bound = float((z.double() - centre).norm()), 2 * (n - f) / (n - 2 * f) * radius + 1e-4
            hold(gap <= bound, f"{f} of {n} rows at {value:g} pull it {gap:.3g} from the honest mean, over {bound:.3g}")


@law("reducer", "robust")
def is_where_most_rows_agree(rule: Rule) -> None:
    """The same bound with a radius of 0: equal rows in the majority, and a minority of which one lies far away."""
    n = max(rule.needs, 9)
    f = min(_hostile(rule, n), (n - 1) // 2)
    for far in (1e3, 1e12, 1e30):
        U = torch.ones(n, 10)
        U[:f] = rows(f, 10)
        U[: min(f, 1)] *= far
        z = rule(U, torch.ones(n, dtype=torch.float64))
        near(z, torch.ones(10), 1.0, f"{n - f} of {n} rows are equal, and one lies at {far:g}")
