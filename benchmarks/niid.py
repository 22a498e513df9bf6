"""Methods against drift in the setting of NIID-Bench (Li et al. 2022, table 3, Fashion-MNIST), beside its figures.
`python benchmarks/niid.py` goes on where it was stopped; figures lie in benchmarks/results/niid.jsonl, one run a line.

10 parties that all take part, 50 rounds, 10 local epochs a round, batch 64, SGD at 0.01 with momentum 0.9 and weight
decay 0.00001, the LeNet with 6 and 16 channels, inputs in [0, 1], updates weighted by examples. As NIID-Bench does it,
the momentum begins anew in every round, and accuracy is that of the last round's model on the test set.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import fedkeel
import resumable
from defence_tables import spread

RESULTS = Path(__file__).parent / "results" / "niid.jsonl"
PARTITIONS = {
    "IID": "iid",
    "Dirichlet(0.5)": "dirichlet(alpha=0.5, capped=True)",
    "#C=3": "shards(classes_per_client=3, even=False)",
    "#C=2": "shards(classes_per_client=2, even=False)",
    "#C=1": "shards(classes_per_client=1, even=False)",
    "#C=2, even": "shards(classes_per_client=2)",
}
DECAY = "l2(coef=0.00001)"
PUBLISHED = {  # means and standard deviations over three runs, in %; FedProx with the best mu of 0.001 to 1
    "FedAvg": {"IID": 89.2, "Dirichlet(0.5)": 88.1, "#C=3": 82.4, "#C=2": 78.1, "#C=1": 28.0},
    "FedProx": {"IID": 89.4, "Dirichlet(0.5)": 88.2, "#C=3": 83.0, "#C=2": 78.1},
    "SCAFFOLD": {"IID": 89.3, "Dirichlet(0.5)": 88.4, "#C=3": 80.3, "#C=2": 33.8},
    "FedNova": {"IID": 89.4, "Dirichlet(0.5)": 88.2, "#C=3": 82.0, "#C=2": 71.7},
}
Sections = dict[str, dict[str, object]]
METHODS: dict[str, Sections] = {
    "FedAvg": {},
    "FedProx": {"train": {"corrections": (DECAY, "fedprox(mu=0.01)")}},
    "SCAFFOLD": {"train": {"corrections": (DECAY, "scaffold")}},
    "FedNova": {"aggregate": {"mix": ("fednova",)}},
    # Not in the published table.
    "FedDyn": {
        "train": {"corrections": (DECAY, "feddyn(alpha=0.01)")},
        "server": {"optimiser": "feddyn(alpha=0.01)"},
        "aggregate": {"weigh": ("equal",)},
    },
    "FedAvgM": {"server": {"optimiser": "momentum(beta=0.5)"}},
    "FedAdam": {"server": {"optimiser": "adam(lr=0.003)"}},
}
CENTRALISED, LARGE = "centralised", "one large step, FedAdam"
METHODS[LARGE] = {
    "train": {"stopping": "steps(steps=1)", "batch_size": 1000, "lr": 0.1, "optimiser": "sgd", "corrections": ()},
    "server": {"optimiser": "adam(lr=0.01, beta2=0.95, tau=0.000001)"},
}


def cells() -> Iterator[resumable.Cell]:
    """What is run, in order of interest."""

    def cell(seed: int, partition: str, method: str) -> resumable.Cell:
        return {"seed": seed, "partition": partition, "method": method}

    yield from (cell(seed, "#C=1", LARGE) for seed in range(3))
    yield cell(0, "#C=2", LARGE)
    for partition in ("#C=2", "#C=3", "Dirichlet(0.5)", "IID"):
        yield from (cell(0, partition, method) for method in PUBLISHED)
    yield from (cell(0, "#C=1", method) for method in PUBLISHED)
    yield from (cell(0, "#C=2, even", method) for method in METHODS)
    yield cell(0, "IID", CENTRALISED)
    for seed in (1, 2):
        for partition in ("#C=3", "Dirichlet(0.5)"):
            yield from (cell(seed, partition, method) for method in PUBLISHED)
    for partition in ("#C=2", "#C=3", "Dirichlet(0.5)"):
        yield from (cell(0, partition, method) for method in METHODS if method not in PUBLISHED)


def job(cell: resumable.Cell) -> fedkeel.Job:
    """The job of one cell."""
    method, alone = METHODS.get(str(cell["method"]), {}), cell["method"] == CENTRALISED
    train = {
        "batch_size": 64,
        "lr": 0.01,
        "optimiser": "sgd(momentum=0.9)",
        "corrections": (DECAY,),
        "stopping": "epochs(epochs=10)",
        "workers": 1,
        "backend": "native",
    }
    return fedkeel.Job(
        name="niid",
        seed=cell["seed"],
        rounds=50,
        data={
            "source": "fashion_mnist",
            "partition": PARTITIONS[str(cell["partition"])],
            "clients": 1 if alone else 10,
        },
        model={"build": "lenet"},
        record={"evaluate_every": 5, "checkpoint_every": 50},
        **{**method, "train": train | method.get("train", {})},
    )


def measure(cell: resumable.Cell) -> resumable.Cell:
    """One run's figures."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        done = fedkeel.run(job(cell), Path(place) / "run", with_report=False)
        by_round = {str(row["round"]): row["value"] for row in done.metrics if row["name"] == "accuracy"}
    return {
        **cell,
        "accuracy": by_round["50"],
        "by_round": by_round,
        "seconds": round(time.perf_counter() - started, 2),
    }


def table(rows: list[resumable.Cell]) -> str:
    """Accuracies by method and partition, means over seeds with 95% intervals, the published ones in brackets."""
    out = [
        "| final accuracy, %: here (published) | " + " | ".join(PARTITIONS) + " |",
        "|---|" + "---:|" * len(PARTITIONS),
    ]
    for method in (*METHODS, CENTRALISED):
        shown = []
        for partition in PARTITIONS:
            found = [float(str(r["accuracy"])) for r in rows if (r["method"], r["partition"]) == (method, partition)]
            known = PUBLISHED.get(method, {}).get(partition)
            shown.append((spread(found) if found else "-") + ("" if known is None else f" ({known:.1f})"))
        out.append(f"| {method} | " + " | ".join(shown) + " |")
    return "\n".join(out)


def main() -> None:
    resumable.by_method(__doc__, cells(), measure, RESULTS)


if __name__ == "__main__":
    main()
