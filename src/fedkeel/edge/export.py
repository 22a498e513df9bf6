"""Export a run's model: to a target, with a report of what it lost and gained."""

from __future__ import annotations

import copy
import fnmatch
import hashlib
import json
import platform
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedkeel import plugins
from fedkeel.api import Run
from fedkeel.core.errors import InputError, RunError, nearest
from fedkeel.core.keys import Key
from fedkeel.edge import measure
from fedkeel.edge.graph import seal, write_onnx
from fedkeel.edge.measure import Latency, Parity, Session
from fedkeel.edge.schemes import SCHEMES, halve, quantise
from fedkeel.ship import card as cards
from fedkeel.ship import files
from fedkeel.ship.card import ModelCard
from fedkeel.world.federation import Federation

TARGETS = ("onnx", "onnx-int8", "onnx-fp16")
MODEL, REPORT = "model.onnx", "export.json"


@dataclass(frozen=True)
class Limits:
    """What an eight-bit scheme may cost: accuracy lost and predictions changed, as shares."""

    lost: float = 0.005
    changed: float = 0.01


@dataclass(frozen=True)
class Exported:
    """What was written and measured. `within`: the limits; `tried`: every scheme, and why it was taken or not."""

    path: Path
    target: str
    scheme: str
    parity: Parity
    by: dict[str, Parity]
    eager: Latency
    exported: Latency
    bytes: int
    plain_bytes: int
    memory: int | None
    eager_memory: int | None
    threads: int
    weights: str
    card: str
    within: bool
    tried: dict[str, str] = field(default_factory=dict)

    @property
    def lower(self) -> float:
        """How much lower the median latency is than eager PyTorch's, as a share."""
        return 1 - self.exported.p50 / self.eager.p50

    @property
    def smaller(self) -> float:
        """How many times smaller the file is than the plain ONNX one."""
        return self.plain_bytes / self.bytes

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "target": self.target,
            "scheme": self.scheme,
            "model": hashlib.sha256((self.path / MODEL).read_bytes()).hexdigest(),
            "weights": self.weights,
            "card": self.card,
            "within_limits": self.within,
            "parity": self.parity._asdict() | {"lost": self.parity.lost},
            "by": {name: found._asdict() | {"lost": found.lost} for name, found in self.by.items()},
            "latency_ms": {"eager": self.eager._asdict(), "exported": self.exported._asdict(), "lower": self.lower},
            "bytes": {"exported": self.bytes, "plain": self.plain_bytes, "smaller": self.smaller},
            "peak_memory": {"eager": self.eager_memory, "exported": self.memory},
            "batch": 1,
            "threads": self.threads,
            "tried": self.tried,
            "machine": {"cpu": _cpu(), "torch": torch.__version__, "onnxruntime": _version("onnxruntime")},
        }


def export(
    run: Path | str,
    target: str,
    out: Path | str | None = None,
    *,
    calibration: int = 200,
    threads: int = 1,
    seconds: float = 1.0,
    limits: Limits = Limits(),
    watch: Callable[[str], None] = lambda _: None,
) -> Exported:
    """Write `model.onnx` and `export.json` to a new directory, `RUN/exports/TARGET` by default, and measure the model.

    Of eight-bit schemes that keep within `limits` the fastest here is taken; where none does, the one that loses least.
    `calibration`: examples whose ranges are seen; `seconds`: for the latency of each. Raises `InputError`.
    """
    if target not in TARGETS:
        raise InputError(_unknown(target))
    opened = Run(run)
    made, named = cards.read(opened.dir.model)
    plugins.load(opened.job.plugins)
    federation = Federation.of(opened.job)
    if opened.job.model.private:
        raise InputError("clients keep layers of this model, so that there is no whole one to export: name another run")
    module = copy.deepcopy(federation.module).eval()
    module.load_state_dict(
        {name: tensor for name, tensor in named.items() if name in module.state_dict()}, strict=False
    )
    place = Path(out) if out is not None else opened.path / "exports" / target
    if place.exists():
        raise InputError(f"'{place}' exists already: choose another with --out, or delete it")
    partial = place.with_name(f".{place.name}.part")
    shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
    try:
        partial.mkdir(parents=True)
        found = _Work(federation, module, made, partial, threads, seconds, limits, watch).export(target, calibration)
        files.write_text(partial / REPORT, json.dumps(found.to_dict(), indent=1) + "\n")
        for path in partial.iterdir():
            if path.name not in (MODEL, REPORT):
                path.unlink()
        partial.rename(place)
    except OSError as error:
        raise RunError(f"'{place}' could not be written ({error.strerror}): choose another with --out") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return replace(found, path=place)


def read_report(place: Path) -> dict[str, Any]:
    """The report of an export, as `Exported.to_dict` gives it. Raises `InputError` where there is none."""
    path = place / REPORT
    try:
        found: dict[str, Any] = json.loads(path.read_text("utf-8"))
        shares = found["latency_ms"]["lower"], found["parity"]["most"]
        sound = all(isinstance(share, float) for share in shares) and {"model", "weights", "card"} <= found.keys()
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        sound = False
    if not sound:
        raise InputError(f"'{path}' is no report of an export: fedkeel export RUN --target {place.name}")
    return found


