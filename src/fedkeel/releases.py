"""The command line of releases: `fedkeel release init`, `publish`, `list`, `history`, `rollback`, `verify` and more."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from fedkeel.gate.evidence import Finding
    from fedkeel.release.registry import Registry

app = typer.Typer(
    help="Let models into a registry through a gate, and see that what is served is what was released.",
    no_args_is_help=True,
)
_out = Console(highlight=False, soft_wrap=True)

Where = Annotated[Path, typer.Option("--registry", envvar="FEDKEEL_REGISTRY", help="The directory of the registry.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs, and nothing else, on stdout.")]
Stage = Annotated[str, typer.Option("--stage", help="candidate, staging or production.")]
_HERE = Path("registry")


@app.command()
def init(
    directory: Annotated[Path, typer.Argument(help="The directory of the registry; made if need be.")] = _HERE,
) -> None:
    """Make a registry, with a gate.toml that says what its stages ask."""
    from fedkeel.gate import policy
    from fedkeel.release.registry import Registry

    with Registry(directory, create=True) as registry:
        policy.write(registry)
        policy.read(registry)
    _out.print(f"what models must pass is in {escape(str(directory / policy.FILE))}")


@app.command()
def publish(
    run: Annotated[Path, typer.Argument(help="The directory of a finished run.")],
    to: Annotated[str, typer.Option("--to", help="The stage: candidate, staging or production.")],
    registry: Where = _HERE,
    key: Annotated[Path | None, typer.Option("--key", help="The secret key to sign it with.")] = None,
    as_json: AsJson = False,
) -> None:
    """Judge a run's model; promote it, or block it with exit code 1 and the reasons."""
    from fedkeel.gate.publish import publish as judged
    from fedkeel.release.registry import Registry

    def told(rule: str, finding: Finding) -> None:
        mark = "[green]passed[/] " if finding.passed else "[red]blocked[/]"
        _out.print(f"  {mark}  {escape(rule)}: {escape(finding.text)}")

    with Registry(registry) as opened:
        verdict = judged(run, to, opened, None if as_json else told, key)
    if as_json:
        _out.print_json(json.dumps(verdict.to_dict()))
    elif verdict.passed:
        _out.print(f"[green]{to}[/]: {escape(verdict.model)} {verdict.version}, weights {verdict.fingerprint[:12]}")
    else:
        _out.print(f"[red]blocked[/] from {to}: {escape(verdict.model)} {verdict.version}")
    if not verdict.passed:
        raise typer.Exit(1)


@app.command("list")
def show(registry: Where = _HERE, as_json: AsJson = False) -> None:
    """What stands at which stage."""
    from fedkeel.release.registry import Registry

    with Registry(registry) as opened:
        rows = [
            {
                "model": name,
                "version": release.version,
                "stages": [stage for stage, other in opened.stages(name).items() if other.id == release.id],
                "fingerprint": release.fingerprint,
                "added": release.added,
                "kept": release.kept,
            }
            for name in opened.names
            for release in opened.releases(name)
        ]
    if as_json:
        _out.print_json(json.dumps(rows))
        return
    table = Table("model", "version", "stages", "weights", "added")
    for row in rows:
        stages = ", ".join(row["stages"]) if row["kept"] else "collected"  # type: ignore[arg-type]
        table.add_row(row["model"], row["version"], stages, row["fingerprint"][:12], _when(row["added"]))  # type: ignore[index, arg-type]
    _out.print(table)


@app.command()
def history(
    model: Annotated[str | None, typer.Argument(help="The model; may be left out where there is one.")] = None,
    registry: Where = _HERE,
    as_json: AsJson = False,
) -> None:
    """What was published, blocked and rolled back, with the reasons."""
    from fedkeel.release.registry import Registry

    with Registry(registry) as opened:
        moves = opened.history(_one(opened, model))
    if as_json:
        _out.print_json(json.dumps([move._asdict() for move in moves]))
        return
    table = Table("when", "stage", "what", "version", "why")
    for move in moves:
        broken = [f for f in (move.verdict or {}).get("findings", []) if not f["passed"]]
        why = "; ".join(f"{f['rule']}: {f['text']}" for f in broken)
        table.add_row(_when(move.wall), move.stage, move.kind, move.version, escape(why))
    _out.print(table)


@app.command()
def rollback(
    model: Annotated[str | None, typer.Argument(help="The model; may be left out where there is one.")] = None,
    stage: Stage = "production",
    registry: Where = _HERE,
) -> None:
    """Let a stage point at what it pointed at before."""
    from fedkeel.release.registry import Registry

    with Registry(registry) as opened:
        release = opened.rollback(_one(opened, model), stage)
    _out.print(f"{stage}: {escape(release.name)} {release.version}, weights {release.fingerprint[:12]}")


@app.command()
def get(
    release: Annotated[str, typer.Argument(help="DIR, DIR/NAME, DIR@STAGE or DIR/NAME@VERSION: of a registry.")],
    out: Annotated[Path, typer.Option("--out", help="A new directory for the files.")],
) -> None:
    """Write a release's files, every byte checked."""
    place, name, which = _parsed(release)
    with place as opened:
        found = opened.find(name, which)
        opened.checkout(found, out)
    _out.print(f"{escape(found.name)} {found.version}: {escape(str(out))}")


