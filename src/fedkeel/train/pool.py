"""A pool of single-threaded workers, one a core: forked, so that data and programs are theirs without a copy.

Threads would do on large models; on small ones they lose to the interpreter's lock, as a step is a dozen short calls.
"""

from __future__ import annotations

import ctypes
import gc
import math
import mmap
import os
import select
import signal
import struct
import sys
import warnings
import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NoReturn

import torch
from torch import Tensor

from fedkeel.core.errors import RunError
from fedkeel.core.keys import Key
from fedkeel.train.client import Client, Outcome, single_thread, trained
from fedkeel.train.contract import Task, Trained

_TASK = struct.Struct("<qqQd")  # slot, client, key, speed
_RESULT = struct.Struct("<qqdddqq")  # slot, steps, losses (mean, first, last), kind, bytes of text
_DONE, _FAILED = 0, 1
_ARENA_BYTES = 1 << 25  # of rows: small ones are all given out at once
_QUEUED = 64

can_fork = sys.platform == "linux"


def longest_first(client: Client, tasks: Sequence[Task]) -> list[Task]:
    """The order in which the last worker is done soonest: by the number of examples, ties as they came."""
    return sorted(tasks, key=lambda task: -client.data.count(task.client))


RAISED = "the training step raised"


def explain(error: BaseException) -> str:
    """The failure of a client whose step raised: its data or the module, but never the others' loss."""
    return f"{RAISED} {type(error).__name__}: {' '.join(str(error).split()) or 'no message'}"


class InProcess:
    """A `Trainer` in this process, one client after another in one thread."""

    def __init__(self, name: str, client: Client) -> None:
        self.name = name
        self._client = client
        self._delta = torch.empty(client.layout.columns)

    def train(
        self, theta: Tensor, tasks: Sequence[Task], control: Mapping[str, Tensor] | None = None
    ) -> Iterator[Trained]:
        layout, vector = self._client.layout, self._client.step.vector
        for task in longest_first(self._client, tasks):
            try:
                with single_thread():
                    outcome = self._client.train(theta, task, control or {})
            except Exception as error:
                outcome = Outcome(0, math.nan, explain(error))
            with torch.no_grad():
                torch.sub(vector[layout.shared], theta, out=self._delta)
            yield trained(self._client.data.count(task.client), task, outcome, self._delta, _private(self._client))

    def close(self) -> None:
        """Nothing to release."""


def _private(client: Client) -> Tensor | None:
    layout, vector = client.layout, client.step.vector
    if layout.columns == layout.width:
        return None
    return layout.private(vector)


@dataclass
class _Worker:
    pid: int
    results: int  # file descriptor; it ends when the worker does
    pending: bytearray = field(default_factory=bytearray)


