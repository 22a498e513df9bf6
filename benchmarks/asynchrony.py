"""Slow devices: synchronous rounds, deadlines and asynchrony on one virtual clock, with the reference classes.
`python benchmarks/asynchrony.py` goes on where it was stopped; figures lie in benchmarks/results/asynchrony.jsonl.

Fashion-MNIST, 100 clients that all take part, the 2NN (200,000 parameters), one local epoch of batches of 20 at 0.05. A
third of the clients have devices of class A, B and C each, whose local round takes 1.0, 2.3 and 5.7 seconds. Each
client holds 20 % of its examples back to be tested on. Two ways to hand out examples: Dirichlet(0.3), the classes of
devices drawn by lot; and by device, where class A holds mostly the labels 0 to 3, B 4 to 6 and C 7 to 9, so that who is
left behind can be seen. Synchronous rounds are given 40 rounds, which take 228 s; everybody else has the same time. The
target is what the synchronous run of the same seed reaches at the end (the mean of its last three evaluations). The
buffer of 20 was chosen on the first seed of Dirichlet(0.3), among 5, 10 and 20.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

import fedkeel
import resumable
from fedkeel.core.keys import Key
from fedkeel.world.pool import Pool, Split
from localwork import interval

RESULTS = Path(__file__).parent / "results" / "asynchrony.jsonl"
CLIENTS, ROUNDS = 100, 40
TIMES = {"A": 1.0, "B": 2.3, "C": 5.7}
SECONDS = ROUNDS * TIMES["C"]
LABELS = {"A": (0, 1, 2, 3), "B": (4, 5, 6), "C": (7, 8, 9)}
OWN = 0.8
"""Of the examples of a label, the share that the clients of its class of devices hold; the others hold the rest."""
SYNC = "sync"
LATE = ("examples", "staleness")
METHODS: dict[str, dict[str, object]] = {
    SYNC: {},
    "semi_sync, late dropped": {"schedule": "semi_sync(deadline=2.5)"},
    "semi_sync, late used": {"schedule": "semi_sync(deadline=2.5, late='use')", "weigh": LATE},
    "fedbuff": {"schedule": "fedbuff(buffer=20)", "weigh": LATE},
    "fedbuff, even_share": {"schedule": "fedbuff(buffer=20)", "weigh": (*LATE, "even_share")},
    "fedbuff, no staleness": {"schedule": "fedbuff(buffer=20)"},
    "fedbuff, buffer of 10": {"schedule": "fedbuff(buffer=10)", "weigh": LATE},
    "fedasync": {"schedule": "fedasync", "weigh": LATE, "mix": ("models",), "server": "sgd(lr=0.6)"},
}
GLOBAL = ("global", "accuracy")
DATA = ("Dirichlet(0.3)", "by device")


@fedkeel.rule("partition")
def by_device(pool: Pool, clients: int, key: Key) -> Split:
    """Labels go mostly to clients of one class of devices, whose names begin with it."""
    kinds = list(TIMES)
    owner = torch.zeros(10, dtype=torch.int64)
    for at, kind in enumerate(kinds):
        owner[list(LABELS[kind])] = at
    draw = key.torch()
    stray = torch.rand(len(pool.y), generator=draw) >= OWN
    other = (owner[pool.y] + 1 + torch.randint(0, 2, pool.y.shape, generator=draw)) % 3
    group = torch.where(stray, other, owner[pool.y])
    shares: list[torch.Tensor] = []
    names: list[str] = []
    for at, kind in enumerate(kinds):
        rows = (group == at).nonzero().flatten()
        rows = rows[torch.randperm(len(rows), generator=draw)]
        count = clients // 3 + (at < clients % 3)
        shares += [part.sort().values for part in rows.tensor_split(count)]
        names += [f"{kind}-{i:02d}" for i in range(count)]
    return Split(tuple(shares), tuple(names))


def cells() -> Iterator[resumable.Cell]:
    """What is run, in order of interest."""
    first = (SYNC, "fedbuff", "fedbuff, even_share")
    for methods in (first, [method for method in METHODS if method not in first]):
        for seed in range(3):
            for data in DATA:
                yield from ({"seed": seed, "data": data, "method": method} for method in methods)


def job(cell: resumable.Cell) -> fedkeel.Job:
    """The job of one cell."""
    method = METHODS[str(cell["method"])]
    classes = {name: {"time": seconds} for name, seconds in TIMES.items()}
    if cell["data"] == "by device":
        classes = {name: {**kind, "clients": f"{name}-*"} for name, kind in classes.items()}
    every = {SYNC: 1, "fedasync": 50}.get(str(cell["method"]), 5)
    return fedkeel.Job(
        name="asynchrony",
        seed=cell["seed"],
        rounds=10**6,
        data={
            "source": "fashion_mnist",
            "partition": "dirichlet(alpha=0.3)" if cell["data"] == "Dirichlet(0.3)" else "by_device",
            "clients": CLIENTS,
            "holdout": 0.2,
        },
        model={"build": "mlp(hidden=(200, 200))"},
        train={"batch_size": 20, "lr": 0.05, "workers": 1, "backend": "native"},
        schedule={"rule": method.get("schedule", "sync"), "seconds": SECONDS + 0.5},
        devices={"classes": classes},
        aggregate={"weigh": method.get("weigh", ("examples",)), "mix": method.get("mix", ())},
        server={"optimiser": method.get("server", "sgd")},
        record={"evaluate_every": every, "checkpoint_every": 10**6},
    )


def measure(cell: resumable.Cell) -> resumable.Cell:
    """One run's figures."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        done = fedkeel.run(job(cell), Path(place) / "run", with_report=False)
        clock = {row["round"]: row["time"] for row in done.rounds}
        rows = done.metrics
        used: dict[str, int] = dict.fromkeys(TIMES, 0)
        with done.dir.ledger(readonly=True) as ledger:
            query = (
                "SELECT device, count(*) AS n FROM updates JOIN clients USING (client) WHERE stage IS NULL GROUP BY 1"
            )
            used |= {row["device"]: row["n"] for row in ledger.query(query)}
    curve = [(clock.get(row["round"], 0.0), row["value"]) for row in rows if (row["scope"], row["name"]) == GLOBAL]
    by_class = {
        kind: [
            (clock.get(row["round"], 0.0), round(row["value"], 4))
            for row in rows
            if (row["scope"], row["name"]) == (f"class/{kind}", "accuracy")
        ]
        for kind in TIMES
    }
    return {
        **cell,
        "curve": [(round(t, 2), round(v, 4)) for t, v in curve],
        "by_class": by_class,
        "used": used,
        "seconds": round(time.perf_counter() - started, 1),
    }


