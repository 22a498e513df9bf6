#!/usr/bin/env python3
"""Seconds per round of fedkeel and of every peer whose environment is there, on the same arrays, in one go.

    python benchmarks/simulation.py [--peers .bench-venvs] [--models mlp logistic cnn] [--quick]

`make bench-peers` makes the peers' environments. The runs are interleaved: each repeat runs everyone once, so that a
machine whose speed drifts is the same for all; a figure is the median of the repeats' medians. Writes
results/simulation.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PEERS = ("pfl", "blazefl", "fedjax", "flwr", "loop")
ROUNDS = {"mlp": 15, "logistic": 30, "cnn": 3}
WARMUP = {"mlp": 3, "logistic": 5, "cnn": 1}
# What every mode of a peer was measured to be best at is kept; the slower modes cost minutes and change no figure.
MODES = {
    "pfl": {"mlp": "processes-2-threads-1", "logistic": "processes-2-threads-1", "cnn": "processes-2-threads-1"},
    "blazefl": {"mlp": "thread-pool-2", "logistic": "single-threads-1", "cnn": "thread-pool-2"},
    "fedjax": {"mlp": "jit-threads-1", "logistic": "jit-threads-1", "cnn": "pmap-2-threads-1"},
    "flwr": {"mlp": "clients-2-threads-1", "logistic": "clients-2-threads-1", "cnn": "clients-2-threads-1"},
    "loop": {"mlp": "threads-1", "logistic": "threads-1", "cnn": "threads-1"},
    "fedkeel": {"mlp": "auto", "logistic": "auto", "cnn": "auto"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, default=HERE.parent / ".bench-venvs", help="where the environments are")
    parser.add_argument("--models", nargs="+", default=list(ROUNDS), choices=list(ROUNDS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one repeat, few rounds: does it run?")
    parser.add_argument(
        "--all-modes", action="store_true", help="let every peer try all its modes and keep its fastest"
    )
    parser.add_argument("--json", type=Path, default=HERE / "results" / "simulation.json")
    args = parser.parse_args()
    runners = {"fedkeel": (sys.executable, HERE / "run_fedkeel.py")}
    for peer in PEERS:
        python = args.peers / peer / "bin" / "python"
        if python.exists():
            runners[peer] = (str(python), HERE / "peers" / f"run_{peer}.py")
        else:
            print(f"{peer} is not installed under {args.peers}: left out", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data.npz"
        most = max(ROUNDS[m] + WARMUP[m] for m in args.models)
        make = [sys.executable, str(HERE / "peers" / "make_data.py"), str(data)]
        subprocess.run([*make, "--alpha", "0.5", "--clients", "100", "--seed", "0", "--rounds", str(most)], check=True)
        lines: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
        for model in args.models:
            for repeat in range(1 if args.quick else args.repeats):
                for peer, (python, script) in runners.items():
                    mode = "best" if args.all_modes and peer != "fedkeel" else MODES[peer][model]
                    line = run(python, script, data, model, mode, args.quick)
                    if line is not None:
                        lines[model, peer].append(line)
                        print(f"{model} {peer} #{repeat + 1}: {line['median']:.4f} s a round", file=sys.stderr)
    found = summary(lines) | {"peak_gflops": matrix_peak(), "machine": machine(), "made": time.strftime("%Y-%m-%d")}
    args.json.parent.mkdir(exist_ok=True)
    args.json.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))


def run(python: str, script: Path, data: Path, model: str, mode: str, quick: bool) -> dict[str, Any] | None:
    rounds, warmup = (2, 1) if quick else (ROUNDS[model], WARMUP[model])
    command = [python, str(script), "--data", str(data), "--model", model, "--mode", mode]
    command += ["--rounds", str(rounds), "--warmup", str(warmup)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1800)
    try:
        found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        return found
    except (IndexError, ValueError):
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        print(f"{script.stem} failed on {model}: {reason}", file=sys.stderr)
        return None


def summary(lines: dict[tuple[str, str], list[dict[str, Any]]]) -> dict[str, Any]:
    """Per model and peer: the median of medians, its range, memory and accuracy; and fedkeel's lead over each."""
    models: dict[str, dict[str, Any]] = defaultdict(dict)
    for (model, peer), found in lines.items():
        medians = [line["median"] for line in found]
        models[model][peer] = {
            "seconds_per_round": statistics.median(medians),
            "range": [min(medians), max(medians)],
            "peak_mb": max(line["peak_mb"] for line in found),
            "setup_seconds": statistics.median(line["setup_seconds"] for line in found),
            "test_accuracy": found[0]["test_accuracy"],
            "version": found[0]["version"],
            "mode": found[0]["mode"],
            "settings": found[0]["settings"],
        }
    for peers in models.values():
        ours = peers.get("fedkeel", {}).get("seconds_per_round")
        for row in peers.values():
            row["fedkeel_is_faster_by"] = round(row["seconds_per_round"] / ours, 2) if ours else None
    return {"models": models}


