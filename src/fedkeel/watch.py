"""What a terminal shows while runs go on, and the table after them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

if TYPE_CHECKING:
    from fedkeel.comparison import Comparison
    from fedkeel.probing import Probe
    from fedkeel.world import record

LINES = 10
"""How many lines a run prints where no terminal shows a bar."""


def figure(row: Mapping[str, Any]) -> str:
    """`0.9361 [0.9087, 0.9556]`."""
    if row["value"] is None:
        return "not a number"
    if row["low"] is None:
        return f"{row['value']:.4f}"
    return f"{row['value']:.4f} [{row['low']:.4f}, {row['high']:.4f}]"


def describe(progress: record.Progress) -> str:
    """One run's standing: its newest figures, and who was refused in the last round."""
    parts = []
    for name in ("accuracy", "loss"):
        if name in progress.metrics:
            value = progress.metrics[name]
            parts.append(f"{name} {value[0] if isinstance(value, tuple) else value:.4f}")
    if progress.round:
        parts.append(f"skipped: {progress.skipped}" if progress.skipped else f"{progress.used} used")
        if progress.refused:
            parts.append(f"{progress.refused} refused")
    return ", ".join(parts) or "nothing is known yet"


@contextmanager
def watching(console: Console, rounds: int, label: str) -> Iterator[Callable[[record.Progress], None]]:
    """A bar for one run; plain lines where the output is no terminal."""
    if not console.is_terminal:
        every = max(1, rounds // LINES)

        def line(progress: record.Progress) -> None:
            if progress.round % every == 0 or progress.round == rounds:
                console.print(f"{escape(label)}: round {progress.round}/{rounds}, {escape(describe(progress))}")

        yield line
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[standing]}"), console=console) as bar:
        task = bar.add_task(escape(label), total=rounds, standing="preparing")

        def step(progress: record.Progress) -> None:
            bar.update(task, completed=progress.round, standing=escape(describe(progress)))

        yield step


@contextmanager
def comparing(console: Console, rounds: int) -> Iterator[Callable[[str, int, record.Progress], None]]:
    """A bar, or a line, for every run of a comparison."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    shown = console.is_terminal
    with Progress(*columns, TextColumn("{task.fields[standing]}"), console=console, disable=not shown) as bar:
        tasks: dict[tuple[str, int], Any] = {}

        def step(label: str, seed: int, progress: record.Progress) -> None:
            name = f"{label}, seed {seed}"
            if shown:
                if (label, seed) not in tasks:
                    tasks[label, seed] = bar.add_task(escape(name), total=rounds, standing="")
                bar.update(tasks[label, seed], completed=progress.round, standing=escape(describe(progress)))
            elif progress.round == rounds:
                console.print(f"{escape(name)}: {escape(describe(progress))}")

        yield step


@contextmanager
def reducing(console: Console, label: str) -> Iterator[Callable[[int, int], None]]:
    """A bar over columns."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(escape(label), total=None)
        yield lambda done, columns: bar.update(task, completed=done, total=columns)


@contextmanager
def auditing(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """A bar, or a line at the end, for every part of an audit."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    shown = console.is_terminal
    with Progress(*columns, console=console, disable=not shown) as bar:
        tasks: dict[str, Any] = {}

        def step(part: str, done: int, total: int) -> None:
            if shown:
                if part not in tasks:
                    tasks[part] = bar.add_task(escape(part), total=total)
                bar.update(tasks[part], completed=done, total=total)
            elif done == total:
                console.print(f"{escape(part)}: done")

        yield step


def _interval(mean: float, low: float, high: float) -> tuple[str, str, str]:
    if not math.isfinite(mean):
        return "diverged", "", ""
    return f"{mean:.4f}", f"{low:.4f}", f"{high:.4f}"


def grid(found: Probe) -> Table:
    """Final accuracy of every defence under every attack, by colour of verdict."""
    colours = {"holds": "green", "bends": "yellow", "breaks": "red"}
    shown = Table(title=f"final accuracy in percent, {found.hostile} clients hostile")
    shown.add_column("defence")
    for attack in found.attacks:
        shown.add_column(escape(attack), justify="right")
    for defence in found.defences:
        cells = [found.cell(attack, defence) for attack in found.attacks]
        figures = [f"{100 * c.mean:.1f}" if math.isfinite(c.mean) else "-" for c in cells]
        coloured = [f"[{colours[c.verdict]}]{text}[/]" for c, text in zip(cells, figures, strict=True)]
        shown.add_row(escape(defence), *coloured)
    return shown


def table(found: Comparison) -> Table:
    """Mean and interval of every variant."""
    shown = Table(title=f"final {found.metric}, mean and 95% interval over seeds")
    shown.add_column("variant")
    for column in ("seeds", "mean", "low", "high"):
        shown.add_column(column, justify="right")
    for v in found.variants:
        shown.add_row(escape(v.label), str(len(v.values)), *_interval(v.mean, v.low, v.high))
    return shown
