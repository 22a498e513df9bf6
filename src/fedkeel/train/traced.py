"""The client's step, recorded once per batch size and run as straight-line code: no autograd, no optimiser in it."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from fedkeel.core.keys import Key
from fedkeel.core.layout import PERSONAL, Layout
from fedkeel.train import arrange
from fedkeel.train.client import Told, batches, seeded, tell
from fedkeel.train.contract import ClientData, LocalWork
from fedkeel.train.emit import Program, StepFunction
from fedkeel.train.fuse import Optimise, Updates, optimise, reuse_memory, shift, simplify
from fedkeel.train.objective import batch_losses, own_columns
from fedkeel.train.record import Graph, NotTraceableError, Recorder

_ELEMENTWISE = "elementwise"


class TracedStep:
    """A `Step` without autograd. Programs are recorded for the batch sizes that `sizes` names, before any fork.

    `vector` (W,) is where the model lives, its own by default; `part` are the columns that are trained. Images go
    through convolutions channels last, but `as_it_is`.
    """

    def __init__(
        self,
        module: nn.Module,
        layout: Layout,
        data: ClientData,
        work: LocalWork,
        sizes: Iterable[int] = (),
        vector: Tensor | None = None,
        part: slice | None = None,
        *,
        as_it_is: bool = False,
    ) -> None:
        device = data.x.device
        self.module = copy.deepcopy(module).train().to(device)
        self.layout, self.data, self.work = layout, data, work
        self.vector = layout.flatten(module).to(device) if vector is None else vector
        part = layout.trainable if part is None else part
        self.trained = [
            e for e in layout.entries if e.trainable and part.start <= layout.offsets[e.name].start < part.stop
        ]
        self.shifts = part.stop == layout.trainable.stop  # what is private has no shift
        whole = part == layout.trainable and not own_columns(layout)
        if not whole and not all(_ELEMENTWISE in rule.definition.traits for rule in work.corrections):
            raise NotTraceableError("a correction that looks at all columns goes with none that stay as they are")
        self.theta = self.vector[layout.trainable]
        columns = {e.name for e in layout.entries}
        self.initial_state = {n: b.clone() for n, b in self.module.named_buffers() if n not in columns}
        self.state = {n: b.clone() for n, b in self.initial_state.items()}
        self.theta0 = self.theta.clone() if work.looks_back else self.theta
        self.told = tell(work.corrections, {}, {}, layout).to(device)
        self.slots = torch.zeros(len(work.slots), len(self.theta), device=device)
        self.clock = torch.zeros((), dtype=torch.float64, device=device)
        self.arrange = arrange.as_it_is if as_it_is else arrange.arranger(self.module, data.x, data.prepare)
        self._known: dict[int, StepFunction] = {}
        for size in sorted(sizes, reverse=True):
            self._step(size)

    def mode(self) -> AbstractContextManager[None]:
        # oneDNN's recurrent layer keeps what its gradient needs only while autograd is on.
        recurrent = any(isinstance(part, nn.RNNBase) for part in self.module.modules())
        return torch.enable_grad() if recurrent else torch.inference_mode()

    def begin(self, told: Told) -> None:
        pairs = (*zip(self.told.memory, told.memory, strict=True), *zip(self.told.control, told.control, strict=True))
        for room, given in (*pairs, (self.told.shift, told.shift)):
            if room is not None and given is not None:
                room.copy_(given)
        if self.work.looks_back:
            self.theta0.copy_(self.theta)
        for slot, first in zip(self.slots, self.work.slots, strict=True):
            slot.fill_(first)
        self.clock.zero_()
        for name, value in self.initial_state.items():
            self.state[name].copy_(value)

    def steps(self, rows: Tensor) -> Tensor:
        found = batches(self.data, rows, self.work.batch_size, self.arrange)
        return torch.cat([self._step(len(x))(x, y) for x, y in found])

    def inputs(self) -> dict[str, Tensor]:
        """Every tensor that outlives a step, by name, at its fixed address."""
        found = {f"w.{name}": view for name, view in self.layout.views(self.vector).items()}
        found |= {f"state.{name}": tensor for name, tensor in self.state.items()}
        if self.work.plain and not self.work.looks_back:
            return found
        found["clock"] = self.clock
        flat = {"theta": self.theta, "theta0": self.theta0}
        flat |= {f"slot.{i}": slot for i, slot in enumerate(self.slots)}
        dials = {f"control.{i}" for i, rule in enumerate(self.work.corrections) if rule.reads("dial")}
        for i, (c_i, c) in enumerate(zip(self.told.memory, self.told.control, strict=True)):
            flat |= {f"{kind}.{i}": t for kind, t in (("memory", c_i), ("control", c)) if t is not None}
        if self.told.shift is not None:
            flat["shift"] = self.told.shift
        for name, vector in flat.items():
            found[name] = vector
            for entry in self.layout.entries:
                if entry.trainable:
                    columns = self.layout.offsets[entry.name]
                    # A dial is the same for every tensor.
                    found[f"{name}/{entry.name}"] = vector if name in dials else vector[columns]
        return found

    def _step(self, size: int) -> StepFunction:
        if size not in self._known:
            self._known[size] = self.program(size).bind(self.inputs())
        return self._known[size]

    def program(self, size: int) -> Program:
        """The step on a batch of so many examples, as source code."""
        graph, losses = self.record(size)
        reuse_memory(graph, [losses])
        return Program(graph, losses, ("x", "y"))

    def record(self, size: int) -> tuple[Graph, int]:
        """The step on a batch of so many examples, and which of its values the losses (B,) are."""
        rows = torch.arange(size) % len(self.data.x)
        with torch.inference_mode(False), torch.enable_grad(), seeded(Key(0), self.vector.device):
            inputs = {name: tensor.detach().clone() for name, tensor in self.inputs().items()}
            inputs["x"] = self.arrange(self.data.prepare(self.data.x[rows]))
            # Of the labels only type and shape count here, and one that the model does not have is its client's affair.
            y = self.data.y[rows]
            inputs["y"] = y if y.is_floating_point() else torch.zeros_like(y)
            return self._graph(inputs)

    def _graph(self, inputs: dict[str, Tensor]) -> tuple[Graph, int]:
        layout, work = self.layout, self.work
        trained, every = self.trained, [e for e in layout.entries if e.trainable]
        leaves = [inputs[f"w.{e.name}"].requires_grad_() for e in trained]
        fixed = {e.name: inputs[f"w.{e.name}"].to(getattr(torch, e.dtype)) for e in every if e not in trained}
        buffers = {e.name: inputs[f"w.{e.name}"] for e in layout.entries if not e.trainable}
        buffers |= {name: inputs[f"state.{name}"] for name in self.state}
        with Recorder(inputs) as recorder:
            tensors = {e.name: leaf.to(getattr(torch, e.dtype)) for e, leaf in zip(trained, leaves, strict=True)}
            tensors |= buffers | fixed
            back = every if work.looks_back else []
            start = {e.name: inputs[f"theta0/{e.name}"].view(e.shape).to(getattr(torch, e.dtype)) for e in back}
            descended, losses = batch_losses(self.module, layout, work, tensors, start, inputs["x"], inputs["y"])
            gradients = torch.autograd.grad(descended.mean(), leaves, allow_unused=True)
            with torch.no_grad():
                for name, buffer in buffers.items():
                    if tensors[name] is not buffer:
                        buffer.copy_(tensors[name])
                targets = self._corrected(inputs, leaves, gradients)
        graph = recorder.graph
        parameters = [recorder.value(target) for target, _, _ in targets]
        roots = simplify(graph, [recorder.value(losses), *(recorder.value(g) for _, g, _ in targets)])
        if work.plain:
            Updates(graph, work.lr).apply(dict(zip(parameters, roots[1:], strict=True)))
        else:
            slots = [
                [recorder.value(inputs[f"slot.{i}{suffix}"]) for i in range(len(self.slots))]
                for _, _, suffix in targets
            ]
            step, clock = Optimise(work.optimiser, work.lr), recorder.value(inputs["clock"])
            optimise(graph, step, clock, list(zip(parameters, roots[1:], slots, strict=True)))
        if "shift" in inputs and not work.linear and self.shifts:
            shift(graph, recorder.value(inputs["theta"]), recorder.value(inputs["shift"]), work.lr)
        return graph, roots[0]

    def _corrected(
        self, inputs: dict[str, Tensor], leaves: Sequence[Tensor], gradients: Sequence[Tensor | None]
    ) -> list[tuple[Tensor, Tensor, str]]:
        """(tensor, its gradient after the corrections, the inputs' suffix): for each parameter, or the flat vector."""
        rules, trained = self.work.corrections, self.trained
        if self.work.bare:
            found = zip(leaves, gradients, trained, strict=True)
            return [(leaf, g, f"/{e.name}") for leaf, g, e in found if g is not None]
        flat = [
            torch.zeros_like(leaf).view(-1) if g is None else g.reshape(-1)
            for leaf, g in zip(leaves, gradients, strict=True)
        ]
        if pull := self.work.objective.hook("pull"):
            flat = [
                pull(g, leaf.detach().view(-1), inputs[f"theta0/{e.name.removeprefix(PERSONAL)}"])
                if e.name.startswith(PERSONAL) and e.name.removeprefix(PERSONAL) in self.layout.offsets
                else g
                for leaf, g, e in zip(leaves, flat, trained, strict=True)
            ]
        if all(_ELEMENTWISE in rule.definition.traits for rule in rules):
            parts = [
                (leaf, leaf.detach().view(-1), g, f"/{e.name}")
                for leaf, g, e in zip(leaves, flat, trained, strict=True)
            ]
        else:
            parts = [(inputs["theta"], inputs["theta"], torch.cat(flat), "")]
        result: list[tuple[Tensor, Tensor, str]] = []
        for target, theta, gradient, suffix in parts:
            g = gradient
            for i, rule in enumerate(() if suffix.startswith(f"/{PERSONAL}") else rules):
                c_i, c = inputs.get(f"memory.{i}{suffix}"), inputs.get(f"control.{i}{suffix}")
                g = rule(g, theta, inputs[f"theta0{suffix}"], c_i, c)
            if f"shift{suffix}" in inputs and self.work.linear:
                g = g + inputs[f"shift{suffix}"]
            result.append((target, g, suffix))
        return result
