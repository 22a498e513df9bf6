"""Trust, duplicates, forecasts and the weights that the server's own examples teach: what each is for, seen to hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from itertools import permutations

import numpy as np
import pytest
import torch
from torch import Tensor

from fedkeel import build
from fedkeel.core.errors import CohortError, InputError
from fedkeel.core.keys import Key
from fedkeel.core.types import Cohort, Judged, ServerState
from fedkeel.kernels import sketch
from fedkeel.testing import cohort, rows
from fedkeel.testing.harness import Bowl, asked


def helpful(n: int, columns: int = 60) -> Tensor:
    """Rows that lead from theta = 0 to the referee's optimum, 1 in every column, each with its own noise."""
    return 0.5 + 0.3 * rows(n, columns, seed=7).sub(rows(1, columns, seed=8))


@pytest.mark.parametrize("hostile", [2, 8])
@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_learned_weights_leave_out_rows_that_point_the_other_way(hostile: int, scale: float) -> None:
    U = helpful(20)
    U[:hostile] *= -scale
    w = asked(build("weigher", "learned", memory=0.0), cohort(U))
    assert float(w[:hostile].sum()) < 1e-6
    assert int((w > 0).sum()) >= 10  # keep = 0.5: none has more than a tenth
    assert float((w / w.sum()).max()) < 0.11  # rows that are left out last leave theirs to the others


def test_learned_weights_beat_equal_ones_on_the_servers_examples() -> None:
    U = helpful(20)
    U[:5] = rows(5, 60, seed=3)
    given = cohort(U)
    w = asked(build("weigher", "learned", memory=0.0), given)
    assert given.referee is not None
    learned, equal = given.referee.judge([(w / w.sum()).float() @ U, U.mean(0)]).loss.tolist()
    assert learned < equal


def test_learned_weights_step_only_where_what_is_applied_is_no_worse() -> None:
    """Four rows tempt the mean: they alone lead to the optimum. What the plan makes of them is another thing."""
    U = torch.cat([0.05 * helpful(16), torch.ones(4, 60)])
    asked_for: list[float] = []

    def reduce(given: Cohort, w: Tensor) -> Tensor:
        share = float(w[16:].sum() / w.sum())
        asked_for.append(share)
        return (-3.0 if share > 0.25 else 1.0) * ((w / w.sum()).float() @ U)

    tempted = asked(build("weigher", "learned", memory=0.0), cohort(U))
    held = asked(build("weigher", "learned", memory=0.0), dataclasses.replace(cohort(U), reduce=reduce))
    assert float(tempted[16:].sum() / tempted.sum()) > 0.35
    assert max(asked_for) > 0.25
    assert float(held[16:].sum() / held.sum()) <= 0.25


def test_what_leaves_the_plan_too_few_rows_is_no_step() -> None:
    U = helpful(9)
    given = cohort(U)
    equal = torch.ones(9, dtype=torch.float64)

    refused: list[int] = []

    def reduce(given: Cohort, w: Tensor) -> Tensor:
        if int((w > 0).sum()) < 9:
            refused.append(int((w > 0).sum()))
            raise CohortError("too few rows")
        return dataclasses.replace(given, reduce=None).reduced(w)

    w = asked(build("weigher", "learned", memory=0.0, keep=0.2), dataclasses.replace(given, reduce=reduce))
    assert refused
    assert float(w.sum()) == pytest.approx(1)
    assert torch.allclose(given.reduced(equal), U.mean(0), atol=1e-6)


def test_learned_weights_remember() -> None:
    U = helpful(20)
    U[0] *= -1
    rule, state, kept = build("weigher", "learned", memory=0.5), ServerState(torch.zeros(60)), {}
    trusts = []
    for _ in range(4):
        _, kept = rule(cohort(U), state, kept)
        trusts.append(float(kept["client-0000"]))
    assert trusts == sorted(trusts, reverse=True)
    assert trusts[0] < 0.6
    assert trusts[-1] < 0.1
    U[0] = 1.0  # it mends its ways: the very row that is wanted
    _, kept = rule(cohort(U), state, kept)
    assert float(kept["client-0000"]) > trusts[-1]


