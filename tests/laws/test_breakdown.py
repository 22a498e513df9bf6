"""Breakdown points by search: up to the stated number of hostile rows no rows that a search finds pull a robust rule
beyond the stated radius; with one more row than a rule can stand, a counter-example is found."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedkeel import build, names
from fedkeel.core.registry import Rule, definition
from fedkeel.core.types import ServerState
from fedkeel.testing import cohort, rows

N, COLUMNS = 15, 6
ROBUST = [name for name in names("reducer") if "robust" in definition("reducer", name).traits]
PARAMETERS = {"f": 3, "trim": 4, "share": 0.3}


def rule_of(name: str) -> tuple[Rule, int]:
    """A robust reducer for 15 rows, and how many hostile ones it states to withstand."""
    given = {p: v for p, v in PARAMETERS.items() if p in definition("reducer", name).parameters}
    stated = given.get("f", given.get("trim", int(given.get("share", 7 / N) * N)))
    return build("reducer", name, **given), int(stated)


def krum(U: Tensor, w: Tensor) -> Tensor:
    chosen = build("weigher", "krum", f=3)(cohort(U), ServerState(torch.zeros(COLUMNS)))
    return build("reducer", "mean")(U, chosen)


def worst(rule: Rule, honest: Tensor, hostile: int, tries: int = 250, seed: int = 0) -> float:
    """The largest distance from the honest mean that a search over hostile rows finds, over the honest radius.

    It starts from rows at many distances in a few directions (copies, and spread out), and goes on by changing the best
    ones a little: their distance, their direction, one of them, one column.
    """
    generator = torch.Generator().manual_seed(seed)
    centre = honest.double().mean(0)
    radius = float((honest.double() - centre).norm(dim=1).max())
    w = torch.ones(len(honest) + hostile, dtype=torch.float64)

    def off(bad: Tensor) -> float:
        U = torch.cat([honest, bad])
        if not bool(torch.isfinite(U).all()):
            return -1.0
        return float((rule(U, w).double() - centre).norm()) / radius

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    starts = []
    for size in (0.3, 1.0, 2.0, 5.0, 1e3, 1e12, 1e30):
        copies = draw(1, COLUMNS).sign().expand(hostile, -1)
        starts += [
            copies * size * radius,
            draw(hostile, COLUMNS) * size * radius,
            draw(1, COLUMNS).expand(hostile, -1) * size,
        ]
    starts += [honest[:1].expand(hostile, -1) * size for size in (-1.0, -3.0, 3.0)]
    best = max((start + centre.float() for start in starts), key=off)
    most = off(best)
    for number in range(tries):
        step = 10 ** float(torch.empty(()).uniform_(-3, 0.5, generator=generator))
        tried = best.clone()
        match number % 4:
            case 0:
                tried = centre + (tried - centre) * (1 + step * float(draw(1)))
            case 1:
                tried += step * radius * draw(1, COLUMNS)
            case 2:
                tried[int(torch.randint(hostile, (1,), generator=generator))] += step * radius * draw(COLUMNS)
            case _:
                tried[:, int(torch.randint(COLUMNS, (1,), generator=generator))] += step * radius * float(draw(1))
        tried = tried.float()
        if (found := off(tried)) > most:
            best, most = tried, found
    return most


def bound(hostile: int, n: int = N) -> float:
    """Of the honest radius: 2 (n - f) / (n - 2 f), as the public law has it (Minsker 2015)."""
    return 2 * (n - hostile) / (n - 2 * hostile)


@pytest.mark.parametrize("name", ROBUST)
def test_no_rows_that_a_search_finds_pull_a_rule_beyond_its_radius(name: str) -> None:
    rule, stated = rule_of(name)
    for seed in range(3):
        honest = rows(N - stated, COLUMNS, seed=seed)
        assert worst(rule, honest, stated, seed=seed) <= bound(stated) + 1e-4


@pytest.mark.parametrize("name", ROBUST)
def test_beyond_what_a_rule_can_stand_a_counter_example_is_found(name: str) -> None:
    """Rules may stand more rows than they state, but none stands a majority; those that trim stand not one more."""
    rule, stated = rule_of(name)
    broken = next(h for h in range(stated + 1, N) if worst(rule, rows(N - h, COLUMNS), h, tries=60) > 1e3)
    assert stated < broken <= N // 2 + 1
    if name in ("trimmed_mean", "weighted_trimmed_mean"):
        assert broken == stated + 1


def test_the_mean_stands_none() -> None:
    assert worst(build("reducer", "mean"), rows(N - 1, COLUMNS), 1, tries=1) > 1e3


def test_krum_picks_an_honest_row_or_one_as_near_while_hostile_rows_are_few() -> None:
    honest = rows(12, COLUMNS)
    assert worst(krum, honest, 3) <= bound(3) + 1  # type: ignore[arg-type]
    assert worst(krum, rows(7, COLUMNS), 8, tries=60) > 1e3  # type: ignore[arg-type]
