"""Whole federations with a promise: what they refuse, what they spend, what leaves a client."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fedkeel
from fedkeel import plugins
from fedkeel.baselines import baselines
from fedkeel.cli import app
from fedkeel.core.errors import InputError
from fedkeel.core.keys import Key
from fedkeel.core.types import Claims, ClientMemory, ServerState
from fedkeel.deploy import FedKeel
from fedkeel.round import device, wire
from fedkeel.round.accountant import Poisson, Uses, epsilon
from fedkeel.round.protect import USES
from fedkeel.ship import card
from fedkeel.sim.simulator import Simulator
from fedkeel.world.federation import Federation
from fedkeel.world.record import rewound

BASE: dict[str, Any] = {
    "name": "private",
    "rounds": 6,
    "data": {"clients": 40, "partition": "iid"},
    "model": {"build": "logistic"},
    "train": {"backend": "loop", "batch_size": 10},
    "select": {"cohort": 10, "rule": "poisson"},
    "aggregate": {"weigh": ("equal",)},
    "privacy": {"mechanism": "central(norm=0.5)", "epsilon": 8.0},
}


def job(**changes: Any) -> fedkeel.Job:
    values = {k: {**v} if isinstance(v, dict) else v for k, v in BASE.items()}
    for key, value in changes.items():
        values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) else value
    return fedkeel.Job(**values)


def run(where: Path, **changes: Any) -> fedkeel.Run:
    return fedkeel.run(job(**changes), where, with_report=False)


# -- what is refused, before anything is trained


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"aggregate": {"reduce": "median"}}, "reducer 'median' and noise on the sum"),
        ({"aggregate": {"screens": ("norm_mad",)}}, "what it makes of one client's update depends on the others'"),
        ({"aggregate": {"mix": ("norm_cap",)}}, "mixer 'norm_cap"),
        ({"aggregate": {"weigh": ("examples",)}}, r"without a cap there is no bound; write examples\(cap=100\)"),
        ({"aggregate": {"weigh": ("foolsgold",)}}, "nobody knows how much a client can weigh"),
        ({"aggregate": {"checks": ("layout", "version", "claims")}}, "a NaN has no bound"),
        ({"train": {"corrections": ("scaffold",)}}, "made of updates without noise"),
        ({"train": {"corrections": ("adaptive_fedprox",)}}, "made of updates without noise"),
        ({"quarantine": {"limit": 2.0}}, "quarantine and noise on the sum"),
        ({"select": {"rule": "oort"}}, "selector 'oort"),
        ({"schedule": {"rule": "sync(quorum=3)"}}, "would tell how many took part"),
        ({"privacy": {"mechanism": "central(norm=0.5)", "epsilon": None}}, "set privacy.epsilon, as 8.0"),
        ({"privacy": {"mechanism": "central(norm=0.5, noise=0.3)"}}, "does not last for 6 rounds with noise = 0.3"),
        ({"privacy": {"epsilon": 1e-9, "delta": 1e-12}}, "can not be kept with any noise"),
        ({"privacy": {"mechanism": "ftrl(norm=0.5, bands=5)"}}, "lower bands to that"),
        ({"privacy": {"mechanism": "adaptive()", "epsilon": 0.5}}, "too few for noise"),
        (
            {"privacy": {"mechanism": "ftrl(norm=0.5, bands=2)"}, "schedule": {"rule": "fedbuff(buffer=5)"}},
            "uses late updates",
        ),
        ({"privacy": {"uses": 3}}, "privacy.uses = 3 bounds each client's rounds"),
        ({"privacy": {"mechanism": None}}, "name privacy.mechanism, as 'central'"),
        ({"data": {"pooled": True}}, "leaves no clients to hide"),
        ({"privacy": {"mechanism": "local(norm=1.0)"}, "aggregate": {"weigh": ("examples",)}}, r"weigh = \['equal'\]"),
        ({"privacy": {"mechanism": "local(norm=1.0)"}, "client": {"labels": True}}, "set client.label_noise, which"),
        ({"privacy": {"metrics_noise": 2.0}}, "privacy.metrics_noise = 2 hides losses from the server"),
        ({"privacy": {"metrics_bound": 2.0}}, "privacy.metrics_bound = 2 is for losses with noise"),
        (
            {"privacy": {"mechanism": "local(norm=1.0)"}, "client": {"labels": True, "label_noise": 0.2}},
            "is spent on the labels alone",
        ),
        (
            {"privacy": {"mechanism": "local(norm=1.0)"}, "data": {"holdout": 0.2}},
            "data.holdout = 0.2 has clients tell",
        ),
        ({"privacy": {"mechanism": "local(norm=1.0)"}, "aggregate": {"mix": ("fednova",)}}, "tell of their data"),
        ({"privacy": {"mechanism": "centrl(norm=1.0)"}}, "did you mean 'central'"),
        ({"privacy": {"delta": 0.0}}, "privacy.delta = 0.0 is not valid"),
    ],
)
def test_what_could_not_be_promised_is_refused_in_one_sentence(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence) as said:
        Federation.of(job(**changes))
    assert "\n" not in str(said.value)


def test_models_whose_statistics_travel_are_refused(tmp_path: Path) -> None:
    plugin = tmp_path / "normed.py"
    plugin.write_text(
        "import torch.nn as nn, fedkeel\n\n@fedkeel.rule('model')\ndef normed_here(inputs, classes):\n"
        "    'A model with running statistics.'\n"
        "    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, classes))\n"
    )
    plugins.load((str(plugin),))
    with pytest.raises(InputError, match="use GroupNorm"):
        Federation.of(job(model={"build": "normed_here"}))


@pytest.mark.parametrize("rule", ["median", "trimmed_mean(trim=2)", "krum"])
def test_any_rule_may_follow_local_noise(rule: str) -> None:
    aggregate = {"weigh": ("krum(f=2)",), "reduce": "mean"} if rule == "krum" else {"reduce": rule}
    plan = Federation.of(
        job(privacy={"mechanism": "local(norm=1.0)"}, aggregate=aggregate, select={"rule": "uniform"})
    ).plan
    assert plan.privacy is not None
    assert plan.privacy.sampling == "uses"


def test_baselines_have_no_noise_and_a_flower_app_none_that_is_not_counted() -> None:
    found = baselines(job())
    assert all(baseline.privacy.mechanism is None for baseline in found.values())
    with pytest.raises(InputError, match=r"privacy.mechanism = .* needs more than a Flower app does"):
        FedKeel(job())


# -- how sampling is counted


@pytest.mark.parametrize(
    ("changes", "sampling", "uses"),
    [
        ({}, "poisson", 6),
        ({"select": {"rule": "uniform"}}, "fixed", 6),
        ({"select": {"rule": "round_robin"}}, "uses", 2),
        ({"select": {"rule": "uniform", "longest_wait": 5}}, "uses", 6),
        ({"select": {"cohort": 40}}, "uses", 6),
        ({"schedule": {"rule": "semi_sync(deadline=5.0)"}}, "uses", 6),
        ({"schedule": {"rule": "fedbuff(buffer=5)"}}, "uses", 6),
        ({"privacy": {"mechanism": "ftrl(norm=0.5, bands=3)"}}, "uses", 2),
        ({"privacy": {"mechanism": "local(norm=0.5)", "uses": 2}}, "uses", 2),
    ],
)
def test_only_sampling_that_really_happens_counts(changes: dict[str, Any], sampling: str, uses: int) -> None:
    privacy = Federation.of(job(**changes)).plan.privacy
    assert privacy is not None
    assert (privacy.sampling, privacy.uses) == (sampling, uses)
    assert privacy.planned() <= 8.0


# -- what is spent


def test_epsilon_is_in_ledger_card_report_and_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "job.toml").write_text(job().to_toml())
    app(["run", str(tmp_path / "job.toml"), "--out", str(tmp_path / "run")], standalone_mode=False)
    said = capsys.readouterr().out
    done = fedkeel.Run(tmp_path / "run")
    spent = [row["epsilon"] for row in done.rounds]
    privacy = Federation.of(done.job).plan.privacy
    assert privacy is not None
    event = Poisson(0.25, privacy.noise)
    assert spent == pytest.approx([epsilon({event: count}, 1e-5) for count in range(1, 7)])
    assert 7.9 < spent[-1] <= 8.0
    assert f"epsilon {spent[-1]:.3g} at delta 1e-05" in said
    found, _ = card.read(done.path / "model")
    assert found.privacy is not None
    assert (found.privacy.epsilon, found.privacy.delta) == (spent[-1], 1e-5)
    assert "rate of 0.25" in found.privacy.counts_on
    page = done.dir.report.read_text()
    assert "What it spends of privacy" in page
    assert "Nothing here is private" not in page


def test_noise_and_samples_are_not_the_seeds_unless_the_job_says_so(tmp_path: Path) -> None:
    first, second = (run(tmp_path / name) for name in "ab")
    assert not torch.equal(first.state.theta, second.state.theta)
    drawn = [[row["client"] for row in of.updates] for of in (first, second)]
    assert drawn[0] != drawn[1]
    known = {"insecure_reproducible_noise": True}
    first, second = (run(tmp_path / name, privacy=known) for name in "cd")
    assert torch.equal(first.state.theta, second.state.theta)
    assert "Nothing here is private" in first.report().read_text()
    assert first.dir.ledger(readonly=True).meta["insecure"] is True


def test_a_draw_of_nobody_releases_noise(tmp_path: Path) -> None:
    done = run(tmp_path / "run", select={"cohort": 1}, rounds=12)
    used = [sum(row["weight"] > 0 for row in done.updates if row["round"] == r) for r in range(1, 13)]
    assert 0 in used
    assert all(row["skipped"] is None and row["update_norm"] > 0 for row in done.rounds)
    assert [row["version"] for row in done.rounds] == list(range(1, 13))


def test_a_large_cohort_streams_to_the_same_sum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"insecure_reproducible_noise": True}
    kept = run(tmp_path / "kept", privacy=known)
    monkeypatch.setattr("fedkeel.round.plan.STREAM_ABOVE", 0)
    streamed = run(tmp_path / "streamed", privacy=known)
    assert torch.equal(kept.state.theta, streamed.state.theta)


def test_a_capped_weight_counts_in_full_only_at_its_cap(tmp_path: Path) -> None:
    known = {"mechanism": "central(norm=5.0, noise=1e-6)", "epsilon": None, "insecure_reproducible_noise": True}
    select = {"cohort": 40, "rule": "uniform"}
    equal = run(tmp_path / "equal", privacy=known, select=select, rounds=1)
    halves = run(
        tmp_path / "halves", privacy=known, select=select, rounds=1, aggregate={"weigh": ("examples(cap=100)",)}
    )
    first = Federation.of(job()).theta()
    counts = np.array([row["num_examples"] for row in halves.updates])
    moved = (halves.state.theta - first).norm() / (equal.state.theta - first).norm()
    assert float(moved) == pytest.approx(counts.mean() / 100, rel=0.05)


def test_clients_rest_under_bands_and_stop_when_they_are_used_up(tmp_path: Path) -> None:
    mechanism = {"mechanism": "ftrl(norm=0.5, bands=3)", "epsilon": 4.0}
    done = run(tmp_path / "run", privacy=mechanism, select={"rule": "uniform"}, rounds=9)
    seen: dict[str, list[int]] = {}
    for row in done.updates:
        seen.setdefault(row["client"], []).append(row["round"])
    assert all(b - a >= 3 for rounds in seen.values() for a, b in itertools.pairwise(rounds))
    assert max(map(len, seen.values())) <= 3
    assert max(row["epsilon"] for row in done.rounds) <= 4.0


def test_a_run_whose_clients_are_used_up_ends_and_says_so(tmp_path: Path) -> None:
    privacy = {"mechanism": "local(norm=0.5)", "uses": 2}
    done = run(tmp_path / "run", privacy=privacy, select={"cohort": 20, "rule": "round_robin"}, rounds=30)
    assert len(done.rounds) == 4  # 40 clients, each twice, 20 a round
    assert done.done
    assert done.rounds[-1]["epsilon"] == pytest.approx(8.0, abs=0.01)
    assert done.final("accuracy")["round"] == 4


# -- what leaves a client


def test_local_privacy_tells_the_server_nothing_but_noise(tmp_path: Path) -> None:
    done = run(tmp_path / "run", privacy={"mechanism": "local(norm=0.5)"}, select={"rule": "uniform"})
    noise = Federation.of(done.job).plan.privacy.noise  # type: ignore[union-attr]
    for row in done.updates:
        assert (row["metrics"], row["num_examples"], row["steps"]) == ({}, 1, 1)
        assert row["norm"] == pytest.approx(0.5 * noise * math.sqrt(650), rel=0.15)


def test_an_update_leaves_clipped_whatever_the_codec_and_is_clipped_again(tmp_path: Path) -> None:
    done = run(
        tmp_path / "run", train={"lr": 5.0}, client={"codec": "int8"}, privacy={"mechanism": "central(norm=0.1)"}
    )
    norms = [row["norm"] for row in done.updates]
    assert 0.05 < min(norms) <= max(norms) < 0.11


def test_a_client_stops_by_its_own_count_whatever_the_server_asks(tmp_path: Path) -> None:
    federation = Federation.of(job(privacy={"mechanism": "local(norm=0.5)", "uses": 1}, select={"rule": "uniform"}))
    memory = ClientMemory()
    for client in federation.names:
        memory.keep(client, {USES: torch.tensor(1)})
    failures = []

    class Seen:
        def round(self, report: Any) -> None:
            failures.extend(row.refusal.reason for row in report.clients)

        def metrics(self, *_: Any) -> None: ...
        def checkpoint(self, *_: Any) -> None: ...

    with contextlib.closing(federation.trainer()) as trainer:
        Simulator(federation, trainer, ServerState(federation.theta()), memory, Seen()).run()
    assert failures
    assert set(failures) == {"its privacy budget is spent"}


def test_envelopes_of_local_privacy_hold_no_loss() -> None:
    federation = Federation.of(job(privacy={"mechanism": "local(norm=0.5)"}, select={"rule": "uniform"}))
    claims = Claims("client-000", 3, 0, federation.layout.digest, 77, 5, {"loss": 1.5}, (0.5, 0.5))
    rows = torch.ones(1, federation.layout.columns)
    sealed = device.prepare(rows, [Key(1)], [claims], ClientMemory(), federation.plan, federation.layout)[0]
    told = wire.read(sealed).claims
    assert (told.num_examples, told.steps, dict(told.metrics), told.labels) == (1, 1, {}, ())


# -- resumed

PROGRAM = """
import os, signal, sys, fedkeel
def watch(progress):
    if progress.round == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
