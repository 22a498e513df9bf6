"""Attacks against defences: final accuracies over seeds, in one table. `python benchmarks/defences.py` goes on where it
was stopped; figures lie in benchmarks/results/defences.jsonl, one run a line.

Fashion-MNIST, 50 clients that all take part, one epoch a round of SGD (batch 20, learning rate 0.1), the 2NN of McMahan
et al. (199,210 parameters), 20 rounds. The server holds 500 of the 60,000 training examples; only the defences that say
so use them. "clean" is the plain mean without an attack.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

import fedkeel
import resumable
from fedkeel.core.keys import Key
from fedkeel.train import Task, evaluate
from fedkeel.world.federation import Federation

RESULTS = Path(__file__).parent / "results" / "defences.jsonl"
CLIENTS, ROUNDS, SERVER = 50, 20, 500
DIRICHLET, IID = "dirichlet(alpha=0.5)", "iid"
OURS, MEAN, CLEAN = "learned weights", "plain mean", "none"
ATTACKS = (
    *("sign_flip", "gaussian", "nan", "alie", "ipm(scale=0.5)", "ipm(scale=2.0)", "min_max", "min_sum", "fang"),
    *("mimic", "replacement", "sybil", "free_rider", "inflated_count", "label_flip", "backdoor"),
    *("alie(z=1.5)", "min_max(direction='unit')", "min_sum(direction='unit')"),
)
COSTLY = "tailored"  # asks the server's rules 24 times a round
BASELINES = ("centralised", "local only", "server's examples only")


def defences(f: int) -> dict[str, dict[str, object]]:
    """[aggregate] of every defence, where `f` clients are hostile."""
    return {
        MEAN: {},
        "median": {"reduce": "median"},
        "trimmed mean": {"reduce": f"trimmed_mean(trim={f})"},
        "multi-Krum": {"weigh": [f"multi_krum(f={f})"]},
        "mixing + trimmed mean": {"mix": [f"nnm(f={f})"], "reduce": f"trimmed_mean(trim={f})"},
        "FLAME": {"screens": ["flame"], "mix": ["norm_cap()"]},
        "FLTrust (server's examples)": {"weigh": ["fltrust"], "mix": ["equal_norms"]},
        OURS: {"screens": ["norm_mad"], "weigh": ["learned"], "reduce": "weighted_trimmed_mean(share=0.2)"},
    }


def cells() -> Iterator[dict[str, object]]:
    """What is run, in order of interest: ours everywhere, the plain mean beside it, the others at a fifth hostile."""
    seeds = range(3)

    def cell(seed: int, partition: str, hostile: int, attack: str, defence: str) -> dict[str, object]:
        return {"seed": seed, "partition": partition, "hostile": hostile, "attack": attack, "defence": defence}

    for seed in seeds:
        for partition in (DIRICHLET, IID):
            for name in (*BASELINES, *defences(10)):
                yield cell(seed, partition, 0, CLEAN, name)
    blocks = ((DIRICHLET, 10), (DIRICHLET, 20), (IID, 10), (IID, 20))
    for partition, hostile in blocks:
        for seed in seeds:
            yield from (cell(seed, partition, hostile, attack, OURS) for attack in ATTACKS)
    for attack in ATTACKS:
        yield from (cell(0, DIRICHLET, 10, attack, name) for name in defences(10) if name != OURS)
    for seed in seeds:
        yield cell(seed, DIRICHLET, 10, COSTLY, OURS)
    for partition in (DIRICHLET, IID):
        for seed in seeds:
            for attack in ATTACKS:
                yield from (cell(seed, partition, 5, attack, name) for name in (OURS, MEAN))
    for partition, hostile in blocks:
        for seed in seeds:
            yield from (cell(seed, partition, hostile, attack, MEAN) for attack in ATTACKS)
    for seed in seeds:
        yield from (cell(seed, DIRICHLET, 10, COSTLY, name) for name in (OURS, MEAN, "median", "multi-Krum"))
    for seed in seeds[1:]:
        for attack in ATTACKS:
            yield from (cell(seed, DIRICHLET, 10, attack, name) for name in defences(10) if name != OURS)


def job(cell: dict[str, object], **changes: object) -> fedkeel.Job:
    values: dict[str, object] = {
        "name": "defences",
        "seed": cell["seed"],
        "rounds": ROUNDS,
        "data": {"source": "fashion_mnist", "partition": cell["partition"], "clients": CLIENTS},
        "model": {"build": "mlp"},
        "train": {"batch_size": 20, "lr": 0.1, "workers": 1, "backend": "native"},
        "record": {"evaluate_every": ROUNDS, "checkpoint_every": ROUNDS},
        "server": {"examples": SERVER},
    }
    if cell["attack"] != CLEAN:
        values["attack"] = {"rule": cell["attack"], "clients": cell["hostile"]}
    return fedkeel.Job(**{**values, **changes})


def measure(cell: dict[str, object]) -> dict[str, object]:
    """One run's figures."""
    started = time.perf_counter()
    found = _baseline(cell) if cell["defence"] in BASELINES else _run(cell)
    return {**cell, **found, "seconds": round(time.perf_counter() - started, 2)}


