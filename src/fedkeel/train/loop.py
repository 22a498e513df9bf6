"""The plain loop: PyTorch autograd over any module. The oracle that every other backend equals to rounding."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedkeel.core.layout import Layout
from fedkeel.train.client import Told, batches
from fedkeel.train.contract import ClientData, LocalWork


class LoopStep:
    """A `Step` by autograd: gradient of the batch's mean loss, corrections, the optimiser."""

    def __init__(self, module: nn.Module, layout: Layout, data: ClientData, work: LocalWork) -> None:
        device = data.x.device
        self.module = copy.deepcopy(module).train().to(device)
        self.data, self.work = data, work
        self.vector = torch.zeros(layout.width, device=device)
        self.theta = self.vector[layout.trainable]
        self.sizes = [e.size for e in layout.entries if e.trainable]
        columns = layout.views(self.vector)
        self.trained = [e for e in layout.entries if e.trainable]
        self.buffers = {e.name: (columns[e.name], getattr(torch, e.dtype)) for e in layout.entries if not e.trainable}
        self.kept = {n: b for n, b in self.module.named_buffers() if n not in self.buffers}

    def mode(self) -> AbstractContextManager[None]:
        return torch.no_grad()

    def begin(self, told: Told) -> None:
        self.told = told.to(self.vector.device)
        self.theta0 = self.theta.clone()
        self.slots = [torch.full_like(self.theta, value) for value in self.work.slots]
        self.clock = torch.zeros((), dtype=torch.float64, device=self.vector.device)
        # Integer buffers are no columns: each client starts from the module's own.
        self.state = {name: buffer.clone() for name, buffer in self.kept.items()}

    def steps(self, rows: Tensor) -> Tensor:
        return torch.cat([self._step(x, y) for x, y in batches(self.data, rows, self.work.batch_size, Tensor.detach)])

    def _step(self, x: Tensor, y: Tensor) -> Tensor:
        leaf = self.theta.detach().requires_grad_()
        # Copies: autograd would take a buffer's change in place for a change of the weights in the same vector.
        state = self.state | {n: column.to(dtype, copy=True) for n, (column, dtype) in self.buffers.items()}
        with torch.enable_grad():
            pieces = zip(self.trained, torch.split(leaf, self.sizes), strict=True)
            tensors = state | {e.name: piece.view(e.shape).to(getattr(torch, e.dtype)) for e, piece in pieces}
            losses: Tensor = self.work.loss(functional_call(self.module, tensors, (x,)), y)
            (g,) = torch.autograd.grad(losses.mean(), leaf)
        for correct, c_i, c in zip(self.work.corrections, self.told.memory, self.told.control, strict=True):
            g = correct(g, self.theta, self.theta0, c_i, c)
        shift, linear = self.told.shift, self.work.linear
        with torch.no_grad():
            self.clock.add_(1)
            whole = g if shift is None or not linear else g + shift
            self.work.optimiser(self.theta, whole, self.slots, self.clock, self.work.lr)
            if shift is not None and not linear:
                self.theta.sub_(shift, alpha=self.work.lr)
            for name, (column, _) in self.buffers.items():
                column.copy_(tensors[name])  # a module may have put a new tensor in the buffer's place
        self.state = {name: tensors[name].detach() for name in self.state}
        return losses.detach()
