"""The demo: one federation three ways, so that the difference is what an attack does and what a defence undoes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from fedkeel import api
from fedkeel.config import Job
from fedkeel.watch import figure, watching

BASE: dict[str, Any] = {
    "name": "demo",
    "rounds": 30,
    "data": {"source": "digits", "partition": "dirichlet(alpha=0.3)", "clients": 50},
    "model": {"build": "mlp(hidden=(64,))"},
    "train": {"batch_size": 10, "lr": 0.2, "stopping": "epochs(epochs=2)"},
}
HOSTILE = {"rule": "sign_flip(scale=5.0)", "clients": 10}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain mean, no attack": {},
    "plain mean, 10 of 50 hostile": {"attack": HOSTILE},
    "checks + trimmed mean, 10 of 50 hostile": {
        "attack": HOSTILE,
        "aggregate": {
            "checks": ("layout", "version", "claims", "duplicate", "replayed", "finite", "norm_bound(limit=2.0)"),
            "reduce": "trimmed_mean(trim=5)",
        },
    },
}


def run(out: Console, progress: Console, where: Path | None, settings: Sequence[str]) -> None:
    """Run the variants, print one line each and the path of the report."""
    started = time.perf_counter()
    root = where or next(p for p in _roots() if not p.exists())
    lines, runs = [], []
    for number, (label, changes) in enumerate(VARIANTS.items(), 1):
        job = Job(**{**BASE, **changes, "name": f"demo-{number}"}).with_settings(settings)
        with watching(progress, job.rounds, label) as watch:
            done = api.run(job, root / job.name, watch=watch, with_report=False)
        runs.append((label, done.path))
        row = done.final()
        assert row is not None
        refused = [u for u in done.updates if u["stage"] is not None]
        lines.append((label, figure(row), f"{len(refused)} of {len(done.updates)} updates refused"))
    from fedkeel.ship.report import write

    report = write(root / "report.html", runs, title="One federation, three ways")
    out.print()
    for label, accuracy, refused_text in lines:
        out.print(f"{escape(label):<42} accuracy {escape(accuracy)}  {refused_text}")
    out.print(f"\nreport: {escape(str(report))}  ({time.perf_counter() - started:.0f} s)")


def _roots() -> list[Path]:
    return [Path("runs") / ("demo" if n == 1 else f"demo-{n}") for n in range(1, 10_000)]
