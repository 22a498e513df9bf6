"""Time our reducers against ByzFL's and Flower's own functions, on the same rows, in one process.

    python benchmarks/reducers.py [--quick] [--json FILE] [--sizes 20x1000000,...] [--repeats 7]

Repeats are interleaved (every implementation once, then again), so that whatever else the machine does hits all alike;
medians are compared. `memcpy` copies the matrix into memory that is already there; `gemv` is one w @ U. A peer that is
not installed is named and left out: `benchmarks/peers/setup.sh DIR robust` makes an environment that has both (run this
script with its Python and PYTHONPATH=src). f = n / 5 rows are hostile; how far results differ from ours is shown.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from fedkeel.core.keys import Key
from fedkeel.core.registry import build
from fedkeel.core.types import Cohort, ServerState
from fedkeel.kernels import native

Implementations = dict[str, Callable[[], Any]]
TARGETS = {  # times the faster peer, at 10^6 columns: rows -> rule; half of it where there is no compiler
    20: {"median": 40, "trimmed_mean": 25, "multi_krum": 6, "geometric_median": 6, "centered_clip, one step": 6}
    | {"nnm": 10, "bulyan": 30},
    100: {"median": 15, "trimmed_mean": 4},
}
UNCOMPILED = "fedkeel, no compiler"
FULL = "20x1000000,100x1000000,20x10000000,100x10000000"
COPIES = 5  # peers hold up to so many matrices at once


def ours(U: torch.Tensor, w: torch.Tensor, f: int) -> dict[str, Callable[[], Any]]:
    n, columns = U.shape
    state, flat = ServerState(torch.zeros(1)), torch.ones(n, dtype=torch.float64)
    multi_krum, mean = build("weigher", "multi_krum", f=f), build("reducer", "mean")
    names = tuple(f"{i:04d}" for i in range(n))

    def krum_mean() -> torch.Tensor:
        cohort = Cohort(U, names, w, flat, flat, flat, slice(0, columns), (), ({},) * n, ((),) * n, Key.root(0))
        return mean(U, multi_krum(cohort, state))

    return {
        "mean": functools.partial(mean, U, w),
        "median": functools.partial(build("reducer", "median"), U, w),
        "trimmed_mean": functools.partial(build("reducer", "trimmed_mean", trim=f), U, w),
        "geometric_median": functools.partial(build("reducer", "geometric_median", tolerance=1e-10), U, flat),
        "multi_krum": krum_mean,
        "mean_around_median": functools.partial(build("reducer", "mean_around_median", f=f), U, w),
        # Of bulyan, f = n // 5 rows would be too many.
        "bulyan": functools.partial(build("reducer", "bulyan", f=(n - 3) // 4), U, w),
        "caf": functools.partial(build("reducer", "caf", f=f), U, w),
        "centered_clip, one step": functools.partial(build("reducer", "centered_clip", radius=100.0, steps=1), U, w),
        "nnm": lambda: build("mixer", "nnm", f=f)(U, w, Key.root(0))[0],
    }


def uncompiled(function: Callable[[], Any]) -> Callable[[], Any]:
    """The function as it runs where fedkeel was installed without a compiler."""

    def run() -> Any:
        os.environ["FEDKEEL_NATIVE"] = "off"
        native.library.cache_clear()
        try:
            return function()
        finally:
            del os.environ["FEDKEEL_NATIVE"]
            native.library.cache_clear()
            native.library()

    return run


def byzfl(U: torch.Tensor, f: int) -> dict[str, Implementations]:
    """ByzFL's aggregators, on torch tensors and on numpy arrays: it takes both."""
    from byzfl import CAF, NNM, CenteredClipping, GeometricMedian, Meamed, Median, MultiKrum, TrMean

    rules = {
        "median": Median(),
        "trimmed_mean": TrMean(f),
        "multi_krum": MultiKrum(f),
        "geometric_median": GeometricMedian(),
        "mean_around_median": Meamed(f),
        "caf": CAF(f),
        "centered_clip, one step": CenteredClipping(L=1, tau=100.0),  # begins at zero, ours at a central row
        "nnm": NNM(f),
    }
    n, columns = U.shape
    if 4 * n * n * columns > psutil.virtual_memory().available / 2:  # it builds (n, n, P)
        del rules["nnm"]
    inputs = {"byzfl (torch)": U, "byzfl (numpy)": U.numpy()}
    return {r: {i: functools.partial(rule, x) for i, x in inputs.items()} for r, rule in rules.items()}


