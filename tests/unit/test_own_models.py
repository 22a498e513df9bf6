"""Clients' own models in whole runs: what is measured of whom, fine-tuning, groups, the baselines beside it all."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fedkeel
from fedkeel.baselines import CENTRALISED, FEDAVG, LOCAL, baselines
from fedkeel.comparison import compare
from fedkeel.core.errors import InputError
from fedkeel.core.keys import Key
from fedkeel.core.registry import build
from fedkeel.core.types import ClientMemory
from fedkeel.ship import checkpoint
from fedkeel.train import Task
from fedkeel.world.evaluation import mean_interval, measure
from fedkeel.world.federation import POOLED, Federation
from fedkeel.world.pool import set_apart

JOB: dict[str, dict[str, Any]] = {
    "data": {"clients": 10, "partition": "shards(classes_per_client=2)", "holdout": 0.25},
    "model": {"build": "mlp(hidden=(24,))"},
    "train": {"batch_size": 10, "lr": 0.1, "workers": 1, "backend": "traced"},
    "record": {"evaluate_every": 3},
}


def job(rounds: int = 3, **sections: Any) -> fedkeel.Job:
    merged = {key: value | sections.pop(key, {}) for key, value in JOB.items()}
    return fedkeel.Job(rounds=rounds, **merged, **sections)


def run(path: Path, rounds: int = 3, **sections: Any) -> fedkeel.Run:
    return fedkeel.run(job(rounds, **sections), path, with_report=False)


def figure(done: fedkeel.Run, scope: str, name: str = "accuracy") -> float:
    row = done.final(name, scope)
    assert row is not None
    return float(row["value"])


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> fedkeel.Run:
    return run(tmp_path_factory.mktemp("plain") / "run", record={"groups": {"low": "client-[0-4]", "nine": "client-9"}})


def test_the_shared_model_is_measured_on_every_clients_own_examples(plain):
    """The mean, the worst tenth and the spread are those of the clients' rows; groups are means of their members."""
    federation = Federation.of(plain.job)
    held = {name: figure(plain, f"client/{name}") for name in federation.names}
    for index, name in enumerate(federation.names):
        mine = slice(*federation.holdout.range(index))
        x, y = federation.holdout.x[mine], federation.holdout.y[mine]
        assert federation.measure(plain.state.theta, x, y, federation.holdout.prepare)["accuracy"] == held[name]
        assert plain.final("accuracy", f"client/{name}")["examples"] == len(x)
    values = torch.tensor(list(held.values()), dtype=torch.float64)
    assert figure(plain, "clients") == pytest.approx(float(values.mean()))
    assert figure(plain, "clients", "worst_decile") == min(held.values())
    assert figure(plain, "clients", "spread") == pytest.approx(float(values.std(correction=0)))
    assert figure(plain, "group/low") == pytest.approx(sum(held[f"client-{i}"] for i in range(5)) / 5)
    assert figure(plain, "group/nine") == held["client-9"]
    assert plain.final() == plain.final("accuracy", "global")


def test_an_interval_of_accuracies_stays_within_0_and_1():
    assert mean_interval("accuracy", [1.0, 1.0, 0.9])[2] == 1.0
    assert mean_interval("loss", [0.0, 1.0, 5.0])[1] < 0


def test_dittos_shared_model_is_fedavgs_and_its_own_models_fit_their_clients(tmp_path):
    plain = run(tmp_path / "plain", train={"backend": "loop"})
    ditto = run(tmp_path / "ditto", train={"backend": "loop", "objective": "ditto(lam=0.1)"})
    assert torch.equal(ditto.state.theta, plain.state.theta)
    assert figure(ditto, "global") == figure(plain, "global")
    assert figure(ditto, "clients", "shared_accuracy") == figure(plain, "clients")
    assert figure(ditto, "clients") > figure(plain, "clients") + 0.05
    assert ditto.final() == ditto.final("accuracy", "clients")
    assert [r["bytes_up"] for r in ditto.rounds] == [r["bytes_up"] for r in plain.rounds]


