"""Reducers against slow oracles, and the traps of order and distance."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fedkeel.core.errors import CohortError, InputError
from fedkeel.core.registry import build
from fedkeel.testing import rows


def ones(n: int) -> Tensor:
    return torch.ones(n, dtype=torch.float64)


@pytest.mark.parametrize("n", [1, 2, 5, 20, 41])
def test_the_mean_is_that_of_numpy(n: int) -> None:
    U, w = rows(n, 1000), torch.linspace(1, 9, n, dtype=torch.float64)
    wanted = np.average(U.double().numpy(), axis=0, weights=w.numpy())
    np.testing.assert_allclose(build("reducer", "mean")(U, w).numpy(), wanted, atol=2e-6)


@pytest.mark.parametrize("n", [1, 2, 5, 20, 41])
def test_the_median_is_that_of_numpy(n: int) -> None:
    U = rows(n, 40_000)
    np.testing.assert_allclose(
        build("reducer", "median")(U, ones(n)).numpy(), np.median(U.double().numpy(), axis=0), rtol=1e-6, atol=1e-12
    )


def test_a_mean_of_huge_rows_and_huge_weights_does_not_overflow() -> None:
    U = torch.full((20, 3), 1e38)
    w = torch.full((20,), 2.0**1023, dtype=torch.float64)
    for name in ("mean", "median", "geometric_median"):
        torch.testing.assert_close(build("reducer", name)(U, w), U[0])
    torch.testing.assert_close(build("reducer", "trimmed_mean", trim=1)(U, w), U[0])


def geometric_median_by_gradient(U: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Weiszfeld in the full space, unsmoothed, from the mean: slow and plain."""
    z = np.average(U, axis=0, weights=w)
    for _ in range(5000):
        beta = w / np.maximum(np.linalg.norm(U - z, axis=1), 1e-12)
        z = beta @ U / beta.sum()
    return z


@pytest.mark.parametrize(("n", "columns"), [(3, 2), (7, 5), (20, 300)])
def test_the_geometric_median_is_that_of_weiszfeld_in_the_full_space(n: int, columns: int) -> None:
    U, w = rows(n, columns), torch.linspace(1, 2, n, dtype=torch.float64)
    wanted = geometric_median_by_gradient(U.double().numpy(), w.numpy())
    np.testing.assert_allclose(build("reducer", "geometric_median")(U, w).numpy(), wanted, atol=2e-5)


def test_the_geometric_median_is_a_row_that_has_most_of_the_weight() -> None:
    U, w = rows(5, 30), ones(5)
    w[2] = 4.5
    torch.testing.assert_close(build("reducer", "geometric_median")(U, w), U[2], atol=1e-4, rtol=0)


def test_the_geometric_median_keeps_its_precision_beside_rows_of_1e38() -> None:
    """A row far away pulls with its direction alone: where it stands on its ray must not matter."""
    U = rows(11, 200)
    results = []
    for length in (1e6, 1e20, 1e37):
        U[3], U[8] = length, -length
        U[8, ::3] = length
        results.append(build("reducer", "geometric_median")(U, ones(11)))
    torch.testing.assert_close(results[1], results[0], atol=1e-3, rtol=0)
    torch.testing.assert_close(results[2], results[1], atol=1e-4, rtol=0)


def test_the_geometric_median_is_bounded_by_its_steps() -> None:
    U = rows(9, 50)
    rough = build("reducer", "geometric_median", max_steps=1)(U, ones(9))
    fine = build("reducer", "geometric_median")(U, ones(9))

    def total(z: Tensor) -> float:
        return float((U.double() - z.double()).norm(dim=1).sum())

    assert total(fine) < total(rough) < total(U[0])


def test_one_nan_row_is_seen_in_every_reducer_and_chosen_by_none() -> None:
    """Trap: one NaN row turns a median into NaN; it must be refused before, and never pass as a finite value."""
    U = rows(7, 20)
    U[3] = torch.nan
    for name, parameters in (("mean", {}), ("median", {}), ("trimmed_mean", {"trim": 2})):
        assert bool(build("reducer", name, **parameters)(U, ones(7)).isnan().all())
    with pytest.raises(CohortError, match="not finite"):
        build("reducer", "geometric_median")(U, ones(7))
    w = ones(7)
    w[3] = 0
    for name, parameters in (("mean", {}), ("median", {}), ("trimmed_mean", {"trim": 2}), ("geometric_median", {})):
        assert bool(build("reducer", name, **parameters)(U, w).isfinite().all())


def test_bad_weights_and_shapes_are_refused_in_a_sentence() -> None:
    mean, U = build("reducer", "mean"), rows(3, 4)
    for value in (-1.0, torch.nan, torch.inf):
        with pytest.raises(InputError, match="finite weights of 0 or more"):
            mean(U, torch.tensor([1.0, value, 1.0], dtype=torch.float64))
    with pytest.raises(InputError, match=r"weights \(n,\)"):
        mean(U, ones(2))
    with pytest.raises(InputError, match=r"weights \(n,\)"):
        mean(U[0], ones(4))
    with pytest.raises(CohortError, match="needs 1 rows"):
        mean(U, 0 * ones(3))


def test_trim_is_checked_when_the_rule_is_built() -> None:
    """Trap: a misspelt or impossible parameter must not turn a robust rule into the plain mean."""
    for parameters in ({"trim": -1}, {"trim": 1.5}, {"trm": 1}, {}):
        with pytest.raises(InputError, match="trim"):
            build("reducer", "trimmed_mean", **parameters)
    assert build("reducer", "trimmed_mean", trim=3).needs == 7
