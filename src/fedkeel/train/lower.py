"""From a recorded step to a table of operations for the compiled kernels (kernels/c/step.h)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fedkeel.train.contract import Scale
from fedkeel.train.lowerings import RULES, called, kind
from fedkeel.train.operations import FIXED, LOSSES, NOWHERE, ROWS, ZERO, Operation, Place, X, Y, merged, table
from fedkeel.train.record import Graph, Node, NotTraceableError, Ref

_LINE = 64  # bytes of a cache line
LANES = 16  # of a batch-last image: their number is a multiple


@dataclass(frozen=True, slots=True)
class _Matrix:
    """A float32 matrix in memory, its rows (its columns where `turned`) `ld` elements apart."""

    base: int
    at: int
    ld: int
    rows: int
    columns: int
    turned: bool

    @property
    def T(self) -> _Matrix:  # noqa: N802
        return replace(self, rows=self.columns, columns=self.rows, turned=not self.turned)


class Lowered:
    """A recorded step on `size` examples as `table`, of `kernels.native.OPERATION`, over the memory of these inputs.

    It begins by gathering its batch: examples `x`, uint8 or float32, scaled as `scale` says, and labels, by row
    numbers. Raises `NotTraceableError` for an operation that the kernels do not have.
    """

    def __init__(
        self, graph: Graph, losses: int, inputs: Mapping[str, Tensor], size: int, dtype: torch.dtype, scale: Scale
    ) -> None:
        missing = dict.fromkeys(
            called(node) for node in graph.nodes if not self._is_look(graph, node) and kind(node) not in RULES
        )
        if missing:
            raise NotTraceableError(f"the compiled kernels have no {', '.join(missing)}")
        self._graph, self._size = graph, size
        self._lasts: dict[int, int] = {}  # storage: where it lies batch-last
        self._which: dict[int, int] = {}  # value: where it lies which pixel of a window was the largest
        self._kept: list[Tensor] = []  # memory that the table points into
        self._operations: list[Operation] = []
        self._places = {
            graph.storage(value): (FIXED, inputs[name].data_ptr())
            for value, name in graph.inputs.items()
            if name not in ("x", "y")
        }
        for value, name in graph.inputs.items():
            if name == "x":
                self._gather(value, size, dtype, scale)
            elif name == "y":
                self._gather_labels(value, size)
        self._places[graph.storage(losses)] = LOSSES, 0
        for node in graph.nodes:
            if not self._is_look(graph, node):
                RULES[kind(node)](self, node)
        out = graph.tensors[losses]
        if not out.is_contiguous() or out.storage_offset() or out.shape != (size,):
            raise NotTraceableError("its loss does not lie in one piece")
        self.table = table(merged(self._operations))
        del self._graph, self._operations, self._places, self._lasts, self._which

    def _gather(self, value: int, size: int, dtype: torch.dtype, scale: Scale) -> None:
        self._kept.append(shift := torch.tensor(scale.shift))
        name = "gather_bytes" if dtype == torch.uint8 else "gather_floats"
        width = self._graph.tensors[value].numel() // size
        places = self.flat(Ref(value)), (X, 0, 0), (ROWS, 0, 0), (FIXED, shift.data_ptr(), 0)
        self.emit(name, *places, m=size, n=width, alpha=scale.factor)

    def _gather_labels(self, value: int, size: int) -> None:
        if self._graph.tensors[value].shape != (size,):
            raise NotTraceableError("a target that is not one class each has no compiled kernel")
        self.emit("gather_labels", self.flat(Ref(value), torch.int64), (Y, 0, 0), (ROWS, 0, 0), m=size)

    @staticmethod
    def _is_look(graph: Graph, node: Node) -> bool:
        """Whether a node is but another look at memory that is there."""
        outs = [graph.storage(o) for o in node.outs if o is not None]
        return bool(outs) and not node.writes and {graph.storage(v) for v in node.uses}.issuperset(outs)

    # -- where things lie

    def _place(self, value: int) -> tuple[int, int]:
        """(base, address) of a value's first element; fresh memory for one that is made here."""
        graph, tensor = self._graph, self._graph.tensors[value]
        storage = graph.storage(value)
        if storage not in self._places:
            if value in graph.constants:
                copy = tensor.detach().clone(memory_format=torch.contiguous_format)
                self._kept.append(copy)
                return FIXED, copy.data_ptr()
            at = self._room(tensor.untyped_storage().nbytes())
            self._places[storage] = FIXED, at
            if storage in self._lasts:
                given = FIXED, self._lasts[storage], 0
                self.emit("to_rows", (FIXED, at, 0), given, m=self._size, n=self._features(value), k=self.lanes)
        base, start = self._places[storage]
        return base, start + int(tensor.storage_offset()) * tensor.element_size()

    def _room(self, size: int) -> int:
        """The address of so many bytes of memory."""
        room = torch.empty(size + _LINE, dtype=torch.uint8)
        self._kept.append(room)
        return -(-room.data_ptr() // _LINE) * _LINE

    @property
    def lanes(self) -> int:
        """Examples of a batch-last image, with those that fill it up."""
        return -(-self._size // LANES) * LANES

    def _features(self, value: int) -> int:
        """The numbers that an example has of this value, which must be all of its memory, example after example."""
        tensor = self._graph.tensors[value]
        whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == 4 * tensor.numel()
        if tensor.dtype != torch.float32 or tensor.shape[:1] != (self._size,) or not whole:
            raise NotTraceableError("a part of an image has no compiled kernel")
        return tensor.numel() // self._size

    def last(self, value: int, *, new: bool = False) -> Place:
        """Where a value lies batch-last, (features, lanes); made of its rows unless it is `new`, to be filled."""
        storage, features = self._graph.storage(value), self._features(value)
        if storage not in self._lasts:
            rows = NOWHERE if new else (*self._place(value), 0)
            self._lasts[storage] = at = self._room(4 * features * self.lanes)
            if not new:
                self.emit("to_last", (FIXED, at, 0), rows, m=self._size, n=features, k=self.lanes)
        return FIXED, self._lasts[storage], 1

    def image(self, name: str, out: Place, shape: Sequence[int], *given: Place) -> None:
        """An operation on images of the shape (in, out, height, width, kh, kw, pad_h, pad_w)."""
        inside, outside, height, width, kh, kw, pad_h, pad_w = shape
        if "pool" in name:
            below, across, rooms = height // kh, width // kw, (0, 0)
        else:
            below, across = height + 2 * pad_h - kh + 1, width + 2 * pad_w - kw + 1
            widened = 4 * inside * height * (width + 2 * pad_w) * self.lanes
            rooms = self._room(4 * inside * outside * kh * kw), self._room(widened) if pad_w else 0
        self._kept.append(kept := torch.tensor([*shape, below, across, self.lanes, *rooms]))
        a, b, c = (*given, *[NOWHERE] * (3 - len(given)))
        self.emit(name, out, a, b, c, (FIXED, kept.data_ptr(), 0))

    def which(self, value: int, like: int) -> Place:
        """Where a pooling keeps which pixel was the largest."""
        if value not in self._which:
            self._which[value] = self._room(4 * self._features(like) * self.lanes)
        return FIXED, self._which[value], 1

    def matrix(self, argument: Any) -> _Matrix:
        """A matrix as it lies in memory."""
        tensor = self.float32(argument)
        if tensor.ndim != 2:
            raise NotTraceableError(f"a product of {tensor.ndim}-dimensional tensors has no compiled kernel")
        rows, columns = tensor.shape
        dense = argument.value in self._graph.constants
        down, across = (columns, 1) if dense else tensor.stride()
        if across == 1 or columns == 1:
            return _Matrix(*self._place(argument.value), down, rows, columns, False)
        if down == 1 or rows == 1:
            return _Matrix(*self._place(argument.value), across, rows, columns, True)
        raise NotTraceableError("a product of scattered memory has no compiled kernel")

    def upright(self, argument: Any) -> _Matrix:
        """A matrix whose rows lie in one piece."""
        found = self.matrix(argument)
        if found.turned:
            raise NotTraceableError("the rows of a transposed matrix have no compiled kernel")
        return found

    def flat(self, argument: Any, dtype: torch.dtype = torch.float32) -> Place:
        """(base, address, elements apart) of a tensor that lies in one piece."""
        tensor = self.float32(argument) if dtype == torch.float32 else self._graph.tensors[argument.value]
        if tensor.dtype != dtype:
            raise NotTraceableError(f"a value of {tensor.dtype} has no compiled kernel")
        if argument.value not in self._graph.constants and not tensor.is_contiguous():
            raise NotTraceableError("scattered memory has no compiled kernel")
        return *self._place(argument.value), 1

    def float32(self, argument: Any) -> Tensor:
        """The recorded tensor behind an argument."""
        if type(argument) is not Ref:
            raise NotTraceableError("a plain number in a tensor's place has no compiled kernel")
        tensor = self._graph.tensors[argument.value]
        if tensor.dtype != torch.float32:
            raise NotTraceableError(f"a value of {tensor.dtype} has no compiled kernel")
        return tensor

    def _elements(self, *arguments: Any) -> int:
        """How many elements each of these has: the same number, with no broadcasting between them."""
        shapes = {tuple(self.float32(a).shape) for a in arguments}
        if len(shapes) != 1:
            raise NotTraceableError("broadcasting has no compiled kernel")
        return math.prod(shapes.pop())

    # -- what the kernels do

    def emit(
        self,
        name: str,
        out: Place,
        *given: Place,
        m: int = 0,
        n: int = 0,
        k: int = 0,
        start: int = ZERO,
        alpha: float = 1.0,
    ) -> None:
        a, b, c, d = (*given, *[NOWHERE] * (4 - len(given)))
        self._operations.append(Operation(name, m, n, k, start, alpha, 1.0, 0.0, a, b, c, d, out))

    def product(self, out: _Matrix, a: _Matrix, b: _Matrix, start: int, row: Any = None, alpha: float = 1.0) -> None:
        """out = start + alpha * a @ b."""
        if out.turned:
            out, a, b = out.T, b.T, a.T
            if row is not None:
                raise NotTraceableError("a product added to a column has no compiled kernel")
        name = {(False, True): "product_nt", (False, False): "product_nn", (True, False): "product_tn"}.get(
            (a.turned, b.turned)
        )
        if name is None:
            raise NotTraceableError("the product of two transposed matrices has no compiled kernel")
        places = [(x.base, x.at, x.ld) for x in (out, a, b)]
        added = NOWHERE
        if row is not None:
            if self.float32(row).shape != (out.columns,):
                raise NotTraceableError("broadcasting has no compiled kernel")
            added = self.flat(row)
        self.emit(name, *places, added, m=out.rows, n=out.columns, k=a.columns, start=start, alpha=alpha)

    def elementwise(self, name: str, out: int, a: Any, b: Any = None, alpha: float = 1.0) -> None:
        """out[j] = f(a[j], b[j], alpha)."""
        given = (a,) if b is None else (a, b)
        count = self._elements(*given, Ref(out))
        homes = [self._graph.storage(argument.value) for argument in given]
        if any(home in self._lasts and home not in self._places for home in homes):
            places = [self.last(argument.value) for argument in given]
            count = self._features(out) * self.lanes
            self.emit(name, self.last(out, new=True), *places, n=count, alpha=alpha)
            return
        self.emit(name, self.flat(Ref(out)), *map(self.flat, given), n=count, alpha=alpha)

    def stretch(self, name: str, out: Any, a: Any, b: Any = None, alpha: float = 1.0) -> None:
        """The same over tensors of as many elements each, whatever their shapes."""
        given = (out, a) if b is None else (out, a, b)
        places = [self.flat(argument) for argument in given]
        self.emit(name, *places, n=self.float32(out).numel(), alpha=alpha)

    def scaled_by(self, out: int, a: Any, number: Any) -> None:
        """out[j] = a[j] * number, one that lies in memory."""
        count = self._elements(a, Ref(out))
        self.emit("scale_by", self.flat(Ref(out)), self.flat(a), self.flat(number), n=count)

    def tick(self, clock: Any) -> None:
        """One more step."""
        self.emit("tick", self.flat(clock, torch.float64))

    def adam(self, arguments: Sequence[Any], numbers: Sequence[float], lr: float) -> None:
        """`rules/optimiser.py`'s, in one pass."""
        theta, g, clock, *slots = arguments
        (base, m, _), (_, v, _) = map(self.flat, slots)
        self._kept.append(kept := torch.tensor(numbers, dtype=torch.float64))
        places = self.flat(g), (base, m, (v - m) // 4), (FIXED, kept.data_ptr(), 0), self.flat(clock, torch.float64)
        self.emit("adam", self.flat(theta), *places, n=self.float32(theta).numel(), alpha=lr)

    def by_rows(self, name: str, out: int, a: Any, b: Any = None) -> None:
        """Over the last dimension, which the classes are in."""
        given = (a,) if b is None else (a, b)
        count, last = self._elements(*given, Ref(out)), self.float32(a).shape[-1]
        self.emit(name, self.flat(Ref(out)), *map(self.flat, given), m=count // last, n=last)

    def loss(self, name: str, out: int, a: Any, labels: Any, matrix: Any) -> None:
        """Between a value per example and a matrix (examples, classes), by the labels."""
        rows, classes = self.float32(matrix).shape
        self.emit(name, self.flat(Ref(out)), self.flat(a), self.flat(labels, torch.int64), m=rows, n=classes)

    def ones(self, count: int) -> _Matrix:
        """A row of ones."""
        self._kept.append(ones := torch.ones(count))
        return _Matrix(FIXED, ones.data_ptr(), count, 1, count, False)

    def row(self, value: int) -> _Matrix:
        """A flat tensor as a matrix of one row."""
        base, at, _ = self.flat(Ref(value))
        count = self._graph.tensors[value].numel()
        return _Matrix(base, at, count, 1, count, False)
