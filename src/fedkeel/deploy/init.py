"""Writes everything that a federation needs on its hosts: settings, certificates, keys, units, a compose file."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import fedkeel
from fedkeel import plugins
from fedkeel.config import Attack, Devices, Job
from fedkeel.core.errors import InputError
from fedkeel.deploy import control, keys
from fedkeel.deploy.folder import NodeFile, Peer, ServerFile, to_toml
from fedkeel.ship import files
from fedkeel.world.federation import Federation
from fedkeel.world.record import kept

_HOST = re.compile(r"(?=.{1,253}$)[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?)*")
_CLIENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_UNIT = """[Unit]
Description=fedkeel {what}
After=network-online.target
Wants=network-online.target

[Service]
ExecStart={python} -m fedkeel {command} /etc/fedkeel/{folder}
Restart=on-failure
RestartSec=5
# Status 2: its input is wrong, and starting it anew would not help.
RestartPreventExitStatus=2
User=fedkeel
NoNewPrivileges=true
ProtectSystem=strict
ProtectHome=true
PrivateTmp=true
ReadWritePaths=/etc/fedkeel/{folder}

[Install]
WantedBy=multi-user.target
"""
_COMPOSE = """# For `deploy init --host server`: nodes reach the server by the name of its service.
# Build the image from any Python 3.11+ with `pip install "fedkeel[deploy]=={version}"`, and name it here.
services:
  server:
    image: ${{FEDKEEL_IMAGE:-fedkeel:{version}}}
    command: ["fedkeel", "server", "/federation"]
    volumes: ["./server:/federation"]
    ports: ["{port}:{port}"]
    restart: on-failure
"""
_COMPOSE_NODE = """  {client}:
    image: ${{FEDKEEL_IMAGE:-fedkeel:{version}}}
    command: ["fedkeel", "client", "/federation"]
    volumes: ["./nodes/{client}:/federation"]
    restart: on-failure
"""


class Written(NamedTuple):
    """What `write` made of a job."""

    folder: Path
    clients: tuple[str, ...]
    left_out: tuple[str, ...]
    """Sections of the job that are for simulation alone."""


def write(job: Job, folder: Path, *, host: str = "127.0.0.1", port: int = 9092, nodes: int | None = None) -> Written:
    """The folders of a federation of `nodes` clients; of as many as the job has when left out.

    `host` is the name or address that nodes reach the server by. Raises `InputError` for a job that can not be
    deployed, or a folder that is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"'{folder}' holds something already: choose an empty or a new folder")
    texts = plugins.read(job.plugins)
    plugins.load(job.plugins)
    job, left_out, kinds = _deployable(job, nodes)
    clients = tuple(kinds)
    _check_place(host, port, clients)
    reached = f"[{host}]" if ":" in host else host
    try:
        folder.mkdir(parents=True, exist_ok=True)
        authority = _authority(job.name, folder)
        key, certificate = authority.issue(list(dict.fromkeys([host, "localhost", "127.0.0.1"])))
        peers = {}
        near = host in ("127.0.0.1", "localhost")
        poll = max(0.2, 0.02 * len(clients)) if near else 1.0  # all nodes ask one processor here
        for number, client in enumerate(clients):
            private, public = keys.node_key()
            peers[client] = Peer(key=public, device=kinds[client])
            settings = NodeFile(client=client, server=f"{reached}:{port}", port=port + 2 + number, poll=poll)
            place = _host(folder / "nodes" / client, job, texts, authority)
            files.write_text(place / "node.toml", to_toml(settings))
            keys.write_private(place / "node.key", private)
        place = _host(folder / "server", job, texts, authority)
        keys.write_private(place / "server.key", key)
        (place / "server.crt").write_bytes(certificate)
        listen = "127.0.0.1" if near else "0.0.0.0"
        settings_of = ServerFile(name=job.name, host=listen, port=port, control_port=port + 1, nodes=peers)
        files.write_text(place / "server.toml", to_toml(settings_of))
        _around(folder, job.name, clients, port)
    except OSError as error:
        raise InputError(f"'{folder}' can not be written ({error.strerror}): choose another folder") from None
    return Written(folder, clients, left_out)


