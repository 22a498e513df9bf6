"""Attacks do what their papers say, and move what they are meant to move."""

from __future__ import annotations

from statistics import NormalDist

import pytest
import torch

from fedkeel.core.keys import Key
from fedkeel.core.registry import build
from fedkeel.testing import rows

BAD = torch.tensor([1, 4, 6])
KEYS = [Key.root(3).fold(i) for i in range(3)]


def test_sign_flip_sends_its_own_row_turned_round() -> None:
    U = rows(9, 40)
    assert torch.equal(build("attack", "sign_flip")(U, BAD, KEYS), -U[BAD])
    assert torch.equal(build("attack", "sign_flip", scale=4.0)(U, BAD, KEYS), -4 * U[BAD])


def test_gaussian_noise_depends_on_the_key_alone() -> None:
    U, V = rows(9, 20_000), rows(9, 20_000, seed=1)
    noise = build("attack", "gaussian", std=5.0)(U, BAD, KEYS)
    assert torch.equal(build("attack", "gaussian", std=5.0)(V, BAD.flip(0), KEYS), noise)
    assert torch.equal(build("attack", "gaussian", std=5.0)(V, BAD[:1], KEYS[1:2])[0], noise[1])
    assert float(noise.std()) == pytest.approx(5.0, rel=0.02)
    assert float(noise.mean()) == pytest.approx(0.0, abs=0.1)


def test_nan_sends_nothing_else() -> None:
    assert bool(build("attack", "nan")(rows(9, 40), BAD, KEYS).isnan().all())


@pytest.mark.parametrize(("n", "f"), [(50, 24), (50, 10), (20, 4), (11, 3)])
def test_alie_sends_the_mean_less_z_max_deviations_of_the_benign_rows(n: int, f: int) -> None:
    """Baruch et al. 2019, algorithm 3: with n = 50 and f = 24, s = 2, so z_max = Phi^-1(24 / 26) = 1.43."""
    U = rows(n, 70_000 // n)
    benign = U[f:].double()
    s = n // 2 + 1 - f
    z = NormalDist().inv_cdf((n - f - s) / (n - f))
    if (n, f) == (50, 24):
        assert z == pytest.approx(1.426, abs=1e-3)
    wanted = benign.mean(0) - z * benign.var(0, correction=0).sqrt()
    found = build("attack", "alie")(U, torch.arange(f), KEYS)
    assert bool((found == found[0]).all())
    torch.testing.assert_close(found[0].double(), wanted, atol=1e-6, rtol=1e-6)
    U[:f] = 1e9
    assert torch.equal(build("attack", "alie")(U, torch.arange(f), KEYS), found), "their own rows must not count"


def test_alie_takes_the_z_it_is_given_and_stands_any_numbers() -> None:
    U = rows(9, 40)
    wanted = U[2:].mean(0) - 2.5 * U[2:].std(0, correction=0)
    torch.testing.assert_close(build("attack", "alie", z=2.5)(U, torch.arange(2), KEYS)[1], wanted, atol=1e-5, rtol=0)
    for n in range(1, 8):
        for f in range(n + 1):
            found = build("attack", "alie")(rows(n, 5), torch.arange(f), KEYS)
            assert found.shape == (f, 5)
            assert bool(found.isfinite().all())


def test_attacks_do_what_they_are_for() -> None:
    """The mean breaks; the median holds."""
    U = rows(9, 500)
    honest, w = U.mean(0), torch.ones(9, dtype=torch.float64)
    for attack in (build("attack", "sign_flip", scale=100.0), build("attack", "gaussian")):
        attacked = U.clone()
        attacked[BAD] = attack(U, BAD, KEYS)
        assert float((build("reducer", "mean")(attacked, w) - honest).norm()) > 10 * float(honest.norm())
        assert float((build("reducer", "median")(attacked, w) - honest).norm()) < 2 * float(honest.norm())


def test_inflated_counts_are_claims_that_a_message_can_hold() -> None:
    counts = torch.tensor([1, 600, 2**60])
    assert build("attack", "inflated_count", factor=50.0)(counts, KEYS).tolist() == [50, 30_000, 2**53]


def test_label_flip_is_its_own_inverse() -> None:
    x, y = torch.ones(10, 3), torch.arange(10)
    flip = build("attack", "label_flip")
    assert flip(x, y, 10, KEYS[0])[1].tolist() == list(range(9, -1, -1))
    assert torch.equal(flip(*flip(x, y, 10, KEYS[0]), 10, KEYS[0])[1], y)
