#!/usr/bin/env python3
"""What secure aggregation costs: seconds and bytes of a client and of the server, beside adding the rows up.

    python benchmarks/secagg.py [--columns 100000 1000000] [--sizes 5 10 20] [--repeats 5] [--json FILE]

Whole sessions on one core, with all messages; nobody lost, and a fifth of the group lost after it had shared its keys,
which is the dearest moment. A group of 100 as well, with everybody everybody's neighbour and with 20 neighbours each.
Sessions are in seconds of the processor; the least of the repeats counts, a client's figure is the median of its
group's. The limit is what AES-256 in counter mode takes for as much keystream as there are masks, measured in turns
with them. Beside it the same steps with Flower's own functions, where they are installed, in turns with ours. Writes
results/secagg.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from codec import race
from fedkeel.core.keys import Key
from fedkeel.secagg import masks, shamir
from fedkeel.secagg.client import Client
from fedkeel.secagg.quantise import Grid
from fedkeel.secagg.server import Server
from fedkeel.secagg.terms import Terms, Words

HERE = Path(__file__).parent
SPAN, LEVELS, MODULUS = 8.0, 2**22, 2**32  # Flower's own: the values' range, its levels, the words
ZEROS, SPACE = bytes(masks.BLOCK), bytearray(masks.BLOCK)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--columns", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--sizes", type=int, nargs="+", default=[5, 10, 20])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, default=HERE / "results" / "secagg.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {"load_before": os.getloadavg()[0], "sessions": [], "steps": []}
    for columns in args.columns:
        for size in args.sizes:
            for lost in (0, size // 5):
                found["sessions"].append(measured(columns, size, lost, 0, args.repeats))
                print(json.dumps(found["sessions"][-1]), flush=True)
        found["steps"].append(beside_flower(columns, 10, args.repeats))
        print(json.dumps(found["steps"][-1]), flush=True)
    for degree in (0, 20):
        found["sessions"].append(measured(args.columns[0], 100, 20, degree, min(3, args.repeats)))
        print(json.dumps(found["sessions"][-1]), flush=True)
    found["load_after"] = os.getloadavg()[0]
    args.json.parent.mkdir(exist_ok=True)
    args.json.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))


def keystream(size: int) -> None:
    """So many bytes of AES-256-CTR into memory that is there and in the cache: what a mask can not do without."""
    cipher = Cipher(algorithms.AES(bytes(32)), modes.CTR(bytes(16))).encryptor()
    for _ in range(0, size, masks.BLOCK):
        cipher.update_into(ZEROS, SPACE)


def measured(columns: int, size: int, lost: int, degree: int, repeats: int) -> dict[str, Any]:
    """One kind of session: the least of each figure over the repeats."""
    grid = Grid.finest(1.0, size)
    rows = {f"c{i}": torch.randn(columns, generator=Key(i).torch()) * 0.1 for i in range(size)}
    words = {name: grid.encode(row) for name, row in rows.items()}
    runs = [session(words, lost, degree) for _ in range(repeats)]
    line: dict[str, Any] = {"columns": columns, "size": size, "lost": lost, "degree": degree}
    line |= {name: min(run[name] for run in runs) for name in runs[0]}
    names = list(words)[lost:]
    total = np.zeros(columns, "<u4")

    def add_up() -> None:
        total[:] = 0
        for name in names:
            np.add(total, words[name], out=total)

    count = degree + 1 if degree else size
    seeds = [(os.urandom(32), 1) for _ in range(count)]
    times = race(
        {
            "plain_ms": add_up,
            "quantise_ms": lambda: grid.encode(rows["c0"]),
            "masks_ms": lambda: masks.apply(total, seeds),
            "aes_ms": lambda: keystream(count * 4 * columns),
            "sha256_ms": lambda: hashlib.sha256(total).digest(),
        },
        2 * repeats,
    )
    line |= {name: 1e3 * seconds for name, seconds in times.items()}
    line["server_aes_ms"] = line["aes_ms"] * line["server_masks"] / count
    line["aes_gb_s"] = 4e-6 * columns * count / line["aes_ms"]
    return line


def session(words: dict[str, Words], lost: int, degree: int) -> dict[str, float]:
    """Play one session: CPU ms of the server and of the median client, bytes of the median client."""
    gone = set(list(words)[:lost])
    columns = len(words["c0"])
    terms = Terms.drawn(list(words), columns, threshold=degree // 2 + 1 if degree else None, degree=degree)
    spent: dict[str, float] = defaultdict(float)
    up: dict[str, int] = defaultdict(int)
    down: dict[str, int] = defaultdict(int)
    server_seconds = 0.0

    def timed(name: str, call: Any) -> bytes:
        start = time.thread_time()
        data: bytes = call()
        spent[name] += time.thread_time() - start
        up[name] += len(data)
        return data

    clients = {name: Client(name, terms) for name in words}
    for name, client in clients.items():
        client.hold(words[name])
    answers = {name: timed(name, client.advertise) for name, client in clients.items()}
    server = Server(terms)
    while server.stage != "done":
        there = words.keys() - gone if server.stage in ("rows", "unmask") else words.keys()
        start = time.thread_time()
        for name in answers.keys() & there:
            assert server.offer(name, answers[name]) is None
        orders = server.advance()
        server_seconds += time.thread_time() - start
        for name, data in orders.items():
            down[name] += len(data)
        answers = {name: timed(name, lambda n=name, d=data: clients[n].answer(d)) for name, data in orders.items()}
    stayed = [name for name in words if name not in gone]
    total = sum((words[name] for name in stayed[1:]), words[stayed[0]].copy())
    assert np.array_equal(server.total(), total)
    median, left = statistics.median, {terms.places[name] for name in stayed}
    return {
        "server_masks": len(left) + sum(len(terms.holders(terms.places[name]) & left) for name in gone),
        "client_ms": 1e3 * median(spent[name] for name in stayed),
        "server_ms": 1e3 * server_seconds,
        "bytes_up": median(up[name] for name in stayed),
        "bytes_down": median(down[name] for name in stayed),
    }


def beside_flower(columns: int, size: int, repeats: int) -> dict[str, Any]:
    """Quantising and masking one row of a group, and sharing a secret: ours, and by flwr.common.secure_aggregation.

    Both round by chance. Flower's masks come from numpy's Mersenne Twister, begun at 32 bits of the seed; it is what
    its mods call. Putting a secret together, ours goes by weights that it found for the first secret of the group.
    """
    grid = Grid(SPAN, 2 * SPAN / LEVELS, rounding="stochastic")
    row = torch.randn(columns, generator=Key(1).torch()) * 0.1
    seeds = [os.urandom(32) for _ in range(size)]
    words = grid.encode(row, Key(1))
    secret, threshold = os.urandom(32), 2 * size // 3 + 1

    def right(found: bytes) -> bool:
        return found == secret

    shares = shamir.split(secret, threshold, range(1, size + 1))
    calls = {
        "quantise": lambda: grid.encode(row, Key(1)),
        "mask": lambda: masks.apply(words, [(seed, 1) for seed in seeds]),
        "split": lambda: shamir.split(secret, threshold, range(1, size + 1)),
        "combine": lambda: shamir.recover(shares, threshold, right),
    }
    theirs = flower(row.numpy(), seeds, secret, threshold)
    took = race({**calls, **{f"flower_{name}": call for name, call in theirs.items()}}, repeats)
    line: dict[str, Any] = {"columns": columns, "size": size, **{f"{k}_ms": 1e3 * v for k, v in took.items()}}
    return line | {f"{name}_ratio": took[f"flower_{name}"] / took[name] for name in theirs}


def flower(row: np.ndarray[Any, Any], seeds: list[bytes], secret: bytes, threshold: int) -> dict[str, Any]:
    """Flower's functions in the order in which its secaggplus_mod calls them; none if it is not installed."""
    try:
        from flwr.common.secure_aggregation.crypto.shamir import combine_shares, create_shares
        from flwr.common.secure_aggregation.ndarrays_arithmetic import parameters_addition, parameters_mod
        from flwr.common.secure_aggregation.quantization import quantize
        from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen
    except ImportError:
        return {}
    quantised = quantize([row], SPAN, LEVELS)

    def mask() -> None:
        total = quantised
        for seed in seeds:
            total = parameters_addition(total, pseudo_rand_gen(seed, MODULUS, [row.shape]))
        parameters_mod(total, MODULUS)

    shares = create_shares(secret, threshold, len(seeds))
    return {
        "quantise": lambda: quantize([row], SPAN, LEVELS),
        "mask": mask,
        "split": lambda: create_shares(secret, threshold, len(seeds)),
        "combine": lambda: combine_shares(shares[:threshold]),
    }