@app.command()
def mlflow(
    uri: Annotated[str, typer.Argument(help="The http(s) address of an MLflow server, or sqlite:///mlflow.db.")],
    model: Annotated[str | None, typer.Option("--model", help="The model; may be left out where there is one.")] = None,
    registry: Where = _HERE,
) -> None:
    """Bring MLflow's model registry to what this one says: a version a release, an alias a stage."""
    from fedkeel.gate.mirror import mirror
    from fedkeel.release.registry import Registry

    with Registry(registry) as opened:
        name = _one(opened, model)
        for here, there, stages in mirror(opened, name, uri):
            at = f" ({stages})" if stages else ""
            _out.print(f"{escape(name)} {here} is version {there} in MLflow{at}")


@app.command()
def gc(
    registry: Where = _HERE,
    keep: Annotated[int, typer.Option("--keep", min=0, help="Steps back that every stage can still be rolled.")] = 3,
) -> None:
    """Drop the files of releases that no stage needs; names, versions and history stay."""
    from fedkeel.release.registry import Registry

    with Registry(registry) as opened:
        dropped, freed = opened.collect(keep)
    _out.print(f"{dropped} release{'s' * (dropped != 1)} dropped, {freed / 1e6:.1f} MB freed")


@app.command()
def verify(
    path: Annotated[str, typer.Argument(help="What is served: a model directory, or a file with the weights.")],
    expect: Annotated[
        str | None, typer.Option("--expect", help="A fingerprint, or a release: DIR/NAME@production.")
    ] = None,
    key: Annotated[Path | None, typer.Option("--key", help="The public key that it must be signed with.")] = None,
) -> None:
    """Exit with 1 where what is served is not what was released, or not signed with the key."""
    from fedkeel.core.errors import InputError
    from fedkeel.gate import signing
    from fedkeel.gate.serving import drift

    if expect is None and key is None:
        raise InputError("there is nothing to verify by: name --expect, --key, or both")
    why = None if expect is None else drift(path, expect)
    if why is None and key is not None:
        if not key.is_file():
            raise InputError(f"key '{key}' does not exist: name the public one of the pair")
        try:
            signing.load_model(path, key)
        except InputError as error:
            why = str(error)
    if why:
        _out.print(f"[red]not what was released:[/] {escape(why)}")
        raise typer.Exit(1)
    _out.print("[green]it is what was released[/]")


@app.command()
def keys(directory: Annotated[Path, typer.Argument(help="Where the pair is written.")]) -> None:
    """Make a pair of keys: one to sign releases with, one to verify them."""
    from fedkeel.gate.signing import make_keys

    secret, public = make_keys(directory)
    _out.print(f"keep {escape(str(secret))} to yourself; {escape(str(public))} is for who verifies")


@app.command()
def watch(
    paths: Annotated[list[str], typer.Argument(help="What is served: model directories or files.")],
    expect: Annotated[str, typer.Option("--expect", help="The release that should be: DIR/NAME@production.")],
    every: Annotated[float, typer.Option("--every", min=0.1, help="Seconds between looks.")] = 60.0,
    once: Annotated[bool, typer.Option("--once", help="Look once.")] = False,
) -> None:
    """Watch what is served; end with exit code 1, and tell the gate's webhook, when it is not what was released."""
    from fedkeel.core.errors import RunError
    from fedkeel.gate import policy, tell
    from fedkeel.gate.serving import drift

    place, *_ = _parsed(expect)
    with place as registry:
        told = policy.read(registry).tell
        tell.check(told)
        while True:
            found = {path: why for path in paths if (why := drift(path, expect))}
            if found:
                for why in found.values():
                    _out.print(f"[red]not what was released:[/] {escape(why)}")
                event = {"event": "drift", "expected": expect, "found": found, "wall": time.time()}
                if told.webhook and (failed := tell.webhook(told.webhook, event)):
                    raise RunError(f"what is served is not what was released, and not all were told: {failed[0]}")
                raise typer.Exit(1)
            if once:
                _out.print("[green]it is what was released[/]")
                return
            time.sleep(every)


def _parsed(reference: str) -> tuple[Registry, str | None, str]:
    from fedkeel.core.errors import InputError
    from fedkeel.release.registry import Registry, parse

    found = parse(reference)
    if found is None:
        raise InputError(f"'{reference}' is no release: write DIR/NAME@production, where DIR is a registry")
    place, name, which = found
    return Registry(place), name, which


def _one(registry: Registry, model: str | None) -> str:
    from fedkeel.core.errors import InputError, nearest

    names = registry.judged
    if model is None and len(names) == 1:
        return names[0]
    if model is None:
        held = f"has {len(names)} models ({', '.join(names[:5])})" if names else "holds nothing yet"
        raise InputError(f"registry '{registry.path}' {held}: name one")
    if model not in names:
        raise InputError(f"registry '{registry.path}' has no model '{model}': {nearest(model, names)}")
    return model


def _when(wall: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(wall))
