"""Laws of mechanisms: what they promise is what is done."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from fedkeel.core.registry import Rule
from fedkeel.core.types import Claims, Mechanism
from fedkeel.round.privacy import Noiser, Privacy
from fedkeel.testing.harness import KEY, hold, law

_COLUMNS = 20_000


def _promise(rule: Rule) -> Privacy:
    mechanism: Mechanism = rule()
    mechanism = replace(mechanism, noise=mechanism.noise or 1.0)
    return Privacy(mechanism, "uses", 10, 10, 50, 500, 1e-5, secret=KEY)


@law("mechanism")
def says_where_and_how_much(rule: Rule) -> None:
    found = rule()
    hold(isinstance(found, Mechanism), f"it gives {type(found).__name__}, not a Mechanism")
    hold(found.place in ("server", "client", "step"), f"there is no place '{found.place}'")
    hold(0 < found.norm < math.inf and (found.noise is None or 0 < found.noise < math.inf), f"it gives {found}")
    hold(found.bands >= 1 and (found.quantile is None or 0 < found.quantile < 1), f"it gives {found}")
    hold(found == rule(), "called again it says something else")


@law("mechanism")
def no_row_moves_a_sum_by_more_than_the_norm(rule: Rule) -> None:
    promise, claims = _promise(rule), Claims("c", 0, 0, "", 1, 1)
    if not promise.central:
        return
    for length in (1e-30, 0.5, 1.0, 3.0, 1e30):
        row = torch.randn(64, generator=KEY.torch()) * (length * promise.mechanism.norm / 8)
        sums = []
        for rows in ([], [row]):
            noiser = Noiser(promise, {})
            for one in rows:
                noiser.add(one, 1.0, claims)
            sums.append(noiser.release(64, 50, 0).direction.double() * 50)
        moved = float((sums[1] - sums[0]).norm())  # released in float32, beside noise
        hold(moved <= promise.mechanism.norm * (1 + 1e-4), f"a row of norm {float(row.norm()):g} moved it by {moved:g}")


@law("mechanism")
def adds_the_noise_that_is_accounted_for(rule: Rule) -> None:
    promise = _promise(rule)
    if not promise.central:
        return
    released = Noiser(promise, {}).release(_COLUMNS, 50, 0).direction.double() * 50
    deviation, least = float(released.std()), promise.noise * promise.mechanism.norm
    hold(deviation > least * (1 - 5 / math.sqrt(2 * _COLUMNS)), f"deviation {deviation:g}, accounted for are {least:g}")