def test_own_models_survive_an_interruption_bit_for_bit(tmp_path):
    sections = {"train": {"objective": "apfl"}, "select": {"cohort": 4}, "record": {"checkpoint_every": 1}}
    whole = run(tmp_path / "whole", 6, **sections)

    def stop(progress: fedkeel.Progress) -> None:
        if progress.round == 3:
            raise KeyboardInterrupt

    with pytest.raises(fedkeel.FedkeelError, match="fedkeel resume"):
        fedkeel.run(job(6, **sections), tmp_path / "broken", watch=stop)
    resumed = fedkeel.resume(tmp_path / "broken", with_report=False)
    kept = [checkpoint.load(checkpoint.latest(one.dir.checkpoints))[1] for one in (whole, resumed)]
    assert torch.equal(whole.state.theta, resumed.state.theta)
    pairs = list(zip(kept[0].items(), kept[1].items(), strict=True))
    assert pairs
    assert all(a[:2] == b[:2] and torch.equal(a[2], b[2]) for a, b in pairs)
    assert whole.metrics == resumed.metrics


def test_fine_tuning_measures_what_local_steps_make_of_the_shared_model(tmp_path, plain):
    tuned = run(tmp_path / "tuned", record={"fine_tune": "steps(steps=2)"})
    assert torch.equal(tuned.state.theta, plain.state.theta)
    assert figure(tuned, "clients", "shared_accuracy") == figure(plain, "clients")
    federation = Federation.of(tuned.job)
    tuner = federation.tuner()
    assert tuner is not None
    again = measure(federation, tuned.state.theta, ClientMemory(), tuner)
    assert again[1].values["accuracy"][0] == figure(tuned, "clients")
    assert figure(tuned, "clients") > figure(plain, "clients")


def test_fine_tuning_begins_from_each_clients_private_layers(tmp_path):
    alone = run(tmp_path / "a", model={"private": ("head",)})
    tuned = run(tmp_path / "b", model={"private": ("head",)}, record={"fine_tune": "steps(steps=1)"})
    assert torch.equal(alone.state.theta, tuned.state.theta)
    assert figure(tuned, "clients") != figure(alone, "clients")
    assert figure(tuned, "clients") > 0.8


@pytest.mark.parametrize("workers", [1, 2])
def test_a_client_that_shares_nothing_trains_as_if_there_were_no_others(tmp_path, workers):
    done = run(tmp_path / "local", 4, model={"private": ("*",)}, train={"workers": workers})
    assert not done.state.theta.numel()
    assert all(row["skipped"] is None for row in done.rounds)
    federation, memory = Federation.of(done.job), checkpoint.load(checkpoint.latest(done.dir.checkpoints))[1]
    own = federation.private()
    shared = Federation.of(job())
    with_name = dict(zip(federation.names, range(10), strict=True))
    vector = shared.theta()
    assert torch.equal(own, vector)
    trainer = shared.trainer()
    for number in range(1, 5):
        key = Key.root(0).fold("client", number, "client-3")
        (step,) = trainer.train(vector, [Task(with_name["client-3"], key)])
        vector = vector + step.delta
    torch.testing.assert_close(memory.of("client-3")["private"], vector, rtol=1e-4, atol=1e-5)
    theta = federation.layout.joined(done.state.theta, memory.of("client-3")["private"])
    mine = slice(*federation.holdout.range(3))
    x, y = federation.holdout.x[mine], federation.holdout.y[mine]
    found = federation.measure(theta, x, y, federation.holdout.prepare)
    assert found["accuracy"] == figure(done, "client/client-3")


def test_who_trains_alone_and_holds_nothing_back_is_tested_on_the_test_set(tmp_path):
    done = run(tmp_path / "alone", model={"private": ("*",)}, data={"holdout": 0.0})
    assert figure(done, "clients") < 0.35
    assert done.final("accuracy", "client/client-0")["examples"] == len(Federation.of(done.job).pool.test_x)


