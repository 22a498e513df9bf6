"""Clients as rows: L lanes train side by side in one vmapped step; a lane is refilled when its client ends.

Shapes never change, and nothing is read back before a client ends, so a GPU is kept busy. A client's result is the
plain loop's to rounding, and depends on its neighbours by rounding only: batched products add up in another order.
"""

from __future__ import annotations

import copy
import warnings
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.func import grad, vmap

from fedkeel.core.errors import RunError
from fedkeel.core.keys import Key
from fedkeel.core.layout import Layout
from fedkeel.train.client import (
    CHUNK_BYTES,
    Outcome,
    Told,
    epoch_order,
    first_failure,
    seeded,
    single_thread,
    steps_wanted,
    succeeded,
    tell,
    trained,
)
from fedkeel.train.contract import ClientData, LocalWork, Task, Trained
from fedkeel.train.emit import Program, StepFunction
from fedkeel.train.fuse import Optimise, Updates, optimise, reuse_memory, shift, simplify
from fedkeel.train.objective import batch_losses, own_columns, pulled
from fedkeel.train.record import NotTraceableError, Recorder


@dataclass
class _Lane:
    """The client in a lane: what is left of its epoch, and its losses so far."""

    task: Task
    count: int
    wanted: int
    order: Tensor
    epoch: int = 0
    at: int = 0  # examples of `order` that were used
    losses: list[float] = field(default_factory=list)
    fresh: list[Tensor] = field(default_factory=list)  # (k,) each, still on the device


