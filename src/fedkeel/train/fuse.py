"""From a recorded step to a short one: no aliases, no constants computed twice, SGD fused into the gradient products.

Nodes never change places, but for plain SGD's updates: each comes right after the last use of its parameter. Any other
optimiser steps at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedkeel.core.registry import Rule
from fedkeel.train.record import Graph, Node, Ref, replace

aten = torch.ops.aten
_ALIASES = {aten.detach.default, aten.alias.default, aten.lift_fresh.default}
_SUMS = {aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor}
_RESHAPES = {aten.view.default, aten._unsafe_view.default, aten.expand.default}
_FACTORIES = {"ones_like", "zeros_like", "full_like", "new_zeros", "new_ones", "new_full", "scalar_tensor"}
_RESTRIDING = {"as_strided_", "resize_", "set_", "t_", "transpose_", "squeeze_", "unsqueeze_"}
_IN_PLACE: dict[Any, Callable[..., Any]] = {
    aten.relu.default: torch.relu_,
    aten.sigmoid.default: torch.sigmoid_,
    aten.tanh.default: torch.tanh_,
    aten.exp.default: torch.exp_,
    aten.neg.default: torch.neg_,
    aten.add.Tensor: Tensor.add_,
    aten.sub.Tensor: Tensor.sub_,
    aten.mul.Tensor: Tensor.mul_,
    aten.div.Tensor: Tensor.div_,
    aten.mul.Scalar: Tensor.mul_,
    aten.div.Scalar: Tensor.div_,
}
_GRADIENT_OUT: dict[Any, Callable[..., Any]] = {
    aten.threshold_backward.default: aten.threshold_backward.grad_input,
    aten.gelu_backward.default: aten.gelu_backward.grad_input,
    aten.sigmoid_backward.default: aten.sigmoid_backward.grad_input,
    aten.tanh_backward.default: aten.tanh_backward.grad_input,
    aten.hardtanh_backward.default: aten.hardtanh_backward.grad_input,
    aten.leaky_relu_backward.default: aten.leaky_relu_backward.grad_input,
    aten.elu_backward.default: aten.elu_backward.grad_input,
    aten.silu_backward.default: aten.silu_backward.grad_input,
}


def _name(node: Node) -> str:
    return node.func._schema.name.partition("::")[2] if isinstance(node.func, torch._ops.OpOverload) else ""


def is_random(node: Node) -> bool:
    """Whether it draws from a generator."""
    return isinstance(node.func, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.func.tags


def is_view(node: Node) -> bool:
    """Whether its result is another look at its argument's memory."""
    if not isinstance(node.func, torch._ops.OpOverload) or node.multiple:
        return False
    alias = node.func._schema.returns[0].alias_info if node.func._schema.returns else None
    return alias is not None and not alias.is_write


def simplify(graph: Graph, roots: Sequence[int]) -> list[int]:
    """Drop aliases, fold what depends on no input, drop what nobody needs. Returns the roots' new values."""
    stand_in = _forward_aliases(graph)
    found = [stand_in.get(value, value) for value in roots]
    _fold_constants(graph)
    drop_dead(graph, found)
    _align_pooling(graph)
    return found


def _forward_aliases(graph: Graph) -> dict[int, int]:
    pinned = {v for node in graph.nodes if _name(node) in _RESTRIDING for v in node.writes}
    stand_in: dict[int, int] = {}
    transposed: dict[int, tuple[int, Any]] = {}  # value: what it is the transpose of, and in which dimensions
    kept = []
    for node in graph.nodes:
        args = (node.args, node.kwargs)
        node.args, node.kwargs = replace(args, lambda a: Ref(stand_in.get(a.value, a.value)) if type(a) is Ref else a)
        source = node.args[0].value if node.args and type(node.args[0]) is Ref else None
        out = node.outs[0] if len(node.outs) == 1 else None
        if source is not None and out is not None and out != source and not {source, out} & pinned:
            if node.func in _ALIASES or (node.func in _RESHAPES and _same_look(graph, source, out)):
                stand_in[out] = source
                continue
            if node.func in (aten.t.default, aten.transpose.int):
                origin, dimensions = transposed.get(source, (None, None))
                if origin is not None and dimensions == node.args[1:]:
                    stand_in[out] = origin
                    continue
                transposed[out] = source, node.args[1:]
        kept.append(node)
    graph.nodes = kept
    return stand_in


def _same_look(graph: Graph, a: int, b: int) -> bool:
    first, second = graph.tensors[a], graph.tensors[b]
    return first.shape == second.shape and first.stride() == second.stride()


