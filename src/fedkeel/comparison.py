"""Compare variants of a job: every combination of values, over seeds, with intervals."""

from __future__ import annotations

import csv
import hashlib
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedkeel import plugins
from fedkeel.api import Run, resume, run
from fedkeel.baselines import baselines
from fedkeel.config import Job
from fedkeel.core.errors import InputError
from fedkeel.world.record import Progress, Watcher


@dataclass(frozen=True, slots=True)
class Variant:
    """One combination over its seeds: the final value of each run, their mean and its 95% interval (Student's t).

    `curve` holds (round, mean, low, high). With one seed the interval is the one the run reports of its test set.
    """

    label: str
    settings: Mapping[str, str]
    values: tuple[float, ...]
    mean: float
    low: float
    high: float
    curve: tuple[tuple[int, float, float, float], ...]
    runs: tuple[Path, ...]


@dataclass(frozen=True, slots=True)
class Comparison:
    """What `compare` found, and the files it wrote."""

    metric: str
    variants: tuple[Variant, ...]
    csv: Path
    report: Path

    @property
    def table(self) -> list[dict[str, Any]]:
        """One row a variant: its label, seeds, mean, interval and every seed's value."""
        return [
            {
                "variant": v.label,
                "seeds": len(v.values),
                "mean": known(v.mean),
                "low": known(v.low),
                "high": known(v.high),
                "values": [known(x) for x in v.values],
            }
            for v in self.variants
        ]


def compare(
    job: Job,
    vary: Mapping[str, Sequence[str]],
    *,
    seeds: int = 3,
    out: Path | str | None = None,
    metric: str = "accuracy",
    with_baselines: bool = True,
    watch: Callable[[str, int, Progress], None] | None = None,
) -> Comparison:
    """Run every combination of `vary` (key -> values, as `--vary` takes them) over `seeds` seeds: job.seed, +1, ...

    Beside them run the baselines: plain FedAvg, each client by itself, all examples in one place. Where clients
    hold examples back (data.holdout) what is compared is the mean over clients of each one's own model on its own.
    Finished runs under `out` are kept and interrupted ones resumed, so a comparison can be stopped and called again.
    All combinations are checked before the first is run. Writes `comparison.csv` and `report.html` into `out`.
    """
    from fedkeel.ship.report import write_comparison

    if seeds < 1:
        raise InputError(f"seeds = {seeds}: at least one is needed")
    if metric not in ("accuracy", "loss"):
        raise InputError(f"metric '{metric}' is unknown: write accuracy or loss")
    for key, values in vary.items():
        if key == "seed":
            raise InputError("--vary seed is not needed: every variant runs over the seeds; set their number")
        if not values or len(set(values)) < len(values):
            raise InputError(f"--vary {key} must name different values, as {key}=a,b")
    root = Path(out) if out else Path("runs") / f"{job.name}-compare"
    combinations = [dict(zip(vary, values, strict=True)) for values in itertools.product(*vary.values())]
    planned: list[Planned] = [
        (", ".join(c.values()) or job.name, folder(c), c, _jobs(job, c, seeds)) for c in combinations
    ]
    if len({bool(jobs[0].data.holdout) for *_, jobs in planned}) > 1:
        raise InputError("--vary data.holdout from or to 0 compares different figures: set it for all variants")
    if with_baselines:
        planned += _baselines(planned, seeds)
    found = []
    for label, where, settings, jobs in planned:
        done = []
        for one in jobs:
            place = root / where / f"seed-{one.seed}"
            tell = teller(watch, label, one.seed)
            done.append(run_or_resume(one, place, tell))
        found.append(_summary(label, settings, done, metric))
    table = root / "comparison.csv"
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["variant", *vary, "seeds", "mean", "low", "high", "values"])
        for v in found:
            values = " ".join(f"{x:.6g}" for x in v.values)
            writer.writerow(
                [v.label, *(v.settings.get(key, "") for key in vary), len(v.values), v.mean, v.low, v.high, values]
            )
    rows = [
        {"label": v.label, "seeds": len(v.values), "mean": v.mean, "low": v.low, "high": v.high, "curves": v.curve}
        for v in found
    ]
    page = write_comparison(root / "report.html", rows, metric=metric, settings=job.to_toml())
    return Comparison(metric, tuple(found), table, page)


Planned = tuple[str, str, Mapping[str, str], list[Job]]


