"""Which backend trains: by name, or the first of those that fit the module."""

from __future__ import annotations

import os
from dataclasses import replace

import torch
from torch import Tensor, nn

from fedkeel.core.errors import InputError, RunError, nearest
from fedkeel.core.keys import Key
from fedkeel.core.layout import Layout
from fedkeel.core.registry import build
from fedkeel.core.types import ExampleNoise
from fedkeel.train.client import Client, Step, single_thread
from fedkeel.train.contract import ClientData, LocalWork, Task, Trainer
from fedkeel.train.each import NativeGradients
from fedkeel.train.ghost import RecordedGradients
from fedkeel.train.loop import LoopStep
from fedkeel.train.native import NativeStep
from fedkeel.train.pool import RAISED, InProcess, Pool, can_fork
from fedkeel.train.private import SHAVED, OneByOne, PrivateClient, PrivateStep, check_module
from fedkeel.train.rows import Rows
from fedkeel.train.traced import TracedStep

backends = ("auto", "loop", "rows", "traced", "native")

LANES = {"cpu": 4, "cuda": 16}  # clients side by side in the rows backend
_RECORDED_EARLY = 64  # batch sizes: so many are recorded once for all workers, the others by each when it meets them
MOST_WORKERS = 64
_LARGE_CONVOLUTION, _ENOUGH_EXAMPLES = 1 << 14, 64  # weights; in a batch
_TRIAL_NORM = 0.1  # so low that gradients are scaled down
_TOLERANCE = 1e-3  # relative, of three steps' delta: far above rounding, far below what a wrong step differs by


@single_thread()  # recording and trials, like training
def make_trainer(
    backend: str,
    module: nn.Module,
    layout: Layout,
    data: ClientData,
    work: LocalWork,
    *,
    device: str | torch.device = "cpu",
    workers: int | None = None,
    validation: ClientData | None = None,
) -> Trainer:
    """The trainer behind a name: `loop`, `traced`, `native`, `rows`, or `auto` for the one expected to be fastest.

    A trainer's `name` says which it is. `workers` (default: one a core) are processes on the CPU, each with one
    thread; a client's result does not depend on how many there are. `validation` holds examples of the same clients
    that no step sees, for losses before and after. The module is copied, and never changed. Raises `InputError` for an
    unknown name, or a module that the named backend cannot train exactly.
    """
    if backend not in backends:
        raise InputError(f"backend '{backend}' is unknown: {nearest(backend, backends)}")
    if workers is not None and workers < 1:
        raise InputError(f"workers = {workers} is not valid: write 1 or more")
    device = torch.device(device)
    data = replace(data, x=data.x.to(device), y=data.y.to(device))
    if work.example_noise is not None:
        check_module(module, data)
    # A larger batch is the same batch, and would only cost memory where batches are padded.
    work = replace(work, batch_size=min(work.batch_size, int(data.offsets.diff().max())))
    if validation is not None:
        validation = replace(validation, x=validation.x.to(device), y=validation.y.to(device))
    if backend == "auto":
        backend = _chosen(module, layout, data, work, alone=validation is not None)
    elif backend == "rows" and validation is not None:
        raise InputError("backend 'rows' trains clients side by side, and validates none: write 'auto' or 'traced'")
    elif reason := fits(backend, module, layout, data, work):
        raise InputError(f"backend '{backend}' does not fit this model: {reason}; write 'auto' or 'loop'")
    if backend == "rows":
        return Rows(module, layout, data, work, LANES[device.type])
    try:
        client = _client(backend, module, layout, data, work, validation)
    except (RuntimeError, ValueError) as error:  # a last batch of one before a batch norm, say
        said = " ".join(str(error).split())[:200]
        raise InputError(
            f"train.batch_size = {work.batch_size}: a client's last batch can not be stepped through ({said}): choose "
            "another size, or data.min_examples"
        ) from error
    count = len(os.sched_getaffinity(0)) if workers is None and can_fork else workers or 1
    count = min(count, len(data), MOST_WORKERS)
    # With a GPU in the machine autograd keeps threads of its own, and refuses to work in a fork: the loop stays here.
    pooled = can_fork and count > 1 and device.type == "cpu" and not (backend == "loop" and torch.cuda.is_available())
    return Pool(backend, client, count) if pooled else InProcess(backend, client)


@single_thread()
def fits(backend: str, module: nn.Module, layout: Layout, data: ClientData, work: LocalWork) -> str | None:
    """Why a backend cannot train this module as the plain loop does, or None if it can: found by trying."""
    if backend == "loop":
        return None
    data, work, tasks = _sample(data, work)
    first = layout.flatten(module)
    by_sgd = replace(work, optimiser=build("optimiser", "sgd"))
    try:
        found = _moved(_plain(backend, module, layout, data, by_sgd), layout, first, tasks)
        if not work.plain:  # whose own steps its laws are about: they may make much of a gradient's rounding
            _moved(_plain(backend, module, layout, data, work), layout, first, tasks)
    except Exception as error:
        return " ".join(str(error).split()).partition(". ")[0][:300] or type(error).__name__
    for client, expected in _moved(_plain("loop", module, layout, data, by_sgd), layout, first, tasks).items():
        difference, size = float((found[client] - expected).norm()), float(expected.norm())
        if not difference <= _TOLERANCE * size + 1e-12:
            return "its step differs from the plain loop's: it mixes a batch's examples, or keeps a state of its own"
    return None


