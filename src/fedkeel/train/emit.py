"""From a list of nodes to a Python function: straight-line code over local names, every operation bound beforehand."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fedkeel.train.fuse import is_view
from fedkeel.train.record import Graph, Node, Ref, replace

aten = torch.ops.aten
# The same operations behind torch's own argument parser: a third of the cost of a call through the dispatcher's schema.
_FAST: dict[Any, Callable[..., Any]] = {
    aten.addmm.default: torch.addmm,
    aten.mm.default: torch.mm,
    aten.bmm.default: torch.bmm,
    aten.relu.default: torch.relu,
    aten.add.Tensor: torch.add,
    aten.sub.Tensor: torch.sub,
    aten.mul.Tensor: torch.mul,
    aten.div.Tensor: torch.div,
    aten.t.default: Tensor.t,
    aten.view.default: Tensor.view,
    aten._unsafe_view.default: Tensor.view,
    aten.transpose.int: Tensor.transpose,
    aten.permute.default: Tensor.permute,
    aten.sum.dim_IntList: torch.sum,
    aten.mean.dim: torch.mean,
    aten._log_softmax.default: torch._log_softmax,
    aten._log_softmax_backward_data.default: torch._log_softmax_backward_data,
    aten._softmax.default: torch._softmax,
    aten._softmax_backward_data.default: torch._softmax_backward_data,
    aten.convolution.default: torch.convolution,
    aten.embedding.default: torch.embedding,
    aten.native_batch_norm.default: torch.native_batch_norm,
    aten.native_group_norm.default: torch.native_group_norm,
    aten.native_layer_norm.default: torch.native_layer_norm,
}

StepFunction = Callable[..., Tensor]


class Program:
    """A graph as source code. `bind` runs once what looks at the inputs alone, and compiles the rest around it."""

    def __init__(self, graph: Graph, result: int, per_call: tuple[str, ...]) -> None:
        self.inputs = {v: name for v, name in graph.inputs.items() if name not in per_call}
        self.arguments = {name: v for v, name in graph.inputs.items() if name in per_call}
        self.per_call = per_call
        fixed = set(self.inputs) | graph.constants
        self.looks: list[Node] = []
        body: list[Node] = []
        for node in graph.nodes:
            if is_view(node) and fixed.issuperset(node.uses):
                self.looks.append(node)
                fixed.update(o for o in node.outs if o is not None)
            else:
                body.append(node)
        needed = {v for node in (*body, *self.looks) for v in node.uses} | {result}
        self.constants = {v: graph.tensors[v] for v in graph.constants & needed}
        self.bound: dict[str, Any] = {}
        self._names: dict[Any, str] = {}
        self.source = self._write(body, result, fixed)

    def bind(self, inputs: Mapping[str, Tensor]) -> StepFunction:
        """The function of the arguments that come with each call, over the memory of these inputs."""
        held: dict[int, Tensor] = dict(self.constants)
        held |= {v: inputs[name] for v, name in self.inputs.items()}
        for node in self.looks:
            args, kwargs = replace((node.args, node.kwargs), lambda a: held[a.value] if type(a) is Ref else a)
            (out,) = node.outs
            assert out is not None
            held[out] = node.func(*args, **kwargs)
        known = self.bound | {f"v{v}": tensor for v, tensor in held.items()}
        used = [name for name in known if name in self._mentioned]
        space: dict[str, Any] = {}
        exec(f"def bind({', '.join(used)}):\n{self.source}    return step\n", {"inf": math.inf, "nan": math.nan}, space)
        step: StepFunction = space["bind"](**{name: known[name] for name in used})
        return step

    def _write(self, body: list[Node], result: int, fixed: set[int]) -> str:
        last: dict[int, int] = {}
        for at, node in enumerate(body):
            for value in (*node.uses, *(o for o in node.outs if o is not None)):
                last[value] = at
        self._mentioned: set[str] = set()
        lines = [f"    def step({', '.join(f'v{self.arguments[name]}' for name in self.per_call)}):"]
        for at, node in enumerate(body):
            lines.append(f"        {self._line(node, last, at)}")
            dead = {v for v in (*node.uses, *(o for o in node.outs if o is not None)) if last[v] == at}
            gone = sorted(f"v{v}" for v in dead - fixed - {result})
            if gone:
                lines.append(f"        del {', '.join(gone)}")
        self._mentioned.add(f"v{result}")
        return "\n".join([*lines, f"        return v{result}", ""])

    def _line(self, node: Node, last: Mapping[int, int], at: int) -> str:
        func = _FAST.get(node.func, node.func)
        args = [self._text(a) for a in node.args] + [f"{k}={self._text(v)}" for k, v in node.kwargs.items()]
        call = f"{self._bind(func)}({', '.join(args)})"
        outs = [o for o in node.outs if o is not None and o not in node.uses]  # in place: it is there already
        if node.multiple and outs:
            return f"{', '.join('_' if o is None else f'v{o}' for o in node.outs)}, = {call}"
        return f"v{outs[0]} = {call}" if outs else call

    def _text(self, argument: Any) -> str:
        if type(argument) is Ref:
            name = f"v{argument.value}"
            self._mentioned.add(name)
            return name
        if isinstance(argument, list | tuple):
            inner = "".join(f"{self._text(a)}, " for a in argument)
            return f"[{inner}]" if isinstance(argument, list) else f"({inner})"
        if argument is None or isinstance(argument, bool | int | float | str):
            return repr(argument)
        return self._bind(argument)

    def _bind(self, thing: Any) -> str:
        if thing not in self._names:
            self._names[thing] = f"k{len(self._names)}"
            self.bound[self._names[thing]] = thing
        self._mentioned.add(self._names[thing])
        return self._names[thing]
