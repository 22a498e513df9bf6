"""A whole deployment on one host: start it, watch it, look at it, stop it."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fedkeel.core.errors import InputError, InterruptedRunError, RunError
from fedkeel.core.types import LOST
from fedkeel.deploy.folder import NodeFolder, ServerFolder
from fedkeel.ship import files
from fedkeel.ship.rundir import RunDir
from fedkeel.world.record import Progress, Watcher

SERVER, PAGE = "server", "dashboard"
_MARK = "-m fedkeel"


class Process(NamedTuple):
    """A process of the deployment, as it was started."""

    name: str
    pid: int
    alive: bool
    log: Path


class Local:
    """A folder that `deploy init` wrote, and its processes on this host."""

    def __init__(self, folder: Path | str) -> None:
        """Raises `InputError` where there is no deployment."""
        self.folder = Path(folder)
        self.server = ServerFolder(self.folder / "server")
        self._own: list[subprocess.Popen[bytes]] = []
        self._said: dict[str, int] = {}
        self._book = self.folder / "processes.json"

    @property
    def run(self) -> Path:
        """The directory of the record."""
        return self.server.run

    @property
    def done(self) -> bool:
        """Whether the federation is over, its report written."""
        return (self.run / "model" / "card.json").is_file() and (self.run / "report.html").is_file()

    def start(self, *, apart: bool = False, page: bool = False) -> None:
        """Start what is not running: the server, and the nodes, as many to a process as keeps the processors busy.

        `apart`: every node has processes of its own. `page`: start the live page too, where its extra is installed.
        """
        if self.done:
            raise InputError(f"the federation in '{self.folder}' is over: look at {self.run / 'report.html'}")
        running = {process.name for process in self.processes() if process.alive}
        nodes = sorted((self.folder / "nodes").iterdir())
        count = len(nodes) if apart else min(os.cpu_count() or 1, len(nodes))
        parts = [nodes[i::count] for i in range(count)]
        wanted: dict[str, list[str]] = {SERVER: ["server", str(self.server.path)]}
        for number, part in enumerate(parts):
            name = NodeFolder(part[0]).settings.client if apart else f"nodes-{number}"
            wanted[name] = ["client", *map(str, part)]
        if others := running - wanted.keys() - {PAGE}:
            raise InputError(
                f"the nodes of '{self.folder}' run already, in other processes ({', '.join(sorted(others))}): end them "
                f"with `fedkeel deploy stop {self.folder}`, or start them the same way"
            )
        if page and PAGE not in running and importlib.util.find_spec("prometheus_client") is not None:
            self._log(PAGE).unlink(missing_ok=True)  # it says where it is
            wanted[PAGE] = ["dashboard", str(self.folder), "--port", "0"]
        (self.folder / "logs").mkdir(exist_ok=True)
        pids = {process.name: process.pid for process in self.processes() if process.alive}
        for name, command in wanted.items():
            if name not in running:
                pids[name] = self._spawn(name, command)
        files.write_text(self._book, json.dumps(pids))

    def page(self, seconds: float = 0.0) -> str | None:
        """Where the live page is, if it runs and has said so within some seconds."""
        until = time.monotonic() + seconds
        while any(process.alive for process in self.processes() if process.name == PAGE):
            found = re.search(r"http://\S+", self._log(PAGE).read_text(errors="replace"))
            if found is not None:
                return found[0]
            if time.monotonic() >= until:
                break
            time.sleep(0.1)
        return None

    def _spawn(self, name: str, command: Sequence[str]) -> int:
        with self._log(name).open("ab") as log:
            self._said[name] = log.tell()
            started = subprocess.Popen(
                [sys.executable, "-m", "fedkeel", *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._own.append(started)  # asked for its end, it leaves no zombie
        return started.pid

    def _log(self, name: str) -> Path:
        return self.folder / "logs" / f"{name}.log"

    def processes(self) -> list[Process]:
        """What was started, and whether it still runs."""
        try:
            pids: dict[str, int] = json.loads(self._book.read_text())
        except FileNotFoundError:
            return []
        return [Process(name, pid, _alive(pid), self._log(name)) for name, pid in sorted(pids.items())]

    def stop(self) -> int:
        """End all processes; how many there were."""
        found = [process for process in self.processes() if process.alive]
        for process in found:
            os.kill(process.pid, signal.SIGTERM)
        until = time.monotonic() + 20
        while any(_alive(process.pid) for process in found):
            time.sleep(0.1)
            if time.monotonic() > until:
                for process in found:
                    if _alive(process.pid):
                        os.killpg(process.pid, signal.SIGKILL)
                break
        for process_of_ours in self._own:
            process_of_ours.wait()
        self._book.unlink(missing_ok=True)
        return len(found)

    def watch(self, tell: Watcher | None = None, *, poll: float = 0.3) -> None:
        """Until the federation is over. Raises `InputError` or `RunError`, in the server's words, where it fails."""
        told, serving = -1, True
        rounds = self.server.job.rounds
        try:
            while not self.done:
                if not serving:
                    raise self._failure()
                told = self._tell(tell, rounds, told)
                serving = any(process.alive for process in self.processes() if process.name == SERVER)
                time.sleep(poll)
            self._tell(tell, rounds, told)
        except KeyboardInterrupt:
            raise InterruptedRunError(f"interrupted; go on with: fedkeel deploy resume {self.folder}") from None

    def _tell(self, tell: Watcher | None, rounds: int, told: int) -> int:
        """Tell of a round that was not told of; which was told of last."""
        found = self.standing(rounds)
        if tell is None or found is None or found.round <= told:
            return told
        tell(found)
        return found.round

    def _failure(self) -> InputError | RunError:
        """What the server said last, since it was started here."""
        log = self._log(SERVER).read_bytes() if self._log(SERVER).is_file() else b""
        lines = log[self._said.get(SERVER, 0) :].decode(errors="replace").splitlines()
        said = [line.removeprefix("fedkeel: ") for line in lines if line.startswith("fedkeel: ")]
        kind: type[InputError | RunError] = InputError if said and "started anew" not in said[-1] else RunError
        return kind(f"the server ended: {said[-1] if said else 'it said nothing'}; its log is {self._log(SERVER)}")

    def standing(self, rounds: int) -> Progress | None:
        """Where the federation stands; None before its first round began."""
        if not (self.run / "ledger.sqlite").is_file():
            return None
        try:
            with RunDir(self.run).ledger(readonly=True) as ledger:
                figures = ledger.query(
                    "SELECT name, value, low, high FROM metrics WHERE scope = 'global' "
                    "AND round = (SELECT max(round) FROM metrics WHERE scope = 'global')"
                )
                last = ledger.query("SELECT round, skipped FROM rounds ORDER BY round DESC LIMIT 1")
                number = last[0]["round"] if last else 0
                lost = ", ".join(f"'{stage}'" for stage in LOST)
                counts = ledger.query(
                    f"SELECT total(weight > 0) AS used, total(stage IS NOT NULL AND stage NOT IN ({lost})) AS refused "
                    "FROM updates WHERE round = ?",
                    number,
                )[0]
        except InputError:  # it is being made
            return None
        metrics: dict[str, Any] = {
            row["name"]: row["value"] if row["low"] is None else (row["value"], row["low"], row["high"])
            for row in figures
        }
        skipped = last[0]["skipped"] if last else None
        return Progress(self.run, number, rounds, metrics, int(counts["used"]), int(counts["refused"]), skipped)


def _alive(pid: int) -> bool:
    """Whether a process is there, is no zombie, and is one of ours: numbers are given again."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return False
    return state != "Z" and _MARK in command