def smooth(points: list[list[float]]) -> list[tuple[float, float]]:
    """Running means of three, each at the moment of its last point."""
    return [(points[i][0], statistics.fmean(v for _, v in points[i - 2 : i + 1])) for i in range(2, len(points))]


def figures(row: resumable.Cell, base: resumable.Cell) -> dict[str, float | None]:
    """Against the synchronous run of the same seed and data."""
    curve, target = smooth(row["curve"]), smooth(base["curve"])[-1][1]  # type: ignore[arg-type]
    when = next((t for t, value in curve if value >= target), None)
    used = sum(row["used"].values()) / sum(base["used"].values())  # type: ignore[attr-defined]
    slow, theirs = (smooth(r["by_class"]["C"]) for r in (row, base))  # type: ignore[index]
    at_target = None if when is None else next(v for t, v in slow if t >= when)
    return {
        "final": 100 * curve[-1][1],
        "speed-up": None if when is None else smooth(base["curve"])[-1][0] / when,  # type: ignore[arg-type]
        "throughput": used,
        "C, final": 100 * (slow[-1][1] - theirs[-1][1]),
        "C, at the target": None if at_target is None else 100 * (at_target - theirs[-1][1]),
    }


def table(rows: list[resumable.Cell]) -> str:
    """Means over seeds with 95% intervals."""
    heads = (
        "final accuracy, %",
        "updates used, x sync",
        "sooner at sync's accuracy, x",
        "accuracy of class C at that moment, points over sync's",
        "at the end",
        "seeds",
    )
    out = []
    for data in DATA:
        out += ["", f"| {data} | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(heads)]
        base = {row["seed"]: row for row in rows if (row["data"], row["method"]) == (data, SYNC)}
        for method in METHODS:
            of = [r for r in rows if (r["data"], r["method"]) == (data, method) and r["seed"] in base]
            found = [figures(row, base[row["seed"]]) for row in of]

            def shown(name: str, found: list[dict[str, float | None]] = found) -> str:
                values = [f[name] for f in found]
                known = [v for v in values if v is not None]
                missed = f", {len(values) - len(known)} never" if len(known) < len(values) else ""
                return (interval(known) if known else "-") + missed

            columns = ("final", "throughput", "speed-up", "C, at the target", "C, final")
            if found:
                out.append(f"| {method} | " + " | ".join(map(shown, columns)) + f" | {len(found)} |")
    return "\n".join(out)


def main() -> None:
    def line(row: resumable.Cell) -> str:
        curve = row["curve"]
        assert isinstance(curve, list)
        return f"{row['data']}, {row['method']}, seed {row['seed']}: {curve[-1]} ({row['seconds']} s)"

    resumable.run(__doc__, cells(), ("seed", "data", "method"), measure, RESULTS, line)


if __name__ == "__main__":
    main()
