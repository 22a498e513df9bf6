"""Who sums with whom, and what comes of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from fedkeel.core.errors import CohortError, InputError
from fedkeel.core.keys import Key
from fedkeel.secagg.terms import Words


class GroupSum(NamedTuple):
    """The sum of the survivors' rows (P,), mod 2^bits; or None, and why there is none.

    `traffic`: bytes to and from each member, where somebody has counted them.
    """

    survivors: tuple[str, ...]
    total: Words | None
    reason: str | None = None
    traffic: Mapping[str, tuple[int, int]] = {}


def deal(clients: Sequence[str], size: int, key: Key, threshold: int = 2) -> tuple[tuple[str, ...], ...]:
    """Deal clients into groups of `size` or more, by chance and whatever their order; sizes differ by one at most.

    Raises `CohortError` where there are not enough clients for a single group's threshold.
    """
    if not 2 <= threshold <= size:
        raise InputError(f"size = {size}: write at least the group's threshold, {threshold}, and 2")
    if len(clients) < threshold:
        raise CohortError(f"secure aggregation: {len(clients)} clients are no group, {threshold} are needed")
    dealt = [sorted(clients)[at] for at in key.numpy().permutation(len(clients))]
    count = max(1, len(dealt) // size)
    least, more = divmod(len(dealt), count)
    ends = [least * (i + 1) + min(i + 1, more) for i in range(count)]
    return tuple(tuple(dealt[start:end]) for start, end in zip([0, *ends], ends, strict=False))