def flower(U: torch.Tensor, f: int) -> dict[str, Implementations]:
    """Flower's functions as its strategies call them, for a model of one layer: the message API's and older ones."""
    from flwr.app import ArrayRecord, MetricRecord, RecordDict
    from flwr.server.strategy import aggregate as older
    from flwr.serverapp.strategy.fedtrimmedavg import trim_mean
    from flwr.serverapp.strategy.multikrum import select_multikrum
    from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

    layers = list(U.numpy())
    results = [([layer], 1) for layer in layers]
    share = f / len(layers) + 1e-9

    @functools.cache
    def records() -> list[Any]:
        found = [RecordDict({"a": ArrayRecord([x]), "m": MetricRecord({"n": 1})}) for x in layers]
        for record in found:
            record["a"].to_numpy_ndarrays()
        return found

    def multi_krum() -> Any:
        chosen = select_multikrum(records(), f, len(layers) - f)
        return aggregate_arrayrecords(chosen, "n").to_numpy_ndarrays()[0]

    return {
        "median": {"flower": lambda: np.median(np.stack(layers), axis=0)},
        "trimmed_mean": {
            "flower": lambda: trim_mean(np.stack(layers), share),
            "flower (older)": lambda: older.aggregate_trimmed_avg(results, share)[0],
        },
        "multi_krum": {
            "flower": multi_krum,
            "flower (older)": lambda: older.aggregate_krum(results, f, len(layers) - f)[0],
        },
        "mean": {"flower (older)": lambda: older.aggregate(results)[0]},
        "bulyan": {
            "flower (older)": lambda: older.aggregate_bulyan(
                list(results), (len(layers) - 3) // 4, older.aggregate_krum, to_keep=0
            )[0]
        },
    }


