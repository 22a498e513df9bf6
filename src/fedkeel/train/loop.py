"""The plain loop: PyTorch autograd over any module. The oracle that every other backend equals to rounding."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from fedkeel.core.layout import Layout
from fedkeel.train.client import Told, batches
from fedkeel.train.contract import ClientData, LocalWork
from fedkeel.train.objective import batch_losses, own_columns, pulled


class LoopStep:
    """A `Step` by autograd: gradient of the batch's mean loss, corrections, the optimiser."""

    def __init__(
        self,
        module: nn.Module,
        layout: Layout,
        data: ClientData,
        work: LocalWork,
        vector: Tensor | None = None,
        part: slice | None = None,
    ) -> None:
        """`vector` (W,) is where the model lives, its own by default; `part` are the columns that are trained."""
        device = data.x.device
        self.module = copy.deepcopy(module).train().to(device)
        self.layout, self.data, self.work = layout, data, work
        self.vector = torch.zeros(layout.width, device=device) if vector is None else vector
        self.theta = self.vector[layout.trainable]
        self.part = layout.trainable if part is None else part
        self.own = own_columns(layout)
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
        g, losses = self.gradient(x, y)
        self.descend(g)
        return losses

    def gradient(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient (T,) of the batch's mean loss over the trainable columns, and each loss (B,); moves buffers."""
        leaf = self.theta.detach().requires_grad_()
        # Copies: autograd would take a buffer's change in place for a change of the weights in the same vector.
        state = self.state | {n: column.to(dtype, copy=True) for n, (column, dtype) in self.buffers.items()}
        with torch.enable_grad():
            tensors = state | self._named(leaf)
            start = self._named(self.theta0) if self.work.looks_back else {}
            descended, losses = batch_losses(self.module, self.layout, self.work, tensors, start, x, y)
            (g,) = torch.autograd.grad(descended.mean(), leaf)
        with torch.no_grad():
            for name, (column, _) in self.buffers.items():
                column.copy_(tensors[name])  # a module may have put a new tensor in the buffer's place
        self.state = {name: tensors[name].detach() for name in self.state}
        return g, losses.detach()

    def descend(self, g: Tensor) -> None:
        """A step by the gradient (T,): corrections, the optimiser."""
        g = pulled(self.work, self.layout, g, self.theta, self.theta0)
        g = self._corrected(g)
        shift, linear = self.told.shift, self.work.linear
        part = self.part
        with torch.no_grad():
            self.clock.add_(1)
            whole = g if shift is None or not linear else g + shift
            slots = [slot[part] for slot in self.slots]
            self.work.optimiser(self.theta[part], whole[part], slots, self.clock, self.work.lr)
            if shift is not None and not linear:
                self.theta[part].sub_(shift[part], alpha=self.work.lr)

    def _corrected(self, g: Tensor) -> Tensor:
        """The gradient after the corrections, which leave what is the client's own alone."""
        at = self.own
        part = g[at:]
        for rule, c_i, c in zip(self.work.corrections, self.told.memory, self.told.control, strict=True):
            dial = rule.reads("dial")
            given = None if c_i is None else c_i[at:], c if c is None or dial else c[at:]
            part = rule(part, self.theta[at:], self.theta0[at:], *given)
        return torch.cat([g[:at], part]) if at else part

    def _named(self, trainable: Tensor) -> dict[str, Tensor]:
        """The trained tensors in the trainable columns."""
        pieces = zip(self.trained, torch.split(trainable, self.sizes), strict=True)
        return {e.name: piece.view(e.shape).to(getattr(torch, e.dtype)) for e, piece in pieces}
