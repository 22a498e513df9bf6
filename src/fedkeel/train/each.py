"""Gradients of single examples by the compiled kernels: a recorded step whose sums over examples are taken apart.

A product d^T a over examples is the sum of single ones' gradients, of norm |d_i| |a_i| each; those of a convolution are
what its kernel has in each lane. So after the step's own operations come the norms, and then the same sums with each
example scaled (`ghost.py` names the papers).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from fedkeel.core.keys import Key
from fedkeel.core.layout import Layout
from fedkeel.train.client import seeded
from fedkeel.train.contract import ClientData, LocalWork, Scale
from fedkeel.train.fuse import drop_dead, simplify
from fedkeel.train.lower import LANES, Lowered
from fedkeel.train.lowerings import convolved, lowers
from fedkeel.train.native import NativeStep
from fedkeel.train.objective import batch_losses
from fedkeel.train.operations import NOWHERE, ZERO
from fedkeel.train.private import filled
from fedkeel.train.record import Graph, Node, NotTraceableError, Recorder, Ref

aten = torch.ops.aten
_LOOKS = {aten.t.default, aten.view.default, aten._unsafe_view.default}
_WITHOUT_WEIGHT, _WITH_WEIGHT = 0, 1  # as in kernels/c/native.c
_WHOLE = 1 << 40  # a draw is one batch, whatever its size
_SHARED = ("squares", "norms", "counts", "factors")  # (lanes,) each


class _Known(NamedTuple):
    """A program, and the memory that it shares with whoever runs it, by name."""

    lowered: Lowered
    held: dict[str, Tensor]


class NativeGradients(NativeStep):
    """`Clipped` by the compiled kernels. Raises `NotTraceableError` where an operation has none."""

    def __init__(
        self, module: nn.Module, layout: Layout, data: ClientData, work: LocalWork, vector: Tensor, norm: float
    ) -> None:
        super().__init__(module, layout, data, replace(work, batch_size=_WHOLE), (), vector)
        self._work, self._norm, self._layout = work, norm, layout
        self._sum = torch.zeros(layout.trainable.stop)
        self._trained = [e for e in layout.entries if e.trainable]
        self._programs: dict[int, _Known] = {}
        self._lowered(len(filled(torch.arange(work.batch_size), work.batch_size)))

    def __call__(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        count, rows = len(rows), filled(rows, self._work.batch_size)
        self._lowered(len(rows))
        held = self._programs[len(rows)].held
        held["counts"].zero_()[:count] = 1
        losses = self.steps(rows)
        return self._sum, held["norms"][:count].clone(), losses[:count]

    def _lowered(self, size: int) -> Lowered:
        if size not in self._programs:
            lanes = -(-size // LANES) * LANES
            held = {name: torch.zeros(lanes) for name in _SHARED}
            held |= {f"sum.{e.name}": self._sum[self._layout.offsets[e.name]].view(e.shape) for e in self._trained}
            with torch.inference_mode(False), torch.enable_grad(), seeded(Key(0), self.vector.device):
                graph, losses = self._record(size, held)
            scale = self._scale or Scale()
            dtype = torch.float32 if self._scale is None else self._data.x.dtype
            inputs = self._traced.inputs() | held
            self._programs[size] = _Known(Lowered(graph, losses, inputs, size, dtype, scale), held)
        return self._programs[size].lowered

    def _record(self, size: int, held: dict[str, Tensor]) -> tuple[Graph, int]:
        """The losses' gradients, taken apart."""
        data, layout = self._data, self._layout
        rows = torch.arange(size) % len(data.x)
        given = {name: tensor.detach().clone() for name, tensor in (self._traced.inputs() | held).items()}
        given["x"], y = data.prepare(data.x[rows]), data.y[rows]
        given["y"] = y if y.is_floating_point() else torch.zeros_like(y)
        for e in self._trained:
            given[f"w.{e.name}"].requires_grad_()
        with Recorder(given) as recorder:
            tensors = {e.name: given[f"w.{e.name}"].to(getattr(torch, e.dtype)) for e in layout.entries}
            model = self._traced.module
            descended, losses = batch_losses(model, layout, self._work, tensors, {}, given["x"], given["y"])
            leaves = [given[f"w.{e.name}"] for e in self._trained]
            found = torch.autograd.grad(descended.sum(), leaves, allow_unused=True)
        names = [e.name for e, g in zip(self._trained, found, strict=True) if g is not None]
        graph = recorder.graph
        roots = simplify(graph, [recorder.value(losses), *(recorder.value(g) for g in found if g is not None)])
        values = {name: Ref(recorder.value(tensor)) for name, tensor in given.items()}
        _Apart(graph, size, values).take(roots[0], dict(zip(names, roots[1:], strict=True)), self._norm)
        return graph, roots[0]