def plain(U: torch.Tensor, w: torch.Tensor, f: int) -> dict[str, Implementations]:
    n, target, weights = len(U), torch.empty_like(U), (w / w.sum()).float()
    return {
        "memcpy": {"memcpy": lambda: target.copy_(U)},
        "mean": {"gemv": lambda: weights @ U},
        "median": {"torch.sort": lambda: U.sort(dim=0).values[[(n - 1) // 2, n // 2]].mean(0)},
        "trimmed_mean": {"torch.sort": lambda: U.sort(dim=0).values[f : n - f].mean(0)},
    }


def peers(U: torch.Tensor, f: int, missing: dict[str, str]) -> dict[str, Implementations]:
    found: dict[str, Implementations] = {}
    for name, functions in (("byzfl", byzfl), ("flwr", flower)):
        try:
            for rule, implementations in functions(U, f).items():
                found.setdefault(rule, {}).update(implementations)
        except ImportError as error:
            missing[name] = str(error)
    return found


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def race(implementations: Implementations, repeats: int, patience: float) -> tuple[dict[str, Any], dict[str, str]]:
    """Seconds of every implementation, interleaved; one that is slower than `patience` seconds runs once."""
    seconds: dict[str, list[float]] = {}
    failed: dict[str, str] = {}
    results: dict[str, Any] = {}
    for repeat in range(repeats + 1):  # the first is the warm-up
        for name, function in implementations.items():
            if name in failed or (repeat and seconds[name][0] > patience):
                continue
            try:
                took, result = timed(function)
            except Exception as error:  # a peer's own limit: reported, not fatal
                failed[name] = f"{type(error).__name__}: {error}".splitlines()[0][:160]
                continue
            seconds.setdefault(name, []).append(took)
            results.setdefault(name, torch.as_tensor(np.asarray(result)).float())
    wanted = results.get("fedkeel")
    table = {}
    for name, took in seconds.items():
        kept = took[1:] or took
        gap = None if wanted is None else float((results[name] - wanted).abs().max())
        table[name] = {"median": statistics.median(kept), "least": min(kept), "runs": len(kept), "gap": gap}
    return table, failed


def measure(n: int, columns: int, args: argparse.Namespace, missing: dict[str, str]) -> list[dict[str, Any]]:
    f = n // 5
    generator = torch.Generator().manual_seed(0)
    U = torch.randn(n, columns, generator=generator)
    U[:f] *= 20
    flat = torch.ones(n, dtype=torch.float64)
    mine, theirs, simple = ours(U, flat, f), peers(U, f, missing), plain(U, flat, f)
    memcpy = race(simple.pop("memcpy"), args.repeats, args.patience)[0]["memcpy"]["median"]
    lines = []
    for rule, function in mine.items():
        contestants = {
            "fedkeel": function,
            UNCOMPILED: uncompiled(function),
            **simple.get(rule, {}),
            **theirs.get(rule, {}),
        }
        table, failed = race(contestants, args.repeats, args.patience)
        rivals = {k: v["median"] for k, v in table.items() if k.startswith(("byzfl", "flower"))}
        own = table["fedkeel"]["median"]
        line = {
            "rows": n,
            "columns": columns,
            "hostile": f,
            "rule": rule,
            "seconds": table,
            "failed": failed,
            "memcpy": memcpy,
            "of_memcpy_bandwidth": round(memcpy / own, 4),
            "fastest_peer": min(rivals, key=rivals.__getitem__) if rivals else None,
            "times_faster": round(min(rivals.values()) / own, 2) if rivals else None,
            "times_gemv": round(own / table["gemv"]["median"], 2) if "gemv" in table else None,
        }
        lines.append(line)
        show(line)
    return lines


def show(line: dict[str, Any]) -> None:
    own = line["seconds"]["fedkeel"]
    facts = [f"{line['rows']:>4} x {line['columns']:<9} {line['rule']:<17} {1e3 * own['median']:9.1f} ms"]
    facts.append(f"{100 * line['of_memcpy_bandwidth']:5.1f}% of memcpy")
    if line["times_faster"] is not None:
        facts.append(f"{line['times_faster']:6.1f}x faster than {line['fastest_peer']}")
    if line["times_gemv"] is not None:
        facts.append(f"{line['times_gemv']:.2f} of a matrix-vector product")
    print("  ".join(facts))
    for name, took in line["seconds"].items():
        if name != "fedkeel":
            print(f"{'':>15} {name:<17} {1e3 * took['median']:9.1f} ms  differs by {took['gap']:.1e}")
    for name, why in line["failed"].items():
        print(f"{'':>15} {name:<17}    failed: {why}")


def verdict(lines: list[dict[str, Any]]) -> list[str]:
    """What the targets say, for the size they are about."""
    said = []
    for line in lines:
        if line["columns"] != 1_000_000:
            continue
        target = TARGETS.get(line["rows"], {}).get(line["rule"])
        if target and line["times_faster"] is not None:
            where, without = f"{line['rows']} rows, {line['rule']}", times_without(line)
            said.append(f"{where}: {line['times_faster']}x, target {target}x")
            said.append(f"{where}, no compiler: {without:.1f}x, target {target / 2:g}x")
        if line["times_gemv"] is not None:
            said.append(f"{line['rule']}: {line['times_gemv']} of one matrix-vector product, target 1.5")
    return said


def times_without(line: dict[str, Any]) -> float:
    """How much faster than the fastest peer without the compiled kernels."""
    seconds = line["seconds"]
    return float(seconds[line["fastest_peer"]]["median"] / seconds[UNCOMPILED]["median"])


def table(found: dict[str, Any]) -> str:
    """The figures as Markdown."""
    out = [
        "| rows x columns | rule | fedkeel, ms | fastest peer, ms | faster by | no compiler | of memcpy's bandwidth |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for line in found["lines"]:
        took, peer = line["seconds"], line["fastest_peer"]
        theirs = f"{1e3 * took[peer]['median']:.1f} ({peer})" if peer else "-"
        lead = f"{line['times_faster']:.1f}x" if line["times_faster"] else "-"
        pure = f"{times_without(line):.1f}x" if peer and UNCOMPILED in took else "-"
        if line["times_gemv"] is not None:
            theirs, lead = f"{1e3 * took['gemv']['median']:.1f} (one w @ U)", f"{1 / line['times_gemv']:.2f}x"
            pure = "-"
        out.append(
            f"| {line['rows']} x {line['columns']:,} | {line['rule']} | {1e3 * took['fedkeel']['median']:.1f} | "
            f"{theirs} | {lead} | {pure} | {line['of_memcpy_bandwidth']:.0%} |"
        )
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    notes = [f"{versions}; load average {found['machine']['load_before'][0]:.1f} before."]
    notes += [f"Skipped: {text}." for text in found["skipped"]]
    return "\n".join([*out, "", *notes])


def packages() -> dict[str, str]:
    found = {}
    for name in ("torch", "numpy", "byzfl", "flwr"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="20 x 10^6 only, three repeats")
    parser.add_argument("--sizes", default=FULL, help="ROWSxCOLUMNS, separated by commas")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--patience", type=float, default=5.0, help="seconds; what takes longer runs once")
    parser.add_argument("--json", type=Path, help="write the figures to this file; other sizes in it are kept")
    args = parser.parse_args()
    if args.quick:
        args.sizes, args.repeats = "20x1000000", 3
    missing: dict[str, str] = {}
    skipped, lines, load = [], [], os.getloadavg()
    for size in args.sizes.split(","):
        n, columns = map(int, size.split("x"))
        needed, free = (COPIES + 1) * 4 * n * columns, psutil.virtual_memory().available
        if needed > free:
            skipped.append(f"{size}: needs {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are free")
            continue
        lines += measure(n, columns, args, missing)
    machine = {"cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    machine |= {"load_before": load, "load_after": os.getloadavg()}
    said = verdict(lines)
    for text in (
        *said,
        *(f"missing: {k} ({v})" for k, v in missing.items()),
        *(f"skipped: {s}" for s in skipped),
        f"load average {load[0]:.1f} before, {os.getloadavg()[0]:.1f} after, {torch.get_num_threads()} threads",
    ):
        print(text)
    if args.json:
        now = {(line["rows"], line["columns"]) for line in lines}
        before = json.loads(args.json.read_text())["lines"] if args.json.exists() else []
        lines += [line for line in before if (line["rows"], line["columns"]) not in now]
        report = {"benchmark": "reducers", "machine": machine, "versions": packages(), "lines": lines}
        report |= {"missing": missing, "skipped": skipped, "targets": said}
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
