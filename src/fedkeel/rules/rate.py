"""Rates: `(round, rounds) -> factor` of the clients' learning rate, over the rounds of a federation (from 1)."""

from __future__ import annotations

import math
from typing import Annotated

from annotated_types import Ge
from pydantic import Field

from fedkeel.core.registry import rule

Factor = Annotated[float, Field(gt=0, le=1)]


@rule("rate")
def constant(round: int, rounds: int) -> float:
    """The same learning rate in every round."""
    return 1.0


@rule("rate")
def exponential(round: int, rounds: int, *, factor: Factor = 0.5, every: Annotated[int, Ge(1)] = 10) -> float:
    """Times `factor` after every so many rounds: 0.998 after each of them is common (Reddi et al. 2021, appendix D)."""
    return factor ** ((round - 1) // every)


@rule("rate")
def cosine(round: int, rounds: int, *, least: Factor = 0.01) -> float:
    """From 1 down to `least` in the last round, along half a cosine (Loshchilov & Hutter 2017, equation 5)."""
    through = (round - 1) / max(1, rounds - 1)
    return least + (1 - least) * (1 + math.cos(math.pi * min(1.0, through))) / 2