def test_pooled_examples_are_trained_on_by_one_and_tested_client_by_client(tmp_path):
    done = run(tmp_path / "pooled", data={"pooled": True})
    assert {row["client"] for row in done.updates} == {POOLED}
    federation, usual = Federation.of(done.job), Federation.of(job())
    assert federation.data.count(0) == len(usual.data.x)
    assert torch.equal(federation.data.x, usual.data.x)
    assert federation.members == usual.names
    assert figure(done, "clients") > 0.75


def test_the_baselines_differ_from_the_job_in_what_they_say_they_do(tmp_path):
    mine = job(
        train={"corrections": ("l2(coef=0.001)", "fedprox(mu=0.1)"), "objective": "ditto(lam=0.1)"},
        server={"optimiser": "momentum"},
        aggregate={"mix": ("fednova",)},
        attack={"rule": "sign_flip", "clients": 2},
        select={"cohort": 5},
        record={"fine_tune": None},
    )
    found = baselines(mine)
    assert list(found) == [FEDAVG, LOCAL, CENTRALISED]
    for one in found.values():
        assert one.train.corrections == ("l2(coef=0.001)",)
        assert one.train.objective == "plain"
        assert one.server.optimiser == "sgd"
        assert (one.rounds, one.seed, one.train.stopping) == (mine.rounds, mine.seed, mine.train.stopping)
    assert found[FEDAVG].attack == mine.attack
    assert found[FEDAVG].cohort == 5
    assert (found[LOCAL].attack.clients, found[CENTRALISED].attack.clients) == (0, 0)
    assert (found[LOCAL].cohort, found[CENTRALISED].cohort) == (10, 1)
    for one in found.values():
        Federation.of(one)


def test_compare_sets_the_baselines_beside_the_variants(tmp_path):
    vary = {"train.objective": ["ditto(lam=0.1)", "plain"]}
    found = compare(job(2, record={"evaluate_every": 2}), vary, seeds=1, out=tmp_path / "cmp")
    assert [v.label for v in found.variants] == ["ditto(lam=0.1)", "plain", LOCAL, CENTRALISED]
    values = {v.label: v.mean for v in found.variants}
    one = fedkeel.Run(tmp_path / "cmp" / "baseline-local-only" / "seed-0")
    assert values[LOCAL] == figure(one, "clients")
    assert values["ditto(lam=0.1)"] > values["plain"]
    with found.csv.open() as file:
        assert [row["variant"] for row in csv.DictReader(file)] == list(values)
    without = compare(job(2, record={"evaluate_every": 2}), vary, seeds=1, out=tmp_path / "cmp", with_baselines=False)
    assert [v.label for v in without.variants] == ["ditto(lam=0.1)", "plain"]


def test_baselines_go_with_what_is_varied_of_theirs(tmp_path):
    base = job(1, aggregate={"reduce": "median"}, attack={"rule": "sign_flip"}, record={"evaluate_every": 1})
    found = compare(base, {"attack.clients": ["0", "2"]}, seeds=1, out=tmp_path / "cmp")
    labels = [v.label for v in found.variants]
    assert labels == ["0", "2", "FedAvg (0)", "FedAvg (2)", LOCAL, CENTRALISED]
    hostile = {v.label: fedkeel.Run(v.runs[0]).job.attack.clients for v in found.variants}
    assert list(hostile.values()) == [0, 2, 0, 2, 0, 0]
    with pytest.raises(InputError, match=r"data\.holdout from or to 0"):
        compare(base, {"data.holdout": ["0.0", "0.2"]}, seeds=1, out=tmp_path / "other")


def test_one_who_trains_for_all_does_as_many_steps():
    steps = job(train={"stopping": "steps(steps=3)"}, select={"cohort": 4})
    assert baselines(steps)[CENTRALISED].train.stopping == "steps(steps=12)"
    assert baselines(steps)[LOCAL].train.stopping == "steps(steps=3)"
    assert not baselines(job(data={"pooled": True}))[FEDAVG].data.pooled


def test_the_server_can_update_as_clients_that_stop_early_do(tmp_path):
    done = run(
        tmp_path / "run",
        train={"validation": 0.2, "stopping": "early(most=2)"},
        server={"examples": 60},
        aggregate={"weigh": ("fltrust",)},
    )
    assert [row["skipped"] for row in done.rounds] == [None] * 3


