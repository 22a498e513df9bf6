"""A made-up run, recorded through the real ledger: a plausible federation of hostile and honest clients."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from fedkeel.core.types import ClientRow, Refusal, RoundReport
from fedkeel.ship.rundir import RunDir


def record(
    path: Path,
    *,
    name: str = "digits",
    rounds: int = 30,
    clients: int = 50,
    hostile: int = 10,
    defended: bool = True,
    truth: bool = True,
    names: str = "client-{}",
    picked: int | None = None,
) -> RunDir:
    """A run directory; `picked` clients a round (all of them when None), the first `hostile` ones hostile."""
    draw = np.random.default_rng(len(name) + rounds + clients)
    run = RunDir.create(path, f'name = "{name}"\n[data]\nsource = "digits"\n')
    ids = [names.format(i) for i in range(clients)]
    bad = set(ids[:hostile])
    histogram = draw.dirichlet([0.3] * 10, clients) * draw.integers(10, 60, (clients, 1))
    spoiled = bool(hostile) and not defended
    with run.ledger() as ledger, ledger.transaction():
        ledger.write_meta(
            {
                "job": name, "seed": 7, "plan": [("check", "finite, norm_bound(limit=3)"), ("reduce", "mean")],
                "backend": "traced", "fedkeel": "0.1.0", "clients": ids, "labels": [str(i) for i in range(10)],
                "label_histogram": histogram.astype(int).tolist(),
            }
        )  # fmt: skip
        for number in range(rounds + 1):
            level = 0.1 + 0.84 * (1 - math.exp(-number / 6)) if not spoiled else 0.1 + 0.1 * math.exp(-number / 4)
            accuracy = min(0.99, max(0.02, level + draw.normal() * (0.04 if spoiled else 0.008)))
            half = 1.96 * math.sqrt(accuracy * (1 - accuracy) / 450)
            band = (accuracy, accuracy - half, min(1.0, accuracy + half))
            ledger.write_metrics(number, number, {"accuracy": band, "loss": 2.4 - 2.2 * level}, 450)
            if number:
                chosen = (
                    ids if picked is None else [ids[i] for i in sorted(draw.choice(clients, picked, replace=False))]
                )
                rows = [_row(client, client in bad, number, defended, draw) for client in chosen]
                used = sum(row.weight for row in rows) or 1.0
                rows = [ClientRow(r.client, r.refusal, r.weight / used, r.norm, bytes_up=2600) for r in rows]
                seconds = {"train": 0.09 + 0.01 * draw.random(), "aggregate": 0.004, "evaluate": 0.01}
                ledger.write_round(
                    RoundReport(
                        number, number, float(number), tuple(rows), bytes_down=130_000, update_norm=0.4, seconds=seconds
                    ),
                    bad if truth else None,
                )
    return run


def _row(client: str, hostile: bool, number: int, defended: bool, draw: np.random.Generator) -> ClientRow:
    norm = float(draw.lognormal(0.3 - number / 40, 0.25) * (6 if hostile else 1))
    refusal = None
    if draw.random() < 0.01:
        return ClientRow(client, Refusal("transport", "deadline", "no answer in 30 s"))
    if defended and hostile and draw.random() < 0.95:
        refusal = Refusal("check", "norm_bound", f"norm {norm:.3g} exceeds 3", norm)
        if draw.random() < 0.2:
            norm, refusal = math.nan, Refusal("check", "finite", "12 of 650 columns are not finite")
    elif defended and draw.random() < 0.004:
        refusal = Refusal("screen", "norm_mad", "norm 4.1 lies 5.2 deviations above the median", 5.2)
    return ClientRow(client, refusal, 0.0 if refusal else float(draw.integers(10, 60)), norm)