def matrix_peak() -> float:
    """GFLOP/s of a large float32 matrix product on all cores: the limit that a fraction is stated of."""
    import torch

    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    best = float("inf")
    for _ in range(8):
        start = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - start)
    return round(2 * 2048**3 / best / 1e9, 1)


# Floating-point operations of a training step per example: 6 per weight of a dense layer (forward, gradient of the
# weights, gradient of the inputs), 4 where the inputs need no gradient.
FLOP_PER_EXAMPLE = {
    "mlp": 4 * 784 * 200 + 6 * (200 * 200 + 200 * 10),
    "logistic": 4 * 784 * 10,
    "cnn": 4 * 28 * 28 * 25 * 32 + 6 * (14 * 14 * 25 * 32 * 64 + 3136 * 512 + 512 * 10),
}


def machine() -> str:
    import torch

    name = next(
        (
            x.partition(":")[2].strip()
            for x in Path("/proc/cpuinfo").read_text().splitlines()
            if x.startswith("model name")
        ),
        "?",
    )
    return f"{name}, {len(os.sched_getaffinity(0))} cores, torch {torch.__version__}, Python {sys.version.split()[0]}"


def table(found: dict[str, Any]) -> str:
    """The figures as Markdown."""
    out = []
    for model, peers in found["models"].items():
        out += [f"\n**{model}**\n", "| | seconds a round | fedkeel is faster by | peak memory, MB | accuracy | mode |"]
        out.append("|---|---:|---:|---:|---:|---|")
        for peer, row in sorted(peers.items(), key=lambda item: item[1]["seconds_per_round"]):
            low, high = row["range"]
            lead = f"{row['fedkeel_is_faster_by']:.1f}x" if peer != "fedkeel" else "1"
            mode = row["settings"].get("backend", row["mode"])
            out.append(
                f"| {peer} {row['version']} | {row['seconds_per_round']:.4f} ({low:.4f} to {high:.4f}) | {lead} | "
                f"{row['peak_mb']:.0f} | {row['test_accuracy']:.3f} | {mode} |"
            )
        ours = peers.get("fedkeel")
        if ours:
            examples = ours["settings"]["examples_per_round"]
            rate = FLOP_PER_EXAMPLE[model] * examples / ours["seconds_per_round"] / 1e9
            share = rate / found["peak_gflops"]
            out.append(
                f"\nfedkeel does {rate:.0f} GFLOP/s here, {share:.0%} of the machine's matrix peak of "
                f"{found['peak_gflops']:.0f} GFLOP/s: the matrix products alone would take "
                f"{FLOP_PER_EXAMPLE[model] * examples / found['peak_gflops'] / 1e9:.4f} s a round at that peak."
            )
    return "\n".join(out)


if __name__ == "__main__":
    main()