def table(found: dict[str, Any]) -> str:
    """The figures as Markdown."""
    out = [
        "| columns | group | neighbours | lost | client, ms | its masks | AES alone | SHA-256 of its row | quantising "
        "| server, ms | AES alone | adding up, ms | bytes up over the row | bytes down |",
        "|---:|" + "---:|" * 13,
    ]
    for line in found["sessions"]:
        figures = [line[f"{name}_ms"] for name in ("client", "masks", "aes", "sha256", "quantise", "server")]
        figures += [line["server_aes_ms"]]
        out.append(
            f"| {line['columns']:,} | {line['size']} | {line['degree'] or 'all'} | {line['lost']} "
            f"| {' | '.join(f'{f:.1f}' for f in figures)} "
            f"| {line['plain_ms']:.2f} | {line['bytes_up'] - 4 * line['columns']:,.0f} | {line['bytes_down']:,.0f} |"
        )
    out.append("\n| columns | step of one client of ten | ours, ms | Flower's, ms | times |\n|---:|---|---:|---:|---:|")
    out += [
        f"| {line['columns']:,} | {name} | {line[f'{name}_ms']:.2f} | {line[f'flower_{name}_ms']:.2f} "
        f"| {line[f'{name}_ratio']:.1f} |"
        for line in found["steps"]
        for name in ("quantise", "mask", "split", "combine")
        if f"flower_{name}_ms" in line
    ]
    reached = [line["aes_ms"] / line["masks_ms"] for line in found["sessions"]]
    speed = statistics.median(line["aes_gb_s"] for line in found["sessions"])
    out.append(
        f"\nThe limit is AES-256-CTR, {speed:.1f} GB/s at the median, for 4 bytes a column and mask; masking "
        f"reaches {statistics.median(reached):.0%} of it ({min(reached):.0%} to {max(reached):.0%}). One core."
    )
    return "\n".join(out)


if __name__ == "__main__":
    main()