def test_a_cap_of_all_rows_is_equal_weights() -> None:
    w = asked(build("weigher", "learned", keep=1.0), cohort(helpful(9)))
    assert torch.allclose(w / w.sum(), torch.full((9,), 1 / 9, dtype=torch.float64))


@pytest.mark.parametrize("name", ["learned", "fltrust", "trust"])
def test_a_row_that_is_not_finite_weighs_nothing(name: str) -> None:
    U = helpful(8)
    U[2], U[5] = torch.nan, torch.inf
    w = asked(build("weigher", name), cohort(U))
    assert w[2] == w[5] == 0
    assert bool((w[[0, 1, 3, 4, 6, 7]] > 0).all())
    with pytest.raises(CohortError, match="finite"):
        asked(build("weigher", name), cohort(torch.full((3, 4), torch.nan)))


@pytest.mark.parametrize(("kind", "name"), [("weigher", "learned"), ("weigher", "fltrust"), ("screen", "loss_gain")])
def test_without_examples_of_its_own_a_server_can_not_ask(kind: str, name: str) -> None:
    given = dataclasses.replace(cohort(helpful(5)), referee=None)
    with pytest.raises(InputError, match="it has none: set"):
        asked(build(kind, name), given)


def test_fltrust_is_the_cosine_with_the_servers_own_update() -> None:
    U = torch.tensor([[2.0, 2.0], [3.0, 0.0], [-1.0, -1.0], [0.0, 0.0]])
    assert asked(build("weigher", "fltrust"), cohort(U)).tolist() == pytest.approx([1.0, 0.5**0.5, 0.0, 0.0])


def _with_labels(given: Cohort, labels: list[tuple[float, ...]]) -> Cohort:
    return dataclasses.replace(given, labels=tuple(labels))


def test_trust_is_gain_times_similarity_over_divergence_by_softmax() -> None:
    U = helpful(6)
    labels = [(0.5, 0.5), (0.9, 0.1), (0.5, 0.5), (0.4, 0.6), (0.2, 0.8), (0.5, 0.5)]
    given = _with_labels(cohort(U), labels)
    assert given.referee is not None
    good = given.referee.judge(U).accuracy.numpy()
    deviation = 1.4826 * np.median(abs(good - np.median(good)))
    low = max(good.min(), np.median(good) - 4 * deviation)
    gain = (good - low).clip(min=0) / (good.max() - low)
    median = np.median(U.double().numpy(), axis=0)
    cosine = (U.double().numpy() @ median) / np.linalg.norm(U.double().numpy(), axis=1) / np.linalg.norm(median)
    p = np.array(labels)
    divergence = (p * np.log(p / p.mean(0))).sum(1).clip(min=0.01)
    score = gain * cosine.clip(min=0) / divergence
    weights = np.exp(score / score.max() / 0.2)
    wanted = 0.25 * 1 + 0.75 * 6 * weights / weights.sum()
    assert asked(build("weigher", "trust", memory=0.25, floor=0.01), given).tolist() == pytest.approx(
        wanted.tolist(), rel=1e-4
    )


def test_trust_is_shared_out_over_the_cohort_not_client_by_client() -> None:
    w = asked(build("weigher", "trust", memory=0.0), cohort(helpful(7)))
    assert float(w.sum()) == pytest.approx(7)


def test_a_claim_never_raises_trust() -> None:
    """At the default floor: who claims the cohort's very mean, or more classes than there are, gains nothing by it."""
    U = helpful(8)
    silent = asked(build("weigher", "trust", memory=0.0), _with_labels(cohort(U), [()] * 8))
    for claim in ((0.5, 0.5), (1.0,), (0.2, 0.3, 0.5)):
        told = asked(build("weigher", "trust", memory=0.0), _with_labels(cohort(U), [claim, *[(0.3, 0.7)] * 7]))
        assert float(told[0]) <= float(silent[0]) * (1 + 1e-9)