class _Arena:
    """Memory that parent and workers share: the global model, the controls, and a ring of slots, a row each."""

    def __init__(self, client: Client, workers: int) -> None:
        layout, rules = client.layout, client.work.corrections
        self.columns, self.width = layout.columns, layout.width
        self.memory = [r.name for r in rules if "memory" in r.definition.traits]
        sizes = {r.name: self.columns for r in rules if "control" in r.definition.traits}
        sizes |= {r.name: r.init().numel() for r in rules if "dial" in r.definition.traits}
        head = self.columns + sum(sizes.values())
        row = self.width + self.columns * len(self.memory)
        slots = max(2 * workers, min(_QUEUED, _ARENA_BYTES // (4 * max(row, 1))))
        # Anonymous: nothing to name, nothing to leak, and no limit of /dev/shm.
        self._map = mmap.mmap(-1, 4 * (head + slots * row))
        whole = torch.frombuffer(self._map, dtype=torch.float32)
        self.theta = whole[: self.columns]
        self.controls = dict(zip(sizes, torch.split(whole[self.columns : head], list(sizes.values())), strict=True))
        self.first = {r.name: r.init() for r in rules if "dial" in r.definition.traits}
        self.rows = whole[head:].view(slots, row)

    def put(self, slot: int, task: Task, initial: Tensor) -> None:
        """Lay a task's vectors into its slot."""
        row = self.rows[slot]
        if self.width > self.columns:
            row[self.columns : self.width] = initial if task.private is None else task.private
        for vector, name in zip(row[self.width :].view(len(self.memory), self.columns), self.memory, strict=True):
            vector.copy_(task.memory[name]) if name in task.memory else vector.zero_()

    def task(self, slot: int, client: int, key: int, speed: float) -> Task:
        row = self.rows[slot]
        memory = dict(zip(self.memory, row[self.width :].view(len(self.memory), self.columns), strict=True))
        return Task(client, Key(key), row[self.columns : self.width], memory, speed)


class Pool:
    """A `Trainer` over forked workers. They start at the first `train`, and again after one that was left early."""

    def __init__(self, name: str, client: Client, workers: int) -> None:
        self.name = name
        self._client, self._count = client, workers
        self._workers: list[_Worker] = []
        self._arena: _Arena | None = None
        self._tasks = -1
        self._finalizer: weakref.finalize[..., Pool] | None = None
        self._initial = client.layout.private(client.initial)

    def train(
        self, theta: Tensor, tasks: Sequence[Task], control: Mapping[str, Tensor] | None = None
    ) -> Iterator[Trained]:
        finished = False
        try:
            # One thread in the parent, too: OpenMP's others spin after every sum, on the cores that the workers need.
            with single_thread():
                yield from self._rounds(theta, tasks, control or {})
            finished = True
        finally:
            if not finished:
                self.close()

    def _rounds(self, theta: Tensor, tasks: Sequence[Task], control: Mapping[str, Tensor]) -> Iterator[Trained]:
        arena = self._arena or self._start()
        arena.theta.copy_(theta)
        for name, vector in arena.controls.items():
            vector.copy_(control.get(name, arena.first.get(name, torch.zeros(()))))
        waiting = deque(longest_first(self._client, tasks))
        free = deque(range(len(arena.rows)))
        running: dict[int, Task] = {}
        while waiting or running:
            orders = b""
            while waiting and free and len(orders) < select.PIPE_BUF - _TASK.size:
                task, slot = waiting.popleft(), free.popleft()
                running[slot] = task
                arena.put(slot, task, self._initial)
                orders += _TASK.pack(slot, task.client, task.key.value, task.speed)
            if orders:  # in one piece: a worker that wakes up takes the core from the one who gives out the rest
                os.write(self._tasks, orders)
            slot, outcome = self._receive(running)
            row = arena.rows[slot]
            private = row[arena.columns : arena.width].clone() if arena.width > arena.columns else None
            task = running.pop(slot)
            yield trained(self._client.data.count(task.client), task, outcome, row[: arena.columns], private)
            free.append(slot)

    def close(self) -> None:
        """End the workers, whatever they are doing: they hold nothing that matters."""
        if self._finalizer is not None:
            self._finalizer()
        self._finalizer, self._arena, self._workers = None, None, []

    def _receive(self, running: Mapping[int, Task]) -> tuple[int, Outcome]:
        """The next finished slot and its outcome."""
        poll = select.poll()
        by_file = {worker.results: worker for worker in self._workers}
        for file in by_file:
            poll.register(file, select.POLLIN)
        while True:
            for worker in self._workers:
                size = _RESULT.size
                if len(worker.pending) < size:
                    continue
                slot, steps, loss, first, last, kind, length = _RESULT.unpack_from(worker.pending)
                if len(worker.pending) < size + length:
                    continue
                text = worker.pending[size : size + length].decode()
                del worker.pending[: size + length]
                return slot, Outcome(steps, loss, text if kind == _FAILED else None, first, last)
            for file, _ in poll.poll():
                received = os.read(file, 1 << 16)
                if not received:
                    self._died(by_file[file], running)
                by_file[file].pending += received

    def _died(self, worker: _Worker, running: Mapping[int, Task]) -> NoReturn:
        clients = ", ".join(str(task.client) for task in running.values())
        try:
            status = os.waitstatus_to_exitcode(os.waitpid(worker.pid, 0)[1])
        except ChildProcessError:
            status = 0
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        hint = " (out of memory?)" if status == -signal.SIGKILL else ""
        raise RunError(f"a training worker {how}{hint} while clients {clients} were in training")

    def _start(self) -> _Arena:
        self._arena = arena = _Arena(self._client, self._count)
        gc.collect()
        _glibc("malloc_trim", 0)  # what recording left behind would count for every worker
        read, self._tasks = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        workers: list[_Worker] = []
        self._workers = workers
        owned = [self._tasks]
        self._finalizer = weakref.finalize(self, _end, workers, owned, os.getpid())
        for _ in range(self._count):
            results, write = os.pipe()
            with warnings.catch_warnings():
                # Other threads (OpenMP's, a progress bar's) do not exist in the child, and it calls nothing of theirs.
                warnings.simplefilter("ignore", DeprecationWarning)
                pid = os.fork()
            if pid == 0:
                _close_all_but(read, write)
                _serve(self._client, arena, read, write)
            os.close(write)
            workers.append(_Worker(pid, results))
        os.close(read)
        return arena


def _end(workers: list[_Worker], owned: list[int], owner: int) -> None:
    if os.getpid() != owner:
        return  # a process forked by somebody else has no say
    for worker in workers:
        try:
            os.kill(worker.pid, signal.SIGKILL)
            os.waitpid(worker.pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass
        os.close(worker.results)
    for file in owned:
        os.close(file)
    workers.clear()
    owned.clear()


def _close_all_but(*kept: int) -> None:
    """Leave the parent's files to the parent: the run's lock, the ledger, the pipes' other ends."""
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2 and int(name) not in kept:
            with suppress(OSError):  # the listing's own
                os.close(int(name))


def _keep_memory() -> None:
    """Let malloc keep what is freed: a step's buffers are asked for again, and fresh pages cost more than its sums."""
    for parameter in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
        _glibc("mallopt", parameter, 1 << 30)


def _glibc(function: str, *args: int) -> None:
    """Call a function that only glibc has."""
    found = getattr(ctypes.CDLL(None), function, None)
    if found is not None:
        found(*args)


def _serve(client: Client, arena: _Arena, read: int, write: int) -> NoReturn:
    """A worker's life: until its parent closes the tasks' pipe, or is gone."""
    status = 1
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt means
        gc.freeze()
        _keep_memory()
        torch.set_num_threads(1)
        layout, vector = client.layout, client.step.vector
        while record := os.read(read, _TASK.size):
            slot, number, key, speed = _TASK.unpack(record)
            kind, text, outcome = _DONE, "", Outcome(0, 0.0, None)
            task = arena.task(slot, number, key, speed)
            try:
                outcome = client.train(arena.theta, task, arena.controls)
                kind, text = (_FAILED, outcome.failure) if outcome.failure else (_DONE, "")
            except Exception as error:
                outcome = Outcome(0, math.nan, explain(error))
                kind, text = _FAILED, explain(error)
            with torch.no_grad():
                row = arena.rows[slot]
                torch.sub(vector[layout.shared], arena.theta, out=row[: arena.columns])
                if arena.width > arena.columns:
                    row[arena.columns : arena.width] = layout.private(vector)
            note = text.encode()[:2000].decode(errors="ignore").encode()
            steps, loss, _, first, last = outcome
            os.write(write, _RESULT.pack(slot, steps, loss, first, last, kind, len(note)) + note)
        status = 0
    finally:
        os._exit(status)
