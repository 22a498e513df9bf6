"""Who is found: precision and recall of every screen, and of trust, against the truth that the simulator knows.

    python benchmarks/detection.py --json benchmarks/results/detection.json

Fashion-MNIST, 50 clients that all take part, Dirichlet(0.3), 10 hostile, the 2NN of McMahan et al., 10 rounds. All
screens look at the same updates: a screen that refuses nobody asks the others. The model itself is defended by learned
weights, so that it goes on learning under every attack. Trust counts as a verdict where it is below half of the mean.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import fedkeel
from fedkeel import build
from fedkeel.core.types import Cohort, ServerState

HOSTILE, CLIENTS, ROUNDS = 10, 50, 10
SCREENS = ("norm_mad", "cosine", "near_duplicates", "gradient_variance", "forecast", "loss_gain", "flame", "dnc")
TRUSTS = ("learned", "trust")
ATTACKS = (
    *("sign_flip", "gaussian(std=0.01)", "alie", "ipm(scale=2.0)", "min_max", "fang", "mimic", "replacement", "sybil"),
    *("free_rider", "label_flip", "backdoor"),
)
NONE = "none"
_found: dict[str, list[set[str]]] = defaultdict(list)
_kept: dict[str, Any] = {}


@fedkeel.rule("screen")
def onlooker(cohort: Cohort, state: ServerState) -> dict[int, tuple[str, float]]:
    """Asks every screen, and refuses nobody."""
    for name in SCREENS:
        rule = build("screen", name, **({"f": HOSTILE} if name == "dnc" else {}))
        if rule.definition.init is None:
            found = rule(cohort, state)
        else:
            found, _kept[name] = rule(cohort, state, _kept.get(name, rule.init()))
        _found[name].append({cohort.client[i] for i in found})
    return {}


def job(attack: str, weigher: str, seed: int) -> fedkeel.Job:
    values: dict[str, Any] = {
        "seed": seed,
        "rounds": ROUNDS,
        "data": {"source": "fashion_mnist", "partition": "dirichlet(alpha=0.3)", "clients": CLIENTS},
        "model": {"build": "mlp"},
        "train": {"batch_size": 20, "lr": 0.1},
        "record": {"evaluate_every": ROUNDS},
        "server": {"examples": 500},
        "client": {"labels": True},
        "aggregate": {
            "screens": ["onlooker"] if weigher == TRUSTS[0] else [],
            "weigh": [weigher],
            "reduce": "weighted_trimmed_mean",
        },
    }
    if attack != NONE:
        values["attack"] = {"rule": attack, "clients": HOSTILE}
    return fedkeel.Job(**values)


def measure(attack: str, seed: int) -> dict[str, dict[str, float | None]]:
    """Rule -> precision, recall, and the share of honest updates that it accuses."""
    _found.clear()
    _kept.clear()
    accused: dict[str, list[set[str]]] = {}
    hostile: set[str] = set()
    for weigher in TRUSTS:
        with tempfile.TemporaryDirectory() as place:
            run = fedkeel.run(job(attack, weigher, seed), Path(place) / "run", with_report=False)
            updates = run.updates
        hostile = {u["client"] for u in updates if u["hostile"]}
        low = [u for u in updates if u["trust"] is not None and u["trust"] < 0.5]
        accused[f"{weigher}: trust below 0.5"] = [
            {u["client"] for u in low if u["round"] == r + 1} for r in range(ROUNDS)
        ]
    figures = {}
    for name, rounds in {**_found, **accused}.items():
        right = sum(len(a & hostile) for a in rounds)
        wrong = sum(len(a - hostile) for a in rounds)
        figures[name] = {
            "precision": right / (right + wrong) if right + wrong else None,
            "recall": right / (len(hostile) * ROUNDS) if hostile else None,
            "honest_accused": wrong / ((CLIENTS - len(hostile)) * ROUNDS),
        }
    return figures


def table(results: dict[str, Any]) -> str:
    """Recall by attack, and the share of honest updates accused, of every rule; means over seeds, in percent."""
    attacks = list(results["attacks"])
    rules = list(next(iter(results["attacks"].values()))[0])

    def average(attack: str, rule: str, figure: str) -> str:
        found = [seed[rule][figure] for seed in results["attacks"][attack] if seed[rule][figure] is not None]
        return f"{100 * sum(found) / len(found):.0f}" if found else "-"

    out = [
        f"Recall / precision, in percent, over {results['seeds']} seeds; the last line: honest updates accused where "
        "nobody is hostile.",
        "",
        "| | " + " | ".join(rules) + " |",
        "|---|" + "---:|" * len(rules),
    ]
    for attack in attacks:
        if attack != NONE:
            cells = [f"{average(attack, rule, 'recall')} / {average(attack, rule, 'precision')}" for rule in rules]
            out.append(f"| {attack} | " + " | ".join(cells) + " |")
    calm = [sum(s[r]["honest_accused"] for s in results["attacks"][NONE]) / results["seeds"] for r in rules]
    return "\n".join([*out, "| no attack: honest accused | " + " | ".join(f"{100 * c:.1f}" for c in calm) + " |"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    results: dict[str, Any] = {"seeds": args.seeds, "attacks": {}}
    for attack in (NONE, *ATTACKS):
        results["attacks"][attack] = [measure(attack, seed) for seed in range(args.seeds)]
        print(attack, json.dumps(results["attacks"][attack][0]), flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))
    print(table(results))


if __name__ == "__main__":
    main()
