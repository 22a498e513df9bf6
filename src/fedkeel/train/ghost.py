"""Examples' gradients all at once, recorded: their norms and their clipped sum, if it can be without a gradient each.

A layer that multiplies by its weights has the gradient d^T a, a (T, K) being what it is given and d (T, O) the gradient
of its output. For T = 1 its norm is |a| |d| (Goodfellow 2015), a "ghost" norm, and the clipped sum is one product for
all examples. Whatever else has parameters gets a gradient an example. The module runs under `vmap`, so examples can not
mix.
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.nn import functional

from fedkeel.core.keys import Key
from fedkeel.core.layout import Layout
from fedkeel.train import arrange
from fedkeel.train.client import seeded
from fedkeel.train.contract import ClientData, LocalWork
from fedkeel.train.emit import Program, StepFunction
from fedkeel.train.fuse import reuse_memory, simplify
from fedkeel.train.objective import batch_losses
from fedkeel.train.private import filled
from fedkeel.train.record import Graph, Recorder

aten = torch.ops.aten
_Hook = Callable[[str, Tensor, Tensor], Tensor]


class RecordedGradients:
    """`Clipped`, by a program for each size of batch; what fills a batch up counts for nothing."""

    def __init__(
        self, module: nn.Module, layout: Layout, data: ClientData, work: LocalWork, vector: Tensor, norm: float
    ) -> None:
        self.module = copy.deepcopy(module).train().to(data.x.device)
        self.layout, self.data, self.work, self.norm = layout, data, work, norm
        self.sum = torch.zeros(layout.trainable.stop, device=data.x.device)
        self.trained = [e for e in layout.entries if e.trainable]
        self.arrange = arrange.arranger(self.module, data.x, data.prepare)
        self.inputs = {f"w.{name}": view for name, view in layout.views(vector).items()}
        self.inputs |= {f"sum.{e.name}": self.sum[layout.offsets[e.name]].view(e.shape) for e in self.trained}
        self.layers = self._find_layers()
        self._known: dict[int, StepFunction] = {}
        self._program(len(filled(torch.arange(work.batch_size), work.batch_size)))

    def mode(self) -> AbstractContextManager[None]:
        return torch.inference_mode()

    def __call__(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        count, rows = len(rows), filled(rows, self.work.batch_size)
        counts = torch.zeros(len(rows), device=rows.device)
        counts[:count] = 1
        x = self.arrange(self.data.prepare(self.data.x.index_select(0, rows)))
        norms, losses = self._program(len(rows))(x, self.data.y.index_select(0, rows), counts)[:, :count]
        return self.sum, norms, losses

    def _find_layers(self) -> dict[str, tuple[int, ...]]:
        """The outputs' shapes of layers of a known kind with weights of their own that are called once."""
        calls: Counter[str] = Counter()
        shapes: dict[str, tuple[int, ...]] = {}

        def note(name: str, given: Tensor, output: Tensor) -> Tensor:
            calls[name] += 1
            shapes[name] = tuple(output.shape)
            return output

        owners = Counter(id(p) for _, p in self.module.named_parameters(remove_duplicate=False))
        known = [
            name
            for name, part in self.module.named_modules()
            if (_is_linear(part) or _is_conv(part))
            and all(owners[id(p)] == 1 and p.dtype == torch.float32 for p in part.parameters())
        ]
        with torch.no_grad(), seeded(Key(0), self.sum.device), _hooked(self.module, known, note):
            self.module(self.arrange(self.data.prepare(self.data.x[:1])))
        return {name: shape for name, shape in shapes.items() if calls[name] == 1}

    def _program(self, size: int) -> StepFunction:
        if size not in self._known:
            rows = torch.arange(size, device=self.sum.device) % len(self.data.x)
            with torch.inference_mode(False), seeded(Key(0), self.sum.device), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "There is a performance drop")  # exact all the same
                given = {name: tensor.detach().clone() for name, tensor in self.inputs.items()}
                given["x"] = self.arrange(self.data.prepare(self.data.x[rows]))
                # Of the labels only type and shape count here, and one that the model does not have fails its client.
                y = self.data.y[rows]
                given["y"] = y if y.is_floating_point() else torch.zeros_like(y)
                given["counts"] = torch.ones(size, device=self.sum.device)
                graph, result = self._record(given, size)
            self._known[size] = Program(graph, result, ("x", "y", "counts")).bind(self.inputs)
        return self._known[size]

    def _record(self, given: dict[str, Tensor], size: int) -> tuple[Graph, int]:
        """What puts the clipped sum in its place and gives (2, b), norms and losses."""
        dtypes = {e.name: getattr(torch, e.dtype) for e in self.layout.entries}
        of_layers = {f"{layer}.{kind}" for layer in self.layers for kind in ("weight", "bias")}
        fixed = {name: given[f"w.{name}"].to(dtype) for name, dtype in dtypes.items()}
        others = {e.name: given[f"w.{e.name}"] for e in self.trained if e.name not in of_layers}
        taps = {layer: torch.zeros(size, *shape, device=self.sum.device) for layer, shape in self.layers.items()}

        def loss(
            others: dict[str, Tensor], taps: dict[str, Tensor], x: Tensor, y: Tensor
        ) -> tuple[Tensor, tuple[Tensor, dict[str, Tensor]]]:
            seen: dict[str, Tensor] = {}

            def tap(layer: str, given: Tensor, output: Tensor) -> Tensor:
                seen[layer] = given
                return output + taps[layer]  # zero: the gradient at a tap is that of the output

            tensors = fixed | {name: t.to(dtypes[name]) for name, t in others.items()}
            with _hooked(self.module, taps, tap):
                descended, losses = batch_losses(self.module, self.layout, self.work, tensors, {}, x[None], y[None])
            return descended.sum(), (losses.squeeze(0), seen)

        with Recorder(given) as recorder:
            gradients = vmap(grad(loss, argnums=(0, 1), has_aux=True), (None, 0, 0, 0))
            (each, tapped), (losses, seen) = gradients(others, taps, given["x"], given["y"])
            with torch.no_grad():
                found: dict[str, _Gradients] = {name: _Each(g) for name, g in each.items()}
                for layer, a in seen.items():
                    found |= self._of_layer(layer, a, tapped[layer])
                norms = torch.stack([part.squares() for part in found.values()]).sum(0).sqrt()
                factors = (self.norm / norms).clamp(max=1) * given["counts"]
                for name, part in found.items():
                    part.add_up(factors, given[f"sum.{name}"])
                result = torch.stack([norms, losses])
        graph = recorder.graph
        _untap(graph, {graph.storage(recorder.value(tap)) for tap in taps.values()})
        roots = simplify(graph, [recorder.value(result)])
        reuse_memory(graph, roots)
        return graph, roots[0]

    def _of_layer(self, layer: str, a: Tensor, d: Tensor) -> dict[str, _Gradients]:
        """The gradients of a layer's parameters that are trained, by what it is given and its output's gradient."""
        part, trained = self.module.get_submodule(layer), {e.name for e in self.trained}
        if isinstance(part, nn.Conv2d):
            a, d = _patches(part, a.flatten(0, -4)), d.flatten(0, -4).flatten(2).transpose(1, 2)
        else:
            a, d = a.reshape(len(a), -1, a.shape[-1]), d.reshape(len(d), -1, d.shape[-1])
        found: dict[str, _Gradients] = {}
        if f"{layer}.weight" in trained:
            found[f"{layer}.weight"] = _product(a, d)
        if f"{layer}.bias" in trained:
            found[f"{layer}.bias"] = _Each(d.squeeze(1) if d.shape[1] == 1 else d.sum(1))
        return found