place = sys.argv[1]
if os.path.exists(place + "/job.toml"):
    fedkeel.resume(place, watch=watch, with_report=False)
else:
    fedkeel.run(fedkeel.load(place + ".toml"), place, watch=watch, with_report=False)
"""


def killed(place: Path, at: int) -> None:
    ended = subprocess.run([sys.executable, "-c", PROGRAM, str(place), str(at)], env=os.environ, check=False)
    assert ended.returncode == -signal.SIGKILL


@pytest.mark.parametrize("mechanism", ["central(norm=0.5)", "local(norm=0.5)"])
def test_rounds_done_again_are_spent_again_and_the_budget_still_holds(tmp_path: Path, mechanism: str) -> None:
    place = tmp_path / "run"
    central = mechanism.startswith("central")
    described = job(
        privacy={"mechanism": mechanism},
        select={"rule": "poisson"} if central else {"cohort": 40, "rule": "uniform"},
        record={"checkpoint_every": 4},
    )
    (tmp_path / "run.toml").write_text(described.to_toml())
    killed(place, 3)  # before the first checkpoint: rounds 1 to 3 are done again
    killed(place, 2)  # and again
    done = fedkeel.resume(place, with_report=False)
    with done.dir.ledger(readonly=True) as ledger:
        redone = ledger.redone()
    privacy = Federation.of(described).plan.privacy
    assert privacy is not None
    assert [row["round"] for row in redone] == [1, 2, 3, 1, 2]
    rounds = done.rounds
    assert len(rounds) == 1  # 5 of 6 are gone
    event = Poisson(0.25, privacy.noise) if central else Uses(privacy.noise / 2)
    assert rounds[-1]["epsilon"] == pytest.approx(epsilon({event: 6}, 1e-5))
    assert rounds[-1]["epsilon"] <= 8.0
    assert done.done
    assert json.loads(json.dumps(redone[0]["charge"]))


def test_rounds_done_again_are_not_correlated_with_the_rounds_before(tmp_path: Path) -> None:
    ftrl = {"mechanism": "ftrl(norm=0.5, noise=1.0, bands=3)", "epsilon": None}
    described = job(privacy=ftrl, select={"rule": "uniform"}, record={"checkpoint_every": 2})
    (tmp_path / "run.toml").write_text(described.to_toml())
    killed(tmp_path / "run", 4)
    run = fedkeel.Run(tmp_path / "run")
    assert set(run.state.kept["privacy"]) == {"noise/1", "noise/2"}
    with run.dir.ledger() as ledger:
        state = rewound(ledger, run.state)
        assert state.kept["privacy"] == {}
        assert sum(state.privacy["uses"].values()) == 40  # two rounds, and two that will be done again
        again = rewound(ledger, run.state.replace(privacy=state.privacy))
        assert set(again.kept["privacy"]) == {"noise/1", "noise/2"}  # nothing is done again


def test_a_resumed_run_with_known_noise_is_the_unbroken_one(tmp_path: Path) -> None:
    known = {"mechanism": "adaptive(noise=0.5)", "epsilon": None, "insecure_reproducible_noise": True}
    described = job(privacy=known, record={"checkpoint_every": 2})
    whole = fedkeel.run(described, tmp_path / "whole", with_report=False)
    (tmp_path / "run.toml").write_text(described.to_toml())
    killed(tmp_path / "run", 4)
    assert torch.equal(fedkeel.resume(tmp_path / "run", with_report=False).state.theta, whole.state.theta)
