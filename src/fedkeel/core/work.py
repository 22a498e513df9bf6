"""What every selected client does, and what its steps are worth: device, trainers and server read the same."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedkeel.core.registry import Rule, build, definition, require_once

_MEASURED_STEPS = 20_000  # beyond them the response is a straight line, or flat


@dataclass(frozen=True, slots=True)
class LocalWork:
    """What every selected client does: steps of `optimiser` on batches drawn without replacement per epoch.

    `corrections` change the gradient of the trainable columns before the step, in order. `stopping` says how many
    steps: asked once if it is static, at the end of every epoch otherwise. `loss` gives one loss per example; a
    batch's loss is their mean.
    """

    batch_size: int
    lr: float
    stopping: Rule
    loss: Rule
    corrections: tuple[Rule, ...] = ()
    optimiser: Rule = field(default_factory=lambda: build("optimiser", "sgd"))
    _known: list[NDArray[np.float64]] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.optimiser.init()  # says now what can not be meant
        require_once([rule.name for rule in self.corrections if {"memory", "control"} & rule.definition.traits])

    @property
    def slots(self) -> tuple[float, ...]:
        """What each of the optimiser's slots starts from."""
        return tuple(self.optimiser.init())

    @property
    def plain(self) -> bool:
        """Whether a step is `theta -= lr * g` and no more."""
        return self.optimiser.definition is definition("optimiser", "sgd") and not self.slots

    @property
    def linear(self) -> bool:
        """Whether the step is linear in the gradients so far, so that a shift may go through the optimiser."""
        return "linear" in self.optimiser.definition.traits

    def worth(self, steps: Tensor) -> Tensor:
        """How many plain SGD steps so many steps of this work are worth, (n,) float64: |a|_1 of FedNova.

        A model that starts where it should be and is shifted by 1 in every step moves by -lr * |a|_1 (Wang et al. 2020,
        section 4): found by taking those steps with the very rules.
        """
        if not self._known:
            self._known.append(_response(self))
        (response,) = self._known
        known = len(response) - 1
        last = response[-1] - response[-2]
        found = [response[k] if k <= known else response[-1] + (k - known) * last for k in steps.long().tolist()]
        return torch.tensor(found, dtype=torch.float64)


def _response(work: LocalWork) -> NDArray[np.float64]:
    """What k steps come to, in units of lr, for k = 0, 1, ..."""
    theta, start, zero, one = (torch.full((1,), value, dtype=torch.float64) for value in (0.0, 0.0, 0.0, 1.0))
    slots = [torch.full((1,), value, dtype=torch.float64) for value in work.slots]
    clock = torch.zeros((), dtype=torch.float64)
    found = np.zeros(_MEASURED_STEPS + 1)
    with torch.no_grad():
        for k in range(1, len(found)):
            g = zero
            for rule in work.corrections:
                c = zero if rule.reads("control") else rule.init().double() if rule.reads("dial") else None
                g = rule(g, theta, start, zero if rule.reads("memory") else None, c)
            clock.add_(1)
            work.optimiser(theta, g + one if work.linear else g, slots, clock, work.lr)
            if not work.linear:
                theta.sub_(work.lr)
            found[k] = -float(theta) / work.lr
    return found