def test_hostile_clients_own_models_count_for_nobody(tmp_path):
    done = run(
        tmp_path / "run",
        attack={"rule": "label_flip", "clients": 3},
        train={"objective": "ditto(lam=0.1)"},
        record={"groups": {"all": "*"}},
    )
    hostile = Federation.of(done.job).adversary.clients
    honest = [figure(done, f"client/client-{i}") for i in range(10) if f"client-{i}" not in hostile]
    assert len(honest) == 7
    assert figure(done, "clients") == pytest.approx(sum(honest) / 7)
    assert figure(done, "group/all") == pytest.approx(sum(honest) / 7)


def test_regressions_have_a_worst_tenth_and_groups_by_loss(tmp_path):
    @fedkeel.rule("source", name="test_line_for_clients")
    def line(key):
        """y = x w, of ten clients who disagree (tests)."""
        x = torch.randn(200, 5, generator=key.torch())
        group = torch.arange(200) % 10
        return fedkeel.Pool.from_arrays(x, x.sum(1) * (1.0 + group), group=group.numpy())

    done = run(
        tmp_path / "run",
        data={"source": "test_line_for_clients", "partition": "natural"},
        model={"build": "mlp(hidden=(4,))", "loss": "mse"},
        train={"lr": 0.01},
        record={"groups": {"first": "[0-4]"}},
    )
    losses = [figure(done, f"client/{i}", "loss") for i in range(10)]
    assert figure(done, "clients", "worst_decile") == max(losses)
    assert figure(done, "group/first", "loss") == pytest.approx(sum(losses[:5]) / 5)
    page = done.report().read_text()
    assert "Loss of clients&#39; own models" in page or "Loss of clients' own models" in page
    assert "Group by group" in page


def test_a_tuning_that_fails_leaves_the_clients_model_as_it_was(tmp_path):
    done = run(tmp_path / "run", model={"private": ("head",)})
    memory = checkpoint.load(checkpoint.latest(done.dir.checkpoints))[1]
    wild = Federation.of(
        done.job.with_settings(["train.lr=1e19", "train.backend=loop", "record.fine_tune=steps(steps=30)"])
    )
    plain = measure(Federation.of(done.job), done.state.theta, memory, None)
    tuned = measure(wild, done.state.theta, memory, wild.tuner())
    assert {f.scope: f.values["accuracy"] for f in tuned} == {f.scope: f.values["accuracy"] for f in plain}


def test_fedreps_shared_model_is_measured_before_the_head_is_trained(tmp_path):
    def before(**train: Any) -> list[float]:
        done = run(tmp_path / str(len(train)), rounds=1, model={"private": ("head",)}, train=train)
        return [row["metrics"]["global_loss"] for row in done.updates]

    assert before() == pytest.approx(before(private_first="epochs(epochs=5)"), rel=1e-5)


def test_validation_examples_are_of_the_client_and_no_step_sees_them():
    federation = Federation.of(job())
    kept, apart = set_apart(federation.data, 0.2, federation.names, Key.root(4))
    for client in range(len(federation.data)):
        whole, some, rest = (slice(*d.range(client)) for d in (federation.data, kept, apart))
        assert rest.stop - rest.start == max(1, (whole.stop - whole.start) // 5)
        rows = torch.cat([kept.x[some], apart.x[rest]]).flatten(1)
        mine = federation.data.x[whole].flatten(1)
        assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, mine.tolist()))


