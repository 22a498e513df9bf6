#!/usr/bin/env python3
"""What an export to an edge runtime loses and gains: `fedkeel export` of federated models, beside eager PyTorch.

    python benchmarks/edge.py [--seconds 3] [--threads 1] [--only NAME]... [--json FILE]

Every model is trained by a federation of few equal clients on Fashion-MNIST for a few rounds, then exported to each
target. Parity is on test images that no calibration saw; eager PyTorch and every candidate take turns with single
images in the same process, so that whatever else the machine does hits all alike. ResNet-18 (He et al. 2016, with
BatchNorm) gets the images in three channels, scaled up to its side. Writes results/edge.json.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections import OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

import fedkeel
from fedkeel.core.registry import build
from fedkeel.edge.export import TARGETS, export
from fedkeel.world.federation import Federation

HERE = Path(__file__).parent
CALIBRATION = 200
ASKED = {"lower": {"mlp": 0.60, "cnn": 0.70, "resnet18_32": 0.65, "resnet18_224": 0.65}, "smaller": 3.8, "lost": 0.005}
NAMES = {
    "mlp": "MLP 784-512-256-10",
    "cnn": "CNN (McMahan)",
    "resnet18_32": "ResNet-18, 32x32",
    "resnet18_224": "ResNet-18, 224x224",
}


@dataclass(frozen=True)
class Sized:
    """Images (B, 1, 28, 28) of bytes as three channels of so many pixels a side, in [0, 1]."""

    side: int

    def __call__(self, x: Tensor) -> Tensor:
        scaled = functional.interpolate(x.float() / 255, size=(self.side, self.side), mode="bilinear")
        return scaled.expand(-1, 3, -1, -1).contiguous()


@fedkeel.rule("source")
def fashion_sized(key: fedkeel.Key, *, side: int, train: int, test: int) -> fedkeel.Pool:
    """Some of Fashion-MNIST, scaled up."""
    pool = build("source", "fashion_mnist")(key)
    x, y, test_x, test_y = pool.x[:train], pool.y[:train], pool.test_x[:test], pool.test_y[:test]
    return replace(pool, x=x, y=y, test_x=test_x, test_y=test_y, prepare=Sized(side))


class _Block(nn.Module):
    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False), nn.BatchNorm2d(outside)
        self.conv2, self.bn2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False), nn.BatchNorm2d(outside)
        self.short = nn.Sequential()
        if stride > 1 or inside != outside:
            self.short = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))) + self.short(x))


@fedkeel.rule("model")
def resnet18(inputs: tuple[int, ...], classes: int) -> nn.Module:
    """The ResNet-18 for ImageNet of He et al. 2016: 11,181,642 parameters for ten classes."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv=nn.Conv2d(inputs[0], 64, 7, 2, 3, bias=False),
        bn=nn.BatchNorm2d(64),
        relu=nn.ReLU(),
        pool=nn.MaxPool2d(3, 2, 1),
    )
    inside = 64
    for stage, width in enumerate((64, 128, 256, 512)):
        for block in range(2):
            layers[f"stage{stage + 1}_{block + 1}"] = _Block(inside, width, 1 + (stage > 0 and block == 0))
            inside = width
    return nn.Sequential(
        OrderedDict(**layers, mean=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), head=nn.Linear(512, classes))
    )


def job(name: str) -> fedkeel.Job:
    """How a model is trained."""
    settings = {
        "mlp": ["data.source=fashion_mnist", "model.build=mlp(hidden=(512, 256))", "rounds=6"],
        "cnn": ["data.source=fashion_mnist", "model.build=cnn", "rounds=2"],
        "resnet18_32": [
            *("data.source=fashion_sized(side=32, train=8000, test=4000)", "model.build=resnet18", "rounds=3"),
            "train.lr=0.05",
        ],
        "resnet18_224": [
            *("data.source=fashion_sized(side=224, train=1200, test=400)", "model.build=resnet18", "rounds=4"),
            *("train.lr=0.01", "train.optimiser=sgd(momentum=0.9)", "train.batch_size=20", "data.clients=2"),
        ],
    }[name]
    common = ["data.clients=4", "data.partition=iid", "train.batch_size=50", "train.backend=loop"]
    return fedkeel.Job(name=name).with_settings([*common, "record.evaluate_every=100", *settings])


