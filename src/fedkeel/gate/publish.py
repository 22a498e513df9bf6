"""Publish a run: judge it by the registry's rules, then promote it or block it, and tell everybody why."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from fedkeel.api import Run
from fedkeel.core.errors import FedkeelError, InputError, RunError, nearest
from fedkeel.edge.export import MODEL, REPORT
from fedkeel.gate import policy, signing, tell
from fedkeel.gate.evidence import Evidence, Finding
from fedkeel.gate.verdict import Verdict, judge, verdict_of
from fedkeel.release.registry import SIGNATURE, STAGES, Registry
from fedkeel.release.store import measured

VERDICTS = "verdicts"
"""Where the ledger has them."""
_REGISTRY = "registry"


def publish(
    run: Path | str,
    to: str,
    registry: Registry,
    watch: Callable[[str, Finding], None] | None = None,
    key: Path | None = None,
) -> Verdict:
    """Judge a finished run, and let the stage `to` point at its model if it passes.

    The verdict is in the registry's history and the run's ledger either way, then in the metrics file and with the
    webhook that `gate.toml` names. `watch` is told each finding as it comes; `key` signs the release. Raises
    `InputError` for what cannot be judged at all, `RunError` where the verdict stands and could not be told.
    """
    if to not in STAGES:
        raise InputError(f"stage '{to}' is unknown: {nearest(to, STAGES)}")
    asked = policy.read(registry)
    tell.check(asked.tell)
    if asked.signed is not None and key is None:
        raise InputError(f"releases of registry '{registry.path}' are signed: name the secret key with --key")
    if key is not None:
        signing.check_key(key)
    opened = Run(run)
    if not opened.done:
        raise InputError(f"run '{opened.path}' holds no model yet: resume it until it is done")
    released = _files(opened)
    judged = {name: measured(path) for name, path in released.items()}
    evidence = Evidence(opened, registry, to)
    findings: list[tuple[str, Finding]] = []
    for text, rule in asked.asked(to).items():
        findings.append((text, judge(evidence, rule)))
        if watch:
            watch(*findings[-1])
    print_of = _fingerprint(evidence)
    verdict = verdict_of(evidence, findings, print_of)
    if verdict.passed:
        try:
            with _signed(released, key, registry, asked.signed) as (files, signature):
                told, against = verdict.to_dict(), verdict.against
                name, version = verdict.model, verdict.version
                registry.publish(name, version, print_of, files, to, told, against, judged, signature)
        except InputError as error:  # others were faster, the version is taken, or the key is another
            findings.append((_REGISTRY, Finding(False, str(error))))
            verdict = verdict_of(evidence, findings, print_of)
            if watch:
                watch(*findings[-1])
    if not verdict.passed:
        registry.blocked(verdict.model, verdict.version, print_of, to, verdict.to_dict())
    _record(opened, verdict)
    tell.everybody(asked.tell, registry, verdict)
    return verdict


@contextmanager
def _signed(
    files: Mapping[str, Path], key: Path | None, registry: Registry, public: str | None
) -> Iterator[tuple[Mapping[str, Path], Path | None]]:
    """The files, and their signature, found good where the registry says whose it must be; None without a key."""
    if key is None:
        yield files, None
        return
    with TemporaryDirectory(prefix="fedkeel-") as folder:
        place = Path(folder)
        copies = {name: place / name for name in files}  # what is signed is what is taken in
        for name, path in files.items():
            copies[name].parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copies[name])
        signing.sign(place, key, place / SIGNATURE)
        if public is not None:
            signing.verify(place, registry.path / public)
        yield copies, place / SIGNATURE


def _files(run: Run) -> dict[str, Path]:
    """What a release holds: the model, its card, its job, the code that the job names, and what was exported."""
    found = {name: run.dir.model / name for name in ("card.json", "model.safetensors")}
    found["job.toml"] = run.dir.job
    code = run.path / "plugins"
    if code.is_dir():
        found |= {f"plugins/{path.name}": path for path in sorted(code.glob("*.py"))}
    for place in sorted((run.path / "exports").glob("*")) if (run.path / "exports").is_dir() else ():
        if not place.name.startswith("."):  # that one is being written, or was left
            found |= {f"exports/{place.name}/{name}": place / name for name in (MODEL, REPORT)}
    return found


def _fingerprint(evidence: Evidence) -> str:
    """Of the weights; empty where they cannot be read, and then nothing passed."""
    try:
        return evidence.card.lineage.fingerprint
    except FedkeelError:
        return ""


def _record(run: Run, verdict: Verdict) -> None:
    try:
        with run.dir.lock(), run.dir.ledger() as ledger:
            ledger.write_meta({VERDICTS: [*ledger.meta.get(VERDICTS, []), verdict.to_dict()]})
    except FedkeelError as error:
        stands = "is in" if verdict.passed else "is not let into"
        what = f"'{verdict.model}' {verdict.version} {stands} {verdict.stage}"
        raise RunError(f"{what}, and the run's ledger does not say so: {error}") from None