def _baselines(variants: Sequence[Planned], seeds: int) -> list[Planned]:
    """The baselines of the variants: one of each, or where what they keep of the job is varied, one for each value."""

    def essence(job: Job) -> Job:
        return job.model_copy(update={"name": "", "record": Job().record})

    known_jobs = [essence(jobs[0]) for *_, jobs in variants]
    found: dict[str, list[tuple[str, Job]]] = {}
    for label, _, _, jobs in variants:
        for name, plain in baselines(jobs[0]).items():
            if essence(plain) not in known_jobs:
                known_jobs.append(essence(plain))
                found.setdefault(name, []).append((label, plain))
    several = {name for name, jobs in found.items() if len(jobs) > 1}
    return [
        (
            f"{name} ({label})" if name in several else name,
            f"baseline-{name}" + (f"-{folder({'of': label})}" if name in several else ""),
            {},
            _jobs(plain, {}, seeds),
        )
        for name, jobs in found.items()
        for label, plain in jobs
    ]


def known(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None


def _jobs(job: Job, settings: Mapping[str, str], seeds: int) -> list[Job]:
    """The job with these settings at every seed, checked as far as it can be without its data."""
    from fedkeel.world.federation import build_plan, build_work

    plugins.load(job.plugins)
    varied = job.with_settings(f"{key}={value}" for key, value in settings.items())
    build_plan(varied)
    build_work(varied)
    for key, kind in (("data.source", "source"), ("data.partition", "partition"), ("model.build", "model")):
        varied.rule(key, kind)
    _ = varied.attacks
    return [varied.with_settings([f"seed={job.seed + s}"]) for s in range(seeds)]


def run_or_resume(job: Job, place: Path, watch: Watcher) -> Run:
    if not (place / "job.toml").is_file():
        return run(job, place, watch=watch, with_report=False)
    kept = Run(place).job
    if kept.model_copy(update={"plugins": ()}) != job.model_copy(update={"plugins": ()}):
        raise InputError(f"'{place}' holds a run of another job: choose another --out, or delete it")
    if plugins.read(kept.plugins) != plugins.read(job.plugins):
        raise InputError(f"'{place}' was run with other plugins: choose another --out, or delete it")
    return resume(place, watch=watch, with_report=False)


def _summary(label: str, settings: Mapping[str, str], runs: Sequence[Run], metric: str) -> Variant:
    scope = "clients" if runs[0].job.data.holdout else "global"
    by_round: dict[int, list[float]] = {}
    alone: dict[int, tuple[float, float, float]] = {}
    for one in runs:
        for row in one.metrics:
            if row["name"] == metric and row["scope"] == scope:
                value = math.nan if row["value"] is None else row["value"]  # a seed that diverged stays in sight
                by_round.setdefault(row["round"], []).append(value)
                low, high = (value if row[k] is None else row[k] for k in ("low", "high"))
                alone[row["round"]] = (value, low, high)
    if not by_round:
        raise InputError(
            f"metric '{metric}' is not in the runs: they measure loss, and accuracy where there are labels"
        )
    bounds = (0.0, 1.0) if metric == "accuracy" else (-math.inf, math.inf)
    spread = {
        r: interval(v, *bounds) if len(runs) > 1 else alone[r]
        for r, v in sorted(by_round.items())
        if len(v) == len(runs)
    }
    last = max(spread)
    curve = tuple((r, *spread[r]) for r in spread)
    paths = tuple(one.path for one in runs)
    return Variant(label, dict(settings), tuple(by_round[last]), *spread[last], curve, paths)


def interval(values: Sequence[float], least: float, most: float) -> tuple[float, float, float]:
    """Mean and its 95% interval over seeds (Student's t), kept where the metric can be."""
    from scipy.stats import t

    n = len(values)
    mean = sum(values) / n
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    half = float(t.ppf(0.975, n - 1)) * deviation / math.sqrt(n)
    return (mean, max(least, mean - half), min(most, mean + half)) if math.isfinite(mean) else (mean, mean, mean)


def folder(settings: Mapping[str, str]) -> str:
    """A readable directory name, with a digest so that two variants never share one."""
    text = "_".join(settings.values()) or "job"
    readable = "".join(c if c.isalnum() or c in "._-=" else "-" for c in text).strip("-.")[:80]
    return f"{readable}-{hashlib.sha256(repr(sorted(settings.items())).encode()).hexdigest()[:6]}"


def teller(watch: Callable[[str, int, Progress], None] | None, label: str, seed: int) -> Watcher:
    def tell(progress: Progress) -> None:
        if watch is not None:
            watch(label, seed, progress)

    return tell
