"""Exports: the same answers, smaller and faster, with figures that are true of the file that is there."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

import fedkeel
from fedkeel import cli
from fedkeel.core.errors import InputError
from fedkeel.core.registry import build
from fedkeel.edge import measure
from fedkeel.edge.export import MODEL, REPORT, export
from fedkeel.edge.graph import write_onnx
from fedkeel.edge.measure import Session
from fedkeel.edge.schemes import SCHEMES, halve, quantise
from fedkeel.release.describe import describe
from fedkeel.ship import card as cards

MODELS = {
    "logistic": (build("model", "logistic"), (1, 8, 8), None),
    "mlp": (build("model", "mlp", hidden=(32, 16)), (1, 28, 28), None),
    "cnn": (build("model", "cnn"), (1, 28, 28), None),
    "lenet": (build("model", "lenet"), (1, 28, 28), None),
    "resnet": (build("model", "resnet", blocks=1), (3, 32, 32), None),
    "conv1d": (build("model", "conv1d"), (6, 50), None),
    "char_lstm": (build("model", "char_lstm", units=16, layers=1), (20,), 30),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = ["data.clients=4", "data.partition=iid", "model.build=mlp(hidden=(200, 200))", "train.lr=0.2"]
    groups = ['record.groups={first="client-[01]"}', "data.holdout=0.2"]
    job = fedkeel.Job(name="ward", rounds=12).with_settings([*settings, *groups])
    return fedkeel.run(job, tmp_path_factory.mktemp("edge") / "run", with_report=False).path


@pytest.mark.parametrize("name", MODELS)
def test_every_built_in_model_answers_the_same_in_onnx(name: str, run: Path, tmp_path: Path):
    made, inputs, vocabulary = MODELS[name]
    torch.manual_seed(4)
    module = made(inputs, 10).eval()
    x = torch.randn(7, *inputs) if vocabulary is None else torch.randint(10, (7, *inputs))
    write_onnx(module, x, cards.read(run / "model")[0], tmp_path / MODEL)
    session = Session(tmp_path / MODEL)
    for size in (1, 2, 7):
        ours, theirs = session.answers(x[:size]), measure.eager(module, x[:size])
        assert ours.shape == theirs.shape
        assert torch.allclose(ours, theirs, atol=2e-5, rtol=1e-4)


def test_the_report_is_true_of_the_file(run: Path, tmp_path: Path):
    found = export(run, "onnx-int8", tmp_path / "out", seconds=0.1)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [REPORT, MODEL]
    told = json.loads((tmp_path / "out" / REPORT).read_text())
    assert told == json.loads(json.dumps(found.to_dict()))
    assert told["model"] == hashlib.sha256((tmp_path / "out" / MODEL).read_bytes()).hexdigest()
    card, named = cards.read(run / "model")
    assert (told["weights"], told["card"]) == (card.lineage.fingerprint, card.digest)
    federation = fedkeel.Run(run)
    accuracy = federation.final("accuracy", "global")
    assert accuracy is not None
    assert told["parity"]["reference"] == pytest.approx(accuracy["value"])
    assert told["parity"]["agreement"] >= 0.99
    assert told["within_limits"]
    assert told["bytes"]["smaller"] > 3
    assert told["bytes"]["exported"] == (tmp_path / "out" / MODEL).stat().st_size
    assert set(told["tried"]) == {scheme.name for scheme in SCHEMES}
    assert sum(text.startswith("taken") for text in told["tried"].values()) == 1
    assert 20e6 < told["peak_memory"]["exported"] < told["peak_memory"]["eager"]
    assert {f"label/{label}" for label in card.labels} | {"group/first"} == set(told["by"])
    examples = sum(part["examples"] for name, part in told["by"].items() if name.startswith("label/"))
    assert examples == told["parity"]["examples"]
    contract = describe(str(tmp_path / "out" / MODEL))
    assert (contract.version, contract.labels) == (card.version, card.labels)
    assert sorted(contract.needs or {}) == ["IR", "opset ai.onnx"]
    del named


@pytest.mark.parametrize("target", ["onnx", "onnx-fp16"])
def test_floats_answer_as_before(target: str, run: Path, tmp_path: Path):
    found = export(run, target, tmp_path / "out", seconds=0.05)
    assert found.parity.agreement == 1.0
    assert found.parity.most < (1e-4 if target == "onnx" else 0.05)
    assert found.lower > 0 or found.eager.calls > 0
    assert (found.smaller > 1.9) == (target == "onnx-fp16")


def test_where_every_scheme_loses_too_much_the_least_is_taken_and_it_is_said(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    options = ["--out", str(tmp_path / "out"), "--seconds", "0.05", "--most-changed", "0", "--calibration", "1"]
    monkeypatch.setattr(sys, "argv", ["fedkeel", "export", str(run), "--target", "onnx-int8", *options])
    monkeypatch.setattr("fedkeel.edge.export._Work._within", lambda *_: False)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    assert "it loses more than it may" in capsys.readouterr().out
    told = json.loads((tmp_path / "out" / REPORT).read_text())
    assert not told["within_limits"]
    lost = [float(text.rpartition(", ")[2].split()[0]) for text in told["tried"].values()]
    assert 100 * told["parity"]["lost"] == pytest.approx(min(lost), abs=0.006)
    model = onnx.load(str(tmp_path / "out" / MODEL))
    onnx.checker.check_model(model)
    assert [entry.key for entry in model.metadata_props].count("fedkeel.card") == 1


def test_a_scheme_that_overflows_is_seen(run: Path, tmp_path: Path):
    """Whatever this CPU does, seven bits of weights lose about what they should: half a step of each of 127."""
    card = cards.read(run / "model")[0]
    torch.manual_seed(1)
    module = build("model", "mlp", hidden=(64,))((1, 28, 28), 10).eval()
    x = torch.randn(200, 1, 28, 28)
    write_onnx(module, x, card, tmp_path / "plain.onnx")
    theirs = measure.eager(module, x)
    for scheme in SCHEMES:
        quantise(tmp_path / "plain.onnx", tmp_path / MODEL, scheme, x[:100])
        ours = Session(tmp_path / MODEL).answers(x)
        if scheme.reduced or not scheme.static:
            assert (ours - theirs).abs().mean() < 0.05 * theirs.abs().mean()


def test_numbers_beyond_half_floats_are_refused(run: Path, tmp_path: Path):
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    with torch.no_grad():
        module[1].weight[0, 0] = 1e6
    write_onnx(module, torch.randn(2, 1, 8, 8), cards.read(run / "model")[0], tmp_path / "plain.onnx")
    with pytest.raises(InputError, match="has values beyond those of half floats"):
        halve(tmp_path / "plain.onnx", tmp_path / MODEL)


def test_what_cannot_be_exported_is_one_sentence(run: Path, tmp_path: Path):
    with pytest.raises(InputError, match=r"target 'tensorrt-fp16' is not built in yet"):
        export(run, "tensorrt-fp16", tmp_path / "out")
    with pytest.raises(InputError, match=r"target 'onnx-int4' is unknown"):
        export(run, "onnx-int4", tmp_path / "out")
    (tmp_path / "there").mkdir()
    with pytest.raises(InputError, match="exists already"):
        export(run, "onnx", tmp_path / "there")
    private = fedkeel.Job(name="ward", rounds=1).with_settings(
        ["data.clients=3", "data.partition=iid", "data.holdout=0.3", 'model.private=["head.*"]', "model.build=mlp"]
    )
    own = fedkeel.run(private, tmp_path / "own", with_report=False).path
    with pytest.raises(InputError, match="clients keep layers of this model"):
        export(own, "onnx", tmp_path / "out")
    assert not (tmp_path / "out").exists()

    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if float(x.sum()) > 0 else -x

    with pytest.raises(InputError, match="this model has no ONNX graph"):
        write_onnx(Odd(), torch.randn(2, 3), cards.read(run / "model")[0], tmp_path / MODEL)
    (tmp_path / MODEL).write_bytes(b"no model")
    with pytest.raises(InputError, match="is not loaded by ONNX Runtime"):
        Session(tmp_path / MODEL)


def test_an_export_that_breaks_leaves_nothing(run: Path, tmp_path: Path):
    def broken(text: str) -> None:
        if text == "latency":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(run, "onnx", tmp_path / "out", watch=broken)
    assert list(tmp_path.iterdir()) == []


def test_parity_is_what_it_says():
    theirs = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    ours = torch.tensor([[1.5, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    found = measure.parity(ours, theirs, torch.tensor([0, 1, 1, 1]), True)
    assert (found.examples, found.most, found.mean) == (4, 1.0, 2.5 / 8)
    assert (found.agreement, found.accuracy, found.reference, found.lost) == (0.75, 0.5, 0.75, 0.25)
    numbers = measure.parity(ours[:, 0], theirs[:, 0], torch.zeros(4), False)
    assert (numbers.agreement, numbers.lost) == (None, None)
