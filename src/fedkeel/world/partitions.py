"""Partitions: how a pool is split among clients. Contract: (pool, clients, key) -> Split.

Every example of the pool goes to exactly one client (`natural` with fewer clients than groups leaves the other
groups out) and no client is left empty; the result depends on the pool, the count and the key alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from fedkeel.core.errors import InputError
from fedkeel.core.keys import Key
from fedkeel.core.registry import rule
from fedkeel.world.pool import Pool, Split

Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Indices = NDArray[np.int64]

_TRIES = 100


def _min_examples(*, min_examples: int, **_: Any) -> int:
    return min_examples


@rule("partition")
def iid(pool: Pool, clients: int, key: Key) -> Split:
    """Shuffle and deal: equal counts to within one, the same distribution for everyone."""
    _room(pool, clients, 1)
    return _split(np.array_split(key.numpy().permutation(len(pool)), clients))


@rule("partition", needs=_min_examples)
def dirichlet(
    pool: Pool,
    clients: int,
    key: Key,
    *,
    alpha: Positive,
    quantity_alpha: Positive | None = None,
    min_examples: Count = 2,
    capped: bool = False,
) -> Split:
    """Skew the labels: each class is divided among the clients by a draw from Dirichlet(alpha); smaller is more skewed.

    The per-class split of Yurochkin et al. 2019 (Bayesian nonparametric FL, section 4) and NIID-Bench (Li et al.
    2022, section 4.1, p_k ~ Dir(alpha)). `capped` as in their code, and in PFLlib's: who holds an equal share of all
    examples already gets none of the classes that follow, so that clients hold fewer classes each. With
    `quantity_alpha` the clients' sizes are skewed as well: q ~ Dir(quantity_alpha), then p_k ~ Dir(alpha * clients *
    q), whose mean is q. Drawn again, at most 100 times, until every client has `min_examples`.
    """
    labels = _labels(pool, "dirichlet")
    _room(pool, clients, min_examples)

    def draw(rng: np.random.Generator) -> list[Indices]:
        concentration = np.full(clients, alpha)
        if quantity_alpha is not None:
            # A share of exactly 0 is no Dirichlet parameter.
            concentration *= clients * np.maximum(rng.dirichlet(np.full(clients, quantity_alpha)), 1e-9)
        parts: list[list[Indices]] = [[] for _ in range(clients)]
        for label in np.unique(labels):
            rows = rng.permutation(np.flatnonzero(labels == label))
            shares = rng.dirichlet(concentration)
            if capped:
                shares = shares * [sum(map(len, part)) < len(labels) / clients for part in parts]
                shares /= shares.sum()
            for part, piece in zip(parts, _cut(rows, shares), strict=True):
                part.append(piece)
        return [np.concatenate(part) for part in parts]

    asked = f"dirichlet(alpha={alpha}{'' if quantity_alpha is None else f', quantity_alpha={quantity_alpha}'})"
    return _split(_retry(draw, key, min_examples, f"{asked} of {len(pool)} examples among {clients} clients"))


@rule("partition")
def shards(pool: Pool, clients: int, key: Key, *, classes_per_client: Count, even: bool = True) -> Split:
    """Give every client examples of k classes only: #C=k of NIID-Bench (Li et al. 2022, section 4.1).

    A client draws its classes among those that the fewest clients hold so far, so each class has equally many
    holders to within one; they share its examples equally. With even=False it is drawn as in NIID-Bench's code: client
    i holds class i, counted round, and draws the others freely, so that clients differ in size as well.
    """
    labels = _labels(pool, "shards")
    _room(pool, clients, 1)
    present = np.unique(labels)
    if not classes_per_client <= len(present) <= clients * classes_per_client:
        least = -(-len(present) // clients)
        raise InputError(
            f"shards(classes_per_client={classes_per_client}) cannot deal {len(present)} classes to {clients} clients: "
            f"choose {least} to {len(present)}"
        )
    rng = key.numpy()
    holders: list[list[int]] = [[] for _ in present]
    for client in range(clients):
        held = np.array([len(h) for h in holders]) * even + rng.random(len(present))  # fewest first, ties at random
        if not even:
            held[client % len(present)] = -1
        for label in np.argsort(held)[:classes_per_client]:
            holders[label].append(client)
    parts: list[list[Indices]] = [[] for _ in range(clients)]
    for label, owners in zip(present, holders, strict=True):
        rows = rng.permutation(np.flatnonzero(labels == label))
        for owner, piece in zip(rng.permutation(owners), np.array_split(rows, len(owners)), strict=True):
            parts[owner].append(piece)
    chosen = [np.concatenate(part) for part in parts]
    if min(map(len, chosen)) == 0:
        raise InputError(
            f"shards(classes_per_client={classes_per_client}) leaves one of {clients} clients without examples: "
            "use fewer clients or a higher classes_per_client"
        )
    return _split(chosen)


@rule("partition", needs=_min_examples)
def quantity_skew(pool: Pool, clients: int, key: Key, *, alpha: Positive, min_examples: Count = 2) -> Split:
    """Skew the sizes alone: client i holds a share q_i of a shuffle, q ~ Dirichlet(alpha).

    NIID-Bench (Li et al. 2022, section 4.3). Drawn again, at most 100 times, until every client has `min_examples`.
    """
    _room(pool, clients, min_examples)

    def draw(rng: np.random.Generator) -> list[Indices]:
        return _cut(rng.permutation(len(pool)), rng.dirichlet(np.full(clients, alpha)))

    asked = f"quantity_skew(alpha={alpha}) of {len(pool)} examples among {clients} clients"
    return _split(_retry(draw, key, min_examples, asked))


@rule("partition")
def feature_noise(pool: Pool, clients: int, key: Key, *, sigma: Positive = 0.1) -> Split:
    """Skew the features: an iid split, and Gaussian noise of variance sigma * i / clients on client i = 1, 2, ...

    NIID-Bench (Li et al. 2022, section 4.2), as the paper has it: its code takes sigma * i / (clients - 1), counted
    from 0, as the standard deviation. The noise is on the model's inputs (after scaling) and drawn once.
    """
    split = iid(pool, clients, key)
    return Split(split.shares, split.names, tuple((sigma * (i + 1) / clients) ** 0.5 for i in range(clients)))


@rule("partition", needs=_min_examples)
def natural(pool: Pool, clients: int, key: Key, *, min_examples: Count = 1) -> Split:
    """One client per natural group of the data (a person, a role); with fewer clients than groups, a draw of them.

    Groups with fewer than `min_examples` training examples are left out.
    """
    if pool.group is None:
        raise InputError("partition 'natural' needs data with groups, and this has none: choose iid or dirichlet")
    _room(pool, clients, min_examples)
    counts = torch.bincount(pool.group, minlength=len(pool.group_names))
    fit = (counts >= min_examples).nonzero().flatten().numpy()
    if len(fit) < clients:
        raise InputError(
            f"{clients} clients of {len(fit)} natural groups with at least {min_examples} examples: "
            f"ask for at most {len(fit)}"
        )
    chosen = np.sort(key.numpy().permutation(fit)[:clients])
    rows = np.split(torch.argsort(pool.group, stable=True).numpy(), counts.cumsum(0)[:-1].numpy())
    return _split([rows[g] for g in chosen], tuple(pool.group_names[g] for g in chosen))


def _labels(pool: Pool, name: str) -> Indices:
    if pool.classes == 0 or pool.y.dim() != 1:
        raise InputError(f"partition '{name}' needs one class label per example: choose iid, quantity_skew or natural")
    labels: Indices = pool.y.numpy()
    return labels


def _room(pool: Pool, clients: int, least: int) -> None:
    if not 1 <= clients * least <= len(pool):
        raise InputError(
            f"{clients} clients of at least {least} examples do not fit {len(pool)} examples: "
            f"choose 1 to {len(pool) // least} clients"
        )


def _cut(rows: Indices, shares: NDArray[np.float64]) -> list[Indices]:
    """Consecutive pieces of these proportions: cuts at floor(cumulative share * rows), the last at the end."""
    cuts = np.minimum(np.cumsum(shares)[:-1] * len(rows), len(rows)).astype(np.int64)
    return np.split(rows, cuts)


def _retry(draw: Callable[[np.random.Generator], list[Indices]], key: Key, least: int, asked: str) -> list[Indices]:
    best = 0
    for attempt in range(_TRIES):
        parts = draw(key.fold(attempt).numpy())
        smallest = min(map(len, parts))
        if smallest >= least:
            return parts
        best = max(best, smallest)
    raise InputError(
        f"{asked} left a client with fewer than min_examples={least} in {_TRIES} draws (the best had {best}): "
        "use fewer clients, a higher alpha or a lower min_examples"
    )


def _split(parts: list[Indices], names: tuple[str, ...] = ()) -> Split:
    """Rows in the pool's order: training shuffles by its own key."""
    return Split(tuple(torch.from_numpy(np.sort(part).astype(np.int64, copy=False)) for part in parts), names)
