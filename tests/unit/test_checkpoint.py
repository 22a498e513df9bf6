"""A checkpoint gives back exactly what it was given, or is refused in one sentence."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedkeel.core.errors import InputError, RunError
from fedkeel.core.layout import Layout
from fedkeel.core.types import ClientMemory, ServerState
from fedkeel.ship import card, checkpoint, tensors
from fedkeel.ship.checkpoint import fingerprint

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


def state(round: int = 10, columns: int = 7) -> ServerState:
    theta = torch.linspace(-1, 1, columns)
    theta[0] = -0.0
    return ServerState(
        theta, version=round - 1, round=round, opt={"momentum": theta * 3}, control={"c/deep": theta + 1},
        trust={"a": [0.1 + 0.2, None]}, privacy={"epsilon": 1e-300},
    )  # fmt: skip


def memory() -> ClientMemory:
    held = ClientMemory()
    held.keep("ward/3 ü <script>", {"c": torch.ones(7), "residual/x": torch.zeros(7)})
    held.keep("", {"c": torch.full((7,), 1e-45)})
    return held


def bits(named: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {k: v.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for k, v in named.items()}


def test_everything_comes_back_bit_for_bit(tmp_path):
    path = checkpoint.save(tmp_path, state(), memory(), {"clock": 0.1 + 0.2, "queue": ["a"]}, layout_digest="d")
    assert path.name == "round-000010.safetensors"
    back, held, extra, _ = checkpoint.load(path, layout_digest="d")
    want = state()
    assert bits({"theta": back.theta}) == bits({"theta": want.theta})
    assert bits(dict(back.opt)) == bits(dict(want.opt))
    assert bits(dict(back.control)) == bits(dict(want.control))
    assert (back.version, back.round, back.trust, back.privacy) == (9, 10, want.trust, want.privacy)
    assert extra == {"clock": 0.1 + 0.2, "queue": ["a"]}
    pairs = list(zip(held.items(), memory().items(), strict=True))
    assert [got[:2] for got, _ in pairs] == [wanted[:2] for _, wanted in pairs]
    assert all(bits({"": got[2]}) == bits({"": wanted[2]}) for got, wanted in pairs)


def test_what_was_loaded_outlives_its_file(tmp_path):
    path = checkpoint.save(tmp_path, state(), memory(), {})
    back, *_ = checkpoint.load(path)
    path.write_bytes(b"")
    assert torch.equal(back.theta, state().theta)
    back.theta.add_(1)


def test_the_same_content_is_the_same_file_and_any_reader_reads_it(tmp_path):
    (tmp_path / "b").mkdir()
    first = checkpoint.save(tmp_path, state(), memory(), {"a": 1, "b": 2})
    second = checkpoint.save(tmp_path / "b", state(), memory(), {"b": 2, "a": 1})
    assert first.read_bytes() == second.read_bytes()
    assert torch.equal(safetensors.torch.load_file(first)["theta"], state().theta)


def test_aliased_strided_and_gradient_tensors_are_written_by_value(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    odd = ServerState(base.t()[1], opt={"same": base.t()[1], "grad": torch.ones(3, requires_grad=True)})
    back, *_ = checkpoint.load(checkpoint.save(tmp_path, odd, ClientMemory(), {}))
    assert back.theta.tolist() == back.opt["same"].tolist() == [1.0, 5.0, 9.0]
    assert back.opt["grad"].tolist() == [1.0, 1.0, 1.0]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 255))
def test_any_damaged_byte_is_refused(tmp_path_factory, place, flip):
    path = checkpoint.save(tmp_path_factory.mktemp("damage"), state(), memory(), {"a": 1})
    content = bytearray(path.read_bytes())
    content[place % len(content)] ^= flip
    path.write_bytes(content)
    try:
        back, _, extra, _ = checkpoint.load(path)
    except InputError:
        return
    # A blank of the header became another blank.
    assert bits({"theta": back.theta}) == bits({"theta": state().theta})
    assert (back.round, extra) == (10, {"a": 1})


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2000))
def test_any_torn_file_is_refused(tmp_path_factory, length):
    path = checkpoint.save(tmp_path_factory.mktemp("torn"), state(), memory(), {})
    path.write_bytes(path.read_bytes()[:length][:-1])
    with pytest.raises(InputError):
        checkpoint.load(path)


def test_other_files_and_other_models_are_refused(tmp_path):
    safetensors.torch.save_file({"theta": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="not written by fedkeel"):
        checkpoint.load(tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="cannot be read"):
        checkpoint.load(tmp_path / "missing.safetensors")
    path = checkpoint.save(tmp_path, state(), ClientMemory(), {}, layout_digest="mine")
    with pytest.raises(InputError, match="another layout"):
        checkpoint.load(path, layout_digest="theirs")
    with pytest.raises(InputError, match="complex64"):
        checkpoint.save(tmp_path, ServerState(torch.zeros(3, dtype=torch.complex64)), ClientMemory(), {})


def test_latest_passes_over_a_torn_file_and_says_so(tmp_path, caplog):
    assert checkpoint.latest(tmp_path) is None
    assert checkpoint.latest(tmp_path / "missing") is None
    paths = [checkpoint.save(tmp_path, state(r), ClientMemory(), {}) for r in (2, 999_999, 1_000_000)]
    assert checkpoint.latest(tmp_path) == paths[2]
    paths[2].write_bytes(paths[2].read_bytes()[:-1])
    assert checkpoint.latest(tmp_path) == paths[1]
    assert "round-1000000.safetensors cannot be read" in caplog.text


def test_prune_keeps_the_newest_and_sweeps_what_a_kill_left(tmp_path):
    for number in range(8, 12):
        checkpoint.save(tmp_path, state(number), ClientMemory(), {})
    (tmp_path / "round-000012.safetensors.part").write_bytes(b"half")
    (tmp_path / "notes.txt").touch()
    checkpoint.prune(tmp_path, keep=2)
    left = sorted(p.name for p in tmp_path.iterdir())
    assert left == ["notes.txt", "round-000010.safetensors", "round-000011.safetensors"]


def test_a_missing_directory_is_a_sentence(tmp_path):
    with pytest.raises(RunError, match="create the directory again; there is no checkpoint yet"):
        checkpoint.save(tmp_path / "gone", state(), ClientMemory(), {})


class TestFingerprint:
    def test_it_is_of_the_content_not_of_the_order_or_the_strides(self):
        a, b = torch.arange(6.0).reshape(2, 3), torch.ones(2)
        assert fingerprint({"a": a, "b": b}) == fingerprint({"b": b, "a": a.t().contiguous().t()})

    def test_it_follows_its_definition(self):
        head = b'["w","F32",[2]]'
        data = len(head).to_bytes(8, "little") + head + bytes.fromhex("0000803f00000040")
        assert fingerprint({"w": torch.tensor([1.0, 2.0])}) == hashlib.sha256(data).hexdigest()

    @pytest.mark.parametrize(
        "other",
        [
            {"v": torch.zeros(2, 3)},
            {"w": torch.zeros(3, 2)},
            {"w": torch.zeros(2, 3, dtype=torch.int32)},
            {"w": -torch.zeros(2, 3)},
            {"w": torch.zeros(2, 3), "x": torch.zeros(0)},
            {},
        ],
    )
    def test_name_shape_dtype_and_every_bit_count(self, other):
        assert fingerprint(other) != fingerprint({"w": torch.zeros(2, 3)})

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3)])
    def test_every_dtype_and_shape_is_written_and_read(self, tmp_path, dtype, shape):
        named = {"odd": torch.ones(shape, dtype=dtype), "byte": torch.ones(3, dtype=torch.uint8)}
        tensors.write(tmp_path / "x.safetensors", named, {})
        back, _ = tensors.read(tmp_path / "x.safetensors")
        assert fingerprint(back) == fingerprint(named)
        assert back["odd"].dtype == dtype


class TestCard:
    def write(self, directory: Path, version: str = "1.0.0") -> tuple[nn.Module, card.ModelCard]:
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2).to(torch.bfloat16))
        layout = Layout.of(module)
        theta = layout.flatten(module)[layout.shared]
        named = card.stored(layout, theta)
        made = card.ModelCard(
            version=version,
            parameters=card.described(named),
            layout_digest=layout.digest,
            inputs=(card.Inputs(shape=(3,), dtype="float32", normalisation="(x - 0) / 16"),),
            outputs=(card.Outputs(shape=(2,), dtype="float32"),),
            labels=("no", "yes"),
            preprocessing="0" * 64,
            network="mlp",
            lineage=card.Lineage(job="x", rounds=5, recipe="mean", fingerprint=fingerprint(named)),
        )
        card.write(directory, made, named)
        return module, made

    def test_the_model_comes_back_with_its_card(self, tmp_path):
        module, made = self.write(tmp_path / "model")
        back, named = card.read(tmp_path / "model")
        assert back == made
        assert back.digest == made.digest
        assert {k: v.dtype for k, v in named.items()} == {
            k: v.dtype for k, v in module.state_dict().items() if v.is_floating_point()
        }
        other = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2).to(torch.bfloat16))
        other.load_state_dict(named, strict=False)
        assert fingerprint(other.state_dict()) == fingerprint(module.state_dict())

    def test_its_json_is_canonical_and_a_changed_card_is_refused(self, tmp_path):
        _, made = self.write(tmp_path / "model")
        text = (tmp_path / "model" / "card.json").read_text()
        assert card.ModelCard.from_json(text).to_json() == text == made.to_json()
        assert list(json.loads(text)) == sorted(json.loads(text))
        with pytest.raises(InputError, match="changed after"):
            card.ModelCard.from_json(text.replace('"yes"', '"maybe"'))
        for broken in ("", "[]", "{}", text[:-10], text.replace('"format": 3', '"format": 4')):
            with pytest.raises(InputError):
                card.ModelCard.from_json(broken)

    def test_a_card_beside_another_model_is_refused(self, tmp_path):
        self.write(tmp_path / "model")
        tensors.write(tmp_path / "model" / "model.safetensors", {"w": torch.zeros(3)}, {})
        with pytest.raises(InputError, match="do not belong together"):
            card.read(tmp_path / "model")
        with pytest.raises(InputError, match="cannot be read"):
            card.read(tmp_path / "missing")

    @pytest.mark.parametrize("version", ["1", "1.0", "v1.0.0", "1.0.0 ", "01.0.0", "1.0.0\n", "1.0.0-01"])
    def test_only_semantic_versions(self, tmp_path, version):
        with pytest.raises(InputError, match="semantic version"):
            self.write(tmp_path / "model", version)
