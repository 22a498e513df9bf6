"""What a deployment is on the disk: a folder for the server, one for every node, and what both must agree on.

    DIR/authority/     ca.key, ca.crt: issues the server's certificate; belongs in a safe place, no process reads ca.key
    DIR/server/        server.toml, job.toml, plugins/, server.key, server.crt, ca.crt, secret; run/ is the record
    DIR/nodes/NAME/    node.toml, job.toml, plugins/, node.key, ca.crt, secret; memory.safetensors is what it keeps
    DIR/flower/        a Flower app of the same federation, for an existing Flower installation
    DIR/systemd/, DIR/compose.yaml

Server and node folders hold all that their host needs: copy each to where it belongs.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fedkeel import plugins
from fedkeel.config import Job, load
from fedkeel.core.errors import InputError, nearest
from fedkeel.deploy import keys

Port = Annotated[int, Field(ge=1, le=65535)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
JOB = "job"
"""The loader of a deployment whose data is the job's own: every host makes it and keeps its client's part."""


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Peer(_File):
    """A node, as the server knows it."""

    key: str = Field(description="public key, as OpenSSH writes it; its messages must be signed with it")
    device: str = Field("all", description="class of its device, for selection by class")


class ServerFile(_File):
    """server.toml."""

    name: str = Field(description="name of the federation")
    host: str = Field("0.0.0.0", description="address to listen at for nodes")
    port: Port = Field(9092, description="port for nodes: they must reach it")
    control_port: Port = Field(9093, description="port on loopback, for starting runs")
    data: str = Field(JOB, description="test examples: 'job', or 'module:function' or 'file.py:function' giving (x, y)")
    patience: Seconds = Field(
        120.0, description="seconds that a round waits while no node is there, before it is skipped"
    )
    gather: Seconds = Field(60.0, description="seconds to wait for all nodes before the first round")
    probe: Seconds = Field(20.0, description="seconds of silence after which a node at work is asked for a sign")
    nodes: Mapping[str, Peer] = Field(description="client -> its node")

    @model_validator(mode="after")
    def _keys_differ(self) -> Self:
        owners: dict[str, str] = {}
        for client, peer in self.nodes.items():
            try:
                key = keys.public_bytes(peer.key)
            except ValueError:
                raise ValueError(f"the key of '{client}' is no public key as OpenSSH writes it") from None
            if (other := owners.setdefault(key.decode(), client)) != client:
                raise ValueError(f"'{client}' and '{other}' have the same key: give each node its own")
        return self


class NodeFile(_File):
    """node.toml."""

    client: str = Field(description="this client's name in the federation")
    server: str = Field(description="host:port of the server")
    port: Port = Field(9100, description="port on loopback, between the two processes of this node")
    poll: Seconds = Field(1.0, description="seconds between two looks for work, while there is none")
    data: str = Field(JOB, description="training examples: 'job', or 'module:function' or 'file.py:function'")


_Content = TypeVar("_Content", bound=_File)


class _Folder:
    """A folder with a job."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    @property
    def job(self) -> Job:
        """The federation's job, its plugins loaded."""
        job = load(self.path / "job.toml")
        plugins.load(job.plugins)
        return job

    @property
    def authority(self) -> Path:
        return self.path / "ca.crt"

    @property
    def secret(self) -> Path:
        """Shared by the processes of this host alone."""
        return self.path / "secret"


class ServerFolder(_Folder):
    """Where a server finds all that it needs."""

    def __init__(self, path: Path | str) -> None:
        """Raises `InputError` where there is no server.toml, or one that is not valid."""
        super().__init__(path)
        self.settings = _read(self.path / "server.toml", ServerFile)

    @property
    def run(self) -> Path:
        """The directory of the federation's record."""
        return self.path / "run"


class NodeFolder(_Folder):
    """Where a node finds all that it needs."""

    def __init__(self, path: Path | str) -> None:
        """Raises `InputError` where there is no node.toml, or one that is not valid."""
        super().__init__(path)
        self.settings = _read(self.path / "node.toml", NodeFile)

    @property
    def key(self) -> Path:
        return self.path / "node.key"

    @property
    def memory(self) -> Path:
        """What the client keeps between its tasks."""
        return self.path / "memory.safetensors"


def _read(path: Path, kind: type[_Content]) -> _Content:
    try:
        return kind.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise InputError(f"'{path}' does not exist: name a folder that `fedkeel deploy init` wrote") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"'{path}' can not be read ({error}): mend it, or write it anew") from None
    except ValidationError as error:
        raise InputError(f"{path}: {_sentence(error, kind)}") from None


def _sentence(error: ValidationError, kind: type[_File]) -> str:
    """What is wrong first; what is only missing last."""
    first = min(error.errors(), key=lambda found: found["type"] == "missing")
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"key '{key}' is unknown: {nearest(key, kind.model_fields)}"
    if first["type"] == "missing":
        return f"'{key}' is missing: add it, as `fedkeel deploy init` writes it"
    if not key:
        return str(first["msg"]).removeprefix("Value error, ")
    return f"{key} = {first['input']!r} is not valid: {first['msg'][0].lower()}{first['msg'][1:]}"


def to_toml(content: BaseModel) -> str:
    """With each key's description as a comment."""
    import tomli_w

    lines: list[str] = []
    tables: dict[str, Any] = {}
    for name, value in content.model_dump(mode="json").items():
        if isinstance(value, dict):
            tables[name] = value
        else:
            described = type(content).model_fields[name].description
            lines += [f"# {described}", tomli_w.dumps({name: value}).strip()]
    return "\n".join(lines) + "\n\n" + (tomli_w.dumps(tables) if tables else "")
