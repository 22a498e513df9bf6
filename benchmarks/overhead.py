#!/usr/bin/env python3
"""What a round costs beyond its arithmetic: start-up, the coordinator's time per client, the memory of a round.

    python benchmarks/overhead.py [--columns 1000000] [--clients 32]

The coordinator's own overhead is the time of a whole round (messages in, model out) less that of its arithmetic, done
bare on the same data in the same process: SHA-256, the copy of the payload, the norm, the finite check, the weighted
mean, the cosines. Writes results/overhead.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--columns", type=int, default=1_000_000)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path, default=HERE / "results" / "overhead.json")
    args = parser.parse_args()
    found = {
        "startup": startup(args.repeats),
        "coordinator": coordinator(args.clients, args.columns, args.repeats),
        "memory": [
            memory(64, args.columns, "median"),
            memory(96, args.columns, "mean"),
        ],  # so large a mean is streamed,
    }
    args.json.parent.mkdir(exist_ok=True)
    args.json.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))


def startup(repeats: int) -> dict[str, float]:
    """Median seconds of whole processes."""
    programs = {
        "fedkeel --help": [sys.executable, "-m", "fedkeel", "--help"],
        "python -c 'import fedkeel'": [sys.executable, "-c", "import fedkeel"],
        "python -c 'import torch'": [sys.executable, "-c", "import torch"],
        "python -c 'from fedkeel import run, Job'": [sys.executable, "-c", "from fedkeel import run, Job"],
    }
    times: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(repeats):
        for name, command in programs.items():
            start = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            times[name].append(time.perf_counter() - start)
    return {name: round(statistics.median(taken), 4) for name, taken in times.items()}


def coordinator(clients: int, columns: int, repeats: int) -> dict[str, Any]:
    """Milliseconds per client of a whole round, of its bare arithmetic, and of the rest."""
    import torch

    from fedkeel.core.keys import Key
    from fedkeel.core.layout import Layout
    from fedkeel.core.registry import build
    from fedkeel.core.types import Claims, ClientMemory, ServerState
    from fedkeel.kernels import distance
    from fedkeel.round import device
    from fedkeel.round.coordinator import Coordinator, Train
    from fedkeel.round.plan import Plan
    from fedkeel.round.server import Server

    checks = ("layout", "version", "claims", "duplicate", "replayed", "finite")
    plan = Plan(
        select=build("selector", "round_robin"),
        schedule=build("scheduler", "sync"),
        codec=build("codec", "float32"),
        reducer=build("reducer", "mean"),
        optimiser=build("server_optimiser", "sgd"),
        cohort=clients,
        checks=tuple(build("check", name) for name in checks),
        weighers=(build("weigher", "examples"),),
    )
    layout = Layout.of(torch.nn.Linear(columns, 1, bias=False))
    rows = torch.randn(clients, columns, generator=torch.Generator().manual_seed(0))
    names = [f"client-{i:04d}" for i in range(clients)]
    matrix = torch.empty_like(rows)  # the server keeps its own from round to round as well
    whole, bare, hashing = [], [], []
    server = Server(plan, layout, ServerState(torch.zeros(columns)), Key.root(0))
    control = Coordinator(plan, server, names, Key.root(0), rounds=repeats + 2)
    orders = [c for c in control.start(0.0) if isinstance(c, Train)]
    for repeat in range(repeats + 1):
        claims = [Claims(o.client, o.task, o.version, layout.digest, 20, 5) for o in orders]
        rows[:, 0] = repeat  # not the payload of the round before
        messages = device.send(rows, [Key(o.task) for o in orders], claims, ClientMemory(), plan, layout)
        start = time.perf_counter()
        commands: list[Any] = []
        for order, message in zip(orders, messages, strict=True):
            commands += control.on_message(order.client, message, 0.0)
        whole.append(time.perf_counter() - start)
        orders = [c for c in commands if isinstance(c, Train)]

        start = time.perf_counter()
        for message in messages:
            hashlib.sha256(memoryview(message)[-4 * columns :]).digest()
        hashing.append(time.perf_counter() - start)
        start = time.perf_counter()
        for slot, row in zip(matrix, rows, strict=True):
            slot.copy_(row)
            distance.sq_norm(slot)
        weights = torch.full((clients,), 20.0, dtype=torch.float64)
        direction = plan.reducer(matrix, weights)
        theta = direction + 0.0
        distance.sq_norm(theta)
        matrix @ direction
        distance.sq_norm(direction)
        bare.append(time.perf_counter() - start)
    per_client = [1e3 * min(taken[1:]) / clients for taken in (whole, bare, hashing)]
    return {
        "clients": clients,
        "columns": columns,
        "round_ms_per_client": round(per_client[0], 4),
        "arithmetic_ms_per_client": round(per_client[1], 4),
        "sha256_ms_per_client": round(per_client[2], 4),
        "overhead_ms_per_client": round(per_client[0] - per_client[1] - per_client[2], 4),
    }


MEMORY = """
import sys, tempfile, fedkeel
from torch import nn
clients, columns, reduce = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
@fedkeel.rule("model")
def wide(inputs: tuple, classes: int) -> nn.Module:
    "One dense layer as wide as asked for."
    width = columns // (64 + 10)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width, bias=False), nn.ReLU(), nn.Linear(width, 10, bias=False))