class Rows:
    """A `Trainer` of `lanes` clients at a time, on the device of the data."""

    name = "rows"

    def __init__(self, module: nn.Module, layout: Layout, data: ClientData, work: LocalWork, lanes: int) -> None:
        if work.private_first is not None:
            raise NotTraceableError("clients side by side train all layers, not some before the others")
        if work.example_noise is not None:
            raise NotTraceableError("clients side by side draw batches of one size, and noise needs Poisson's sampling")
        self.device = data.x.device
        self.module = copy.deepcopy(module).train().to(self.device)
        self.layout, self.data, self.work, self.lanes = layout, data, work, lanes
        self.initial = layout.flatten(module).to(self.device)
        columns = {e.name for e in layout.entries}
        self.state = {n: b.clone() for n, b in self.module.named_buffers() if n not in columns}
        self.vectors = {"w": self._matrix(layout.width)}
        nothing = tell(work.corrections, {}, {}, layout)
        self.dials = {f"dial.{i}": c for i, c in enumerate(nothing.control) if work.corrections[i].reads("dial")}
        for name, vector in self._named(nothing).items():
            if name not in self.dials and vector is not None:
                self.vectors[name] = self._matrix(layout.trainable.stop)
        self.vectors["theta0"] = self._matrix(layout.trainable.stop)
        self.slots = work.slots
        self.vectors |= {f"slot.{i}": self._matrix(layout.trainable.stop) for i in range(len(self.slots))}
        self.clock = torch.zeros(lanes, 1, dtype=torch.float64, device=self.device)
        self.views = {f"{k}/{name}": v for k, m in self.vectors.items() for name, v in self._views(m).items()}
        self.views |= {"clock": self.clock} | {
            f"state/{name}": torch.stack([b] * lanes) for name, b in self.state.items()
        }
        self.views |= {
            name: torch.stack([c] * lanes).to(self.device) for name, c in self.dials.items() if c is not None
        }
        self.step: StepFunction = self._record().bind(self.views)

    def train(
        self, theta: Tensor, tasks: Sequence[Task], control: Mapping[str, Tensor] | None = None
    ) -> Iterator[Trained]:
        with single_thread():
            yield from self._rounds(theta, tasks, control or {})

    def close(self) -> None:
        """Nothing to release."""

    def _rounds(self, theta: Tensor, tasks: Sequence[Task], control: Mapping[str, Tensor]) -> Iterator[Trained]:
        waiting = deque(sorted(tasks, key=lambda task: -self.data.count(task.client)))
        lanes: list[_Lane | None] = [None] * self.lanes
        theta = theta.to(self.device)
        while waiting or any(lanes):
            for at, lane in enumerate(lanes):
                if lane is None and waiting:
                    lanes[at] = self._fill(at, waiting.popleft(), theta, control)
            for at, lane in enumerate(lanes):
                if lane is not None and (outcome := self._ended(lane)):
                    yield self._collect(at, lane, outcome, theta)
                    lanes[at] = None
            if all(lane is not None or not waiting for lane in lanes) and any(lanes):
                self._advance(lanes)

    def _named(self, given: Told) -> dict[str, Tensor | None]:
        """What the corrections are told, by the names of its lanes."""
        rules = self.work.corrections
        found = {f"memory.{i}": c_i for i, c_i in enumerate(given.memory)}
        found |= {f"{'dial' if rules[i].reads('dial') else 'control'}.{i}": c for i, c in enumerate(given.control)}
        return found | {"shift": given.shift}

    def _matrix(self, width: int) -> Tensor:
        """Room for `width` columns of every lane: tensor by tensor, so that each is contiguous over the lanes."""
        return torch.zeros(self.lanes * width, device=self.device)

    def _views(self, matrix: Tensor) -> dict[str, Tensor]:
        found = {}
        for entry in self.layout.entries:
            columns = self.layout.offsets[entry.name]
            if columns.stop * self.lanes <= matrix.numel():
                part = matrix[columns.start * self.lanes : columns.stop * self.lanes]
                found[entry.name] = part.view(self.lanes, *entry.shape)
        return found

    def _put(self, kind: str, lane: int, vector: Tensor) -> None:
        """Lay a vector, over all columns or the trainable ones, into a lane."""
        for name, columns in self.layout.offsets.items():
            if columns.stop <= len(vector):
                self.views[f"{kind}/{name}"][lane].view(-1).copy_(vector[columns])

    def _fill(self, at: int, task: Task, theta: Tensor, control: Mapping[str, Tensor]) -> _Lane:
        shared, rules, layout = self.layout.shared, self.work.corrections, self.layout
        with torch.inference_mode():
            start = self.initial.clone()
            start[shared] = theta
            if task.private is not None:
                start[: shared.start] = task.private[: shared.start]
                start[shared.stop :] = task.private[shared.start :]
            self._put("w", at, start)
            self._put("theta0", at, start[layout.trainable])
            for name, vector in self._named(tell(rules, task.memory, control, layout)).items():
                if name in self.dials and vector is not None:
                    self.views[name][at].copy_(vector)
                elif vector is not None:
                    self._put(name, at, vector)
            for name, value in self.state.items():
                self.views[f"state/{name}"][at].copy_(value)
            self.clock[at] = 0
            for i, first in enumerate(self.slots):
                self._put(f"slot.{i}", at, torch.full((layout.trainable.stop,), first))
        count = self.data.count(task.client)
        wanted = steps_wanted(self.work.stopping, count, self.work.batch_size, [], task)
        lane = _Lane(task, count, wanted if count else 0, torch.empty(0, dtype=torch.int64))
        self._shuffle(lane, 0)
        return lane

    def _shuffle(self, lane: _Lane, done: int) -> None:
        """Begin an epoch of a client that did so many steps."""
        order = epoch_order(lane.task.key, lane.epoch, lane.count)[: (lane.wanted - done) * self.work.batch_size]
        lane.order, lane.at = order + self.data.range(lane.task.client)[0], 0
        lane.epoch += 1

    def _ended(self, lane: _Lane) -> Outcome | None:
        """What came of a lane's client if its work is over; the next epoch is begun if it is not."""
        if lane.at < len(lane.order):
            return None
        static = "static" in self.work.stopping.definition.traits
        done = len(lane.losses) + sum(len(part) for part in lane.fresh)
        if static and done < lane.wanted:
            self._shuffle(lane, done)
            return None
        new = torch.cat(lane.fresh).tolist() if lane.fresh else []
        if failed := first_failure(new, len(lane.losses)):
            return failed
        lane.losses += new
        lane.fresh = []
        if not static and lane.count:
            lane.wanted = steps_wanted(self.work.stopping, lane.count, self.work.batch_size, lane.losses, lane.task)
            if done < lane.wanted:
                self._shuffle(lane, done)
                return None
        return succeeded(lane.losses)

    def _advance(self, lanes: Sequence[_Lane | None]) -> None:
        """Step all lanes until the first of them is at the end of its epoch."""
        size = self.work.batch_size
        steps = min(-(-(len(lane.order) - lane.at) // size) for lane in lanes if lane is not None)
        rows = torch.zeros(steps, self.lanes, size, dtype=torch.int64)
        weight = torch.zeros(steps, self.lanes, size)
        for at, lane in enumerate(lanes):
            if lane is None:
                continue  # an idle lane goes on with any row, at weight zero: nobody reads it
            part = lane.order[lane.at : lane.at + steps * size]
            lane.at += len(part)
            full, tail = divmod(len(part), size)
            rows[:full, at] = part[: full * size].view(full, size)
            weight[:full, at] = 1 / size
            if tail:
                rows[full, at] = part[0]  # of its own data: what is masked may not spoil it
                rows[full, at, :tail] = part[full * size :]
                weight[full, at, :tail] = 1 / tail
        try:
            with torch.inference_mode():
                losses = self._run(rows.to(self.device), weight.to(self.device))
        except Exception as error:
            clients = ", ".join(str(lane.task.client) for lane in lanes if lane is not None)
            raise RunError(f"clients {clients}: the training step raised {type(error).__name__}: {error}") from error
        for at, lane in enumerate(lanes):
            if lane is not None:
                lane.fresh.append(losses[:, at])

    def _run(self, rows: Tensor, weight: Tensor) -> Tensor:
        """Steps over batches (k, L, B) of rows of the data; the losses (k, L)."""
        data = self.data
        per_step = 4 * rows[0].numel() * max(1, data.x[0].numel())
        losses: list[Tensor] = []
        for part, w in zip(*(torch.split(t, max(1, CHUNK_BYTES // per_step)) for t in (rows, weight)), strict=True):
            x = data.prepare(data.x[part.view(-1)])
            y = data.y[part.view(-1)]
            x, y = x.view(*part.shape, *x.shape[1:]), y.view(*part.shape, *y.shape[1:])
            losses += map(self.step, x.unbind(0), y.unbind(0), w.unbind(0))
        return torch.stack(losses)

    def _collect(self, at: int, lane: _Lane, outcome: Outcome, theta: Tensor) -> Trained:
        layout, shared = self.layout, self.layout.shared
        with torch.no_grad():
            vector = torch.cat([self.views[f"w/{e.name}"][at].reshape(-1) for e in layout.entries])
            if self.work.keeps_last:
                vector[shared.stop :] = vector[shared]
            own = layout.private(vector).cpu()
            delta = vector[shared].sub_(theta).cpu()
        private = own if len(own) else None
        return trained(lane.count, lane.task, outcome, delta, private)

    def _record(self) -> Program:
        with torch.inference_mode(False), torch.enable_grad(), seeded(Key(0), self.device), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "There is a performance drop")  # exact all the same
            inputs = {name: tensor.clone() for name, tensor in self.views.items()}
            rows = torch.arange(self.work.batch_size * self.lanes, device=self.device) % len(self.data.x)
            x, y = self.data.prepare(self.data.x[rows]), self.data.y[rows]
            inputs["x"], inputs["y"] = (t.view(self.lanes, -1, *t.shape[1:]) for t in (x, y))
            inputs["weight"] = torch.ones(self.lanes, self.work.batch_size, device=self.device)
            return self._program(inputs)

    def _program(self, inputs: dict[str, Tensor]) -> Program:
        trained = {e.name: inputs[f"w/{e.name}"] for e in self.layout.entries if e.trainable}
        dtypes = {e.name: getattr(torch, e.dtype) for e in self.layout.entries}
        buffers = {e.name: inputs[f"w/{e.name}"] for e in self.layout.entries if not e.trainable}
        buffers |= {name: inputs[f"state/{name}"] for name in self.state}

        begun = {name: inputs[f"theta0/{name}"] for name in trained} if self.work.looks_back else {}

        def loss(
            trained: dict[str, Tensor], begun: dict[str, Tensor], buffers: dict[str, Tensor],
            x: Tensor, y: Tensor, w: Tensor,
        ) -> tuple[Tensor, Tensor]:  # fmt: skip
            tensors = {name: tensor.to(dtypes[name]) for name, tensor in trained.items()} | buffers
            start = {name: tensor.to(dtypes[name]) for name, tensor in begun.items()}
            each, told = batch_losses(self.module, self.layout, self.work, tensors, start, x, y)
            if each.shape != w.shape:
                raise NotTraceableError("its objective takes batches apart, and clients side by side mask theirs")
            return (each * w).sum(), (told * w).sum()

        with Recorder(inputs) as recorder:
            given = inputs["x"], inputs["y"], inputs["weight"]
            gradients, losses = vmap(grad(loss, has_aux=True))(trained, begun, buffers, *given)
            with torch.no_grad():
                corrected = self._corrected(inputs, trained, gradients)
        graph = recorder.graph
        parameters = [recorder.value(tensor) for tensor in trained.values()]
        roots = simplify(graph, [recorder.value(losses), *map(recorder.value, corrected)])
        if self.work.plain:
            Updates(graph, self.work.lr).apply(dict(zip(parameters, roots[1:], strict=True)))
        else:
            slots = [[recorder.value(inputs[f"slot.{i}/{n}"]) for i in range(len(self.slots))] for n in trained]
            step, clock = Optimise(self.work.optimiser, self.work.lr), recorder.value(inputs["clock"])
            optimise(graph, step, clock, list(zip(parameters, roots[1:], slots, strict=True)))
        for name, parameter in zip(trained, parameters, strict=True):
            if f"shift/{name}" in inputs and not self.work.linear:
                shift(graph, parameter, recorder.value(inputs[f"shift/{name}"]), self.work.lr)
        reuse_memory(graph, [roots[0]])
        return Program(graph, roots[0], ("x", "y", "weight"))

    def _corrected(
        self, inputs: Mapping[str, Tensor], trained: Mapping[str, Tensor], gradients: Mapping[str, Tensor]
    ) -> list[Tensor]:
        """Every parameter's gradient after the corrections."""
        if not self.work.corrections and self.work.objective.hook("pull") is None:
            return [gradients[name] for name in trained]

        def flat(kind: str) -> Tensor | None:
            parts = [inputs.get(f"{kind}/{name}") for name in trained]
            found = [part.detach().reshape(self.lanes, -1) for part in parts if part is not None]
            return torch.cat(found, -1) if found else None

        g = torch.cat([gradients[name].reshape(self.lanes, -1) for name in trained], -1)
        theta, theta0 = flat("w"), flat("theta0")
        assert theta is not None
        assert theta0 is not None
        g = pulled(self.work, self.layout, g, theta, theta0)
        at = own_columns(self.layout)  # corrections leave what is the client's own alone
        part = g[..., at:]
        for i, rule in enumerate(self.work.corrections):
            c_i, c = flat(f"memory.{i}"), flat(f"control.{i}")
            c = inputs[f"dial.{i}"] if rule.reads("dial") else None if c is None else c[..., at:]
            part = rule(part, theta[..., at:], theta0[..., at:], None if c_i is None else c_i[..., at:], c)
        g = torch.cat([g[..., :at], part], -1) if at else part
        shift = flat("shift")
        if shift is not None and self.work.linear:
            g = g + shift
        pieces = torch.split(g, [tensor[0].numel() for tensor in trained.values()], -1)
        return [g.view(tensor.shape) for tensor, g in zip(trained.values(), pieces, strict=True)]
