"""What the peers' scripts share: arguments, the data, the PyTorch models, evaluation, memory, the JSON line.

Nothing here imports a framework before it is asked for one, since each peer runs in its own environment.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil

if TYPE_CHECKING:
    import torch

MODELS = {"mlp": 199_210, "logistic": 7_850, "cnn": 1_663_370}  # name: number of parameters
BATCH_SIZE = 20
LEARNING_RATE = 0.05


@dataclass(frozen=True)
class Job:
    """The job on the command line: what to train, for how long, and in which of the peer's modes."""

    data: Path
    model: str
    rounds: int
    warmup: int
    seed: int
    mode: str

    @property
    def total_rounds(self) -> int:
        return self.warmup + self.rounds


def parse_job(peer: str, modes: Sequence[str]) -> Job:
    """Read the command line. With the default, --mode best, run every mode on its own and print the fastest."""
    parser = argparse.ArgumentParser(description=f"Time {peer} on federated averaging over Fashion-MNIST.")
    parser.add_argument("--data", type=Path, required=True, help="npz file from make_data.py")
    parser.add_argument("--model", choices=list(MODELS), default="mlp")
    parser.add_argument("--rounds", type=int, default=10, help="timed rounds")
    parser.add_argument("--warmup", type=int, default=2, help="rounds before the timed ones")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mode", choices=["best", *modes], default="best")
    args = parser.parse_args()
    if args.mode == "best":
        print_fastest(modes)
        raise SystemExit
    return Job(args.data.resolve(), args.model, args.rounds, args.warmup, args.seed, args.mode)


def print_fastest(modes: Sequence[str]) -> None:
    """Run this script once per mode, each in a process of its own, and print the line with the smallest median."""
    lines = []
    failed = {}
    for mode in modes:
        # The last --mode given wins, so that one of the caller's own does no harm.
        command = [sys.executable, *sys.argv, "--mode", mode]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        try:
            lines.append(json.loads(done.stdout.strip().splitlines()[-1]))
        except (IndexError, ValueError):
            failed[mode] = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    if not lines:
        raise SystemExit(f"every mode failed: {failed}")
    fastest = min(lines, key=lambda line: line["median"])
    fastest["settings"] |= {"medians": {line["mode"]: line["median"] for line in lines}, "failed_modes": failed}
    print(json.dumps(fastest))


@dataclass(frozen=True)
class Data:
    """A federation: client i owns the examples offsets[i]:offsets[i + 1]; cohorts[r] trains in round r."""

    x: np.ndarray
    y: np.ndarray
    offsets: np.ndarray
    cohorts: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray

    @property
    def clients(self) -> int:
        return len(self.offsets) - 1

    def of(self, client: int) -> slice:
        return slice(int(self.offsets[client]), int(self.offsets[client + 1]))


def load(job: Job) -> Data:
    """Read the npz file, with the images as float32 in [0, 1] of shape (N, 28, 28)."""
    with np.load(job.data) as file:
        arrays = {name: file[name] for name in file.files}
    if len(arrays["cohorts"]) < job.total_rounds:
        raise SystemExit(f"{job.data} has cohorts for {len(arrays['cohorts'])} rounds, not {job.total_rounds}")
    for name in ("x", "test_x"):
        arrays[name] = arrays[name].astype(np.float32) / np.float32(255)
    return Data(**arrays)


def torch_model(name: str, seed: int) -> torch.nn.Module:
    """Return the model, which takes images of shape (B, 1, 28, 28), with PyTorch's own initial weights."""
    import torch
    from torch import nn

    torch.manual_seed(seed)
    layers: list[nn.Module]
    if name == "mlp":
        layers = [nn.Flatten(), nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 10)]
    elif name == "logistic":
        layers = [nn.Flatten(), nn.Linear(784, 10)]
    else:
        layers = [
            *(nn.Conv2d(1, 32, 5, padding="same"), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 64, 5, padding="same"), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(64 * 7 * 7, 512), nn.ReLU(), nn.Linear(512, 10)),
        ]
    model = nn.Sequential(*layers)
    if sum(p.numel() for p in model.parameters()) != MODELS[name]:
        raise AssertionError(f"{name} has the wrong number of parameters")
    return model


def torch_images(x: np.ndarray) -> torch.Tensor:
    """Return images as the tensor of shape (N, 1, 28, 28) that torch_model's models take; no copy."""
    import torch

    return torch.from_numpy(x).unsqueeze(1)


def torch_accuracy(model: torch.nn.Module, data: Data) -> float:
    """Return the share of the test examples that `model` gets right."""
    import torch

    model.eval()
    with torch.inference_mode():
        predicted = torch.cat([model(batch).argmax(1) for batch in torch_images(data.test_x).split(1000)])
    return float((predicted.numpy() == data.test_y).mean())


class PeakMemory:
    """Samples the memory of a process tree four times a second, from a thread.

    The sum of the processes' proportional set sizes: pages that several of them share are counted once.
    """

    def __init__(self, root: int | None = None) -> None:
        self._root = psutil.Process(root)
        self._peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            self._sample()
            if self._stop.wait(0.25):
                return

    def _sample(self) -> None:
        total = 0
        for process in [self._root, *self._root.children(recursive=True)]:
            try:
                total += process.memory_full_info().pss
            except (psutil.NoSuchProcess, psutil.AccessDenied):  # it ended between the listing and the look
                continue
        self._peak = max(self._peak, total)

    def stop_mb(self) -> float:
        """Stop sampling; return the peak in MB (10**6 bytes)."""
        self._sample()
        self._stop.set()
        self._thread.join()
        return round(self._peak / 1e6, 1)


class Rounds:
    """Takes the time of every round: tick() before the first round and after each one."""

    def __init__(self, root: int | None = None) -> None:
        """Start to watch the process tree under `root` (this process by default), whose age is the set-up time."""
        self._created = psutil.Process(root).create_time()
        self._memory = PeakMemory(root)
        self._ticks: list[float] = []
        self._setup = 0.0

    def tick(self) -> None:
        if not self._ticks:
            self._setup = time.time() - self._created
        self._ticks.append(time.perf_counter())

    def stop(self) -> None:
        """Stop to watch memory: to be called after the last round and before the evaluation."""
        self.peak_mb = self._memory.stop_mb()

    def report(self, job: Job, peer: str, package: str, accuracy: float, settings: dict[str, Any]) -> None:
        """Print the JSON line; the warm-up rounds count for nothing in it."""
        seconds = np.diff(self._ticks)
        if len(seconds) != job.total_rounds:
            raise AssertionError(f"{len(seconds)} rounds were timed, not {job.total_rounds}")
        timed = [round(float(s), 6) for s in seconds[job.warmup :]]
        line = {
            "peer": peer,
            "version": version(package),
            "mode": job.mode,
            "model": job.model,
            "seconds_per_round": timed,
            "median": statistics.median(timed),
            "setup_seconds": round(self._setup, 3),
            "peak_mb": self.peak_mb,
            "test_accuracy": round(accuracy, 4),
            "settings": {
                "clients_per_round": 10,
                "batch_size": BATCH_SIZE,
                "learning_rate": LEARNING_RATE,
                "local_epochs": 1,
                "warmup_rounds": job.warmup,
                "seed": job.seed,
                "cpus": len(os.sched_getaffinity(0)),
                "peak_memory": "PSS summed over the process tree every 0.25 s",
                **settings,
            },
        }
        print(json.dumps(line), flush=True)
