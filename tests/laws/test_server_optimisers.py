"""Server optimisers against their formulas, unrolled."""

from __future__ import annotations

import torch

from fedkeel.core.registry import build
from fedkeel.testing import rows


def test_sgd_adds_the_aggregate() -> None:
    theta, d = rows(2, 100)
    torch.testing.assert_close(build("server_optimiser", "sgd")(theta, d, {})[0], theta + d)
    torch.testing.assert_close(build("server_optimiser", "sgd", lr=0.5)(theta, d, {})[0], theta + 0.5 * d)


def test_momentum_is_that_of_fedavgm_over_three_rounds() -> None:
    theta, *deltas = rows(4, 100)
    rule = build("server_optimiser", "momentum", lr=0.5, beta=0.8)
    s, at = rule.init(theta), theta
    for d in deltas:
        at, s = rule(at, d, s)
    a, b, c = deltas
    torch.testing.assert_close(s["v"], 0.64 * a + 0.8 * b + c)
    torch.testing.assert_close(at, theta + 0.5 * (a + (0.8 * a + b) + (0.64 * a + 0.8 * b + c)))


def test_momentum_without_beta_is_sgd() -> None:
    theta, d = rows(2, 100)
    rule = build("server_optimiser", "momentum", beta=0.0)
    after, _ = rule(theta, d, rule.init(theta))
    assert torch.equal(after, build("server_optimiser", "sgd")(theta, d, {})[0])
