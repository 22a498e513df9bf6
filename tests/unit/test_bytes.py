"""Bytes both ways: error feedback, the coded way down, and what the ledger says of them."""

from __future__ import annotations

import pytest
import torch
import zstandard
from torch import nn

import fedkeel
from fedkeel.config import Job
from fedkeel.core.errors import InputError
from fedkeel.core.keys import Key
from fedkeel.core.layout import Layout
from fedkeel.core.registry import parse
from fedkeel.core.types import Claims, ClientMemory
from fedkeel.round import device, wire
from fedkeel.round.downlink import Downlink
from fedkeel.world.federation import Federation, build_plan

LAYOUT = Layout.of(nn.Sequential(nn.Linear(20, 10), nn.Linear(10, 3)))


def job(**sections) -> Job:
    values = {
        "rounds": 6,
        "data": {"clients": 8, "partition": "dirichlet(alpha=1.0)"},
        "model": {"build": "mlp(hidden=(16,))"},
        "train": {"workers": 1},
        "record": {"checkpoint_every": 2},
    }
    return Job(
        **{**values, **{k: {**values.get(k, {}), **v} if isinstance(v, dict) else v for k, v in sections.items()}}
    )


def claims(task: int, client: str = "a") -> Claims:
    return Claims(client, task, 0, LAYOUT.digest, 1, 1)


@pytest.mark.parametrize(
    "codec", ["top_k(share=0.05, values='int8')", "int4", "sign", "random_k(share=0.2, scaled=False)"]
)
def test_with_error_feedback_all_that_was_meant_arrives_sooner_or_later(codec):
    """What arrived plus what is still owed is what was sent, client by client."""
    plan = build_plan(job(client={"codec": codec, "error_feedback": True}))
    _, built = wire.built(plan.codec, LAYOUT)
    memory, P = ClientMemory(), LAYOUT.columns
    sent, arrived = torch.zeros(2, P), torch.zeros(2, P)
    for task in range(30):
        rows = torch.randn(2, P, generator=Key.root(task).torch())
        told = [claims(task, name) for name in "ab"]
        messages = device.send(rows, [Key.root(task).fold(n) for n in "ab"], told, memory, plan, LAYOUT)
        for i, message in enumerate(messages):
            out = torch.empty(P)
            wire.open_payload(wire.read(message), repr(plan.codec), built, out)
            arrived[i] += out
        sent += rows
    owed = torch.stack([memory.of(name)["residual"] for name in "ab"])
    torch.testing.assert_close(arrived + owed, sent, atol=1e-4, rtol=1e-4)
    assert float(owed.norm()) < 0.8 * float(sent.norm()) * 5


def test_a_row_that_is_not_finite_leaves_nothing_behind():
    plan = build_plan(job(client={"codec": "top_k(share=0.1)", "error_feedback": True}))
    memory = ClientMemory()
    good = torch.randn(1, LAYOUT.columns, generator=Key.root(0).torch())
    device.send(good, [Key.root(0)], [claims(0)], memory, plan, LAYOUT)
    owed = memory.of("a")["residual"].clone()
    device.send(good * torch.nan, [Key.root(1)], [claims(1)], memory, plan, LAYOUT)
    assert torch.equal(memory.of("a")["residual"], owed)


@pytest.mark.parametrize(
    ("client", "words"),
    [
        ({"codec": "float32"}, "has nothing to add: 'float32' loses nothing"),
        ({"codec": "random_k(share=0.01)"}, "client.error_feedback adds what .*random_k: scaled=False"),
    ],
)
def test_error_feedback_that_could_only_do_harm_is_refused(client, words):
    with pytest.raises(InputError, match=words):
        Federation.of(job(client={**client, "error_feedback": True}))


@pytest.mark.parametrize(
    ("server", "words"),
    [
        ({"codec": "random_k(share=0.05)"}, "server.codec adds what .*random_k: scaled=False"),
        ({"zstd": 3}, "server.zstd = 3 packs the steps of server.codec, and there are none"),
    ],
)
def test_a_way_down_that_could_not_work_is_refused(server, words):
    with pytest.raises(InputError, match=words):
        Federation.of(job(server=server))


def test_error_feedback_learns_where_the_same_codec_without_it_does_not(tmp_path):
    given = {"rounds": 30, "data": {"clients": 8, "partition": "iid"}, "model": {"build": "logistic"}}
    client = {"codec": "top_k(share=0.01, values='sign')"}
    found = {
        name: fedkeel.run(job(**given, client={**client, **more}), tmp_path / name, with_report=False).final()["value"]
        for name, more in {"without": {}, "with": {"error_feedback": True}}.items()
    }
    assert found["with"] > found["without"] + 0.1, found


