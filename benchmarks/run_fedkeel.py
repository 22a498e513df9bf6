#!/usr/bin/env python3
"""Time fedkeel on the job that every peer runs: whole rounds of the simulator, envelopes and ledger included."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent / "peers"))

from common import BATCH_SIZE, LEARNING_RATE, Rounds, parse_job, torch_model

MODES = ("auto", "native", "traced", "rows", "loop")


def main() -> None:
    timed = parse_job("fedkeel", MODES)
    rounds = Rounds()

    import torch

    import fedkeel
    from fedkeel.train import Scale
    from fedkeel.world.pool import Pool, Split

    with np.load(timed.data) as file:
        arrays = {name: file[name] for name in file.files}
    clients = len(arrays["offsets"]) - 1
    names = tuple(f"client-{i:03d}" for i in range(clients))

    @fedkeel.rule("source")
    def peers_data(key: fedkeel.Key) -> Pool:
        """The arrays that every peer trains on; images stay uint8 until the batch."""
        x, test_x = (torch.from_numpy(arrays[n]).unsqueeze(1) for n in ("x", "test_x"))
        y, test_y = (torch.from_numpy(arrays[n]) for n in ("y", "test_y"))
        return Pool(x, y, test_x, test_y, 10, Scale(0.0, 1 / 255))

    @fedkeel.rule("partition")
    def peers_clients(pool: Pool, clients: int, key: fedkeel.Key) -> Split:
        """Client i owns the examples from offsets[i] to offsets[i + 1]."""
        return Split(torch.arange(len(pool)).tensor_split(torch.from_numpy(arrays["offsets"][1:-1])), names)

    @fedkeel.rule("model")
    def peers_model(inputs: tuple[int, ...], classes: int) -> torch.nn.Module:
        """The peers' module, as a user would bring it."""
        return torch_model(timed.model, timed.seed)

    @fedkeel.rule("selector")
    def peers_cohorts(candidates: fedkeel.Candidates, count: int, round: int, key: fedkeel.Key) -> Sequence[int]:
        """The clients that every peer trains in this round."""
        return [int(i) for i in arrays["cohorts"][round - 1]]

    job = fedkeel.Job(
        name="benchmark",
        seed=timed.seed,
        rounds=timed.total_rounds,
        data={"source": "peers_data", "partition": "peers_clients", "clients": clients},
        model={"build": "peers_model"},
        train={"batch_size": BATCH_SIZE, "lr": LEARNING_RATE, "backend": timed.mode},
        select={"cohort": arrays["cohorts"].shape[1], "rule": "peers_cohorts"},
        record={"evaluate_every": timed.total_rounds, "checkpoint_every": timed.total_rounds},
    )

    def watch(progress: fedkeel.Progress) -> None:
        rounds.tick()
        if progress.round == timed.total_rounds:
            rounds.stop()

    with tempfile.TemporaryDirectory() as directory:
        run = fedkeel.run(job, Path(directory) / "run", watch=watch, with_report=False)
        with run.dir.ledger(readonly=True) as ledger:
            backend = ledger.meta["backend"]
        parts = [row["seconds"] for row in run.rounds][timed.warmup :]
        spent = {part: round(float(np.median([s.get(part, 0.0) for s in parts])), 6) for part in ("train", "aggregate")}
        accuracy = run.final()["value"]
    counts = np.diff(arrays["offsets"])[arrays["cohorts"][timed.warmup : timed.total_rounds]].sum(1)
    settings = {"backend": backend, "median_seconds": spent, "examples_per_round": float(np.median(counts))}
    rounds.report(timed, "fedkeel", "fedkeel", accuracy, settings)


if __name__ == "__main__":
    main()
