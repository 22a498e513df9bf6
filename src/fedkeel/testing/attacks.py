"""Laws of attacks."""

from __future__ import annotations

import torch
from torch import Tensor

from fedkeel.core.registry import Rule, build
from fedkeel.testing.harness import KEY, hold, law, repeatable, rows


@law("attack")
def claims_what_it_acts_on(rule: Rule) -> None:
    claims = rule.definition.traits & {"rows", "claims", "data"}
    hold(len(claims) == 1, "it must claim one of the traits 'rows', 'claims' and 'data'")


@law("attack", "rows")
def crafts_one_row_for_each_hostile_client(rule: Rule) -> None:
    for n, bad in ((1, [0]), (5, []), (5, [4, 1]), (20, [0, 3, 7, 19])):
        U, keys = rows(n, 300), [KEY.fold(i) for i in bad]
        known = (_median,) if "adaptive" in rule.definition.traits else ()
        out = repeatable(rule, U, torch.tensor(bad, dtype=torch.int64), keys, *known)
        hold(out.shape == (len(bad), 300), f"{len(bad)} hostile of {n}: shape {tuple(out.shape)}")
        hold(out.dtype == U.dtype and out.device == U.device, f"{U.dtype} became {out.dtype} on {out.device}")
        hold(not bad or out.untyped_storage().data_ptr() != U.untyped_storage().data_ptr(), "its rows share U's memory")


@law("attack", "claims")
def claims_whole_numbers(rule: Rule) -> None:
    counts = torch.tensor([0, 1, 600, 2**40], dtype=torch.int64)
    out = repeatable(rule, counts, [KEY.fold(i) for i in range(4)])
    hold(out.shape == (4,) and out.dtype == torch.int64, f"{out.dtype} of shape {tuple(out.shape)}")
    hold(bool((out >= 0).all()), f"it claims {out.tolist()}")


@law("attack", "adaptive")
def does_more_harm_than_its_own_rows(rule: Rule) -> None:
    U, bad = rows(20, 300), torch.arange(5)
    crafted = U.clone()
    crafted[bad] = rule(U, bad, [KEY.fold(i) for i in range(5)], _median)
    benign = U[5:].mean(0)
    off, honest = float((_median(crafted) - benign).norm()), float((_median(U) - benign).norm())
    hold(off > honest, f"the aggregate is {off:.3g} from the benign mean, {honest:.3g} without the attack")


def _median(U: Tensor) -> Tensor:
    return U.median(0).values


def _examples(classes: int) -> list[tuple[Tensor, Tensor]]:
    y = torch.arange(3 * classes) % classes
    images = torch.arange(len(y) * 64).remainder(251).to(torch.uint8).view(-1, 8, 8)
    return [(images, y), (rows(len(y), 12), y), (images[:0], y[:0])]


@law("attack", "data")
def gives_examples_of_the_same_kind(rule: Rule) -> None:
    for classes in (2, 7, 10):
        for x, y in _examples(classes):
            inputs, labels = repeatable(rule, x, y, classes, KEY)
            hold(inputs.shape == x.shape and inputs.dtype == x.dtype, f"inputs {inputs.dtype} {tuple(inputs.shape)}")
            hold(labels.shape == y.shape and labels.dtype == y.dtype, f"labels {labels.dtype} {tuple(labels.shape)}")
            valid = bool(((labels >= 0) & (labels < classes)).all())
            hold(valid, f"of {classes} classes it made labels {labels.unique().tolist()}")


@law("attack", "trigger")
def marks_every_example_when_its_share_is_one(rule: Rule) -> None:
    whole = build("attack", rule.name, **{**rule.parameters, "share": 1.0})
    for x, y in _examples(10)[:2]:
        inputs, labels = whole(x, y, 10, KEY)
        hold(len(labels.unique()) == 1, "the marked examples have several labels")
        changed = inputs.flatten(1) != x.flatten(1)
        hold(bool(changed.any(1).all()), "an example bears no mark")
        hold(int(changed.any(0).sum()) < changed.shape[1] / 2, "the mark covers half of the input")