@dataclass
class _Work:
    federation: Federation
    module: nn.Module
    card: ModelCard
    place: Path
    threads: int
    seconds: float
    limits: Limits
    watch: Callable[[str], None]

    def export(self, target: str, calibration: int) -> Exported:
        seen, x, y = self._examples(calibration)
        plain = self.place / "plain.onnx"
        self.watch("the graph")
        write_onnx(self.module, x, self.card, plain)
        reference = measure.eager(self.module, x)
        made, tried = {"plain": plain}, dict[str, str]()
        if target == "onnx-fp16":
            made = {"half floats": self.place / "half.onnx"}
            halve(plain, made["half floats"])
        elif target == "onnx-int8":
            made = {}
            for scheme in SCHEMES:
                self.watch(scheme.name)
                path = self.place / f"{len(tried) + len(made)}.onnx"
                try:
                    quantise(plain, path, scheme, seen)
                    made[scheme.name] = path
                except InputError as error:
                    tried[scheme.name] = str(error)
            if not made:
                raise InputError(f"no scheme fits this model: {next(iter(tried.values()))}")
        sessions = {name: Session(path, self.threads) for name, path in made.items()}
        answers = {name: session.answers(x) for name, session in sessions.items()}
        parities = {name: measure.parity(found, reference, y, self._classes) for name, found in answers.items()}
        self.watch("latency")
        took = measure.latencies(self.module, sessions, x, threads=self.threads, seconds=self.seconds)
        name = min(made, key=lambda name: self._rank(parities[name], took[name]))
        for other in made:
            what = "taken" if other == name else "slower here" if self._within(parities[other]) else "loses too much"
            tried[other] = f"{what}: {took[other].p50:.3f} ms, {_told(parities[other])}"
        _sealed(made[name], self.place / MODEL, self.card)
        self.watch("memory")
        return Exported(
            path=self.place,
            target=target,
            scheme=name,
            parity=parities[name],
            by=self._by(answers[name], reference, y, sessions[name]),
            eager=took["eager"],
            exported=took[name],
            bytes=(self.place / MODEL).stat().st_size,
            plain_bytes=plain.stat().st_size,
            memory=measure.peak_memory(self.place / MODEL, x),
            eager_memory=measure.peak_memory(self.module, x),
            threads=self.threads,
            weights=self.card.lineage.fingerprint,
            card=self.card.digest,
            within=self._within(parities[name]),
            tried=tried if target == "onnx-int8" else {},
        )

    @property
    def _classes(self) -> bool:
        return "classes" in self.federation.work.loss.definition.traits

    def _within(self, found: Parity) -> bool:
        if found.lost is None or found.agreement is None:
            return True
        return found.lost <= self.limits.lost and found.agreement >= 1 - self.limits.changed

    def _rank(self, found: Parity, took: Latency) -> tuple[float, ...]:
        """The least is taken: of those within the limits the fastest, of the others the one that loses least."""
        if self._within(found):
            return (0.0, took.p50)
        if found.lost is None or found.agreement is None:
            return (1.0, found.mean)
        return (1.0, found.lost, 1 - found.agreement)

    def _examples(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """(calibration inputs, test inputs, targets), as the model takes them. No example is in both."""
        pool = self.federation.pool
        x, y = pool.test_x, pool.test_y
        if len(self.federation.data.y):
            seen = pool.x
        else:  # a server that has test examples only
            seen, x, y = x[::2], x[1::2], y[1::2]
        order = torch.randperm(len(seen), generator=Key.root(0).fold("calibration").torch())
        return pool.prepare(seen[order[:count]]), pool.prepare(x), y

    def _by(self, ours: Tensor, reference: Tensor, y: Tensor, session: Session) -> dict[str, Parity]:
        """By label of the test set, and by the job's groups of clients where they hold examples back."""
        found = {}
        if self._classes and y.dim() == 1:
            for label, name in enumerate(self.card.labels):
                mine = y == label
                if mine.any():
                    found[f"label/{name}"] = measure.parity(ours[mine], reference[mine], y[mine], True)
        holdout = self.federation.holdout
        for group, pattern in self.federation.job.record.groups.items() if holdout is not None else ():
            assert holdout is not None
            members = [i for i, name in enumerate(self.federation.members) if fnmatch.fnmatch(name, pattern)]
            rows = torch.cat([torch.arange(*holdout.range(i)) for i in members])
            x, y_of = holdout.prepare(holdout.x[rows]), holdout.y[rows]
            theirs = measure.eager(self.module, x)
            found[f"group/{group}"] = measure.parity(session.answers(x), theirs, y_of, self._classes)
        return found


def _sealed(source: Path, target: Path, card: ModelCard) -> None:
    import onnx

    model = onnx.load(str(source))
    seal(model, card)
    onnx.save(model, str(target))


def _told(found: Parity) -> str:
    if found.agreement is None or found.lost is None:
        return f"off by {found.mean:.2g}"
    return f"{found.agreement:.2%} of predictions agree, {100 * found.lost:+.2f} points lost"


def _unknown(target: str) -> str:
    if target == "tensorrt-fp16":
        return "target 'tensorrt-fp16' is not built in yet: export to onnx, and build the engine with trtexec there"
    if target == "executorch":
        return "target 'executorch' is not built in yet: export to onnx"
    return f"target '{target}' is unknown: {nearest(target, TARGETS)}"


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


def _cpu() -> str:
    try:
        lines: Iterable[str] = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
