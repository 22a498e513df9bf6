"""What a federation's noise has spent: epsilon at a delta, for the sampling that really happens, by dp-accounting.

Three ways to count, each right for its sampling and no other:
- Poisson: each client is drawn by itself at a rate that nobody sees. Neighbours differ by one client more or less.
  Privacy loss distributions (Koskela et al. 2020, Doroshenko et al. 2022), or Renyi DP (Mironov et al. 2019).
- Fixed: so many of those who are there, without replacement. Neighbours differ in the data of one client, so that a
  sum moves by up to twice the norm; Renyi DP (Wang, Balle and Kasiviswanathan 2019, theorem 27).
- Uses: nothing is claimed of who takes part. Each client's rounds are counted, and the client with most of them is what
  counts. Neighbours differ in whether one client's updates are zero, or, where each client's own update is noised, in
  what they are. Exact for Gaussian noise (Balle and Wang 2018, theorem 8).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np

from fedkeel.core.errors import InputError, needs_extra

Method = Literal["pld", "rdp"]
_MOST = 1e6  # noise multipliers that are looked at
_LEAST = 1e-3
_CLOSE = 1e-3  # to a target, relative
_TINY = 1e-12  # a delta below which privacy loss distributions, cut off at their ends, tell no epsilon


class Poisson(NamedTuple):
    """`steps` releases with Gaussian noise of a multiplier, each of a Poisson sample."""

    rate: float
    noise: float
    steps: int = 1


class Fixed(NamedTuple):
    """Releases of `chosen` of `among` clients, drawn without replacement; the multiplier is of the norm."""

    among: int
    chosen: int
    noise: float


class Uses(NamedTuple):
    """What one client takes part in; the multiplier is of how far a client can move the release."""

    noise: float


Event = Poisson | Fixed | Uses
Events = Mapping[Event, int]


def epsilon(events: Events, delta: float, method: Method = "pld") -> float:
    """What events, each so many times, come to at a delta: an upper bound, infinite where there is no noise.

    `method` is for Poisson's sampling; the others have one way each. Raises `InputError` for kinds that do not
    compose, as their neighbours are of different sorts.
    """
    events = {event: count for event, count in events.items() if count}
    if not events:
        return 0.0
    if len(kinds := {type(event) for event in events}) > 1 and Fixed in kinds:
        raise InputError("sampling without replacement composes with no other: use the selector poisson")
    if any(event.noise == 0 for event in events):
        return math.inf
    if kinds == {Uses}:
        return _gaussian(_together({event.noise: count for event, count in events.items()}), delta)
    if kinds == {Fixed} or method == "rdp":
        return _by_rdp(events, delta)
    try:
        return float(_composed(tuple(sorted(events.items(), key=repr))).get_epsilon_for_delta(delta))
    except MemoryError:
        raise InputError(
            f"privacy.accountant = 'pld' needs more memory than there is for {sum(events.values())} events as "
            f"{max(events, key=events.__getitem__)}: write 'rdp'"
        ) from None


def solve(events: Callable[[float], Events], target: float, delta: float, method: Method = "pld") -> float:
    """A noise multiplier whose events stay within a target epsilon, and the least to a thousandth of that epsilon."""

    def over(noise: float) -> float:
        """How far beyond the target, in logarithms; 0 or less is within it."""
        found = epsilon(events(noise), delta, method)
        return math.log(found / target) if found > 0 else -math.inf

    low = high = 1.0
    while over(high) > 0:
        low, high = high, 2 * high
        if high > _MOST:
            other = ", or write privacy.accountant = 'rdp'" if method == "pld" and delta < _TINY else ""
            raise InputError(
                f"privacy.epsilon = {target:g} can not be kept with any noise at privacy.delta = {delta:g}: raise one "
                f"of them{other}"
            )
    while low == high or over(low) <= 0:
        high, low = low, low / 2
        if low < _LEAST:
            return high
    above, below = over(low), over(high)
    while below < -_CLOSE:  # both logarithms together are nearly a line
        share = above / (above - below) if math.isfinite(above) and math.isfinite(below) else 0.5
        tried = low * (high / low) ** min(max(share * (1 + _CLOSE) + _CLOSE / 8, 0.05), 0.95)
        found = over(tried)
        if found > 0:
            low, above = tried, found
        else:
            high, below = tried, found
    return high


def most(spent: Callable[[int], float], target: float, limit: int) -> int:
    """How many rounds stay within a target epsilon, at most `limit`; `spent` is what so many come to."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if spent(middle) <= target else (low, middle - 1)
    return low


