#!/usr/bin/env python3
"""Write the job that every peer runs, Fashion-MNIST split over clients and who trains when, as one npz file.

The images come as IDX files, from Debian's package dataset-fashion-mnist unless --idx names another folder.
"""

import argparse
import gzip
from pathlib import Path

import numpy as np

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
MIN_EXAMPLES = 10


def read_idx(folder: Path, name: str) -> np.ndarray:
    """Return the array in the IDX file `name`, plain or gzipped; only the unsigned byte type is used here."""
    path = folder / name
    raw = path.read_bytes() if path.exists() else gzip.decompress((folder / f"{name}.gz").read_bytes())
    if raw[:3] != b"\x00\x00\x08":
        raise ValueError(f"{name} is not an IDX file of unsigned bytes")
    rank = raw[3]
    shape = np.frombuffer(raw, ">i4", rank, offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(shape)


def dirichlet_split(labels: np.ndarray, clients: int, alpha: float, rng: np.random.Generator) -> list[np.ndarray]:
    """Return each client's example indices: every label is dealt out by one Dirichlet(alpha) draw over the clients.

    Drawn anew until every client has MIN_EXAMPLES, as is usual; after 1,000 draws the smallest clients take what
    they lack from the largest one, so that a small alpha cannot make it run forever.
    """
    if clients * MIN_EXAMPLES > len(labels):
        raise ValueError(f"{len(labels)} examples are too few for {clients} clients of {MIN_EXAMPLES}")
    for _ in range(1000):
        parts: list[list[np.ndarray]] = [[] for _ in range(clients)]
        for label in np.unique(labels):
            indices = rng.permutation(np.flatnonzero(labels == label))
            cuts = np.floor(np.cumsum(rng.dirichlet(np.full(clients, alpha)))[:-1] * len(indices)).astype(np.int64)
            for part, piece in zip(parts, np.split(indices, cuts), strict=True):
                part.append(piece)
        split = [rng.permutation(np.concatenate(part)) for part in parts]
        if min(map(len, split)) >= MIN_EXAMPLES:
            return split
    for i in range(clients):
        lacking = MIN_EXAMPLES - len(split[i])
        if lacking > 0:
            largest = max(range(clients), key=lambda j: len(split[j]))
            split[i] = np.concatenate([split[i], split[largest][:lacking]])
            split[largest] = split[largest][lacking:]
    return split


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--idx", type=Path, default=DEBIAN, help="folder of the four IDX files")
    parser.add_argument("--alpha", type=float, default=0.5)
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--per-round", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=40, help="rounds to draw a cohort for, warm-up included")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    rng = np.random.default_rng(args.seed)
    x, y = read_idx(args.idx, "train-images-idx3-ubyte"), read_idx(args.idx, "train-labels-idx1-ubyte")
    split = dirichlet_split(y, args.clients, args.alpha, rng)
    order = np.concatenate(split)
    sizes = np.array([len(part) for part in split])
    np.savez(
        args.out,
        x=x[order],
        y=y[order].astype(np.int64),
        offsets=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
        cohorts=np.stack([rng.choice(args.clients, args.per_round, replace=False) for _ in range(args.rounds)]),
        test_x=read_idx(args.idx, "t10k-images-idx3-ubyte"),
        test_y=read_idx(args.idx, "t10k-labels-idx1-ubyte").astype(np.int64),
    )
    print(f"{args.out}: {len(order)} examples over {args.clients} clients, {sizes.min()} to {sizes.max()} each")


if __name__ == "__main__":
    main()
