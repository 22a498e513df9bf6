#!/usr/bin/env python3
"""Time fedkeel's local training on the job that every peer runs: federated averaging over Fashion-MNIST."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).parent / "peers"))

from common import BATCH_SIZE, LEARNING_RATE, MODELS, PeakMemory, torch_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="npz file from peers/make_data.py")
    parser.add_argument("--model", choices=list(MODELS), default="mlp")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--rounds", type=int, default=10, help="timed rounds")
    parser.add_argument("--warmup", type=int, default=2, help="rounds before the timed ones")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, help="processes, one a core by default")
    args = parser.parse_args()
    created = psutil.Process().create_time()
    memory = PeakMemory()

    import torch

    from fedkeel.core.keys import Key
    from fedkeel.core.layout import Layout
    from fedkeel.core.registry import build
    from fedkeel.train import ClientData, LocalWork, Scale, Task, evaluate, make_trainer

    with np.load(args.data) as file:
        arrays = {name: torch.from_numpy(file[name]) for name in file.files}
    x, test_x = (arrays[name].unsqueeze(1) for name in ("x", "test_x"))  # uint8 until the batch
    data = ClientData(x, arrays["y"], arrays["offsets"], Scale(0.0, 1 / 255))
    module = torch_model(args.model, args.seed)
    layout = Layout.of(module)
    work = LocalWork(BATCH_SIZE, LEARNING_RATE, build("stopping", "epochs"), build("loss", "cross_entropy"))
    trainer = make_trainer(args.backend, module, layout, data, work, workers=args.workers)
    theta = layout.flatten(module)
    key = Key.root(args.seed)
    setup = time.time() - created

    seconds = []
    for number, cohort in enumerate(arrays["cohorts"][: args.warmup + args.rounds].tolist()):
        start = time.perf_counter()
        total = torch.zeros_like(theta)
        examples = 0
        for trained in trainer.train(theta, [Task(client, key.fold(number, client)) for client in cohort]):
            if trained.failure:
                raise SystemExit(f"client {trained.client}: {trained.failure}")
            total.add_(trained.delta, alpha=trained.num_examples)
            examples += trained.num_examples
        theta = theta + total / examples
        seconds.append(round(time.perf_counter() - start, 6))
    peak = memory.stop_mb()
    trainer.close()
    result = evaluate(module, layout, theta, test_x, arrays["test_y"], data.prepare, work.loss)
    timed = seconds[args.warmup :]
    line = {
        "peer": "fedkeel",
        "backend": trainer.name,
        "model": args.model,
        "seconds_per_round": timed,
        "median": statistics.median(timed),
        "setup_seconds": round(setup, 3),
        "peak_mb": peak,
        "test_accuracy": round(float(result["accuracy"] or 0.0), 4),
        "settings": {"workers": args.workers or len(os.sched_getaffinity(0)), "load": os.getloadavg()[0]},
    }
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