def test_everybody_with_a_version_has_the_same_model_whichever_way_it_came():
    """A client that was sent every step, one that was sent the whole model late, and the server's own copy."""
    rule = parse("codec", "int8")
    _, codec = wire.built(rule, LAYOUT)
    theta = torch.randn(LAYOUT.columns, generator=Key.root(1).torch())
    downlink = Downlink(rule, 0, LAYOUT, theta, {})
    client = theta.clone()
    for version in range(1, 20):
        theta = theta + 0.1 * torch.randn(LAYOUT.columns, generator=Key.root(version + 1).torch())
        key = Key.root(7).fold(version)
        (payload,) = codec.encode((theta - downlink.theta(theta))[None], [key])  # what the wire would carry
        downlink.publish(theta, key)
        step = torch.empty_like(client)
        codec.decode(memoryview(payload), step)
        client = client + step
        assert torch.equal(client, downlink.theta(theta))
        assert downlink.bytes(version - 1, version) == len(payload)
    assert float((theta - client).abs().max()) < 0.01, "what is lost goes into the next step: it does not pile up"
    full = 4 * LAYOUT.columns
    assert downlink.bytes(-1, 19) == full
    assert downlink.bytes(19, 19) == 0
    assert downlink.bytes(17, 19) == 2 * len(payload)
    assert downlink.bytes(0, 19) == full, "nineteen steps are more than the model"
    again = Downlink(rule, 0, LAYOUT, theta, downlink.state())
    assert torch.equal(again.theta(theta), client)
    assert again.bytes(17, 19) == 2 * len(payload)


def test_the_ledger_counts_what_went_down(tmp_path):
    done = fedkeel.run(job(server={"codec": "int8"}, rounds=4), tmp_path / "run", with_report=False)
    columns = Federation.of(done.job).layout.columns
    first, *later = done.rounds
    assert first["bytes_down"] == 8 * 4 * columns  # nobody has it yet
    assert all(8 * columns < row["bytes_down"] < 8 * (columns + 200) for row in later)
    plain = fedkeel.run(job(rounds=4), tmp_path / "plain", with_report=False)
    assert all(row["bytes_down"] == 8 * 4 * columns for row in plain.rounds)
    assert abs(done.final()["value"] - plain.final()["value"]) < 0.03
    assert ["publish", "int8(per='tensor', stochastic=True)"] in [
        list(step) for step in Federation.of(done.job).plan.steps
    ]


@pytest.mark.parametrize("schedule", ["sync", "fedbuff(buffer=3)"])
def test_a_federation_of_few_bytes_resumes_bit_for_bit(tmp_path, schedule):
    sections = {
        "rounds": 7,
        "schedule": {"rule": schedule},
        "devices": {"profile": "reference"},
        "client": {"codec": "adaptive(ratio=20)", "error_feedback": True, "zstd": 3},
        "server": {"codec": "top_k(share=0.2, values='int8')", "zstd": 3},
        "train": {"corrections": ("scaffold",)},
        "aggregate": {"weigh": ("examples", "staleness")},
    }
    whole = fedkeel.run(job(**sections), tmp_path / "whole", with_report=False)

    def stop(progress):
        if progress.round == 5:
            raise KeyboardInterrupt

    with pytest.raises(fedkeel.InterruptedRunError):
        fedkeel.run(job(**sections), tmp_path / "broken", watch=stop, with_report=False)
    resumed = fedkeel.resume(tmp_path / "broken", with_report=False)
    assert torch.equal(resumed.state.theta, whole.state.theta)
    assert torch.equal(resumed.state.downlink["theta"], whole.state.downlink["theta"])
    assert resumed.updates == whole.updates


@pytest.mark.parametrize("rule", ["int8", "top_k(share=0.01)", "sign"])
@pytest.mark.parametrize("zstd", [0, 3])
def test_the_steps_down_lead_from_any_version_to_the_newest_bit_for_bit(rule: str, zstd: int) -> None:
    layout = Layout.of(torch.nn.Linear(99, 10))
    theta = torch.randn(layout.columns, generator=Key.root(1).torch())
    way = Downlink(fedkeel.parse("codec", rule), zstd, layout, theta, {})
    codec = wire.built(fedkeel.parse("codec", rule), layout)[1]
    known = [way.theta(theta)]
    for version in range(1, 9):
        theta = theta + torch.randn(layout.columns, generator=Key.root(version).torch())
        way.publish(theta, Key.root(version))
        known.append(way.theta(theta))
    sent = 0
    for have in range(-1, 9):
        steps = way.steps(have, 8)
        size = way.bytes(have, 8)
        assert (steps is None) == (size == 4 * layout.columns)
        if steps is not None:
            sent += 1
            assert sum(map(len, steps)) == size
            found = known[have].clone()
            for packed in steps:
                step = torch.empty_like(found)
                codec.decode(wire.unpacked(packed, bool(zstd), codec.max_bytes(layout.columns)), step)
                found = found + step
            assert torch.equal(found, known[8])
    assert sent >= 3
    fresh = Downlink(fedkeel.parse("codec", rule), zstd, layout, theta, way.state())
    assert fresh.steps(7, 8) is None  # what was sent before a restart is gone


def test_a_step_that_is_a_bomb_is_refused_before_it_is_unpacked() -> None:
    bomb = wire.packed(bytes(10_000_000), 3)
    with pytest.raises(fedkeel.DecodeError, match="10000000"):
        wire.unpacked(bomb, True, 1000)
    with pytest.raises(fedkeel.DecodeError, match="limit is 10"):
        wire.unpacked(bytes(1000), False, 10)
    with pytest.raises(fedkeel.DecodeError, match="zstd"):
        wire.unpacked(b"nothing of the kind", True, 1000)
    endless = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(10_000_000))
    with pytest.raises(fedkeel.DecodeError, match="limit"):
        wire.unpacked(endless, True, 1000)
