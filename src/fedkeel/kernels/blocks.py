"""Columns in blocks that stay in cache, and one single-threaded worker a core to take them.

Two threads inside every torch call wait for each other at each one, and collapse when anything else runs; workers that
meet once, at the end, do not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
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
    if workers <= 1:
        work(parts)
        return
    with _workers(workers) as pool:
        for future in [pool.submit(work, parts) for _ in range(workers)]:
            future.result()


def partials(columns: int, size: int, work: Callable[[slice], T]) -> list[T]:
    """`work` on consecutive ranges of columns, at least `size` each, results in order.

    The ranges depend on `columns` and `size` alone, so a sum of the results does not depend on the number of workers.
    """
    parts = list(spans(slice(0, columns), max(-(-columns // _PARTS), size, 1))) or [slice(0, 0)]
    workers = min(torch.get_num_threads(), len(parts))
    if workers <= 1:
        return [work(part) for part in parts]
    with _workers(workers) as pool:
        return list(pool.map(work, parts))


@contextmanager
def _workers(count: int) -> Iterator[ThreadPoolExecutor]:
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)  # the workers' setting is also what threads started later would begin with
