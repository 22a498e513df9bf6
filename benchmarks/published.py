"""Attacks against defences in a setting that others have published. `python benchmarks/published.py` goes on where it
was stopped; figures lie in benchmarks/results/published.jsonl, one run a line.

Fashion-MNIST, 100 clients that all take part, Dirichlet(0.5), an MLP of 256, 128 and 64 units, Adam at a learning rate
of 0.001, batch 32, 50 rounds, 20 of the clients hostile. What they leave open is set so: one local epoch a round,
updates weighted by their examples where the rule takes weights, parameters of the rules for 20 hostile clients.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import fedkeel
import resumable
from defence_tables import spread
from defences import MEAN, OURS, SERVER, accuracy
from defences import defences as compositions
from fedkeel.core.keys import Key
from fedkeel.world.federation import Federation

RESULTS = Path(__file__).parent / "results" / "published.jsonl"
CLIENTS, HOSTILE, ROUNDS, CLEAN = 100, 20, 50, "none"
ALONE = "server's examples only"
ATTACKS = (CLEAN, "gaussian", "alie", "fang", "min_max")
STRONGER = ("alie(z=1.5)", "min_max(direction='unit')")  # of two that leave the plain mean nearly as it is here
PUBLISHED = {  # final accuracies in the published table, in the order of ATTACKS
    "plain mean": (0.68, 0.25, 0.17, 0.57, 0.11),
    "median": (0.71, 0.66, 0.65, 0.67, 0.60),
    "trimmed mean": (0.69, 0.69, 0.54, 0.62, 0.58),
    "multi-Krum": (0.66, 0.74, 0.65, 0.70, 0.67),
    "Bulyan": (0.62, 0.71, 0.72, 0.69, 0.76),
}


def defences() -> dict[str, dict[str, object]]:
    """[aggregate] of every defence."""
    ours = compositions(HOSTILE)
    return {
        OURS: ours[OURS],
        MEAN: ours[MEAN],
        "median": ours["median"],
        "trimmed mean": ours["trimmed mean"],
        "multi-Krum": ours["multi-Krum"],
        "Bulyan": {"reduce": f"bulyan(f={HOSTILE})"},
    }


def cells() -> Iterator[resumable.Cell]:
    yield from ({"seed": seed, "attack": CLEAN, "defence": ALONE} for seed in range(3))
    for seed in range(3):
        for attack in (*ATTACKS, *STRONGER):
            yield from ({"seed": seed, "attack": attack, "defence": name} for name in (OURS, MEAN))
    for seed in range(3):
        for attack in (*ATTACKS, *STRONGER):
            yield from ({"seed": seed, "attack": attack, "defence": name} for name in defences())


def job(cell: resumable.Cell, **changes: object) -> fedkeel.Job:
    values: dict[str, object] = {
        "name": "published",
        "seed": cell["seed"],
        "rounds": ROUNDS,
        "data": {"source": "fashion_mnist", "partition": "dirichlet(alpha=0.5)", "clients": CLIENTS},
        "model": {"build": "mlp(hidden=(256, 128, 64))"},
        "train": {"batch_size": 32, "lr": 0.001, "optimiser": "adam", "workers": 1, "backend": "native"},
        "record": {"evaluate_every": 10, "checkpoint_every": ROUNDS},
        "server": {"examples": SERVER},
        "attack": {} if cell["attack"] == CLEAN else {"rule": cell["attack"], "clients": HOSTILE},
    }
    return fedkeel.Job(**{**values, **changes})


def alone(cell: resumable.Cell) -> float:
    """The accuracy of a model that saw the server's examples only: 100 epochs."""
    training = {"batch_size": 32, "lr": 0.001, "optimiser": "adam", "workers": 1, "stopping": "epochs(epochs=100)"}
    federation, key = Federation.of(job(cell, train=training)), Key.root(int(str(cell["seed"])))
    assert federation.referee is not None
    theta = federation.theta()
    return accuracy(federation, theta + federation.referee.update(theta, key))


def measure(cell: resumable.Cell) -> resumable.Cell:
    """One run's figures."""
    started = time.perf_counter()
    if cell["defence"] == ALONE:
        return {**cell, "accuracy": alone(cell), "seconds": round(time.perf_counter() - started, 2)}
    with tempfile.TemporaryDirectory() as place:
        try:
            one = job(cell, aggregate=defences()[str(cell["defence"])])
            done = fedkeel.run(one, Path(place) / "run", with_report=False)
        except fedkeel.FedkeelError as error:
            found: resumable.Cell = {"accuracy": None, "why": str(error)}
        else:
            by_round = {str(row["round"]): row["value"] for row in done.metrics if row["name"] == "accuracy"}
            found = {"accuracy": by_round.get(str(ROUNDS)), "by_round": by_round}
    return {**cell, **found, "seconds": round(time.perf_counter() - started, 2)}


def table(rows: list[resumable.Cell]) -> str:
    """Means over seeds with 95% intervals, each with the published figure; then ours against the best of these."""
    names = list(PUBLISHED)

    def chosen(attack: str, defence: str) -> list[resumable.Cell]:
        return resumable.newest(r for r in rows if (r["attack"], r["defence"]) == (attack, defence))

    def found(attack: str, defence: str) -> list[float]:
        return [float(str(r["accuracy"] or 0)) for r in chosen(attack, defence)]

    out = [
        "| accuracy, %: here (published) | " + " | ".join(names) + f" | **{OURS}** | best published | difference |",
        "|---|" + "---:|" * (len(names) + 3),
    ]
    for attack in (*ATTACKS, *STRONGER):
        known = ATTACKS.index(attack) if attack in ATTACKS else None
        cells = []
        for name in names:
            there = "" if known is None else f" ({100 * PUBLISHED[name][known]:.0f})"
            cells.append(spread(found(attack, name)) + there)
        mine, best, gap = found(attack, OURS), "-", "-"
        if known is not None and mine:
            most = max(figures[known] for figures in PUBLISHED.values())
            best, gap = f"{100 * most:.0f}", f"{100 * (sum(mine) / len(mine) - most):+.1f}"
        dagger = "†" if any(row.get("before") for row in chosen(attack, OURS)) else ""
        out.append(f"| {attack} | " + " | ".join([*cells, f"**{spread(mine)}**{dagger}", best, gap]) + " |")
    single = spread(found(CLEAN, ALONE))
    if any(row.get("before") for row in rows):
        out += [
            "",
            "† At least one seed by learned weights as they were before their steps were checked against the loss.",
        ]
    return "\n".join([*out, "", f"The server's 500 examples alone, which only {OURS} use: {single}."])


def main() -> None:
    def line(row: resumable.Cell) -> str:
        return f"{row['attack']}, {row['defence']}: {row['accuracy']} ({row['seconds']} s)"

    resumable.run(__doc__, cells(), ("seed", "attack", "defence"), measure, RESULTS, line)


if __name__ == "__main__":
    main()
