"""Gradient inversion: a batch from the update that it made, as an honest but curious server would try.

Deep leakage from gradients (Zhu et al. 2019) and inverting gradients (Geiping et al. 2020) look for the inputs whose
update is the one that was seen; of a single example behind a fully connected layer it is known in closed form (Phong et
al. 2018). Labels are told by the last layer's gradient (Zhao et al. 2020; of batches, Wainakh et al. 2022).
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedkeel.audit.updates import Sent
from fedkeel.core.keys import Key
from fedkeel.core.layout import Layout
from fedkeel.train.client import single_thread
from fedkeel.train.evaluate import evaluating

UNROLLED = 8
"""Steps of plain SGD on one batch that an attacker takes after the client; of more, only their mean is matched."""
_ASTRAY = 1e4  # times the box
CAP = 100.0
"""The most dB that a reconstruction counts for: beyond is the rounding of float32."""


class Found(NamedTuple):
    """What an attack came to: inputs (B, ...), and how far their update is from the one seen (cosine distance)."""

    attack: str
    x: Tensor
    distance: float


@dataclass(frozen=True)
class Sight:
    """What the attacker has: the model theta (P,) that the client began with, the update, what was to be done with it.

    `inputs` is the shape of one model input, `low` and `high` the box that inputs are known to lie in. No layer is
    private.
    """

    module: nn.Module
    layout: Layout
    theta: Tensor
    sent: Sent
    size: int
    inputs: tuple[int, ...]
    low: float
    high: float

    def tensors(self, vector: Tensor) -> dict[str, Tensor]:
        """Name -> tensor of what the client trained."""
        views = self.layout.views(vector)
        return {e.name: views[e.name] for e in self.layout.entries if e.trainable}

    @property
    def gradient(self) -> dict[str, Tensor]:
        """Name -> the mean gradient that the update tells of: -delta by the rate and what the steps are worth."""
        worth = float(self.sent.work.worth(torch.tensor([self.sent.steps]))[0])
        return self.tensors(-self.sent.delta / (self.sent.work.lr * worth))

    @property
    def unrolled(self) -> int:
        """How many steps the attacker follows exactly: all, where they are few, plain, and on the whole batch each."""
        few = self.sent.steps <= UNROLLED and self.size <= self.sent.work.batch_size
        return self.sent.steps if few and self.sent.work.bare else 1

    def predicted(self, x: Tensor, y: Tensor) -> list[Tensor]:
        """The update that these inputs would have made, differentiable in x; of many steps, up to its length."""
        work, views = self.sent.work, self.layout.views(self.theta)
        now = {e.name: views[e.name].clone().requires_grad_(e.trainable) for e in self.layout.entries}
        first = {name: now[name] for name in self.tensors(self.theta)}
        for _ in range(self.unrolled):
            loss = work.loss(functional_call(self.module, now, (x,)), y).mean()
            slopes = torch.autograd.grad(loss, [now[name] for name in first], create_graph=True)
            now = now | {name: now[name] - work.lr * slope for name, slope in zip(first, slopes, strict=True)}
        return [now[name] - first[name] for name in first]


def labels(sight: Sight, classes: int) -> list[int] | None:
    """The batch's labels, sorted, from the gradient of the last layer; None where no last layer gives one a class.

    A class's entry is the mean of p_c - [y = c]: only a class that is there can be below 0 (Zhao et al. 2020), and each
    example lowers its own by about the same, which is taken back one by one (Wainakh et al. 2022, algorithm 1). Without
    a bias it is the sum over the layer's inputs, which are 0 or more after ReLU.
    """
    heads = [(n, m) for n, m in sight.module.named_modules() if isinstance(m, nn.Linear) and m.out_features == classes]
    if not heads:
        return None
    name = heads[-1][0] + "." if heads[-1][0] else ""
    gradient = sight.gradient
    if name + "bias" in gradient:
        slope = gradient[name + "bias"].double().clone()
    elif name + "weight" in gradient:
        slope = gradient[name + "weight"].double().sum(1)
    else:
        return None
    impact = -float(slope.clamp(max=0).sum()) / sight.size * (1 + 1 / classes)
    below = torch.nonzero(slope < 0).flatten()
    found: list[int] = below[torch.argsort(slope[below])][: sight.size].tolist()
    for label in found:
        slope[label] += impact
    while len(found) < sight.size:
        found.append(int(slope.argmin()))
        slope[found[-1]] += impact
    return sorted(found)


def invert(sight: Sight, y: Tensor, key: Key, *, iterations: int = 400) -> list[Found]:
    """What each attack makes of the update, with these labels. Needs a module that is twice differentiable in x."""
    with single_thread(), evaluating(sight.module):  # what it draws while it trains (dropout) nobody else knows
        found = [
            Found("inverting gradients", *_geiping(sight, y, key.fold("geiping"), iterations)),
            Found("deep leakage", *_dlg(sight, y, key.fold("dlg"), iterations)),
        ]
        if (told := _closed_form(sight)) is not None:
            found.append(Found("closed form", told, _distance(sight, told, y)))
    return found


def _cosine(seen: list[Tensor], predicted: list[Tensor]) -> Tensor:
    along = torch.stack([(a * b).sum() for a, b in zip(seen, predicted, strict=True)]).sum()
    lengths = [torch.stack([t.square().sum() for t in part]).sum() for part in (seen, predicted)]
    return 1 - along / (lengths[0] * lengths[1]).sqrt().clamp_min(1e-30)


def _distance(sight: Sight, x: Tensor, y: Tensor) -> float:
    return float(_cosine(list(sight.tensors(sight.sent.delta).values()), sight.predicted(x, y)).detach())


def _start(sight: Sight, key: Key) -> Tensor:
    """Noise about the middle of the box."""
    noise = torch.randn(sight.size, *sight.inputs, generator=key.torch())
    return (0.5 * (sight.low + sight.high) + 0.25 * (sight.high - sight.low) * noise).clamp(sight.low, sight.high)


def _geiping(sight: Sight, y: Tensor, key: Key, iterations: int, tv: float = 1e-4) -> tuple[Tensor, float]:
    """Cosine distance and total variation, by Adam on the signs of the gradient, in the box (Geiping et al. 2020)."""
    seen = list(sight.tensors(sight.sent.delta).values())
    span = sight.high - sight.low
    x = _start(sight, key).requires_grad_()
    optimiser = torch.optim.Adam([x], lr=0.1 * span)
    milestones = [int(iterations * share) for share in (3 / 8, 5 / 8, 7 / 8)]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimiser, milestones, gamma=0.1)
    for _ in range(iterations):
        objective = _cosine(seen, sight.predicted(x, y)) + tv * _variation(x) / span
        (slope,) = torch.autograd.grad(objective, [x])
        x.grad = slope.sign()
        optimiser.step()
        schedule.step()
        with torch.no_grad():
            x.clamp_(sight.low, sight.high)
    found = x.detach()
    return found, _distance(sight, found, y)


def _dlg(sight: Sight, y: Tensor, key: Key, iterations: int) -> tuple[Tensor, float]:
    """The squared difference of the updates, by L-BFGS (Zhu et al. 2019), with the labels known (Zhao et al. 2020)."""
    seen = list(sight.tensors(sight.sent.delta).values())
    size = float(torch.stack([t.square().sum() for t in seen]).sum()) or 1.0
    scale = 1.0
    if sight.unrolled < sight.sent.steps:  # one step stands for the mean of all
        scale = float(sight.sent.work.worth(torch.tensor([sight.sent.steps]))[0])
    x = _start(sight, key).requires_grad_()
    optimiser = torch.optim.LBFGS(
        [x], max_iter=iterations, history_size=50, line_search_fn="strong_wolfe", tolerance_change=1e-12
    )

    best, lowest = x.detach().clone(), math.inf

    def closure() -> Tensor:
        nonlocal best, lowest
        predicted = sight.predicted(x, y)
        pairs = zip(seen, predicted, strict=True)
        objective = torch.stack([(a - scale * b).square().sum() for a, b in pairs]).sum() / size
        (x.grad,) = torch.autograd.grad(objective, [x])
        if float(objective.detach()) < lowest:
            best, lowest = x.detach().clone(), float(objective.detach())
        if not float(x.detach().abs().max()) < _ASTRAY * max(abs(sight.low), abs(sight.high), 1.0):
            raise _AstrayError
        return objective.detach()

    with contextlib.suppress(_AstrayError):
        optimiser.step(closure)  # type: ignore[no-untyped-call]
    found = best.clamp(sight.low, sight.high)
    return found, _distance(sight, found, y)


class _AstrayError(Exception):
    """A line search has left for where the objective is flat."""


def _closed_form(sight: Sight) -> Tensor | None:
    """One example behind a first layer W x + b: its gradients are d x and d, whatever follows (Phong et al. 2018).

    All steps on the same example keep that, so the sum of many tells it as well; rows are weighed by d^2. None where
    the first layer is another, or there are more examples.
    """
    layers = [(n, m) for n, m in sight.module.named_modules() if any(True for _ in m.parameters(recurse=False))]
    if sight.size > 1 or not layers or not isinstance(layers[0][1], nn.Linear):
        return None
    gradient, name = sight.gradient, layers[0][0] + "." if layers[0][0] else ""
    weight, bias = gradient.get(name + "weight"), gradient.get(name + "bias")
    if weight is None or bias is None or weight.shape[1] != math.prod(sight.inputs):
        return None
    power = float(bias.double().square().sum())
    x = (bias.double() @ weight.double() / power).float() if power else torch.zeros(weight.shape[1])
    return x.nan_to_num().clamp(sight.low, sight.high).view(1, *sight.inputs)


def _variation(x: Tensor) -> Tensor:
    """The mean difference of neighbours: rows and columns of images, moments of series; 0 of plain numbers."""
    ways = range(2, x.ndim)
    found = [x.diff(dim=way).abs().mean() for way in ways if x.shape[way] > 1]
    return torch.stack(found).sum() if found else x.new_zeros(())


class Score(NamedTuple):
    """How near a reconstruction is: mean over the batch of the PSNR in dB, and the mean squared error."""

    psnr: float
    mse: float


def matched(found: Tensor, truth: Tensor) -> Tensor:
    """The reconstructions in the order of the examples that they are nearest to, each used once (Hungarian method)."""
    from scipy.optimize import linear_sum_assignment

    costs = (truth.flatten(1)[:, None] - found.flatten(1)[None]).double().square().mean(-1)
    return found[torch.from_numpy(linear_sum_assignment(costs.numpy())[1])]


def score(found: Tensor, truth: Tensor, span: float) -> Score:
    """PSNR and error of reconstructions in the order of the truth, for values that span so much."""
    errors = (found - truth).double().flatten(1).square().mean(1)
    decibels = (10 * torch.log10(span**2 / errors.clamp_min(1e-30))).clamp(max=CAP)
    return Score(float(decibels.mean()), float(errors.mean()))


def baseline(truth: Tensor, mean: Tensor, low: float, high: float, key: Key) -> Score:
    """The better of two guesses that need no update: the data's mean, and uniform noise."""
    noise = low + (high - low) * torch.rand(truth.shape, generator=key.torch())
    guesses = (mean.expand_as(truth), matched(noise, truth))
    return max((score(guess, truth, high - low) for guess in guesses), key=lambda s: s.psnr)


def overlap(found: list[int], truth: list[int]) -> float:
    """The share of labels that were told rightly, as multisets."""
    rest = list(truth)
    for label in found:
        if label in rest:
            rest.remove(label)
    return 1 - len(rest) / len(truth)