def measured(name: str, folder: Path, threads: int, seconds: float) -> list[dict[str, Any]]:
    """A line for each target."""
    run = fedkeel.run(job(name), folder / name, with_report=False).path
    federation = Federation.of(job(name))
    example = federation.pool.prepare(federation.pool.test_x[:1])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        federation.module.eval()(example)
    lines = []
    for target in TARGETS:
        found = export(run, target, calibration=CALIBRATION, threads=threads, seconds=seconds).to_dict()
        line: dict[str, Any] = {**found, "model": name, "flops": counter.get_total_flops()}
        del line["by"]
        print(json.dumps({key: line[key] for key in ("model", "target", "scheme", "latency_ms", "parity", "bytes")}))
        lines.append(line)
    return lines


def table(found: dict[str, Any]) -> str:
    """For docs/benchmarks.md."""
    rows = [
        "| model | target | p50 eager, ms | p50 exported, ms | lower by | p99 lower by | smaller file "
        "| accuracy, eager | same predictions | points lost | GFLOP/s |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for line in found["lines"]:
        was, now, parity = line["latency_ms"]["eager"], line["latency_ms"]["exported"], line["parity"]
        lower, smaller, asked = line["latency_ms"]["lower"], line["bytes"]["smaller"], ASKED["lower"][line["model"]]
        eight = line["target"] == "onnx-int8"
        goal = f" (asked {asked:.0%}: {'met' if lower >= asked else 'missed'})" if eight else ""
        size = f" (asked {ASKED['smaller']}: {'met' if smaller >= ASKED['smaller'] else 'missed'})" if eight else ""
        rows.append(
            f"| {NAMES[line['model']]} | {line['target']} | {was['p50']:.3f} | {now['p50']:.3f} | {lower:.0%}{goal} "
            f"| {1 - now['p99'] / was['p99']:.0%} | {smaller:.2f}x{size} "
            f"| {100 * parity['reference']:.1f} | {parity['agreement']:.2%} "
            f"| {100 * parity['lost']:+.2f} | {line['flops'] / now['p50'] / 1e6:.0f} |"
        )
    schemes = "; ".join(f"{NAMES[x['model']]}: {x['scheme']}" for x in found["lines"] if x["target"] == "onnx-int8")
    machine = found["lines"][0]["machine"]
    rows += [
        "",
        f"Batch 1, {found['threads']} thread, {machine['cpu']}, VNNI: {'yes' if found['vnni'] else 'no'}, torch "
        f"{machine['torch']}, ONNX Runtime {machine['onnxruntime']}, {CALIBRATION} calibration images. Schemes "
        f"that were taken, by measuring: {schemes}.",
    ]
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--only", action="append", choices=list(NAMES), help="these models, beside the others' lines in the file"
    )
    parser.add_argument("--json", type=Path, default=HERE / "results" / "edge.json")
    args = parser.parse_args()
    load, lines = os.getloadavg()[0], list[dict[str, Any]]()
    if args.only and args.json.exists():
        lines = [line for line in json.loads(args.json.read_text())["lines"] if line["model"] not in args.only]
    with tempfile.TemporaryDirectory() as folder:
        for name in args.only or NAMES:
            lines += measured(name, Path(folder), args.threads, args.seconds)
    lines.sort(key=lambda line: list(NAMES).index(line["model"]))
    found = {
        "threads": args.threads,
        "vnni": "vnni" in Path("/proc/cpuinfo").read_text(),
        "load_before": load,
        "load_after": os.getloadavg()[0],
        "lines": lines,
    }
    args.json.parent.mkdir(exist_ok=True)
    args.json.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
