"""Selectors: who of the clients that are free is given work. Contract: (candidates, count, round, key) -> positions.

`candidates` are sorted by id and hold what the server knows of each; the answer is `count` distinct positions among
them (1 <= count <= n), and depends on who is there, what is known of them, and the key alone. Under `sync` a cohort is
chosen at once, in asynchronous federations one at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fedkeel.core.errors import InputError
from fedkeel.core.keys import Key
from fedkeel.core.registry import rule
from fedkeel.core.roster import Candidates

Places = NDArray[np.int64]
Share = Annotated[float, Field(ge=0, le=1)]
_LISTED = 4096


@rule("selector")
def uniform(candidates: Candidates, count: int, round: int, key: Key) -> Places:
    """Draw clients uniformly, without replacement: FedAvg's sampling (McMahan et al. 2017, algorithm 1)."""
    draw, n = key.fold("select", round).numpy(), len(candidates)
    # Of very many a few are drawn without writing all of them down.
    return draw.permutation(n)[:count] if n <= _LISTED else draw.choice(n, count, replace=False)


@rule("selector", traits=("poisson",))
def poisson(candidates: Candidates, count: int, round: int, key: Key) -> Places:
    """Each client is drawn by itself, with the probability cohort / clients: as many as luck has it, none at times.

    What privacy accounting calls Poisson sampling: of all samplings it makes the most of noise. Who is away is not
    drawn in another's place.
    """
    rate = min(1.0, count / max(1, int(candidates.sizes.sum())))
    return np.flatnonzero(key.fold("select", round).numpy().random(len(candidates)) < rate)


@rule("selector")
def round_robin(candidates: Candidates, count: int, round: int, key: Key) -> Places:
    """Take clients in turn, sorted by id: everyone once before anyone twice. Draws nothing."""
    return np.argsort(candidates.selected, kind="stable")[:count]


@rule("selector")
def stratified(
    candidates: Candidates,
    count: int,
    round: int,
    key: Key,
    *,
    quotas: Mapping[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] | None = None,
) -> Places:
    """Give each class of devices its part of the work, drawing uniformly within a class.

    Without quotas the part is the class's share of all clients; `quotas={"A": 1, "C": 2}` gives C twice the work of A.
    Places go one by one to the class that is furthest behind its part of all work given so far, and what a class has no
    free clients for goes to the next: over the rounds parts hold exactly, in asynchronous federations too. Clients of
    classes without a quota are chosen last. Raises `InputError` for a class that is not there.
    """
    wanted = candidates.sizes.astype(np.float64)
    if quotas is not None:
        if unknown := set(quotas) - set(candidates.groups):
            raise InputError(
                f"select.rule: stratified has a quota for class '{min(unknown)}', the classes of devices are "
                f"{', '.join(candidates.groups)}: name one of those"
            )
        wanted = np.array([quotas.get(group, 0.0) for group in candidates.groups])
        if not wanted.sum() > 0:
            raise InputError("select.rule: the quotas of stratified sum to 0: give a class a quota above 0")
    shares = wanted / wanted.sum()
    left = np.bincount(candidates.group, minlength=len(shares))
    given, places = candidates.given.astype(np.float64), np.zeros(len(shares), np.int64)
    for _ in range(count):
        behind = np.where(left > places, shares * (given.sum() + 1) - given, -np.inf)
        behind[(shares == 0) & (left > places)] -= given.sum() + len(candidates)
        group = int(np.argmax(behind))
        places[group] += 1
        given[group] += 1
    draw = key.fold("select", round).numpy()
    mine = (np.flatnonzero(candidates.group == g) for g in range(len(shares)))
    return np.concatenate([draw.choice(of, int(n), replace=False) for of, n in zip(mine, places, strict=True) if n])


@rule("selector", traits=("by_data",))
def power_of_choice(
    candidates: Candidates, count: int, round: int, key: Key, *, among: Annotated[int, Field(ge=1)] = 20
) -> Places:
    """Draw `among` clients in proportion to their examples, and of these take those of the highest loss.

    Cho, Wang and Joshi 2020, the variant rpow-d: losses and numbers of examples are those of a client's latest answer,
    so nothing more is sent; who has not answered yet comes first. Faster, and biased towards clients that fit badly.
    """
    draw = key.fold("select", round).numpy()
    known = candidates.examples
    mean = np.nanmean(known) if np.isfinite(known).any() else 1.0
    weight = np.maximum(np.where(np.isfinite(known), known, mean), 1e-9)
    # The largest of u^(1/w): a draw without replacement by weights (Efraimidis and Spirakis 2006).
    drawn = np.argsort(np.log(draw.random(len(candidates))) / weight, kind="stable")[::-1][: max(among, count)]
    loss = np.where(np.isfinite(candidates.loss), candidates.loss, np.inf)[drawn]
    return drawn[np.argsort(-loss, kind="stable")[:count]]


@rule("selector", traits=("by_data",))
def oort(
    candidates: Candidates,
    count: int,
    round: int,
    key: Key,
    *,
    explore: Share = 0.9,
    least: Share = 0.2,
    pace: Share = 0.8,
    penalty: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 2.0,
) -> Places:
    """Prefer clients whose examples are many and badly fitted, and whose devices are fast (Oort, Lai et al. 2021).

    A share of the places, `explore` * 0.98^round and at least `least`, goes to clients that never worked. The others
    are drawn by utility, examples * loss, plus sqrt(0.1 log(round) / last round), times (T / t)^penalty for devices
    whose last task took t seconds, longer than T, the quantile `pace` of the known ones. Utilities count up to their 95
    % quantile. Loss is the mean that a client claims (the paper takes the root of the mean square), so a client may
    claim itself more work.
    """
    draw = key.fold("select", round).numpy()
    new = np.flatnonzero(candidates.selected == 0)
    old = np.flatnonzero(candidates.selected > 0)
    share = max(least, explore * 0.98**round)
    fresh = min(len(new), max(count - len(old), _rounded(draw.random(), share * count)))
    first = draw.permutation(new)[:fresh]
    rest = count - fresh
    if not rest:
        return first
    utility = _utility(candidates, old, round, pace, penalty)
    cutoff = 0.95 * np.sort(utility)[-rest]
    pool = np.flatnonzero(utility >= cutoff)
    drawn = np.argsort(np.log(draw.random(len(pool))) / np.maximum(utility[pool], 1e-9), kind="stable")[::-1][:rest]
    return np.concatenate([first, old[pool[drawn]]])


def _utility(candidates: Candidates, old: Places, round: int, pace: float, penalty: float) -> NDArray[np.float64]:
    loss, examples, seconds = (
        np.asarray(values[old], np.float64) for values in (candidates.loss, candidates.examples, candidates.seconds)
    )
    found = np.nan_to_num(examples * loss, nan=0.0, posinf=0.0, neginf=0.0).clip(min=0)
    if len(found):
        found = np.minimum(found, np.quantile(found, 0.95))
    found += np.sqrt(0.1 * np.log(max(round, 1)) / np.maximum(candidates.last[old], 1))
    if np.isfinite(seconds).any():
        limit = np.nanquantile(seconds, pace)
        slow = np.isfinite(seconds) & (seconds > limit) & (limit > 0)
        found[slow] *= (limit / seconds[slow]) ** penalty
    return found


def _rounded(u: float, value: float) -> int:
    """The value rounded up with the probability of its fraction, u being uniform in [0, 1)."""
    whole = int(value)
    return whole + (u < value - whole)
