"""Selectors: which clients train in a round. Contract: (clients, count, round, key) -> distinct ids.

The answer depends on the set of clients, never on the order in which they are given.
"""

from __future__ import annotations

from collections.abc import Sequence

from fedkeel.core.errors import InputError
from fedkeel.core.keys import Key
from fedkeel.core.registry import rule


@rule("selector")
def uniform(clients: Sequence[str], count: int, round: int, key: Key) -> tuple[str, ...]:
    """Draw clients uniformly, without replacement: FedAvg's sampling (McMahan et al. 2017, algorithm 1)."""
    ids = _ids(clients, count)
    drawn = key.fold("select", round).numpy().permutation(len(ids))[:count]
    return tuple(ids[i] for i in drawn)


@rule("selector")
def round_robin(clients: Sequence[str], count: int, round: int, key: Key) -> tuple[str, ...]:
    """Take clients in turn, sorted by id: everyone once before anyone twice. Draws nothing."""
    ids = _ids(clients, count)
    return tuple(ids[(round * count + i) % len(ids)] for i in range(count))


def _ids(clients: Sequence[str], count: int) -> list[str]:
    ids = sorted(set(clients))
    if len(ids) != len(clients):
        raise InputError(f"{len(clients)} clients have {len(ids)} different ids: give each its own")
    if not 1 <= count <= len(ids):
        raise InputError(f"{count} clients per round of {len(ids)}: choose 1 to {len(ids)}")
    return ids
