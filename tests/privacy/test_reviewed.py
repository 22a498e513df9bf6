"""Where a promise once did not hold: each of these spent, or told, more than was said."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import fedkeel
from fedkeel.core.errors import DecodeError, InputError
from fedkeel.core.keys import Key
from fedkeel.core.types import Claims, ClientMemory, InFlight, ServerState
from fedkeel.deploy import messages
from fedkeel.round.accountant import Poisson, epsilon
from fedkeel.round.privacy import Account
from fedkeel.round.protect import protect
from fedkeel.ship import card
from fedkeel.ship.ledger import Ledger
from fedkeel.world.federation import Federation
from fedkeel.world.record import rewound

BASE: dict[str, Any] = {
    "name": "reviewed",
    "rounds": 4,
    "data": {"clients": 20, "partition": "iid"},
    "model": {"build": "logistic"},
    "train": {"backend": "loop", "batch_size": 10, "workers": 1},
    "select": {"cohort": 10, "rule": "round_robin"},
    "aggregate": {"weigh": ("equal",)},
    "privacy": {"mechanism": "local(norm=0.5)", "epsilon": 20.0},
}


def job(**changes: Any) -> fedkeel.Job:
    values = {k: {**v} if isinstance(v, dict) else v for k, v in BASE.items()}
    for key, value in changes.items():
        values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) else value
    return fedkeel.Job(**values)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_is_not_finite_leaves_as_noise_and_nothing_else(bad: float) -> None:
    of = Federation.of(job(privacy={"mechanism": "local(norm=0.1, noise=100.0)", "epsilon": None}))
    row = torch.full((1, of.layout.columns), 3.0)
    row[0, 0] = bad
    claims = [Claims("client-0", 0, 0, of.layout.digest, 9, 5)]
    left, _ = protect(row, [Key(1)], claims, ClientMemory(), of.plan, {})
    assert bool(left.isfinite().all())
    assert not bool((left == row).any())
    assert abs(float(left.mean())) < 5 * 10 / math.sqrt(of.layout.columns)  # noise of 10 about 0


def test_a_node_takes_no_model_that_is_not_finite() -> None:
    of = Federation.of(job())
    theta = of.theta()
    theta[3] = math.inf
    record = messages.model_record(fedkeel.world.clients.Base(theta, {}))
    order = fedkeel.round.coordinator.Train("client-0", 0, 1, 0, None)
    with pytest.raises(DecodeError, match="no numbers"):
        messages.read_order(messages.order_content(order, record, {}), of.layout.columns)


def test_server_and_node_agree_on_privacy_or_do_not_work() -> None:
    ours = messages.agreement(Federation.of(job()))
    for change in (
        {"epsilon": 19.0},
        {"mechanism": "local(norm=0.5, noise=90.0)"},
        {"mechanism": None, "epsilon": None},
    ):
        theirs = messages.agreement(Federation.of(job(privacy=change)))
        assert "privacy" in str(messages.differing(ours, theirs))
    assert "privacy: noise is" in str(messages.differing(ours, messages.agreement(Federation.of(job(rounds=8)))))


@pytest.mark.parametrize("few", [11, 13])
def test_a_fixed_cohort_of_few_who_are_there_waits_or_ends_within_the_budget(few: int, tmp_path: Path) -> None:
    """The bound for 10 of 100 is far below that for 10 of 11."""
    sections = {"mechanism": "central(norm=0.5)", "epsilon": 2.0}
    of = Federation.of(job(data={"clients": 100}, select={"rule": "uniform"}, privacy=sections))
    assert of.plan.privacy is not None
    account = Account(of.plan.privacy, {})
    assert account.affords(100, 10)
    assert not account.affords(few, 10)
    devices = {"classes": {"phone": {"available": "daily(hours=2.4)"}}}
    done = fedkeel.run(
        job(data={"clients": 100}, select={"rule": "uniform"}, privacy=sections, devices=devices),
        tmp_path / "run",
        with_report=False,
    )
    assert all(row["epsilon"] <= 2.0 for row in done.rounds)


def test_work_that_was_out_at_the_checkpoint_is_counted_again(tmp_path: Path) -> None:
    state = ServerState(
        torch.zeros(1), privacy={"events": {}, "uses": {"a": 1}}, in_flight=(InFlight("a", 0, 1, 0, 0.0),)
    )
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        assert rewound(ledger, state).privacy["uses"] == {"a": 1}  # nothing was done after it
        ledger.write_given(1, ["b", "c"])
        found = rewound(ledger, state).privacy
        assert found["uses"] == {"a": 2, "b": 1, "c": 1}
        assert rewound(ledger, state.replace(privacy=found)).privacy == found  # once


@pytest.mark.parametrize(("budget", "rounds"), [(20.0, 1), (60.0, 2), (40.0, 3), (8.0, 4)])
def test_steps_are_counted_by_the_client_for_which_they_cost_most(budget: float, rounds: int) -> None:
    sections = {"mechanism": "examples(norm=1.0)", "epsilon": budget, "least_examples": 12}
    of = Federation.of(
        job(rounds=rounds, privacy=sections, select={"cohort": 20}, train={"stopping": "epochs(epochs=1)"})
    )
    promise = of.plan.privacy
    assert promise is not None
    assert promise.uses == rounds
    for n in (12, 13, 20, 21, 31, 41, 51, 61, 101):
        spent = epsilon({Poisson(min(1.0, 10 / n), promise.noise, -(-n // 10)): rounds}, 1e-5)
        assert spent <= budget * (1 + 1e-9), n
        assert spent <= promise.after(rounds) * (1 + 1e-9)


def test_the_card_counts_rounds_that_were_done_again_and_have_no_row(tmp_path: Path) -> None:
    sections = {"mechanism": "central(norm=0.5, noise=3.0)", "epsilon": 3.0}
    done = fedkeel.run(job(select={"cohort": 20}, privacy=sections), tmp_path / "run", with_report=False)
    last = done.rounds[-1]["epsilon"]
    for path in (done.dir.model).iterdir():
        path.unlink()
    state = done.state
    with done.dir.ledger() as ledger:
        ledger.write_given(9, [f"client-{i}" for i in range(20)])
        again = rewound(ledger, state)
    of = Federation.of(done.job)
    assert of.plan.privacy is not None
    more = Account(of.plan.privacy, again.privacy).epsilon
    assert more > last
    resumed = fedkeel.resume(done.path, with_report=False)
    written = card.read(resumed.dir.model)[0].privacy
    assert written is not None
    assert written.epsilon == pytest.approx(more)
    assert resumed.epsilon == pytest.approx(more)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"mechanism": "central(norm=1e-320)", "epsilon": 1.0}, "norm"),
        (
            {"mechanism": "local(norm=1.0)", "epsilon": 1e-9, "delta": 1e-12},
            "privacy.delta = 1e-12: raise one of them$",
        ),
    ],
)
def test_odd_numbers_are_refused_in_a_sentence(sections: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said) as told:
        Federation.of(job(privacy=sections))
    assert "\n" not in str(told.value)
