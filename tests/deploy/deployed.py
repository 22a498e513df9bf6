"""A deployment on loopback for tests: real SuperLink, SuperNodes, processes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import fedkeel
from fedkeel.deploy import init, process
from fedkeel.deploy.local import Local

HERE = Path(__file__).parent


def free_ports(count: int) -> int:
    """The first of so many ports in a row that nobody listens at."""
    for base in range(20_000 + os.getpid() % 400 * 64, 60_000, 64):
        with ExitStack() as held:
            try:
                for port in range(base, base + count):
                    held.enter_context(socket.create_server(("127.0.0.1", port)))
            except OSError:
                continue
        return base
    raise RuntimeError("no ports are free")


class Deployed:
    """One deployment, its processes started one by one."""

    def __init__(self, folder: Path, job: fedkeel.Job) -> None:
        self.port = free_ports(job.data.clients + 2)
        init.write(job, folder, port=self.port)
        self.folder = folder
        self.local = Local(folder)
        self._started: list[subprocess.Popen[bytes]] = []

    def start(self, *command: str) -> subprocess.Popen[bytes]:
        environment = {**os.environ, **process.QUIET, "FLWR_HOME": str(self.folder / "flwr")}
        with (self.folder / "all.log").open("ab") as log:
            started = subprocess.Popen(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment, start_new_session=True
            )
        self._started.append(started)
        return started

    def server(self) -> subprocess.Popen[bytes]:
        return self.start(sys.executable, "-m", "fedkeel", "server", str(self.folder / "server"))

    def node(self, *clients: str) -> subprocess.Popen[bytes]:
        folders = [str(self.folder / "nodes" / client) for client in clients]
        return self.start(sys.executable, "-m", "fedkeel", "client", *folders)

    def hostile(self, kinds: Mapping[str, str]) -> None:
        """Nodes, client -> kind, whose common worker is not ours."""
        folders = {client: self.folder / "nodes" / client for client in kinds}
        for folder in folders.values():
            self.start(*process.own("supernode", folder))
        told = [f"{kind}={folders[client]}" for client, kind in kinds.items()]
        self.start(sys.executable, str(HERE / "hostile.py"), *told)

    def lossy(self, share: float, *clients: str) -> None:
        """Honest nodes whose connections lose a share of the server's answers."""
        folders = [str(self.folder / "nodes" / client) for client in clients]
        for folder in folders:
            self.start(sys.executable, str(HERE / "lossy.py"), str(share), folder)
        self.start(*process.own("worker", *map(Path, folders)))

    def pid(self, role: str, part: str = "") -> int:
        """The process of a role, by its command line."""
        found = subprocess.run(
            ["pgrep", "-f", f"fedkeel.deploy.process {role} {self.folder}.*{part}"], capture_output=True, check=False
        )
        return int(found.stdout.split()[0])

    def kill(self, role: str, part: str = "", number: int = signal.SIGKILL) -> None:
        os.kill(self.pid(role, part), number)

    @property
    def round(self) -> int:
        standing = self.local.standing(1)
        return standing.round if standing else 0

    def wait(self, holds: Callable[[], bool], seconds: float = 240.0) -> None:
        until = time.monotonic() + seconds
        while not holds():
            if time.monotonic() > until:
                text = (self.folder / "all.log").read_text(errors="replace")
                raise AssertionError(f"waited for {seconds} s in vain; the log ends:\n{text[-6000:]}")
            time.sleep(0.1)

    def end(self) -> None:
        for started in self._started:
            if started.poll() is None:
                started.terminate()
        for started in self._started:
            try:
                started.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(started.pid, signal.SIGKILL)
                started.wait()


@contextmanager
def deployed(folder: Path, job: fedkeel.Job) -> Iterator[Deployed]:
    found = Deployed(folder, job)
    try:
        yield found
    finally:
        found.end()


def claims(rows: Sequence[dict[str, object]]) -> list[tuple[object, object]]:
    """(round, client) of the updates that were used."""
    return [(row["round"], row["client"]) for row in rows if row["stage"] is None]
