"""What a round costs on a network: fedkeel's deployment beside a bare Flower app with the same payload, on loopback.

`python benchmarks/deployment.py` takes some half an hour; figures lie in benchmarks/results/deployment.json.

Ours: TLS, node keys, a database on the disk, one step of training, evaluation, admission, ledger and checkpoint in
every round. Bare Flower: its defaults (no TLS, no keys, state in memory, a fresh process for every message), a
ClientApp that imports numpy and adds a number to what it was sent, FedAvg, no evaluation. Both on the same cores, one
after the other.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

import fedkeel
from fedkeel.deploy import init
from fedkeel.deploy.local import Local

RESULTS = Path(__file__).parent / "results" / "deployment.json"
CASES = ((1, (8,), 8), (10, (8,), 8), (50, (8,), 5), (3, (4900, 4900), 5))
"""Nodes, hidden units of the model, rounds."""
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "OMP_NUM_THREADS": "1"}
PROJECT = """[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "bare"
version = "1.0.0"
license = "Apache-2.0"
dependencies = []
[tool.flwr.app]
publisher = "bench"
[tool.flwr.app.components]
serverapp = "app:server"
clientapp = "app:client"
[tool.flwr.app.config]
nodes = 1
columns = 1
rounds = 1
out = ""
"""
APP = """import json
import time

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

client = ClientApp()
server = ServerApp()


@client.train()
def train(message, context):
    metrics = MetricRecord({"num-examples": 10})
    x = message.content["arrays"]["x"].numpy() + np.float32(1 + context.node_id % 97)  # else Flower would not send it
    return Message(RecordDict({"arrays": ArrayRecord({"x": Array(x)}), "metrics": metrics}), reply_to=message)


@server.main()
def main(grid, context):
    config, at = context.run_config, []
    nodes = int(config["nodes"])
    while len(list(grid.get_node_ids())) < nodes:
        time.sleep(0.1)

    def told(number, arrays):
        at.append(time.time())
        with open(config["out"], "w") as file:
            json.dump(at, file)

    arrays = ArrayRecord({"x": Array(np.random.default_rng(0).standard_normal(int(config["columns"]), np.float32))})
    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=nodes, min_available_nodes=nodes)
    strategy.start(grid, arrays, int(config["rounds"]), evaluate_fn=told)
    told(-1, None)
