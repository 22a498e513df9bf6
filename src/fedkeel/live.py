"""The command line of watching: `fedkeel dashboard` and `fedkeel track`."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

_out = Console(highlight=False, soft_wrap=True)
_err = Console(stderr=True, highlight=False, soft_wrap=True)


def dashboard(
    directory: Annotated[
        str | None,
        typer.Argument(
            help="The directory of a run, a folder of `fedkeel deploy init`, or the http(s)://HOST:PORT of another "
            "dashboard, whose page is served here."
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen at; others than loopback are open to all.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at, 0 for any.", min=0, max=65535)] = 8600,
    log_json: Annotated[bool, typer.Option("--log-json", help="Log requests and errors as JSON on stderr.")] = False,
    alerts: Annotated[
        Path | None, typer.Option("--alerts", help="Write alert rules for Prometheus to this file, and nothing else.")
    ] = None,
) -> None:
    """Watch a run live in a browser; /metrics is for Prometheus. It only reads, and may start before the run does."""
    from fedkeel.core.errors import InputError
    from fedkeel.dashboard import feed, prometheus
    from fedkeel.ship import files

    if alerts is not None:
        files.write_text(alerts, prometheus.ALERTS.read_text("utf-8"))
        _out.print(f"alert rules: {escape(str(alerts))}")
        return
    if directory is None:
        raise InputError("DIRECTORY is missing: name the directory of a run, or a folder of `fedkeel deploy init`")
    elsewhere = "://" in directory
    ledger = None if elsewhere else feed.find(directory)
    _needed()
    from fedkeel.dashboard import relay, server

    source: server.Live | relay.Relay
    if ledger is None:
        source = relay.Relay(directory, server.POLL)
        if trouble := relay.check(source):
            _err.print(f"[yellow]note:[/] {escape(trouble)}; the page goes on trying")
    else:
        source = server.Live(feed.Feed(ledger))
    listening = server.listen(host, port)
    address, number = listening.getsockname()[:2]
    shown = f"[{address}]" if ":" in address else address
    _out.print(f"dashboard: http://{escape(shown)}:{number}/ (Ctrl-C ends it)")
    if not address.startswith("127.") and address != "::1":
        _err.print(
            "[yellow]note:[/] whoever reaches this address can read the page: put it behind what asks who they are"
        )
    with suppress(KeyboardInterrupt):
        server.serve(source, listening, log_json=log_json)


def track(
    directory: Annotated[Path, typer.Argument(help="The directory of a run, or a folder of `fedkeel deploy init`.")],
    tensorboard: Annotated[
        Path | None, typer.Option(help="Folder for TensorBoard's event files, one for each run.")
    ] = None,
    mlflow: Annotated[
        str | None, typer.Option(help="Where MLflow keeps its runs: sqlite:///FILE.db, or the address of a server.")
    ] = None,
    experiment: Annotated[str, typer.Option(help="MLflow's experiment; made where there is none.")] = "fedkeel",
    clients: Annotated[bool, typer.Option("--clients", help="Also the figures of every single client.")] = False,
    follow: Annotated[bool, typer.Option("--follow", help="Go on until the run is over, or Ctrl-C.")] = False,
) -> None:
    """Write a run to TensorBoard or MLflow. It reads the ledger alone, and called again it goes on where it was."""
    from contextlib import ExitStack

    from fedkeel.core.errors import InputError
    from fedkeel.dashboard import feed
    from fedkeel.track import follow as following
    from fedkeel.track.mlflow import MLflow
    from fedkeel.track.points import Target
    from fedkeel.track.tensorboard import TensorBoard

    if tensorboard is None and mlflow is None:
        raise InputError("no tracker is named: add --tensorboard FOLDER, --mlflow URI, or both")
    ledger = feed.find(directory)
    with ExitStack() as stack, suppress(KeyboardInterrupt):
        targets: list[Target] = []
        if tensorboard is not None:
            events = TensorBoard(tensorboard, ledger.parent)
            stack.callback(events.close)
            targets.append(events)
        if mlflow is not None:
            targets.append(MLflow(mlflow, experiment, ledger.parent))
        if follow:
            _out.print("writing as the run goes on (Ctrl-C ends it)")
            done = following.follow(ledger, targets, clients, lambda text: _err.print(escape(text)))
        else:
            done = following.once(ledger, targets, clients)
        _out.print(f"{done.status.lower()}: written as far as round {min(target.upto for target in targets)}")


def _needed() -> None:
    from fedkeel.core.errors import InputError

    try:
        import httpx  # noqa: F401
        import prometheus_client  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError:
        raise InputError("the dashboard needs a web server: pip install 'fedkeel[dashboard]'") from None


__all__ = ["dashboard", "track"]
