"""The kernels against slow oracles: a sort, and float64 arithmetic without tricks."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedkeel.core.keys import Key
from fedkeel.kernels import blocks, combine, distance, network, order

pytestmark = pytest.mark.usefixtures("kernels")


FLOATS = st.floats(-(2.0**126), 2.0**126, width=32)


def by_sorting(U: Tensor, trim: int) -> np.ndarray:
    ordered = np.sort(U.double().numpy(), axis=0)
    return ordered[trim : len(ordered) - trim].mean(0).astype(np.float32)


@pytest.mark.parametrize("n", range(1, 13))
def test_a_network_selects_for_every_input_of_zeros_and_ones(n: int) -> None:
    """The 0-1 principle: a network of minima and maxima right on {0, 1}^n is right on all inputs."""
    inputs = np.array(list(itertools.product((0, 1), repeat=n)), dtype=np.int8).T
    wanted = np.sort(inputs, axis=0)
    for trim in range((n + 1) // 2):
        plan = network.plan(n, trim)
        registers = [*inputs, *(np.zeros_like(inputs[0]) for _ in range(plan.scratch))]
        for is_max, a, b, out in plan.steps:
            assert out >= n, "a step would overwrite an input row"
            registers[out] = (np.maximum if is_max else np.minimum)(registers[a], registers[b])
        kept = np.sort([registers[k] for k in plan.kept], axis=0)
        np.testing.assert_array_equal(kept, wanted[trim : n - trim])


@pytest.mark.parametrize("n", [20, 33, 64, 100, 127])
def test_a_large_network_selects(n: int) -> None:
    values = np.random.default_rng(n).integers(0, 40, (n, 500))
    for trim in {0, 1, 2, 3, 7, n // 5, (n - 1) // 2}:
        plan = network.plan(n, trim)
        registers = [*values, *(np.zeros_like(values[0]) for _ in range(plan.scratch))]
        for is_max, a, b, out in plan.steps:
            registers[out] = (np.maximum if is_max else np.minimum)(registers[a], registers[b])
        kept = np.sort([registers[k] for k in plan.kept], axis=0)
        np.testing.assert_array_equal(kept, np.sort(values, axis=0)[trim : n - trim])


def test_networks_are_pruned() -> None:
    """Sorting 20 values by the pairwise network takes 194 minima and maxima; the median of 25 at best 174."""
    assert len(network.plan(20, 9).steps) <= 124
    assert len(network.plan(25, 12).steps) <= 182
    assert len(network.plan(20, 2).steps) <= 102
    assert len(network.plan(20, 4).steps) <= 132
    assert len(network.plan(20, 0).steps) == 0


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_a_trimmed_mean_is_that_of_sorting(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 30))
    trim = data.draw(st.integers(0, (n - 1) // 2))
    rows = data.draw(st.lists(st.lists(FLOATS, min_size=3, max_size=3), min_size=n, max_size=n))
    U = torch.tensor(rows, dtype=torch.float32)
    wanted = by_sorting(U, trim)
    bound = 1e-6 * np.abs(wanted) + 1e-14 * U.abs().amax(0).numpy() + 1e-45  # float64 sums in another order
    assert (np.abs(order.trimmed_mean(U, trim).numpy() - wanted) <= bound).all()


@pytest.mark.parametrize("n", [order.NETWORK_ROWS - 1, order.NETWORK_ROWS + 1])
def test_many_rows_go_either_way_with_one_result(n: int) -> None:
    U = torch.randn(n, 300, generator=torch.Generator().manual_seed(n))
    for trim in (0, 1, n // 5, (n - 1) // 2):
        np.testing.assert_allclose(order.trimmed_mean(U, trim).numpy(), by_sorting(U, trim), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("n", [1, 2, 7, 20, order.NETWORK_ROWS + 1])
def test_a_nan_in_any_place_comes_out_as_nan_in_its_column_alone(n: int) -> None:
    for trim in {0, min(1, (n - 1) // 2), (n - 1) // 2}:
        for at in {0, n // 2, n - 1}:
            U = torch.randn(n, 6, generator=torch.Generator().manual_seed(at))
            U[at, 2] = torch.nan
            assert torch.isnan(order.trimmed_mean(U, trim)).tolist() == [False, False, True, False, False, False]


def test_torch_rows_of_another_precision_take_the_device_path() -> None:
    for n in (21, order.NETWORK_ROWS + 2):
        U = torch.randn(n, 50, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
        found = order.trimmed_mean(U, 4)
        assert found.dtype == torch.bfloat16
        np.testing.assert_allclose(found.float().numpy(), by_sorting(U, 4), atol=0.02)
        U[3, 7] = torch.nan
        assert bool(order.trimmed_mean(U, 4)[7].isnan())


def test_rows_are_picked_without_the_others() -> None:
    U = torch.randn(9, 40_000, generator=torch.Generator().manual_seed(0))
    rows = [7, 1, 4]
    assert torch.equal(order.trimmed_mean(U, 1, rows), order.trimmed_mean(U[rows], 1))
    assert torch.equal(distance.sq_distances(U, rows), distance.sq_distances(U[rows]))
    with pytest.raises(ValueError, match="leave nothing"):
        order.trimmed_mean(U, 2, rows)


def test_the_result_does_not_depend_on_the_number_of_workers() -> None:
    U = torch.randn(20, 300_000, generator=torch.Generator().manual_seed(0))
    w = torch.rand(100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            V = U.reshape(100, -1)
            found.append(
                [order.trimmed_mean(U, 4), distance.sq_norms(U), distance.sq_distances(U), combine.weighted_sum(V, w)]
            )
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert torch.equal(other[0], found[0][0])
        for a, b in zip(other[1:], found[0][1:], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7)


def test_a_worker_that_fails_is_heard_and_threads_are_restored() -> None:
    before = torch.get_num_threads()

    def work(part: slice) -> None:
        raise RuntimeError(f"no {part.start}")

    with pytest.raises(RuntimeError, match="no 0"):
        blocks.partials(100, 10, work)
    assert torch.get_num_threads() == before


# -- norms and distances


def plainly(U: Tensor) -> np.ndarray:
    V = U.double().numpy()
    return np.array([[((a - b) ** 2).sum() for b in V] for a in V])


def assert_distances(U: Tensor) -> Tensor:
    D = distance.sq_distances(U)
    assert D.dtype == torch.float64
    assert torch.equal(D, D.T)
    assert bool((D.diagonal() == 0).all())
    np.testing.assert_allclose(D.numpy(), plainly(U), rtol=1e-6, atol=1e-300)
    return D


@given(st.data())
@settings(max_examples=80, deadline=None)
def test_norms_and_distances_are_those_of_float64(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 8))
    rows = data.draw(st.lists(st.lists(FLOATS, min_size=4, max_size=4), min_size=n, max_size=n))
    U = torch.tensor(rows, dtype=torch.float32)
    np.testing.assert_allclose(distance.sq_norms(U).numpy(), (U.double().numpy() ** 2).sum(1), rtol=1e-12)
    D = distance.sq_distances(U).numpy()
    wanted = plainly(U)
    np.testing.assert_allclose(D, wanted, rtol=1e-6, atol=1e-300)


def test_distances_across_blocks_of_columns() -> None:
    assert_distances(torch.randn(6, 150_001, generator=torch.Generator().manual_seed(3)))


def test_tiny_deviations_around_a_huge_common_vector() -> None:
    """Trap: an uncentred float32 Gram matrix gives negative distances here, and an outlier ranks best."""
    generator = torch.Generator().manual_seed(0)
    common = 1e4 * torch.randn(5000, generator=generator)
    U = common + 0.05 * torch.randn(7, 5000, generator=generator)
    squares = (U * U).sum(1)
    naive = squares[:, None] + squares[None] - 2 * U @ U.T
    off = ~torch.eye(7, dtype=torch.bool)
    wanted = torch.from_numpy(plainly(U))
    assert float(((naive - wanted).abs() / wanted)[off].max()) > 1
    assert_distances(U)


def test_one_row_of_1e38_does_not_drown_the_others() -> None:
    U = 1e-3 * torch.randn(9, 3000, generator=torch.Generator().manual_seed(0))
    U[4] = 1e38
    U[5] = -1e38
    D = assert_distances(U)
    assert bool(torch.isfinite(D).all())


def test_two_tight_groups_far_apart_and_twins() -> None:
    generator = torch.Generator().manual_seed(0)
    U = 1e-6 * torch.randn(10, 2000, generator=generator)
    U[:4] += 1e3 * torch.randn(2000, generator=generator)
    U[7] = U[8]
    D = assert_distances(U)
    assert float(D[7, 8]) == 0


def test_equal_rows_lie_at_distance_zero() -> None:
    D = distance.sq_distances(torch.full((5, 1000), 0.1))
    assert torch.equal(D, torch.zeros(5, 5, dtype=torch.float64))
    assert distance.sq_distances(torch.zeros(0, 3)).shape == (0, 0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_shows_and_disturbs_no_other_pair(value: float) -> None:
    U = torch.randn(6, 500, generator=torch.Generator().manual_seed(0))
    wanted = distance.sq_distances(U)
    U[2, 77] = value
    D = distance.sq_distances(U)
    rest = [0, 1, 3, 4, 5]
    torch.testing.assert_close(D[rest][:, rest], wanted[rest][:, rest])
    assert bool(torch.isnan(D[2, rest]).all())
    assert torch.isfinite(distance.sq_norms(U)).tolist() == [True, True, False, True, True, True]


# -- weighted sums


@pytest.mark.parametrize("n", [1, 31, 32, 33, 100, 100_000])
def test_a_weighted_sum_is_right_to_float32_for_any_number_of_rows(n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    U = torch.randn(n, 40, generator=generator) + 3
    w = torch.rand(n, dtype=torch.float64, generator=generator)
    w /= w.sum()
    wanted = w @ U.double()
    bound = 34 * 2**-24 * (w @ U.double().abs())
    assert bool(((combine.weighted_sum(U, w).double() - wanted).abs() <= bound).all())


def test_rows_with_coefficient_zero_count_for_nothing() -> None:
    U = torch.randn(40, 100, generator=torch.Generator().manual_seed(0))
    w = torch.ones(40, dtype=torch.float64)
    w[[3, 35]] = 0
    wanted = combine.weighted_sum(U[w > 0], w[w > 0])
    U[3], U[35] = torch.nan, torch.inf
    torch.testing.assert_close(combine.weighted_sum(U, w), wanted)
    assert torch.equal(combine.weighted_sum(U[:5], torch.zeros(5, dtype=torch.float64))[4:], torch.zeros(96))


@given(st.integers(1, 30_000), st.sampled_from([1e-38, 1e-12, 1.0, 1e15, 3e38]), st.integers(0, 99))
def test_the_quick_norm_is_the_exact_one_to_float32(columns, scale, seed):
    row = torch.randn(columns, generator=Key.root(seed).torch()).clamp(-1, 1) * scale
    exact = float(row.double().square().sum())
    assert distance.sq_norm(row) == pytest.approx(exact, rel=2e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("at", [0, 8191, 8192, 20_000])
def test_the_quick_norm_sees_what_is_not_finite(value, at):
    row = torch.zeros(20_001)
    row[at] = value
    assert not math.isfinite(distance.sq_norm(row))
    assert distance.sq_norm(torch.zeros(0)) == 0.0


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(2, 12),
    lengths=st.lists(st.sampled_from([1.0, 1.5, 3.0, 30.0, 1e6]), min_size=12, max_size=12),
    common=st.sampled_from([0.0, 1.0, 1e4]),
    seed=st.integers(0, 99),
)
def test_inner_products_about_a_row_are_right_with_and_without_the_distances(
    n: int, lengths: list[float], common: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    U = torch.randn(n, 300, generator=generator) * torch.tensor(lengths[:n])[:, None]
    U = U + common * torch.randn(300, generator=generator)
    D = distance.sq_distances(U)
    for origin in (0, n - 1):
        about = U.double() - U[origin].double()
        size = about.norm(dim=1)
        for given_distances in (None, D):
            found = distance.gram_about(U, origin, list(range(n)), given_distances)
            assert bool(((found - about @ about.T).abs() <= 1e-6 * size[:, None] * size[None, :] + 1e-30).all())
