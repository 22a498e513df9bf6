"""Record what a function does as a flat list of tensor operations, below autograd: forward, gradient and all.

The same capture as `make_fx`, without the second and the 800 modules that its first use costs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class NotTraceableError(Exception):
    """Why a module's step is no fixed sequence of operations."""


class Ref(NamedTuple):
    """Stands for a tensor among the arguments of a node."""

    value: int


@dataclass(slots=True)
class Node:
    """One operation. `outs` are its tensors in the order it returns them, None where it returns none."""

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outs: tuple[int | None, ...]
    multiple: bool = False  # whether it returns a tuple

    @property
    def uses(self) -> list[int]:
        return _values((*self.args, *self.kwargs.values()))

    @property
    def writes(self) -> list[int]:
        """The arguments that it changes in place."""
        if not isinstance(self.func, torch._ops.OpOverload):
            return []
        found = []
        for position, argument in enumerate(self.func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                given = self.args[position] if position < len(self.args) else self.kwargs.get(argument.name)
                found += _values((given,))
        return found


@dataclass
class Graph:
    """Nodes over values, which are indices into `tensors`: what each was when the function ran."""

    tensors: list[Tensor] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    inputs: dict[int, str] = field(default_factory=dict)  # set anew for every run or client
    constants: set[int] = field(default_factory=set)

    def storage(self, value: int) -> int:
        """Values with the same storage share memory."""
        return self.tensors[value].untyped_storage().data_ptr()

    def add(self, tensor: Tensor) -> int:
        self.tensors.append(tensor)
        return len(self.tensors) - 1


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records every operation while it is active. Tensors it did not see made are constants of the graph."""

    def __init__(self, inputs: Mapping[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.graph = Graph()
        self._known: dict[int, int] = {}
        for name, tensor in inputs.items():
            self.graph.inputs[self._learn(tensor)] = name

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would import its compiler, a second of start-up, only to keep out of it

    def _learn(self, tensor: Tensor) -> int:
        value = self._known[id(tensor)] = self.graph.add(tensor)  # kept alive there, so that its id stays its own
        return value

    def value(self, tensor: Tensor) -> int:
        """The value that a tensor is; an unknown one becomes a constant."""
        if id(tensor) not in self._known:
            self.graph.constants.add(self._learn(tensor))
        return self._known[id(tensor)]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags:
            raise NotTraceableError(f"its path depends on the data ({func})")
        refs = replace((args, kwargs), lambda t: Ref(self.value(t)) if isinstance(t, Tensor) else t)
        result = func(*args, **kwargs)
        multiple = isinstance(result, tuple | list)
        outs = []
        for out in result if multiple else (result,):
            if isinstance(out, Tensor):
                outs.append(self._known.get(id(out)) if id(out) in self._known else self._learn(out))
            else:
                outs.append(None)
        self.graph.nodes.append(Node(func, refs[0], refs[1], tuple(outs), multiple))
        return result


def _values(tree: tuple[Any, ...] | list[Any]) -> list[int]:
    """The values that nested lists and tuples refer to, in order."""
    found: list[int] = []
    for branch in tree:
        if type(branch) is Ref:
            found.append(branch.value)
        elif type(branch) is list or type(branch) is tuple:
            found += _values(branch)
    return found


def replace(tree: Any, change: Callable[[Any], Any]) -> Any:
    """The same nested lists, tuples and dictionaries with every leaf changed."""
    if isinstance(tree, dict):
        return {key: replace(branch, change) for key, branch in tree.items()}
    if isinstance(tree, list | tuple) and not isinstance(tree, Ref):
        return type(tree)([replace(branch, change) for branch in tree])
    return change(tree)
