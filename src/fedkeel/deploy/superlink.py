"""Flower's SuperLink with its doors shut: nodes reach the Fleet API alone, all else is on loopback, behind a secret.

Flower 1.41 serves its Fleet, Control and Runtime API on one port, and its open-source Control API (which registers
nodes, and starts runs whose code goes to all nodes) asks for no credential.
"""

from __future__ import annotations

import asyncio
import errno
import hmac
import logging
import sqlite3
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import uvicorn
from flwr.common.constant import ACCESS_TOKEN_KEY, ISOLATION_MODE_PROCESS, TRANSPORT_TYPE_GRPC_RERE
from flwr.supercore.auth.typing import AccountInfo
from flwr.supercore.http_logging import get_uvicorn_log_config
from flwr.supercore.logger import console_handler
from flwr.superlink.auth_plugin import NoOpControlAuthnPlugin
from flwr.superlink.cli.flower_superlink import SuperLinkLifespan
from flwr.superlink.config_loader import SuperLinkLifespanConfig
from flwr.superlink.main import create_app
from sqlalchemy.exc import OperationalError
from starlette.middleware.base import RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import Response

_log = logging.getLogger("fedkeel")
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO})
_SQLITE = frozenset({sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED})
FLEET = "/v1/fleet/"
MOST_BYTES = 16 * 2**20
"""Of a request from outside: Flower cuts messages into parts of five million bytes."""
_Message = MutableMapping[str, Any]
_Translate = Callable[[Request, RequestResponseEndpoint], Awaitable[Response]]
_App = Callable[[_Message, Callable[[], Awaitable[_Message]], Callable[[_Message], Awaitable[None]]], Awaitable[None]]


class Link(NamedTuple):
    """Where a SuperLink listens, and what it holds."""

    host: str
    port: int
    control_port: int
    """On loopback: Control and Runtime API."""
    certificate: Path
    key: Path
    authority: Path
    secret: Path
    """Of those who may start runs and register nodes, and of the processes that take up tasks."""
    database: Path


class SecretAccount(NoOpControlAuthnPlugin):
    """Who shows the secret is the one account that there is."""

    def __init__(self, secret: bytes) -> None:
        super().__init__()
        self._secret = secret

    def validate_tokens_in_metadata(
        self, metadata: Sequence[tuple[str, str | bytes]]
    ) -> tuple[bool, AccountInfo | None]:
        shown = next((value for name, value in metadata if name == ACCESS_TOKEN_KEY), "")
        said = shown.encode() if isinstance(shown, str) else shown
        if not hmac.compare_digest(said, self._secret):
            return False, None
        found: tuple[bool, AccountInfo | None] = super().validate_tokens_in_metadata(metadata)
        return found


def only_fleet(app: _App) -> _App:
    """The ASGI app for those outside: every path but the Fleet API's does not exist."""

    async def door(
        scope: _Message, receive: Callable[[], Awaitable[_Message]], send: Callable[[_Message], Awaitable[None]]
    ) -> None:
        if scope["type"] != "http":
            return
        # `raw_path` is what was sent: no decoding makes another path of it behind this door.
        if not scope["path"].startswith(FLEET) or b"%" in scope.get("raw_path", b""):
            await _refuse(send, 404)
            return
        # Flower reads a request in full before it looks at who sent it.
        length = dict(scope["headers"]).get(b"content-length", b"")
        if not length.isdigit() or int(length) > MOST_BYTES:
            await _refuse(send, 413 if length.isdigit() else 411)
            return
        await app(scope, receive, send)

    return door


async def _refuse(send: Callable[[_Message], Awaitable[None]], status: int) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"connection", b"close")]})
    await send({"type": "http.response.body", "body": b""})


def serve(link: Link) -> None:
    """Run until a signal comes."""
    secret = link.secret.read_bytes()
    certificates = link.authority.read_bytes(), link.certificate.read_bytes(), link.key.read_bytes()
    config = SuperLinkLifespanConfig(
        control_address=f"127.0.0.1:{link.control_port}",
        health_server_address=None,
        host="127.0.0.1",
        port=link.control_port,
        insecure=False,
        certificates=certificates,
        superexec_auth_secret=secret,
        authn_plugin=SecretAccount(secret),
        event_log_plugin=None,
        fleet_event_log_plugin=None,
        enable_event_log=False,
        artifact_provider=None,
        enable_supernode_auth=True,
        fleet_api_type=TRANSPORT_TYPE_GRPC_RERE,
        fleet_api_address=None,
        simulation=False,
        ssl_ca_certfile=str(link.authority),
        ssl_certfile=str(link.certificate),
        ssl_keyfile=str(link.key),
        database=str(link.database),
        isolation=ISOLATION_MODE_PROCESS,
        runtime_dependency_install=False,
    )
    app = create_app(config, SuperLinkLifespan)
    inner = _listener(app, "127.0.0.1", link.control_port, link, "on")
    outer = _listener(only_fleet(app), link.host, link.port, link, "off")

    async def both() -> None:
        await asyncio.gather(inner.serve(), outer.serve())

    asyncio.run(both())


def lasting(translate: _Translate) -> _Translate:
    """Flower's answer to what goes wrong, but where nothing could be written, as on a full disk: who asked tries again
    later. Flower's own answer, 500, would end them.
    """

    async def answer(request: Request, call_next: RequestResponseEndpoint) -> Response:
        async def called(request: Request) -> Response:
            try:
                return await call_next(request)
            except (OSError, OperationalError) as error:
                if not _passes(error):
                    raise
                _log.error("%s could not be carried out, for now: %s", request.url.path, error)
                return Response(status_code=503)

        return await translate(request, called)

    return answer


def _passes(error: OSError | OperationalError) -> bool:
    """Whether it is for want of room, or of a lock."""
    if isinstance(error, OSError):
        return error.errno in _NO_ROOM
    return getattr(error.orig, "sqlite_errorcode", 0) & 0xFF in _SQLITE


def _listener(app: _App, host: str, port: int, link: Link, lifespan: Any) -> uvicorn.Server:
    return uvicorn.Server(
        uvicorn.Config(
            app,
            host=host,
            port=port,
            ssl_certfile=str(link.certificate),
            ssl_keyfile=str(link.key),
            log_config=get_uvicorn_log_config(console_handler.level),
            access_log=False,
            lifespan=lifespan,
        )
    )
