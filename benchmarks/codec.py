#!/usr/bin/env python3
"""What each codec costs and saves: one row of 10^7 columns on one core, beside a copy of the row.

    python benchmarks/codec.py [--columns 10000000] [--repeats 15] [--json FILE]

Encoding and decoding take turns with a copy of the row into memory that is already there, so that whatever else the
machine does hits all alike; the least of the repeats counts. The row is that of twenty square layers: normal values,
each layer of its own size. Writes results/codec.json.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedkeel.core.keys import Key
from fedkeel.core.layout import Entry, Layout
from fedkeel.core.registry import parse
from fedkeel.kernels import native

HERE = Path(__file__).parent
LAYERS = 20
CODECS = (
    "float32",
    "float16",
    "bfloat16",
    "int8",
    "int8(per='row')",
    "int8(per='channel')",
    "int8(stochastic=False)",
    "int4",
    "sign",
    "qsgd",
    "top_k(share=0.01)",
    "top_k(share=0.01, values='int8')",
    "top_k(share=0.01, values='sign')",
    "random_k(share=0.01)",
    "power_sgd(rank=4)",
    "layered(layers={'0*': 'top_k'}, rest='int8')",
    "adaptive(ratio=50)",
)
TARGETS = {"int8": 3, "int8(per='row')": 3, "top_k(share=0.01)": 10}  # times the copy, encoding and decoding together


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--columns", type=int, default=10_000_000)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path, default=HERE / "results" / "codec.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    row, layout = example(args.columns)
    lines = [measured(text, row, layout, args.repeats) for text in CODECS]
    found = {"columns": len(row), "instructions": instructions(), "load_before": load, "load_after": os.getloadavg()[0]}
    found |= {"lines": lines}
    args.json.parent.mkdir(exist_ok=True)
    args.json.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))


def example(columns: int) -> tuple[torch.Tensor, Layout]:
    """A row, and its layout of square layers."""
    side = math.isqrt(columns // LAYERS)
    shapes = [(side, columns // LAYERS // side)] * LAYERS
    entries = tuple(Entry(f"{i:02d}.weight", shape, "float32", "param", True) for i, shape in enumerate(shapes))
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(math.prod(s), generator=generator) * 10 ** (-2 + i / 20) for i, s in enumerate(shapes)]
    return torch.cat(parts), Layout(entries)


def instructions() -> str:
    library = native.library()
    return "none" if isinstance(library, str) else library.instruction_set


def measured(text: str, row: torch.Tensor, layout: Layout, repeats: int) -> dict[str, Any]:
    """One codec's seconds, bytes and error."""
    codec, keys = parse("codec", text)(layout), [Key.root(0)]
    copy, out = torch.zeros_like(row), torch.zeros_like(row)
    (payload,) = codec.encode(row[None], keys)
    size = len(payload)

    def encode() -> None:
        nonlocal payload
        (payload,) = codec.encode(row[None], keys)

    compiled = race(
        {
            "copy": lambda: np.copyto(copy.numpy(), row.numpy()),
            "encode": encode,
            "decode": lambda: codec.decode(memoryview(payload), out),
        },
        repeats,
    )
    gap = float((out.double() - row.double()).norm() / row.double().norm())
    os.environ["FEDKEEL_NATIVE"] = "off"
    native.library.cache_clear()
    plain = race({"encode": encode, "decode": lambda: codec.decode(memoryview(payload), out)}, 3)
    del os.environ["FEDKEEL_NATIVE"]
    native.library.cache_clear()
    line = {"codec": text, "bytes": size, "relative_error": gap, **{f"{k}_ms": 1e3 * v for k, v in compiled.items()}}
    line["plain_ms"] = 1e3 * sum(plain.values())
    print(json.dumps(line), flush=True)
    return line


def race(contestants: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """The least seconds of each, taking turns; the first turn warms up."""
    least = dict.fromkeys(contestants, math.inf)
    for repeat in range(repeats + 1):
        for name, function in contestants.items():
            start = time.perf_counter()
            function()
            took = time.perf_counter() - start
            if repeat:
                least[name] = min(least[name], took)
    return least


def table(found: dict[str, Any]) -> str:
    """The figures as Markdown."""
    columns = found["columns"]
    out = [
        "| codec | bits a column | of float32 | encode, ms | decode, ms | both, x copy | MB/s | no compiler, x copy "
        "| relative error |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for line in found["lines"]:
        both = line["encode_ms"] + line["decode_ms"]
        times, plain = both / line["copy_ms"], line["plain_ms"] / line["copy_ms"]
        out.append(
            f"| `{line['codec']}` | {8 * line['bytes'] / columns:.2f} | 1/{4 * columns / line['bytes']:.1f} "
            f"| {line['encode_ms']:.1f} | {line['decode_ms']:.1f} | {times:.1f}{_target(line['codec'], times)} "
            f"| {4e-3 * columns / both:,.0f} | {plain:.1f} | {line['relative_error']:.3g} |"
        )
    copy = min(line["copy_ms"] for line in found["lines"])
    out.append(
        f"\n{columns:,} columns, one thread, instructions {found['instructions']}; a copy of the row takes {copy:.2f} "
        f"ms at best ({8e-6 * columns / copy:.0f} GB/s read and written). MB/s are of float32 encoded and decoded. "
        f"Relative error: L2 of the error by that of the row."
    )
    return "\n".join(out)


def _target(codec: str, times: float) -> str:
    if codec not in TARGETS:
        return ""
    return f" (target {TARGETS[codec]}: {'met' if times <= TARGETS[codec] else 'missed'})"


if __name__ == "__main__":
    main()
