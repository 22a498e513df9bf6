"""Reducing 1,000 updates that lie on the disk: seconds, peak memory, and what a size that fits no machine here would
take. `python benchmarks/outofcore.py` writes benchmarks/results/outofcore.json; the largest file is 12 GB.

The cost model is a straight line through the two smaller sizes (columns -> seconds); it is checked on the largest one.
The files are dropped from the page cache before each run, so that they come from the disk.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results" / "outofcore.json"
ROWS, COLUMNS, MEMORY = 1000, (300_000, 1_000_000, 3_000_000), "1GiB"
WANTED = 100_000_000  # columns that are asked for: 400 GB
REDUCERS = ("median", "trimmed_mean(trim=200)")
CODE = """
import json, sys, time
from pathlib import Path
import torch
import fedkeel
from fedkeel.core.registry import parse

peak = lambda: int(Path('/proc/self/status').read_text().partition('VmHWM:')[2].split()[0]) << 10
parse('reducer', sys.argv[2])(torch.randn(1000, 64), torch.ones(1000, dtype=torch.float64))
before, started = peak(), time.perf_counter()
fedkeel.reduce_files(sys.argv[1], sys.argv[2], sys.argv[3], memory=sys.argv[4])
print(json.dumps({'seconds': time.perf_counter() - started, 'memory': peak() - before}))
"""


def write(path: Path, columns: int) -> None:
    file = np.lib.format.open_memmap(path, "w+", np.float32, (ROWS, columns))
    draw = np.random.default_rng(0)
    for row in file:
        row[:] = draw.standard_normal(columns, np.float32)
    file.flush()


def cold(path: Path) -> None:
    """Out of the page cache."""
    os.sync()
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_seconds(path: Path) -> float:
    """The file read from end to end, and no more: what the disk allows."""
    cold(path)
    started = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        room = bytearray(1 << 24)
        while file.readinto(room):
            pass
    return time.perf_counter() - started


def table(result: dict[str, Any]) -> str:
    lines = result["lines"]
    out = [
        f"| {result['rows']} rows on the disk | GB | read alone, s | reduced, s | cost model, s | peak memory, MiB |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for line in lines:
        size = 4e-9 * result["rows"] * line["columns"]
        out.append(
            f"| {line['reducer']}, {line['columns']:,} columns | {size:.1f} | {line['read']:.1f} "
            f"| {line['seconds']:.1f} | {line['model']:.1f} | {line['memory'] / 2**20:.0f} |"
        )
    for reducer in dict.fromkeys(line["reducer"] for line in lines):
        (x0, y0), *_, (x1, y1) = [(x["columns"], x["seconds"]) for x in lines if x["reducer"] == reducer]
        wanted = y0 + (y1 - y0) / (x1 - x0) * (result["wanted"] - x0)
        out.append(
            f"| {reducer}, {result['wanted']:,} columns | {4e-9 * result['rows'] * result['wanted']:.0f} | - "
            f"| not run | {wanted:.0f} | - |"
        )
    return "\n".join(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="where the files may lie; the system's temporary one by default")
    given = parser.parse_args()
    lines = []
    with tempfile.TemporaryDirectory(dir=given.folder) as place:
        rows, out = Path(place) / "rows.npy", Path(place) / "out.npy"
        for columns in COLUMNS:
            write(rows, columns)
            disk = read_seconds(rows)
            for reducer in REDUCERS:
                cold(rows)
                command = [sys.executable, "-c", CODE, str(rows), reducer, str(out), MEMORY]
                found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                lines.append({"columns": columns, "reducer": reducer, "read": round(disk, 3), **found})
                print(lines[-1], flush=True)
            rows.unlink()
    for reducer in REDUCERS:
        (x0, y0), (x1, y1), *_ = [(line["columns"], line["seconds"]) for line in lines if line["reducer"] == reducer]
        for line in lines:
            if line["reducer"] == reducer:
                line["model"] = round(y0 + (y1 - y0) / (x1 - x0) * (line["columns"] - x0), 2)
    result = {"benchmark": "outofcore", "rows": ROWS, "memory": MEMORY, "wanted": WANTED, "lines": lines}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
