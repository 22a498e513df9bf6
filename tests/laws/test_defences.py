"""The defences and attacks against their definitions, written out slowly."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedkeel.core.errors import CohortError
from fedkeel.core.keys import Key
from fedkeel.core.registry import build
from fedkeel.core.types import ServerState
from fedkeel.kernels import distance, neighbours, order
from fedkeel.testing import cohort

KEY = Key.root(4)


pytestmark = pytest.mark.usefixtures("kernels")


def random_rows(n: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * n + columns + seed)
    return torch.randn(columns, generator=generator) + torch.randn(n, columns, generator=generator)


def ones(n: int) -> Tensor:
    return torch.ones(n, dtype=torch.float64)


def windows(x: list[float], keep: int) -> float:
    """The window of `keep` sorted values nearest to their median, moved on while that is strictly nearer."""
    x = sorted(x)
    n = len(x)
    middle = x[n // 2] if n % 2 else (x[n // 2 - 1] + x[n // 2]) / 2
    at = 0
    while at < n - keep and middle - x[at] > x[at + keep] - middle:
        at += 1
    return sum(x[at : at + keep]) / keep


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.data())
def test_the_mean_around_the_median_is_that_of_the_nearest_values(n: int, data: st.DataObject) -> None:
    keep = data.draw(st.integers(1, n))
    columns = data.draw(st.lists(st.lists(st.integers(-6, 6), min_size=n, max_size=n), min_size=1, max_size=5))
    U = torch.tensor(columns, dtype=torch.float32).T.contiguous()
    found = order.mean_around_median(U, keep)
    np.testing.assert_allclose(found.numpy(), [windows(list(map(float, c)), keep) for c in columns], rtol=1e-6)


def test_the_mean_around_the_median_of_many_rows_and_of_rows_with_nan() -> None:
    U = random_rows(150, 40)
    found = order.mean_around_median(U, 100)
    np.testing.assert_allclose(found, [windows(c.tolist(), 100) for c in U.double().T], rtol=1e-5, atol=1e-6)
    for n in (5, 20, 150):
        U = random_rows(n, 40)
        U[2, 7] = math.nan
        assert torch.equal(order.mean_around_median(U, n - 2).isnan(), torch.arange(40) == 7)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 9), st.integers(0, 4), st.integers(0, 10_000))
def test_the_subset_of_least_diameter_is_the_least(n: int, f: int, seed: int) -> None:
    f = min(f, (n - 1) // 2)
    points = torch.randint(0, 4, (n, 2), generator=torch.Generator().manual_seed(seed)).double()
    D = torch.cdist(points, points).square()
    chosen = neighbours.least_diameter(D, f)
    assert len(set(chosen)) == n - f
    best = min(float(D[list(s)][:, list(s)].max()) for s in itertools.combinations(range(n), n - f))
    assert float(D[chosen][:, chosen].max()) == best


def test_the_subset_of_least_diameter_is_found_among_many_rows() -> None:
    U = random_rows(50, 200)
    U[[4, 9, 17, 30, 41, 42, 43, 44, 45, 46]] += 5
    found = neighbours.least_diameter(distance.sq_distances(U), 10)
    assert not {4, 9, 17, 30, 41, 42, 43, 44, 45, 46} & set(found)


def slow_krum(D: np.ndarray, left: list[int], f: int) -> int:
    """The row of the least score, of two with the same the one nearer to all."""
    if len(left) <= 2:
        return min(left, key=lambda i: D[i].sum())
    near = max(len(left) - f - 2, 1)
    scores = {i: sum(sorted(D[i, j] for j in left if j != i)[:near]) for i in left}
    return min(left, key=lambda i: (scores[i], D[i].sum()))


@pytest.mark.parametrize(("n", "f"), [(7, 1), (11, 2), (15, 3), (23, 5)])
def test_bulyan_is_krum_again_and_again_and_then_the_mean_around_the_median(n: int, f: int) -> None:
    U = random_rows(n, 30)
    left, chosen = list(range(n)), []
    D = distance.sq_distances(U).numpy()
    for _ in range(n - 2 * f):
        chosen.append(slow_krum(D, left, f))
        left.remove(chosen[-1])
    wanted = [windows(U[chosen, j].tolist(), n - 4 * f) for j in range(30)]
    np.testing.assert_allclose(build("reducer", "bulyan", f=f)(U, ones(n)), wanted, rtol=1e-5, atol=1e-6)


def test_centered_clip_is_its_formula() -> None:
    U = random_rows(12, 50)
    w = torch.linspace(1, 2, 12, dtype=torch.float64)
    shares = w / w.sum()
    D = torch.cdist(U.double(), U.double())
    for radius in (None, 1.5, 1e9):
        ranked = [sorted(zip(row.tolist(), shares.tolist(), strict=True)) for row in D]
        v = U[int(np.argmin([weighted_median(pairs) for pairs in ranked]))].double()
        for _ in range(3):
            away = (U.double() - v).norm(dim=1)
            limit = radius or weighted_median(sorted(zip(away.tolist(), shares.tolist(), strict=True)))
            v = v + ((shares * (limit / away.clamp(min=1e-30)).clamp(max=1))[:, None] * (U.double() - v)).sum(0)
        found = build("reducer", "centered_clip", radius=radius)(U, w)
        torch.testing.assert_close(found.double(), v, rtol=1e-5, atol=1e-5)
        if radius == 1e9:
            torch.testing.assert_close(v, shares @ U.double())


def weighted_median(pairs: list[tuple[float, float]]) -> float:
    total = 0.0
    for value, share in pairs:
        total += share
        if total > 0.5:
            return value
    raise AssertionError


def test_caf_is_its_definition() -> None:
    U = random_rows(14, 40)
    U[[3, 8]] += 4
    c, best, least = ones(14), None, math.inf
    while float(c.sum()) > 14 - 2 * 3:
        mean = (c @ U.double()) / c.sum()
        gaps = U.double() - mean
        values, vectors = torch.linalg.eigh((gaps.T * c) @ gaps / c.sum())
        if float(values[-1]) < least:
            least, best = float(values[-1]), mean
        along = torch.where(c > 0, (gaps @ vectors[:, -1]).square(), 0.0)
        c = c * (1 - along / along.max())
    assert best is not None
    torch.testing.assert_close(build("reducer", "caf", f=3)(U, ones(14)).double(), best, rtol=1e-5, atol=1e-5)


def test_nearest_neighbour_mixing_is_its_definition() -> None:
    U, f = random_rows(11, 20), 3
    V, v = build("mixer", "nnm", f=f)(U, ones(11), KEY)
    D = torch.cdist(U.double(), U.double())
    wanted = torch.stack([U[D[i].argsort()[: 11 - f]].mean(0) for i in range(11)])
    torch.testing.assert_close(V, wanted, rtol=1e-5, atol=1e-5)
    assert v.tolist() == [1.0] * 11


def test_bucketing_draws_from_its_key_alone() -> None:
    U, rule = random_rows(10, 5), build("mixer", "bucketing", size=3)
    first, again, other = (rule(U, ones(10), key)[0] for key in (KEY, KEY, KEY.fold(1)))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len(first) == 4


def test_arc_clips_as_many_rows_as_it_says() -> None:
    U, f = random_rows(20, 30), 4
    V, _ = build("mixer", "arc", f=f)(U, ones(20), KEY)
    lengths = U.norm(dim=1).sort(descending=True).values
    cut = 2 * f * (20 - f) // 20
    assert int((V != U).any(1).sum()) == cut == 6
    torch.testing.assert_close(V.norm(dim=1), U.norm(dim=1).clamp(max=float(lengths[cut])))


@pytest.mark.parametrize("f", [0, 1, 4])
def test_dnc_refuses_what_lies_far_along_the_main_direction(f: int) -> None:
    U = random_rows(20, 100)
    bad = [2, 7, 11, 19][:f]
    U[bad] += 3 * torch.randn(100, generator=torch.Generator().manual_seed(1)).sign()
    found = build("screen", "dnc", f=f)(cohort(U), ServerState(torch.zeros(100)))
    assert sorted(found) == bad


def benign_of(U: Tensor, bad: list[int]) -> Tensor:
    return U[[i for i in range(len(U)) if i not in bad]].double()


@pytest.mark.parametrize("direction", ["std", "unit", "sign"])
def test_min_max_and_min_sum_go_exactly_as_far_as_they_may(direction: str) -> None:
    bad = [0, 5]
    U = random_rows(12, 40)
    benign = benign_of(U, bad)
    D = torch.cdist(benign, benign).square()
    keys = [KEY.fold(i) for i in bad]
    row = build("attack", "min_max", direction=direction)(U, torch.tensor(bad), keys)[0].double()
    assert float((benign - row).square().sum(1).max()) == pytest.approx(float(D.max()), rel=1e-4)
    row = build("attack", "min_sum", direction=direction)(U, torch.tensor(bad), keys)[0].double()
    assert float((benign - row).square().sum()) == pytest.approx(float(D.sum(1).max()), rel=1e-4)
    assert direction == "std" or float((row - benign.mean(0)) @ benign.mean(0)) < 0


def test_fang_lies_beyond_the_benign_rows_on_the_wrong_side() -> None:
    bad = [1, 2, 3]
    U = random_rows(10, 200)
    benign = benign_of(U, bad)
    rows = build("attack", "fang")(U, torch.tensor(bad), [KEY.fold(i) for i in bad]).double()
    up = benign.mean(0) > 0
    assert bool((rows[:, up] <= benign.amin(0)[up] + 1e-6).all())
    assert bool((rows[:, ~up] >= benign.amax(0)[~up] - 1e-6).all())
    assert not torch.equal(rows[0], rows[1])


def test_the_other_attacks_send_what_they_say() -> None:
    bad = [0, 4]
    U, at, keys = random_rows(8, 30), torch.tensor(bad), [KEY.fold(i) for i in bad]
    benign = benign_of(U, bad)
    torch.testing.assert_close(build("attack", "ipm", scale=0.5)(U, at, keys)[1].double(), -0.5 * benign.mean(0))
    assert any(torch.equal(build("attack", "mimic")(U, at, keys)[0].double(), row) for row in benign)
    assert not build("attack", "free_rider")(U, at, keys).any()
    assert float(build("attack", "free_rider", std=2.0)(U, at, keys).std()) == pytest.approx(2, rel=0.3)
    replaced = U.clone()
    replaced[bad] = build("attack", "replacement")(U, at, keys)
    torch.testing.assert_close(replaced[bad].mean(0) * 2 / 8, U[bad].mean(0))
    torch.testing.assert_close(build("attack", "sybil")(U, at, keys), -U[bad].mean(0).expand(2, -1))


def test_a_row_of_alternating_giants_does_not_slip_through_the_cosine_screen() -> None:
    U = 1 + 0.1 * torch.randn(20, 4000, generator=torch.Generator().manual_seed(0))
    giant = torch.full((4000,), 3e38)
    giant[::2] = giant[1::40] = -3e38
    U[5] = giant
    found = build("screen", "cosine")(cohort(U), ServerState(torch.zeros(4000)))
    assert set(found) == {5}
    assert found[5][1] == pytest.approx(-0.05, abs=0.01)


@pytest.mark.parametrize("far", [1e3, 1e12, 1e30])
def test_the_geometric_median_is_where_most_of_the_weight_lies(far: float) -> None:
    U = torch.zeros(49, 10)
    U[26:] = torch.randn(23, 10, generator=torch.Generator().manual_seed(0))
    U[-1] = far
    assert not build("reducer", "geometric_median")(U, ones(49)).any()


@pytest.mark.parametrize(("n", "f"), [(5, 1), (8, 1), (10, 2), (20, 4)])
@pytest.mark.parametrize("name", ["mda", "centered_clip", "bulyan", "caf"])
def test_the_order_of_rows_does_not_matter_where_choices_tie(name: str, n: int, f: int) -> None:
    if name == "bulyan" and n < 4 * f + 3:
        pytest.skip("too few rows")
    rule = build("reducer", name) if name == "centered_clip" else build("reducer", name, f=f)
    U = random_rows(n, 50)
    expected = rule(U, ones(n))
    for seed in range(40):
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(rule(U[order], ones(n)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_is_not_finite_spoils_its_bucket_alone(bad: float) -> None:
    U = random_rows(10, 5)
    U[3] = bad
    V, _ = build("mixer", "bucketing", size=2)(U, ones(10), KEY)
    assert int(torch.isfinite(V).all(1).sum()) == 4


def test_fednova_is_normalised_averaging_with_tau_eff() -> None:
    """Wang et al. 2020, equation 10, on the parameters; buffers are averaged as they are."""
    U, tau, w = (
        random_rows(4, 6),
        torch.tensor([1.0, 4.0, 9.0, 0.0], dtype=torch.float64),
        torch.tensor([2.0, 1.0, 1.0, 0.0]).double(),
    )
    V, v = build("mixer", "fednova")(U, w, KEY, tau, slice(0, 4))
    p = (w / w.sum())[:3]
    wanted = (p @ tau[:3]) * ((p / tau[:3]) @ U[:3, :4].double())
    torch.testing.assert_close(v @ V.double()[:, :4] / v.sum(), wanted)
    torch.testing.assert_close(V[:3, 4:], U[:3, 4:])
    same, _ = build("mixer", "fednova")(U, w, KEY, torch.full((4,), 7.0), slice(0, 4))
    assert same is U
    with pytest.raises(CohortError, match="row of 0 steps"):
        build("mixer", "fednova")(U, torch.ones(4, dtype=torch.float64), KEY, tau, slice(0, 4))
