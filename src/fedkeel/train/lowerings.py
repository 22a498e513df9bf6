"""Which recorded operations the compiled kernels have, and what each becomes there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedkeel.core.registry import definition
from fedkeel.train.fuse import Optimise, tick
from fedkeel.train.operations import OUT, ROW, ZERO
from fedkeel.train.record import Node, NotTraceableError, Ref

if TYPE_CHECKING:
    from fedkeel.train.lower import Lowered

aten = torch.ops.aten
_IGNORED = -100  # the label that torch's loss passes over unless told otherwise


def kind(node: Node) -> Any:
    """What an operation is known by: an optimiser's step by its rule."""
    return node.func.rule.definition.function if isinstance(node.func, Optimise) else node.func


def called(node: Node) -> str:
    if isinstance(node.func, Optimise):
        return f"optimiser {node.func.rule.name}"
    schema = getattr(node.func, "_schema", None)
    return schema.name.partition("::")[2] if schema is not None else getattr(node.func, "__name__", repr(node.func))


_Lowering = Callable[["Lowered", Node], None]
RULES: dict[Any, _Lowering] = {}


def lowers(*funcs: Any) -> Callable[[_Lowering], _Lowering]:
    def enrol(rule: _Lowering) -> _Lowering:
        RULES.update(dict.fromkeys(funcs, rule))
        return rule

    return enrol


def _result(node: Node) -> int:
    value = node.outs[0]
    assert value is not None
    return value


def _require(holds: bool, node: Node) -> None:
    if not holds:
        raise NotTraceableError(f"operation {called(node)} has no compiled kernel for these arguments")


@lowers(aten.mm.default)
def _mm(to: Lowered, node: Node) -> None:
    a, b = map(to.matrix, node.args)
    to.product(to.matrix(Ref(_result(node))), a, b, ZERO)


@lowers(aten.addmm.default)
def _addmm(to: Lowered, node: Node) -> None:
    _require(not node.kwargs, node)
    row, a, b = node.args
    to.product(to.matrix(Ref(_result(node))), to.matrix(a), to.matrix(b), ROW, row)


@lowers(Tensor.addmm_)
def _addmm_in_place(to: Lowered, node: Node) -> None:
    out, a, b = map(to.matrix, node.args)
    to.product(out, a, b, OUT, alpha=node.kwargs["alpha"])


@lowers(Tensor.addmv_)
def _addmv_in_place(to: Lowered, node: Node) -> None:
    target, matrix, vector = node.args
    to.product(to.row(target.value), to.row(vector.value), to.matrix(matrix).T, OUT, alpha=node.kwargs["alpha"])


@lowers(aten.sum.dim_IntList)
def _sum(to: Lowered, node: Node) -> None:
    _require(list(node.args[1]) == [0] and not node.kwargs, node)
    matrix = to.matrix(node.args[0])
    to.product(to.row(_result(node)), to.ones(matrix.rows), matrix, ZERO)


@lowers(Tensor.add_)
def _add_in_place(to: Lowered, node: Node) -> None:
    target, value = node.args
    to.elementwise("add", target.value, target, value, node.kwargs["alpha"])


@lowers(tick)
def _tick(to: Lowered, node: Node) -> None:
    to.tick(*node.args)


@lowers(definition("optimiser", "sgd").function)
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


@lowers(definition("optimiser", "adam").function)
def _adam(to: Lowered, node: Node) -> None:
    assert isinstance(node.func, Optimise)
    given = node.func.rule.parameters
    to.adam(node.args, [given[name] for name in ("beta1", "beta2", "eps", "decay")], node.func.lr)


@lowers(aten.add.Tensor, aten.sub.Tensor)
def _add(to: Lowered, node: Node) -> None:
    sign = 1 if node.func is aten.add.Tensor else -1
    a, b = node.args
    to.elementwise("add", _result(node), a, b, sign * node.kwargs.get("alpha", 1))


@lowers(aten.mul.Tensor)
def _multiply(to: Lowered, node: Node) -> None:
    a, b = node.args
    if isinstance(b, int | float):
        to.elementwise("scale", _result(node), a, alpha=b)
    elif 1 in (ones := [to.float32(argument).numel() for argument in (a, b)]):
        one, many = (a, b) if ones[0] == 1 else (b, a)
        to.scaled_by(_result(node), many, one)
    else:
        to.elementwise("multiply", _result(node), a, b)