class _Apart:
    """Takes sums over examples that are parameters' gradients apart: norms, factors, and the sums of what is left."""

    def __init__(self, graph: Graph, size: int, values: dict[str, Ref]) -> None:
        self.graph, self.size, self.values = graph, size, values
        self.makers = {out: node for node in graph.nodes for out in node.outs if out is not None}
        self.squares: list[Node] = []
        self.sums: list[Node] = []

    def take(self, losses: int, gradients: dict[str, int], norm: float) -> None:
        """`gradients`: a parameter's name -> the value of its gradient, which is not made any more."""
        convolutions: dict[int, dict[int, str]] = {}
        for name, value in gradients.items():
            flipped = False
            while (maker := self.makers.get(value)) is not None and maker.func in _LOOKS:
                flipped ^= maker.func is aten.t.default
                value = maker.args[0].value
            if maker is not None and maker.func is aten.mm.default:
                self._product(name, maker, flipped)
            elif maker is not None and maker.func is aten.sum.dim_IntList and list(maker.args[1]) == [0]:
                self._bias(name, maker.args[0])
            elif maker is not None and maker.func is aten.convolution_backward.default:
                convolutions.setdefault(self.graph.nodes.index(maker), {})[maker.outs.index(value)] = name
            else:
                self._refuse(name)
        for at, names in convolutions.items():
            self._convolution(self.graph.nodes[at], names)
        middle = Node(_factors, (*(self.values[name] for name in _SHARED), self.size, norm), {}, ())
        drop_dead(self.graph, [losses, *(value for node in (*self.squares, *self.sums) for value in node.uses)])
        self.graph.nodes += [*self.squares, middle, *self.sums]

    def _refuse(self, name: str) -> NoReturn:
        raise NotTraceableError(f"no compiled kernel takes the gradient of '{name}' apart by examples")

    def _rows(self, argument: Ref, name: str) -> Ref:
        tensor = self.graph.tensors[argument.value]
        if tensor.ndim != 2 or len(tensor) != self.size:
            self._refuse(name)
        return argument

    def _product(self, name: str, maker: Node, flipped: bool) -> None:
        """Of left^T right, whose rows are examples."""
        turned, right = maker.args
        look = self.makers.get(turned.value)
        if look is None or look.func is not aten.t.default:
            self._refuse(name)
        left, right, out = self._rows(look.args[0], name), self._rows(right, name), self.values[f"sum.{name}"]
        shape = self.graph.tensors[maker.outs[0] or 0].shape
        if self.graph.tensors[out.value].shape != (shape[::-1] if flipped else shape):
            self._refuse(name)
        self.squares.append(Node(_norm_rows, (self.values["squares"], left, right), {}, ()))
        scaled = self.graph.add(torch.empty(self.graph.tensors[left.value].shape))
        self.sums.append(Node(_scale_rows, (left, self.values["factors"]), {}, (scaled,)))
        self.sums.append(Node(_add_products, (out, Ref(scaled), right, flipped), {}, ()))

    def _bias(self, name: str, source: Ref) -> None:
        self.squares.append(Node(_norm_rows, (self.values["squares"], self._rows(source, name)), {}, ()))
        self.sums.append(Node(_add_rows, (self.values[f"sum.{name}"], source, self.values["factors"]), {}, ()))

    def _convolution(self, maker: Node, names: dict[int, str]) -> None:
        """Of weights, and perhaps a bias after them."""
        if 1 not in names:
            self._refuse(names[2])
        lanes = len(self.graph.tensors[self.values["squares"].value])
        counts = [self.graph.tensors[maker.outs[at] or 0].numel() for at in sorted(names)]
        each = self.graph.add(torch.empty(sum(counts), lanes))
        self.squares.append(Node(_conv_each, (*maker.args[:3], maker.args[4:-1], counts[0], 2 in names), {}, (each,)))
        self.squares.append(Node(_norm_last, (self.values["squares"], Ref(each)), {}, ()))
        for at, start in zip(sorted(names), (0, counts[0]), strict=False):
            out = self.values[f"sum.{names[at]}"]
            self.sums.append(Node(_weigh_last, (out, Ref(each), start, self.values["factors"]), {}, ()))
        maker.outs = (maker.outs[0], None, None)


