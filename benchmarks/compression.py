"""What compression costs in accuracy, and saves in bytes: Fashion-MNIST, an MLP and a CNN, three seeds.
`python benchmarks/compression.py` goes on where it was stopped; figures lie in benchmarks/results/compression.jsonl.

100 clients, Dirichlet(0.3), ten a round, 100 rounds of one local epoch in batches of 20 at 0.05 (the MLP, 200,000
parameters) and at 0.05 (the LeNet of NIID-Bench, 44,000). Everything is the same but the codec; those that are biased
or low have error feedback. Bytes are those of whole envelopes, headers included. Accuracy is the mean of the last five
evaluations, every second round.
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

RESULTS = Path(__file__).parent / "results" / "compression.jsonl"
ROUNDS = 100
PLAIN = "float32"
CODECS: dict[str, dict[str, object]] = {
    PLAIN: {},
    "float16": {"codec": "float16"},
    "int8": {"codec": "int8"},
    "int4": {"codec": "int4", "error_feedback": True},
    "sign": {"codec": "sign", "error_feedback": True},
    "top_k 10%": {"codec": "top_k(share=0.1)", "error_feedback": True},
    "top_k 1%": {"codec": "top_k(share=0.01)", "error_feedback": True},
    "top_k 10%, int4": {"codec": "top_k(share=0.1, values='int4')", "error_feedback": True},
    "top_k 3%, int4": {"codec": "top_k(share=0.03, values='int4')", "error_feedback": True},
    "adaptive 50x": {"codec": "adaptive(ratio=50)", "error_feedback": True},
    "adaptive 100x": {"codec": "adaptive(ratio=100)", "error_feedback": True},
}
DOWN = "adaptive 50x, int8 down"
CODECS[DOWN] = {**CODECS["adaptive 50x"], "down": "int8"}
MODELS = {
    "MLP": {"model": {"build": "mlp(hidden=(200, 200))"}, "train": {"lr": 0.05}},
    "CNN": {"model": {"build": "lenet"}, "train": {"lr": 0.05}},
}


def cells() -> Iterator[resumable.Cell]:
    for seed in range(3):
        for model in MODELS:
            yield from ({"seed": seed, "model": model, "codec": codec} for codec in CODECS)


def job(cell: resumable.Cell) -> fedkeel.Job:
    """The job of one cell."""
    model = MODELS[str(cell["model"])]
    client = dict(CODECS[str(cell["codec"])])
    down = client.pop("down", "float32")
    return fedkeel.Job(
        name="compression",
        seed=cell["seed"],
        rounds=ROUNDS,
        data={"source": "fashion_mnist", "partition": "dirichlet(alpha=0.3)", "clients": 100},
        model=model["model"],
        train={"batch_size": 20, "workers": 1, "backend": "native", **model["train"]},
        select={"cohort": 10},
        client=client,
        server={"codec": down},
        record={"evaluate_every": 2, "checkpoint_every": ROUNDS},
    )


def measure(cell: resumable.Cell) -> resumable.Cell:
    """One run's figures."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        done = fedkeel.run(job(cell), Path(place) / "run", with_report=False)
        values = [row["value"] for row in done.metrics if row["name"] == "accuracy"]
        up, down = (sum(row[name] for row in done.rounds) for name in ("bytes_up", "bytes_down"))
    return {
        **cell,
        "accuracy": round(statistics.fmean(values[-5:]), 5),
        "up": up,
        "down": down,
        "seconds": round(time.perf_counter() - started, 1),
    }


def table(rows: list[resumable.Cell]) -> str:
    """Means over seeds with 95% intervals; differences to float32 are paired by seed."""
    heads = ("up, x less", "down, x less", "accuracy, %", "points over float32", "seeds")
    out = []
    for model in MODELS:
        out += ["", f"| {model} | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(heads)]
        base = {row["seed"]: row for row in rows if (row["model"], row["codec"]) == (model, PLAIN)}
        for codec in CODECS:
            of = [r for r in rows if (r["model"], r["codec"]) == (model, codec) and r["seed"] in base]
            if not of:
                continue
            less = [
                f"{statistics.fmean(float(str(base[r['seed']][way])) / float(str(r[way])) for r in of):.1f}"
                for way in ("up", "down")
            ]
            finals = [100 * float(str(r["accuracy"])) for r in of]
            gained = [100 * (float(str(r["accuracy"])) - float(str(base[r["seed"]]["accuracy"]))) for r in of]
            points = "" if codec == PLAIN else interval(gained)
            out.append(f"| {codec} | {less[0]} | {less[1]} | {interval(finals)} | {points} | {len(of)} |")
    return "\n".join(out)


def main() -> None:
    def line(row: resumable.Cell) -> str:
        return (
            f"{row['model']}, {row['codec']}, seed {row['seed']}: {row['accuracy']}, {row['up']} B ({row['seconds']} s)"
        )

    resumable.run(__doc__, cells(), ("seed", "model", "codec"), measure, RESULTS, line)


if __name__ == "__main__":
    main()
