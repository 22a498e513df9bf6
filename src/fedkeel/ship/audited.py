"""The page of an audit: what an attacker got of a run, in pictures, curves and bounds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from fedkeel.ship import charts, report, words
from fedkeel.ship.charts import Chart

SEEN, HINTED, EXACT = 20.0, 1.0, 60.0
"""PSNR in dB from which on a reconstruction counts as seen; dB above a guess from which on it is a hint; and PSNR from
which on there is nothing left to tell it from the original."""
_FLOOR = 1e-3  # of rates on logarithmic axes
_WIDE = 150  # pixels of the page that a picture takes at most
_MODELS = {"first": "The first model, which knows nothing yet", "final": "The final model"}


def write(path: Path, found: Mapping[str, Any], pictures: Sequence[Mapping[str, str]]) -> Path:
    """Write the page of what `fedkeel audit` found; `pictures` are those of its cases of inversion, in their order."""
    keys = (f"a{number}" for number in count())
    names = {"inversion": "Gradient inversion", "membership": "Membership inference", "canaries": "Canaries"}
    inversion, membership, canaries = (_part(found, name) for name in names)
    with charts.style():
        drawn = {
            "membership": _curves(membership, keys) if membership else [],
            "canaries": _scores(canaries, keys) if canaries else [],
        }
    page = {
        "title": f"What an attacker learns from “{words.short(str(found['job']), 80)}”",
        "lede": " ".join(statements(found)),
        "verdict": found["verdict"],
        "eyebrow": f"Audit by fedkeel {found['fedkeel']}",
        "passed": found["passed"],
        "cards": list(_cards(found)),
        "models": list(_models(inversion, pictures)) if inversion else [],
        "seen": SEEN,
        "attacks": list(_attacks(membership)) if membership else [],
        "membership": membership,
        "bounds": list(_bounds(canaries, found["of_a_round"])) if canaries else [],
        "canaries": canaries,
        "drawn": drawn,
        "left_out": [(title, found[n]["left_out"]) for n, title in names.items() if "left_out" in found.get(n, {})],
        "settings": [
            (key, ", ".join(map(str, value)) if isinstance(value, tuple | list) else str(value))
            for key, value in found["settings"].items()
        ],
        "run": found["run"],
    }
    return report._render("audit.html.j2", path, page)


def verdict(psnr: float, guess: float) -> str:
    """What a reconstruction is worth beside a guess that needs no update: seen, hinted or hidden."""
    if psnr < guess + HINTED:
        return "hidden"
    return "seen" if psnr >= SEEN else "hinted"


def decibels(psnr: float) -> str:
    """`24.9 dB`; `exact` where a pixel is off by less than one in a thousand."""
    return f"{psnr:.1f} dB" if psnr < EXACT else "exact"


def _part(found: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The figures of a part; empty where it was not done."""
    part = found.get(name, {})
    return {} if "left_out" in part else dict(part)