def test_early_stopping_sends_the_best_epochs_model(tmp_path):
    """Of a client that takes up to six epochs, the update is that of the epoch of the least validation loss."""

    def federation(stopping: str) -> Federation:
        return Federation.of(job(train={"stopping": stopping, "validation": 0.3, "lr": 0.8, "batch_size": 5}))

    early = federation("early(patience=6, most=6)")
    theta, data = early.theta(), early.validation
    chosen = {
        done.client: replace(done, delta=done.delta.clone())
        for done in early.trainer().train(theta, [Task(i, Key.root(i)) for i in range(3)])
    }
    curves: dict[int, list[tuple[float, int, torch.Tensor]]] = {i: [] for i in range(3)}
    for epochs in range(1, 7):
        fixed = federation(f"epochs(epochs={epochs})")
        for done in fixed.trainer().train(theta, [Task(i, Key.root(i)) for i in range(3)]):
            mine = slice(*data.range(done.client))
            loss = fixed.measure(theta + done.delta, data.x[mine], data.y[mine], data.prepare)["loss"]
            curves[done.client].append((loss, done.steps, done.delta.clone()))
            assert done.last_loss == pytest.approx(loss, rel=1e-4)
    steps = set()
    for client, curve in curves.items():
        loss, count, delta = min(curve, key=lambda point: point[0])
        assert chosen[client].steps == count
        assert chosen[client].last_loss == pytest.approx(loss, rel=1e-4)
        torch.testing.assert_close(chosen[client].delta, delta)
        steps.add(count // max(1, curve[0][1]))
    assert max(steps) > 1


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([2.0], 4),
        ([2.0, float("nan"), 1.0, 0.9], 16),
        ([2.0, 1.0], 8),
        ([2.0, 1.0, 1.5], 8),
        ([2.0, 3.0], 8),
        ([2.0, 3.0, 3.5], 8),
        ([2.0, 3.0, 2.5], 12),
    ],
)
def test_early_asks_for_another_epoch_while_the_loss_falls(losses, expected):
    assert build("stopping", "early")(40, 10, losses) == expected


@pytest.mark.parametrize(("backend", "workers"), [("loop", 1), ("traced", 2), ("rows", 1)])
def test_a_budget_gives_slow_devices_less_work(tmp_path, backend, workers):
    done = run(
        tmp_path / "run",
        rounds=1,
        train={
            "stopping": "budget(steps=9)",
            "backend": backend,
            "workers": workers,
        },
        devices={
            "classes": {
                "slow": {"clients": "client-[0-2]", "time": 2.0},
                "fast": {"clients": "client-3", "time": 0.5},
                "slowest": {"clients": "client-4", "time": 100.0},
                "others": {},
            }
        },
    )
    steps = {row["client"]: row["steps"] for row in done.updates}
    assert steps == {f"client-{i}": {0: 4, 1: 4, 2: 4, 3: 18, 4: 1}.get(i, 9) for i in range(10)}


def test_clients_tell_their_losses_before_and_after(tmp_path):
    done = run(tmp_path / "run", train={"validation": 0.2, "stopping": "epochs(epochs=3)"})
    assert all(row["metrics"]["local_loss"] < row["metrics"]["global_loss"] for row in done.updates)
    page = done.report().read_text()
    assert "Loss before and after local work" in page
    assert "How it serves each client" in page


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"data": {"pooled": True}, "model": {"private": ("head",)}}, "data.pooled trains one model for all"),
        ({"data": {"pooled": True}, "train": {"objective": "apfl"}}, "data.pooled trains one model for all"),
        ({"model": {"private": ("*",)}, "aggregate": {"weigh": ("krum(f=1)",)}}, "nothing to screen, weigh, mix"),
        ({"data": {"holdout": 0.0}, "record": {"groups": {"all": "*"}}}, "set data.holdout"),
        ({"model": {"build": "logistic"}, "train": {"objective": "moon"}}, "train.objective.*there are no features"),
        ({"devices": {"classes": {"a": {"clients": "phone-*"}}}}, "classes.a.clients = 'phone-.' matches no client"),
        ({"devices": {"classes": {"a": {"clients": "client-1"}}}}, "'client-0' is in none of devices.classes"),
        ({"record": {"groups": {"phones": "phone-*"}}}, "record.groups.phones: 'phone-.' matches no client"),
        (
            {"train": {"validation": 0.2}, "data": {"clients": 1000, "partition": "iid", "holdout": 0.0}},
            "train.validation: client .* has 1 examples and cannot validate on any",
        ),
    ],
)
def test_what_can_not_be_measured_is_refused(sections, words):
    with pytest.raises(InputError, match=words):
        Federation.of(job(**sections))
