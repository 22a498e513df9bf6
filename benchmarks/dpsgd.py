#!/usr/bin/env python3
"""What DP-SGD costs: seconds per example beside plain SGD and Opacus, on one thread.

    python benchmarks/dpsgd.py [--examples 1280] [--repeats 7] [--json FILE]

Everybody takes turns with an epoch over the same examples, so that whatever else the machine does hits all alike; the
least of the repeats counts. Batches are Poisson samples for all but plain SGD. Opacus has its batches prepared, and
spends no time on loading; fedkeel draws and prepares its own. Noise is 1, the norm 1. FLOPs are those of the plain
step, forward and backward, by torch's own counter. Memory that is freed is kept for the next step, as in fedkeel's
workers: without that Opacus spends most of its time on fresh pages. Writes results/dpsgd.json.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import opacus
import torch
from opacus import PrivacyEngine
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from fedkeel.core.keys import Key
from fedkeel.core.layout import Layout
from fedkeel.core.noise import Noise
from fedkeel.core.registry import build
from fedkeel.core.types import ExampleNoise
from fedkeel.kernels import native
from fedkeel.train import ClientData, LocalWork, Scale, Task, make_trainer, pool
from fedkeel.train.private import drawn

HERE = Path(__file__).parent
BATCHES = (20, 64)
LR, NORM, NOISE = 0.05, 1.0, 1.0
OURS, THEIRS, TARGET = "DP-SGD, auto", "Opacus", 3.0


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 10)
    )


def lenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10),
    )  # fmt: skip


MODELS: dict[str, Callable[[], nn.Module]] = {"MLP 784-200-200-10": mlp, "LeNet-5": lenet}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=1280)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path, default=HERE / "results" / "dpsgd.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # Opacus's hooks
    pool._keep_memory()
    load = os.getloadavg()[0]
    lines = [measured(name, size, args.examples, args.repeats) for name in MODELS for size in BATCHES]
    library = native.library()
    found = {
        "examples": args.examples,
        "torch": torch.__version__,
        "opacus": opacus.__version__,
        "instructions": "none" if isinstance(library, str) else library.instruction_set,
        "load_before": load,
        "load_after": os.getloadavg()[0],
        "lines": lines,
    }
    args.json.parent.mkdir(exist_ok=True)
    args.json.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))


def measured(name: str, size: int, count: int, repeats: int) -> dict[str, Any]:
    """Microseconds per example of everybody, on one model with one size of batch."""
    torch.manual_seed(0)
    module = MODELS[name]()
    x, y = torch.randint(0, 256, (count, 1, 28, 28), dtype=torch.uint8), torch.randint(0, 10, (count,))
    data = ClientData(x, y, torch.tensor([0, count]), Scale(0.0, 1 / 255))
    contestants = {
        "SGD, traced": ours(module, data, size, "traced", None),
        "SGD, auto": ours(module, data, size, "auto", None),
        "DP-SGD, loop": ours(module, data, size, "loop", ExampleNoise(NORM, NOISE)),
        "DP-SGD, traced": ours(module, data, size, "traced", ExampleNoise(NORM, NOISE)),
        OURS: ours(module, data, size, "auto", ExampleNoise(NORM, NOISE)),
        THEIRS: theirs(MODELS[name](), data, size, "hooks"),
        "Opacus, ghost clipping": theirs(MODELS[name](), data, size, "ghost"),
    }
    taken = {who: 1e6 * seconds / count for who, seconds in race(contestants, repeats).items()}
    line = {
        "model": name,
        "batch": size,
        "parameters": sum(p.numel() for p in module.parameters()),
        "flops_per_example": flops(module, data, size),
        "us_per_example": taken,
        "times_opacus": taken[THEIRS] / taken[OURS],
        "times_opacus_ghost": taken["Opacus, ghost clipping"] / taken[OURS],
        "share_of_traced_sgd": taken["SGD, traced"] / taken[OURS],
        "share_of_fastest_sgd": taken["SGD, auto"] / taken[OURS],
    }
    print(json.dumps(line), flush=True)
    return line


def ours(
    module: nn.Module, data: ClientData, size: int, backend: str, noise: ExampleNoise | None
) -> Callable[[], None]:
    """An epoch of a client that has all examples."""
    layout = Layout.of(module)
    rules = build("stopping", "epochs"), build("loss", "cross_entropy")
    work = LocalWork(size, LR, *rules, example_noise=noise)
    trainer, theta = make_trainer(backend, module, layout, data, work, workers=1), layout.flatten(module)

    def epoch() -> None:
        for done in trainer.train(theta, [Task(0, Key(1))]):
            assert done.failure is None

    return epoch


def theirs(module: nn.Module, data: ClientData, size: int, mode: str) -> Callable[[], None]:
    """An epoch by Opacus, over batches that were drawn and prepared before."""
    count, noise = len(data.x), Noise(Key(2))
    x = data.prepare(data.x)
    loader = DataLoader(TensorDataset(x, data.y), batch_size=size)
    rows = [drawn(noise, count, size) for _ in range(count // size)]
    batches: list[tuple[Tensor, Tensor]] = [(x[part], data.y[part]) for part in rows]
    criterion: Any = nn.CrossEntropyLoss()
    made = PrivacyEngine().make_private(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=LR),
        data_loader=loader,
        criterion=criterion,
        noise_multiplier=NOISE,
        max_grad_norm=NORM,
        grad_sample_mode=mode,
    )
    private, optimiser = made[:2]
    criterion = made[2] if mode == "ghost" else criterion

    def epoch() -> None:
        for inputs, labels in batches:
            optimiser.zero_grad(set_to_none=True)
            criterion(private(inputs), labels).backward()
            optimiser.step()

    return epoch


def flops(module: nn.Module, data: ClientData, size: int) -> float:
    """Of the plain step, for each example."""
    with FlopCounterMode(display=False) as counter:
        nn.functional.cross_entropy(module(data.prepare(data.x[:size])), data.y[:size]).backward()
    module.zero_grad(set_to_none=True)
    return counter.get_total_flops() / size


def race(contestants: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """The least seconds of each, taking turns; the first turn warms up."""
    least = dict.fromkeys(contestants, math.inf)
    for repeat in range(repeats + 1):
        for name, function in contestants.items():
            start = time.perf_counter()
            function()
            took = time.perf_counter() - start
            if repeat:
                least[name] = min(least[name], took)
    return least


def table(found: dict[str, Any]) -> str:
    """The figures as Markdown."""
    names = list(found["lines"][0]["us_per_example"])
    out = [
        f"| model | batch | {' | '.join(names)} | faster than Opacus | than its ghost clipping | of traced SGD's speed "
        "| GFLOP/s |",
        "|---" * (len(names) + 6) + "|",
    ]
    for line in found["lines"]:
        taken = line["us_per_example"]
        times = line["times_opacus"]
        out.append(
            f"| {line['model']} | {line['batch']} | {' | '.join(f'{taken[name]:.1f}' for name in names)} "
            f"| {times:.1f} (target {TARGET:.0f}: {'met' if times >= TARGET else 'missed'}) "
            f"| {line['times_opacus_ghost']:.1f} | {line['share_of_traced_sgd']:.0%} "
            f"| {line['flops_per_example'] / taken[OURS] / 1e3:.0f} |"
        )
    counted = ", ".join(
        f"{line['model']} {line['flops_per_example'] / 1e6:.2f}"
        for line in found["lines"]
        if line["batch"] == BATCHES[0]
    )
    out.append(
        f"\nMicroseconds per example, one thread, instructions {found['instructions']}, torch {found['torch']}, Opacus "
        f"{found['opacus']}. MFLOPs per example of the plain step, which GFLOP/s go by: {counted}."
    )
    return "\n".join(out)


if __name__ == "__main__":
    main()
