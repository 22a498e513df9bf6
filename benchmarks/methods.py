"""What a round of each method costs beside FedAvg's, at equal steps: `python benchmarks/methods.py` writes
benchmarks/results/methods.json. All methods take turns, round by round, so that what else the machine does hits them
alike; one worker, so that the ratio is of work and not of waiting. The figure is the median over the rounds of a
method's seconds over FedAvg's in the same turn: training on the clients, wire, server; without evaluation.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import fedkeel
from fedkeel.core.types import ClientMemory, RoundReport, ServerState
from fedkeel.sim.simulator import Simulator
from fedkeel.world.federation import Federation

RESULTS = Path(__file__).parent / "results" / "methods.json"
ROUNDS = 28
TASKS: dict[str, dict[str, dict[str, object]]] = {
    "logistic, batch 20": {"model": {"build": "logistic"}, "train": {"batch_size": 20, "lr": 0.1}},
    "MLP 2NN, batch 20": {"model": {"build": "mlp"}, "train": {"batch_size": 20, "lr": 0.1}},
    "LeNet, batch 64": {"model": {"build": "lenet"}, "train": {"batch_size": 64, "lr": 0.01}},
}
WITHOUT_BODY = {"logistic, batch 20": ("FedPer", "FedRep", "MOON")}  # all of the model is its head
METHODS: dict[str, dict[str, dict[str, object]]] = {
    "FedAvg": {},
    "FedProx": {"train": {"corrections": ("fedprox(mu=0.01)",)}},
    "FedProx, adaptive": {"train": {"corrections": ("adaptive_fedprox(mu=0.01)",)}},
    "SCAFFOLD": {"train": {"corrections": ("scaffold",)}},
    "FedDyn": {"train": {"corrections": ("feddyn(alpha=0.01)",)}, "server": {"optimiser": "feddyn(alpha=0.01)"}},
    "FedCM": {"train": {"corrections": ("fedcm(alpha=0.1)",)}},
    "FedNova": {"aggregate": {"mix": ("fednova",)}},
    "FedAdam": {"server": {"optimiser": "adam"}},
    "local momentum": {"train": {"optimiser": "sgd(momentum=0.9)"}},
    "MOON": {"train": {"objective": "moon(mu=1.0)"}},
    "FedPer": {"model": {"private": ("head",)}},
    "FedRep": {"model": {"private": ("head",)}, "train": {"private_first": "epochs(epochs=1)"}},
    "Ditto": {"train": {"objective": "ditto(lam=0.1)"}},
    "APFL": {"train": {"objective": "apfl"}},
    "Per-FedAvg": {"train": {"objective": "per_fedavg(alpha=0.01)"}},
}


class Seconds:
    """A recorder that keeps what each round took."""

    def __init__(self) -> None:
        self.of: list[float] = []

    def round(self, report: RoundReport) -> None:
        assert report.skipped is None, report.skipped
        self.of.append(sum(report.seconds.get(part, 0.0) for part in ("train", "aggregate")))

    def metrics(self, *_: object) -> None: ...
    def checkpoint(self, *_: object) -> None: ...


def simulator(task: str, method: str, seconds: Seconds) -> Simulator:
    """A federation of 10 of 100 clients, to be run round by round."""
    given = {key: {**TASKS[task].get(key, {}), **METHODS[method].get(key, {})} for key in ("model", "train", "server")}
    given["train"] |= {"workers": 1}
    job = fedkeel.Job(
        rounds=ROUNDS,
        data={"source": "fashion_mnist", "partition": "dirichlet(alpha=0.5)", "clients": 100, "holdout": 0.1},
        select={"cohort": 10},
        record={"evaluate_every": ROUNDS, "checkpoint_every": ROUNDS},
        aggregate=METHODS[method].get("aggregate", {}),
        **given,
    )
    federation = Federation.of(job)
    return Simulator(federation, federation.trainer(), ServerState(federation.theta()), ClientMemory(), seconds)


def measure(task: str) -> dict[str, dict[str, object]]:
    """Every method's median seconds and ratio."""
    kept = {method: Seconds() for method in METHODS if method not in WITHOUT_BODY.get(task, ())}
    running = {method: simulator(task, method, kept[method]) for method in kept}
    pending = list(running)
    while pending:  # a turn is a round: the scheduler waits for all; another method begins each time
        pending = [*pending[1:], pending[0]]
        pending = [method for method in pending if not running[method].step()]
    found = {}
    for method, seconds in kept.items():
        ratios = [a / b for a, b in zip(seconds.of[1:], kept["FedAvg"].of[1:], strict=True)]
        found[method] = {
            "seconds": statistics.median(seconds.of[1:]),
            "ratio": statistics.median(ratios),
            "backend": running[method].trainer.name,
        }
    return found


def table(results: dict[str, dict[str, dict[str, object]]]) -> str:
    """Ratios to FedAvg, method by task; the backend where it is another than FedAvg's."""
    out = ["| a round over FedAvg's | " + " | ".join(results) + " |", "|---|" + "---:|" * len(results)]
    for method in METHODS:
        shown = []
        for by_method in results.values():
            if method not in by_method:
                shown.append("-")
                continue
            one, base = by_method[method], by_method["FedAvg"]
            text = f"{one['ratio']:.2f}x" if method != "FedAvg" else f"{1000 * float(str(one['seconds'])):.0f} ms"
            shown.append(text + ("" if one["backend"] == base["backend"] else f" ({one['backend']})"))
        out.append(f"| {method} | " + " | ".join(shown) + " |")
    return "\n".join(out)


def main() -> None:
    results = {}
    for task in TASKS:
        results[task] = measure(task)
        print(task, {method: f"{one['ratio']:.3f}" for method, one in results[task].items()}, flush=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
