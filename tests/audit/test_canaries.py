"""Canaries in a Gaussian mechanism as a server uses it: a sound one passes, three broken ones are caught."""

from __future__ import annotations

import pytest
import torch
from dp_accounting.gaussian_mechanism import get_epsilon_gaussian
from scipy import stats

from fedkeel.audit import bounds, canaries
from fedkeel.core.keys import Key

DELTA, CLIP = 1e-5, 0.5


def mechanism(sigma, seed=0, *, clips=True, same=False, expected=20):
    """Clip, sum, Gaussian noise of sigma times the clip, divide by the expected number; each fault on its own."""
    generator = Key.root(seed).torch()

    def release(rows):
        if same:
            generator.manual_seed(7)
        length = rows.norm(dim=1, keepdim=True)
        kept = rows * (CLIP / length).clamp(max=1) if clips else rows
        return (kept.sum(0) + sigma * CLIP * torch.randn(rows.shape[1], generator=generator)) / expected

    return release


def honest(columns, n=20):
    return torch.randn(n, columns, generator=Key.root(5).torch())


def audited(release, *, trials=300, columns=40, norm=CLIP, key=0, **options):
    return canaries.in_trials(
        release, honest(columns), norm=norm, delta=DELTA, key=Key.root(key), trials=trials, **options
    )


def test_canaries_are_units_along_directions_of_their_own():
    rows = canaries.directions(50, 20_000, Key.root(0))
    gram = rows @ rows.T
    assert torch.allclose(gram.diagonal(), torch.ones(50), atol=1e-5)
    assert float((gram - torch.eye(50)).abs().max()) < 0.04
    assert torch.equal(rows, canaries.directions(50, 20_000, Key.root(0)))


def test_a_sound_mechanism_is_rarely_accused():
    sigma, tests = 2.0, 100
    truth = get_epsilon_gaussian(sigma, DELTA)
    for field in ("epsilon", "gaussian"):
        found = [
            getattr(audited(mechanism(sigma, seed), trials=60, key=seed).bounds[0], field) for seed in range(tests)
        ]
        above = sum(bound > truth for bound in found)
        assert stats.binomtest(above, tests, 0.05, alternative="greater").pvalue > 0.01, (field, above)


@pytest.mark.parametrize("sigma", [1.0, 2.0])
def test_the_bound_is_near_epsilon(sigma):
    truth = get_epsilon_gaussian(sigma, DELTA)
    found = audited(mechanism(sigma), trials=20_000, columns=4)
    assert 0.8 * truth < found.bounds[0].gaussian <= truth
    assert 0.3 * truth < found.bounds[0].epsilon <= truth
    assert found.bounds[1].gaussian < found.bounds[0].gaussian  # more confidence, less of a bound


def test_more_rounds_spend_more():
    sigma, rounds = 4.0, 16
    truth = get_epsilon_gaussian(sigma / rounds**0.5, DELTA)
    found = audited(mechanism(sigma), trials=2000, columns=4, rounds=rounds)
    assert 0.7 * truth < found.bounds[0].gaussian <= truth
    assert found.bounds[0].gaussian > get_epsilon_gaussian(sigma, DELTA)


def test_noise_at_half_of_what_is_claimed_is_caught():
    """In a thousand trials supposing that it is Gaussian, in a hundred thousand whatever it is."""
    claimed = get_epsilon_gaussian(2.0, DELTA)
    assert audited(mechanism(1.0), trials=1000).bounds[1].gaussian > claimed
    draws, many = Key.root(6).numpy(), 100_000
    scores = draws.normal(1, 1.0, many), draws.normal(0, 1.0, many)
    assert bounds.from_scores(*scores, DELTA, 0.99).epsilon > claimed
    assert audited(mechanism(2.0), trials=2000).bounds[1].gaussian < claimed


def test_noise_that_is_the_same_in_every_round_is_caught_without_a_word_on_its_kind():
    claimed = get_epsilon_gaussian(2.0, DELTA)
    assert audited(mechanism(2.0, same=True)).bounds[1].epsilon > claimed


def test_a_clip_that_is_forgotten_is_caught_by_a_canary_that_is_too_long():
    claimed = get_epsilon_gaussian(2.0, DELTA)
    assert audited(mechanism(2.0, clips=False), norm=20 * CLIP).bounds[1].epsilon > claimed
    assert audited(mechanism(2.0), norm=20 * CLIP).bounds[1].gaussian < claimed


def one_run(release, *, key=0, count=400, columns=20_000, **options):
    return canaries.in_one_run(
        release, honest(columns), norm=CLIP, delta=DELTA, key=Key.root(key), canaries=count, **options
    )


def test_one_run_of_a_sound_mechanism_is_rarely_accused():
    """Of 400 canaries there are so many guesses that little noise is refuted at once, and much never is."""
    sigma, tests = 8.0, 40
    truth = get_epsilon_gaussian(sigma, DELTA)
    above = sum(
        one_run(mechanism(sigma, s), key=s, count=200, columns=2000).bounds[0].epsilon > truth for s in range(tests)
    )
    assert stats.binomtest(above, tests, 0.05, alternative="greater").pvalue > 0.01


def test_one_run_estimates_epsilon_and_bounds_it_from_below():
    for sigma in (2.0, 4.0):
        truth = get_epsilon_gaussian(sigma, DELTA)
        found = one_run(mechanism(sigma), count=200, columns=100_000)
        assert found.estimate == pytest.approx(truth, rel=0.35)
        assert found.bounds[0].epsilon < truth
    strong = one_run(mechanism(0.5), count=200, columns=100_000)
    assert 1.0 < strong.bounds[0].epsilon < get_epsilon_gaussian(0.5, DELTA)


def test_one_run_catches_noise_that_was_forgotten():
    found = one_run(mechanism(0.0))
    assert found.bounds[1].epsilon > get_epsilon_gaussian(2.0, DELTA)
    assert found.correct == found.guesses


def test_results_are_the_seeds():
    first, second, other = (one_run(mechanism(1.0), key=k, count=50, columns=500) for k in (0, 0, 1))
    assert first == second != other
    assert audited(mechanism(1.0), trials=10) == audited(mechanism(1.0), trials=10)
