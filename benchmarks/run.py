#!/usr/bin/env python3
"""Run every benchmark, then write their tables into docs/benchmarks.md and the README.

    python benchmarks/run.py [--peers .bench-venvs] [--only simulation reducers codec overhead] [--tables]

`--tables` only writes the tables anew from benchmarks/results. The runs under attack take hours: they are made by
benchmarks/defences.py and benchmarks/published.py, which go on where they were stopped, and benchmarks/outofcore.py
wants 24 GB of disk; here their tables are written.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import asynchrony
import codec
import compression
import defence_tables
import deployment
import detection
import dpsgd
import edge
import localwork
import methods
import niid
import outofcore
import overhead
import personal
import privacy
import published
import reducers
import resumable
import secagg
import simulation
import week

HERE = Path(__file__).parent
ROOT = HERE.parent
RESULTS = HERE / "results"
ALL = ("simulation", "reducers", "codec", "overhead", "detection")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, default=ROOT / ".bench-venvs")
    parser.add_argument("--only", nargs="+", choices=ALL, default=list(ALL))
    parser.add_argument("--tables", action="store_true")
    args = parser.parse_args()
    if not args.tables:
        for name in args.only:
            subprocess.run(command(name, args.peers), check=True, env=environment(name, args.peers))
    write_tables()


def command(name: str, peers: Path) -> list[str]:
    script = str(HERE / f"{name}.py")
    output = ["--json", str(RESULTS / f"{name}.json")]
    if name == "simulation":
        return [sys.executable, script, "--peers", str(peers), *output]
    robust = peers / "robust" / "bin" / "python"
    python = str(robust) if name == "reducers" and robust.exists() else sys.executable
    return [python, script, *output]


def environment(name: str, peers: Path) -> dict[str, str]:
    """The reducers run in the peers' environment, with our source on its path."""
    return {**os.environ, "PYTHONPATH": str(ROOT / "src")} if name == "reducers" else dict(os.environ)


def write_tables() -> None:
    results = {path.stem: json.loads(path.read_text()) for path in RESULTS.glob("*.json")}
    page = ROOT / "docs" / "benchmarks.md"
    text = page.read_text()
    modules = {"simulation": simulation, "reducers": reducers, "codec": codec, "overhead": overhead}
    modules["detection"] = detection
    tables = {name: module.table for name, module in modules.items()}
    for name, make in tables.items():
        if name in results:
            text = replaced(text, name, make(results[name]))
    readme = ROOT / "README.md"
    front = replaced(readme.read_text(), "benchmarks", short(results))
    defences = RESULTS / "defences.jsonl"  # by benchmarks/defences.py
    if defences.exists():
        runs = resumable.read(defences)
        text = replaced(text, "defences", defence_tables.page(runs))
        front = replaced(front, "attacks", defence_tables.short(runs))
    if published.RESULTS.exists():  # by benchmarks/published.py
        text = replaced(text, "published", published.table(resumable.read(published.RESULTS)))
    if niid.RESULTS.exists():  # by benchmarks/niid.py
        text = replaced(text, "niid", niid.table(resumable.read(niid.RESULTS)))
    if localwork.RESULTS.exists():  # by benchmarks/localwork.py
        text = replaced(text, "localwork", localwork.table(resumable.read(localwork.RESULTS)))
    if personal.RESULTS.exists():  # by benchmarks/personal.py
        text = replaced(text, "personal", personal.table(resumable.read(personal.RESULTS)))
    if asynchrony.RESULTS.exists():  # by benchmarks/asynchrony.py
        text = replaced(text, "asynchrony", asynchrony.table(resumable.read(asynchrony.RESULTS)))
    if privacy.RESULTS.exists():  # by benchmarks/privacy.py
        text = replaced(text, "privacy", privacy.table(resumable.read(privacy.RESULTS)))
    if compression.RESULTS.exists():  # by benchmarks/compression.py
        text = replaced(text, "compression", compression.table(resumable.read(compression.RESULTS)))
    text = replaced(text, "dpsgd", dpsgd.table(results["dpsgd"])) if "dpsgd" in results else text
    text = replaced(text, "edge", edge.table(results["edge"])) if "edge" in results else text
    text = replaced(text, "secagg", secagg.table(results["secagg"])) if "secagg" in results else text
    text = replaced(text, "week", week.table(results["week"])) if "week" in results else text
    text = replaced(text, "deployment", deployment.table(results["deployment"])) if "deployment" in results else text
    text = replaced(text, "methods", methods.table(results["methods"])) if "methods" in results else text
    text = replaced(text, "outofcore", outofcore.table(results["outofcore"])) if "outofcore" in results else text
    page.write_text(text)
    readme.write_text(front)


def replaced(text: str, name: str, table: str) -> str:
    """The text with what stands between a table's markers replaced."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    head, _, rest = text.partition(begin)
    _, found, tail = rest.partition(end)
    if not found:
        raise SystemExit(f"the markers of '{name}' are missing")
    return f"{head}{begin}\n{table.strip()}\n{end}{tail}"


def short(results: dict[str, Any]) -> str:
    """The README's table: how many times faster, per peer and task."""
    models = results["simulation"]["models"]
    columns = ["fedkeel", *sorted({p for peers in models.values() for p in peers} - {"fedkeel"})]
    out = ["| seconds | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    for model, peers in models.items():
        cells = [f"{peers[c]['seconds_per_round']:.3f}" if c in peers else "-" for c in columns]
        cells[0] = f"**{cells[0]}**"
        out.append(f"| a round of {model} | " + " | ".join(cells) + " |")
    return "\n".join(out)


if __name__ == "__main__":
    main()
