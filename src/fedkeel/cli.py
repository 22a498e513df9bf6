"""The command line: thin over `fedkeel.api`. Exit codes: 0 fine, 1 the run failed, 2 the input is wrong."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from fedkeel import deployment, exporting, live, releases, versions

if TYPE_CHECKING:
    from fedkeel.api import Run
    from fedkeel.config import Job

app = typer.Typer(
    name="fedkeel",
    help="Federated learning whose model updates can be trusted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(deployment.app, name="deploy")
app.add_typer(versions.app, name="model")
app.add_typer(releases.app, name="release")
app.command()(deployment.server)
app.command()(deployment.client)
app.command()(exporting.export)
app.command()(live.dashboard)
app.command()(live.track)
_out = Console(highlight=False, soft_wrap=True)
_err = Console(stderr=True, highlight=False, soft_wrap=True)

Settings = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the job.")]
Plugins = Annotated[list[Path] | None, typer.Option("--plugin", help="A Python file with your own rules.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs, and nothing else, on stdout.")]
Out = Annotated[Path | None, typer.Option("--out", help="Where to write; a free name under runs/ when left out.")]


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    if version:
        from fedkeel import __version__

        _out.print(__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        _out.print(context.get_help())


@app.command()
def new(
    name: Annotated[str, typer.Argument(help="Name of the job; NAME.toml is written here.")],
    custom: Annotated[
        bool, typer.Option("--custom", help="Also write NAME_custom.py with your own model, data and aggregator.")
    ] = False,
) -> None:
    """Write a commented job file to start from."""
    from fedkeel import template
    from fedkeel.config import Job
    from fedkeel.core.errors import InputError

    Job(name=name)  # refuses a name that can be no file
    files = {f"{name}.toml": template.job_file(name)}
    if custom:
        plugin = f"{name}_custom.py"
        files = {
            plugin: template.CUSTOM,
            f"{name}.toml": template.job_file(name, (plugin,), template.CUSTOM_SETTINGS),
        }
    for file in files:
        if Path(file).exists():
            raise InputError(f"'{file}' exists already: choose another name, or delete it")
    for file, text in files.items():
        try:
            Path(file).write_text(text, encoding="utf-8")
        except OSError as error:
            raise InputError(f"'{file}' can not be written ({error.strerror}): choose another directory") from None
        _out.print(f"wrote {escape(file)}")
    _out.print(f"run it: fedkeel run {escape(name)}.toml")


@app.command()
def run(
    job: Annotated[Path, typer.Argument(help="The job file.")],
    settings: Settings = None,
    plugin: Plugins = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Run a federation: a directory with its ledger, checkpoints, model and report."""
    from fedkeel import api
    from fedkeel.watch import watching

    built = _job(job, settings, plugin)
    with _quiet(as_json), _interruptible(), watching(_err, built.rounds, built.name) as watch:
        done = api.run(built, out, watch=watch)
    _finish(done, as_json)


@app.command()
def resume(
    directory: Annotated[Path, typer.Argument(help="The directory of a run that was interrupted.")],
    as_json: AsJson = False,
) -> None:
    """Go on with an interrupted run, to the same final weights as an unbroken one."""
    from fedkeel import api
    from fedkeel.watch import watching

    job = api.Run(directory).job
    with _interruptible(), watching(_err, job.rounds, job.name) as watch:
        done = api.resume(directory, watch=watch)
    _finish(done, as_json)


