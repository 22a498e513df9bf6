"""The example on real processes: Flower's SuperLink and SuperNodes, `flwr run`, and one node that lies."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from deployed import free_ports

import fedkeel
from fedkeel.core.errors import FedkeelError
from fedkeel.deploy import process

pytestmark = pytest.mark.filterwarnings("default")  # Flower's own dependencies warn

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "flower_dropin"
LIAR = '''"""A mod that breaks what the third node sends: its envelope first, then weights that are NaN, in full."""

import torch
from flwr.app import ArrayRecord, RecordDict


def lie(message, context, call_next):
    reply = call_next(message, context)
    if context.node_config["partition-id"] != 2:
        return reply
    if message.content["config"]["server-round"] == 1:
        envelope = reply.content["fedkeel.update"]["envelope"]
        envelope.data = envelope.data[:-1] + bytes([envelope.data[-1] ^ 1])
    else:
        state = {name: value * torch.nan for name, value in message.content["arrays"].to_torch_state_dict().items()}
        reply.content = RecordDict({"arrays": ArrayRecord(state)})
    return reply
'''


class Processes:
    """What runs beside the test, and its end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[subprocess.Popen[bytes]] = []
        tools = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
        self.environment = {**os.environ, **process.QUIET, "FLWR_HOME": str(folder / "home"), "PATH": tools}

    def start(self, *command: str) -> None:
        with (self.folder / "all.log").open("ab") as log:
            self.started.append(
                subprocess.Popen(
                    command, stdout=log, stderr=log, env=self.environment, cwd=self.folder, start_new_session=True
                )
            )

    def wait(self, holds: Callable[[], bool], seconds: float = 300.0) -> None:
        until = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < until, self.log()[-6000:]
            time.sleep(0.2)

    def log(self) -> str:
        return (self.folder / "all.log").read_text(errors="replace")

    def end(self) -> None:
        for started in self.started:
            if started.poll() is None:
                started.terminate()
        for started in self.started:
            try:
                started.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(started.pid, signal.SIGKILL)
                started.wait()


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    found = Processes(tmp_path)
    yield found
    found.end()


def rounds(path: Path) -> int:
    try:
        return fedkeel.Run(path).state.round
    except FedkeelError:
        return 0


def test_the_example_runs_on_a_real_network_with_one_node_that_lies(tmp_path: Path, processes: Processes) -> None:
    shutil.copytree(EXAMPLE, tmp_path / "app")
    client = tmp_path / "app" / "digits" / "client_app.py"
    text = client.read_text()
    assert "mods=[seal]" in text
    client.write_text(f"from digits.liar import lie\n{text.replace('mods=[seal]', 'mods=[lie, seal]')}")
    (tmp_path / "app" / "digits" / "liar.py").write_text(LIAR)
    port = free_ports(4)
    (tmp_path / "home").mkdir()
    link = f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    (tmp_path / "home" / "config.toml").write_text(link)
    processes.start("flower-superlink", "--insecure", "--port", str(port), "--disable-runtime-dependency-installation")
    for node in range(3):
        where = ("--superlink", f"127.0.0.1:{port}", "--port", str(port + 1 + node))
        told = ("--node-config", f"partition-id={node} num-partitions=3")
        processes.start("flower-supernode", "--insecure", *where, *told)
    processes.wait(lambda: processes.log().count("Activated node_id") == 3)
    settings = f'num-server-rounds=2 fraction-evaluate=0.0 run="{tmp_path / "run"}"'
    processes.start("flwr", "run", str(tmp_path / "app"), "here", "--run-config", settings)
    processes.wait(lambda: rounds(tmp_path / "run") == 2)
    run = fedkeel.Run(tmp_path / "run")
    assert [row["skipped"] for row in run.rounds] == [None, None]
    for round in (1, 2):
        rows = [row for row in run.updates if row["round"] == round]
        assert sum(row["weight"] > 0 for row in rows) == 2
        (refused,) = [row["reason"] for row in rows if row["weight"] == 0]
        assert ("the payload does not match its digest" if round == 1 else "its weights in full") in refused
    used = [row for row in run.updates if row["weight"] > 0]
    assert {row["num_examples"] for row in used} == {479}
    assert all(row["bytes_up"] < 18_000 for row in used)  # of 69,000 in float32