def test_claims_that_are_no_shares_of_the_same_classes_count_as_none() -> None:
    given = _with_labels(cohort(helpful(3)), [(0.5, 0.5), (), (0.2, 0.3, 0.5)])
    assert bool(torch.isfinite(asked(build("weigher", "trust"), given)).all())


def _foolsgold(history: np.ndarray) -> np.ndarray:
    """Algorithm 1 of Fung et al. 2020, as its authors' code has it."""
    n = len(history)
    unit = history / np.linalg.norm(history, axis=1, keepdims=True)
    cs = unit @ unit.T - np.eye(n)
    maxcs = cs.max(1)
    for i in range(n):
        for j in range(n):
            if i != j and maxcs[i] < maxcs[j]:
                cs[i, j] *= maxcs[i] / maxcs[j]
    wv = np.clip(1 - cs.max(1), 0, 1)
    wv = wv / wv.max()
    wv[wv == 1] = 0.99
    with np.errstate(divide="ignore"):
        return np.clip(np.log(wv / (1 - wv)) + 0.5, 0, 1)


def test_foolsgold_is_its_authors_algorithm() -> None:
    generator = torch.Generator().manual_seed(3)
    U = torch.randn(9, 40, generator=generator) + 0.5 * torch.randn(40, generator=generator)
    U[5:8] = U[5] + 0.1 * torch.randn(3, 40, generator=generator)
    rule, state, kept = build("weigher", "foolsgold"), ServerState(torch.zeros(40)), {}
    total = np.zeros((9, 40))
    for _ in range(3):
        total += U.double().numpy()
        w, kept = rule(cohort(U), state, kept)
        assert w.tolist() == pytest.approx(_foolsgold(total).tolist(), abs=1e-6)
        U = U + 0.2 * torch.randn(9, 40, generator=generator)
    assert float(w[5:8].max()) < 0.2 < float(w[:5].min())


def test_foolsgold_spares_rows_that_are_opposed_and_ignores_rows_of_zero() -> None:
    U = torch.tensor([[1.0, 0.0], [-0.5, 0.8], [-0.5, -0.9]])
    assert asked(build("weigher", "foolsgold"), cohort(U)).tolist() == [1.0, 1.0, 1.0]
    U = torch.cat([rows(6, 50), torch.zeros(1, 50)])
    assert float(asked(build("weigher", "foolsgold"), cohort(U))[6]) == 0


def test_equal_norms_survive_a_row_that_is_all_but_zero() -> None:
    U = rows(6, 40)
    U[2] = 0
    U[2, 5] = 1e-43
    V, _ = build("mixer", "equal_norms")(U, torch.ones(6, dtype=torch.float64), Key.root(0))
    assert bool(torch.isfinite(V).all())
    assert float(V[2].norm()) == 0
    assert torch.allclose(V[[0, 1, 3, 4, 5]].norm(dim=1), V[0].norm().expand(5))


def test_exact_copies_are_seen_however_unequal_the_others_are() -> None:
    U = rows(20, 300) * torch.logspace(-0.5, 0.5, 20)[:, None]
    U[[3, 8, 11]] = U[15].clone()
    assert set(asked(build("screen", "near_duplicates"), cohort(U))) == {8, 11, 15}


def test_copies_count_once() -> None:
    U = rows(20, 300)
    U[[3, 8, 11]] = U[3] + 0.01 * rows(3, 300, seed=2)
    found = asked(build("screen", "near_duplicates"), cohort(U))
    assert set(found) == {8, 11}
    assert "client-0003" in found[8][0]


def test_rows_that_all_differ_alike_are_no_copies() -> None:
    for n in (4, 20, 60):
        assert asked(build("screen", "near_duplicates"), cohort(rows(n, 300))) == {}
    assert asked(build("screen", "near_duplicates"), cohort(torch.ones(9, 5))) == {}


