"""The command line of deployments: `fedkeel deploy ...`, and what a host runs."""

from __future__ import annotations

import json
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

if TYPE_CHECKING:
    from fedkeel.deploy.local import Local

app = typer.Typer(help="Run a federation on a network, with Flower.", no_args_is_help=True)
_out = Console(highlight=False, soft_wrap=True)
_err = Console(stderr=True, highlight=False, soft_wrap=True)

Folder = Annotated[Path, typer.Argument(help="A folder that `fedkeel deploy init` wrote.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs, and nothing else, on stdout.")]
Apart = Annotated[bool, typer.Option("--apart", help="Give every node processes of its own.")]


@app.command()
def init(
    job: Annotated[Path, typer.Argument(help="The job file, as for `fedkeel run`.")],
    nodes: Annotated[int | None, typer.Option(help="How many nodes; as many as the job has clients.", min=1)] = None,
    out: Annotated[Path | None, typer.Option("--out", help="The folder to write; deploy-NAME when left out.")] = None,
    host: Annotated[str, typer.Option(help="Name or address that nodes reach the server by.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port that nodes reach it at.", min=1, max=65000)] = 9092,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the job.")
    ] = None,
) -> None:
    """Write what the hosts of a federation need: settings, certificates, keys, units, a compose file."""
    from fedkeel.config import load

    _needed()
    from fedkeel.deploy import init as writing

    built = load(job).with_settings(settings or [])
    done = writing.write(built, out or Path(f"deploy-{built.name}"), host=host, port=port, nodes=nodes)
    folder = escape(str(done.folder))
    for section in done.left_out:
        _err.print(f"left out: \\[{section}], which is for simulation")
    _out.print(f"wrote {folder}: a server and {len(done.clients)} nodes")
    _out.print(f"try it here: fedkeel deploy up {folder} --local")
    _out.print(
        f"on hosts: copy {folder}/server and {folder}/nodes/NAME to theirs, then fedkeel server DIR, "
        f"fedkeel client DIR; keep {folder}/authority to yourself"
    )


@app.command()
def up(
    folder: Folder,
    local: Annotated[bool, typer.Option("--local", help="Server and nodes on this host, on loopback.")] = False,
    apart: Apart = False,
    as_json: AsJson = False,
) -> None:
    """Start server and nodes on this host and watch the federation to its end."""
    from fedkeel.core.errors import InputError

    if not local:
        raise InputError(
            "up starts everything on this host: say --local; on hosts use fedkeel server and fedkeel client"
        )
    found = _local(folder)
    if found.run.exists():
        raise InputError(f"the federation in '{folder}' has begun: go on with `fedkeel deploy resume {folder}`")
    _through(found, apart, as_json)


@app.command()
def resume(folder: Folder, apart: Apart = False, as_json: AsJson = False) -> None:
    """Start what is not running, and go on from the last checkpoint."""
    _through(_local(folder), apart, as_json)


@app.command()
def status(folder: Folder, as_json: AsJson = False) -> None:
    """Which processes run, and where the federation stands."""
    from fedkeel.watch import describe

    found = _local(folder)
    rounds = found.server.job.rounds
    standing = found.standing(rounds)
    processes = found.processes()
    if as_json:
        told = [{"name": p.name, "pid": p.pid, "alive": p.alive, "log": str(p.log)} for p in processes]
        rest = {"done": found.done, "round": standing.round if standing else None, "rounds": rounds}
        _out.print_json(json.dumps({"processes": told, **rest, "run": str(found.run)}))
        return
    for process in processes:
        _out.print(f"{escape(process.name)}: {'running' if process.alive else 'ended'}, process {process.pid}")
    if not processes:
        _out.print("nothing of it was started on this host")
    if page := found.page():
        _out.print(f"live page: {escape(page)}")
    if standing is not None:
        word = "done" if found.done else f"round {standing.round} of {rounds}"
        _out.print(f"{word}: {escape(describe(standing))}")
    _out.print(f"record: {escape(str(found.run))}")


@app.command()
def logs(
    folder: Folder,
    name: Annotated[str, typer.Argument(help="A process, as server; see status.")] = "server",
    lines: Annotated[int, typer.Option(help="How many of the last lines.", min=1)] = 50,
) -> None:
    """The last lines that a process wrote."""
    from fedkeel.core.errors import InputError, nearest

    found = _local(folder)
    known = {path.stem: path for path in sorted((found.folder / "logs").glob("*.log"))}
    if name not in known:
        raise InputError(f"there is no log of '{name}': {nearest(name, known)}")
    with known[name].open(encoding="utf-8", errors="replace") as file:
        for line in deque(file, maxlen=lines):
            _out.print(escape(line.rstrip("\n")))


@app.command()
def stop(folder: Folder) -> None:
    """End what runs of it on this host; `resume` goes on."""
    count = _local(folder).stop()
    _out.print(f"ended {count} processes" if count else "nothing was running")


def server(folder: Annotated[Path, typer.Argument(help="The server's folder.")]) -> None:
    """Serve a federation to its end: what a server's host runs."""
    _needed()
    from fedkeel.deploy import process
    from fedkeel.deploy.folder import ServerFolder

    ServerFolder(folder)
    raise typer.Exit(process.server(folder).run())


def client(folders: Annotated[list[Path], typer.Argument(help="A node's folder; several run side by side.")]) -> None:
    """Take part in a federation: what a client's host runs."""
    _needed()
    from fedkeel.deploy import process

    raise typer.Exit(process.client(folders).run())


def _needed() -> None:
    from fedkeel.core.errors import InputError

    try:
        import flwr  # noqa: F401
    except ImportError:
        raise InputError("deployments need Flower: pip install 'fedkeel[deploy]'") from None


def _local(folder: Path) -> Local:
    _needed()
    from fedkeel.deploy.local import Local

    return Local(folder)


def _through(found: Local, apart: bool, as_json: bool) -> None:
    """Start, watch, stop, and say what came of it."""
    from fedkeel.api import Run
    from fedkeel.core.errors import InterruptedRunError
    from fedkeel.watch import figure, watching

    job = found.server.job
    found.start(apart=apart, page=True)
    try:
        if page := found.page(10.0):
            _err.print(f"live page: {escape(page)}")
        with watching(_err, job.rounds, job.name) as watch:
            found.watch(watch)
    except InterruptedRunError as error:
        _err.print(escape(str(error)))
        raise typer.Exit(130) from None
    finally:
        with suppress(KeyboardInterrupt):
            found.stop()
    done = Run(found.run)
    values: dict[str, Any] = {name: row for name in ("accuracy", "loss") if (row := done.final(name)) is not None}
    if as_json:
        final = {name: {k: row[k] for k in ("value", "low", "high")} for name, row in values.items()}
        _out.print_json(json.dumps({"run": str(found.run), "rounds": len(done.rounds), "final": final}))
        return
    shown = ", ".join(f"{name} {figure(row)}" for name, row in values.items())
    _out.print(f"{escape(job.name)}: {shown} after {len(done.rounds)} rounds")
    _out.print(f"run: {escape(str(done.path))}\nreport: {escape(str(done.dir.report))}")


__all__ = ["app", "client", "server"]
