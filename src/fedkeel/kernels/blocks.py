"""Columns in blocks that stay in cache, and one single-threaded worker a core to take them.

Two threads inside every torch call wait for each other at each one, and collapse when anything else runs; workers that
meet once, at the end, do not.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

import torch

T = TypeVar("T")
_PARTS = 8


def spans(columns: slice, size: int) -> Iterator[slice]:
    """Slices of `size` columns, in order; the last may be shorter."""
    return (slice(start, min(start + size, columns.stop)) for start in range(columns.start, columns.stop, size))


def share(columns: int, size: int, work: Callable[[Iterator[slice]], None]) -> None:
    """Every worker takes spans of `size` columns from the one iterator until none is left.

    For work that writes its own columns only: the result does not depend on who took which span.
    """
    parts = iter(list(spans(slice(0, columns), size)))
    workers = min(torch.get_num_threads(), -(-columns // size))
    _together([lambda: work(parts)] * max(workers, 1))


def partials(columns: int, size: int, work: Callable[[slice], T]) -> list[T]:
    """`work` on consecutive ranges of columns, at least `size` each, results in order.

    The ranges depend on `columns` and `size` alone, so a sum of the results does not depend on the number of workers.
    """
    parts = list(spans(slice(0, columns), max(-(-columns // _PARTS), size, 1))) or [slice(0, 0)]
    if torch.get_num_threads() == 1 or len(parts) == 1:
        return [work(part) for part in parts]
    results: dict[int, T] = {}
    left = iter(range(len(parts)))

    def take() -> None:
        for i in left:
            results[i] = work(parts[i])

    _together([take] * min(torch.get_num_threads(), len(parts)))
    return [results[i] for i in range(len(parts))]


def _together(jobs: Sequence[Callable[[], None]]) -> None:
    """Run them side by side, the last in this thread; each with one intra-op thread."""
    if len(jobs) == 1:
        jobs[0]()
        return
    threads = torch.get_num_threads()

    def alone(job: Callable[[], None]) -> None:
        torch.set_num_threads(1)
        job()

    futures: list[Future[None]] = []
    try:
        try:
            pool = _pool(len(jobs) - 1)
            for job in jobs[:-1]:
                try:
                    futures.append(pool.submit(alone, job))
                except RuntimeError:  # at the interpreter's exit no thread starts any more
                    break
            alone(jobs[-1])
        finally:
            _wait_for(futures)
        for job in jobs[len(futures) : -1]:
            alone(job)
        for future in futures:
            future.result()
    finally:
        torch.set_num_threads(threads)


def _wait_for(futures: Sequence[Future[None]]) -> None:
    """Until all are done, Ctrl-C or not: they work on memory that is let go of after this."""
    interrupt: KeyboardInterrupt | None = None
    while not all(future.done() for future in futures):
        try:
            wait(futures)
        except KeyboardInterrupt as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt


_kept: list[tuple[int, ThreadPoolExecutor]] = []  # the pool and its size; kept, as a new thread begins on a busy core


def _pool(size: int) -> ThreadPoolExecutor:
    if not _kept or _kept[0][0] < size:
        _kept[:] = [(size, ThreadPoolExecutor(size, thread_name_prefix="fedkeel"))]
    return _kept[0][1]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_kept.clear)  # its threads stay behind
