"""A run that begins with a model that is there: the same one, or one that grew since."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fedkeel
from fedkeel import plugins
from fedkeel.core.errors import InputError
from fedkeel.release.compare import compare
from fedkeel.release.describe import describe
from fedkeel.release.difference import Level
from fedkeel.ship import card
from fedkeel.world.federation import Federation
from fedkeel.world.starting import first_model

plugins.load([str(Path(__file__).with_name("wards.py"))])


def job(*settings: str) -> fedkeel.Job:
    base = ["data.source=patients", "data.clients=4", "data.partition=iid", "model.build=mlp(hidden=(6,))"]
    return fedkeel.Job(name="a", rounds=2).with_settings([*base, *settings])


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fedkeel.run(job("model.version=1.2.0"), tmp_path_factory.mktemp("runs") / "old").path


def test_it_goes_on_where_the_other_ended_and_says_so(old: Path, tmp_path: Path):
    before, named = card.read(old / "model")
    again = job(f"model.start={old}", "model.version=1.2.1")
    federation = Federation.of(again)
    theta, parent = first_model(federation)
    assert parent == before.lineage.fingerprint
    views = federation.layout.views(theta)
    assert all(torch.equal(views[name], value) for name, value in named.items())
    done = fedkeel.run(again, tmp_path / "new")
    assert card.read(done.path / "model")[0].lineage.parent == parent
    assert card.read(old / "model")[0].lineage.parent is None
    assert compare(describe(str(old)), describe(str(done.path))).level == Level.PATCH
    first = [row for row in done.metrics if (row["round"], row["name"]) == (0, "accuracy")]
    final = fedkeel.Run(old).final("accuracy")
    assert final is not None
    assert first[0]["value"] == final["value"]


@pytest.mark.parametrize("source", ["patients(columns=5, labels=4)", "patients(columns=4)", "patients(labels=3)"])
def test_a_model_that_grew_says_what_it_said_before(old: Path, source: str):
    grown = Federation.of(job(f"data.source={source}", f"model.start={old}", "model.version=1.3.0"))
    small = Federation.of(job())
    theta, _ = first_model(grown)
    grown.module.load_state_dict(card.stored(grown.layout, theta))
    small.module.load_state_dict(card.read(old / "model")[1])
    x = torch.randn(50, len(grown.pool.features))
    with torch.no_grad():
        assert torch.allclose(grown.module(x)[:, :2], small.module(x[:, :3]), atol=1e-6)


def test_a_dropped_feature_leaves_the_others_in_their_places(old: Path):
    dropped = Federation.of(job("data.source=patients(without='dose')", f"model.start={old}", "model.version=1.3.0"))
    views = dropped.layout.views(first_model(dropped)[0])
    before = card.read(old / "model")[1]
    assert torch.equal(views["fc1.weight"], before["fc1.weight"][:, [0, 2]])


def test_a_logistic_model_grows_both_ways(tmp_path: Path):
    build = "model.build=logistic"
    done = fedkeel.run(job(build), tmp_path / "a")
    wide = Federation.of(
        job(build, "data.source=patients(columns=4, labels=4)", f"model.start={done.path}", "model.version=1.1.0")
    )
    was = card.read(done.path / "model")[1]
    views = wide.layout.views(first_model(wide)[0])
    name = next(name for name, value in was.items() if value.dim() == 2)
    assert torch.equal(views[name][:2, :3], was[name])
    assert torch.equal(views[name][:2, 3], torch.zeros(2))
    assert views[name][2:].abs().min() > 0


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["model.version=1.2.0"], "declare 1.2.1 or later"),
        (["model.version=1.0.0"], "goes back"),
        (["model.version=1.2.1", "data.source=patients(labels=3)"], "declare 1.3.0 or later"),
        (["model.version=1.3.0", "model.build=mlp(hidden=(7,))"], "the network was"),
        (["model.version=1.3.0", "data.source=patients(dose='g')"], "unit of feature 'dose' was mg and is g"),
    ],
)
def test_what_does_not_fit_is_refused(old: Path, settings: list[str], said: str):
    with pytest.raises(InputError, match=said):
        first_model(Federation.of(job(f"model.start={old}", *settings)))


def test_both_that_grew_alike_cannot_be_told_apart(tmp_path: Path):
    done = fedkeel.run(job("data.source=patients(columns=3, labels=3)"), tmp_path / "a")
    with pytest.raises(InputError, match="one of them grow at a time"):
        first_model(
            Federation.of(
                job("data.source=patients(columns=4, labels=4)", f"model.start={done.path}", "model.version=1.1.0")
            )
        )


def test_a_start_that_is_no_model_is_refused_before_anything_is_written(tmp_path: Path):
    with pytest.raises(InputError, match="holds no model and no checkpoint"):
        fedkeel.run(job(f"model.start={tmp_path}"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_that_was_stopped_is_a_beginning_too(tmp_path: Path):
    def stop(progress: fedkeel.Progress) -> None:
        if progress.round == 3:
            raise KeyboardInterrupt

    with pytest.raises((KeyboardInterrupt, fedkeel.InterruptedRunError)):
        fedkeel.run(job("rounds=6", "record.checkpoint_every=1"), tmp_path / "a", watch=stop)
    assert not (tmp_path / "a" / "model").exists()
    state = fedkeel.Run(tmp_path / "a").state
    theta, parent = first_model(Federation.of(job(f"model.start={tmp_path / 'a'}", "model.version=1.0.1")))
    assert torch.equal(theta, state.theta)
    assert parent is not None


def test_columns_are_named_once():
    with pytest.raises(InputError, match="name each column once"):
        fedkeel.Pool.from_arrays(torch.zeros(4, 3), [0, 1, 0, 1], features=["age", "dose"])
