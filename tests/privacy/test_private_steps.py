"""Noise in steps, in whole federations: how it is counted, and what leaves a client."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import fedkeel
from fedkeel.core.errors import InputError
from fedkeel.core.keys import Key
from fedkeel.core.noise import Noise
from fedkeel.kernels import native
from fedkeel.kernels.normal import add_noise
from fedkeel.round.accountant import Poisson, epsilon
from fedkeel.world.federation import Federation


def job(**changes: Any) -> fedkeel.Job:
    values: dict[str, Any] = {
        "name": "steps",
        "rounds": 4,
        "data": {"clients": 10, "partition": "iid"},
        "model": {"build": "logistic"},
        "train": {"batch_size": 20, "lr": 0.5},
        "select": {"cohort": 5, "rule": "round_robin"},
        "aggregate": {"weigh": ("equal",)},
        "privacy": {"mechanism": "examples(norm=1.0)", "epsilon": 4.0},
    }
    for key, value in changes.items():
        values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) else value
    return fedkeel.Job(**values)


def test_each_examples_rounds_are_counted_by_its_clients(tmp_path: Path) -> None:
    done = fedkeel.run(job(), tmp_path / "run", with_report=False)
    plan = Federation.of(done.job).plan
    assert plan.privacy is not None
    least = min(row["num_examples"] for row in done.updates)
    assert plan.privacy.steps == (Poisson(20 / least, 1.0, -(-least // 20)),)
    event = plan.privacy.event()
    assert (event.noise, plan.privacy.uses) == (plan.privacy.noise, 2)
    spent = [row["epsilon"] for row in done.rounds]
    assert spent == pytest.approx([epsilon({event: k}, 1e-5) for k in (1, 1, 2, 2)])  # all have had one round, then two
    assert 3.9 < spent[-1] <= 4.0
    for row in done.updates:
        assert row["metrics"] == {}
        assert row["num_examples"] >= least  # how many there are is taken as known


def test_the_budget_holds_for_the_client_for_whom_it_is_hardest() -> None:
    federation = Federation.of(job(data={"partition": "dirichlet(alpha=0.3, min_examples=12)"}))
    privacy, size = federation.plan.privacy, 20
    assert privacy is not None
    for client in range(10):
        n = federation.data.count(client)
        event = Poisson(min(1.0, size / n), privacy.noise, -(-n // size))
        assert epsilon({event: privacy.uses}, 1e-5) <= 4.0


def test_who_has_too_few_examples_does_not_take_part(tmp_path: Path) -> None:
    few = {"partition": "dirichlet(alpha=0.3, min_examples=12)"}
    done = fedkeel.run(job(data=few, privacy={"least_examples": 100}), tmp_path / "run", with_report=False)
    left_out = {row["client"]: row["reason"] for row in done.updates if row["stage"] == "train"}
    assert left_out
    assert all("privacy.least_examples is 100" in reason for reason in left_out.values())
    assert all(row["num_examples"] >= 100 for row in done.updates if row["weight"])


def test_the_fewer_examples_the_more_noise() -> None:
    noises = [
        Federation.of(job(privacy={"least_examples": least})).plan.privacy.noise  # type: ignore[union-attr]
        for least in (30, 60, 120)
    ]
    assert noises == sorted(noises, reverse=True)
    assert noises[0] > 1.3 * noises[-1]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"train": {"stopping": "plateau(epsilon=0.1)"}}, "write epochs or steps"),
        ({"train": {"objective": "moon(mu=1.0)"}, "model": {"build": "mlp"}}, "write 'plain'"),
        ({"data": {"holdout": 0.2}}, "data.holdout = 0.2 has clients tell"),
        ({"privacy": {"mechanism": "central(norm=1.0)", "least_examples": 5}}, "is for noise in steps"),
        ({"train": {"backend": "rows"}}, "rows"),
    ],
)
def test_what_does_not_go_with_noise_in_steps_is_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        Federation.of(job(**changes)).trainer()


def test_known_noise_gives_the_same_run_on_every_backend(tmp_path: Path) -> None:
    ends = []
    for backend in ("loop", "traced", "auto"):
        known = job(train={"backend": backend}, privacy={"insecure_reproducible_noise": True})
        ends.append(fedkeel.run(known, tmp_path / backend, with_report=False).state.theta)
    assert float((ends[0] - ends[1]).abs().max()) < 1e-4
    assert float((ends[0] - ends[2]).abs().max()) < 1e-4


@pytest.mark.parametrize("compiled", [True, False])
def test_a_noised_step_lies_on_a_grid_whatever_the_gradient(compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(native, "library", lambda: "not here")
    scale, count = 0.37, 4096
    noise = Noise(Key(5)).normals(count)
    for x in (torch.zeros(count), torch.rand(count), torch.full((count,), 2.0**-30)):
        out = x.clone()
        add_noise(out, noise, scale, 1.0)
        units = out.double() * 2.0**22  # a 2^20th of the power of two below the scale, 2^-2
        assert torch.equal(units, units.round())
        assert float((out.double() - (x.double() + scale * noise)).abs().max()) <= 2.0**-23
    out = x.clone()
    add_noise(out, noise, 0.0, 0.5)
    assert torch.equal(out, x * 0.5)
