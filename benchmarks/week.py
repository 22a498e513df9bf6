"""A virtual week of 10,000 clients with 500 in flight, and what a million registered clients cost in memory.
`python benchmarks/week.py` takes some two minutes; figures lie in benchmarks/results/week.json.

Logistic regression on Fashion-MNIST, six examples a client, reference classes whose local round takes 10, 23 and 57
minutes, FedBuff with a buffer of 50: 172,000 tasks, each trained, sealed, checked and recorded as in any other run, the
ledger and its figures for every update included. The million clients hold one example of eight bytes each.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import fedkeel
from fedkeel.core.types import ClientMemory, ServerState
from fedkeel.sim.simulator import Simulator
from fedkeel.world.federation import Federation
from fedkeel.world.pool import Pool

RESULTS = Path(__file__).parent / "results" / "week.json"
WEEK = 7 * 86400.0
CLIENTS = (10_000, 1_000_000)


@fedkeel.rule("source")
def one_example_each(key: fedkeel.Key) -> Pool:
    """A million examples of eight bytes and two classes."""
    x, y = torch.randint(0, 256, (10**6, 8), dtype=torch.uint8), torch.randint(0, 2, (10**6,))
    return Pool.from_arrays(x, y, x[:1000], y[:1000])


def job(rounds: int, clients: int, **sections: Any) -> fedkeel.Job:
    return fedkeel.Job(
        name="week",
        rounds=rounds,
        data={"source": "fashion_mnist", "partition": "iid", "clients": clients} | sections.pop("data", {}),
        model={"build": "logistic"},
        train={"batch_size": 10, "lr": 0.05, "workers": 2, "backend": "native"},
        select={"cohort": 500},
        schedule={"rule": "fedbuff(buffer=50)", "seconds": WEEK},
        devices={"profile": "reference", "round_seconds": 600.0},
        aggregate={"weigh": ("examples", "staleness")},
        record={"evaluate_every": 500, "checkpoint_every": 1000},
        **sections,
    )


def week() -> dict[str, Any]:
    """The week's wall time, tasks, and the process's most memory."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        done = fedkeel.run(job(10**6, CLIENTS[0]), Path(place) / "run", with_report=False)
        seconds = time.perf_counter() - started
        found = done.final()
        assert found is not None
        state = done.state
    return {
        "seconds": round(seconds, 1),
        "tasks": state.next_task,
        "rounds": state.round,
        "accuracy": round(found["value"], 4),
        "most_mb": round(_memory("VmHWM"), 0),
    }


def registered(clients: int) -> dict[str, Any]:
    """What the simulator of so many clients holds, once the data are there."""

    class Nowhere:
        def round(self, *_: object) -> None: ...
        def metrics(self, *_: object) -> None: ...
        def checkpoint(self, *_: object) -> None: ...

    data = {"source": "one_example_each", "clients": clients}
    federation = Federation.of(job(20, clients, data=data))
    before = _memory("VmRSS")
    state = ServerState(federation.theta())
    with torch.no_grad():
        Simulator(federation, federation.trainer(), state, ClientMemory(), Nowhere()).run()
    ids = sum(map(sys.getsizeof, federation.names)) / 1e6
    held = _memory("VmRSS")
    return {"clients": clients, "held_mb": round(held), "run_mb": round(held - before, 1), "ids_mb": round(ids, 1)}


def _memory(name: str) -> float:
    """Megabytes of this process, as Linux counts them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1000


def table(results: dict[str, Any]) -> str:
    found, lines = results["week"], ["| | |", "|---|---:|"]
    lines += [
        f"| a virtual week, 10,000 clients, 500 in flight | {found['seconds']:.0f} s |",
        f"| tasks, buffers closed | {found['tasks']:,}, {found['rounds']:,} |",
        f"| a task, with everything | {1e6 * found['seconds'] / found['tasks']:.0f} µs |",
        f"| most memory of the process | {found['most_mb']:.0f} MB |",
    ]
    for row in results["registered"]:
        held = f"{row['held_mb']:.0f} MB, {row['ids_mb']:.0f} MB"
        lines.append(f"| memory with {row['clients']:,} clients, of which their names | {held} |")
    return "\n".join(lines)


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps(registered(int(sys.argv[1]))))
        return
    results: dict[str, Any] = {"week": week()}
    command = [sys.executable, __file__]
    rows = [subprocess.run([*command, str(n)], check=True, capture_output=True, text=True).stdout for n in CLIENTS]
    results["registered"] = [json.loads(row) for row in rows]
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
