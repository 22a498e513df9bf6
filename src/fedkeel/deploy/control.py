"""What an operator asks of a SuperLink: let these nodes in, begin a run."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
from flwr.cli.build import build_fab_from_files
from flwr.common.constant import Status
from flwr.proto.control_pb2 import ListRunsRequest, RegisterNodeRequest, StartRunRequest, StopRunRequest
from flwr.proto.fab_pb2 import Fab
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

import fedkeel
from fedkeel.core.errors import RunError
from fedkeel.deploy import keys
from fedkeel.deploy.calls import patient

APP = """[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "{name}"
version = "{version}"
description = "A fedkeel federation."
license = "Apache-2.0"
dependencies = ["fedkeel[deploy]=={version}"]

[tool.flwr.app]
publisher = "fedkeel"

[tool.flwr.app.components]
serverapp = "app:server"
clientapp = "app:client"
"""
CODE = '''"""The folder that FEDKEEL_FOLDER names says what federation this is."""

from fedkeel.deploy import app

client = app.client
server = app.server
'''


class _Bearer:
    """Shows the secret with every request."""

    def __init__(self, secret: bytes) -> None:
        self._header = f"Bearer {secret.decode()}"

    def intercept(self, context: Any, call_next: Any) -> httpx.Response:
        context.request.headers["authorization"] = self._header
        response: httpx.Response = call_next(context)
        return response


class Control:
    """A SuperLink's Control API, for who has the secret."""

    def __init__(self, address: str, secret: bytes, authority: Path) -> None:
        self._client = ControlHttpClient.from_server_address(
            address,
            False,
            authority.read_bytes(),
            [RuntimeVersionHttpInterceptor(component_name="fedkeel"), _Bearer(secret)],
            retry_invoker=patient(),
        )

    def register(self, nodes: Mapping[str, str]) -> None:
        """Let nodes in: client -> its node's public key. Those who are in already stay."""
        for name, key in nodes.items():
            try:
                self._client.RegisterNode(RegisterNodeRequest(public_key=keys.public_bytes(key), name=name))
            except httpx.HTTPStatusError as error:
                if error.response.status_code != httpx.codes.PRECONDITION_FAILED:
                    raise

    def stop_all(self) -> None:
        """End the runs that are open: of servers that were killed. Nodes let go of their messages."""
        for number, run in self._client.ListRuns(ListRunsRequest()).run_dict.items():
            if run.status.status != Status.FINISHED:
                with suppress(httpx.HTTPStatusError):  # it ended in the meantime
                    self._client.StopRun(StopRunRequest(run_id=number))

    def start(self, name: str) -> int:
        """Begin a run, and return its number."""
        files = {"pyproject.toml": APP.format(name=name, version=fedkeel.__version__).encode(), "app.py": CODE.encode()}
        content, _ = build_fab_from_files(files)
        fab = Fab(hash_str=hashlib.sha256(content).hexdigest(), content=content)
        found = self._client.StartRun(StartRunRequest(fab=fab))
        if not found.HasField("run_id"):
            raise RunError("the SuperLink did not begin a run: see its log")
        return int(found.run_id)

    def close(self) -> None:
        """Hang up."""
        self._client.close()
