"""Weighers against slow oracles, and Krum's traps."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedkeel.core.errors import CohortError, InputError
from fedkeel.core.registry import build, parse
from fedkeel.core.types import ServerState
from fedkeel.testing import cohort, rows

STATE = ServerState(torch.zeros(1))


def krum_scores(U: np.ndarray, f: int) -> np.ndarray:
    n = len(U)
    return np.array(
        [sum(sorted(((U[j] - U[i]) ** 2).sum() for j in range(n) if j != i)[: n - f - 2]) for i in range(n)]
    )


@pytest.mark.parametrize(("n", "f"), [(3, 0), (5, 1), (9, 3), (20, 4)])
def test_krum_takes_the_row_of_the_least_sum_of_n_minus_f_minus_2_distances(n: int, f: int) -> None:
    for seed in range(20):
        U = rows(n, 3, seed)
        scores = krum_scores(U.double().numpy(), f)
        chosen = build("weigher", "krum", f=f)(cohort(U), STATE)
        assert scores[int(chosen.argmax())] == pytest.approx(scores.min())
        for m in {1, 2, n - f, n}:
            chosen = build("weigher", "multi_krum", f=f, m=m)(cohort(U), STATE)
            assert int(chosen.sum()) == m
            assert scores[chosen.numpy() > 0].max() <= np.sort(scores)[m - 1] * (1 + 1e-9)


def test_multi_krum_keeps_n_minus_f_rows_and_none_of_the_outliers() -> None:
    U = rows(20, 50)
    bad = [0, 5, 11, 19]
    U[bad] = torch.tensor([1e38, -1e38, 30.0, 1e6])[:, None]
    chosen = build("weigher", "multi_krum", f=4)(cohort(U), STATE)
    assert torch.nonzero(chosen == 0).flatten().tolist() == bad
    assert int(build("weigher", "krum", f=4)(cohort(U), STATE).argmax()) not in bad


def test_krum_counts_n_minus_f_minus_2_neighbours_and_not_one_more() -> None:
    """Trap: five rows on a line, f = 1, so two neighbours each. One or three of them would choose another row."""
    U = torch.tensor([[0.0], [1.0], [1.1], [3.0], [3.3]])
    chosen = {k: int(krum_scores(U.double().numpy(), 5 - 2 - k).argmin()) for k in (1, 2, 3)}
    assert len({chosen[1], chosen[2]}) == 2 or len({chosen[2], chosen[3]}) == 2
    assert int(build("weigher", "krum", f=1)(cohort(U), STATE).argmax()) == chosen[2]


def test_krum_is_right_when_rows_share_a_huge_offset() -> None:
    """Trap: with an uncentred float32 Gram matrix distances come out negative, and an outlier ranks best."""
    generator = torch.Generator().manual_seed(1)
    U = 3e3 * torch.randn(4000, generator=generator) + 0.02 * torch.randn(9, 4000, generator=generator)
    U[6] += 0.03
    wanted = krum_scores(U.double().numpy(), 2)
    assert int(wanted.argmax()) == 6
    assert int(build("weigher", "krum", f=2)(cohort(U), STATE).argmax()) == int(wanted.argmin())
    assert float(build("weigher", "multi_krum", f=2, m=8)(cohort(U), STATE)[6]) == 0


def test_ties_go_to_the_client_whose_id_sorts_first_in_any_order() -> None:
    U = rows(1, 8).expand(7, -1)
    for order in ([0, 1, 2, 3, 4, 5, 6], [6, 2, 0, 5, 1, 3, 4]):
        assert order[int(build("weigher", "krum", f=2)(cohort(U, order), STATE).argmax())] == 0
        kept = build("weigher", "multi_krum", f=2, m=3)(cohort(U, order), STATE)
        assert sorted(order[i] for i in torch.nonzero(kept).flatten().tolist()) == [0, 1, 2]


def test_a_nan_row_is_never_chosen() -> None:
    """Trap: argmin over scores picks NaN."""
    U = rows(7, 10)
    U[0], U[6] = torch.nan, torch.inf
    assert int(build("weigher", "krum", f=2)(cohort(U), STATE).argmax()) not in (0, 6)
    with pytest.raises(CohortError, match="not finite"):
        build("weigher", "multi_krum", f=2, m=6)(cohort(U), STATE)
    U[1:3] = torch.nan
    with pytest.raises(CohortError, match="not finite"):
        build("weigher", "krum", f=2)(cohort(U), STATE)


def test_krum_measures_buffers_too() -> None:
    """What no distance looks at is where an attack would go: parameters at the mean, running statistics at -1e6."""
    U = rows(7, 13)
    U[0, :10] = U[1:, :10].mean(0)
    U[0, 10:] = -1e6
    assert build("weigher", "krum", f=2)(replace(cohort(U), params=slice(0, 10)), STATE)[0] == 0


def test_what_krum_needs_is_said_before_a_round() -> None:
    assert build("weigher", "krum", f=4).needs == 11
    assert build("weigher", "multi_krum", f=4).needs == 11
    assert build("weigher", "multi_krum", f=0, m=8).needs == 8
    with pytest.raises(CohortError, match="needs 5 rows, not 4"):
        build("weigher", "krum", f=1)(cohort(rows(4, 3)), STATE)
    with pytest.raises(InputError, match="'f' = -1"):
        build("weigher", "krum", f=-1)


def test_claimed_examples_are_capped() -> None:
    """Trap: weights are the client's own claim and unbounded."""
    members = cohort(rows(4, 3))
    members.num_examples[2] = 2.0**53
    assert build("weigher", "examples", cap=15)(members, STATE).tolist() == [10, 15, 15, 15]
    free = build("weigher", "examples")(members, STATE)
    assert free.tolist() == [10, 20, 2.0**53, 40]
    free[0] = 7
    assert float(members.num_examples[0]) == 10
    assert build("weigher", "equal")(members, STATE).tolist() == [1, 1, 1, 1]


def test_device_share_splits_a_groups_share_among_those_who_came() -> None:
    given = replace(cohort(rows(5, 3)), client=("phone-1", "watch-1", "phone-2", "phone-3", "toaster"))
    w = parse("weigher", "device_share(shares={'phone-*': 0.6, 'watch-*': 0.4})")(given, ServerState(torch.zeros(3)))
    torch.testing.assert_close(w, torch.tensor([0.2, 0.4, 0.2, 0.2, 0.0], dtype=torch.float64))
    with pytest.raises(InputError, match="shares"):
        parse("weigher", "device_share(shares={'phone-*': -1.0})")