def _fold_constants(graph: Graph) -> None:
    written = {graph.storage(v) for node in graph.nodes for v in node.writes}
    kept = []
    for node in graph.nodes:
        fixed = _name(node) in _FACTORIES or all(value in graph.constants for value in node.uses)
        outs = [out for out in node.outs if out is not None]
        touched = map(graph.storage, (*node.uses, *outs))
        if fixed and not is_random(node) and not node.writes and written.isdisjoint(touched):
            graph.constants.update(outs)
        else:
            kept.append(node)
    graph.nodes = kept


def drop_dead(graph: Graph, roots: Sequence[int]) -> None:
    """Keep what makes these values, or changes what is there."""
    needed = set(roots)
    kept = []
    for node in reversed(graph.nodes):
        if needed.intersection(o for o in node.outs if o is not None) or node.writes or is_random(node):
            needed.update(node.uses)
            kept.append(node)
    graph.nodes = kept[::-1]


def _align_pooling(graph: Graph) -> None:
    """Max-pooling's gradient runs four times faster when what comes in has its channels last, too."""
    aligned = []
    for node in graph.nodes:
        if node.func is aten.max_pool2d_with_indices_backward.default:
            gradient, source = (graph.tensors[a.value] for a in node.args[:2])
            last = torch.channels_last
            if source.is_contiguous(memory_format=last) and not gradient.is_contiguous(memory_format=last):
                value = graph.add(gradient.contiguous(memory_format=last))
                aligned.append(Node(aten.clone.default, node.args[:1], {"memory_format": last}, (value,)))
                node.args = (Ref(value), *node.args[1:])
        aligned.append(node)
    graph.nodes = aligned