def _together(noises: Mapping[float, int]) -> float:
    """The multiplier of one release that tells as much as all of these."""
    return 1 / math.sqrt(math.fsum(count / noise**2 for noise, count in noises.items()))


@lru_cache(maxsize=4096)
def _gaussian(noise: float, delta: float) -> float:
    with needs_extra("privacy", "privacy accounting"):
        from dp_accounting.gaussian_mechanism import get_epsilon_gaussian
    with np.errstate(divide="ignore"):  # it looks at epsilons that are far too small, where the delta is 0
        return float(get_epsilon_gaussian(noise, delta))


def _by_rdp(events: Events, delta: float) -> float:
    with needs_extra("privacy", "privacy accounting"):
        from dp_accounting import rdp
    curves = [(_curve(event), count) for event, count in events.items()]
    orders = curves[0][0][0]
    total = [math.fsum(curve[1][i] * count for curve, count in curves) for i in range(len(orders))]
    with _quiet():
        return float(rdp.compute_epsilon(orders, total, delta)[0])


@lru_cache(maxsize=4096)
def _curve(event: Event) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(orders, Renyi divergences) of one event."""
    with needs_extra("privacy", "privacy accounting"):
        import dp_accounting as dp
        from dp_accounting import rdp
    relation, what = dp.NeighboringRelation.ADD_OR_REMOVE_ONE, _event(event)
    if isinstance(event, Fixed):
        relation = dp.NeighboringRelation.REPLACE_ONE
    with _quiet():
        accountant = rdp.RdpAccountant(neighboring_relation=relation)
        accountant.compose(what)
    return tuple(map(float, accountant._orders)), tuple(map(float, accountant._rdp))


def interval(event: Event) -> float:
    """How finely the losses of an event are told apart, rounded up: a fiftieth of their standard deviation.

    What that adds to epsilon is below a thousandth of it; dp-accounting's own 1e-4 adds more where losses are small,
    and takes a second a round where they are large.
    """
    rate = event.rate if isinstance(event, Poisson) else 1.0
    return min(max(rate * math.sqrt(math.expm1(min(1 / event.noise**2, 50.0))) / 50, 1e-6), 1e-2)


def _event(event: Event) -> Any:
    import dp_accounting as dp

    match event:
        case Poisson(rate, noise, steps):
            one = dp.PoissonSampledDpEvent(rate, dp.GaussianDpEvent(noise))
            return dp.SelfComposedDpEvent(one, steps)
        case Fixed(among, chosen, noise):
            return dp.SampledWithoutReplacementDpEvent(among, chosen, dp.GaussianDpEvent(noise / 2))
        case Uses(noise):
            return dp.GaussianDpEvent(noise)


@lru_cache(maxsize=64)
def _single(event: Event, fineness: float) -> Any:
    """The privacy loss distribution of an event."""
    with needs_extra("privacy", "privacy accounting"):
        from dp_accounting.pld import privacy_loss_distribution as pld
    rate = event.rate if isinstance(event, Poisson) else 1.0
    one = pld.from_gaussian_mechanism(event.noise, sampling_prob=rate, value_discretization_interval=fineness)
    return one.self_compose(event.steps) if isinstance(event, Poisson) and event.steps > 1 else one


@lru_cache(maxsize=8)
def _composed(events: tuple[tuple[Event, int], ...]) -> Any:
    found, fineness = None, min(interval(event) for event, _ in events)
    for event, count in events:
        one = _single(event, fineness)
        part = one.self_compose(count) if count > 1 else one
        found = part if found is None else found.compose(part)
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """dp-accounting says of each order that does not converge that it leaves it out: what is left is a bound."""
    log = logging.getLogger("absl")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)
