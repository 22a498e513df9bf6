"""The server of the page: reads on in the background, answers from memory, and lets nobody write anything."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import secrets
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from fedkeel import ship
from fedkeel.core.errors import InputError
from fedkeel.dashboard import prometheus, view
from fedkeel.dashboard.feed import Feed
from fedkeel.dashboard.relay import Relay

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

POLL = 1.0  # seconds between two looks at the ledger
_PAGE = Path(__file__).parent / "page"
_BASE = Path(ship.__file__).parent / "templates" / "style.css"  # the report's: one look for both
_LOOPBACK = frozenset(("127.0.0.1", "localhost", "::1"))
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",
}
_KINDS = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}


class Live:
    """A feed that is read on in the background, and what was made of it."""

    def __init__(self, feed: Feed, poll: float = POLL) -> None:
        self.feed = feed
        self._poll = poll
        self._name = secrets.token_hex(4)
        self._lock = threading.Lock()
        self._made: tuple[int, bytes] = (-1, b"")

    async def follow(self) -> None:
        """Read on for ever: at once while there is more, then at every poll."""
        while True:
            more = await asyncio.to_thread(self.step)
            await asyncio.sleep(0.01 if more else self._poll)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Read on as long as the server runs."""
        await asyncio.to_thread(self.step)  # the first answer knows what there is
        task = asyncio.create_task(self.follow())
        yield
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    def step(self) -> bool:
        """Read on once; whether there is more."""
        with self._lock:
            return self.feed.step()

    @property
    def tag(self) -> str:
        """Other for every server and every revision. To be asked for before what it is the tag of."""
        return f'W/"{self._name}-{self.feed.revision}"'

    def state(self) -> bytes:
        """The overview, made once for all who ask."""
        with self._lock:
            if self._made[0] != self.feed.revision:
                self._made = (self.feed.revision, _encode(view.overview(self.feed)))
            return self._made[1]

    def clients(self, **wanted: Any) -> bytes:
        with self._lock:
            return _encode(view.clients(self.feed, **wanted))

    def metrics(self) -> bytes:
        with self._lock:
            return prometheus.exposition(self.feed)

    def health(self) -> tuple[bool, bytes]:
        """Whether all is well with this server, and what it sees."""
        with self._lock:
            status = view.status(self.feed)
            seen = {"status": status, "round": self.feed.tally.round, "behind": self.feed.behind}
        return status != "unreadable", _encode(seen)


def application(source: Live | Relay, hosts: Iterable[str] = _LOOPBACK) -> Starlette:
    """The routes. `hosts` are the names that a browser may know this server by; none: any."""
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.gzip import GZipMiddleware
    from starlette.routing import Route

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with source.running():
            yield

    answers = _answers(source) if isinstance(source, Live) else _relayed(source)
    files = [Route(f"/{path.name}", _file(path)) for path in _PAGE.iterdir()]
    files += [Route("/", _file(_PAGE / "index.html")), Route("/base.css", _file(_BASE))]
    middleware = [Middleware(_Guard, hosts=frozenset(hosts)), Middleware(GZipMiddleware, minimum_size=2000)]
    return Starlette(routes=[*files, *answers], middleware=middleware, lifespan=lifespan)


def _answers(live: Live) -> list[Any]:
    from prometheus_client import CONTENT_TYPE_LATEST
    from starlette.responses import Response
    from starlette.routing import Route

    def state(request: Request) -> Response:
        return _tagged(request, live.tag, live.state)

    def clients(request: Request) -> Response:
        try:
            wanted = _wanted(request)
            return _tagged(request, live.tag, lambda: live.clients(**wanted))
        except InputError as error:
            return Response(_encode({"error": str(error)}), 400, media_type="application/json")

    def metrics(_: Request) -> Response:
        return Response(live.metrics(), headers={"content-type": CONTENT_TYPE_LATEST})

    def healthz(_: Request) -> Response:
        well, body = live.health()
        return Response(body, 200 if well else 503, media_type="application/json")

    return [
        Route("/api/state", state),
        Route("/api/clients", clients),
        Route("/metrics", metrics),
        Route("/healthz", healthz),
    ]


