"""What privacy costs in accuracy: Fashion-MNIST among 1,000 clients, epsilon against accuracy for each mechanism.
`python benchmarks/privacy.py` goes on where it was stopped; figures lie in benchmarks/results/privacy.jsonl.

1,000 clients of 60 examples on the mean, Dirichlet(0.3); an MLP of one hidden layer of 32 (25,450 parameters); 500
clients a round expected, 100 rounds of one local epoch in batches of 10 at 0.1; server momentum 0.9; delta 1e-5.
central, adaptive and local hide clients; the noise of central and adaptive counts on Poisson sampling; ftrl hides
clients and counts on nothing but that a client rests for a round; examples hides examples, and clients with fewer than
30 of them do not take part. Without privacy everything is the same but the mechanism. Accuracy is the mean of the last
three evaluations, every fifth round.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import fedkeel
import resumable
from localwork import interval

RESULTS = Path(__file__).parent / "results" / "privacy.jsonl"
ROUNDS, CLIENTS, COHORT = 100, 1000, 500
NONE = "none"
MECHANISMS: dict[str, dict[str, object]] = {
    NONE: {},
    "central": {"mechanism": "central(norm=0.3)"},
    "adaptive": {"mechanism": "adaptive(norm=0.3, quantile=0.3)"},
    "ftrl": {"mechanism": "ftrl(norm=0.3, bands=2)", "rule": "round_robin"},
    "local": {"mechanism": "local(norm=0.3)", "rule": "round_robin"},
    "examples": {"mechanism": "examples(norm=1.0)", "rule": "round_robin", "least_examples": 30},
}
EPSILONS = {
    "central": (8, 4, 2, 1),
    "adaptive": (8, 4, 2, 1),
    "ftrl": (8, 4, 2, 1),
    "local": (8, 128, 1024),
    "examples": (8, 4, 2),
}
SEEDS = 3


def cells() -> Iterator[resumable.Cell]:
    """What is run, in order of interest."""
    for seed in range(SEEDS):
        yield {"seed": seed, "mechanism": NONE, "epsilon": 0}
        for place in range(4):
            for mechanism, epsilons in EPSILONS.items():
                if place < len(epsilons):
                    yield {"seed": seed, "mechanism": mechanism, "epsilon": epsilons[place]}


def job(cell: resumable.Cell) -> fedkeel.Job:
    """The job of one cell."""
    said = dict(MECHANISMS[str(cell["mechanism"])])
    rule = said.pop("rule", "poisson")
    return fedkeel.Job(
        name="privacy",
        seed=cell["seed"],
        rounds=ROUNDS,
        data={"source": "fashion_mnist", "partition": "dirichlet(alpha=0.3)", "clients": CLIENTS},
        model={"build": "mlp(hidden=(32,))"},
        train={"batch_size": 10, "lr": 0.1, "workers": 1},
        select={"cohort": COHORT, "rule": rule},
        aggregate={"weigh": ("equal",)},
        privacy={**said, "epsilon": float(str(cell["epsilon"]))} if said else {},
        server={"optimiser": "momentum(lr=1.0, beta=0.9)"},
        record={"evaluate_every": 5, "checkpoint_every": ROUNDS},
    )


def measure(cell: resumable.Cell) -> resumable.Cell:
    """One run's figures."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        done = fedkeel.run(job(cell), Path(place) / "run", with_report=False)
        values = [row["value"] for row in done.metrics if row["name"] == "accuracy"]
        rounds = done.rounds
    return {
        **cell,
        "accuracy": round(statistics.fmean(values[-3:]), 5),
        "spent": rounds[-1]["epsilon"],
        "rounds": len(rounds),
        "seconds": round(time.perf_counter() - started, 1),
    }


def table(rows: list[resumable.Cell]) -> str:
    """Means over seeds with 95% intervals; differences to no privacy are paired by seed."""
    base = {row["seed"]: float(str(row["accuracy"])) for row in rows if row["mechanism"] == NONE}
    out = ["| mechanism | epsilon | accuracy, % | points over none | seeds |", "|---|---:|---:|---:|---:|"]
    for mechanism in MECHANISMS:
        for epsilon in EPSILONS.get(mechanism, (0,)):
            of = [r for r in rows if (r["mechanism"], r["epsilon"]) == (mechanism, epsilon) and r["seed"] in base]
            if of:
                finals = [100 * float(str(row["accuracy"])) for row in of]
                points = [final - 100 * base[row["seed"]] for final, row in zip(finals, of, strict=True)]
                shown = ("none", "") if mechanism == NONE else (str(epsilon), interval(points))
                out.append(f"| {mechanism} | {shown[0]} | {interval(finals)} | {shown[1]} | {len(of)} |")
    return "\n".join(out)


def main() -> None:
    def line(row: resumable.Cell) -> str:
        return f"{row['mechanism']}({row['epsilon']}), seed {row['seed']}: {row['accuracy']} ({row['seconds']} s)"

    resumable.run(__doc__, cells(), ("seed", "mechanism", "epsilon"), measure, RESULTS, line)


if __name__ == "__main__":
    main()