def _is_linear(part: nn.Module) -> bool:
    return type(part) is nn.Linear


def _is_conv(part: nn.Module) -> bool:
    return type(part) is nn.Conv2d and part.groups == 1 and part.padding_mode == "zeros"


@contextmanager
def _hooked(module: nn.Module, layers: Iterable[str], hook: _Hook) -> Iterator[None]:
    """While it is active, a layer's output is what the hook makes of (its name, what it was given, its output)."""

    def call(layer: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
        return lambda _, given, output: hook(layer, given[0], output)

    handles = [module.get_submodule(layer).register_forward_hook(call(layer)) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _untap(graph: Graph, taps: set[int]) -> None:
    """Make aliases of the sums with taps."""
    for node in graph.nodes:
        if node.func is aten.add.Tensor and graph.storage(node.uses[-1]) in taps:
            node.func, node.args = aten.alias.default, node.args[:1]


def _patches(part: nn.Conv2d, x: Tensor) -> Tensor:
    """What each place of the output is made of: images (b, C, H, W) to (b, T, C * kh * kw)."""
    left, right, top, bottom = part._reversed_padding_repeated_twice
    (kh, kw), (sh, sw), (dh, dw) = part.kernel_size, part.stride, part.dilation
    x = functional.pad(x.contiguous(), (left, right, top, bottom))
    span_h, span_w = dh * (kh - 1) + 1, dw * (kw - 1) + 1
    windows = x.unfold(2, span_h, sh).unfold(3, span_w, sw)[..., ::dh, ::dw]  # (b, C, H', W', kh, kw)
    b, c, height, width = windows.shape[:4]
    return windows.permute(0, 1, 4, 5, 2, 3).reshape(b, c * kh * kw, height * width).transpose(1, 2)


def _sizes(rows: Tensor) -> Tensor:
    """L2 norms (b,) of rows (b, n)."""
    found: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return found


class _Gradients(Protocol):
    """A parameter's gradient for each of the examples."""

    def squares(self) -> Tensor:
        """Of their norms (b,)."""

    def add_up(self, factors: Tensor, out: Tensor) -> None:
        """Put their sum in its place, each times its factor (b,)."""


class _Each:
    """All there: (b, ...)."""

    def __init__(self, g: Tensor) -> None:
        self.g = g.reshape(len(g), -1)

    def squares(self) -> Tensor:
        return _sizes(self.g).square()

    def add_up(self, factors: Tensor, out: Tensor) -> None:
        torch.mm(factors[None], self.g, out=out.view(1, -1))


class _Product:
    """d^T a of each example, for a (b, K) and d (b, O): its norm is |a| |d| (Goodfellow 2015)."""

    def __init__(self, a: Tensor, d: Tensor) -> None:
        self.a, self.d = a, d

    def squares(self) -> Tensor:
        return (_sizes(self.a) * _sizes(self.d)).square()

    def add_up(self, factors: Tensor, out: Tensor) -> None:
        torch.mm((self.d * factors[:, None]).t(), self.a, out=out.view(self.d.shape[1], -1))


def _product(a: Tensor, d: Tensor) -> _Gradients:
    """d^T a of each example, for a (b, T, K) and d (b, T, O).

    For T > 1 the gradients themselves: what Gram matrices tell of their norms (Li et al. 2021) is a small difference of
    large numbers where places cancel, and what seems shorter than it is is not scaled down.
    """
    if a.shape[1] == 1:
        return _Product(a.squeeze(1), d.squeeze(1))
    return _Each(torch.bmm(d.transpose(1, 2), a))
