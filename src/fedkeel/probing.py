"""Probe a federation: its job under every attack, behind every defence, against the clean run of the plain mean."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedkeel import plugins
from fedkeel.comparison import folder, interval, known, run_or_resume, teller
from fedkeel.config import Job
from fedkeel.core.errors import FedkeelError, InputError, InterruptedRunError
from fedkeel.world.composition import hostile_in_cohort
from fedkeel.world.record import Progress

ATTACKS = (
    *("sign_flip", "gaussian", "nan", "alie", "ipm(scale=2.0)", "min_max", "min_sum", "fang", "mimic", "replacement"),
    *("sybil", "free_rider", "inflated_count", "label_flip", "backdoor", "backdoor + replacement", "tailored(tries=3)"),
)
NO_ATTACK, OWN, PLAIN = "no attack", "the job's own", "plain mean"
BENDS = 0.1
"""Accuracy that a defence may lose to an attack and still only bend."""
VERDICTS = "breaks", "bends", "holds"
FOOLED = 0.05, 0.2
"""Success of a trigger up to which a defence holds, and bends."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One defence under one attack: the final accuracy of every seed, their mean and its 95% interval.

    `backdoor` is the mean success of an attack with a trigger, else None. `verdict` compares the mean with the clean
    run of the plain mean, and the success with what may pass: holds, bends or breaks.
    """

    attack: str
    defence: str
    values: tuple[float, ...]
    mean: float
    low: float
    high: float
    backdoor: float | None
    verdict: str


@dataclass(frozen=True, slots=True)
class Probe:
    """What `probe` found, and the files it wrote. `left_out` says why a defence does not fit the job."""

    clean: float
    hostile: int
    attacks: tuple[str, ...]
    defences: dict[str, tuple[str, ...]]
    left_out: dict[str, str]
    cells: tuple[Cell, ...]
    csv: Path
    report: Path

    def cell(self, attack: str, defence: str) -> Cell:
        return next(c for c in self.cells if (c.attack, c.defence) == (attack, defence))

    def worst(self, defence: str) -> Cell:
        """The attack that this defence does worst against: by verdict, then by accuracy."""
        return min((c for c in self.cells if c.defence == defence), key=_standing)

    @property
    def best(self) -> str:
        """The defence whose worst case is the best."""
        return max(self.defences, key=lambda d: _standing(self.worst(d)))

    @property
    def table(self) -> list[dict[str, Any]]:
        """One row a cell."""
        return [
            {
                "attack": c.attack,
                "defence": c.defence,
                "mean": known(c.mean),
                "low": known(c.low),
                "high": known(c.high),
                "backdoor": c.backdoor,
                "verdict": c.verdict,
            }
            for c in self.cells
        ]


def defences(f: int, hostile: int) -> dict[str, tuple[str, ...]]:
    """The defences that are tried, by name: settings of [aggregate] that allow for f hostile rows a round, of
    `hostile` hostile clients."""
    return {
        PLAIN: (),
        "median": ("aggregate.reduce=median",),
        "trimmed mean": (f"aggregate.reduce=trimmed_mean(trim={f})",),
        "geometric median": ("aggregate.reduce=geometric_median",),
        "centered clipping": ("aggregate.reduce=centered_clip",),
        "multi-Krum": (f"aggregate.weigh=multi_krum(f={f})",),
        "Bulyan": (f"aggregate.reduce=bulyan(f={f})",),
        "CAF": (f"aggregate.reduce=caf(f={f})",),
        "mixing and trimmed mean": (f"aggregate.mix=nnm(f={f})", f"aggregate.reduce=trimmed_mean(trim={f})"),
        "norm and cosine screens": ("aggregate.screens=norm_mad,cosine",),
        "norm screen and DnC": (f"aggregate.screens=norm_mad,dnc(f={f})",),
        "FLAME": ("aggregate.screens=flame", "aggregate.mix=norm_cap()"),
        "FLTrust": ("aggregate.weigh=fltrust", "aggregate.mix=equal_norms"),
        "trust": ("aggregate.screens=norm_mad", "aggregate.weigh=trust", "aggregate.mix=norm_cap"),
        "auto": ("aggregate.reduce=auto", f"aggregate.hostile={hostile}"),
    }


def probe(
    job: Job,
    *,
    hostile: int,
    attacks: Sequence[str] = ATTACKS,
    seeds: int = 1,
    tolerance: float = 0.02,
    out: Path | str | None = None,
    watch: Callable[[str, int, Progress], None] | None = None,
) -> Probe:
    """Run the job with `hostile` clients under every attack and behind every defence, the job's own among them.

    A defence holds while its mean final accuracy is at most `tolerance` below the clean run of the plain mean, bends
    down to `BENDS` below, and breaks beyond. Finished runs under `out` are kept, so a probe can be stopped and called
    again. Writes `probe.csv` and `report.html`. Raises `InputError` before the first run for what can not be tried.
    """
    from fedkeel.ship.report import write_probe
    from fedkeel.world.federation import build_plan

    if not 0 < hostile < job.data.clients:
        raise InputError(f"hostile = {hostile}: write 1 to {job.data.clients - 1}, fewer than data.clients")
    if seeds < 1:
        raise InputError(f"seeds = {seeds}: at least one is needed")
    if not attacks or len(set(attacks)) < len(attacks):
        raise InputError("the attacks must be one or more, each named once")
    plugins.load(job.plugins)
    base = job.with_settings([f"record.evaluate_every={job.rounds}", "attack.clients=0", "attack.rule=none"])
    for attack in attacks:
        _ = base.with_settings([f"attack.rule={attack}", f"attack.clients={hostile}"]).attacks
    bare = ["aggregate.screens=", "aggregate.weigh=examples", "aggregate.mix=", "aggregate.reduce=mean"]
    f = hostile_in_cohort(hostile, job.data.clients, base.cohort, base.rounds)
    jobs: dict[str, Job] = {}
    left_out: dict[str, str] = {}
    for name, settings in {OWN: None, **defences(f, hostile)}.items():
        variant = base if settings is None else base.with_settings([*bare, *settings])
        try:
            build_plan(variant).check_referee(variant.server.examples > 0)
        except InputError as error:
            if name == OWN:
                raise
            left_out[name] = str(error)
        else:
            if variant not in jobs.values() or name == PLAIN:
                jobs[name] = variant
    if jobs[OWN] == jobs[PLAIN]:
        del jobs[OWN]
    root = Path(out) if out else Path("runs") / f"{job.name}-probe"
    cells = list(_cells(jobs, (NO_ATTACK, *attacks), hostile, seeds, root, watch))
    clean = next(c.mean for c in cells if (c.attack, c.defence) == (NO_ATTACK, PLAIN))
    if not math.isfinite(clean):
        raise InputError("the clean run of the plain mean has no accuracy to compare with: give it labels to predict")
    judged = tuple(replace(c, verdict=_verdict(c, clean, tolerance)) for c in cells)
    recipes = {name: tuple(_recipe(variant)) for name, variant in jobs.items()}
    found = Probe(
        clean, hostile, (NO_ATTACK, *attacks), recipes, left_out, judged, root / "probe.csv", root / "report.html"
    )
    _write_table(found)
    write_probe(found.report, found, seeds=seeds, tolerance=tolerance, settings=job.to_toml())
    return found


def _write_table(found: Probe) -> None:
    with found.csv.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(found.table[0]))
        writer.writeheader()
        writer.writerows(found.table)


def _cells(
    jobs: dict[str, Job],
    attacks: Sequence[str],
    hostile: int,
    seeds: int,
    root: Path,
    watch: Callable[[str, int, Progress], None] | None,
) -> Iterator[Cell]:
    for attack in attacks:
        for defence, job in jobs.items():
            under = [] if attack == NO_ATTACK else [f"attack.rule={attack}", f"attack.clients={hostile}"]
            values = []
            for seed in range(job.seed, job.seed + seeds):
                place = root / folder({"attack": attack}) / folder({"defence": defence}) / f"seed-{seed}"
                one = job.with_settings([*under, f"seed={seed}"])
                values.append(_final(one, place, teller(watch, f"{defence} under {attack}", seed)))
            accuracies, successes = [v for v, _ in values], [s for _, s in values if s is not None]
            mean, low, high = interval(accuracies, 0.0, 1.0) if seeds > 1 else (accuracies[0],) * 3
            success = sum(successes) / len(successes) if successes else None
            yield Cell(attack, defence, tuple(accuracies), mean, low, high, success, "")


def _final(job: Job, place: Path, watch: Callable[[Progress], None]) -> tuple[float, float | None]:
    """The final accuracy, NaN where the attack ended the run or the model is not finite, and a trigger's success."""
    try:
        done = run_or_resume(job, place, watch)
    except (InputError, InterruptedRunError):
        raise
    except FedkeelError:
        return math.nan, None
    accuracy, success = done.final(), done.final("backdoor")
    found = math.nan if accuracy is None or accuracy["value"] is None else float(accuracy["value"])
    return found, None if success is None else success["value"]


def _standing(cell: Cell) -> tuple[int, float]:
    """What is worse comes first."""
    return VERDICTS.index(cell.verdict), cell.mean if math.isfinite(cell.mean) else -math.inf


def _verdict(cell: Cell, clean: float, tolerance: float) -> str:
    mean = cell.mean if math.isfinite(cell.mean) else -math.inf
    success = cell.backdoor or 0.0
    if mean >= clean - tolerance and success <= FOOLED[0]:
        return "holds"
    return "bends" if mean >= clean - BENDS and success <= FOOLED[1] else "breaks"


def _recipe(job: Job) -> Iterator[str]:
    """The [aggregate] section of a job, as lines of its file."""
    section = job.aggregate
    for key in ("screens", "weigh", "mix"):
        if value := getattr(section, key):
            yield f"{key} = {list(value)}".replace("'", '"')
    yield f'reduce = "{section.reduce}"'
