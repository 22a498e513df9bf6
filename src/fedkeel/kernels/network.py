"""Selection networks: which minima and maxima find the middle ranks of n values, and no others.

A network is a list of comparators (i, j), "put the smaller value on wire i, the larger on wire j". For the trimmed
mean only the *set* of the middle values is wanted, so whatever merely orders values inside that set, or inside the
tails, is pruned away. The median is the trimmed mean that keeps one or two values.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

Comparator = tuple[int, int]


class Step(NamedTuple):
    """registers[out] = maximum or minimum of registers a and b; `out` may be a or b."""

    is_max: bool
    a: int
    b: int
    out: int


@dataclass(frozen=True, slots=True)
class Plan:
    """A straight-line program: registers 0..n-1 are the rows (never written), then come `scratch` working rows.

    `comparators` are the steps with the two of one pair together: (a, b, minimum to, maximum to), -1 where one is not
    wanted. After the steps, the registers `kept` hold the values of ranks trim..n-trim-1, in no particular order.
    """

    steps: tuple[Step, ...]
    comparators: tuple[tuple[int, int, int, int], ...]
    scratch: int
    kept: tuple[int, ...]


@lru_cache(maxsize=256)
def plan(n: int, trim: int) -> Plan:
    """The cheapest network this module knows that drops the `trim` smallest and largest of n > 2 * trim values."""
    return _allocate(n, *min(_candidates(n, trim), key=lambda found: sum(map(len, found[0]))))


@lru_cache(maxsize=64)
def sorter(n: int) -> Plan:
    """The program that sorts n values: `kept` are the registers of ranks 0, 1, ..., in this order."""
    return _allocate(n, [[i, j, i, j] for i, j in pairwise(n)], tuple(range(n)))


def pairwise(n: int, low: int = 0) -> list[Comparator]:
    """The pairwise sorting network (Parberry 1992) for n values: wire k ends with rank k.

    Built for the next power of two and cut: the surplus wires carry -inf (`low` of them) and +inf, which never move.
    """
    size, found = 1 << (n - 1).bit_length(), []
    gap = 1
    while gap < size:
        found += [(b, b + gap) for b in range(size) if not b & gap]
        gap *= 2
    gap, reach = size // 4, 1
    while gap:
        step = reach
        while step:
            found += [(b - step * gap, b) for b in range((step + 1) * gap, size) if b & gap == 0]
            step //= 2
        gap, reach = gap // 2, 2 * reach + 1
    return [(i - low, j - low) for i, j in found if low <= i and j < low + n]


def _candidates(n: int, trim: int) -> list[tuple[list[list[int]], tuple[int, ...]]]:
    """Pruned networks: peel off a few extremes (cheap when few are trimmed), then sort the rest, or its two halves."""
    found = []
    peeled: list[Comparator] = []
    wires = list(range(n))
    for rounds in range(min(trim, 4) + 1):
        left = trim - rounds
        for low in _offsets(len(wires)):
            kept = tuple(wires[left : len(wires) - left])
            found.append((_prune(peeled + _sort(wires, low), kept), kept))
        first, second = wires[: len(wires) // 2], wires[len(wires) // 2 :]
        for low in _offsets(len(first)) if 0 < 2 * left <= len(first) else ():
            comparators = _sort(first, low) + _sort(second, low) + _cut(first, second, left)
            kept = tuple(first[left:] + second[: len(second) - left])
            found.append((_prune(peeled + comparators, kept), kept))
        peeled += _peel(wires)
        wires = wires[1:-1]
    return found


def _offsets(n: int) -> list[int]:
    """Values of `low` worth a try for the pairwise network of n."""
    spare = (1 << (n - 1).bit_length()) - n
    return sorted({0, min(1, spare), spare // 3, spare // 2})


def _sort(wires: list[int], low: int) -> list[Comparator]:
    return [(wires[i], wires[j]) for i, j in pairwise(len(wires), min(low, _offsets(len(wires))[-1]))]


def _cut(first: list[int], second: list[int], trim: int) -> list[Comparator]:
    """Of two sorted lists, the `trim` smallest values to the start of the first, the largest to the end of the second.

    min(a_i, b_(t-1-i)), i < t, are the t smallest of both: the half-cleaner of a bitonic network (Batcher 1968).
    """
    smallest = list(zip(first[:trim], reversed(second[:trim]), strict=True))
    largest = list(zip(first[-trim:], reversed(second[-trim:]), strict=True))
    return smallest + largest


def _peel(wires: list[int]) -> list[Comparator]:
    """Bring the minimum to the first of these wires and the maximum to the last one."""
    half = len(wires) // 2
    lower, upper = wires[: len(wires) - half], wires[half:]
    pairs = list(zip(wires[:half], reversed(wires), strict=False))
    return pairs + [(wires[0], w) for w in lower[1:]] + [(w, wires[-1]) for w in upper[:-1]]


def _prune(comparators: list[Comparator], kept: tuple[int, ...]) -> list[list[int]]:
    """Comparators as [i, j, outputs wanted...]: those that decide which values end on the `kept` wires.

    From the end backwards: an output nobody reads is not computed, and a comparator between two kept wires that are
    not touched again only orders them.
    """
    live, untouched = set(kept), set(kept)
    found = []
    for i, j in reversed(comparators):
        wanted = [w for w in (i, j) if w in live]
        if not wanted or (i in untouched and j in untouched):
            continue
        found.append([i, j, *wanted])
        untouched -= {i, j}
        live |= {i, j}
    return found[::-1]


def _allocate(n: int, comparators: list[list[int]], kept: tuple[int, ...]) -> Plan:
    """Assign wires to registers: rows are read where they lie, and a working row is used again once it is dead."""
    at = {w: w for w in range(n)}
    free: list[int] = []
    count = n
    steps = []
    for i, j, *wanted in comparators:
        a, b = at[i], at[j]
        spent = [r for r in (a, b) if r >= n]
        for last, wire in enumerate(wanted, start=1 - len(wanted)):
            # The first of two outputs must leave both operands readable; the last one may overwrite one of them.
            pool = spent if last == 0 and spent else free
            if not pool:
                pool.append(count)
                count += 1
            out = pool.pop()
            steps.append(Step(wire == j, a, b, out))
            at[wire] = out
        free += spent
    return Plan(tuple(steps), _paired(steps), count - n, tuple(at[w] for w in kept))


def _paired(steps: list[Step]) -> tuple[tuple[int, int, int, int], ...]:
    found: list[list[int]] = []
    for is_max, a, b, out in steps:
        if not (found and found[-1][:2] == [a, b] and found[-1][2 + is_max] < 0):
            found.append([a, b, -1, -1])
        found[-1][2 + is_max] = out
    return tuple((a, b, low, high) for a, b, low, high in found)
