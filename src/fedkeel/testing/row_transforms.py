"""Laws of row transforms."""

from __future__ import annotations

from itertools import product

import torch

from fedkeel.core.registry import Rule
from fedkeel.testing.harness import KEY, hold, law, repeatable, rows, same

HUGE = 1e38


@law("row_transform")
def does_to_n_rows_what_it_does_to_each(rule: Rule) -> None:
    for n, columns in ((1, 1), (1, 40), (7, 40), (3, 70_001)):
        U, keys = rows(n, columns) * torch.logspace(-3, 3, n)[:, None], [KEY.fold(i) for i in range(n)]
        memory = [rule.init(columns) for _ in range(n)]
        out, kept = repeatable(rule, U, keys, memory)
        hold(out.shape == U.shape and out.dtype == U.dtype, f"{tuple(U.shape)} became {tuple(out.shape)} {out.dtype}")
        hold(len(kept) == n, f"{n} rows have {len(kept)} memories")
        for i in range(n):
            one, own = rule(U[i : i + 1], keys[i : i + 1], memory[i : i + 1])
            hold(same(one[0], out[i]) and same(own[0], kept[i]), f"row {i} of {n} fares otherwise than alone")


@law("row_transform")
def keeps_a_row_that_is_not_finite_visible(rule: Rule) -> None:
    for value in (torch.nan, torch.inf):
        U = rows(2, 9)
        U[0, 4] = value
        out, _ = rule(U, [KEY.fold(i) for i in range(2)], [rule.init(9) for _ in range(2)])
        hold(not bool(torch.isfinite(out[0]).all()), f"a row that holds {value} came out finite")
        hold(bool(torch.isfinite(out[1]).all()), f"a row that holds {value} spoilt another")


@law("row_transform", "clips")
def never_exceeds_the_norm(rule: Rule) -> None:
    norm = rule.parameters["norm"]
    for columns, size in product((1, 3, 1000, 70_001), (0.0, 1e-45, 1e-40, 1e-3, 1.0, 1e20, HUGE)):
        U = rows(1, columns).clamp(-3, 3) * size
        out, _ = rule(U, [KEY], [rule.init(columns)])
        before, after = float(U.double().norm()), float(out.double().norm())
        hold(after <= norm, f"{columns} columns of {size:g}: norm {before:g} became {after!r}, over {norm!r}")
        if before <= norm * (1 - 1e-9):
            hold(same(out, U), f"a row of norm {before:g}, within {norm:g}, was changed")
        elif norm > 1e-30:
            hold(after >= norm * (1 - 1e-4), f"norm {before:g} became {after!r}, far under {norm!r}")