class Updates:
    """Adds `p -= lr * g` for every parameter to a simplified graph, fused with the product that makes g."""

    def __init__(self, graph: Graph, lr: float) -> None:
        self.graph, self.lr = graph, lr
        self.makers = {out: node for node in graph.nodes for out in node.outs if out is not None}
        self.count: dict[int, int] = {}
        for node in graph.nodes:
            for value in node.uses:
                self.count[value] = self.count.get(value, 0) + 1
        self.position = {id(node): at for at, node in enumerate(graph.nodes)}
        self.written = [(at, graph.storage(v)) for at, node in enumerate(graph.nodes) for v in node.writes]
        self.transposes = {n.args[0].value: n for n in graph.nodes if n.func is aten.t.default}
        self.after: dict[int, list[Node]] = {}  # position: the nodes that come after it
        self.ones: dict[int, int] = {}

    def apply(self, gradients: Mapping[int, int]) -> None:
        """`gradients`: the parameter's value -> its gradient's, of the same number of elements."""
        last_use: dict[int, int] = {}
        for at, node in enumerate(self.graph.nodes):
            for value in node.uses:
                last_use[self.graph.storage(value)] = at
        absorbed: set[int] = set()
        self.stepped = {self.graph.storage(parameter) for parameter in gradients}
        for gradient in gradients.values():
            self.count[gradient] = self.count.get(gradient, 0) + 1
        for parameter, gradient in gradients.items():
            at = last_use.get(self.graph.storage(parameter), -1)
            terms = self._split(gradient, absorbed)
            for value, sign in terms:
                maker = self.makers.get(value)
                place = max(at, self.position[id(maker)] if maker is not None else -1)
                self.after.setdefault(place, []).extend(self._update(parameter, value, sign, place, absorbed))
        nodes = list(self.after.get(-1, ()))
        for at, node in enumerate(self.graph.nodes):
            if not (node.outs and node.outs[0] in absorbed):
                nodes.append(node)
            nodes += self.after.get(at, ())
        self.graph.nodes = nodes

    def _split(self, gradient: int, absorbed: set[int]) -> list[tuple[int, float]]:
        """A gradient as addends with their factors, to be added one after another; what reads a parameter comes first.

        Only one of them may: the next one would read it after the first was added.
        """
        inside: set[int] = set()
        merged: dict[int, float] = {}
        for value, factor in self._terms(gradient, 1.0, inside):
            merged[value] = merged.get(value, 0.0) + factor
        reading = [value for value in merged if self.graph.storage(value) in self.stepped]
        if len(reading) > 1:
            return [(gradient, 1.0)]
        absorbed |= inside
        return sorted(merged.items(), key=lambda term: term[0] not in reading)

    def _terms(self, value: int, scale: float, absorbed: set[int]) -> list[tuple[int, float]]:
        """A gradient that is a sum, as its addends with their factors."""
        maker = self.makers.get(value)
        if maker is None or maker.func not in _SUMS or self.count[value] != 1:
            return [(value, scale)]
        if maker.func is aten.mul.Tensor:
            source, factor = maker.args
            if (
                type(source) is not Ref
                or type(factor) not in (int, float)
                or self._changed(maker, len(self.graph.nodes))
            ):
                return [(value, scale)]
            absorbed.add(value)
            return self._terms(source.value, scale * factor, absorbed)
        first, second = maker.args
        shape = self.graph.tensors[value].shape
        if not all(type(a) is Ref and self.graph.tensors[a.value].shape == shape for a in (first, second)):
            return [(value, scale)]
        if self._changed(maker, len(self.graph.nodes)):
            return [(value, scale)]
        absorbed.add(value)
        factor = scale * maker.kwargs.get("alpha", 1) * (1 if maker.func is aten.add.Tensor else -1)
        return [*self._terms(first.value, scale, absorbed), *self._terms(second.value, factor, absorbed)]

    def _update(self, parameter: int, value: int, scale: float, place: int, absorbed: set[int]) -> list[Node]:
        alpha = -self.lr * scale
        chain, maker = [value], self.makers.get(value)
        while maker is not None and maker.func in _RESHAPES and self.count[chain[-1]] == 1:
            chain.append(maker.args[0].value)
            maker = self.makers.get(chain[-1])
        flipped = False
        if maker is not None and maker.func is aten.t.default and self.count[chain[-1]] == 1:
            inner = self.makers.get(maker.args[0].value)
            if inner is not None and inner.func is aten.mm.default:
                chain.append(maker.args[0].value)
                maker, flipped = inner, True
        if maker is not None and self.count[chain[-1]] == 1 and not self._must_stay(maker, place):
            fused = self._fused(parameter, chain[-1], maker, alpha, flipped, place)
            if fused:
                absorbed.update(chain)
                return fused
        return [self._node(Tensor.add_, self._look(parameter, value), Ref(value), alpha=alpha)]

    def _must_stay(self, maker: Node, until: int) -> bool:
        """Whether a product reads a parameter, which an update may change first, or what a node up to there changes."""
        reads = any(self.graph.storage(value) in self.stepped for value in maker.uses)
        return reads or self._changed(maker, until)

    def _changed(self, maker: Node, until: int) -> bool:
        """Whether a node up to there changes the arguments in place, so that the product cannot wait."""
        used = {self.graph.storage(value) for value in maker.uses}
        return any(storage in used for at, storage in self.written if self.position[id(maker)] < at <= until)

    def _fused(self, parameter: int, value: int, maker: Node, alpha: float, flipped: bool, place: int) -> list[Node]:
        """The product that makes a gradient, going straight into the parameter; nothing for other makers."""
        tensors = self.graph.tensors
        if maker.func is aten.mm.default:
            shape = tensors[value].shape
            target = self._view(parameter, shape[::-1] if flipped else shape)
            if flipped:
                target = self._constant(tensors[target.value].t(), aten.t.default, target)
            return [self._node(Tensor.addmm_, target, *maker.args, alpha=alpha)]
        if maker.func is aten.bmm.default and not flipped:
            return [self._node(Tensor.baddbmm_, self._view(parameter, tensors[value].shape), *maker.args, alpha=alpha)]
        if maker.func is aten.sum.dim_IntList and list(maker.args[1]) == [0]:
            source = maker.args[0]
            if tensors[source.value].ndim != 2 or tensors[source.value].dtype != torch.float32:
                return []
            flipped_source = self._transpose(source, place)
            ones = self._ones(tensors[source.value])
            target = self._view(parameter, (tensors[parameter].numel(),))
            return [self._node(Tensor.addmv_, target, flipped_source, Ref(ones), alpha=alpha)]
        if maker.func is aten.embedding_dense_backward.default and maker.args[3] < 0 and not maker.args[4]:
            g, index = (tensors[a.value] for a in maker.args[:2])
            flat = self.graph.add(index.reshape(-1)), self.graph.add(g.reshape(-1, g.shape[-1]))
            nodes = [
                Node(aten.reshape.default, (maker.args[1], [-1]), {}, (flat[0],)),
                Node(aten.reshape.default, (maker.args[0], [-1, g.shape[-1]]), {}, (flat[1],)),
            ]
            target = self._view(parameter, tensors[value].shape)
            return [*nodes, self._node(Tensor.index_add_, target, 0, Ref(flat[0]), Ref(flat[1]), alpha=alpha)]
        return []

    def _node(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        return Node(func, args, kwargs, ())

    def _look(self, parameter: int, like: int) -> Ref:
        return self._view(parameter, tuple(self.graph.tensors[like].shape))

    def _view(self, parameter: int, shape: Sequence[int]) -> Ref:
        """The parameter in another shape: parameters are contiguous."""
        tensor = self.graph.tensors[parameter]
        if tuple(tensor.shape) == tuple(shape):
            return Ref(parameter)
        return self._constant(tensor.detach().view(*shape), aten.view.default, Ref(parameter), list(shape))

    def _constant(self, tensor: Tensor, func: Any, *args: Any) -> Ref:
        value = self.graph.add(tensor)
        self.after.setdefault(-1, []).append(Node(func, args, {}, (value,)))
        return Ref(value)

    def _transpose(self, source: Ref, place: int) -> Ref:
        """The transpose of a value: the graph's own if it is there by then, or one made together with the value."""
        known = self.transposes.get(source.value)
        if known is None or self.position[id(known)] > place:
            maker = self.makers.get(source.value)
            made = self.position[id(maker)] if maker is not None else -1
            value = self.graph.add(self.graph.tensors[source.value].t())
            known = Node(aten.t.default, (source,), {}, (value,))
            self.transposes[source.value], self.position[id(known)] = known, made
            self.after.setdefault(made, []).append(known)
        (out,) = known.outs
        assert out is not None
        return Ref(out)

    def _ones(self, like: Tensor) -> int:
        size = like.shape[0]
        if size not in self.ones:
            self.ones[size] = self.graph.add(torch.ones(size, device=like.device))
            self.graph.constants.add(self.ones[size])
        return self.ones[size]


def tick(clock: Tensor) -> None:
    """One more step."""
    clock.add_(1)


@dataclass(frozen=True)
class Optimise:
    """A parameter's step by an optimiser, as one operation; `clock` (), or (L, 1) for L clients side by side."""

    rule: Rule
    lr: float

    def __call__(self, theta: Tensor, g: Tensor, clock: Tensor, *slots: Tensor) -> None:
        shape = (len(clock), -1) if clock.ndim else (-1,)
        self.rule(theta.view(shape), g.reshape(shape), [slot.view(shape) for slot in slots], clock, self.lr)


def optimise(graph: Graph, step: Optimise, clock: int, targets: Sequence[tuple[int, int, Sequence[int]]]) -> None:
    """End a simplified graph with a step of every target: its parameter, its gradient, its slots, by their values."""
    graph.nodes.append(Node(tick, (Ref(clock),), {}, ()))
    stepped = {graph.storage(parameter) for parameter, _, _ in targets}
    steps = []
    for parameter, gradient, slots in targets:
        if graph.storage(gradient) in stepped:  # a look at a parameter, which may be stepped before
            copy = graph.add(graph.tensors[gradient].clone())
            graph.nodes.append(Node(aten.clone.default, (Ref(gradient),), {}, (copy,)))
            gradient = copy
        steps.append(Node(step, (Ref(parameter), Ref(gradient), Ref(clock), *map(Ref, slots)), {}, ()))
    graph.nodes += steps


def shift(graph: Graph, theta: int, by: int, lr: float) -> None:
    """End a step with theta -= lr * by."""
    graph.nodes.append(Node(Tensor.add_, (Ref(theta), Ref(by)), {"alpha": -lr}, ()))


def reuse_memory(graph: Graph, roots: Sequence[int]) -> None:
    """Write elementwise results over an argument that nobody reads any more."""
    held = {graph.storage(v) for v in (*roots, *graph.inputs, *graph.constants)}
    home = {v: graph.storage(v) for v in range(len(graph.tensors))}
    last: dict[int, int] = {}
    for at, node in enumerate(graph.nodes):
        for value in (*node.uses, *(o for o in node.outs if o is not None)):
            last[home[value]] = at
    for at, node in enumerate(graph.nodes):
        if node.func not in _IN_PLACE and node.func not in _GRADIENT_OUT:
            continue
        if not (node.args and type(node.args[0]) is Ref) or node.outs[0] is None:
            continue
        source, out = node.args[0].value, node.outs[0]
        a, b = graph.tensors[source], graph.tensors[out]
        others = [home[value] for value in node.uses if value != source]
        if (
            home[source] in held
            or last[home[source]] != at
            or home[source] in others
            or node.uses.count(source) != 1
            or not _same_look(graph, source, out)
            or a.dtype != b.dtype
            or a.untyped_storage().nbytes() != a.numel() * a.element_size()
        ):
            continue
        for value in [v for v, h in home.items() if h == home[out]]:
            last[home[source]] = max(last[home[source]], last[home[value]])
            home[value] = home[source]
        if node.func in _IN_PLACE:
            node.func = _IN_PLACE[node.func]
        else:
            node.kwargs = {**node.kwargs, "grad_input": node.args[0]}
            node.func = _GRADIENT_OUT[node.func]
