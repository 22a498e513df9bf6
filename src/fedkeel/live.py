"""The command line of the live page: `fedkeel dashboard`."""

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
        Path | None, typer.Argument(help="The directory of a run, or a folder that `fedkeel deploy init` wrote.")
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
    ledger = feed.find(directory)
    _needed()
    from fedkeel.dashboard import server

    listening = server.listen(host, port)
    address, number = listening.getsockname()[:2]
    shown = f"[{address}]" if ":" in address else address
    _out.print(f"dashboard: http://{escape(shown)}:{number}/ (Ctrl-C ends it)")
    if not address.startswith("127.") and address != "::1":
        _err.print(
            "[yellow]note:[/] whoever reaches this address can read the page: put it behind what asks who they are"
        )
    with suppress(KeyboardInterrupt):
        server.serve(ledger, listening, log_json=log_json)


def _needed() -> None:
    from fedkeel.core.errors import InputError

    try:
        import prometheus_client  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError:
        raise InputError("the dashboard needs a web server: pip install 'fedkeel[dashboard]'") from None


__all__ = ["dashboard"]