def test_the_loss_after_a_row_gives_it_away() -> None:
    U = helpful(20)
    U[[2, 9]] *= -1
    U[4] = 1e30
    found = asked(build("screen", "loss_gain"), cohort(U))
    assert set(found) == {2, 9, 4}
    assert all(score < 0 for _, score in found.values())


def test_noise_of_an_honest_length_shows_in_the_variances_by_layer() -> None:
    U = rows(20, 300)
    U[:, 100:200] *= 10
    noise = rows(1, 300, seed=5)[0]
    U[6] = noise * U[0].norm() / noise.norm()
    assert set(asked(build("screen", "gradient_variance"), cohort(U))) == {6}


def test_a_client_that_turns_is_seen_by_its_past() -> None:
    rule, state, kept = build("screen", "forecast"), ServerState(torch.zeros(300)), {}
    own = 3 * rows(12, 300, seed=1)
    for r in range(3):
        found, kept = rule(cohort(own + rows(12, 300, seed=10 + r)), state, kept)
        assert found == {}
    turned = own + rows(12, 300, seed=20)
    turned[4] *= -3
    found, after = rule(cohort(turned), state, kept)
    assert set(found) == {4}
    assert torch.equal(after["client-0004"], kept["client-0004"])  # what is refused is not learned


def test_sketches_keep_cosines() -> None:
    U = rows(12, 100_000)
    kept = sketch.keyed({}, 5)
    short = sketch.sketch(U, kept)
    assert short.shape == (12, sketch.WIDTH)
    assert not torch.equal(short, sketch.sketch(U, sketch.keyed({}, 6)))
    assert torch.equal(short, sketch.sketch(U, sketch.keyed(kept, 6)))  # the first key is kept
    exact, found = (torch.corrcoef(V.double()) for V in (U, short))
    assert float((exact - found).abs().max()) < 6 / sketch.WIDTH**0.5
    few = rows(5, 700)
    assert torch.allclose(sketch.sketch(few, kept) @ sketch.sketch(few, kept).T, few.double() @ few.double().T)


def _exact_shapley(U: Tensor) -> list[float]:
    """By all orders, of the mean of those who came; the referee's loss."""
    referee, n = cohort(U).referee, len(U)
    assert referee is not None

    def worth(members: tuple[int, ...]) -> float:
        model = U[list(members)].mean(0) if members else torch.zeros(U.shape[1])
        return -float(referee.judge([model]).loss[0])

    values = [0.0] * n
    orders = list(permutations(range(n)))
    for order in orders:
        for place, i in enumerate(order):
            values[i] += worth(order[: place + 1]) - worth(order[:place])
    return [value / len(orders) for value in values]


def test_shapley_values_are_those_of_all_orders() -> None:
    U = helpful(5, 12)
    U[3] *= -1
    exact = _exact_shapley(U)
    found = build("contribution", "gtg_shapley", orders=2000, truncate=0.0)(
        cohort(U), torch.ones(5, dtype=torch.float64), ServerState(torch.zeros(12))
    )
    assert found.tolist() == pytest.approx(exact, abs=0.06 * max(map(abs, exact)))
    assert float(found.sum()) == pytest.approx(sum(exact), rel=1e-5)


def test_truncation_saves_passes_and_keeps_the_sum() -> None:
    class Counting(Bowl):
        asked = 0

        def judge(self, models: Iterable[Tensor]) -> Judged:
            models = list(models)
            Counting.asked += len(models)
            return super().judge(models)

    given = dataclasses.replace(cohort(helpful(12)), referee=Counting(60))
    cost, sums = [], []
    for truncate in (0.0, 0.2):
        Counting.asked = 0
        rule = build("contribution", "gtg_shapley", truncate=truncate)
        sums.append(float(rule(given, torch.ones(12, dtype=torch.float64), ServerState(torch.zeros(60))).sum()))
        cost.append(Counting.asked)
    assert cost[0] == 12 * 11 + 2
    assert cost[1] < cost[0] / 2
    assert sums[0] == pytest.approx(sums[1], rel=1e-5)