def _check_place(host: str, port: int, clients: Sequence[str]) -> None:
    """Refuse what can be no address, and names that can be no folders."""
    if not _HOST.fullmatch(host) and not _is_address(host):
        raise InputError(f"--host '{host}' is neither a name nor an address: write it as federation.example.org")
    if (last := port + 1 + len(clients)) > 65535:
        raise InputError(f"--port {port} leaves no port for {len(clients)} nodes, up to {last}: choose a lower one")
    for client in clients:
        if not _CLIENT.fullmatch(client) or client in ("server", "dashboard") or client.startswith("nodes-"):
            raise InputError(
                f"client '{client[:40]}' can be no folder and no service: name clients by letters, digits, '-', '_' "
                "and '.', and not server, dashboard or nodes-..."
            )


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _deployable(job: Job, nodes: int | None) -> tuple[Job, tuple[str, ...], dict[str, str]]:
    """The job as hosts run it, what of it is for simulation alone, and each client's class of device."""
    if job.data.pooled:
        raise InputError("data.pooled puts all examples in one place, where nothing is deployed: leave it out")
    if nodes is not None and nodes != job.data.clients:
        cohort = job.select.cohort
        fewer = job.select.model_copy(update={"cohort": None if cohort is None else min(cohort, nodes)})
        job = job.model_copy(update={"data": job.data.model_copy(update={"clients": nodes}), "select": fewer})
    left_out = tuple(n for n, d in (("attack", Attack()), ("devices", Devices())) if getattr(job, n) != d)
    federation = Federation.of(job.model_copy(update={"attack": Attack()}))
    if federation.alone:
        raise InputError("model.private keeps every layer on the client, so that nothing would travel: share some")
    register = federation.devices.register
    kinds = {client: register.device(client) for client in federation.names}
    record = job.record.model_copy(update={"checkpoint_every": 1})
    return job.model_copy(update={"attack": Attack(), "devices": Devices(), "record": record}), left_out, kinds


def _authority(name: str, folder: Path) -> keys.Authority:
    authority = keys.Authority(name)
    place = folder / "authority"
    place.mkdir(mode=0o700)
    authority.write(place)
    return authority


def _host(place: Path, job: Job, texts: dict[str, str], authority: keys.Authority) -> Path:
    """A host's folder, with what all hosts have."""
    place.mkdir(parents=True, mode=0o700)
    for name, text in texts.items():
        (place / "plugins").mkdir(exist_ok=True)
        files.write_text(place / "plugins" / name, text)
    files.write_text(place / "job.toml", kept(job, texts).to_toml())
    (place / "ca.crt").write_bytes(authority.certificate)
    keys.write_private(place / "secret", keys.secret())
    return place


def _around(folder: Path, name: str, clients: Sequence[str], port: int) -> None:
    """What starts it elsewhere: systemd units, a compose file, a Flower app."""
    python, version = "/opt/fedkeel/bin/python", fedkeel.__version__
    (folder / "systemd").mkdir()
    server = _UNIT.format(what="server", python=python, command="server", folder="server")
    files.write_text(folder / "systemd" / "fedkeel-server.service", server)
    node = _UNIT.format(what="node", python=python, command="client", folder="node")
    files.write_text(folder / "systemd" / "fedkeel-client.service", node)
    compose = _COMPOSE.format(version=version, port=port)
    compose += "".join(_COMPOSE_NODE.format(version=version, client=client) for client in clients)
    files.write_text(folder / "compose.yaml", compose)
    (folder / "flower").mkdir()
    files.write_text(folder / "flower" / "pyproject.toml", control.APP.format(name=name, version=version))
    files.write_text(folder / "flower" / "app.py", control.CODE)
