"""Epsilons: dp-accounting's own, published ones, and what is found from the definition."""

from __future__ import annotations

import math

import dp_accounting as dp
import numpy as np
import pytest
from dp_accounting import pld, rdp
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from fedkeel.core.errors import InputError
from fedkeel.round.accountant import Fixed, Poisson, Uses, _curve, epsilon, interval, most, solve

ADD = dp.NeighboringRelation.ADD_OR_REMOVE_ONE
ONE = dp.NeighboringRelation.REPLACE_ONE
RUNS = [(0.01, 1.0, 100), (0.1, 0.7, 30), (0.004, 1.3, 3000), (1.0, 5.0, 10)]


@pytest.mark.parametrize(("rate", "noise", "count"), RUNS)
def test_renyi_divergences_are_those_of_dp_accounting(rate: float, noise: float, count: int) -> None:
    theirs = rdp.RdpAccountant(neighboring_relation=ADD)
    theirs.compose(dp.PoissonSampledDpEvent(rate, dp.GaussianDpEvent(noise)), count)
    assert epsilon({Poisson(rate, noise): count}, 1e-5, "rdp") == pytest.approx(theirs.get_epsilon(1e-5), abs=1e-6)


@pytest.mark.parametrize(("rate", "noise", "count"), RUNS)
def test_loss_distributions_are_those_of_dp_accounting(rate: float, noise: float, count: int) -> None:
    event = Poisson(rate, noise)
    ours = epsilon({event: count}, 1e-5)
    theirs = pld.PLDAccountant(ADD, value_discretization_interval=interval(event))
    theirs.compose(dp.PoissonSampledDpEvent(rate, dp.GaussianDpEvent(noise)), count)
    assert ours == pytest.approx(theirs.get_epsilon(1e-5), abs=1e-6)
    fine = pld.PLDAccountant(ADD, value_discretization_interval=interval(event) / 10)
    fine.compose(dp.PoissonSampledDpEvent(rate, dp.GaussianDpEvent(noise)), count)
    assert fine.get_epsilon(1e-5) - 1e-6 <= ours <= fine.get_epsilon(1e-5) * 1.001
    assert ours <= epsilon({event: count}, 1e-5, "rdp")


def test_sampling_without_replacement_is_that_of_dp_accounting_at_twice_the_norm() -> None:
    theirs = rdp.RdpAccountant(neighboring_relation=ONE)
    theirs.compose(dp.SampledWithoutReplacementDpEvent(1000, 20, dp.GaussianDpEvent(1.5)), 40)
    assert epsilon({Fixed(1000, 20, 3.0): 40}, 1e-5) == pytest.approx(theirs.get_epsilon(1e-5), abs=1e-6)


@pytest.mark.parametrize(
    ("batch", "noise", "epochs", "published"), [(256, 1.3, 15, 1.19), (256, 1.1, 60, 3.01), (256, 0.7, 45, 7.10)]
)
def test_the_epsilons_published_with_tensorflow_privacy(
    batch: int, noise: float, epochs: int, published: float
) -> None:
    """Of 60,000 examples at delta 1e-5, by the conversion of their time (Mironov 2017); today's gives a little less."""
    event, steps = Poisson(batch / 60_000, noise), epochs * 60_000 // batch
    orders, curve = _curve(event)
    of_their_time = min(steps * r + math.log(1e5) / (a - 1) for a, r in zip(orders, curve, strict=True) if a > 1)
    assert of_their_time == pytest.approx(published, abs=0.02)
    assert 0.7 * published < epsilon({event: steps}, 1e-5) < epsilon({event: steps}, 1e-5, "rdp") < published


def delta_of(noise: float, eps: float) -> float:
    """Balle and Wang 2018, theorem 8."""
    spread = 1 / noise
    return float(stats.norm.cdf(spread / 2 - eps / spread) - math.exp(eps) * stats.norm.cdf(-spread / 2 - eps / spread))


@given(st.floats(0.3, 20), st.integers(1, 50))
@settings(max_examples=40, deadline=None)
def test_uses_are_exact(noise: float, count: int) -> None:
    found = epsilon({Uses(noise): count}, 1e-5)
    assert delta_of(noise / math.sqrt(count), found) == pytest.approx(1e-5, rel=1e-3) or found == 0


def test_the_classical_formula_is_wrong_above_one_and_ours_is_not() -> None:
    noise = math.sqrt(2 * math.log(1.25e5)) / 50  # at a claimed epsilon of 50
    assert delta_of(noise, 50) > 0.5
    assert epsilon({Uses(noise): 1}, 1e-5) > 60


def test_one_sampled_release_by_the_definition() -> None:
    rate, noise = 0.2, 1.1
    found = epsilon({Poisson(rate, noise): 1}, 1e-4)

    def excess(swapped: bool) -> float:
        def density(x: float) -> float:
            without = stats.norm.pdf(x, 0, noise)
            of = (1 - rate) * without + rate * stats.norm.pdf(x, 1, noise)
            p, q = (without, of) if swapped else (of, without)
            return max(0.0, p - math.exp(found) * q)

        return float(integrate.quad(density, -12, 14, limit=500, epsabs=1e-12)[0])

    assert max(excess(False), excess(True)) == pytest.approx(1e-4, rel=0.01)


@given(st.floats(0.3, 40.0), st.sampled_from(["poisson", "fixed", "uses"]), st.sampled_from(["pld", "rdp"]))
@settings(max_examples=12, deadline=None)
def test_what_is_solved_for_is_within_the_target_and_close_to_it(target: float, kind: str, method: str) -> None:
    make = {
        "poisson": lambda z: {Poisson(0.05, z): 40},
        "fixed": lambda z: {Fixed(1000, 50, z): 40},
        "uses": lambda z: {Uses(z): 7},
    }[kind]
    noise = solve(make, target, 1e-5, method)  # type: ignore[arg-type]
    spent = epsilon(make(noise), 1e-5, method)  # type: ignore[arg-type]
    assert 0.998 * target <= spent <= target


def test_how_often_an_event_may_happen() -> None:
    event = Poisson(0.05, 1.0)
    count = most(lambda n: epsilon({event: n}, 1e-5), 3.0, 1000)
    assert epsilon({event: count}, 1e-5) <= 3.0 < epsilon({event: count + 1}, 1e-5)
    assert most(lambda n: epsilon({Uses(0.01): n}, 1e-5), 1.0, 50) == 0
    assert most(lambda n: epsilon({Uses(1000.0): n}, 1e-5), 1.0, 50) == 50


def test_nothing_spent_is_zero_and_no_noise_is_no_bound() -> None:
    assert epsilon({}, 1e-5) == epsilon({Uses(1.0): 0}, 1e-5) == 0.0
    assert epsilon({Uses(0.0): 1}, 1e-5) == math.inf


def test_neighbours_of_different_sorts_do_not_compose() -> None:
    with pytest.raises(InputError, match="without replacement composes with no other"):
        epsilon({Fixed(10, 2, 1.0): 1, Uses(1.0): 1}, 1e-5)


def test_epsilons_that_no_noise_keeps_are_said_to_be() -> None:
    with pytest.raises(InputError, match=r"privacy.epsilon = 1e-09 can not be kept"):
        solve(lambda z: {Poisson(1.0, z): 1000}, 1e-9, 1e-12)


def test_more_rounds_spend_more() -> None:
    spent = [epsilon({Poisson(0.1, 1.0): count}, 1e-5) for count in range(1, 30)]
    assert bool((np.diff(spent) > 0).all())
