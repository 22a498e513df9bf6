"""DP-SGD (Abadi et al. 2016, algorithm 1): batches by Poisson sampling, gradients scaled down one by one, noise.

Where those gradients come from is a backend's affair (`Clipped`): here one example after another, in `ghost.py` all at
once. Everything else is the same for all of them, and in this file.
"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedkeel.core.errors import InputError
from fedkeel.core.keys import Key
from fedkeel.core.noise import Noise
from fedkeel.core.registry import Rule
from fedkeel.core.types import ExampleNoise
from fedkeel.kernels.normal import add_noise
from fedkeel.train.client import Client, Outcome, Step, Told, seeded, steps_wanted, succeeded
from fedkeel.train.contract import ClientData, Task
from fedkeel.train.evaluate import evaluating
from fedkeel.train.loop import LoopStep

SHAVED = 1 - 2.0**-16
"""Of the norm, to which gradients are scaled down: their own are right to about that, in float32."""
_MOST = 0x7FFF_FFFF_FFFF_FFFF
_BLOCK = 1 << 15  # columns at a time, whose noise stays in the cache
_SIZES = 4  # of recorded batches, up to the size that is expected
_TRIED = 4  # examples that a module is checked with
_TOLERANCE = 1e-4  # relative, of outputs alone and in a batch


class Clipped(Protocol):
    """Examples' gradients at the model as it is, each scaled down to the norm."""

    def mode(self) -> AbstractContextManager[None]:
        """The autograd mode that it runs in."""

    def __call__(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of these rows of the data: the sum (T,), valid until the next; norms before (b,); losses (b,)."""


class OneByOne:
    """`Clipped` by autograd, one example after another: the oracle."""

    def __init__(self, loop: LoopStep, norm: float) -> None:
        self.loop, self.norm = loop, norm

    def mode(self) -> AbstractContextManager[None]:
        return torch.no_grad()

    def __call__(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        data, total = self.loop.data, torch.zeros_like(self.loop.theta)
        norms, losses = torch.empty(2, len(rows), device=total.device)
        for at, row in enumerate(torch.split(rows, 1)):
            g, loss = self.loop.gradient(data.prepare(data.x[row]), data.y[row])
            norms[at], losses[at] = g.norm(), loss.squeeze(0)
            total += g * (self.norm / norms[at]).clamp(max=1)
        return total, norms, losses


class PrivateStep:
    """A `Step` that draws its batch from the rows it is given, each by itself, and adds noise to their gradients' sum.

    What comes after the noise is the loop's own.
    """

    def __init__(self, loop: LoopStep, clipped: Clipped, given: ExampleNoise) -> None:
        self.loop, self.clipped, self.given = loop, clipped, given
        self.vector = loop.vector
        self.g = torch.zeros_like(loop.theta)
        self.noise: Noise | None = None  # the client's own, made in the process that trains it

    def mode(self) -> AbstractContextManager[None]:
        return self.clipped.mode()

    def begin(self, told: Told) -> None:
        self.loop.begin(told)

    def steps(self, rows: Tensor) -> Tensor:
        """One step; the losses of those drawn with finite gradients. Others count as zero, and nobody hears of them."""
        assert self.noise is not None
        expected = min(self.loop.work.batch_size, len(rows))
        batch = rows[drawn(self.noise, len(rows), expected).to(rows.device)]
        losses = torch.empty(0, device=rows.device)
        if len(batch):
            total, norms, losses = self.clipped(batch)
            if not bool(norms.isfinite().all()):
                batch = batch[norms.isfinite()]
                total, _, losses = self.clipped(batch) if len(batch) else (torch.zeros_like(total), norms, losses[:0])
            self.g.copy_(total)
        else:
            self.g.zero_()
        for part in torch.split(self.g, _BLOCK):
            add_noise(part, self.noise.normals(len(part)), self.given.noise * self.given.norm, 1 / expected)
        self.loop.descend(self.g)
        return losses


def drawn(noise: Noise, count: int, expected: int) -> Tensor:
    """Which of `count` examples are in a batch, (b,) int64: each by itself, with probability expected / count."""
    below = (expected << 63) // count
    return ((noise.words(count) & _MOST) <= below - 1).nonzero().squeeze(1)


def filled(rows: Tensor, expected: int) -> Tensor:
    """As every draw has its own size: the rows, and the first of them again up to one of a few sizes."""
    apart = -(-expected // _SIZES)
    return torch.cat([rows, rows[:1].expand(-len(rows) % apart)])


class PrivateClient(Client):
    """Trains clients by a `PrivateStep`. Their numbers of steps depend on no loss."""

    def _epochs(self, task: Task, step: Step, stopping: Rule, epoch: int) -> tuple[Outcome, int]:
        assert isinstance(step, PrivateStep)
        count, checked = self.data.count(task.client), []
        if not count:
            return succeeded([]), epoch
        if self.validation is not None:
            checked = [self._validated(task.client)]
        rows = torch.arange(*self.data.range(task.client), device=self.data.x.device)
        step.noise = Noise(task.key.fold("example_noise") if step.given.reproducible else None)
        losses: list[float] = []
        wanted = steps_wanted(stopping, count, self.work.batch_size, [], task)
        for _ in range(wanted):
            each = step.steps(rows)
            if len(each := each[each.isfinite()]):
                losses.append(float(each.mean()))
        outcome = succeeded(losses)._replace(steps=wanted, failure=None)
        if self.validation is not None:
            outcome = outcome._replace(first=checked[0], last=self._validated(task.client))
        return outcome, epoch


def check_module(module: nn.Module, data: ClientData) -> None:
    """Raise `InputError` for a module whose examples have no gradients of their own, or that keeps what they tell."""
    for name, part in module.named_modules():
        if isinstance(part, _BatchNorm):
            raise InputError(
                f"layer '{name}': BatchNorm mixes examples, so that none has a gradient of its own: use GroupNorm"
            )
    module = copy.deepcopy(module).train().to(data.x.device)
    x = data.x[:_TRIED]
    x = data.prepare(x.nan_to_num(0.0, 0.0, 0.0) if x.is_floating_point() else x)
    with torch.no_grad(), seeded(Key(0), x.device):
        before = {name: buffer.clone() for name, buffer in module.named_buffers()}
        module(x)
        for name, buffer in module.named_buffers():
            if not torch.equal(buffer, before[name]):
                raise InputError(
                    f"buffer '{name}' changes with the examples that the model is given, without noise: use a model "
                    "without such a buffer (GroupNorm, not BatchNorm)"
                )
        with evaluating(module):
            together, alone = module(x), torch.cat([module(one) for one in torch.split(x, 1)])
    if not torch.allclose(together, alone, _TOLERANCE, _TOLERANCE * float(together.abs().max()), equal_nan=True):
        raise InputError(
            "the model's output for an example depends on the others in its batch, so that none has a gradient of its "
            "own: use layers that do not mix examples (GroupNorm, not BatchNorm)"
        )
