"""The command line of exports: `fedkeel export`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from fedkeel.edge.export import Exported

_out = Console(highlight=False, soft_wrap=True)
_err = Console(stderr=True, highlight=False, soft_wrap=True)


def export(
    run: Annotated[Path, typer.Argument(help="The directory of a finished run.")],
    target: Annotated[str, typer.Option("--target", help="onnx, onnx-int8 or onnx-fp16.")] = "onnx",
    out: Annotated[
        Path | None, typer.Option("--out", help="A new directory; RUN/exports/TARGET when left out.")
    ] = None,
    calibration: Annotated[int, typer.Option("--calibration", min=1, help="Examples that show the ranges.")] = 200,
    threads: Annotated[int, typer.Option("--threads", min=1, help="Threads of both runtimes.")] = 1,
    seconds: Annotated[float, typer.Option("--seconds", min=0.05, max=600, help="For each latency.")] = 1.0,
    most_lost: Annotated[
        float, typer.Option("--most-lost", min=0, max=100, help="Points of accuracy that it may lose.")
    ] = 0.5,
    most_changed: Annotated[
        float, typer.Option("--most-changed", min=0, max=100, help="Percent of predictions that it may change.")
    ] = 1.0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON for programs, and nothing else, on stdout.")
    ] = False,
) -> None:
    """Write a run's model for an edge runtime, with its parity and latency beside eager PyTorch.

    Ends with 1 where it loses more than it may.
    """
    from fedkeel.edge.export import Limits
    from fedkeel.edge.export import export as made

    limits = Limits(most_lost / 100, most_changed / 100)
    with _err.status("reading the run") as status:
        found = made(
            run,
            target,
            out,
            calibration=calibration,
            threads=threads,
            seconds=seconds,
            limits=limits,
            watch=lambda text: status.update(f"{target}: {text}"),
        )
    if as_json:
        _out.print_json(json.dumps(found.to_dict()))
    else:
        _show(found)
    if not found.within:
        raise typer.Exit(1)


def _show(found: Exported) -> None:
    plain, table = found.parity, Table("", "eager PyTorch", found.target, "")
    for name, ours, theirs in (
        ("p50", found.eager.p50, found.exported.p50),
        ("p99", found.eager.p99, found.exported.p99),
    ):
        table.add_row(f"latency {name}", f"{ours:.3f} ms", f"{theirs:.3f} ms", f"{1 - theirs / ours:.0%} lower")
    sizes = f"{found.smaller:.2f} times smaller" if found.target != "onnx" else ""
    table.add_row("file", f"{found.plain_bytes / 1e6:.2f} MB (onnx)", f"{found.bytes / 1e6:.2f} MB", sizes)
    if found.memory is not None and found.eager_memory is not None:
        table.add_row("peak memory", f"{found.eager_memory / 1e6:.0f} MB", f"{found.memory / 1e6:.0f} MB", "")
    if plain.accuracy is not None and plain.reference is not None and plain.lost is not None:
        lost = f"{100 * plain.lost:+.2f} points lost"
        table.add_row("accuracy", f"{plain.reference:.4f}", f"{plain.accuracy:.4f}", lost)
        table.add_row("same predictions", "", f"{plain.agreement:.2%}", f"of {plain.examples}")
        worst = max(found.by, key=lambda name: found.by[name].lost or 0.0, default=None)
        if worst is not None:
            part = found.by[worst]
            told = f"{100 * (part.lost or 0.0):+.2f} points lost"
            table.add_row(f"worst: {escape(worst)}", f"{part.reference:.4f}", f"{part.accuracy:.4f}", told)
    table.add_row("outputs differ by", "", f"{plain.mean:.2g} on average", f"{plain.most:.2g} at most")
    _out.print(table)
    for name, why in found.tried.items():
        _out.print(f"  {escape(name)}: {escape(why)}")
    if not found.within:
        _out.print("[red]it loses more than it may[/]: give more --calibration, or another --target")
    if found.lower < 0:
        _out.print("[yellow]it is slower than eager PyTorch here[/]: every faster scheme lost more; try --target onnx")
    threads = "1 thread" if found.threads == 1 else f"{found.threads} threads"
    _out.print(f"batch 1, {threads}; all figures: {escape(str(found.path))}/export.json")
