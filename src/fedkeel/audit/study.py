"""The audit of a finished run: its parts, one after another, each kept in a file so that it is done once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedkeel import plugins
from fedkeel.api import Run
from fedkeel.audit import canaries, inverting, mechanism, membership
from fedkeel.core.errors import InputError, InterruptedRunError, RunError, nearest
from fedkeel.core.keys import Key
from fedkeel.core.types import ServerState
from fedkeel.ship import files
from fedkeel.world.federation import Federation
from fedkeel.world.starting import first_model

PARTS = ("inversion", "membership", "canaries")
REFUTES = 0.99
"""Confidence of each bound that may refute what a run accounts for."""
GAUSSIAN = "one canary, many trials, Gaussian noise"
_MATRIX = 2**26  # numbers in the matrix of one run's canaries
_FORMAT = 1

Watch = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Settings:
    """What an audit does.

    `sizes` of the batches that are inverted, `iterations` of each attack; `shadows` federations and at most so many
    `members`; `trials` with and without a canary, `canaries` in one run, both at `delta`, the job's where it is None.
    """

    seed: int = 0
    sizes: tuple[int, ...] = (1, 4, 8)
    iterations: int = 400
    shadows: int = 16
    members: int = 2000
    trials: int = 1000
    canaries: int = 1000
    delta: float | None = None

    def check(self) -> None:
        """Raises `InputError` for what can not be meant."""
        least = {"iterations": 1, "shadows": 2, "members": 10, "trials": 20, "canaries": 20}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise InputError(f"{name} = {getattr(self, name)}: write {bound} or more")
        if not self.sizes or min(self.sizes) < 1 or len(set(self.sizes)) < len(self.sizes):
            raise InputError(f"sizes = {list(self.sizes)}: write numbers of examples, as 1, 4 and 8, each once")
        if self.delta is not None and not 0 < self.delta < 1:
            raise InputError(f"delta = {self.delta:g}: write a probability, as 1e-5")


@dataclass(frozen=True, slots=True)
class Audit:
    """What an audit found, as in its JSON, and the files that it wrote.

    `passed` is False where a lower bound refutes the epsilon that the run accounts for; `verdict` says so in words.
    """

    found: dict[str, Any]
    passed: bool
    verdict: str
    json: Path
    page: Path


def audit(
    path: Path | str,
    *,
    out: Path | str | None = None,
    parts: Sequence[str] = PARTS,
    settings: Settings | None = None,
    watch: Watch = lambda part, done, total: None,
) -> Audit:
    """Attack a finished run as an observer could, and write `audit.json` and `audit.html` into its `audit/`, or `out`.

    Parts that are there already, with the same settings and model, are kept: an audit that was stopped goes on.
    Raises `InputError` for a directory that holds no finished run, or settings that can not be meant.
    """
    chosen = settings or Settings()
    chosen.check()
    for part in parts:
        if part not in PARTS:
            raise InputError(f"part '{part}' is unknown: {nearest(part, PARTS)}")
    run = Run(path)
    if not run.done:
        raise InputError(f"run '{run.path}' is not finished: fedkeel resume {run.path}")
    plugins.load(run.job.plugins)
    federation, state = Federation.of(run.job), run.state
    if not federation.layout.columns:
        raise InputError(f"clients of run '{run.path}' share nothing, so that there is nothing to audit")
    if not len(federation.data.y):
        raise InputError(f"the clients of run '{run.path}' hold their examples themselves: audit a simulated run")
    if state.theta.numel() != federation.layout.columns:
        raise InputError(f"the model of run '{run.path}' is not the one that its job builds now: restore what changed")
    folder = Path(out) if out else run.path / "audit"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"'{folder}' cannot be made ({error.strerror}): choose another directory") from None
    study = _Study(federation, state, chosen, folder, watch)
    try:
        done = {part: study.part(part) for part in PARTS if part in parts}
    except KeyboardInterrupt:
        raise InterruptedRunError("interrupted; go on with: fedkeel audit with the same arguments") from None
    return _written(run, chosen, folder, done)


class _Study:
    def __init__(
        self, federation: Federation, state: ServerState, settings: Settings, folder: Path, watch: Watch
    ) -> None:
        self.federation, self.state, self.settings, self.folder, self.watch = federation, state, settings, folder, watch
        self.key = Key.root(settings.seed).fold("audit")

    def part(self, name: str) -> dict[str, Any]:
        """A part's figures: those of its file where it was done alike, else made now and kept."""
        path = self.folder / f"{name}.json"
        alike = self._alike(name)
        if path.is_file():
            try:
                held = json.loads(path.read_text(encoding="utf-8"))
                if held["alike"] == alike:
                    self.watch(name, 1, 1)
                    return dict(held["found"])
            except (OSError, ValueError, KeyError, TypeError):
                pass  # of another version, or cut short: made anew
        found: dict[str, Any] = {"inversion": self._inversion, "membership": self._membership}.get(
            name, self._canaries
        )()
        files.write_text(path, json.dumps({"alike": alike, "found": found}, allow_nan=False))
        return found

    def _alike(self, part: str) -> dict[str, Any]:
        """What a part's figures depend on."""
        used = {
            "inversion": ("sizes", "iterations"),
            "membership": ("shadows", "members"),
            "canaries": ("trials", "canaries", "delta"),
        }[part]
        model = hashlib.sha256(self.state.theta.contiguous().numpy().tobytes()).hexdigest()
        held = json.loads(json.dumps({name: getattr(self.settings, name) for name in ("seed", *used)}))
        return {"format": _FORMAT, "model": model, "job": self.federation.job.to_toml(), **held}

    def _told(self, part: str) -> Callable[[int, int], None]:
        return lambda done, total: self.watch(part, done, total)

    def _inversion(self) -> dict[str, Any]:
        federation, settings = self.federation, self.settings
        if reason := inverting.unfit(federation):
            return {"left_out": reason}
        models = {"first": first_model(federation)[0], "final": self.state.theta}
        return inverting.study(
            federation,
            models,
            settings.sizes,
            self.key.fold("inversion"),
            iterations=settings.iterations,
            watch=self._told("inversion"),
        )

    def _membership(self) -> dict[str, Any]:
        federation, settings, key = self.federation, self.settings, self.key.fold("membership")
        if federation.layout.width != federation.layout.columns:
            return {"left_out": "clients have layers of their own, so that no shared model was trained on all examples"}
        among = membership.candidates(federation, settings.members, key.fold("candidates"))
        member = among.member.numpy()
        kept = self.folder / "shadows"
        kept.mkdir(exist_ok=True)
        told = hashlib.sha256(json.dumps(self._alike("membership") | {"shadows": 0}).encode()).hexdigest()[:16]

        def shadowed(number: int) -> tuple[membership.Floats, membership.Mask]:
            path = kept / f"{told}-{number}.npy"
            if path.is_file():
                try:
                    seen, held = np.load(path)
                except (OSError, ValueError):
                    pass
                else:
                    return seen, held > 0
            model, had = membership.shadow(federation, among, key.fold("shadow", number))
            scores = membership.by_loss(federation, model, among)
            files.write(path, [membership.packed(np.stack([scores, had]))])
            return scores, had

        seen, without = [], []
        for number in range(settings.shadows):
            scores, had = shadowed(number)
            seen.append(scores)
            without.append(~had)
            self.watch("membership", number + 1, settings.shadows)
        final = membership.by_loss(federation, self.state.theta, among)
        scores = membership.lira(final, np.stack(seen), np.stack(without))
        attacks = {
            "loss threshold": membership.judged(final, member),
            "LiRA": membership.judged(scores, member),
        }
        return {
            "members": int(member.sum()),
            "others": int((~member).sum()),
            "shadows": settings.shadows,
            "attacks": {
                name: of._asdict() | {"rates": [r._asdict() for r in of.rates]} for name, of in attacks.items()
            },
        }

    def _canaries(self) -> dict[str, Any]:
        federation, settings, key = self.federation, self.settings, self.key.fold("canaries")
        privacy = federation.plan.privacy
        if privacy is not None and privacy.mechanism.place == "step":
            return {"left_out": "the run hides examples, and canaries are clients"}
        clients, rows = mechanism.honest(federation, self.state, key)
        if not clients:
            return {"left_out": "no client's work gives an update from the final model"}
        norm = mechanism.clip_norm(federation, self.state, rows)
        delta = self.settings.delta or federation.job.privacy.delta
        with torch.no_grad():
            many = canaries.in_trials(
                mechanism.Round(federation, self.state, key.fold("trials"), clients),
                rows,
                norm=norm,
                delta=delta,
                key=key.fold("one"),
                trials=settings.trials,
                watch=self._told("canaries"),
            )
            one = canaries.in_one_run(
                mechanism.Round(federation, self.state, key.fold("run"), clients),
                rows,
                norm=norm,
                delta=delta,
                key=key.fold("many"),
                canaries=max(20, min(settings.canaries, _MATRIX // rows.shape[1])),
            )
        return {
            "clients": len(clients),
            "norm": norm,
            "delta": delta,
            **({"of_a_round": privacy.of_a_round} if privacy else {}),
            "trials": many._asdict() | {"bounds": [b._asdict() for b in many.bounds]},
            "one_run": one._asdict() | {"bounds": [b._asdict() for b in one.bounds]},
        }


def lower_bounds(found: dict[str, Any], *, gaussian: bool) -> dict[str, float]:
    """The bounds that may refute an epsilon, at `REFUTES` each; with `gaussian` also what Gaussian noise would mean.

    That is supposed of runs that account for an epsilon, whose noise is Gaussian: without it a thousand trials refute
    nothing above 5, be there no noise at all.
    """
    part = found.get("canaries", {})
    if "trials" not in part:
        return {}
    trials, one = (next(b for b in part[key]["bounds"] if b["confidence"] == REFUTES) for key in ("trials", "one_run"))
    bounds = {"one canary, many trials": trials["epsilon"], "many canaries, one round": one["epsilon"]}
    return bounds | ({GAUSSIAN: trials["gaussian"]} if gaussian else {})


def judgement(accounted: float | None, lower: dict[str, float], delta: float) -> tuple[bool, str]:
    """Whether the epsilon that is accounted for one round stands, and a sentence on it."""
    if not lower:
        return True, "Canaries were left out, so that nothing is said of ε."
    best = max(lower, key=lambda name: lower[name])
    most, at = lower[best], f"at δ = {delta:g} and {100 * REFUTES:g}% confidence"
    at += ", if its noise is Gaussian" if best == GAUSSIAN else ""
    if accounted is None:
        return True, f"The run accounts for no ε. Canaries show that one round alone has at least ε = {most:.2f}, {at}."
    if most > accounted:
        return False, (
            f"The accounted ε does not hold: the run accounts for {accounted:.2f} a round, and canaries show at least "
            f"{most:.2f}, {at}."
        )
    return True, (
        f"Nothing refutes the accounted ε: canaries show at least {most:.2f} of one round, {at}, and the run accounts "
        f"for {accounted:.2f} a round."
    )


def _written(run: Run, settings: Settings, folder: Path, done: dict[str, dict[str, Any]]) -> Audit:
    from fedkeel import __version__
    from fedkeel.ship.audited import write

    accounted = run.epsilon
    lower = lower_bounds(done, gaussian=accounted is not None)
    alone = done.get("canaries", {}).get("of_a_round", accounted)
    passed, verdict = judgement(alone, lower, settings.delta or run.job.privacy.delta)
    pictures = done.get("inversion", {}).get("pictures", [])
    found = {
        "run": str(run.path),
        "job": run.job.name,
        "fedkeel": __version__,
        "settings": asdict(settings),
        "accounted": accounted,
        "of_a_round": alone,
        "lower_bounds": lower,
        "passed": passed,
        "verdict": verdict,
    } | {name: {k: v for k, v in part.items() if k != "pictures"} for name, part in done.items()}
    target, page = folder / "audit.json", folder / "audit.html"
    try:
        files.write_text(target, json.dumps(found, indent=1, allow_nan=False) + "\n")
        write(page, found, pictures)
    except OSError as error:
        raise RunError(f"'{folder}' could not be written ({error.strerror})") from None
    return Audit(found, passed, verdict, target, page)
