"""The whole federation: reproducible, equal across backends, and upright when something in it goes wrong."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

import fedkeel
from fedkeel.core.layout import Layout
from fedkeel.core.types import ServerState
from fedkeel.round import plan as plan_module

BASE = {
    "rounds": 4,
    "data": {"clients": 8, "partition": "dirichlet(alpha=1.0)"},
    "model": {"build": "mlp(hidden=(12,))"},
    "train": {"backend": "loop", "batch_size": 8},
    "select": {"cohort": 5},
}


@fedkeel.rule("model")
def fragile(inputs: tuple[int, ...], classes: int, *, limit: float = 1e9) -> nn.Module:
    """A model whose loss is NaN for any client that holds class 3 (tests)."""

    class Fragile(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(math.prod(inputs), classes)

        def forward(self, x):
            out = self.linear(x.flatten(1))
            return out + torch.where(x.flatten(1)[:, 20:21] > limit, torch.nan, 0.0)

    return Fragile()


def job(**changes) -> fedkeel.Job:
    merged = {k: {**v, **changes.pop(k, {})} if isinstance(v, dict) else changes.pop(k, v) for k, v in BASE.items()}
    return fedkeel.Job(**merged, **changes)


def run(tmp_path: Path, name: str = "run", **changes) -> fedkeel.Run:
    return fedkeel.run(job(**changes), tmp_path / name, with_report=False)


def theta(one: fedkeel.Run) -> bytes:
    return one.state.theta.numpy().tobytes()


def test_the_same_seed_gives_the_same_run_and_another_seed_another(tmp_path):
    state = torch.get_rng_state()
    first, again, other = (run(tmp_path, n, seed=s) for n, s in (("a", 0), ("b", 0), ("c", 1)))
    assert theta(first) == theta(again) != theta(other)
    assert [r["value"] for r in first.metrics] == [r["value"] for r in again.metrics]
    assert torch.equal(state, torch.get_rng_state())


def test_the_number_of_workers_changes_no_bit(tmp_path):
    thetas = {theta(run(tmp_path, f"w{w}", train={"backend": "traced", "workers": w})) for w in (1, 2, 3)}
    assert len(thetas) == 1


def test_the_backends_agree_to_rounding(tmp_path):
    runs = {b: run(tmp_path, b, train={"backend": b}).state.theta for b in ("loop", "traced", "rows")}
    for backend in ("traced", "rows"):
        assert torch.allclose(runs[backend], runs["loop"], rtol=1e-4, atol=1e-5)


def test_it_learns_and_says_so(tmp_path):
    one = run(tmp_path, rounds=15, select={"cohort": None}, train={"lr": 0.2})
    first, last = one.metrics[0], one.final()
    assert last["value"] > 0.85
    assert last["low"] < last["value"] < last["high"]
    assert last["examples"] == 359
    assert first["round"] == 0


def test_a_streamed_mean_equals_the_matrix_mean(tmp_path, monkeypatch):
    whole = run(tmp_path, "whole")
    monkeypatch.setattr(plan_module, "STREAM_ABOVE", 0)
    streamed = run(tmp_path, "streamed")
    assert torch.allclose(whole.state.theta, streamed.state.theta, rtol=1e-5, atol=1e-6)
    assert all(u["cosine"] is not None for u in whole.updates)
    assert all(u["cosine"] is None for u in streamed.updates)
    assert [u["weight"] for u in whole.updates] == pytest.approx([u["weight"] for u in streamed.updates])


def test_the_update_of_one_client_is_the_step_of_the_model(tmp_path):
    """One client, one round: the new model is the old one plus its whole delta, and every byte is counted."""
    one = run(tmp_path, rounds=1, data={"clients": 1, "partition": "iid"}, select={"cohort": 1})
    update = one.updates[0]
    assert update["weight"] == 1.0
    assert update["cosine"] == pytest.approx(1.0)
    assert one.rounds[0]["update_norm"] == pytest.approx(update["norm"], rel=1e-5)
    columns = one.state.theta.numel()
    assert 4 * columns < one.rounds[0]["bytes_up"] < 4 * columns + 600
    assert one.rounds[0]["bytes_down"] == 4 * columns


@pytest.mark.parametrize(
    "attack", ["sign_flip(scale=3.0)", "gaussian(std=1.0)", "alie", "nan", "inflated_count", "label_flip"]
)
def test_every_attack_reaches_the_server_and_is_marked(tmp_path, attack):
    one = run(tmp_path, attack={"rule": attack, "clients": 2}, select={"cohort": None}, rounds=2)
    hostile = [u for u in one.updates if u["hostile"]]
    honest = [u for u in one.updates if not u["hostile"]]
    assert len({u["client"] for u in hostile}) == 2
    assert len(hostile) == 4
    assert all(u["stage"] is None for u in honest)
    if attack == "nan":
        assert all(u["rule"] == "finite" for u in hostile)
    if attack == "inflated_count":
        assert min(u["num_examples"] for u in hostile) > max(u["num_examples"] for u in honest)


def test_a_client_whose_loss_turns_nan_ends_its_update_and_not_the_run(tmp_path):
    one = run(
        tmp_path,
        model={"build": "fragile(limit=0.99)"},
        select={"cohort": None},
        data={"partition": "shards(classes_per_client=2)"},
    )
    failed = [u for u in one.updates if u["stage"] == "train"]
    assert failed
    assert all("NaN" in u["reason"] for u in failed)
    assert any(u["weight"] > 0 for u in one.updates)
    assert one.done


def test_a_round_in_which_everyone_fails_is_skipped_and_the_model_kept(tmp_path):
    one = run(tmp_path, model={"build": "fragile(limit=-1.0)"})
    assert [r["skipped"] for r in one.rounds] == ["0 of 5 clients gave a usable update, the quorum is 1"] * 4
    assert one.state.version == 0
    assert one.done


def test_a_diverging_run_keeps_its_last_finite_model(tmp_path):
    one = run(tmp_path, train={"lr": 1e20}, aggregate={"checks": ()}, rounds=3)
    assert torch.isfinite(one.state.theta).all()
    assert one.done


def test_private_columns_stay_with_their_client(tmp_path):
    one = run(tmp_path, model={"private": ("*.bias",)}, data={"holdout": 0.25})
    from fedkeel.ship import checkpoint

    newest = checkpoint.latest(one.dir.checkpoints)
    state, memory, *_ = checkpoint.load(newest)
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 10))
    layout = Layout.of(module, ["*.bias"])
    assert state.theta.numel() == layout.columns == 64 * 12 + 12 * 10
    kept = {client: vector for client, name, vector in memory.items() if name == "private"}
    assert {u["client"] for u in one.updates} == set(kept)
    assert all(v.numel() == 22 for v in kept.values())
    assert len({v.numpy().tobytes() for v in kept.values()}) == len(kept)


def test_krum_and_the_round_report_agree(tmp_path):
    one = run(tmp_path, aggregate={"weigh": ("krum(f=1)",)}, rounds=2)
    for number in (1, 2):
        rows = [u for u in one.updates if u["round"] == number]
        assert sorted(u["weight"] for u in rows) == [0, 0, 0, 0, 1]
        assert sum(u["stage"] == "weigh" for u in rows) == 4


def test_a_users_check_that_raises_lets_nothing_in_and_stops_nothing(tmp_path):
    @fedkeel.rule("check")
    def broken_for_tests(update, door):
        """Always raise (tests)."""
        raise KeyError("oops")

    one = run(tmp_path, aggregate={"checks": ("broken_for_tests",)}, rounds=1)
    assert {u["reason"] for u in one.updates} == {"the check raised KeyError: 'oops'"}
    assert one.rounds[0]["skipped"].startswith("0 of 5 clients")


def test_a_state_is_never_changed_in_place():
    state = ServerState(torch.zeros(3))
    assert state.replace(round=2).round == 2
    assert state.round == 0


@fedkeel.rule("scheduler")
def first_of_for_tests(view, *, enough: int):
    """Close as soon as `enough` updates came (tests)."""
    if view.started == 0:
        return fedkeel.Decision(start=view.cohort)
    return fedkeel.Decision(close=view.received >= enough or view.in_flight == 0)


def test_a_scheduler_that_closes_early_gives_the_same_run_every_time(tmp_path):
    """Workers end in any order; answers of the same virtual time come in the order of their tasks."""
    options = {"schedule": {"rule": "first_of_for_tests(enough=2)"}, "train": {"backend": "traced", "workers": 2}}
    assert len({theta(run(tmp_path, f"r{i}", **options)) for i in range(3)}) == 1


@fedkeel.rule("model")
def picky(inputs: tuple[int, ...], classes: int, *, above: float) -> nn.Module:
    """A model that raises in training for dark images, or for all (tests)."""

    class Picky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(math.prod(inputs), classes)

        def forward(self, x):
            if self.training and float(x.mean(dim=(1, 2, 3)).max()) > above:
                raise ValueError("too bright")
            return self.linear(x.flatten(1))

    return Picky()


def test_a_client_whose_step_raises_fails_alone(tmp_path):
    one = run(tmp_path, model={"build": "picky(above=0.42)"}, rounds=2, select={"cohort": None})
    failed = [u for u in one.updates if u["stage"] == "train"]
    assert {u["reason"] for u in failed} == {"the training step raised ValueError: too bright"}
    assert any(u["weight"] > 0 for u in one.updates)


def test_a_model_that_no_client_can_train_ends_the_run_with_a_sentence(tmp_path):
    with pytest.raises(fedkeel.RunError, match=r"the last 5 clients failed, one after another: .*too bright"):
        run(tmp_path, model={"build": "picky(above=-1.0)"})


def test_a_comparison_shows_that_a_seed_diverged(tmp_path):
    wild = job(model={"build": "mlp(hidden=(16,))"}, attack={"rule": "gaussian(std=1e30)", "clients": 2})
    found = fedkeel.compare(wild, {"aggregate.reduce": ["mean", "median"]}, seeds=2, metric="loss", out=tmp_path / "c")
    mean, median, *_ = found.variants
    assert math.isnan(mean.mean)
    assert mean.curve[-1][0] == median.curve[-1][0] == wild.rounds
    assert "nan" in found.csv.read_text()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": {"loss": "mse"}}, "model.loss"),
        ({"train": {"lr": math.inf}}, "train.lr"),
        ({"train": {"device": "tpu"}}, "train.device"),
    ],
)
def test_what_can_not_train_is_refused_before_it_is_tried(tmp_path, change, said):
    with pytest.raises(fedkeel.InputError, match=said):
        run(tmp_path, **change)
    assert not (tmp_path / "run").exists()