def _run(cell: dict[str, object], **changes: object) -> dict[str, object]:
    f = int(str(cell["hostile"])) or 10  # without an attack the defences still expect a fifth
    one = job(cell, **{"aggregate": defences(f)[str(cell["defence"])], **changes})
    with tempfile.TemporaryDirectory() as place:
        try:
            done = fedkeel.run(one, Path(place) / "run", with_report=False)
        except fedkeel.FedkeelError as error:
            return {"accuracy": None, "why": str(error)}
        final = {row["name"]: row["value"] for row in done.metrics if row["round"] == ROUNDS}
        updates, skipped = done.updates, sum(row["skipped"] is not None for row in done.rounds)
    out = [u for u in updates if not u["weight"]]
    hostile = [u for u in updates if u["hostile"]]
    return {
        "accuracy": final.get("accuracy"),
        "backdoor": final.get("backdoor"),
        "hostile_weight": sum(u["weight"] or 0 for u in hostile) / ROUNDS,
        "hostile_out": sum(not u["weight"] for u in hostile) / len(hostile) if hostile else None,
        "honest_out": sum(not u["hostile"] for u in out) / (len(updates) - len(hostile)),
        "skipped": skipped,
    }


def _baseline(cell: dict[str, object]) -> dict[str, object]:
    if cell["defence"] == "centralised":
        pooled = {"source": "fashion_mnist", "partition": IID, "clients": 1}
        return _run({**cell, "defence": MEAN}, data=pooled)
    epochs = ROUNDS if cell["defence"] == "local only" else 100
    alone = {"batch_size": 20, "lr": 0.1, "workers": 1, "backend": "native", "stopping": f"epochs(epochs={epochs})"}
    federation = Federation.of(job(cell, train=alone))
    theta, key = federation.theta(), Key.root(int(str(cell["seed"])))
    if cell["defence"] == "local only":
        tasks = [Task(i, key.fold(i)) for i in range(CLIENTS)]
        models = (theta + done.delta for done in federation.trainer().train(theta, tasks))
    else:
        assert federation.referee is not None
        models = (theta + federation.referee.update(theta, key) for _ in range(1))
    shares = [accuracy(federation, model) for model in models]
    return {"accuracy": sum(shares) / len(shares)}


def accuracy(federation: Federation, theta: torch.Tensor) -> float:
    pool = federation.pool
    loss = federation.work.loss
    found = evaluate(federation.module, federation.layout, theta, pool.test_x, pool.test_y, pool.prepare, loss)
    return float(found["accuracy"] or 0.0)


def main() -> None:
    def line(row: dict[str, object]) -> str:
        where = f"{row['partition']}, {row['hostile']} hostile, {row['attack']}, {row['defence']}"
        return f"{where}: {row['accuracy']} {row.get('backdoor') or ''}"

    resumable.run(__doc__, cells(), ("seed", "partition", "hostile", "attack", "defence"), measure, RESULTS, line)


if __name__ == "__main__":
    main()