@lowers(
    *(aten.relu.default, aten.tanh.default, aten.sigmoid.default),
    *(aten.tanh_backward.default, aten.sigmoid_backward.default),
)
def _activation(to: Lowered, node: Node) -> None:
    to.elementwise(called(node), _result(node), *node.args)


@lowers(aten.threshold_backward.default)
def _threshold_backward(to: Lowered, node: Node) -> None:
    gradient, source, threshold = node.args
    to.elementwise("threshold_backward", _result(node), gradient, source, alpha=threshold)


@lowers(aten._log_softmax.default)
def _log_softmax(to: Lowered, node: Node) -> None:
    source, dimension, half = node.args
    _require(dimension in (-1, to.float32(source).ndim - 1) and not half, node)
    to.by_rows("log_softmax", _result(node), source)


@lowers(aten._log_softmax_backward_data.default)
def _log_softmax_backward(to: Lowered, node: Node) -> None:
    gradient, output, dimension, dtype = node.args
    _require(dimension in (-1, to.float32(output).ndim - 1) and dtype == torch.float32, node)
    to.by_rows("log_softmax_backward", _result(node), gradient, output)


@lowers(aten.nll_loss_forward.default)
def _nll(to: Lowered, node: Node) -> None:
    source, labels, weight, reduction, ignored = node.args
    _require(weight is None and reduction == 0 and ignored == _IGNORED and to.float32(source).ndim == 2, node)
    to.loss("nll", _result(node), source, labels, source)


@lowers(aten.nll_loss_backward.default)
def _nll_backward(to: Lowered, node: Node) -> None:
    gradient, source, labels, weight, reduction, ignored, _ = node.args
    _require(weight is None and reduction == 0 and ignored == _IGNORED and to.float32(source).ndim == 2, node)
    to.loss("nll_backward", _result(node), gradient, labels, source)


@lowers(aten.convolution.default)
def _convolution(to: Lowered, node: Node) -> None:
    source, weight, bias, *rest = node.args
    shape = convolved(to, node, source, weight, rest)
    given = [to.last(source.value), to.flat(weight), *([to.flat(bias)] if bias is not None else [])]
    to.image("conv", to.last(_result(node), new=True), shape, *given)


@lowers(aten.convolution_backward.default)
def _convolution_backward(to: Lowered, node: Node) -> None:
    gradient, source, weight, _, *rest, _ = node.args
    inside, outside, height, width, kh, kw, pad_h, pad_w = shape = convolved(to, node, source, weight, rest)
    to_source, to_weight, to_bias = node.outs
    if to_weight is not None:
        outs = [to.flat(Ref(value)) for value in (to_weight, to_bias) if value is not None]
        to.image("conv_weight", outs[0], shape, to.last(gradient.value), to.last(source.value), *outs[1:])
    if to_source is not None:
        below, across = height + 2 * pad_h - kh + 1, width + 2 * pad_w - kw + 1
        turned = outside, inside, below, across, kh, kw, kh - 1 - pad_h, kw - 1 - pad_w
        to.image("conv_data", to.last(to_source, new=True), turned, to.last(gradient.value), to.flat(weight))


def convolved(to: Lowered, node: Node, source: Any, weight: Any, rest: Sequence[Any]) -> tuple[int, ...]:
    """The shape of a convolution, as `Lowered.image` takes it."""
    stride, padding, dilation, transposed, _, groups = rest
    _require(to.float32(source).ndim == 4 and not transposed and groups == 1, node)
    outside, inside, kh, kw = to.float32(weight).shape
    _require({*stride, *dilation} == {1} and padding[0] < kh and padding[1] < kw, node)
    return inside, outside, *to.float32(source).shape[2:], kh, kw, *padding


@lowers(aten.max_pool2d_with_indices.default)
def _pool(to: Lowered, node: Node) -> None:
    source, shape = _pooled(to, node, node.args[0], node.args[1:])
    out, which = node.outs
    assert out is not None
    assert which is not None
    to.image("pool", to.last(out, new=True), shape, to.last(source.value), to.which(which, out))


@lowers(aten.max_pool2d_with_indices_backward.default)
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
