"""Codecs between client and server: rows come in, what is not finite is refused, a name fits into an envelope."""

from __future__ import annotations

import hashlib

import pytest
import torch
from helpers import answer, make_coordinator, make_plan
from torch import nn

import fedkeel
from fedkeel.core.keys import Key
from fedkeel.core.layout import Layout
from fedkeel.core.registry import build, names, parse
from fedkeel.core.types import Claims
from fedkeel.round import wire
from fedkeel.round.coordinator import Record, Train

LAYOUT = Layout.of(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 9)))


def texts() -> list[str]:
    built_in = [n for n in names("codec") if n != "layered" and not n.endswith("for_tests")]
    return [*built_in, "layered(layers={'*.bias': 'float32', '0': 'int4'}, rest='top_k(share=0.2)')"]


def round_of(codec: str, rows: torch.Tensor, sent_as: str | None = None):
    """One round of three clients; the first answers by the codec `sent_as`."""
    plan = make_plan(codec=codec)
    coordinator = make_coordinator(plan, ("a", "b", "c"), 1, LAYOUT)
    commands = coordinator.start(0.0)
    for order, row in zip([c for c in commands if isinstance(c, Train)], rows, strict=True):
        by = make_plan(codec=sent_as) if sent_as and order.client == "a" else plan
        commands += coordinator.on_message(order.client, answer(by, LAYOUT, order, row), 0.0)
    return coordinator.server, next(c.report for c in commands if isinstance(c, Record))


@pytest.mark.parametrize("codec", texts())
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_is_refused_behind_every_codec(codec, value):
    rows = torch.randn(3, LAYOUT.columns, generator=torch.Generator().manual_seed(0))
    rows[0, 17] = value
    server, report = round_of(codec, rows)
    assert {c: r.rule for c, r in report.refused.items()} == {"a": "finite"}
    assert bool(torch.isfinite(server.state.theta).all())
    decoder = parse("codec", codec)(LAYOUT)
    bound = sum(decoder.error(row) for row in rows[1:]) / 2
    gap = (server.state.theta - rows[1:].mean(0)).abs()
    assert bool((gap <= bound + 1e-6).all())


@pytest.mark.parametrize("codec", texts())
def test_zstd_may_follow_every_codec(codec):
    rule, row = parse("codec", codec), torch.linspace(-1, 1, LAYOUT.columns)
    name, built = wire.built(rule, LAYOUT)
    (payload,) = built.encode(row[None], [Key.root(0)])
    claims, whole = Claims("a", 0, 0, LAYOUT.digest, 1, 1), []
    for level in (0, 3):
        out = torch.empty(LAYOUT.columns)
        wire.open_payload(wire.read(wire.seal(claims, name, payload, level)), name, built, out)
        whole.append(out)
    assert torch.equal(*whole)


def test_another_codec_than_the_federations_is_refused():
    rows = torch.randn(3, LAYOUT.columns, generator=torch.Generator().manual_seed(0))
    _, report = round_of("int8", rows, "int8(per='row')")
    assert "encoded with 'int8(per='row'" in report.refused["a"].reason


def test_the_name_of_a_long_codec_fits_into_an_envelope():
    layers = {f"*{'.' * (i % 2)}weight{'*' * i}": "float16" for i in range(20)}
    rule = build("codec", "layered", layers=layers)
    assert len(repr(rule)) > wire.MAX_NAME
    name, _ = wire.built(rule, LAYOUT)
    assert name == f"layered {hashlib.sha256(repr(rule).encode()).hexdigest()}"
    rows = torch.ones(3, LAYOUT.columns)
    server, report = round_of(repr(rule), rows)
    assert not report.refused
    assert len(server.state.theta) == LAYOUT.columns
    _, report = round_of(repr(rule), rows, repr(build("codec", "layered", layers={**layers, "*bias": "int4"})))
    assert "encoded with 'layered" in report.refused["a"].reason


@pytest.mark.parametrize("codec", ["int8", "top_k(share=0.1, values='int8')", "adaptive(ratio=20)"])
def test_a_federation_goes_on_few_bytes_and_again_the_same(codec, tmp_path):
    job = {
        "rounds": 6,
        "data": {"clients": 6, "partition": "iid"},
        "train": {"backend": "loop"},
        "client": {"codec": codec},
    }
    first, again = (fedkeel.run(fedkeel.Job(**job), tmp_path / n, with_report=False) for n in "ab")
    assert torch.equal(first.state.theta, again.state.theta)
    whole = fedkeel.run(fedkeel.Job(**{**job, "client": {}}), tmp_path / "c", with_report=False)
    sizes = [sum(row["bytes_up"] for row in one.rounds) for one in (first, whole)]
    assert sizes[0] < sizes[1] / 3
    assert not any(row["skipped"] for row in first.rounds)
    assert torch.isfinite(first.state.theta).all()
    assert first.final()["value"] > 0.3
