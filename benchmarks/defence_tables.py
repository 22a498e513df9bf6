"""The tables of benchmarks/defences.py: means over seeds, with 95% intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from fedkeel.comparison import interval
from resumable import newest

Row = dict[str, Any]
DIRICHLET, MEAN, OURS, NONE = "dirichlet(alpha=0.5)", "plain mean", "learned weights", "none"
PARTITIONS = {DIRICHLET: "Dirichlet(0.5)", "iid": "IID"}
TARGETED, ADAPTIVE, CLIENTS = "backdoor", "tailored", 50


def page(rows: list[Row]) -> str:
    """What docs/benchmarks.md shows."""
    parts = ["**Without an attack**", clean(rows), "**10 of 50 hostile, Dirichlet(0.5)**", against(rows)]
    parts += ["**Learned weights and the plain mean, at every share of hostile clients**", ours(rows)]
    parts += ["**Whom learned weights leave out**", detection(rows)]
    if any(row.get("before") for row in rows):
        parts.append(
            "† By learned weights as they were before their steps were checked against the loss."
            " Cells measured both ways differ by 0.5 points at most."
        )
    return "\n\n".join(parts)


def short(rows: list[Row]) -> str:
    """The README's table: each defence's clean run, its worst case, and the backdoor."""
    out = [
        "| 10 of 50 clients hostile, Dirichlet(0.5) | no attack | worst untargeted attack | backdoor believed |",
        "|---|---:|---:|---:|",
    ]
    # What every defence was run under: a column must compare like with like.
    untargeted = [
        a for a in attacks(rows, 10) if all(mean(rows, DIRICHLET, 10, a, d) is not None for d in defences(rows))
    ]
    for defence in defences(rows):
        worst = min(
            ((mean(rows, DIRICHLET, 10, a, defence), a) for a in untargeted if a != TARGETED),
            key=lambda pair: math.inf if pair[0] is None else pair[0],
            default=(None, ""),
        )
        if worst[0] is None:
            continue
        name = f"**{defence}**" if defence == OURS else defence
        success = mean(rows, DIRICHLET, 10, TARGETED, defence, "backdoor")
        calm = percent(mean(rows, DIRICHLET, 0, NONE, defence))
        out.append(f"| {name} | {calm} | {percent(worst[0])} ({worst[1]}) | {percent(success)} |")
    tried = percent(mean(rows, DIRICHLET, 10, ADAPTIVE, OURS))
    out += ["", f"Attackers that try out the server's own rules before they send bring {OURS} to {tried}."]
    return "\n".join(out)


def clean(rows: list[Row]) -> str:
    out = ["| | " + " | ".join(PARTITIONS.values()) + " |", "|---|" + "---:|" * len(PARTITIONS)]
    for defence in defences(rows, attack=NONE):
        cells = [spread(values(rows, p, 0, NONE, defence)) + dagger(rows, p, 0, NONE, defence) for p in PARTITIONS]
        out.append(f"| {defence} | " + " | ".join(cells) + " |")
    return "\n".join(out)


def against(rows: list[Row]) -> str:
    names = defences(rows)
    out = ["| accuracy, % | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
    for attack in attacks(rows, 10):
        cells = [spread(values(rows, DIRICHLET, 10, attack, d)) + dagger(rows, DIRICHLET, 10, attack, d) for d in names]
        out.append(f"| {attack} | " + " | ".join(cells) + " |")
    success = [spread(values(rows, DIRICHLET, 10, TARGETED, d, "backdoor")) for d in names]
    return "\n".join([*out, "| backdoor: mark believed, % | " + " | ".join(success) + " |"])


def ours(rows: list[Row]) -> str:
    """Ours, then the plain mean, per partition and share; differences to the plain mean's clean run."""
    columns = [(p, h) for p in PARTITIONS for h in (5, 10, 20) if attacks(rows, h, p)]
    heads = [f"{PARTITIONS[p]}, {h} of {CLIENTS}" for p, h in columns]
    out = ["| accuracy, %: ours / plain mean | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(heads)]
    for attack in attacks(rows, 10):
        cells = []
        for p, h in columns:
            found, plain = mean(rows, p, h, attack, OURS), mean(rows, p, h, attack, MEAN)
            cells.append(f"{percent(found)}{dagger(rows, p, h, attack, OURS)} / {percent(plain)}")
        out.append(f"| {attack} | " + " | ".join(cells) + " |")
    worst = []
    for p, h in columns:
        found = [m for a in attacks(rows, h, p) if a != TARGETED and (m := mean(rows, p, h, a, OURS)) is not None]
        calm = mean(rows, p, 0, NONE, MEAN)
        wanted = {a for a in attacks(rows, 10) if a not in (TARGETED, ADAPTIVE)}  # the last one is too slow for all
        whole = wanted <= set(attacks(rows, h, p))
        worst.append(f"{100 * (min(found) - calm):+.1f}" if whole and calm is not None else "-")
    out.append("| worst untargeted, against the clean plain mean | " + " | ".join(worst) + " |")
    success = [
        f"{percent(mean(rows, p, h, TARGETED, OURS, 'backdoor'))} / "
        f"{percent(mean(rows, p, h, TARGETED, MEAN, 'backdoor'))}"
        for p, h in columns
    ]
    return "\n".join([*out, "| backdoor: mark believed, % | " + " | ".join(success) + " |"])


def detection(rows: list[Row]) -> str:
    out = [
        "| 10 of 50 hostile, Dirichlet(0.5) | hostile updates left out | hostile share of the weight "
        "| honest updates left out |",
        "|---|---:|---:|---:|",
    ]
    for attack in attacks(rows, 10):
        cells = [
            percent(mean(rows, DIRICHLET, 10, attack, OURS, column))
            for column in ("hostile_out", "hostile_weight", "honest_out")
        ]
        out.append(f"| {attack} | " + " | ".join(cells) + " |")
    return "\n".join(out)


def values(
    rows: list[Row], partition: str, hostile: int, attack: str, defence: str, column: str = "accuracy"
) -> list[float]:
    """One figure a seed; the accuracy of a run that ended without a model counts as 0, and no other figure of it."""
    found = newest(chosen(rows, partition, hostile, attack, defence))
    if column == "accuracy":
        return [float(r["accuracy"] or 0.0) for r in found]
    return [float(r[column]) for r in found if r.get(column) is not None]


def chosen(rows: list[Row], partition: str, hostile: int, attack: str, defence: str) -> list[Row]:
    wanted = (partition, hostile, attack, defence)
    return [r for r in rows if (r["partition"], r["hostile"], r["attack"], r["defence"]) == wanted]


def dagger(rows: list[Row], partition: str, hostile: int, attack: str, defence: str) -> str:
    """A mark for what an earlier version of the rule gave."""
    found = newest(chosen(rows, partition, hostile, attack, defence))
    return "†" if any(row.get("before") for row in found) else ""


def mean(
    rows: list[Row], partition: str, hostile: int, attack: str, defence: str, column: str = "accuracy"
) -> float | None:
    found = values(rows, partition, hostile, attack, defence, column)
    return sum(found) / len(found) if found else None


def spread(found: Sequence[float]) -> str:
    """Mean and half of its 95% interval over seeds, in percent."""
    if len(found) < 2:
        return percent(found[0] if found else None) + (" (1 seed)" if found else "")
    middle, low, high = interval(found, -math.inf, math.inf)
    return f"{100 * middle:.1f} ± {50 * (high - low):.1f}"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def attacks(rows: list[Row], hostile: int, partition: str = DIRICHLET) -> list[str]:
    """In the order in which they were run."""
    wanted = (hostile, partition, OURS)
    return list(dict.fromkeys(r["attack"] for r in rows if (r["hostile"], r["partition"], r["defence"]) == wanted))


def defences(rows: list[Row], attack: str | None = None) -> list[str]:
    """Those that were run under `attack`, or (None) under any; ours last."""
    found = dict.fromkeys(r["defence"] for r in rows if (r["attack"] == attack if attack else r["attack"] != NONE))
    return sorted(found, key=lambda name: (name == OURS, list(found).index(name)))
