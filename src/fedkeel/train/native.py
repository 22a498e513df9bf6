"""The recorded step as one call of the compiled kernels: batch after batch, with no Python and no dispatch between.

For steps of which every operation is known to `train/lower.py`: fully connected layers, the usual activations, losses
over classes. The graph is the traced backend's own, recorded from the user's module and fused with the update already.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager

import numpy as np
import torch
from torch import Tensor, nn

from fedkeel.core.layout import Layout
from fedkeel.kernels import native
from fedkeel.train.client import Told, chunk
from fedkeel.train.contract import ClientData, LocalWork, Scale
from fedkeel.train.lower import Lowered
from fedkeel.train.operations import BASES, LOSSES, ROWS, X, Y
from fedkeel.train.record import NotTraceableError
from fedkeel.train.traced import TracedStep

_AS_THEY_LIE = (torch.uint8, torch.float32)


class NativeStep:
    """A `Step` by the compiled kernels. Raises `NotTraceableError` where an operation has none, or none were built."""

    def __init__(
        self,
        module: nn.Module,
        layout: Layout,
        data: ClientData,
        work: LocalWork,
        sizes: Iterable[int] = (),
        vector: Tensor | None = None,
        part: slice | None = None,
    ) -> None:
        library = native.library()
        if isinstance(library, str):
            raise NotTraceableError(library)
        if data.x.device.type != "cpu":
            raise NotTraceableError("the compiled kernels run on the CPU")
        self._library, self._data, self._size = library, data, work.batch_size
        self._traced = TracedStep(module, layout, data, work, (), vector, part, as_it_is=True)
        self.vector = self._traced.vector
        # What the kernels can scale, they gather from where it lies; the rest is prepared some batches at a time.
        known = type(data.prepare) is Scale and data.x.dtype in _AS_THEY_LIE and data.x.is_contiguous()
        self._scale = data.prepare if known and isinstance(data.prepare, Scale) else None
        self._labels = data.y.contiguous()
        self._known: dict[int, Lowered] = {}
        for size in sorted(sizes, reverse=True):
            self._lowered(size)

    def mode(self) -> AbstractContextManager[None]:
        return torch.inference_mode()

    def begin(self, told: Told) -> None:
        self._traced.begin(told)

    def steps(self, rows: Tensor) -> Tensor:
        losses = torch.empty(len(rows))
        if self._scale is not None:
            self._through(rows, self._data.x, self._labels, losses)
            return losses
        many = chunk(self._data, self._size)
        for part, part_losses in zip(torch.split(rows, many), torch.split(losses, many), strict=True):
            x = self._data.prepare(self._data.x[part]).contiguous()
            if x.dtype != torch.float32:
                raise TypeError(f"inputs of {x.dtype} have no compiled kernel")
            self._through(torch.arange(len(part)), x, self._labels[part], part_losses)
        return losses

    def _through(self, rows: Tensor, x: Tensor, y: Tensor, losses: Tensor) -> None:
        """Step through these rows of x and y."""
        if int(rows.max()) >= min(len(x), len(y)) or int(rows.min()) < 0:
            raise IndexError("the client's rows reach beyond the data")
        full, rest = divmod(len(rows), self._size)
        for size, start, times in ((self._size, 0, full), (rest, full * self._size, 1)):
            if size and times:
                self._run(self._lowered(size), rows[start:], x, y, losses[start:], size, times)

    def _run(self, lowered: Lowered, rows: Tensor, x: Tensor, y: Tensor, losses: Tensor, size: int, times: int) -> None:
        bases, strides = np.zeros((2, len(BASES)), np.int64)
        for base, tensor in ((ROWS, rows), (LOSSES, losses), (X, x), (Y, y)):
            bases[base] = tensor.data_ptr()
        strides[[ROWS, LOSSES]] = size * rows.element_size(), size * losses.element_size()
        table = lowered.table
        failed = self._library.run(table.ctypes.data, len(table), bases.ctypes.data, strides.ctypes.data, times)
        if failed:
            raise IndexError(f"a label of batch {failed} of {times} is not one of the model's classes")

    def _lowered(self, size: int) -> Lowered:
        if size not in self._known:
            graph, losses = self._traced.record(size)
            inputs, scale = self._traced.inputs(), self._scale or Scale()
            dtype = torch.float32 if self._scale is None else self._data.x.dtype
            self._known[size] = Lowered(graph, losses, inputs, size, dtype, scale)
        return self._known[size]