def best_case(inversion: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The case and its treatment that show most, as updates are sent."""
    return max(
        ((case, _sent(case)) for case in inversion["cases"]),
        key=lambda pair: pair[1]["psnr"] - pair[0]["baseline"]["psnr"],
    )


def _sent(case: Mapping[str, Any]) -> Mapping[str, Any]:
    """The treatment of a case that the job's own is: with its transforms and codec, if they change anything."""
    found: Mapping[str, Any] = next(
        (t for t in case["treatments"] if t["name"] == "as the job sends it"), case["treatments"][0]
    )
    return found


def statements(found: Mapping[str, Any]) -> Iterator[str]:
    """What was learned, a sentence a part."""
    if part := _part(found, "inversion"):
        case, sent = best_case(part)
        what = {"seen": "can be seen in", "hinted": "show a little in", "hidden": "were not found in"}
        word = what[verdict(sent["psnr"], case["baseline"]["psnr"])]
        yield (
            f"Examples {word} the update of a client that has {words.count(case['size'], 'example')}: "
            f"{decibels(sent['psnr'])}, where a guess gives {case['baseline']['psnr']:.1f} dB."
            + (" Masks keep that update from the server, which sees sums." if "masks" in sent["name"] else "")
        )
    if part := _part(found, "membership"):
        name, best = max(part["attacks"].items(), key=lambda pair: pair[1]["auc"])
        told = "can be told" if best["low"] > 0.5 else "was not told better than by chance"
        yield f"Who was trained on {told}: AUC {best['auc']:.2f} ({best['low']:.2f} to {best['high']:.2f}), {name}."


def _cards(found: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    if part := _part(found, "inversion"):
        case, sent = best_case(part)
        yield {
            "name": "Best reconstruction",
            "figure": decibels(sent["psnr"]),
            "under": f"a guess: {case['baseline']['psnr']:.1f} dB",
        }
    if part := _part(found, "membership"):
        for name, of in part["attacks"].items():
            under = f"AUC; 0.5 is chance. {of['low']:.2f} to {of['high']:.2f}"
            yield {"name": f"Membership, {name}", "figure": f"{of['auc']:.2f}", "under": under}
    if found["lower_bounds"]:
        most = max(found["lower_bounds"].values())
        yield {"name": "At least", "figure": f"ε ≥ {most:.2f}", "under": "of one round, by canaries, 99% confidence"}
    said, alone = found["accounted"], found["of_a_round"]
    figure, under = "none", "the run promises nothing"
    if said is not None:
        figure, under = f"ε ≤ {alone:.2f}", f"for one round, {said:.2f} over all of them"
    yield {"name": "Accounted", "figure": figure, "under": under}


def _models(inversion: Mapping[str, Any], pictures: Sequence[Mapping[str, str]]) -> Iterator[dict[str, Any]]:
    """A table a model: a line a batch, a column a treatment."""
    cases = list(zip(inversion["cases"], pictures, strict=True))
    wide = int(inversion["inputs"][-1])
    for model in dict.fromkeys(case["model"] for case, _ in cases):
        mine = [(case, shown) for case, shown in cases if case["model"] == model]
        columns = list(dict.fromkeys(t["name"] for case, _ in mine for t in case["treatments"]))
        yield {
            "title": _MODELS.get(model, model),
            "columns": columns,
            "rows": [_line(case, shown, columns, wide) for case, shown in mine],
        }


def _line(case: Mapping[str, Any], shown: Mapping[str, str], columns: Sequence[str], wide: int) -> dict[str, Any]:
    by_name = {t["name"]: t for t in case["treatments"]}
    guess = case["baseline"]["psnr"]
    across = min(4, max(1, math.ceil(math.sqrt(case["size"]))))
    width = min(_WIDE, across * 44) if wide > 4 else _WIDE
    cells: list[dict[str, str] | None] = []
    for name in columns:
        of = by_name.get(name)
        if of is None:
            cells.append(None)
            continue
        labels = "labels not told" if of["labels"] is None else f"labels {100 * of['labels']:.0f}%"
        cells.append(
            {
                "verdict": verdict(of["psnr"], guess),
                "picture": shown[name],
                "figure": decibels(of["psnr"]),
                "under": labels,
                "attack": of["attack"],
            }
        )
    work = case["work"] + (f", {words.count(case['steps'], 'step')}" if case["steps"] > 1 else "")
    return {
        "name": words.count(case["size"], "example"),
        "work": work,
        "guess": f"guess {guess:.1f} dB",
        "original": shown["original"],
        "width": width,
        "cells": cells,
    }


def _attacks(membership: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for name, of in membership["attacks"].items():
        yield {
            "name": name,
            "auc": f"{of['auc']:.3f}",
            "interval": f"{of['low']:.3f} to {of['high']:.3f}",
            "rates": [
                {"figure": f"{100 * r['tpr']:.1f}%", "interval": f"{100 * r['low']:.1f} to {100 * r['high']:.1f}%"}
                for r in of["rates"]
            ],
        }


def _bounds(canaries: Mapping[str, Any], accounted: float | None) -> Iterator[dict[str, Any]]:
    for name, key in (("One canary, many trials", "trials"), ("Many canaries, one round", "one_run")):
        for bound in canaries[key]["bounds"]:
            refutes = accounted is not None and bound["confidence"] == 0.99
            yield {
                "name": name,
                "confidence": f"{100 * bound['confidence']:g}%",
                "epsilon": f"{bound['epsilon']:.2f}",
                "gaussian": f"{bound['gaussian']:.2f}" if key == "trials" else "",
                "broken": refutes and max(bound["epsilon"], bound["gaussian"]) > accounted,
            }


def _curves(membership: Mapping[str, Any], keys: Iterator[str]) -> list[Chart]:
    lines = {name: [tuple(point) for point in of["curve"]] for name, of in membership["attacks"].items()}
    return [_roc("True against false alarms, both logarithmic", lines, next(keys))]


def _roc(title: str, lines: Mapping[str, Sequence[tuple[float, ...]]], key: str) -> Chart:
    """Curves of (FPR, TPR) on logarithmic axes, with the diagonal of a guess (Carlini et al. 2022)."""
    figure, axes = charts._figure(260, right=22)
    axes.plot([_FLOOR, 1], [_FLOOR, 1], color=charts.MUTED, linewidth=1, linestyle=(0, (2, 2)))
    for i, points in enumerate(lines.values()):
        x, y = (np.maximum([p[k] for p in points], _FLOOR) for k in (0, 1))
        axes.plot(x, y, color=charts.SERIES[i], linestyle=charts.DASHES[i], drawstyle="steps-post")
    axes.set(xscale="log", yscale="log", xlim=(_FLOOR, 1), ylim=(_FLOOR, 1))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda v, _: f"{100 * v:g}%")
    axes.minorticks_off()
    axes.set_xlabel("others that are taken for members", labelpad=2)
    legend = (*((name, *charts.mark(i)) for i, name in enumerate(lines)), ("a guess", "var(--muted)", "line:3 3"))
    note = "Upwards: members that are told. Who names few of them, but surely, is far to the left."
    return Chart(title, charts._svg(figure, key, f"{title}."), legend, note)


def _scores(canaries: Mapping[str, Any], keys: Iterator[str]) -> list[Chart]:
    one = canaries["one_run"]
    said = f"{one['correct']:,} of {one['guesses']:,} guesses right. Cosine of each canary with what came out."
    many = f"{len(canaries['trials']['inside']):,} releases each. Inner product with the canary."
    return [
        _histogram("One canary, many trials", canaries["trials"], next(keys), many),
        _histogram("Many canaries, one round", one, next(keys), said),
    ]


def _histogram(title: str, scores: Mapping[str, Any], key: str, note: str) -> Chart:
    """How scores lie with a canary in and out: where the two part, an observer knows."""
    figure, axes = charts._figure(196)
    both = np.array([*scores["inside"], *scores["outside"]])
    span = float(both.max() - both.min()) or abs(float(both[0])) or 1.0
    edges = np.linspace(both.min() - 0.02 * span, both.max() + 0.02 * span, 61)
    legend = []
    for i, (name, values) in enumerate((("in", scores["inside"]), ("out", scores["outside"]))):
        heights = np.histogram(values, edges)[0]
        axes.stairs(heights, edges, fill=True, color=charts.SERIES[1 - i], alpha=0.55)
        legend.append((name, charts.mark(1 - i)[0], "area:0.55"))
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_formatter(lambda v, _: f"{v:g}")
    axes.set_xlabel("score", labelpad=2)
    return Chart(title, charts._svg(figure, key, f"{title}: scores in and out."), tuple(legend), note)