"""


class Memory:
    """The most resident memory of the processes below this one, by what they are, in MB; sampled."""

    def __init__(self, kinds: dict[str, str]) -> None:
        self.kinds, self.most = kinds, dict.fromkeys(kinds, 0.0)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._ended.wait(0.5):
            for process in psutil.process_iter(["cmdline", "memory_info"]):
                line, memory = " ".join(process.info["cmdline"] or ()), process.info["memory_info"]
                for kind, mark in self.kinds.items():
                    if mark in line and memory:
                        self.most[kind] = max(self.most[kind], memory.rss / 2**20)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


def job(nodes: int, hidden: tuple[int, ...], rounds: int) -> fedkeel.Job:
    return fedkeel.Job(
        name="bench",
        rounds=rounds,
        data={"clients": nodes, "partition": "iid"},
        model={"build": f"mlp(hidden={list(hidden)})"},
        train={"stopping": "steps(steps=1)", "batch_size": 8, "lr": 0.01},
    )


def ours(nodes: int, hidden: tuple[int, ...], rounds: int, place: Path) -> dict[str, Any]:
    init.write(job(nodes, hidden, rounds), place / "net", port=19_092)
    net = Local(place / "net")
    marks = {"server": f"process head {net.server.path}", "superlink": f"process superlink {net.server.path}"}
    started = time.perf_counter()
    with Memory(marks) as memory:
        net.start()
        first = 0.0
        while not net.done:
            standing = net.standing(rounds)
            if not first and standing is not None and standing.round:
                first = time.perf_counter() - started
            if time.perf_counter() - started > 1200:
                raise RuntimeError(f"it takes too long: see {net.folder}/logs")
            time.sleep(0.1)
        net.stop()
    done = fedkeel.Run(net.run)
    times = [row["time"] for row in done.rounds]
    assert [len(done.updates) // rounds, done.rounds[-1]["skipped"]] == [nodes, None]
    found = {"first": first, "round": statistics.median(b - a for a, b in itertools.pairwise(times))}
    size = done.rounds[-1]["bytes_up"] / nodes
    return found | {"megabytes": size / 1e6, "memory": memory.most}


def bare(nodes: int, columns: int, rounds: int, place: Path) -> dict[str, Any]:
    app, out, home = place / "bare", place / "times.json", place / "home"
    app.mkdir()
    (app / "pyproject.toml").write_text(PROJECT)
    (app / "app.py").write_text(APP)
    home.mkdir()
    (home / "config.toml").write_text(
        '[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "127.0.0.1:18000"\ninsecure = true\n'
    )
    environment = {**os.environ, **QUIET, "FLWR_HOME": str(home)}
    bin_ = Path(sys.executable).parent
    environment["PATH"] = f"{bin_}:{environment['PATH']}"
    log = (place / "bare.log").open("wb")
    running: list[subprocess.Popen[bytes]] = []

    def begin(*command: str) -> None:
        running.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True))

    started = time.time()
    try:
        with Memory({"server": "flwr-serverapp", "superlink": "flower-superlink"}) as memory:
            begin("flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", "18000")
            time.sleep(4)
            for number in range(nodes):
                port = str(18_001 + number)
                begin("flower-supernode", "--insecure", "--superlink", "127.0.0.1:18000", "--port", port)
            told = f'nodes={nodes} columns={columns} rounds={rounds} out="{out}"'
            subprocess.run(
                ["flwr", "run", str(app), "here", "--run-config", told],
                env=environment,
                stdout=log,
                stderr=log,
                check=True,
            )
            while not out.exists() or len(json.loads(out.read_text() or "[]")) < rounds + 2:
                if time.time() - started > 1200:
                    raise RuntimeError(f"it takes too long: see {log.name}")
                time.sleep(0.2)
    finally:
        for process in running:
            os.killpg(process.pid, signal.SIGTERM)
        for process in running:
            process.wait()
    at = json.loads(out.read_text())[: rounds + 1]
    gaps = [b - a for a, b in itertools.pairwise(at)]
    return {"first": at[1] - started, "round": statistics.median(gaps), "memory": memory.most}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", type=int, nargs="+", default=list(range(len(CASES))))
    parser.add_argument(
        "--alone",
        action="store_true",
        help="without bare Flower: with 50 nodes that starts 50 Pythons at once, more than 24 GB",
    )
    args = parser.parse_args()
    known = json.loads(RESULTS.read_text())["cases"] if RESULTS.exists() else {}
    for number in args.case:
        nodes, hidden, rounds = CASES[number]
        widths = (64, *hidden, 10)
        columns = sum(a * b + b for a, b in itertools.pairwise(widths))
        with tempfile.TemporaryDirectory() as place:
            mine = ours(nodes, hidden, rounds, Path(place))
        theirs = None
        if not args.alone:
            with tempfile.TemporaryDirectory() as place:
                theirs = bare(nodes, columns, rounds, Path(place))
        known[str(number)] = {"nodes": nodes, "columns": columns, "rounds": rounds, "ours": mine, "bare": theirs}
        print(json.dumps(known[str(number)]), flush=True)
        RESULTS.write_text(json.dumps({"cores": os.cpu_count(), "cases": known}, indent=1) + "\n")


def table(result: dict[str, Any]) -> str:
    """Rows: nodes and payload; columns: seconds to the first round, seconds a round, memory, ours and bare Flower's."""
    lines = [
        "| nodes | payload | first round: fedkeel | bare Flower | a round: fedkeel | bare Flower | ratio | "
        "server's memory: fedkeel | bare Flower |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for case in sorted(result["cases"].values(), key=lambda c: (c["columns"], c["nodes"])):
        mine, theirs = case["ours"], case["bare"]
        size = f"{4 * case['columns'] / 1e6:.3g} MB"
        memory = sum(mine["memory"].values())
        first, round, ratio, other = "", "", "", ""
        if theirs is not None:
            first, round = f"{theirs['first']:.0f} s", f"{theirs['round']:.1f} s"
            ratio, other = f"{mine['round'] / theirs['round']:.2f}", f"{sum(theirs['memory'].values()):,.0f} MB"
        lines.append(
            f"| {case['nodes']} | {size} | {mine['first']:.0f} s | {first} | {mine['round']:.1f} s "
            f"| {round} | {ratio} | {memory:,.0f} MB | {other} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
