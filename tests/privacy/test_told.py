"""What clients tell beside their updates: losses and labels, with noise that epsilon counts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import dp_accounting as dp
import pytest
import torch
from dp_accounting.pld import PLDAccountant
from scipy import stats

import fedkeel
from fedkeel.core.keys import Key
from fedkeel.core.types import Claims, ClientMemory
from fedkeel.round import device
from fedkeel.round.privacy import Beside
from fedkeel.round.protect import protect
from fedkeel.ship import card
from fedkeel.world.federation import Federation

BASE: dict[str, Any] = {
    "name": "told",
    "rounds": 4,
    "data": {"clients": 20, "partition": "iid"},
    "model": {"build": "logistic"},
    "train": {"backend": "loop", "batch_size": 10, "workers": 1},
    "select": {"cohort": 10, "rule": "round_robin"},
    "aggregate": {"weigh": ("equal",)},
    "privacy": {"mechanism": "local(norm=0.5)", "epsilon": 20.0, "metrics_noise": 2.0, "metrics_bound": 4.0},
}


def job(**changes: Any) -> fedkeel.Job:
    values = {k: {**v} if isinstance(v, dict) else v for k, v in BASE.items()}
    for key, value in changes.items():
        values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) else value
    return fedkeel.Job(**values)


def told(of: Federation, metrics: dict[str, float], seed: int) -> dict[str, float]:
    claims = [Claims("client-0", 0, 0, of.layout.digest, 9, 5, metrics, (0.5, 0.5))]
    rows = torch.zeros(1, of.layout.columns)
    return dict(protect(rows, [Key(seed)], claims, ClientMemory(), of.plan, {})[1][0].metrics)


def test_epsilon_is_that_of_updates_and_losses_and_labels_together(tmp_path: Path) -> None:
    run = fedkeel.run(job(client={"labels": True, "label_noise": 4.0}), tmp_path / "run", with_report=False)
    promise = Federation.of(run.job).plan.privacy
    assert promise is not None
    uses = max(sum(row["client"] == name for row in run.updates) for name in {row["client"] for row in run.updates})
    assert uses == 2
    # Twice a Gaussian of noise / 2 (one client's update is exchanged), twice one of 2, and pure 2 / 4 for the labels.
    both = 1 / math.sqrt(uses / (promise.noise / 2) ** 2 + uses / 2.0**2)
    accountant = PLDAccountant(dp.NeighboringRelation.ADD_OR_REMOVE_ONE)
    accountant.compose(dp.GaussianDpEvent(both))
    epsilon = run.rounds[-1]["epsilon"]
    assert epsilon == pytest.approx(accountant.get_epsilon(1e-5) + 0.5, rel=2e-3)
    assert 0.99 * 20 < epsilon <= 20
    without = Federation.of(job(privacy={"metrics_noise": None, "metrics_bound": None})).plan.privacy
    assert without is not None
    assert without.noise < promise.noise  # what losses and labels take of the budget, updates do not have
    exact = PLDAccountant(dp.NeighboringRelation.ADD_OR_REMOVE_ONE)
    exact.compose(dp.GaussianDpEvent(both)).compose(dp.LaplaceDpEvent(2.0))
    assert exact.get_epsilon(1e-5) < epsilon  # that a pure epsilon adds up is a bound
    written = card.read(run.path / "model")[0].privacy
    assert written is not None
    assert "loss, cut to 4, noise 8; once the shares of labels, epsilon 0.5" in written.counts_on


@pytest.mark.parametrize("mechanism", ["local(norm=0.5)", "examples(norm=1.0)"])
def test_losses_carry_the_noise_that_is_counted_and_nothing_else_is_told(mechanism: str) -> None:
    of = Federation.of(job(privacy={"mechanism": mechanism, "insecure_reproducible_noise": True}))
    assert of.plan.privacy is not None
    assert of.plan.privacy.beside == Beside(("loss",), 4.0, 2.0)
    found = torch.tensor([told(of, {"loss": 3.0, "secret": 1.0}, seed)["loss"] for seed in range(400)])
    assert stats.kstest((found - 3.0) / 8.0, "norm").pvalue > 1e-3
    units = found.double() * 2**28  # a 2^30th of the bound
    assert torch.equal(units, units.round())
    assert told(of, {"loss": 3.0, "secret": 1.0}, 1).keys() == {"loss"}
    # Cut to the bound; one that is missing or no number is told as the bound, as its absence would tell.
    same = [told(of, metrics, 7) for metrics in ({"loss": 9.0}, {"loss": math.nan}, {}, {"loss": math.inf})]
    assert all(one == same[0] for one in same)
    assert told(of, {"loss": -5.0}, 7)["loss"] == pytest.approx(same[0]["loss"] - 4.0)


def test_three_losses_move_further_together_than_one() -> None:
    of = Federation.of(job(train={"validation": 0.2}))
    assert of.plan.privacy is not None
    assert of.plan.privacy.beside.names == ("loss", "global_loss", "local_loss")
    assert of.plan.privacy.beside.deviation == pytest.approx(2.0 * 4.0 * math.sqrt(3))


def test_noise_on_losses_is_not_the_seeds(tmp_path: Path) -> None:
    of = Federation.of(job())
    assert told(of, {"loss": 1.0}, 3) != told(of, {"loss": 1.0}, 3)


@pytest.mark.parametrize(("mechanism", "epsilon"), [("local(norm=0.5)", 0.5), ("examples(norm=1.0)", 0.25)])
def test_labels_cost_what_hides_a_client_or_an_example(mechanism: str, epsilon: float) -> None:
    of = Federation.of(job(privacy={"mechanism": mechanism}, client={"labels": True, "label_noise": 4.0}))
    assert of.plan.privacy is not None
    assert of.plan.privacy.beside.labels == epsilon
    assert of.plan.privacy.spent({}) == 0  # nothing was told yet


def test_noise_on_shares_is_laplace_on_a_grid_and_drawn_once() -> None:
    counts, drawn = torch.tensor([900, 100]), []
    for i in range(500):
        memory = ClientMemory()
        first = device.label_shares(f"c{i}", counts, 0.5, memory, whole=True)
        assert first == device.label_shares(f"c{i}", counts, 0.5, memory, whole=True)
        drawn.append(memory.of(f"c{i}")[device.LABEL_NOISE])
    noise = torch.cat(drawn)
    assert stats.kstest(noise / 0.5, "laplace").pvalue > 1e-3
    assert torch.equal(noise * 2**31, (noise * 2**31).round())


def test_a_budget_bounds_how_often_a_client_tells() -> None:
    sections = {"mechanism": "local(norm=0.5, noise=4.0)", "epsilon": 3.0, "metrics_noise": 8.0}
    of = Federation.of(job(privacy=sections, rounds=2))
    silent = Federation.of(job(privacy={**sections, "metrics_noise": None, "metrics_bound": None}, rounds=2))
    for federation in (of, silent):
        promise = federation.plan.privacy
        assert promise is not None
        most = promise.most_uses
        assert most is not None
        assert promise.after(most) <= 3.0
    assert of.plan.privacy.after(1) > silent.plan.privacy.after(1)


def test_under_masks_neighbours_differ_in_what_is_sent() -> None:
    """Whose absence would cost others their group's sum moves more than its own update by it."""
    sections = {
        "privacy": {"mechanism": "central(norm=0.5)", "metrics_noise": None, "metrics_bound": None},
        "select": {"rule": "poisson"},
    }
    masked, plain = Federation.of(job(**sections, secagg={"size": 4})), Federation.of(job(**sections))
    promises = [of.plan.privacy for of in (masked, plain)]
    assert all(promise is not None for promise in promises)
    words = [promise.in_words()["counts on"] for promise in promises if promise is not None]
    assert "neighbours differ in whether one client's updates are zero" in words[0]
    assert "neighbours differ by one client" in words[1]