def _relayed(relay: Relay) -> list[Any]:
    from starlette.responses import Response
    from starlette.routing import Route

    async def answer(request: Request) -> Response:
        try:
            wanted = _wanted(request) if request.url.path == "/api/clients" else {}
        except InputError as error:
            return Response(_encode({"error": str(error)}), 400, media_type="application/json")
        if "descending" in wanted:
            wanted["order"] = "desc" if wanted.pop("descending") else "asc"
        found = await relay.ask(request.url.path, **wanted)
        # How old the news are is told against the clock that wrote them.
        headers = {"date": found.date} if found.date else {}
        if found.tag:
            tagged = _tagged(request, found.tag, lambda: found.body)
            tagged.headers.update(headers)
            return tagged
        return Response(found.body, found.status, headers | {"content-type": found.kind})

    return [Route(path, answer) for path in ("/api/state", "/api/clients", "/metrics", "/healthz")]


def _wanted(request: Request) -> dict[str, Any]:
    """What `/api/clients?...` asks for. Raises `InputError`."""
    given = request.query_params
    wanted: dict[str, Any] = {"search": given.get("search", "")[:100]}
    if "sort" in given:
        wanted["sort"] = given["sort"]
    if "order" in given:
        if given["order"] not in ("asc", "desc"):
            raise InputError(f"order='{given['order'][:40]}' is unknown: write asc or desc")
        wanted["descending"] = given["order"] == "desc"
    for name in ("offset", "limit"):
        text = given.get(name)
        if text is not None:
            if not (text.isascii() and text.isdigit() and len(text) < 10):
                raise InputError(f"{name}='{text[:40]}' is no number: write 0 or more")
            wanted[name] = int(text)
    return wanted


def _tagged(request: Request, tag: str, body: Callable[[], bytes]) -> Response:
    """JSON with its tag; nothing but the tag for who has it already."""
    from starlette.responses import Response

    headers = {"etag": tag}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(body(), media_type="application/json", headers=headers)


def _file(path: Path) -> Callable[[Request], Response]:
    from starlette.responses import Response

    body, kind = path.read_bytes(), _KINDS[path.suffix]

    def answer(_: Request) -> Response:
        return Response(body, media_type=kind)

    return answer


class _Guard:
    """Refuses requests that name another host (a page elsewhere found its way here), and sets what browsers obey."""

    def __init__(self, app: ASGIApp, hosts: frozenset[str]) -> None:
        self._app, self._hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                extra = [(key.encode(), value.encode()) for key, value in _HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *extra]}
            await send(message)

        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif self._hosts and _host(scope) not in self._hosts:
            from starlette.responses import PlainTextResponse

            await PlainTextResponse("this server goes by another name", 421)(scope, receive, guarded)
        else:
            await self._app(scope, receive, guarded)


def _host(scope: Scope) -> str | None:
    named = next((value for key, value in scope["headers"] if key == b"host"), b"").decode("latin-1")
    try:
        return urlsplit(f"//{named}").hostname
    except ValueError:
        return None


def _encode(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), allow_nan=False, ensure_ascii=True).encode()


class JsonLines(logging.Formatter):
    """A line of the server's log as a JSON object."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {"time": round(record.created, 3), "level": record.levelname.lower()}
        if record.name == "uvicorn.access" and isinstance(record.args, tuple) and len(record.args) == 5:
            names = ("peer", "method", "path", "http", "status")
            line |= {"event": "request", **dict(zip(names, record.args, strict=True))}
        else:
            line |= {"event": "server", "message": record.getMessage()}
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there; port 0 is any free one. Raises `InputError` where that cannot be."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.create_server(address[:2], family=family, backlog=128)
    except OSError as error:
        name = isinstance(error, socket.gaierror)
        why = error.strerror if name else os.strerror(error.errno or 0)
        remedy = "name an address of this machine" if name else "choose another --port, or 0 for any"
        raise InputError(f"--host {host} --port {port} cannot be listened at ({why}): {remedy}") from None
    return found


def serve(source: Live | Relay, listening: socket.socket, *, log_json: bool = False) -> None:
    """Serve until SIGINT or SIGTERM. On loopback only requests to it by such a name are answered."""
    import uvicorn

    address = listening.getsockname()[0]
    hosts = _LOOPBACK if address in _LOOPBACK else ()
    formatter = {"()": JsonLines} if log_json else {"format": "%(message)s"}
    logs = {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"line": formatter},
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line"}},
        "root": {"handlers": ["stderr"], "level": "WARNING"},
        "loggers": {"uvicorn": {"level": "INFO" if log_json else "WARNING"}},
    }
    config = uvicorn.Config(
        application(source, hosts),
        log_config=logs,
        access_log=log_json,
        server_header=False,
        date_header=isinstance(source, Live),
        timeout_graceful_shutdown=3,
        ws="none",
    )
    uvicorn.Server(config).run(sockets=[listening])