def _compiled_only(name: str) -> Callable[..., None]:
    """Stands in a graph for what compiled kernels alone do."""

    def stand_in() -> None:
        raise NotImplementedError(name)

    stand_in.__name__ = name
    return stand_in


_norm_rows, _norm_last, _factors, _scale_rows, _add_products, _add_rows, _conv_each, _weigh_last = map(
    _compiled_only,
    ("norm_rows", "norm_last", "factors", "scale_rows", "add_products", "add_rows", "conv_each", "weigh_last"),
)


@lowers(_norm_rows)
def _lower_norm_rows(to: Lowered, node: Node) -> None:
    squares, *factors = node.args
    a, d = (to.upright(factors[0]) if len(factors) == 2 else None), to.upright(factors[-1])
    places = (NOWHERE if a is None else (a.base, a.at, a.ld)), (d.base, d.at, d.ld)
    start = _WITHOUT_WEIGHT if a is None else _WITH_WEIGHT
    columns = 0 if a is None else a.columns
    to.emit("norm_rows", to.flat(squares), *places, m=d.rows, n=d.columns, k=columns, start=start)


@lowers(_norm_last)
def _lower_norm_last(to: Lowered, node: Node) -> None:
    squares, each = node.args
    features, lanes = to.float32(each).shape
    to.emit("norm_last", to.flat(squares), to.flat(each), n=features, k=lanes)


@lowers(_factors)
def _lower_factors(to: Lowered, node: Node) -> None:
    squares, norms, counts, factors, size, norm = node.args
    places = [to.flat(argument) for argument in (factors, squares, norms, counts)]
    to.emit("factors", *places, m=size, k=to.float32(squares).numel(), alpha=norm)


@lowers(_scale_rows)
def _lower_scale_rows(to: Lowered, node: Node) -> None:
    source, factors = node.args
    rows, scaled = to.upright(source), Ref(node.outs[0] or 0)
    places = to.flat(scaled), (rows.base, rows.at, rows.ld), to.flat(factors)
    to.emit("scale_rows", *places, m=rows.rows, n=rows.columns)


@lowers(_add_products)
def _lower_add_products(to: Lowered, node: Node) -> None:
    out, left, right, flipped = node.args
    found = to.matrix(out)
    to.product(found.T if flipped else found, to.matrix(left).T, to.matrix(right), ZERO)


@lowers(_add_rows)
def _lower_add_rows(to: Lowered, node: Node) -> None:
    out, source, factors = node.args
    rows = to.matrix(source)
    to.product(to.row(out.value), replace(to.row(factors.value), ld=rows.rows, columns=rows.rows), rows, ZERO)


@lowers(_conv_each)
def _lower_conv_each(to: Lowered, node: Node) -> None:
    gradient, source, weight, rest, weights, biased = node.args
    each = Ref(node.outs[0] or 0)
    base, at, _ = place = to.flat(each)
    shape = convolved(to, node, source, weight, rest)
    bias = [(base, at + 4 * weights * to.lanes, 0)] if biased else []
    to.image("conv_each", place, shape, to.last(gradient.value), to.last(source.value), *bias)


@lowers(_weigh_last)
def _lower_weigh_last(to: Lowered, node: Node) -> None:
    out, each, start, factors = node.args
    base, at, _ = to.flat(each)
    given = (base, at + 4 * start * to.lanes, 0), to.flat(factors)
    to.emit("weigh_last", to.flat(out), *given, n=to.float32(out).numel(), k=to.lanes)
