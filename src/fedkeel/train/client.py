"""One client's local work, whatever the backend of its step: epochs, batches, stopping, what came of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fedkeel.core.keys import Key
from fedkeel.core.layout import Layout
from fedkeel.core.registry import Rule
from fedkeel.train.contract import ClientData, LocalWork, Task, Trained
from fedkeel.train.evaluate import evaluate

Batch = tuple[Tensor, Tensor]
CHUNK_BYTES = 1 << 19  # of prepared inputs: gathered at once they save calls, and stay in the cache until used


class Step(Protocol):
    """SGD steps of a local model that lives in `vector` (W,), float32, at a fixed address."""

    vector: Tensor

    def mode(self) -> AbstractContextManager[None]:
        """The autograd mode that it runs in."""

    def begin(self, told: Told) -> None:
        """A client starts from `vector`."""

    def steps(self, rows: Tensor) -> Tensor:
        """Step through these rows of the data (n,), a batch at a time; each example's loss before its step, (n,)."""


class Told(NamedTuple):
    """What a client's corrections go by: c_i and c of each, (T,), a dial, or None; and the sum of their shifts (T,)."""

    memory: Sequence[Tensor | None]
    control: Sequence[Tensor | None]
    shift: Tensor | None

    def to(self, device: torch.device) -> Told:
        """The same on the device."""
        memory, control, (shift,) = (
            [t if t is None else t.to(device) for t in part] for part in (self.memory, self.control, [self.shift])
        )
        return Told(memory, control, shift)


class Outcome(NamedTuple):
    """What a client's training came to, beside the vector. The loss is the mean over the steps.

    `first` and `last` are the losses that it began and ended with: on its validation examples, or else on the first and
    the last batch, before their steps.
    """

    steps: int
    loss: float
    failure: str | None
    first: float = math.nan
    last: float = math.nan


@contextmanager
def seeded(key: Key, device: torch.device) -> Iterator[None]:
    """Modules draw (dropout) from torch's global generator: give them this key's stream, and leave no trace."""
    generator = torch.default_generator if device.type == "cpu" else torch.cuda.default_generators[device.index or 0]
    before = generator.get_state()
    generator.manual_seed(key.value & 0x7FFF_FFFF_FFFF_FFFF)
    try:
        yield
    finally:
        generator.set_state(before)


@contextmanager
def single_thread() -> Iterator[None]:
    """One intra-op thread: the result must not depend on how many cores there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def epoch_order(key: Key, epoch: int, num_examples: int) -> Tensor:
    """The order of a client's examples in an epoch, (n,) int64."""
    return torch.randperm(num_examples, generator=key.fold("batches", epoch).torch())


def tell(rules: Sequence[Rule], memory: Mapping[str, Tensor], control: Mapping[str, Tensor], layout: Layout) -> Told:
    """What corrections are told of vectors (P,) under their names: over the trainable columns, 0 where unknown."""

    def spread(vectors: Mapping[str, Tensor], rule: Rule) -> Tensor:
        if rule.name in vectors and not layout.shared.start:
            return vectors[rule.name][layout.params]
        found = torch.zeros(layout.trainable.stop)
        if rule.name in vectors:
            found[layout.shared.start :] = vectors[rule.name][layout.params]
        return found

    shift: Tensor | None = None
    for rule in rules:
        if hook := rule.hook("shift"):
            one = hook(spread(memory, rule), spread(control, rule))
            shift = one if shift is None else shift + one
    return Told(
        [spread(memory, rule) if rule.reads("memory") else None for rule in rules],
        [
            spread(control, rule)
            if rule.reads("control")
            else control.get(rule.name, rule.init())
            if rule.reads("dial")
            else None
            for rule in rules
        ],
        shift,
    )


def steps_wanted(stopping: Rule, count: int, size: int, losses: Sequence[float], task: Task) -> int:
    """How many steps a stopping rule wants in all of a task's client with so many examples."""
    speed = (task.speed,) if "speed" in stopping.definition.traits else ()
    return int(stopping(count, size, losses, *speed))


def succeeded(losses: Sequence[float]) -> Outcome:
    """The outcome of a client whose losses are all finite."""
    if not losses:
        return Outcome(0, math.nan, "the client has no examples")
    return Outcome(len(losses), math.fsum(losses) / len(losses), None, losses[0], losses[-1])


def first_failure(losses: Sequence[float], before: int) -> Outcome | None:
    """The outcome of a client whose losses, after so many finite ones, hold one that is not."""
    for number, loss in enumerate(losses, before + 1):
        if not math.isfinite(loss):
            became = "NaN" if math.isnan(loss) else "infinite"
            return Outcome(number, loss, f"loss became {became} at step {number}")
    return None


def trained(count: int, task: Task, outcome: Outcome, delta: Tensor, private: Tensor | None) -> Trained:
    """An outcome as trainers give it, of a client with so many examples."""
    steps, loss, failure, first, last = outcome
    return Trained(task.client, delta, private, steps, loss, count, failure, first, last)


