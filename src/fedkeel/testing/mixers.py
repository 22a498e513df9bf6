"""Laws of mixers."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from fedkeel.core.errors import CohortError
from fedkeel.core.registry import Rule
from fedkeel.testing.harness import KEY, hold, law, near, repeatable, rows

HUGE = 1e37


def _sizes(rule: Rule) -> list[tuple[int, int]]:
    return [(rule.needs, 1), (rule.needs + 1, 33), (max(rule.needs, 20), 300)]


def mixed(rule: Rule, U: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """The rule on rows whose clients all took five steps, and began with the model as it is, if it asks."""
    steps = torch.full((len(w),), 5.0, dtype=torch.float64)
    told: tuple[object, ...] = (steps, slice(0, U.shape[1])) if "by_steps" in rule.definition.traits else ()
    told += ((torch.zeros_like(U[0]),) * len(w),) if "looks_back" in rule.definition.traits else ()
    found: tuple[Tensor, Tensor] = repeatable(rule, U, w, KEY, *told)
    return found


def _weights(n: int) -> Tensor:
    return torch.linspace(1, 2, n, dtype=torch.float64)


@law("mixer")
def gives_rows_and_as_many_weights_as_it_declares(rule: Rule) -> None:
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    for (n, columns), device, dtype in product(_sizes(rule), devices, (torch.float32, torch.float64)):
        U = rows(n, columns).to(device, dtype)
        V, v = mixed(rule, U, _weights(n).to(device))
        hold(
            V.ndim == 2 and V.shape[1] == columns and v.shape == (len(V),), f"shapes {tuple(V.shape)}, {tuple(v.shape)}"
        )
        hold(1 <= len(V) <= rule.leaves(n), f"{len(V)} rows of {n}, it declares {rule.leaves(n)}")
        hold(V.dtype == dtype and V.device == U.device, f"{dtype} on {device} became {V.dtype} on {V.device}")
        hold(v.dtype == torch.float64 and bool((torch.isfinite(v) & (v >= 0)).all()), f"weights {v.tolist()}")
        hold(bool(torch.isfinite(V).all()), "of finite rows it made a value that is not finite")


@law("mixer")
def leaves_rows_alone_that_agree(rule: Rule) -> None:
    for (n, columns), size in product(_sizes(rule), (0.0, 1e-30, 1.0, HUGE)):
        row = rows(1, columns)[0] * size
        V, _ = mixed(rule, row.expand(n, -1), _weights(n))
        if "norm" not in rule.parameters or rule.parameters["norm"] is None or size == 0:
            near(V, row.expand(len(V), -1), float(row.abs().max()), f"{n} rows equal", 1e-6)


@law("mixer")
def keeps_rows_of_weight_zero_out(rule: Rule) -> None:
    for (n, columns), value in product(_sizes(rule), (0.0, HUGE, torch.inf, torch.nan)):
        U, w = rows(n + 2, columns), _weights(n + 2)
        U[[0, n]], w[[0, n]] = value, 0.0
        V, v = mixed(rule, U, w)
        W, u = mixed(rule, U[w > 0], w[w > 0])
        kept = v > 0
        near(v[kept], u[u > 0], float(u.max()), f"weights beside two rows of {value} with weight 0")
        near(V[kept], W[u > 0], float(U[w > 0].abs().max()), f"rows beside two of {value} with weight 0")


@law("mixer")
def makes_no_row_longer_than_the_longest(rule: Rule) -> None:
    for n, columns in _sizes(rule):
        U = rows(n, columns)
        V, _ = mixed(rule, U, _weights(n))
        longest = float(U.double().norm(dim=1).max())
        hold(float(V.double().norm(dim=1).max()) <= longest * (1 + 1e-5), "a row became longer than any was")


@law("mixer")
def refuses_too_few_rows(rule: Rule) -> None:
    w = _weights(rule.needs + 2)
    w[rule.needs - 1 :] = 0
    try:
        mixed(rule, rows(len(w), 3), w)
    except CohortError:
        return
    raise AssertionError(f"it needs {rule.needs} rows, but took {rule.needs - 1} of weight above 0")


@law("mixer", "keeps_mean")
def keeps_the_weighted_mean(rule: Rule) -> None:
    for n, columns in _sizes(rule):
        U, w = rows(n, columns), _weights(n)
        V, v = mixed(rule, U, w)
        before, after = (w @ U.double()) / w.sum(), (v @ V.double()) / v.sum()
        near(after, before, float(U.abs().max()), "the weighted mean", 1e-6)
