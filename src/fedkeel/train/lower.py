"""From a recorded step to a table of operations for the compiled kernels (kernels/c/step.h)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedkeel.core.registry import definition
from fedkeel.kernels import native
from fedkeel.train.contract import Scale
from fedkeel.train.fuse import Optimise, tick
from fedkeel.train.record import Graph, Node, NotTraceableError, Ref

aten = torch.ops.aten
_NAMES = (
    *("product_nt", "product_nn", "product_tn", "relu", "threshold_backward", "tanh", "tanh_backward", "sigmoid"),
    *("sigmoid_backward", "log_softmax", "log_softmax_backward", "nll", "nll_backward", "add", "multiply", "scale"),
    *("tick", "adam"),
    *("gather_bytes", "gather_floats", "gather_labels"),
    *("to_last", "to_rows", "conv", "conv_data", "conv_weight", "pool", "pool_backward"),
)
_CODES = {name: code for code, name in enumerate(_NAMES)}  # the same order as in native.c
_ZERO, _ROW, _OUT = range(3)  # what a product starts from: zero, a row for all, or what is there
BASES = FIXED, ROWS, LOSSES, X, Y = range(5)  # of addresses: memory of the step; its rows, losses, examples, labels
_LINE = 64  # bytes of a cache line
_LANES = 16  # of a batch-last image: their number is a multiple
_IGNORED = -100  # the label that torch's loss passes over unless told otherwise


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
            _called(node) for node in graph.nodes if not self._is_look(graph, node) and _kind(node) not in _RULES
        )
        if missing:
            raise NotTraceableError(f"the compiled kernels have no {', '.join(missing)}")
        self._graph, self._size = graph, size
        self._lasts: dict[int, int] = {}  # storage: where it lies batch-last
        self._which: dict[int, int] = {}  # value: where it lies which pixel of a window was the largest
        self._kept: list[Tensor] = []  # memory that the table points into
        self._rows: list[Any] = []
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
                _RULES[_kind(node)](self, node)
        out = graph.tensors[losses]
        if not out.is_contiguous() or out.storage_offset() or out.shape != (size,):
            raise NotTraceableError("its loss does not lie in one piece")
        self.table: NDArray[Any] = np.array(self._rows, native.OPERATION)
        del self._graph, self._rows, self._places, self._lasts, self._which

    def _gather(self, value: int, size: int, dtype: torch.dtype, scale: Scale) -> None:
        self._kept.append(shift := torch.tensor(scale.shift))
        name = "gather_bytes" if dtype == torch.uint8 else "gather_floats"
        width = self._graph.tensors[value].numel() // size
        places = self._flat(Ref(value)), (X, 0, 0), (ROWS, 0, 0), (FIXED, shift.data_ptr(), 0)
        self._emit(name, *places, m=size, n=width, alpha=scale.factor)

    def _gather_labels(self, value: int, size: int) -> None:
        if self._graph.tensors[value].shape != (size,):
            raise NotTraceableError("a target that is not one class each has no compiled kernel")
        self._emit("gather_labels", self._flat(Ref(value), torch.int64), (Y, 0, 0), (ROWS, 0, 0), m=size)

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
                self._emit("to_rows", (FIXED, at, 0), given, m=self._size, n=self._features(value), k=self.lanes)
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
        return -(-self._size // _LANES) * _LANES

    def _features(self, value: int) -> int:
        """The numbers that an example has of this value, which must be all of its memory, example after example."""
        tensor = self._graph.tensors[value]
        whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == 4 * tensor.numel()
        if tensor.dtype != torch.float32 or tensor.shape[:1] != (self._size,) or not whole:
            raise NotTraceableError("a part of an image has no compiled kernel")
        return tensor.numel() // self._size

    def last(self, value: int, *, new: bool = False) -> tuple[int, int, int]:
        """Where a value lies batch-last, (features, lanes); made of its rows unless it is `new`, to be filled."""
        storage, features = self._graph.storage(value), self._features(value)
        if storage not in self._lasts:
            rows = (FIXED, 0, 0) if new else (*self._place(value), 0)
            self._lasts[storage] = at = self._room(4 * features * self.lanes)
            if not new:
                self._emit("to_last", (FIXED, at, 0), rows, m=self._size, n=features, k=self.lanes)
        return FIXED, self._lasts[storage], 1

    def image(self, name: str, out: tuple[int, int, int], shape: Sequence[int], *given: tuple[int, int, int]) -> None:
        """An operation on images of the shape (in, out, height, width, kh, kw, pad_h, pad_w)."""
        inside, outside, height, width, kh, kw, pad_h, pad_w = shape
        if "pool" in name:
            below, across, rooms = height // kh, width // kw, (0, 0)
        else:
            below, across = height + 2 * pad_h - kh + 1, width + 2 * pad_w - kw + 1
            widened = 4 * inside * height * (width + 2 * pad_w) * self.lanes
            rooms = self._room(4 * inside * outside * kh * kw), self._room(widened) if pad_w else 0
        self._kept.append(kept := torch.tensor([*shape, below, across, self.lanes, *rooms]))
        a, b, c = (*given, *[(FIXED, 0, 0)] * (3 - len(given)))
        self._emit(name, out, a, b, c, (FIXED, kept.data_ptr(), 0))

    def which(self, value: int, like: int) -> tuple[int, int, int]:
        """Where a pooling keeps which pixel was the largest."""
        if value not in self._which:
            self._which[value] = self._room(4 * self._features(like) * self.lanes)
        return FIXED, self._which[value], 1

    def flat(self, argument: Any) -> tuple[int, int, int]:
        """A tensor that lies in one piece, row after row."""
        return self._flat(argument)

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

    def _flat(self, argument: Any, dtype: torch.dtype = torch.float32) -> tuple[int, int, int]:
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

    def _emit(
        self,
        name: str,
        out: tuple[int, int, int],
        *given: tuple[int, int, int],
        m: int = 0,
        n: int = 0,
        k: int = 0,
        start: int = _ZERO,
        alpha: float = 1.0,
    ) -> None:
        a, b, c, d = (*given, *[(FIXED, 0, 0)] * (4 - len(given)))
        self._rows.append((_CODES[name], m, n, k, start, alpha, 0.0, a, b, c, d, out))

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
        added = (FIXED, 0, 0)
        if row is not None:
            if self.float32(row).shape != (out.columns,):
                raise NotTraceableError("broadcasting has no compiled kernel")
            added = self._flat(row)
        self._emit(name, *places, added, m=out.rows, n=out.columns, k=a.columns, start=start, alpha=alpha)

    def elementwise(self, name: str, out: int, a: Any, b: Any = None, alpha: float = 1.0) -> None:
        """out[j] = f(a[j], b[j], alpha)."""
        given = (a,) if b is None else (a, b)
        count = self._elements(*given, Ref(out))
        homes = [self._graph.storage(argument.value) for argument in given]
        if any(home in self._lasts and home not in self._places for home in homes):
            places = [self.last(argument.value) for argument in given]
            count = self._features(out) * self.lanes
            self._emit(name, self.last(out, new=True), *places, n=count, alpha=alpha)
            return
        self._emit(name, self._flat(Ref(out)), *map(self._flat, given), n=count, alpha=alpha)

    def stretch(self, name: str, out: Any, a: Any, b: Any = None, alpha: float = 1.0) -> None:
        """The same over tensors of as many elements each, whatever their shapes."""
        given = (out, a) if b is None else (out, a, b)
        places = [self._flat(argument) for argument in given]
        self._emit(name, *places, n=self.float32(out).numel(), alpha=alpha)

    def tick(self, clock: Any) -> None:
        """One more step."""
        self._emit("tick", self._flat(clock, torch.float64))

    def adam(self, arguments: Sequence[Any], numbers: Sequence[float], lr: float) -> None:
        """`rules/optimiser.py`'s, in one pass."""
        theta, g, clock, *slots = arguments
        (base, m, _), (_, v, _) = map(self._flat, slots)
        self._kept.append(kept := torch.tensor(numbers, dtype=torch.float64))
        places = self._flat(g), (base, m, (v - m) // 4), (FIXED, kept.data_ptr(), 0), self._flat(clock, torch.float64)
        self._emit("adam", self._flat(theta), *places, n=self.float32(theta).numel(), alpha=lr)

    def by_rows(self, name: str, out: int, a: Any, b: Any = None) -> None:
        """Over the last dimension, which the classes are in."""
        given = (a,) if b is None else (a, b)
        count, last = self._elements(*given, Ref(out)), self.float32(a).shape[-1]
        self._emit(name, self._flat(Ref(out)), *map(self._flat, given), m=count // last, n=last)

    def loss(self, name: str, out: int, a: Any, labels: Any, matrix: Any) -> None:
        """Between a value per example and a matrix (examples, classes), by the labels."""
        rows, classes = self.float32(matrix).shape
        self._emit(name, self._flat(Ref(out)), self._flat(a), self._flat(labels, torch.int64), m=rows, n=classes)

    def ones(self, count: int) -> _Matrix:
        """A row of ones."""
        self._kept.append(ones := torch.ones(count))
        return _Matrix(FIXED, ones.data_ptr(), count, 1, count, False)

    def row(self, value: int) -> _Matrix:
        """A flat tensor as a matrix of one row."""
        base, at, _ = self._flat(Ref(value))
        count = self._graph.tensors[value].numel()
        return _Matrix(base, at, count, 1, count, False)


def _kind(node: Node) -> Any:
    """What an operation is known by: an optimiser's step by its rule."""
    return node.func.rule.definition.function if isinstance(node.func, Optimise) else node.func


def _called(node: Node) -> str:
    if isinstance(node.func, Optimise):
        return f"optimiser {node.func.rule.name}"
    schema = getattr(node.func, "_schema", None)
    return schema.name.partition("::")[2] if schema is not None else getattr(node.func, "__name__", repr(node.func))


_Lowering = Callable[[Lowered, Node], None]
_RULES: dict[Any, _Lowering] = {}


def _lowers(*funcs: Any) -> Callable[[_Lowering], _Lowering]:
    def enrol(rule: _Lowering) -> _Lowering:
        _RULES.update(dict.fromkeys(funcs, rule))
        return rule

    return enrol


def _result(node: Node) -> int:
    value = node.outs[0]
    assert value is not None
    return value


def _require(holds: bool, node: Node) -> None:
    if not holds:
        raise NotTraceableError(f"operation {_called(node)} has no compiled kernel for these arguments")


@_lowers(aten.mm.default)
def _mm(to: Lowered, node: Node) -> None:
    a, b = map(to.matrix, node.args)
    to.product(to.matrix(Ref(_result(node))), a, b, _ZERO)


@_lowers(aten.addmm.default)
def _addmm(to: Lowered, node: Node) -> None:
    _require(not node.kwargs, node)
    row, a, b = node.args
    to.product(to.matrix(Ref(_result(node))), to.matrix(a), to.matrix(b), _ROW, row)


@_lowers(Tensor.addmm_)
def _addmm_in_place(to: Lowered, node: Node) -> None:
    out, a, b = map(to.matrix, node.args)
    to.product(out, a, b, _OUT, alpha=node.kwargs["alpha"])


@_lowers(Tensor.addmv_)
def _addmv_in_place(to: Lowered, node: Node) -> None:
    target, matrix, vector = node.args
    to.product(to.row(target.value), to.row(vector.value), to.matrix(matrix).T, _OUT, alpha=node.kwargs["alpha"])


@_lowers(aten.sum.dim_IntList)
def _sum(to: Lowered, node: Node) -> None:
    _require(list(node.args[1]) == [0] and not node.kwargs, node)
    matrix = to.matrix(node.args[0])
    to.product(to.row(_result(node)), to.ones(matrix.rows), matrix, _ZERO)


@_lowers(Tensor.add_)
def _add_in_place(to: Lowered, node: Node) -> None:
    target, value = node.args
    to.elementwise("add", target.value, target, value, node.kwargs["alpha"])


@_lowers(tick)
def _tick(to: Lowered, node: Node) -> None:
    to.tick(*node.args)


@_lowers(definition("optimiser", "sgd").function)
def _sgd(to: Lowered, node: Node) -> None:
    theta, g, _, *slots = node.args
    assert isinstance(node.func, Optimise)
    lr, given = node.func.lr, node.func.rule.parameters
    for v in slots:
        to.stretch("scale", v, v, alpha=given["momentum"])
        to.stretch("add", v, v, g)
        if given["nesterov"]:
            to.stretch("add", theta, theta, v, alpha=-lr * given["momentum"])
    to.stretch("add", theta, theta, g if given["nesterov"] or not slots else slots[0], alpha=-lr)


@_lowers(definition("optimiser", "adam").function)
def _adam(to: Lowered, node: Node) -> None:
    assert isinstance(node.func, Optimise)
    given = node.func.rule.parameters
    to.adam(node.args, [given[name] for name in ("beta1", "beta2", "eps", "decay")], node.func.lr)


@_lowers(aten.add.Tensor, aten.sub.Tensor)
def _add(to: Lowered, node: Node) -> None:
    sign = 1 if node.func is aten.add.Tensor else -1
    a, b = node.args
    to.elementwise("add", _result(node), a, b, sign * node.kwargs.get("alpha", 1))


@_lowers(aten.mul.Tensor)
def _multiply(to: Lowered, node: Node) -> None:
    a, b = node.args
    if isinstance(b, int | float):
        to.elementwise("scale", _result(node), a, alpha=b)
    else:
        to.elementwise("multiply", _result(node), a, b)


@_lowers(
    *(aten.relu.default, aten.tanh.default, aten.sigmoid.default),
    *(aten.tanh_backward.default, aten.sigmoid_backward.default),
)
def _activation(to: Lowered, node: Node) -> None:
    to.elementwise(_called(node), _result(node), *node.args)


@_lowers(aten.threshold_backward.default)
def _threshold_backward(to: Lowered, node: Node) -> None:
    gradient, source, threshold = node.args
    to.elementwise("threshold_backward", _result(node), gradient, source, alpha=threshold)


@_lowers(aten._log_softmax.default)
def _log_softmax(to: Lowered, node: Node) -> None:
    source, dimension, half = node.args
    _require(dimension in (-1, to.float32(source).ndim - 1) and not half, node)
    to.by_rows("log_softmax", _result(node), source)


@_lowers(aten._log_softmax_backward_data.default)
def _log_softmax_backward(to: Lowered, node: Node) -> None:
    gradient, output, dimension, dtype = node.args
    _require(dimension in (-1, to.float32(output).ndim - 1) and dtype == torch.float32, node)
    to.by_rows("log_softmax_backward", _result(node), gradient, output)


@_lowers(aten.nll_loss_forward.default)
def _nll(to: Lowered, node: Node) -> None:
    source, labels, weight, reduction, ignored = node.args
    _require(weight is None and reduction == 0 and ignored == _IGNORED and to.float32(source).ndim == 2, node)
    to.loss("nll", _result(node), source, labels, source)


@_lowers(aten.nll_loss_backward.default)
def _nll_backward(to: Lowered, node: Node) -> None:
    gradient, source, labels, weight, reduction, ignored, _ = node.args
    _require(weight is None and reduction == 0 and ignored == _IGNORED and to.float32(source).ndim == 2, node)
    to.loss("nll_backward", _result(node), gradient, labels, source)


@_lowers(aten.convolution.default)
def _convolution(to: Lowered, node: Node) -> None:
    source, weight, bias, *rest = node.args
    shape = _convolved(to, node, source, weight, rest)
    given = [to.last(source.value), to.flat(weight), *([to.flat(bias)] if bias is not None else [])]
    to.image("conv", to.last(_result(node), new=True), shape, *given)


@_lowers(aten.convolution_backward.default)
def _convolution_backward(to: Lowered, node: Node) -> None:
    gradient, source, weight, _, *rest, _ = node.args
    inside, outside, height, width, kh, kw, pad_h, pad_w = shape = _convolved(to, node, source, weight, rest)
    to_source, to_weight, to_bias = node.outs
    if to_weight is not None:
        outs = [to.flat(Ref(value)) for value in (to_weight, to_bias) if value is not None]
        to.image("conv_weight", outs[0], shape, to.last(gradient.value), to.last(source.value), *outs[1:])
    if to_source is not None:
        below, across = height + 2 * pad_h - kh + 1, width + 2 * pad_w - kw + 1
        turned = outside, inside, below, across, kh, kw, kh - 1 - pad_h, kw - 1 - pad_w
        to.image("conv_data", to.last(to_source, new=True), turned, to.last(gradient.value), to.flat(weight))


def _convolved(to: Lowered, node: Node, source: Any, weight: Any, rest: Sequence[Any]) -> tuple[int, ...]:
    """The shape of a convolution, as `Lowered.image` takes it."""
    stride, padding, dilation, transposed, _, groups = rest
    _require(to.float32(source).ndim == 4 and not transposed and groups == 1, node)
    outside, inside, kh, kw = to.float32(weight).shape
    _require({*stride, *dilation} == {1} and padding[0] < kh and padding[1] < kw, node)
    return inside, outside, *to.float32(source).shape[2:], kh, kw, *padding


@_lowers(aten.max_pool2d_with_indices.default)
def _pool(to: Lowered, node: Node) -> None:
    source, shape = _pooled(to, node, node.args[0], node.args[1:])
    out, which = node.outs
    assert out is not None
    assert which is not None
    to.image("pool", to.last(out, new=True), shape, to.last(source.value), to.which(which, out))


@_lowers(aten.max_pool2d_with_indices_backward.default)
def _pool_backward(to: Lowered, node: Node) -> None:
    gradient, source, *rest, which = node.args
    _, shape = _pooled(to, node, source, rest)
    places = to.last(gradient.value), to.which(which.value, gradient.value)
    to.image("pool_backward", to.last(_result(node), new=True), shape, *places)


def _pooled(to: Lowered, node: Node, source: Any, rest: Sequence[Any]) -> tuple[Any, tuple[int, ...]]:
    """What is pooled, and the shape of that as `Lowered.image` takes it: windows side by side."""
    defaults: list[Any] = [[], [], [0, 0], [1, 1], False]
    kernel, stride, padding, dilation, ceil = [*rest, *defaults[len(rest) :]]
    sides = list(kernel), list(stride or kernel), list(padding), list(dilation)
    _require(to.float32(source).ndim == 4 and not ceil, node)
    _require(sides[0] == sides[1] and sides[2:] == ([0, 0], [1, 1]), node)
    _, channels, height, width = to.float32(source).shape
    return source, (channels, channels, height, width, *kernel, 0, 0)
