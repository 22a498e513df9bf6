"""Jobs whose updates are added up under masks: as without them, robust across groups, and what it can not do."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import fedkeel
from fedkeel.core.errors import InputError, RunError
from fedkeel.core.keys import Key
from fedkeel.core.registry import parse
from fedkeel.core.types import Claims, ClientMemory
from fedkeel.round import secure
from fedkeel.round.secure import Secure
from fedkeel.secagg.groups import GroupSum
from fedkeel.secagg.simulate import plain_sum
from fedkeel.secagg.terms import ProtocolError, Terms
from fedkeel.world.federation import Federation

BASE: dict[str, Any] = {
    "name": "sums",
    "rounds": 4,
    "data": {"clients": 12},
    "train": {"stopping": "steps(steps=5)", "backend": "loop", "workers": 1},
    "aggregate": {"weigh": ["examples(cap=30)"]},
    "secagg": {"size": 4},
}


def run(path: Path, **sections: Any) -> fedkeel.Run:
    values = {**BASE, **sections}
    return fedkeel.run(fedkeel.Job(**{k: v for k, v in values.items() if v is not None}), path, with_report=False)


def test_the_mean_under_masks_is_the_mean(tmp_path):
    masked, plain = run(tmp_path / "a"), run(tmp_path / "b", secagg=None)
    assert torch.allclose(masked.state.theta, plain.state.theta, atol=1e-5)
    assert [row["weight"] for row in masked.updates] == pytest.approx([row["weight"] for row in plain.updates])
    assert all(row["norm"] is None and row["cosine"] is None for row in masked.updates)


def test_noise_goes_on_the_same_sum_with_and_without_masks(tmp_path):
    sections = {"privacy": {"mechanism": "central(norm=0.2, noise=0.5)", "insecure_reproducible_noise": True}}
    masked, plain = run(tmp_path / "a", **sections), run(tmp_path / "b", **sections, secagg=None)
    # Both cut to the noise's own grid, 2^30 units to the norm.
    assert torch.allclose(masked.state.theta, plain.state.theta, atol=1e-7)
    assert masked.rounds[-1]["epsilon"] == plain.rounds[-1]["epsilon"]


def test_a_norm_that_moves_moves_under_masks_as_well(tmp_path):
    sections = {
        "data": {"clients": 60},
        "privacy": {"mechanism": "adaptive(norm=0.1, noise=0.5)", "insecure_reproducible_noise": True},
    }
    masked, plain = run(tmp_path / "a", **sections), run(tmp_path / "b", **sections, secagg=None)
    assert torch.allclose(masked.state.theta, plain.state.theta, atol=1e-6)
    norms = [float(done.state.control["privacy/norm"]) for done in (masked, plain)]
    assert norms[0] == norms[1] != pytest.approx(0.1)


def test_the_median_of_groups_bears_a_hostile_client_and_the_mean_does_not(tmp_path):
    data = {"clients": 20, "partition": "iid"}
    sections = {"data": data, "rounds": 12, "attack": {"rule": "sign_flip(scale=30.0)", "clients": 1}}
    mean = run(tmp_path / "mean", **sections)
    robust = run(tmp_path / "median", **sections, aggregate={**BASE["aggregate"], "reduce": "median"})
    honest = run(tmp_path / "honest", **{**sections, "attack": {}})
    found = [done.final()["value"] for done in (mean, robust, honest)]
    assert found[0] < 0.3
    assert found[1] > found[2] - 0.1
    assert found[2] > 0.6


def test_weighers_that_compare_rows_see_groups_and_the_others_clients(tmp_path):
    sections = {"data": {"clients": 24}, "rounds": 1, "attack": {"rule": "sign_flip(scale=30.0)", "clients": 1}}
    done = run(tmp_path / "run", **sections, aggregate={"weigh": ["examples(cap=30)", "multi_krum(f=1)"]})
    (bad,) = Federation.of(done.job).adversary.clients
    weights = {row["client"]: row["weight"] for row in done.updates}
    refused = [row for row in done.updates if row["stage"] == "weigh"]
    assert len(refused) in (4, 8)
    assert weights[bad] == 0
    counts = {row["client"]: min(row["num_examples"], 30) for row in done.updates}
    used = [client for client, weight in weights.items() if weight]
    shares = {client: counts[client] / sum(counts[c] for c in used) for client in used}
    assert {client: weights[client] for client in used} == pytest.approx(shares)


def test_a_screen_of_sums_refuses_all_of_a_group_with_the_reason(tmp_path):
    sections = {"data": {"clients": 24}, "rounds": 1, "attack": {"rule": "sign_flip(scale=30.0)", "clients": 1}}
    done = run(tmp_path / "run", **sections, aggregate={**BASE["aggregate"], "screens": ["norm_mad"]})
    refused = [row for row in done.updates if row["stage"] == "screen"]
    assert len(refused) == 4
    assert all(row["reason"].startswith("the sum of its group of 4 was refused: ") for row in refused)
    assert sum(row["weight"] for row in done.updates) == pytest.approx(1)
    assert all(row["weight"] == 0 for row in refused)


def test_a_row_beyond_all_bounds_costs_its_group_and_no_other(tmp_path):
    sections = {"rounds": 1, "attack": {"rule": "sign_flip(scale=1e9)", "clients": 1}}
    done = run(tmp_path / "run", **sections)
    lost = [row for row in done.updates if row["stage"] == "sum"]
    assert len(lost) == 4
    assert {row["reason"] for row in lost} == {
        "the sum of its group of 4 is lost: the sum is longer than 4 rows of norm 100.0 come to"
    } or "beyond what 4 rows" in lost[0]["reason"]
    assert done.rounds[0]["skipped"] is None


def test_values_that_are_no_numbers_never_enter_a_sum():
    memory, grid = ClientMemory(), Secure(4, 10.0).grid(10.0)
    row = torch.tensor([1.0, math.nan, -math.inf])
    with pytest.raises(ValueError, match="not finite"):
        secure.hold(row, 1.0, grid, "a", memory)
    secure.hold(row, 1.0, grid, "a", memory, honest=False)  # words that a hostile client may choose
    words = secure.take("a", memory).view("<i4")
    assert words[1] == 0
    assert words[2] < -(2**29)


def test_too_few_for_a_group_skip_the_round_with_the_reason(tmp_path):
    devices = {"classes": {"frail": {"dropout": 0.9}}}
    done = run(tmp_path / "run", devices=devices, rounds=6)
    skipped = [row["skipped"] for row in done.rounds if row["skipped"]]
    assert any("too few to add up under masks" in why for why in skipped)


def test_a_resumed_run_is_the_unbroken_one(tmp_path):
    whole = run(tmp_path / "whole", aggregate={**BASE["aggregate"], "reduce": "median"}, record={"checkpoint_every": 1})

    class EnoughError(Exception):
        pass

    def stop(progress: Any) -> None:
        if progress.round == 2:
            raise EnoughError

    with pytest.raises(EnoughError):
        fedkeel.run(whole.job, tmp_path / "half", watch=stop, with_report=False)
    resumed = fedkeel.resume(tmp_path / "half", with_report=False)
    assert torch.equal(resumed.state.theta, whole.state.theta)
    assert resumed.updates == whole.updates


def test_bytes_are_those_of_the_messages(tmp_path):
    done = run(tmp_path / "run", rounds=1)
    columns = done.state.theta.numel()
    per_client = {(row["bytes_up"], row["bytes_down"]) for row in done.updates}
    for up, down in per_client:
        assert 4 * columns < up < 4 * columns + 3000
        assert 4 * columns < down < 4 * columns + 3000


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"schedule": {"rule": "fedbuff(buffer=6)"}}, "who is late has nobody to add up with; write sync or semi_sync"),
        ({"aggregate": {"weigh": ["equal"], "checks": ["norm_bound(limit=3)"]}}, "it looks at single updates"),
        ({"aggregate": {"weigh": ["examples"]}}, "write examples(cap=100), say, or equal"),
        (
            {"aggregate": {"weigh": ["krum(f=1)"]}},
            "weigher 'krum(f=1)' needs at least 5 rows, but secagg.size = 4 makes 3",
        ),
        ({"aggregate": {"weigh": ["foolsgold"]}}, "it keeps something of each client's updates; leave it out"),
        ({"aggregate": {"weigh": ["equal"], "mix": ["fednova"]}}, "it goes by each client's update and steps"),
        ({"train": {"corrections": ["scaffold"]}}, "correction 'scaffold'"),
        ({"record": {"contribution": "leave_one_out"}, "server": {"examples": 50}}, "record.contribution = "),
        ({"schedule": {"interval": "agreement"}, "train": {"stopping": "budget(steps=5)"}}, "schedule.interval = "),
        ({"client": {"codec": "int8"}}, "a masked row can not be made smaller; leave them out"),
        ({"secagg": {"size": 30}}, "secagg.size = 30 needs 21 clients to the end, and 12 take part in a round"),
        ({"secagg": {"size": 2}}, "secagg.size"),
        ({"secagg": {"norm": 3.0}}, "set secagg.size"),
        ({"aggregate": {"weigh": ["equal"], "reduce": "trimmed_mean(trim=2)"}}, "makes 3 sums of 12 updates"),
        ({"privacy": {"mechanism": "local(norm=1.0, noise=1.0)"}, "aggregate": {"weigh": ["equal"]}}, "leave out one"),
        (
            {"privacy": {"mechanism": "central(norm=1.0, noise=1.0)"}, "secagg": {"size": 4, "norm": 2.0}},
            "leave out secagg.norm",
        ),
        ({"data": {"clients": 12, "pooled": True}}, "leave out secagg.size"),
        ({"data": {"clients": 12, "holdout": 0.2}, "model": {"private": ["*"]}}, "secagg"),
    ],
)
def test_what_needs_a_single_update_is_refused_with_the_remedy(sections, said):
    with pytest.raises(InputError) as refused:
        Federation.of(fedkeel.Job(**{**BASE, **sections}))
    assert said in str(refused.value)


# -- the arithmetic


def claim(client: str, examples: int) -> Claims:
    return Claims(client, 0, 0, "", examples, 5)


def test_a_row_is_given_once_and_a_session_is_the_jobs_own():
    rule, memory = Secure(4, 10.0), ClientMemory()
    secure.hold(torch.ones(3), 1.0, rule.grid(10.0), "a", memory)
    secure.take("a", memory)
    with pytest.raises(RunError, match="no row to add"):
        secure.take("a", memory)
    (terms,) = rule.terms(list("abcd"), 3, Key(1))
    rule.check(terms, 3)
    for other in (
        Terms.drawn("abcd", 3, threshold=4),
        Terms.drawn("ab", 3),
        Terms.drawn("abcd", 4),
        Terms.drawn("abcd", 3, bits=64),
        Terms.drawn("abcd", 3, signed=True),
        Terms.drawn("abcdef", 3, degree=2, threshold=2),
    ):
        with pytest.raises(ProtocolError, match=r"secagg\.size = 4"):
            rule.check(other, 3)


def test_means_of_groups_are_weighed_by_their_survivors():
    rule = Secure(3, 50.0)
    groups = rule.terms(list("abcdef"), 2, Key(3))
    rows = {client: torch.tensor([i + 1.0, -2.0 * i]) for i, client in enumerate("abcdef")}
    counts = dict(zip("abcdef", (10, 20, 30, 40, 50, 60), strict=True))
    weighers = (parse("weigher", "examples(cap=40)"),)
    weights = {client: secure.weight_of(weighers, claim(client, counts[client])) for client in rows}
    assert weights == {client: min(count, 40) / 40 for client, count in counts.items()}
    memory, grid, words = ClientMemory(), rule.grid(rule.norm), {}
    for client, row in rows.items():
        secure.hold(row, weights[client], grid, client, memory)
        words[client] = secure.take(client, memory)
    sums = [plain_sum(terms, words, {}) for terms in groups]
    found = secure.means(groups, sums, weights, grid)
    for mean, weight, members in zip(found.rows, found.weights, found.members, strict=True):
        expected = sum(weights[c] * rows[c] for c in members) / sum(weights[c] for c in members)
        assert torch.allclose(mean, expected, atol=1e-6)
        assert float(weight) == pytest.approx(math.fsum(weights[c] for c in members))
    assert found.lost == {}
    one = groups[0].members[0]
    assert plain_sum(groups[0], words, {one: "rows"}).total is None  # three are needed of a group of three
    lost = secure.means(groups, [GroupSum((), None, "why"), sums[1]], weights, grid)
    assert lost.members == (sums[1].survivors,)
    assert set(lost.lost) == set(groups[0].members)
    assert "is lost: why" in lost.lost[one]


def test_sums_wrap_and_noise_on_them_wraps_alike():
    """One client's words must not change what another's row does to what is released, whatever they are."""
    rule = Secure(3, 1.0, noised=True)
    (terms,) = rule.terms(list("abc"), 2, Key(0))
    memory, grid, words = ClientMemory(), rule.grid(1.0), {}
    for client, row in zip("abc", (torch.tensor([0.6, -0.2]), torch.tensor([0.1, 0.1]), torch.zeros(2)), strict=True):
        secure.hold(row, 1.0, grid, client, memory)
        words[client] = secure.take(client, memory)
    words["c"] = words["c"] + (2**63 - 2**29)  # at the edge: the others' rows take the sum over it
    with_a = secure.total((terms,), [plain_sum(terms, words, {})], 2).rows[0]
    words["a"] = words["a"] * 0
    without = secure.total((terms,), [plain_sum(terms, words, {})], 2).rows[0]
    noise = torch.tensor([12345, -(2**40)])
    moved = (with_a + noise) - (without + noise)
    assert torch.allclose(moved.double() * grid.unit, torch.tensor([0.6, -0.2]).double(), atol=1e-7)


def test_weighers_without_a_bound_are_known():
    assert secure.most(parse("weigher", "examples")) == math.inf
    assert secure.most(parse("weigher", "equal")) == 1.0
