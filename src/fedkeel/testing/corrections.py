"""Laws of corrections."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import vmap

from fedkeel.core.registry import Rule
from fedkeel.core.types import Closed
from fedkeel.testing.harness import KEY, hold, law, near, repeatable

_COLUMNS = 17


def _arguments(rule: Rule, *rows: int) -> list[Tensor | None]:
    """g, theta, theta0, c_i, c for so many leading rows, None where the rule is told nothing."""
    generator = KEY.fold("correction", *rows).torch()
    found: list[Tensor | None] = [torch.randn(*rows, _COLUMNS, generator=generator) for _ in range(5)]
    if not rule.reads("memory"):
        found[3] = None
    if rule.reads("dial"):
        found[4] = torch.rand(*rows, rule.init().numel(), generator=generator)
    elif not rule.reads("control"):
        found[4] = None
    return found


@law("correction")
def corrects_any_leading_rows_one_by_one(rule: Rule) -> None:
    given = _arguments(rule, 2, 3)
    whole = repeatable(rule, *given)
    hold(whole.shape == (2, 3, _COLUMNS), f"g of shape (2, 3, {_COLUMNS}) became {tuple(whole.shape)}")
    hold(whole.dtype == torch.float32, f"float32 became {whole.dtype}")
    for i, j in ((0, 0), (1, 2)):
        one = rule(*(None if a is None else a[i, j] for a in given))
        near(whole[i, j], one, float(one.abs().max()), f"row {i}, {j} among others")
    mapped = vmap(lambda *a: rule(*a), in_dims=tuple(None if a is None else 0 for a in given))(*given)
    near(mapped, whole, float(whole.abs().max()), "vmapped")


@law("correction", "elementwise")
def corrects_column_by_column(rule: Rule) -> None:
    given = _arguments(rule)
    whole = rule(*given)
    for j in range(_COLUMNS):
        column = [a if a is None or len(a) != _COLUMNS else a[j : j + 1] for a in given]
        near(rule(*column), whole[j : j + 1], float(whole.abs().max()), f"column {j} alone")


@law("correction")
def keeps_and_sends_vectors_of_the_same_columns(rule: Rule) -> None:
    c_i, c, delta, direction = torch.randn(4, _COLUMNS, generator=KEY.fold("hooks").torch())
    if shift := rule.hook("shift"):
        moved = shift(c_i, c)
        hold(moved.shape == c.shape, f"its shift has shape {tuple(moved.shape)}")
    if after := rule.hook("after"):
        before = c_i.clone(), c.clone(), delta.clone()
        kept = after(c_i, c, delta, 5.0, 0.1)
        hold(kept.shape == c_i.shape and bool(torch.isfinite(kept).all()), "what a client keeps is no vector (P,)")
        hold(all(map(torch.equal, before, (c_i, c, delta))), "its hook after changed its inputs")
        hold("memory" in rule.definition.traits, "it has a hook after, but not the trait memory: nothing is kept")
    if control := rule.hook("control"):
        sent = rule.init() if "dial" in rule.definition.traits else c
        following = control(sent, Closed(direction, 0.5, 1.25, lambda: direction))
        hold(following.shape == sent.shape, f"what the server sends went from {tuple(sent.shape)} to another shape")
        hold(
            bool({"control", "dial"} & rule.definition.traits),
            "it has a hook control, but neither trait control nor dial",
        )
