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
    "top_k 35%, int8": {"codec": "top_k(share=0.35, values='int8')", "error_feedback": True},
    "adaptive(50)": {"codec": "adaptive(ratio=50)", "error_feedback": True},
    "adaptive(55)": {"codec": "adaptive(ratio=55)", "error_feedback": True},
    "adaptive(100)": {"codec": "adaptive(ratio=100)", "error_feedback": True},
    "adaptive(115)": {"codec": "adaptive(ratio=115)", "error_feedback": True},
    "adaptive(55), int8 down": {"codec": "adaptive(ratio=55)", "error_feedback": True, "down": "int8"},
}
FIRST = (PLAIN, "int8", "top_k 35%, int8", "adaptive(55)", "adaptive(115)")
ALL, SAMPLED = "all of 20", "10 of 100"
SETTINGS: dict[str, dict[str, dict[str, object]]] = {
    ALL: {"data": {"clients": 20}, "train": {"stopping": "steps(steps=27)"}},
    SAMPLED: {"data": {"clients": 100}, "select": {"cohort": 10}},
}
MODELS = {
    "MLP": {"model": {"build": "mlp(hidden=(200, 200))"}, "train": {"lr": 0.05}},
    "CNN": {"model": {"build": "lenet"}, "train": {"lr": 0.05}},
}


def cells() -> Iterator[resumable.Cell]:
    """What is run, in order of interest."""
    for setting, codecs, seeds in ((ALL, FIRST, 3), (ALL, CODECS, 1), (SAMPLED, CODECS, 3)):
        for seed in range(seeds):
            for model in MODELS:
                yield from ({"seed": seed, "setting": setting, "model": model, "codec": codec} for codec in codecs)


def job(cell: resumable.Cell) -> fedkeel.Job:
    """The job of one cell."""
    model, setting = MODELS[str(cell["model"])], SETTINGS[str(cell["setting"])]
    client = dict(CODECS[str(cell["codec"])])
    down = client.pop("down", "float32")
    return fedkeel.Job(
        name="compression",
        seed=cell["seed"],
        rounds=ROUNDS,
        data={"source": "fashion_mnist", "partition": "dirichlet(alpha=0.3)", **setting["data"]},
        model=model["model"],
        train={"batch_size": 20, "workers": 1, "backend": "native", **model["train"], **setting.get("train", {})},
        select=setting.get("select", {}),
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
    for setting in SETTINGS:
        for model in MODELS:
            given = [row for row in rows if (row["setting"], row["model"]) == (setting, model)]
            base = {row["seed"]: row for row in given if row["codec"] == PLAIN}
            if base:
                out += ["", f"| {model}, {setting} | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(heads)]
            for codec in CODECS:
                of = [row for row in given if row["codec"] == codec and row["seed"] in base]
                if of:
                    out.append(f"| {codec} | " + " | ".join(_figures(of, base)) + " |")
    return "\n".join(out)


def _figures(rows: list[resumable.Cell], base: dict[object, resumable.Cell]) -> list[str]:
    def ratio(row: resumable.Cell, way: str) -> float:
        return float(str(base[row["seed"]][way])) / float(str(row[way]))

    finals = [100 * float(str(row["accuracy"])) for row in rows]
    gained = [100 * (float(str(row["accuracy"])) - float(str(base[row["seed"]]["accuracy"]))) for row in rows]
    less = [f"{statistics.fmean(ratio(row, way) for row in rows):.1f}" for way in ("up", "down")]
    points = "" if rows[0]["codec"] == PLAIN else interval(gained)
    return [*less, interval(finals), points, str(len(rows))]


def main() -> None:
    def line(row: resumable.Cell) -> str:
        return (
            f"{row['model']}, {row['codec']}, seed {row['seed']}: {row['accuracy']}, {row['up']} B ({row['seconds']} s)"
        )

    resumable.run(__doc__, cells(), ("seed", "setting", "model", "codec"), measure, RESULTS, line)


if __name__ == "__main__":
    main()