peaks = {}
def go(count):
    job = fedkeel.Job(name="memory", rounds=3, data={"clients": clients, "partition": "iid"}, model={"build": "wide"},
        train={"backend": "loop"}, select={"cohort": count}, aggregate={"reduce": reduce},
        record={"evaluate_every": 9, "checkpoint_every": 9})
    with tempfile.TemporaryDirectory() as folder:
        fedkeel.run(job, folder + "/run", with_report=False)
    # not ru_maxrss, which a process inherits from the one that started it
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
base = go(3)
print(base, go(clients))
"""


def memory(clients: int, columns: int, reduce: str) -> dict[str, Any]:
    """Peak memory that a round of `clients` adds to one of three, in matrices (clients - 3, columns) of float32."""
    command = [sys.executable, "-c", MEMORY, str(clients), str(columns), reduce]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    small, large = (int(part) for part in done.stdout.split())
    matrix = 4 * (clients - 3) * (columns // 74 * 74)
    return {
        "reduce": reduce,
        "clients": clients,
        "columns": columns,
        "peak_mb_of_3_clients": round(small / 1e6),
        "peak_mb": round(large / 1e6),
        "matrices": round((large - small) / matrix, 3),
    }


def table(found: dict[str, Any]) -> str:
    """The figures as Markdown."""
    c = found["coordinator"]
    out = ["| start-up | seconds |", "|---|---:|"]
    out += [f"| `{name}` | {seconds:.2f} |" for name, seconds in found["startup"].items()]
    out += [
        f"\n| a round of {c['clients']} clients, {c['columns']:,} columns | ms per client |",
        "|---|---:|",
        f"| whole: messages in, model out | {c['round_ms_per_client']:.2f} |",
        f"| its SHA-256 | {c['sha256_ms_per_client']:.2f} |",
        f"| its other arithmetic: copy, norm, mean, cosines | {c['arithmetic_ms_per_client']:.2f} |",
        f"| the coordinator's own | {c['overhead_ms_per_client']:.2f} |",
        "\n| memory of a round | peak, MB | of 3 clients, MB | added, in (n, P) matrices |",
        "|---|---:|---:|---:|",
    ]
    out += [
        f"| {m['clients']} clients, {m['columns']:,} columns, {m['reduce']} | {m['peak_mb']} | "
        f"{m['peak_mb_of_3_clients']} | {m['matrices']:.2f} |"
        for m in found["memory"]
    ]
    return "\n".join(out)


if __name__ == "__main__":
    main()
