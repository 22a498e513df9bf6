"""Bounds on epsilon from counts: they never claim more than their confidence allows, and are not far below."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from dp_accounting.dp_event import GaussianDpEvent
from dp_accounting.gaussian_mechanism import get_epsilon_gaussian
from dp_accounting.pld import PLDAccountant
from scipy import stats

from fedkeel.audit import bounds
from fedkeel.core.keys import Key


def test_clopper_pearson_is_the_interval_of_the_tables():
    low, high = bounds.clopper_pearson(3, 20)
    assert (low, high) == (pytest.approx(0.03207, abs=1e-5), pytest.approx(0.37893, abs=1e-5))
    assert bounds.clopper_pearson(0, 10) == (0.0, pytest.approx(1 - 0.025 ** (1 / 10)))
    assert bounds.clopper_pearson(10, 10)[1] == 1.0
    assert bounds.clopper_pearson(0, 0) == (0.0, 1.0)


def test_the_most_that_trials_can_show_is_what_they_are_worth():
    """A perfect distinguisher of 1,000 trials a side: log((1 - u) / u), u the upper limit of 0 in 1,000."""
    limit = 1 - 0.025 ** (1 / 1000)
    found = bounds.from_counts(bounds.Counts(1000, 1000, 0, 1000), 0.0)
    assert found.epsilon == pytest.approx(math.log((1 - limit) / limit))
    assert found.epsilon == pytest.approx(5.60, abs=0.01)
    assert bounds.from_counts(bounds.Counts(500, 1000, 500, 1000), 0.0).epsilon == 0.0
    assert bounds.from_counts(bounds.Counts(0, 0, 0, 0), 1e-5).epsilon == 0.0


@pytest.mark.parametrize("sigma", [0.6, 1.0, 2.5, 8.0])
def test_epsilon_of_a_gaussian_agrees_with_the_accountants(sigma):
    for delta in (1e-3, 1e-5, 1e-8):
        found = bounds.gaussian_epsilon(1 / sigma, delta)
        assert found == pytest.approx(get_epsilon_gaussian(sigma, delta), rel=1e-6)
        assert found == pytest.approx(PLDAccountant().compose(GaussianDpEvent(sigma)).get_epsilon(delta), rel=1e-3)


def test_one_run_without_delta_is_a_binomial_tail():
    """All of 100 right: e^eps / (1 + e^eps) to the 100th is the p-value, so the bound at 95% is known."""
    chance = 0.05 ** (1 / 100)
    assert bounds.one_run(100, 100, 100, 0.0) == pytest.approx(math.log(chance / (1 - chance)), rel=1e-6)
    assert bounds.one_run_p(100, 100, 100, 1.0, 0.0) == pytest.approx((math.e / (1 + math.e)) ** 100)
    assert bounds.one_run(100, 100, 50, 0.0) == 0.0
    assert bounds.one_run_p(100, 40, 0, 1.0, 1e-5) == 1.0


def test_one_run_with_delta_is_the_theorem_written_out():
    canaries, guesses, correct, epsilon, delta = 60, 40, 33, 0.9, 1e-3
    chance = math.exp(epsilon) / (1 + math.exp(epsilon))

    def tail(v):
        return sum(math.comb(guesses, k) * chance**k * (1 - chance) ** (guesses - k) for k in range(max(v, 0), 41))

    slack = max((tail(correct - i) - tail(correct)) / i for i in range(1, canaries + 1))
    expected = tail(correct) + 2 * canaries * delta * slack
    assert bounds.one_run_p(canaries, guesses, correct, epsilon, delta) == pytest.approx(expected, rel=1e-9)


def test_more_delta_more_confidence_and_worse_guesses_all_lower_the_bound():
    for found in (
        [bounds.one_run(1000, 500, 450, delta) for delta in (0.0, 1e-6, 1e-5, 1e-4)],
        [bounds.one_run(1000, 500, 450, 1e-5, c) for c in (0.9, 0.95, 0.99)],
        [bounds.one_run(1000, 500, correct, 1e-5) for correct in (480, 450, 400, 300)],
        [bounds.from_counts(bounds.Counts(800, 1000, 50, 1000), d).epsilon for d in (0.0, 1e-2, 1e-1)],
        [bounds.from_counts(bounds.Counts(800, 1000, 50, 1000), 0.0, c).epsilon for c in (0.9, 0.95, 0.99)],
    ):
        assert all(before > after for before, after in pairwise(found))


def _not_too_often(above: int, tests: int, confidence: float) -> None:
    assert stats.binomtest(above, tests, 1 - confidence, alternative="greater").pvalue > 0.01, (above, tests)


@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_randomised_response_is_rarely_said_to_be_less_private_than_it_is(confidence):
    """Where the bounds have no slack: every test of randomised response is as good as its epsilon lets it be."""
    epsilon, tests, draws = 1.0, 400, Key.root(1).numpy()
    truth = 1 / (1 + math.exp(-epsilon))
    by_counts = by_scores = by_run = 0
    for _ in range(tests):
        inside, outside = draws.random(400) < truth, draws.random(400) > truth
        counts = bounds.Counts(int(inside.sum()), 400, int(outside.sum()), 400)
        by_counts += bounds.from_counts(counts, 0.0, confidence).epsilon > epsilon
        by_scores += bounds.from_scores(inside, outside, 0.0, confidence).epsilon > epsilon
        by_run += bounds.one_run(400, 400, int(draws.binomial(400, truth)), 0.0, confidence) > epsilon
    for above in (by_counts, by_scores, by_run):
        _not_too_often(above, tests, confidence)
    assert by_run > tests * (1 - confidence) / 4  # and there it has no slack indeed


@pytest.mark.parametrize("sigma", [1.0, 3.0])
def test_a_gaussian_is_rarely_said_to_be_less_private_than_it_is(sigma):
    tests, delta, draws = 400, 1e-5, Key.root(2).numpy()
    truth = get_epsilon_gaussian(sigma, delta)
    found = [bounds.from_scores(draws.normal(1, sigma, 300), draws.normal(0, sigma, 300), delta) for _ in range(tests)]
    _not_too_often(sum(b.epsilon > truth for b in found), tests, 0.95)
    _not_too_often(sum(b.gaussian > truth for b in found), tests, 0.95)


@pytest.mark.parametrize("sigma", [1.0, 2.0, 3.7])
def test_with_enough_trials_the_bounds_are_near(sigma):
    """Epsilon 4.4, 2.0 and 1.0 at 1e-5: without a word on the noise at least 60%, of Gaussian noise at least 95%."""
    trials, delta, draws = 2_000_000, 1e-5, Key.root(3).numpy()
    truth = get_epsilon_gaussian(sigma, delta)
    found = bounds.from_scores(draws.normal(1, sigma, trials), draws.normal(0, sigma, trials), delta)
    assert 0.6 * truth < found.epsilon <= truth
    assert 0.95 * truth < found.gaussian <= truth
