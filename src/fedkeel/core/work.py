"""What every selected client does, and what its steps are worth: device, trainers and server read the same."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch
from torch import Tensor

from fedkeel.core.errors import InputError
from fedkeel.core.registry import Rule, build, definition, require_once
from fedkeel.core.types import Closed, ExampleNoise

_MEASURED_STEPS = 20_000  # of a response
_MOST_STEPS = 10**12  # that a claim counts for


@dataclass(frozen=True, slots=True)
class LocalWork:
    """What every selected client does: steps of `optimiser` on batches drawn without replacement per epoch.

    `corrections` change the gradient of the trainable columns before the step, in order. `stopping` says how many
    steps: asked once if it is static, at the end of every epoch otherwise. `loss` gives one loss per example;
    `objective` makes of the batch's what is descended, whose mean it is. `private_first` says how many steps train the
    private layers alone before; the steps proper then leave them as they are. `rate` changes lr over the `rounds`.
    `example_noise` makes of each step one of DP-SGD, on a batch drawn by Poisson's sampling.
    """

    batch_size: int
    lr: float
    stopping: Rule
    loss: Rule
    corrections: tuple[Rule, ...] = ()
    optimiser: Rule = field(default_factory=lambda: build("optimiser", "sgd"))
    objective: Rule = field(default_factory=lambda: build("objective", "plain"))
    private_first: Rule | None = None
    rate: Rule = field(default_factory=lambda: build("rate", "constant"))
    rounds: int = 1
    example_noise: ExampleNoise | None = None
    _known: _Response = field(default_factory=lambda: _Response(), init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.optimiser.init()  # says now what can not be meant
        require_once([rule.name for rule in self.corrections if {"memory", "control", "dial"} & rule.definition.traits])
        if self.example_noise is not None:
            self._check_noised(self.example_noise)

    def at(self, round: int) -> LocalWork:
        """The work of a round (from 1): itself, at that round's learning rate."""
        lr = self.lr * float(self.rate(round, self.rounds))
        return self if lr == self.lr else _at_rate(self, lr)

    @property
    def slots(self) -> tuple[float, ...]:
        """What each of the optimiser's slots starts from."""
        return tuple(self.optimiser.init())

    @property
    def plain(self) -> bool:
        """Whether a step is `theta -= lr * g` and no more."""
        return self.optimiser.definition is definition("optimiser", "sgd") and not self.slots

    @property
    def looks_back(self) -> bool:
        """Whether a step needs to know what the client started the round with."""
        mine = self.objective
        return bool(self.corrections) or mine.hook("pull") is not None or "start" in mine.definition.traits

    @property
    def bare(self) -> bool:
        """Whether the step is plain, and the gradient is the objective's and no more."""
        return self.plain and not self.corrections and self.objective.hook("pull") is None

    @property
    def keeps_last(self) -> bool:
        """Whether a client keeps the model that its work ends with."""
        return "last" in self.objective.definition.traits

    @property
    def linear(self) -> bool:
        """Whether the step is linear in the gradients so far, so that a shift may go through the optimiser."""
        return "linear" in self.optimiser.definition.traits

    def worth(self, steps: Tensor) -> Tensor:
        """How many plain SGD steps so many steps of this work are worth, (n,) float64: |a|_1 of FedNova.

        A model that starts where it should be and is shifted by 1 in every step moves by -lr * |a|_1 (Wang et al. 2020,
        section 4): found by taking those steps with the very rules. A correction with a dial, which changes from round
        to round, is left out, and so is one that looks at all columns at once. Under an optimiser that is not linear
        a shift acts beside it: the steps themselves.
        """
        counts = [min(max(k, 0), _MOST_STEPS) for k in steps.tolist()]
        if not self.linear:
            return torch.tensor(counts, dtype=torch.float64)
        response = self._known.of(self)
        response.grow(min(int(max(counts, default=0)), _MEASURED_STEPS))
        return torch.tensor([response.after(int(k)) for k in counts], dtype=torch.float64)

    def _check_noised(self, given: ExampleNoise) -> None:
        """Raise `InputError` for what would tell of examples past the noise, or can not be scaled down one by one."""
        if not (0 < given.norm < math.inf and 0 <= given.noise < math.inf):
            raise InputError(
                f"example noise of norm = {given.norm:g}, noise = {given.noise:g} is not valid: write a norm above 0, "
                "and noise of 0 or more"
            )
        if self.objective.definition is not definition("objective", "plain"):
            raise InputError(
                f"train.objective = '{self.objective!r}' makes more of a batch than each example's loss, and noise is "
                "added to examples' gradients: write 'plain'"
            )
        if self.private_first is not None:
            raise InputError(
                f"train.private_first = '{self.private_first!r}' does not go with noise on examples' gradients, which "
                "are scaled down over all layers at once: leave it out"
            )
        if "static" not in self.stopping.definition.traits:
            raise InputError(
                f"train.stopping = '{self.stopping!r}' looks at losses, which tell of examples without noise: write "
                "epochs or steps"
            )

    def check(self) -> None:
        """Try what is particular to corrections. Raises `InputError` where they can not do what they claim."""
        for rule in self.corrections:
            _try_hooks(rule)
        first = self.worth(torch.arange(1, 9))
        if not bool((torch.isfinite(first) & (first > 0)).all()):
            names = ", ".join(map(repr, self.corrections))
            raise InputError(f"{names} with train.lr = {self.lr:g}: local steps would swing back: lower one of them")


