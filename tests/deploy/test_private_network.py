"""Privacy on a network, over real processes: sums under masks with noise on them, and a head that is killed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from deployed import claims, deployed

import fedkeel

pytestmark = pytest.mark.filterwarnings("default")  # Flower's own dependencies warn


def test_noised_sums_under_masks_are_those_of_the_simulation_through_a_kill(tmp_path: Path) -> None:
    job = fedkeel.Job(
        name="masked",
        rounds=4,
        data={"clients": 4},
        train={"stopping": "steps(steps=5)"},
        aggregate={"weigh": ["examples(cap=40)"]},
        privacy={"mechanism": "central(norm=0.5, noise=0.4)", "insecure_reproducible_noise": True},
        secagg={"size": 3},
    )
    with deployed(tmp_path / "d", job) as net:
        serving = net.server()
        net.node("client-0", "client-1")
        net.node("client-2", "client-3")
        net.wait(lambda: net.round >= 2)
        net.kill("head")
        net.wait(lambda: serving.poll() is not None)
        assert serving.returncode == 0
    done = fedkeel.Run(net.local.run)
    simulated = fedkeel.run(net.local.server.job, tmp_path / "simulated", with_report=False)
    assert torch.equal(done.state.theta, simulated.state.theta)
    assert done.metrics == simulated.metrics
    bytes_of = [[(row["bytes_up"], row["bytes_down"]) for row in run.rounds] for run in (done, simulated)]
    assert bytes_of[0] == bytes_of[1]
    assert len(claims(done.updates)) == 4 * 4
    assert all(row["norm"] is None for row in done.updates)  # of no update
    # A round that was begun again cost what it cost twice: who killed the server may have seen the first one's sum.
    epsilons = [[row["epsilon"] for row in run.rounds] for run in (done, simulated)]
    assert epsilons[0][:2] == epsilons[1][:2]
    assert epsilons[0][-1] >= epsilons[1][-1]


def test_what_left_a_client_in_a_round_that_was_killed_is_counted(tmp_path: Path) -> None:
    job = fedkeel.Job(
        name="local",
        rounds=5,
        data={"clients": 2},
        train={"stopping": "steps(steps=5)"},
        aggregate={"weigh": ["equal"]},
        privacy={"mechanism": "local(norm=0.5)", "epsilon": 50.0, "uses": 3, "metrics_noise": 2.0},
    )
    with deployed(tmp_path / "d", job) as net:
        serving = net.server()
        net.node("client-0", "client-1")
        net.wait(lambda: net.round >= 1)
        net.kill("head")
        net.wait(lambda: serving.poll() is not None)
        assert serving.returncode == 0
    done = fedkeel.Run(net.local.run)
    assert done.epsilon is not None
    assert 40 < done.epsilon <= 50
    used = claims(done.updates)
    with done.dir.ledger(readonly=True) as ledger:
        again = sum(row["charge"]["uses"]["client-0"] for row in ledger.redone())
    # Each client has told three rounds, those that were done again among them, and the run ended with that.
    assert sum(client == "client-0" for _, client in used) + again == 3
    assert all(row["num_examples"] == 1 and row["metrics"].keys() == {"loss"} for row in done.updates)
