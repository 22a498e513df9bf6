"""Laws of server optimisers."""

from __future__ import annotations

import torch

from fedkeel.core.registry import Rule
from fedkeel.testing.harness import hold, law, repeatable, rows, same


@law("server_optimiser")
def steps_along_the_aggregate(rule: Rule) -> None:
    theta, d = rows(2, 500)
    s = rule.init(theta)
    after, kept = repeatable(rule, theta, d, s, 1.0)
    hold(after.shape == theta.shape and after.dtype == theta.dtype, f"theta became {after.dtype} {tuple(after.shape)}")
    hold(float((after - theta) @ d) > 0, "the first step does not go along d")
    hold({k: v.shape for k, v in kept.items()} == {k: v.shape for k, v in s.items()}, "its state changed its names")


@law("server_optimiser")
def stays_where_it_is_when_nothing_moved(rule: Rule) -> None:
    theta = rows(1, 500)[0]
    after, _ = rule(theta, torch.zeros(500), rule.init(theta), 1.0)
    hold(same(after, theta), "a first aggregate of zero moved the model")
