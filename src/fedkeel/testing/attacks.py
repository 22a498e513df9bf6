"""Laws of attacks."""

from __future__ import annotations

import torch

from fedkeel.core.registry import Rule
from fedkeel.testing.harness import KEY, hold, law, repeatable, rows


@law("attack")
def claims_what_it_acts_on(rule: Rule) -> None:
    claims = rule.definition.traits & {"rows", "claims", "data"}
    hold(len(claims) == 1, "it must claim one of the traits 'rows', 'claims' and 'data'")


@law("attack", "rows")
def crafts_one_row_for_each_hostile_client(rule: Rule) -> None:
    for n, bad in ((1, [0]), (5, []), (5, [4, 1]), (20, [0, 3, 7, 19])):
        U, keys = rows(n, 300), [KEY.fold(i) for i in bad]
        out = repeatable(rule, U, torch.tensor(bad, dtype=torch.int64), keys)
        hold(out.shape == (len(bad), 300), f"{len(bad)} hostile of {n}: shape {tuple(out.shape)}")
        hold(out.dtype == U.dtype and out.device == U.device, f"{U.dtype} became {out.dtype} on {out.device}")
        hold(not bad or out.untyped_storage().data_ptr() != U.untyped_storage().data_ptr(), "its rows share U's memory")


@law("attack", "claims")
def claims_whole_numbers(rule: Rule) -> None:
    counts = torch.tensor([0, 1, 600, 2**40], dtype=torch.int64)
    out = repeatable(rule, counts, [KEY.fold(i) for i in range(4)])
    hold(out.shape == (4,) and out.dtype == torch.int64, f"{out.dtype} of shape {tuple(out.shape)}")
    hold(bool((out >= 0).all()), f"it claims {out.tolist()}")


@law("attack", "data")
def gives_labels_of_the_same_classes(rule: Rule) -> None:
    for classes in (2, 7, 10):
        y = torch.arange(3 * classes) % classes
        out = repeatable(rule, y, classes, KEY)
        hold(out.shape == y.shape and out.dtype == y.dtype, f"{out.dtype} of shape {tuple(out.shape)}")
        hold(bool(((out >= 0) & (out < classes)).all()), f"of {classes} classes it made labels {out.unique().tolist()}")
