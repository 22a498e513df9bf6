"""Personalisation in the setting of PFLlib (Zhang et al. 2023) on Fashion-MNIST, beside its published figures.
`python benchmarks/personal.py` goes on where it was stopped; figures lie in benchmarks/results/personal.jsonl.

All 70,000 images among 20 clients that all take part, two labels each or Dirichlet(0.1), a quarter of each client's
kept to test its own model; batch 10, one local epoch, SGD at 0.005, the CNN without padding. As PFLlib counts, accuracy
is that of the best round, over all clients' test examples together; it ran 2000 rounds, here it is 10. As there, two
labels are neighbours (0 and 1, 2 and 3, ...), which makes most of the tasks easy, and clients differ in size.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fedkeel
import resumable
from defence_tables import spread
from fedkeel.core.keys import Key
from fedkeel.core.registry import build
from fedkeel.world.pool import Pool, Split

RESULTS = Path(__file__).parent / "results" / "personal.jsonl"
ROUNDS = 10
PARTITIONS = {"two labels": "neighbours", "Dirichlet(0.1)": "dirichlet(alpha=0.1, capped=True, min_examples=40)"}
PUBLISHED = {  # best of 2000 rounds, %
    "FedAvg": (80.4, 85.9),
    "FedPer": (99.5, 97.4),
    "FedRep": (99.6, 97.6),
    "Ditto": (99.4, 97.5),
    "APFL": (99.4, 97.3),
    "Per-FedAvg": (99.2, 95.1),
}
LOCAL, TUNED = "local-only", "FedAvg, fine-tuned"
Sections = dict[str, dict[str, Any]]
METHODS: dict[str, Sections] = {
    "FedAvg": {},
    LOCAL: {"model": {"private": ("*",)}},
    "FedPer": {"model": {"private": ("head",)}},
    "FedRep": {"model": {"private": ("head",)}, "train": {"private_first": "epochs(epochs=1)"}},
    "Ditto": {"train": {"objective": "ditto(lam=0.1)"}},
    "APFL": {"train": {"objective": "apfl"}},
    "Per-FedAvg": {
        "train": {"objective": "per_fedavg(alpha=0.005)", "batch_size": 20},  # PFLlib's two batches of 10
        "record": {"fine_tune": "steps(steps=1)"},
    },
    TUNED: {"record": {"fine_tune": "epochs(epochs=1)"}},
}


@fedkeel.rule("source")
def all_of_fashion_mnist(key: Key) -> Pool:
    """Both halves of Fashion-MNIST as examples of clients, which hold their own tests back."""
    pool: Pool = build("source", "fashion_mnist")(key)
    return replace(pool, x=torch.cat([pool.x, pool.test_x]), y=torch.cat([pool.y, pool.test_y]))


@fedkeel.rule("partition")
def neighbours(pool: Pool, clients: int, key: Key) -> Split:
    """Two neighbouring labels for every four clients, shared out unequally: PFLlib's own draw."""
    rng, parts = key.numpy(), [[] for _ in range(clients)]
    for label in range(pool.classes):
        rows = rng.permutation(np.flatnonzero(pool.y.numpy() == label))
        owners = [client for client in range(clients) if client * pool.classes // (2 * clients) == label // 2]
        each = len(rows) // len(owners)
        cuts = np.cumsum(rng.integers(each // 10, each, len(owners) - 1))
        for owner, piece in zip(owners, np.split(rows, cuts), strict=True):
            parts[owner].append(torch.from_numpy(piece))
    return Split(tuple(torch.cat(part) for part in parts))


def cells() -> Iterator[resumable.Cell]:
    """What is run, in order of interest."""
    for seed in range(3):
        for partition in PARTITIONS:
            yield from ({"seed": seed, "partition": partition, "method": method} for method in METHODS)


def job(cell: resumable.Cell) -> fedkeel.Job:
    """The job of one cell."""
    method = METHODS[str(cell["method"])]
    train = {"batch_size": 10, "lr": 0.005, "workers": 1}
    record = {"evaluate_every": 1, "checkpoint_every": ROUNDS}
    return fedkeel.Job(
        name="personal",
        seed=cell["seed"],
        rounds=ROUNDS,
        data={
            "source": "all_of_fashion_mnist",
            "partition": PARTITIONS[str(cell["partition"])],
            "clients": 20,
            "holdout": 0.25,
        },
        model={"build": "cnn(padding=0)"} | method.get("model", {}),
        train=train | method.get("train", {}),
        record=record | method.get("record", {}),
    )


def measure(cell: resumable.Cell) -> resumable.Cell:
    """One run's figures."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        done = fedkeel.run(job(cell), Path(place) / "run", with_report=False)
        rows = [r for r in done.metrics if r["scope"].startswith("client/") and r["name"] == "accuracy" and r["round"]]
        worst = {str(r["round"]): r["value"] for r in done.metrics if r["name"] == "worst_decile" and r["round"]}
    right, held = dict.fromkeys(worst, 0.0), dict.fromkeys(worst, 0)
    for row in rows:
        right[str(row["round"])] += row["value"] * row["examples"]
        held[str(row["round"])] += row["examples"]
    by_round = {number: right[number] / held[number] for number in worst}
    best = max(by_round, key=lambda number: by_round[number])
    return {
        **cell,
        "accuracy": by_round[best],
        "round": int(best),
        "worst_decile": worst[best],
        "by_round": {number: round(value, 5) for number, value in by_round.items()},
        "seconds": round(time.perf_counter() - started, 2),
    }


def table(rows: list[resumable.Cell]) -> str:
    """Best-round accuracies by method and partition, means over seeds with 95% intervals, published in brackets."""
    out = [
        f"| accuracy of clients' own models, best of {ROUNDS} rounds, %: here (published, best of 2000) | "
        + " | ".join(f"{p} | its worst tenth" for p in PARTITIONS)
        + " |",
        "|---|" + "---:|" * (2 * len(PARTITIONS)),
    ]
    for method in METHODS:
        shown = []
        for number, partition in enumerate(PARTITIONS):
            mine = [r for r in rows if (r["method"], r["partition"]) == (method, partition)]
            found, worst = ([float(str(r[k])) for r in mine] for k in ("accuracy", "worst_decile"))
            known = PUBLISHED.get(method)
            shown.append((spread(found) if found else "-") + ("" if known is None else f" ({known[number]:.1f})"))
            shown.append(spread(worst) if worst else "-")
        out.append(f"| {method} | " + " | ".join(shown) + " |")
    return "\n".join(out)


def main() -> None:
    resumable.by_method(__doc__, cells(), measure, RESULTS)


if __name__ == "__main__":
    main()