def _moved(trial: Trainer, layout: Layout, first: Tensor, tasks: list[Task]) -> dict[int, Tensor]:
    """How far each client's columns moved from `first` (W,), the shared ones before the private ones."""
    shared, found = layout.shared, {}
    for t in trial.train(first[shared], tasks):
        if t.failure and t.failure.startswith(RAISED):
            raise RunError(t.failure)
        private = torch.zeros(0) if t.private is None else t.private - layout.private(first)
        found[t.client] = torch.cat([t.delta.cpu(), private.cpu()])
    return found


def _sample(data: ClientData, work: LocalWork) -> tuple[ClientData, LocalWork, list[Task]]:
    """Three steps for two small clients, with a partial batch if any client has one."""
    size = work.batch_size
    partial = any(data.count(client) % size for client in range(len(data)))
    counts = (size + (size + 1) // 2, (size + 2) // 3) if partial and size > 1 else (2 * size, size)
    rows = torch.arange(sum(counts), device=data.x.device) * 7919 % len(data.x)
    offsets = torch.tensor([0, counts[0], sum(counts)])
    three = build("stopping", "steps", steps=3)
    few = replace(work, stopping=three, private_first=three if work.private_first else None)
    if work.example_noise is not None:  # the same draws for both, norms that count, no noise to hide what differs
        few = replace(few, lr=1.0, example_noise=ExampleNoise(_TRIAL_NORM, 0.0, reproducible=True))
    tasks = [Task(client, Key.root(client)) for client in range(2)]
    x, y = (t.nan_to_num() if t.is_floating_point() else t for t in (data.x[rows], data.y[rows]))
    return ClientData(x, y, offsets, data.prepare), few, tasks


def _plain(
    backend: str, module: nn.Module, layout: Layout, data: ClientData, work: LocalWork, lanes: int = 2
) -> Trainer:
    """A trainer in this process, for trials."""
    if backend == "rows":
        return Rows(module, layout, data, work, lanes)
    return InProcess(backend, _client(backend, module, layout, data, work))


def _client(
    backend: str,
    module: nn.Module,
    layout: Layout,
    data: ClientData,
    work: LocalWork,
    validation: ClientData | None = None,
) -> Client:
    if work.example_noise is not None:
        noised = _noised_step(backend, module, layout, data, work, work.example_noise)
        return PrivateClient(module, layout, data, work, noised, None, validation)
    if work.private_first is None:
        return Client(module, layout, data, work, _step(backend, module, layout, data, work), None, validation)
    private, shared = slice(0, layout.shared.start), slice(layout.shared.start, layout.trainable.stop)
    step = _step(backend, module, layout, data, work, None, shared)
    before = _step(backend, module, layout, data, work, step.vector, private)
    return Client(module, layout, data, work, step, before, validation)


def _noised_step(
    backend: str, module: nn.Module, layout: Layout, data: ClientData, work: LocalWork, given: ExampleNoise
) -> PrivateStep:
    loop = LoopStep(module, layout, data, work)
    norm = given.norm * SHAVED
    if backend == "loop":
        return PrivateStep(loop, OneByOne(loop, norm), given)
    kind = NativeGradients if backend == "native" else RecordedGradients
    return PrivateStep(loop, kind(module, layout, data, work, loop.vector, norm), given)


def _step(
    backend: str,
    module: nn.Module,
    layout: Layout,
    data: ClientData,
    work: LocalWork,
    vector: Tensor | None = None,
    part: slice | None = None,
) -> Step:
    if backend == "loop":
        return LoopStep(module, layout, data, work, vector, part)
    size = work.batch_size
    counts = [data.count(client) for client in range(len(data))]
    sizes = {size for n in counts if n >= size} | {n % size for n in counts if n % size}
    early = len(sizes) <= _RECORDED_EARLY or torch.cuda.is_available()
    kind = NativeStep if backend == "native" else TracedStep
    return kind(module, layout, data, work, sizes if early else {size}, vector, part)


def _chosen(module: nn.Module, layout: Layout, data: ClientData, work: LocalWork, *, alone: bool) -> str:
    """The first that fits, in the order of what they took when measured (docs/benchmarks.md); the loop always fits.

    Nothing is timed here: the same job is trained by the same backend, whatever else the machine is doing.
    """
    order = ["native", "traced", "rows"] if data.x.device.type == "cpu" else ["rows", "traced"]
    if alone:  # each client is looked at between its epochs
        order.remove("rows")
    # A compiled convolution has the batch in its vectors, and sums again over large weights for every 64 examples.
    large = any(isinstance(part, nn.Conv2d) and part.weight.numel() > _LARGE_CONVOLUTION for part in module.modules())
    if large and work.batch_size < _ENOUGH_EXAMPLES and "native" in order:
        order.remove("native")
    return next((backend for backend in order if fits(backend, module, layout, data, work) is None), "loop")