@lru_cache(maxsize=4)  # what steps are worth is measured once a rate
def _at_rate(work: LocalWork, lr: float) -> LocalWork:
    return replace(work, lr=lr, rate=build("rate", "constant"))


class _Response:
    """What k steps come to, in units of lr, for k = 0, 1, ...: taken when asked for."""

    def __init__(self) -> None:
        self.found = [0.0]
        self._steps: Iterator[float] | None = None

    def of(self, work: LocalWork) -> _Response:
        if self._steps is None:
            self._steps = _steps(work)
        return self

    def grow(self, count: int) -> None:
        assert self._steps is not None
        while len(self.found) <= count:
            self.found.append(next(self._steps))

    def after(self, count: int) -> float:
        """Beyond what is measured it is a straight line, or flat."""
        last = len(self.found) - 1
        if count <= last:
            return self.found[count]
        return self.found[last] + (count - last) * (self.found[last] - self.found[last - 1])


def _steps(work: LocalWork) -> Iterator[float]:
    theta, start, zero, one = (torch.full((1,), value, dtype=torch.float64) for value in (0.0, 0.0, 0.0, 1.0))
    slots = [torch.full((1,), value, dtype=torch.float64) for value in work.slots]
    clock = torch.zeros((), dtype=torch.float64)
    while True:
        with torch.no_grad():
            g = zero
            for rule in work.corrections:
                if "elementwise" in rule.definition.traits and not rule.reads("dial"):
                    c_i, c = (zero if rule.reads(trait) else None for trait in ("memory", "control"))
                    g = rule(g, theta, start, c_i, c)
            clock.add_(1)
            work.optimiser(theta, g + one, slots, clock, work.lr)
        yield -float(theta) / work.lr


def _try_hooks(rule: Rule) -> None:
    """Ask a correction's hooks for what they are asked in a run, on three columns."""
    traits, vector = rule.definition.traits, torch.linspace(-1, 1, 3)
    for name, needed in (("after", {"memory"}), ("control", {"control", "dial"})):
        if rule.hook(name) is not None and not needed & traits:
            raise InputError(f"correction '{rule!r}' has the hook {name}: give it the trait {min(needed)}")
    sent = rule.init() if "dial" in traits else vector
    tried = {
        "shift": (vector, vector),
        "after": (vector, vector, vector, 2.0, 0.1),
        "control": (sent, Closed(vector, 0.5, 1.0, lambda: vector)),
    }
    for name, given in tried.items():
        hook, wanted = rule.hook(name), sent.shape if name == "control" else vector.shape
        if hook is None:
            continue
        try:
            shape = tuple(hook(*given).shape)
        except Exception as error:
            said = " ".join(str(error).split())[:200]
            raise InputError(f"correction '{rule!r}': its hook {name} raised {type(error).__name__}: {said}") from error
        if shape != tuple(wanted):
            raise InputError(f"correction '{rule!r}': its hook {name} gave shape {shape}, not {tuple(wanted)}")
