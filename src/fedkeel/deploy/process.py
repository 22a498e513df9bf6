"""The processes of a host: `python -m fedkeel.deploy.process ROLE FOLDER...` is one, a `Supervisor` keeps several.

server:  superlink (Flower's, its doors shut) and head (the coordinator)
client:  supernode (Flower's) for every folder, and one worker that trains for them all
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from fedkeel.core.errors import FedkeelError, InputError

QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "OMP_NUM_THREADS": "1"}
"""Nothing is told to anybody, and one thread a worker."""
_PR_SET_PDEATHSIG = 1
_REST, _MOST_REST = 0.25, 8.0
_MOST_FAILURES = 10


class Child(NamedTuple):
    """A process to keep: its name in the log, and its command line."""

    name: str
    command: Sequence[str]


class Supervisor:
    """Keeps processes running: what dies is started anew."""

    def __init__(self, children: Sequence[Child], *, core: str | None = None, until: str | None = None) -> None:
        """`core`: the child without which the others can not go on: they are started anew with it. `until`: the child
        whose end with exit status 0 is the end of all.
        """
        self._children = children
        self._core = core
        self._until = until
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._stopped = False

    def run(self) -> int:
        """Until a signal comes (0), or the child `until` is done (0) or gives up with status 2 (2)."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        rest, since, failures = _REST, time.monotonic(), 0
        try:
            while not self._stopped:
                for child in self._children:
                    if child.name not in self._running:
                        self._running[child.name] = _started(child.command)
                time.sleep(0.2)
                ended = {name: found for name, p in self._running.items() if (found := p.poll()) is not None}
                if self._until in ended and ended[self._until] in (0, 2):
                    return ended[self._until]
                if ended and self._until is not None:  # nodes wait for their server, however long
                    failures = 1 if time.monotonic() - since > 60 else failures + 1
                    if failures == _MOST_FAILURES:
                        _say(f"{', '.join(ended)} failed, the {failures}th time in a row: see above")
                        return 1
                if ended and not self._stopped:
                    rest = _REST if time.monotonic() - since > 60 else min(2 * rest, _MOST_REST)
                    since = time.monotonic()
                    for name, status in ended.items():
                        _say(f"{name} ended with status {status}; it is started anew in {rest:g} s")
                    for name in list(self._running) if self._core in ended else list(ended):
                        _end(self._running.pop(name))
                    self._rest(rest)
            return 0
        finally:
            for process in self._running.values():
                process.terminate()
            for process in self._running.values():
                _end(process)

    def _rest(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self._stopped:
            time.sleep(0.1)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._stopped = True


def _say(text: str) -> None:
    with suppress(OSError):  # the log's disk may be full
        print(f"fedkeel: {text}", file=sys.stderr, flush=True)  # noqa: T201


def _started(command: Sequence[str]) -> subprocess.Popen[bytes]:
    # Flower's own dependencies warn: who turns warnings into errors does not mean them.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}
    return subprocess.Popen(command, env={**environment, **QUIET}, preexec_fn=_die_with_parent)


def _die_with_parent() -> None:
    """Linux ends the child when its parent is gone, however that came."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _end(process: subprocess.Popen[bytes], seconds: float = 5.0) -> None:
    process.terminate()
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def own(role: str, *folders: Path) -> list[str]:
    """The command line of a process of ours."""
    return [sys.executable, "-m", "fedkeel.deploy.process", role, *map(str, folders)]


def server(folder: Path) -> Supervisor:
    """What keeps a server; it ends when the federation is over."""
    roles = [Child("superlink", own("superlink", folder)), Child("head", own("head", folder))]
    return Supervisor(roles, until="head")


def client(folders: Sequence[Path]) -> Supervisor:
    """What keeps the nodes of these folders, for ever."""
    from fedkeel.deploy.folder import NodeFolder

    found = map(NodeFolder, folders)
    nodes = [Child(f"supernode of {folder.settings.client}", own("supernode", folder.path)) for folder in found]
    # A worker that died had a task, which its SuperNode would hold for a minute.
    return Supervisor([Child("worker", own("worker", *folders)), *nodes], core="worker")


def _supernode(folder: Path) -> None:
    """Flower's SuperNode, which looks for work as often as node.toml says."""
    from flwr.supernode.cli import flower_supernode

    from fedkeel.deploy import flower
    from fedkeel.deploy.folder import NodeFolder

    found, settings = NodeFolder(folder), NodeFolder(folder).settings
    flower.supernode(settings.poll)
    sys.argv = ["flower-supernode", "--superlink", settings.server, "--root-certificates", str(found.authority)]
    sys.argv += ["--auth-supernode-private-key", str(found.key), "--isolation", "process"]
    sys.argv += ["--host", "127.0.0.1", "--port", str(settings.port)]
    sys.argv += ["--superexec-auth-secret-file", str(found.secret)]
    flower_supernode()


def _superlink(folder: Path) -> None:
    from fedkeel.deploy import flower, superlink
    from fedkeel.deploy.folder import ServerFolder

    found, settings = ServerFolder(folder), ServerFolder(folder).settings
    files = found.path / "server.crt", found.path / "server.key", found.authority, found.secret
    flower.superlink()
    database = found.path / "superlink.db"
    superlink.serve(superlink.Link(settings.host, settings.port, settings.control_port, *files, database))


def _head(folder: Path) -> None:
    from flwr.supercore.constant import TaskType

    from fedkeel.deploy import flower, head, worker
    from fedkeel.deploy.control import Control
    from fedkeel.deploy.folder import ServerFolder

    found = ServerFolder(folder)
    settings, address, secret = found.settings, f"127.0.0.1:{found.settings.control_port}", found.secret.read_bytes()
    control = Control(address, secret, found.authority)
    control.register({name: peer.key for name, peer in settings.nodes.items()})
    control.stop_all()
    control.start(settings.name)
    control.close()
    flower.head()
    runtime = worker.Runtime(address, secret, found.authority)
    client = runtime.client()
    while (token := worker.acquire(client, TaskType.SERVER_APP)) is None:
        time.sleep(worker.POLL)
    worker.preside(runtime, token, lambda grid, _: head.preside(found, grid))


def _worker(*folders: Path) -> None:
    from fedkeel.deploy import flower, worker
    from fedkeel.deploy.folder import NodeFolder
    from fedkeel.deploy.node import Reluctant

    found = [NodeFolder(folder) for folder in folders]
    runtimes = [worker.Runtime(f"127.0.0.1:{f.settings.port}", f.secret.read_bytes(), None) for f in found]
    nodes = [Reluctant(folder) for folder in found]
    for node in nodes:
        node.prepare()
    flower.worker()
    worker.serve(list(zip(runtimes, nodes, strict=True)))


ROLES: dict[str, Callable[..., None]] = {
    "superlink": _superlink,
    "head": _head,
    "supernode": _supernode,
    "worker": _worker,
}


def main(role: str, *folders: str) -> int:
    """One process. Exit status 2: the input is wrong, and starting it anew would not help."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.getLogger("fedkeel").addHandler(handler)
    try:
        ROLES[role](*map(Path, folders))
    except FedkeelError as error:
        _say(str(error))
        return 2 if isinstance(error, InputError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
