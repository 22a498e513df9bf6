"""Choices of rows from their distances alone: Krum's scores, nearest neighbours, the subset of least diameter.

D is a matrix of squared distances (n, n), float64, with zeros on the diagonal (`distance.sq_distances`), on the CPU. A
distance that is NaN counts as infinite: such a row is chosen last.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BRANCHES = 200_000  # of the search for a vertex cover; some seconds


def krum_scores(D: Tensor, f: int) -> Tensor:
    """The sum of each row's n - f - 2 smallest squared distances to others, (n,) (Blanchard et al. 2017)."""
    n = len(D)
    others = D.nan_to_num(nan=torch.inf).masked_fill(torch.eye(n, dtype=torch.bool), torch.inf)
    return others.sort(dim=1).values[:, : n - f - 2].sum(dim=1)


def krum_order(D: Tensor, f: int, count: int) -> list[int]:
    """`count` rows chosen one after another by Krum among those that are left (El Mhamdi et al. 2018, section 4).

    Each choice counts at least one neighbour. Where few are left, two that are each other's nearest have equal
    scores: of these the one that is nearer to all.
    """
    left = list(range(len(D)))
    far = D.nan_to_num(nan=torch.inf).sum(1).tolist()
    chosen: list[int] = []
    while len(chosen) < count:
        among = D[left][:, left]
        scores = krum_scores(among, min(f, len(left) - 3)).tolist() if len(left) > 2 else [0.0] * len(left)
        chosen.append(left.pop(min(range(len(left)), key=lambda i: (scores[i], far[left[i]]))))
    return chosen


def nearest(D: Tensor, count: int) -> Tensor:
    """The `count` rows nearest to each row, itself first, (n, count) int64; of equal distances the first row."""
    return D.nan_to_num(nan=torch.inf).fill_diagonal_(-1.0).sort(dim=1, stable=True).indices[:, :count]


def least_diameter(D: Tensor, f: int) -> list[int]:
    """n - f rows whose largest distance between two is the least possible: exact (El Mhamdi et al. 2018, MDA).

    A subset of diameter at most t leaves out a vertex cover of the graph of pairs farther apart than t: bisect over
    the distances, and search covers of at most f rows by branching on the row with the most conflicts. Raises
    `RuntimeError` where that takes too long (many rows and large f, all at about the same distance).
    """
    n = len(D)
    if f == 0:
        return list(range(n))
    D = D.nan_to_num(nan=torch.inf)
    thresholds = sorted({0.0, *D.flatten().tolist()})
    low, high = 0, len(thresholds) - 1
    best: set[int] = set(range(f))
    while low < high:
        middle = (low + high) // 2
        cover = _cover([set(torch.nonzero(row).flatten().tolist()) for row in thresholds[middle] < D], f, [_BRANCHES])
        if cover is None:
            low = middle + 1
        else:
            best, high = cover, middle
    if len(best) < f:  # leave out as many as were asked for: those farthest from the rest
        kept = [i for i in range(n) if i not in best]
        far = D[kept][:, kept].sum(1).sort(descending=True, stable=True).indices.tolist()
        best = best | {kept[i] for i in far[: f - len(best)]}
    return [i for i in range(n) if i not in best]


def _cover(conflicts: list[set[int]], budget: int, left: list[int]) -> set[int] | None:
    """At most `budget` rows that every conflict has one of, or None."""
    left[0] -= 1
    if left[0] < 0:
        raise RuntimeError("the search for the subset of least diameter takes too long")
    sizes = [len(c) for c in conflicts]
    most = max(sizes, default=0)
    if most == 0:
        return set()
    if budget == 0 or sum(sizes) > 2 * budget * most:
        return None
    row = sizes.index(most)
    others = sorted(conflicts[row])
    for cover in ([row], others):  # either the row goes, or all that it conflicts with
        if len(cover) > budget:
            continue
        rest = [set() if i in cover else c.difference(cover) for i, c in enumerate(conflicts)]
        found = _cover(rest, budget - len(cover), left)
        if found is not None:
            return found | set(cover)
    return None
