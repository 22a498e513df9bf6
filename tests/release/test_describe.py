"""What a run, a card, a file or a module's factory tells of a model; and `fedkeel model` on top of it."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

import fedkeel
from fedkeel.cli import app
from fedkeel.core.errors import InputError
from fedkeel.release.compare import compare
from fedkeel.release.describe import describe
from fedkeel.release.difference import Level
from fedkeel.ship import card

FACTORY = """
from torch import nn

def net():
    return nn.Sequential(nn.Linear(64, 200), nn.ReLU(), nn.Linear(200, 10))

def wider():
    return nn.Sequential(nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 10))

def broken():
    raise RuntimeError("no such thing")

def no_module():
    return 3
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    job = fedkeel.Job(name="a", rounds=1).with_settings(["model.version=1.2.0", "data.clients=4"])
    return fedkeel.run(job, tmp_path_factory.mktemp("runs") / "a").path


def carded(run: Path, place: Path, **changes: object) -> Path:
    """The run's model with a changed card, whole by its own digest."""
    made, named = card.read(run / "model")
    card.write(place, made.model_copy(update=changes), named)
    return place


def dense(path: Path, *, opset: int = 17, prefix: str = "", classes: int = 3, op: str = "Relu") -> Path:
    """A layer and its activation in ONNX."""
    rng = np.random.default_rng(0)
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", f"{prefix}w"], [f"{prefix}h"]),
            helper.make_node(op, [f"{prefix}h"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", classes])],
        [numpy_helper.from_array(rng.normal(size=(4, classes)).astype(np.float32), f"{prefix}w")],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    onnx.save(made, str(path))
    return path


class TestDescribe:
    def test_all_forms_of_one_model_are_identical(self, run: Path, tmp_path: Path):
        _, named = card.read(run / "model")
        save_file(named, tmp_path / "a.safetensors", metadata={"by": "another"})
        backwards = dict(reversed(named.items()))
        torch.save(backwards, tmp_path / "a.pt")
        torch.save({"state_dict": backwards, "epoch": 3}, tmp_path / "b.ckpt")
        torch.save(backwards, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
        forms = [run, run / "model", run / "model" / "card.json", run / "model" / "model.safetensors"]
        forms += [tmp_path / name for name in ("a.safetensors", "a.pt", "b.ckpt", "old.pth")]
        told = [describe(str(form)) for form in forms]
        for one in told:
            assert compare(told[0], one).level == Level.IDENTICAL
            assert one.weights == told[0].weights

    def test_a_card_tells_what_is_asked_of_it(self, run: Path):
        made = describe(str(run))
        assert made.version == "1.2.0"
        assert made.labels == tuple("0123456789")
        assert made.inputs is not None
        assert (made.inputs[0].shape, made.inputs[0].low) == ((1, 8, 8), 0.0)
        assert made.outputs == (card.Outputs(shape=(10,), dtype="float32"),)
        assert made.network == "mlp(hidden=(200, 200))"
        written = card.read(run / "model")[0]
        assert set(written.lineage.data) == {"train", "test"}
        accuracy = fedkeel.Run(run).final("accuracy")
        assert accuracy is not None
        assert written.metrics["global"]["accuracy"] == accuracy["value"]

    def test_a_factory_tells_its_tensors(self, tmp_path: Path):
        (tmp_path / "nets.py").write_text(FACTORY)
        net, wider = (describe(f"{tmp_path}/nets.py:{name}") for name in ("net", "wider"))
        assert compare(net, net).level == Level.IDENTICAL
        kinds = {one.kind for one in compare(net, wider).differences}
        assert kinds == {"parameter_shape"}
        torch.save(nn.Sequential(nn.Linear(64, 200), nn.ReLU(), nn.Linear(200, 10)).state_dict(), tmp_path / "n.pt")
        assert compare(net, describe(str(tmp_path / "n.pt"))).level == Level.IDENTICAL

    def test_batchnorms_counter_is_no_difference_to_a_card(self, run: Path, tmp_path: Path):
        _, named = card.read(run / "model")
        torch.save(named | {"bn.num_batches_tracked": torch.tensor(3)}, tmp_path / "a.pt")
        torch.save(named | {"bn.num_batches_tracked": torch.tensor(4)}, tmp_path / "b.pt")
        told = [describe(str(path)) for path in (run, tmp_path / "a.pt", tmp_path / "b.pt")]
        assert compare(told[0], told[1]).level == compare(told[1], told[0]).level == Level.IDENTICAL
        assert compare(told[1], told[2]).level == Level.PATCH

    @pytest.mark.parametrize(
        ("change", "kinds", "level"),
        [
            ({}, set(), Level.IDENTICAL),
            ({"prefix": "renamed_"}, set(), Level.IDENTICAL),
            ({"op": "Tanh"}, {"network"}, Level.PATCH),
            ({"opset": 21}, {"needs_more"}, Level.MAJOR),
            ({"opset": 13}, {"needs_less"}, Level.PATCH),
            ({"classes": 4}, {"output_shape", "network", "weights"}, Level.MAJOR),
        ],
    )
    def test_onnx(self, tmp_path: Path, change: dict[str, object], kinds: set[str], level: Level):
        found = compare(
            describe(str(dense(tmp_path / "a.onnx"))),
            describe(str(dense(tmp_path / "b.onnx", **change))),  # type: ignore[arg-type]
        )
        assert {one.kind for one in found.differences} == kinds
        assert found.level == level

    def test_what_is_no_model_is_refused_with_a_sentence(self, run: Path, tmp_path: Path):
        (tmp_path / "nets.py").write_text(FACTORY)
        (tmp_path / "bad.py").write_text("import nothing_of_this_name")
        (tmp_path / "evil.pt").write_bytes(pickle.dumps({"a": subprocess.Popen}))
        torch.save({"w": torch.zeros(2), "opt": {"lr": 3}}, tmp_path / "odd.pt")
        torch.save([1, 2], tmp_path / "list.pt")
        (tmp_path / "cut.safetensors").write_bytes((run / "model/model.safetensors").read_bytes()[:-9])
        (tmp_path / "a.onnx").write_bytes(b"nothing")
        (tmp_path / "text.txt").write_text("x")
        (tmp_path / "card.json").write_bytes(b"\xff\xfe")
        cases = ["nets.py:broken", "nets.py:no_module", "nets.py:missing", "none.py:f", "bad.py:f", "evil.pt", "odd.pt"]
        cases += ["list.pt", "cut.safetensors", "a.onnx", "text.txt", "card.json", "missing", "."]
        for case in cases:
            with pytest.raises(InputError) as caught:
                describe(f"{tmp_path}/{case}")
            assert "\n" not in str(caught.value)
            assert ": " in str(caught.value)

    @settings(max_examples=60, deadline=None)
    @given(at=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), name=st.sampled_from(["card.json", "model"]))
    def test_one_bit_changed_in_card_or_model_is_refused(
        self, run: Path, tmp_path_factory: pytest.TempPathFactory, at: float, bit: int, name: str
    ):
        place = tmp_path_factory.mktemp("m")
        for file in ("card.json", "model.safetensors"):
            (place / file).write_bytes((run / "model" / file).read_bytes())
        path = place / ("card.json" if name == "card.json" else "model.safetensors")
        data = bytearray(path.read_bytes())
        data[int(at * len(data))] ^= 1 << bit
        path.write_bytes(data)
        try:
            told = describe(str(place))
        except InputError:
            return
        # Bytes that carry nothing, as the padding of a header: then nothing that is told has changed.
        assert compare(told, describe(str(run))).level == Level.IDENTICAL


class TestCommand:
    def call(self, *arguments: str) -> tuple[int, str]:
        found = CliRunner().invoke(app, ["model", *arguments])
        assert found.exception is None or isinstance(found.exception, SystemExit)
        return found.exit_code, found.output

    def test_diff_in_words_and_json(self, run: Path, tmp_path: Path):
        other = carded(run, tmp_path / "m", labels=tuple("1023456789"), version="1.2.1")
        code, text = self.call("diff", str(run), str(other))
        assert code == 0
        assert text.startswith("major: ")
        assert "output 0 was '0' and is '1'" in text
        assert "declare 2.0.0 or later" in text
        code, text = self.call("diff", str(run), str(other), "--json")
        found = json.loads(text)
        assert (code, found["level"], found["least_version"]) == (0, "major", "2.0.0")
        assert found["differences"][0]["kind"] == "labels_reordered"

    def test_check_passes_what_is_declared(self, run: Path, tmp_path: Path):
        labels = tuple("1023456789")
        assert self.call("check", str(run), "--against", str(run))[0] == 0
        for version, code in (("1.2.1", 1), ("1.3.0", 1), ("2.0.0", 0), ("1.1.0", 1)):
            other = carded(run, tmp_path / version, labels=labels, version=version)
            found, text = self.call("check", str(other), "--against", str(run))
            assert found == code, text
            assert ("refused: " in text) is bool(code)
        assert self.call("check", str(other), "--against", str(run), "--at-most", "minor")[0] == 1
        major = carded(run, tmp_path / "m", labels=labels, version="2.0.0")
        code, text = self.call("check", str(major), "--against", str(run), "--at-most", "minor", "--json")
        assert (code, json.loads(text)["passed"]) == (1, False)

    def test_without_versions_a_break_is_refused(self, tmp_path: Path):
        (tmp_path / "nets.py").write_text(FACTORY)
        net, wider = f"{tmp_path}/nets.py:net", f"{tmp_path}/nets.py:wider"
        assert self.call("check", net, "--against", net)[0] == 0
        code, text = self.call("check", wider, "--against", net)
        assert code == 1
        assert "at most minor is let through" in text

    def test_bad_input_is_one_sentence_and_code_2(self, tmp_path: Path):
        for arguments in (["diff", "a", "b"], ["check", "a", "--against", "b", "--at-most", "huge"], ["check", "a"]):
            done = subprocess.run(
                [sys.executable, "-m", "fedkeel", "model", *arguments], cwd=tmp_path, capture_output=True, text=True
            )
            assert done.returncode == 2
            assert done.stderr.count("\n") == 1
            assert "Traceback" not in done.stderr