def chunk(data: ClientData, size: int) -> int:
    """How many examples are prepared at once: whole batches of `size`."""
    return size * max(1, CHUNK_BYTES // (4 * size * max(1, data.x[0].numel())))


def batches(data: ClientData, rows: Tensor, size: int, arrange: Callable[[Tensor], Tensor]) -> Iterator[Batch]:
    """Inputs, prepared and arranged, and labels of these rows of the data, `size` at a time."""
    for part in torch.split(rows, chunk(data, size)):
        x = arrange(data.prepare(data.x.index_select(0, part)))
        y = data.y.index_select(0, part)
        yield from zip(torch.split(x, size), torch.split(y, size), strict=True)


class Client:
    """Trains one client after another in this thread. Not reentrant: all of them share the step's vector.

    `before` takes the steps that train the private layers alone, in the same vector, where there are any. `validation`
    are examples of the same clients that no step sees.
    """

    def __init__(
        self,
        module: nn.Module,
        layout: Layout,
        data: ClientData,
        work: LocalWork,
        step: Step,
        before: Step | None = None,
        validation: ClientData | None = None,
    ) -> None:
        self.layout, self.data, self.work, self.step, self.before = layout, data, work, step, before
        self.module, self.validation = module, validation
        self.initial = layout.flatten(module).to(data.x.device)

    def train(self, theta: Tensor, task: Task, control: Mapping[str, Tensor]) -> Outcome:
        """Leave the trained model in `step.vector`; `theta` (P,) and the task are not changed."""
        shared, work = self.layout.shared, self.work
        with self.step.mode():
            vector = self.step.vector
            vector[shared] = theta
            if task.private is None:
                vector[: shared.start] = self.initial[: shared.start]
                vector[shared.stop :] = self.initial[shared.stop :]
            else:
                vector[: shared.start] = task.private[: shared.start]
                vector[shared.stop :] = task.private[shared.start :]
            told = tell(work.corrections, task.memory, control, self.layout)
            with seeded(task.key.fold("model"), vector.device):
                epochs, before = 0, None
                if self.before is not None and work.private_first is not None:
                    self.before.begin(told)
                    before, epochs = self._epochs(task, self.before, work.private_first, 0)
                    if before.failure is not None:
                        return before
                self.step.begin(told)
                outcome, _ = self._epochs(task, self.step, work.stopping, epochs)
                if before is not None:
                    outcome = outcome._replace(first=before.first)
            if work.keeps_last:
                vector[shared.stop :] = vector[shared]
            return outcome

    def _epochs(self, task: Task, step: Step, stopping: Rule, epoch: int) -> tuple[Outcome, int]:
        """Train until the stopping rule says so, from an epoch on; what came of it, and the epoch after the last.

        A rule that goes by validation losses ends at the best of the models that it saw.
        """
        count, size = self.data.count(task.client), self.work.batch_size
        best: tuple[float, int, Tensor] | None = None
        losses: list[float] = []
        checked = [self._validated(task.client)] if self.validation is not None else []
        by_checks = "validation" in stopping.definition.traits
        wanted = steps_wanted(stopping, count, size, checked if by_checks else [], task)
        while len(losses) < wanted and count:
            order = epoch_order(task.key, epoch, count)[: (wanted - len(losses)) * size]
            new = self._steps(step, order + self.data.range(task.client)[0])
            if failed := first_failure(new, len(losses)):
                return failed, epoch
            losses += new
            epoch += 1
            if by_checks:
                checked.append(self._validated(task.client))
                if best is None or checked[-1] < best[0]:
                    best = checked[-1], len(losses), step.vector.clone()
            if "static" not in stopping.definition.traits:
                wanted = steps_wanted(stopping, count, size, checked if by_checks else losses, task)
        if best is not None:
            losses = losses[: best[1]]
            step.vector.copy_(best[2])
        outcome = succeeded(losses)
        if checked and losses:
            last = self._validated(task.client) if best is None else best[0]
            outcome = outcome._replace(first=checked[0], last=last)
        return outcome, epoch

    def _validated(self, client: int) -> float:
        """The loss of the model as it is, not of a copy that is the client's own, on its validation examples."""
        assert self.validation is not None
        mine, data = slice(*self.validation.range(client)), self.validation
        x, y, vector = data.x[mine], data.y[mine], self.step.vector
        found = evaluate(self.module, self.layout, vector, x, y, data.prepare, self.work.loss)
        loss = float(found["loss"] or 0.0)
        return loss if math.isfinite(loss) else math.inf

    def _steps(self, step: Step, rows: Tensor) -> list[float]:
        """Step through these rows of the data, batch by batch; the loss of each step."""
        size = self.work.batch_size
        each = step.steps(rows.to(self.data.x.device))
        full = len(rows) // size
        means = each[: full * size].view(full, size).mean(1).tolist()
        return means + ([float(each[full * size :].mean())] if len(rows) % size else [])
