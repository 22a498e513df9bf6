"""Many runs, one a line of a results file: a benchmark that is stopped goes on where it was."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

Cell = dict[str, object]

_parent = 0


def _begin(parent: int) -> None:
    global _parent
    _parent = parent
    torch.set_num_threads(1)


def _measured(measure: Callable[[Cell], Cell], cell: Cell) -> Cell:
    if os.getppid() != _parent:
        os._exit(1)  # the command was killed: its workers must not go on
    return measure(cell)


def run(
    about: str | None,
    cells: Iterable[Cell],
    names: Sequence[str],
    measure: Callable[[Cell], Cell],
    results: Path,
    line: Callable[[Cell], str],
) -> None:
    """Measure every cell that `results` does not hold yet, by its values under `names`; options from the command line.

    `measure` adds figures to a cell, in a process with one thread; `line` is what is shown of it.
    """
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--most", type=int, default=10**6, help="runs to do now")
    given = parser.parse_args()
    results.parent.mkdir(exist_ok=True)
    done = {_key(row, names) for row in read(results) if not row.get("before")}
    wanted = {_key(cell, names): cell for cell in cells}
    left = [cell for key, cell in wanted.items() if key not in done][: given.most]
    started = time.perf_counter()
    with (
        ProcessPoolExecutor(
            given.workers, multiprocessing.get_context("spawn"), initializer=_begin, initargs=(os.getpid(),)
        ) as pool,
        results.open("a") as out,
    ):
        for number, row in enumerate(pool.map(_measured, [measure] * len(left), left), 1):
            print(json.dumps(row), file=out, flush=True)
            print(f"{number}/{len(left)} {time.perf_counter() - started:.0f} s: {line(row)}", flush=True)


def by_method(about: str | None, cells: Iterable[Cell], measure: Callable[[Cell], Cell], results: Path) -> None:
    """`run` for cells of a seed, a partition and a method, whose figure is an accuracy."""

    def line(row: Cell) -> str:
        return f"{row['partition']}, {row['method']}, seed {row['seed']}: {row['accuracy']} ({row['seconds']} s)"

    run(about, cells, ("seed", "partition", "method"), measure, results, line)


def read(results: Path) -> list[Cell]:
    """The rows that were measured. Those with "before" are of a version that has changed since: they are run again."""
    return [json.loads(text) for text in results.read_text().splitlines()] if results.exists() else []


def newest(rows: Iterable[Cell]) -> list[Cell]:
    """One row a seed: that of the version before only where there is no other."""
    found: dict[object, Cell] = {}
    for row in rows:
        if row["seed"] not in found or not row.get("before"):
            found[row["seed"]] = row
    return list(found.values())


def _key(cell: Cell, names: Sequence[str]) -> tuple[object, ...]:
    return tuple(cell[name] for name in names)
