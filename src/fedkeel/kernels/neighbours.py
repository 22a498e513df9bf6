"""Choices of rows from their distances alone: Krum's scores, nearest neighbours, the subset of least diameter.

D is a matrix of squared distances (n, n), float64, with zeros on the diagonal (`distance.sq_distances`), on the CPU. A
distance that is NaN counts as infinite: such a row is chosen last.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_BRANCHES = 200_000  # of the search for a vertex cover; some seconds


def krum_scores(D: Tensor, f: int) -> Tensor:
    """The sum of each row's n - f - 2 smallest squared distances to others, (n,) (Blanchard et al. 2017)."""
    n = len(D)
    others = D.nan_to_num(nan=torch.inf).masked_fill(torch.eye(n, dtype=torch.bool), torch.inf)
    return others.sort(dim=1).values[:, : n - f - 2].sum(dim=1)


def krum_order(D: Tensor, f: int, count: int) -> list[int]:
    """`count` rows chosen one after another by Krum among those that are left (El Mhamdi et al. 2018, Bulyan).

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
    the distances, and search covers of at most f rows by branching on the row with the most conflicts. Of several
    subsets, the one whose distances sum to the least. Raises `RuntimeError` where that takes too long (many rows and
    large f, all at about the same distance).
    """
    n = len(D)
    if f == 0:
        return list(range(n))
    D = D.nan_to_num(nan=torch.inf)
    thresholds = sorted({0.0, *D.flatten().tolist()})
    left = [_BRANCHES]
    low, high = 0, len(thresholds) - 1
    while low < high:
        middle = (low + high) // 2
        if next(_covers(_conflicts(D, thresholds[middle]), f, left), None) is None:
            low = middle + 1
        else:
            high = middle
    subsets = (_without(D, cover, f) for cover in _covers(_conflicts(D, thresholds[low]), f, left))
    return min(subsets, key=lambda kept: float(D[kept][:, kept].sum()))


def _conflicts(D: Tensor, threshold: float) -> list[set[int]]:
    return [set(torch.nonzero(row).flatten().tolist()) for row in threshold < D]


def _without(D: Tensor, cover: set[int], f: int) -> list[int]:
    """The rows without these, and without as many more as make f: always the one that is farthest from the others."""
    kept = [i for i in range(len(D)) if i not in cover]
    while len(kept) > len(D) - f:
        kept.pop(int(D[kept][:, kept].sum(1).argmax()))
    return kept


def _covers(conflicts: list[set[int]], budget: int, left: list[int]) -> Iterator[set[int]]:
    """Sets of at most `budget` rows that every conflict has one of: all those that are minimal."""
    left[0] -= 1
    if left[0] < 0:
        raise RuntimeError("the search for the subset of least diameter takes too long")
    sizes = [len(c) for c in conflicts]
    most = max(sizes, default=0)
    if most == 0:
        yield set()
        return
    if budget == 0 or sum(sizes) > 2 * budget * most:
        return
    row = sizes.index(most)
    for cover in ({row}, conflicts[row]):  # either the row goes, or all that it conflicts with
        if len(cover) <= budget:
            rest = [set() if i in cover else c - cover for i, c in enumerate(conflicts)]
            yield from (cover | found for found in _covers(rest, budget - len(cover), left))