@app.command()
def report(
    directories: Annotated[list[Path], typer.Argument(help="One run, or several to see side by side.")],
    out: Annotated[Path | None, typer.Option("--out", help="The HTML file to write.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write a self-contained HTML report."""
    from fedkeel import api

    path = api.report(directories, out)
    _out.print_json(json.dumps({"report": str(path)})) if as_json else _out.print(f"report: {escape(str(path))}")


@app.command()
def rules(
    kind: Annotated[str | None, typer.Argument(help="A kind of rule, as reducer.")] = None,
    name: Annotated[str | None, typer.Argument(help="A rule of that kind, as trimmed_mean.")] = None,
    plugin: Plugins = None,
    as_json: AsJson = False,
) -> None:
    """Show which rules exist and what they take."""
    from fedkeel import catalogue, plugins

    plugins.load([str(p) for p in plugin or []])
    found = catalogue.describe(kind, name)
    if as_json:
        _out.print_json(json.dumps(found))
    else:
        catalogue.show(_out, found, kind, name)


@app.command()
def compare(
    job: Annotated[Path, typer.Argument(help="The job file.")],
    vary: Annotated[list[str], typer.Option("--vary", metavar="KEY=A,B", help="A key and its values; repeatable.")],
    seeds: Annotated[int, typer.Option(help="Runs per variant, at seeds job.seed, +1, ...")] = 3,
    settings: Settings = None,
    plugin: Plugins = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Where to write, or go on; runs/NAME-compare when left out.")
    ] = None,
    metric: Annotated[str, typer.Option(help="accuracy or loss")] = "accuracy",
    baselines: Annotated[
        bool, typer.Option(help="Run FedAvg, local-only and centralised training beside the variants.")
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Run variants of a job over seeds: mean and 95% interval, as a table, CSV and report."""
    from fedkeel.comparison import compare as run_comparison
    from fedkeel.config import split_list
    from fedkeel.core.errors import InputError
    from fedkeel.watch import comparing, table

    built = _job(job, settings, plugin)
    varied: dict[str, list[str]] = {}
    for text in vary:
        key, equals, values = text.partition("=")
        if not equals or key in varied:
            raise InputError(f"--vary '{text}': write each key once, as aggregate.reduce=mean,median")
        varied[key] = split_list(values)
    with (
        _quiet(as_json),
        _interruptible("fedkeel compare with the same arguments"),
        comparing(_err, built.rounds) as watch,
    ):
        found = run_comparison(
            built, varied, seeds=seeds, out=out, metric=metric, with_baselines=baselines, watch=watch
        )
    if as_json:
        result = {"metric": found.metric, "variants": found.table, "csv": str(found.csv), "report": str(found.report)}
        _out.print_json(json.dumps(result))
        return
    _out.print(table(found))
    _out.print(f"table: {escape(str(found.csv))}\nreport: {escape(str(found.report))}")


@app.command()
def probe(
    job: Annotated[Path, typer.Argument(help="The job file.")],
    hostile: Annotated[int, typer.Option(help="How many of the clients are hostile.")],
    attack: Annotated[
        list[str] | None, typer.Option("--attack", help="An attack, as alie; repeatable. Fourteen when left out.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Runs per cell, at seeds job.seed, +1, ...")] = 1,
    tolerance: Annotated[float, typer.Option(help="How far below the clean plain mean a defence still holds.")] = 0.02,
    settings: Settings = None,
    plugin: Plugins = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Where to write, or go on; runs/NAME-probe when left out.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run a job under many attacks and behind many defences: which hold, bend or break."""
    from fedkeel.probing import ATTACKS
    from fedkeel.probing import probe as run_probe
    from fedkeel.watch import comparing, grid

    built = _job(job, settings, plugin)
    with (
        _quiet(as_json),
        _interruptible("fedkeel probe with the same arguments"),
        comparing(_err, built.rounds) as watch,
    ):
        found = run_probe(
            built,
            hostile=hostile,
            attacks=attack or ATTACKS,
            seeds=seeds,
            tolerance=tolerance,
            out=out,
            watch=watch,
        )
    if as_json:
        result = {"clean": found.clean, "best": found.best, "cells": found.table, "left_out": found.left_out}
        _out.print_json(json.dumps(result | {"csv": str(found.csv), "report": str(found.report)}))
        return
    _out.print(grid(found))
    worst = found.worst(found.best)
    _out.print(
        f"best worst case: {escape(found.best)}, {100 * worst.mean:.1f}% under {escape(worst.attack)}; "
        f"the plain mean without attack: {100 * found.clean:.1f}%"
    )
    _out.print(f"table: {escape(str(found.csv))}\nreport: {escape(str(found.report))}")


@app.command()
def audit(
    directory: Annotated[Path, typer.Argument(help="The directory of a finished run.")],
    part: Annotated[
        list[str] | None,
        typer.Option("--part", help="inversion, membership or canaries; repeatable. All when left out."),
    ] = None,
    sizes: Annotated[str, typer.Option(help="Sizes of the batches that are inverted.")] = "1,4,8",
    iterations: Annotated[int, typer.Option(help="Steps of each inversion attack.")] = 400,
    shadows: Annotated[int, typer.Option(help="Shadow federations of membership inference, each a whole run.")] = 16,
    members: Annotated[int, typer.Option(help="The most members that are asked about, and others.")] = 2000,
    trials: Annotated[int, typer.Option(help="Rounds with a canary, and rounds without.")] = 1000,
    canaries: Annotated[int, typer.Option(help="Canaries in one round.")] = 1000,
    delta: Annotated[float | None, typer.Option(help="Of epsilon's lower bounds; the job's when left out.")] = None,
    seed: Annotated[int, typer.Option(help="What the audit draws comes from it.")] = 0,
    out: Annotated[
        Path | None, typer.Option("--out", help="Where to write, or go on; DIRECTORY/audit when left out.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Attack a finished run: what its updates and its model tell, and whether its epsilon holds (1: it does not)."""
    from fedkeel.audit.study import PARTS, Settings
    from fedkeel.audit.study import audit as run_audit
    from fedkeel.core.errors import InputError
    from fedkeel.ship.audited import statements
    from fedkeel.watch import auditing

    try:
        batches = tuple(int(size) for size in sizes.split(","))
    except ValueError:
        raise InputError(f"--sizes '{sizes}': write numbers of examples, as 1,4,8") from None
    settings = Settings(seed, batches, iterations, shadows, members, trials, canaries, delta)
    with _quiet(as_json), _interruptible("fedkeel audit with the same arguments"), auditing(_err) as watch:
        found = run_audit(directory, out=out, parts=part or PARTS, settings=settings, watch=watch)
    if as_json:
        _out.print_json(json.dumps(found.found | {"json": str(found.json), "report": str(found.page)}))
    else:
        for line in statements(found.found):
            _out.print(escape(line))
        _out.print(f"{'[green]' if found.passed else '[red]'}{escape(found.verdict)}[/]")
        _out.print(f"figures: {escape(str(found.json))}\nreport: {escape(str(found.page))}")
    if not found.passed:
        raise typer.Exit(1)


@app.command()
def reduce(
    rows: Annotated[list[Path], typer.Argument(help="A .npy file (n, P) of float32, or one (P,) for each update.")],
    rule: Annotated[str, typer.Option(help="A reducer that works by columns, as median.")],
    out: Annotated[Path, typer.Option(help="The .npy file to write.")],
    weights: Annotated[Path | None, typer.Option(help="A .npy file (n,) of the updates' weights.")] = None,
    memory: Annotated[str, typer.Option(help="What may be held at once, as 512MB.")] = "1GiB",
    plugin: Plugins = None,
    as_json: AsJson = False,
) -> None:
    """Reduce updates that lie on the disk, more than memory holds, to one; called again it goes on."""
    from fedkeel import api, plugins
    from fedkeel.watch import reducing

    plugins.load([str(p) for p in plugin or []])
    with _quiet(as_json), _interruptible("fedkeel reduce with the same arguments"), reducing(_err, rule) as watch:
        done = api.reduce_files(rows, rule, out, weights, memory=memory, watch=watch)
    _out.print_json(json.dumps({"out": str(done)})) if as_json else _out.print(f"reduced: {escape(str(done))}")


@app.command()
def demo(out: Out = None, settings: Settings = None) -> None:
    """A federation of 50 clients, ten of them hostile, three ways; under a minute."""
    from fedkeel import demo as demonstration

    demonstration.run(_out, _err, out, settings or [])


def _quiet(as_json: bool) -> AbstractContextManager[object]:
    """What a user's code prints must not stand before the JSON."""
    return redirect_stdout(sys.stderr) if as_json else nullcontext()


@contextmanager
def _interruptible(remedy: str = "") -> Iterator[None]:
    """Say how to go on after Ctrl-C; typer by itself would only say that it aborted."""
    from fedkeel.core.errors import InterruptedRunError

    try:
        yield
    except InterruptedRunError as error:
        _err.print(escape(f"interrupted; go on with: {remedy}" if remedy else str(error)))
        raise typer.Exit(130) from None


def _job(path: Path, settings: list[str] | None, plugin: list[Path] | None) -> Job:
    from fedkeel.config import load

    job = load(path).with_settings(settings or [])
    return job.model_copy(update={"plugins": (*job.plugins, *map(str, plugin or []))})


def _finish(done: Run, as_json: bool) -> None:
    from fedkeel.core.errors import RunError

    rounds = done.rounds
    if rounds and all(row["skipped"] for row in rounds):
        raise RunError(f"every round was skipped, the last because: {rounds[-1]['skipped']}; see {done.path}")
    found: dict[str, Any] = {}
    for metric in ("accuracy", "loss"):
        row = done.final(metric)
        if row is not None:
            found[metric] = {k: row[k] for k in ("value", "low", "high")}
    epsilon = done.epsilon
    if as_json:
        told = {"run": str(done.path), "rounds": len(rounds), "final": found, "epsilon": epsilon}
        _out.print_json(json.dumps({**told, "report": str(done.dir.report)}))
        return
    from fedkeel.watch import figure

    shown = ", ".join(f"{name} {figure(row)}" for name, row in found.items())
    privacy = done.job.privacy
    spent = "" if epsilon is None else f", epsilon {epsilon:.3g} at delta {privacy.delta:g}"
    _out.print(f"{escape(done.job.name)}: {shown} after {len(rounds)} rounds{spent}")
    if privacy.insecure_reproducible_noise:
        _out.print("[red]nothing is private: the noise comes from the seed (insecure_reproducible_noise)[/]")
    _out.print(f"run: {escape(str(done.path))}\nreport: {escape(str(done.dir.report))}")


def main() -> None:
    """Run the CLI; what the user can mend is one sentence on stderr, never a traceback."""
    from fedkeel.core.errors import FedkeelError, InputError

    try:
        code = app(standalone_mode=False)
    except InputError as error:
        _err.print(f"[red]error:[/] {escape(str(error))}")
        sys.exit(2)
    except FedkeelError as error:
        _err.print(f"[red]failed:[/] {escape(str(error))}")
        sys.exit(1)
    except KeyboardInterrupt:
        _err.print("interrupted")
        sys.exit(130)
    except typer.Abort:
        sys.exit(130)
    except Exception as error:
        # What the arguments themselves are wrong in; typer has its own copy of click's errors, or click's.
        words = getattr(error, "format_message", None)
        if words is None:
            raise
        sentence = " ".join(words().split()).rstrip(".")
        if sentence and "Usage:" not in sentence:  # else it has printed the help already
            _err.print(f"[red]error:[/] {escape(sentence)}: see `fedkeel --help`")
        sys.exit(2)
    sys.exit(code if isinstance(code, int) else 0)
