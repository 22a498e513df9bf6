"""Fixed local epochs against local work that stops when it no longer pays: rounds and steps to a target accuracy.
`python benchmarks/localwork.py` goes on where it was stopped; figures lie in benchmarks/results/localwork.jsonl.

Fashion-MNIST, 100 clients of Dirichlet(0.5), 10 a round, the 2NN of McMahan et al. (199,210 parameters), batch 20, SGD
at 0.05, 100 rounds. The target is reached when the mean of three evaluations in a row is there: one alone may be luck.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import fedkeel
import resumable

RESULTS = Path(__file__).parent / "results" / "localwork.jsonl"
ROUNDS, TARGET = 100, 0.85
FIXED = "epochs(epochs=5)"
RULES = (
    FIXED,
    "plateau(epsilon=0.02, most=10)",
    "plateau(epsilon=0.05, most=10)",
    "epochs(epochs=10)",
    "epochs(epochs=2)",
)


def cells() -> Iterator[resumable.Cell]:
    for seed in range(5):
        yield from ({"seed": seed, "stopping": rule} for rule in RULES)


def measure(cell: resumable.Cell) -> resumable.Cell:
    """One run: accuracy after every round, steps of all clients up to it."""
    started = time.perf_counter()
    job = fedkeel.Job(
        name="localwork",
        seed=cell["seed"],
        rounds=ROUNDS,
        data={"source": "fashion_mnist", "partition": "dirichlet(alpha=0.5)", "clients": 100},
        model={"build": "mlp"},
        select={"cohort": 10},
        train={"batch_size": 20, "lr": 0.05, "stopping": cell["stopping"], "workers": 1, "backend": "native"},
        record={"checkpoint_every": ROUNDS},
    )
    with tempfile.TemporaryDirectory() as place:
        done = fedkeel.run(job, Path(place) / "run", with_report=False)
        accuracy = [row["value"] for row in done.metrics if row["name"] == "accuracy"][1:]
        steps = [0] * ROUNDS
        for row in done.updates:
            steps[row["round"] - 1] += row["steps"] or 0
    return {**cell, "accuracy": accuracy, "steps": steps, "seconds": round(time.perf_counter() - started, 2)}


def reached(row: resumable.Cell) -> tuple[int | None, float]:
    """The first round whose three latest evaluations are at the target on average; steps up to then, in thousands."""
    accuracy, steps = row["accuracy"], row["steps"]
    assert isinstance(accuracy, list)
    assert isinstance(steps, list)
    for at in range(2, len(accuracy)):
        if statistics.fmean(accuracy[at - 2 : at + 1]) >= TARGET:
            return at + 1, sum(steps[: at + 1]) / 1000
    return None, sum(steps) / 1000


def table(rows: list[resumable.Cell]) -> str:
    """Means over seeds with 95% intervals; differences to five fixed epochs are paired by seed."""
    heads = ("rounds to 85%", "fewer rounds than 5 epochs, %", "thousand steps to 85%", "final accuracy, %", "seeds")
    out = ["| local work | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(heads)]
    fixed = {row["seed"]: reached(row)[0] for row in rows if row["stopping"] == FIXED}
    for rule in RULES:
        of = [row for row in rows if row["stopping"] == rule]
        if not of:
            continue
        when = [(reached(row), fixed.get(row["seed"])) for row in of]
        rounds = [float(at) for (at, _), _ in when if at is not None]
        saved = [100 * (1 - at / base) for (at, _), base in when if at is not None and base]
        finals = [100 * statistics.fmean(row["accuracy"][-3:]) for row in of if isinstance(row["accuracy"], list)]
        shown = [interval(rounds), "" if rule == FIXED else interval(saved), interval([s for (_, s), _ in when])]
        missed = "" if len(rounds) == len(of) else f", {len(of) - len(rounds)} never"
        out.append(f"| `{rule}` | {shown[0]}{missed} | {shown[1]} | {shown[2]} | {interval(finals)} | {len(of)} |")
    return "\n".join(out)


def interval(values: list[float]) -> str:
    """Mean and half of the 95% interval (Student's t)."""
    if len(values) < 2:
        return f"{values[0]:.1f}" if values else "-"
    t = {2: 12.7, 3: 4.30, 4: 3.18, 5: 2.78}.get(len(values), 2.0)
    return f"{statistics.fmean(values):.1f} ± {t * statistics.stdev(values) / len(values) ** 0.5:.1f}"


def main() -> None:
    def line(row: resumable.Cell) -> str:
        at, steps = reached(row)
        last = row["accuracy"][-1] if isinstance(row["accuracy"], list) else None
        return (
            f"{row['stopping']}, seed {row['seed']}: round {at}, {steps:.0f}k steps, final {last} ({row['seconds']} s)"
        )

    resumable.run(__doc__, cells(), ("seed", "stopping"), measure, RESULTS, line)


if __name__ == "__main__":
    main()
