"""Mechanisms: where a federation adds the noise that hides a client, or an example. Contract: () -> Mechanism.

`norm` bounds what is hidden, in L2 over the parameter columns; `noise` is the standard deviation of the Gaussian noise
in units of it, on every column. Left out, it is as little as the job's `privacy.epsilon` allows.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from fedkeel.core.registry import rule
from fedkeel.core.types import Mechanism

Norm = Annotated[float, Field(ge=1e-9, le=1e9)]
Multiplier = Annotated[float, Field(gt=0, le=1e6)] | None


@rule("mechanism")
def central(*, norm: Norm, noise: Multiplier = None) -> Mechanism:
    """Hide clients from all who see the model: updates are clipped, the server adds noise to their sum, once a round.

    DP-FedAvg (McMahan et al. 2018, algorithm 1, the estimator with a fixed divisor). The server is trusted with the
    updates. The selector `poisson` makes the most of the noise, `uniform` less; any other counts each client's rounds.
    """
    return Mechanism("server", norm, noise)


@rule("mechanism")
def adaptive(
    *,
    norm: Norm = 0.1,
    noise: Multiplier = None,
    quantile: Annotated[float, Field(gt=0, lt=1)] = 0.5,
    rate: Annotated[float, Field(gt=0, le=10)] = 0.2,
) -> Mechanism:
    """As `central`, with a norm that moves to the quantile of the clients' norms, from `norm` on (Andrew et al. 2021).

    Each client tells whether its update was within the norm; the share of those who say so is noised as well, with a
    standard deviation of a twentieth of the cohort, for which the updates' own noise grows a little (theorem 1).
    """
    return Mechanism("server", norm, noise, quantile=quantile, rate=rate)


@rule("mechanism")
def ftrl(*, norm: Norm, noise: Multiplier = None, bands: Annotated[int, Field(ge=2, le=1000)] = 8) -> Mechanism:
    """As `central`, where nobody controls who takes part: the noise of `bands` rounds in a row cancels in part.

    Matrix factorisation (Denisov et al. 2022) by the banded square root of the prefix sums (Kalinin and Lampert 2024):
    what the model has learned so far carries less noise than independent noise would leave. A client rests for `bands`
    rounds after it took part. Who has the server's last `bands` - 1 noises, which checkpoints hold, can undo them.
    """
    return Mechanism("server", norm, noise, bands=bands)


@rule("mechanism")
def local(*, norm: Norm, noise: Multiplier = None) -> Mechanism:
    """Hide what a client learned from all, the server too: it clips its update and adds noise before it sends it.

    Any rule may follow, robust ones among them. Takes far more noise than `central`: each client's must do alone.
    """
    return Mechanism("client", norm, noise)


@rule("mechanism")
def examples(*, norm: Norm, noise: Multiplier = None) -> Mechanism:
    """Hide single examples from all, the server too: each step clips its examples' gradients and adds noise to the sum.

    DP-SGD (Abadi et al. 2016, algorithm 1), with batches drawn by Poisson's sampling from the client's examples.
    """
    return Mechanism("step", norm, noise)
