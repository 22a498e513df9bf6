"""Laws of a client's optimisers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedkeel.core.registry import Rule
from fedkeel.testing.harness import hold, law, near, rows, same

LR, STEPS = 0.01, 3


def _walk(rule: Rule, theta: Tensor, gradients: Tensor, t: Tensor | None = None) -> Tensor:
    """theta after a step along every one of these gradients."""
    theta = theta.clone()
    slots = [torch.full_like(theta, value) for value in rule.init()]
    clock = torch.zeros((), dtype=torch.float64) if t is None else t.clone()
    for g in gradients:
        clock.add_(1)
        rule(theta, g, slots, clock, LR)
    return theta


@law("optimiser")
def goes_down_the_gradient(rule: Rule) -> None:
    theta, g = rows(2, 500)
    after = _walk(rule, torch.zeros(500), g[None])
    hold(after.dtype == torch.float32 and after.shape == (500,), f"theta became {after.dtype} {tuple(after.shape)}")
    hold(float(after @ g) < 0, "the first step from zero does not go down the gradient")
    hold(bool(_walk(rule, theta, 0 * g[None]).isfinite().all()), "a gradient of zero made columns that are not finite")


@law("optimiser")
def leaves_gradient_and_clock_alone(rule: Rule) -> None:
    theta, g = rows(2, 50)
    given, clock = g.clone(), torch.ones((), dtype=torch.float64)
    result = rule(theta.clone(), given, [torch.full_like(theta, value) for value in rule.init()], clock, LR)
    hold(result is None, "it returned something: the step is taken in place")
    hold(same(given, g) and float(clock) == 1, "it changed the gradient or the number of the step")


@law("optimiser")
def steps_every_column_by_itself(rule: Rule) -> None:
    theta, gradients = rows(1, 60)[0], rows(STEPS, 60, 1)
    whole = _walk(rule, theta, gradients)
    pieces = [_walk(rule, theta[at : at + 20], gradients[:, at : at + 20]) for at in (0, 20, 40)]
    near(torch.cat(pieces), whole, 1, "stepped in three pieces, theta is another", 1e-6)


@law("optimiser")
def steps_clients_side_by_side(rule: Rule) -> None:
    theta, gradients = rows(4, 30), torch.stack([rows(4, 30, seed) for seed in range(STEPS)])
    late = torch.tensor([[0.0], [0.0], [7.0], [7.0]], dtype=torch.float64)
    together = _walk(rule, theta, gradients, late)
    alone = [_walk(rule, theta[i], gradients[:, i], late[i, 0]) for i in range(4)]
    near(together, torch.stack(alone), 1, "beside other clients theta is another", 1e-6)


@law("optimiser")
def starts_from_numbers(rule: Rule) -> None:
    first = rule.init()
    numbers = isinstance(first, tuple) and all(isinstance(v, float) and math.isfinite(v) for v in first)
    hold(numbers or not first, f"init gave {first!r}: give a tuple of finite floats, one a slot")
