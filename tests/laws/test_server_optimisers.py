"""Server optimisers against their formulas, unrolled."""

from __future__ import annotations

import pytest
import torch

from fedkeel.core.registry import build
from fedkeel.testing import rows


def test_sgd_adds_the_aggregate() -> None:
    theta, d = rows(2, 100)
    torch.testing.assert_close(build("server_optimiser", "sgd")(theta, d, {}, 1.0)[0], theta + d)
    torch.testing.assert_close(build("server_optimiser", "sgd", lr=0.5)(theta, d, {}, 1.0)[0], theta + 0.5 * d)


def test_momentum_is_that_of_fedavgm_over_three_rounds() -> None:
    theta, *deltas = rows(4, 100)
    rule = build("server_optimiser", "momentum", lr=0.5, beta=0.8)
    s, at = rule.init(theta), theta
    for d in deltas:
        at, s = rule(at, d, s, 1.0)
    a, b, c = deltas
    torch.testing.assert_close(s["v"], 0.64 * a + 0.8 * b + c)
    torch.testing.assert_close(at, theta + 0.5 * (a + (0.8 * a + b) + (0.64 * a + 0.8 * b + c)))


def test_momentum_without_beta_is_sgd() -> None:
    theta, d = rows(2, 100)
    rule = build("server_optimiser", "momentum", beta=0.0)
    after, _ = rule(theta, d, rule.init(theta), 1.0)
    assert torch.equal(after, build("server_optimiser", "sgd")(theta, d, {}, 1.0)[0])


def test_averaged_momentum_is_momentum_at_another_rate() -> None:
    theta, *deltas = rows(4, 100)
    one, other = (
        build("server_optimiser", "averaged_momentum", beta=0.8),
        build("server_optimiser", "momentum", lr=0.2, beta=0.8),
    )
    a, b, s, r = theta, theta, one.init(theta), other.init(theta)
    for d in deltas:
        (a, s), (b, r) = one(a, d, s, 1.0), other(b, d, r, 1.0)
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(s["v"], 0.2 * (0.64 * deltas[0] + 0.8 * deltas[1] + deltas[2]))


@pytest.mark.parametrize("name", ["adagrad", "yogi", "adam"])
def test_adaptive_optimisers_follow_algorithm_2_of_reddi_et_al(name: str) -> None:
    """Written out in float64: no bias correction, v from tau^2, tau outside the root."""
    theta, *deltas = (row.double() for row in rows(6, 100))
    beta1, beta2, tau, lr = (0.0 if name == "adagrad" else 0.9), 0.99, 1e-3, 0.05
    rule = build("server_optimiser", name, lr=lr)
    at, s = theta, rule.init(theta)
    x, m, v = theta.clone(), torch.zeros_like(theta), torch.full_like(theta, tau**2)
    for d in deltas:
        at, s = rule(at, d, s, 0.3)
        m = beta1 * m + (1 - beta1) * d
        match name:
            case "adagrad":
                v = v + d * d
            case "yogi":
                v = v - (1 - beta2) * d * d * torch.sign(v - d * d)
            case _:
                v = beta2 * v + (1 - beta2) * d * d
        x = x + lr * m / (v.sqrt() + tau)
    torch.testing.assert_close(at, x, rtol=1e-10, atol=1e-12)
    assert bool((s["v"] > 0).all())


def test_feddyn_counts_the_share_of_clients() -> None:
    theta, d = rows(2, 100)
    rule = build("server_optimiser", "feddyn", alpha=0.5)
    after, s = rule(theta, d, rule.init(theta), 0.2)
    torch.testing.assert_close(s["h"], -0.5 * 0.2 * d)
    torch.testing.assert_close(after, theta + d + 0.2 * d)
