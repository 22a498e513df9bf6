"""The server's own examples, marks, attackers that ask the server, and the choice of rules, in whole runs."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import hypergeom

import fedkeel
from fedkeel import Job, build
from fedkeel.core.errors import InputError
from fedkeel.core.keys import Key
from fedkeel.core.types import ClientMemory
from fedkeel.train import ServerExamples, evaluate
from fedkeel.world.composition import choose, heterogeneity, hostile_in_cohort
from fedkeel.world.federation import Federation
from fedkeel.world.pool import keep_back

SMALL = {
    "rounds": 8,
    "data": {"clients": 15, "partition": "dirichlet(alpha=1.0)"},
    "model": {"build": "mlp(hidden=(32,))"},
    "train": {"batch_size": 10, "lr": 0.1, "workers": 1},
    "record": {"evaluate_every": 8},
    "server": {"examples": 100},
}
LEARNED = {"screens": ("norm_mad",), "weigh": ("learned",), "reduce": "weighted_trimmed_mean"}


def ended(tmp_path, name: str = "run", **changes) -> fedkeel.Run:
    return fedkeel.run(Job(**{**SMALL, **changes}), tmp_path / name, with_report=False)


def accuracy(run: fedkeel.Run, name: str = "accuracy") -> float:
    row = run.final(name)
    assert row is not None
    return row["value"]


@pytest.fixture(scope="module")
def federation() -> Federation:
    return Federation.of(Job(**SMALL))


def test_the_servers_examples_are_taken_from_the_clients_evenly_over_the_labels(federation):
    pool = Federation.of(Job(**{**SMALL, "server": {}})).pool
    rest, own = keep_back(pool, 100, Key.root(0))
    assert (len(own), len(rest)) == (100, len(pool) - 100)
    counts, whole = torch.bincount(own.y), torch.bincount(pool.y).double()
    assert float((counts - whole * 100 / len(pool)).abs().max()) <= 1
    assert torch.equal(torch.bincount(own.y) + torch.bincount(rest.y), torch.bincount(pool.y))
    assert len(federation.data.x) == len(rest)
    with pytest.raises(InputError, match="ask for fewer"):
        keep_back(pool, len(pool), Key.root(0))


def test_a_referee_judges_as_evaluation_does_and_its_gradient_is_autograds(federation):
    referee, theta = federation.referee, federation.theta()
    assert isinstance(referee, ServerExamples)
    data = referee._data
    models = [theta, theta + 0.01]
    found = referee.judge(models)
    for loss, share, model in zip(found.loss, found.accuracy, models, strict=True):
        args = (data.x, data.y, data.prepare, federation.work.loss)
        wanted = evaluate(federation.module, federation.layout, model, *args)
        assert float(loss) == pytest.approx(wanted["loss"], rel=1e-6)
        assert float(share) == wanted["accuracy"]
    g, direction = referee.gradient(theta), torch.randn(theta.numel(), generator=Key.root(1).torch())
    direction /= direction.norm()
    step = 1e-2
    ahead, behind = referee.judge([theta + step * direction, theta - step * direction]).loss.tolist()
    assert float(g @ direction) == pytest.approx((ahead - behind) / (2 * step), abs=2e-3 * float(g.norm()))


def test_a_referees_update_is_what_a_client_would_send_and_leaves_no_trace(federation):
    referee, theta = federation.referee, federation.theta()
    assert referee is not None
    before = torch.get_rng_state()
    first = referee.update(theta, Key.root(3))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first, referee.update(theta, Key.root(3)))
    assert not torch.equal(first, referee.update(theta, Key.root(4)))
    after, now = referee.judge([theta + first, theta]).loss.tolist()
    assert after < now


def test_dropout_and_batch_norm_do_not_disturb_a_referee():
    job = Job(**{**SMALL, "model": {"build": "cnn"}})
    federation = Federation.of(job)
    referee, theta = federation.referee, federation.theta()
    assert referee is not None
    assert torch.equal(referee.gradient(theta), referee.gradient(theta))


@pytest.mark.parametrize("attack", ["sign_flip(scale=3.0)", "ipm(scale=2.0)", "min_max"])
def test_learned_weights_withstand_two_fifths(tmp_path, attack):
    changes = {"rounds": 20, "record": {"evaluate_every": 20}, "attack": {"rule": attack, "clients": 6}}
    plain, ours = ended(tmp_path, "plain", **changes), ended(tmp_path, "ours", **changes, aggregate=LEARNED)
    assert accuracy(ours) > 0.75
    assert accuracy(ours) > accuracy(plain) + 0.05
    trust = {h: [u["trust"] for u in ours.updates if u["hostile"] == h and u["trust"] is not None] for h in (0, 1)}
    assert sum(trust[1]) / len(trust[1]) < 0.3 < 1 < sum(trust[0]) / len(trust[0])


def test_a_backdoors_success_is_measured_and_a_trim_takes_it_away(tmp_path):
    marked = {"attack": {"rule": "backdoor + replacement(boost=2.0)", "clients": 3}}
    plain, ours = ended(tmp_path, "plain", **marked), ended(tmp_path, "ours", **marked, aggregate=LEARNED)
    assert accuracy(plain, "backdoor") > 0.5
    assert accuracy(ours, "backdoor") < accuracy(plain, "backdoor") / 2
    assert ended(tmp_path, "clean").final("backdoor") is None


SEEN: list[torch.Tensor] = []


@fedkeel.rule("attack", traits=("rows", "adaptive"))
def curious(U, bad, keys, aggregate):
    """Sends its own rows, and asks what will come of them (tests)."""
    SEEN.append(aggregate(U))
    return U[bad]


@pytest.mark.parametrize("aggregate", [LEARNED, {"weigh": ("multi_krum(f=3)",), "mix": ("bucketing",)}])
def test_what_an_adaptive_attacker_is_told_is_what_the_server_then_does(tmp_path, aggregate):
    SEEN.clear()
    run = ended(tmp_path, aggregate=aggregate, rounds=2, attack={"rule": "curious", "clients": 3})
    moved = run.state.theta - Federation.of(Job(**SMALL)).theta()
    assert len(SEEN) == 2
    assert torch.allclose(moved, SEEN[0] + SEEN[1], atol=1e-7)


@fedkeel.rule("contribution", traits=("server_data",))
def broken(cohort, w, state):
    """Raises (tests)."""
    raise ValueError("oops")


def test_a_contribution_that_fails_costs_its_figures_and_nothing_else(tmp_path, caplog):
    run = ended(tmp_path, rounds=2, record={"contribution": "broken"})
    plain = ended(tmp_path, "plain", rounds=2)
    assert torch.equal(run.state.theta, plain.state.theta)
    assert "contribution 'broken' failed in round 1: oops" in caplog.text


def test_what_clients_were_worth_is_recorded_and_finds_the_free_riders(tmp_path):
    run = ended(
        tmp_path,
        rounds=4,
        attack={"rule": "free_rider", "clients": 3},
        record={"contribution": "gtg_shapley(orders=5)"},
    )
    worth: dict[str, float] = {}
    for update in run.updates:
        worth[update["client"]] = worth.get(update["client"], 0.0) + update["contribution"]
    riders = {u["client"] for u in run.updates if u["hostile"]}
    assert (
        set(sorted(worth, key=lambda c: abs(worth[c]))[:5]) >= riders
        or max(worth[c] for c in riders) < sorted(worth.values())[5]
    )


def test_clients_tell_their_label_shares_only_if_the_job_says_so(tmp_path):
    job = Job(**{**SMALL, "client": {"labels": True}})
    memory, noise = ClientMemory(), {**SMALL, "client": {"labels": True, "label_noise": 5.0}}
    exact, noisy = Federation.of(job).label_shares(ClientMemory()), Federation.of(Job(**noise)).label_shares(memory)
    assert Federation.of(Job(**SMALL)).label_shares(ClientMemory()) == {}
    assert noisy == Federation.of(Job(**noise)).label_shares(memory)  # drawn once, and remembered
    assert noisy != Federation.of(Job(**noise)).label_shares(ClientMemory())  # and not from the seed
    assert len(exact) == 15
    assert all(sum(shares) == pytest.approx(1) and len(shares) == 10 for shares in (*exact.values(), *noisy.values()))
    assert exact != noisy
    trusting = ended(tmp_path, client={"labels": True}, aggregate={"weigh": ("trust",)})
    assert accuracy(trusting) > 0.3


@fedkeel.rule("source")
def lines(key: Key) -> fedkeel.Pool:
    """A regression (tests)."""
    x = torch.randn(90, 3, generator=key.torch())
    return fedkeel.Pool.from_arrays(x, x.sum(1, keepdim=True))


@fedkeel.rule("model")
def line(inputs: tuple[int, ...], classes: int) -> torch.nn.Module:
    """A straight line (tests)."""
    return torch.nn.Linear(inputs[0], 1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"server": {}, "aggregate": LEARNED}, "server's own examples, but it has none: set server.examples"),
        ({"server": {}, "record": {"contribution": "leave_one_out"}}, "it has none: set server.examples"),
        ({"server": {"examples": 9999}}, "server.examples: 9999 examples are asked for"),
        ({"model": {"build": "mlp", "private": ("head.*",)}, "data": {"holdout": 0.2}}, "private layers"),
        ({"aggregate": {"reduce": "auto", "mix": ("nnm(f=1)",)}}, "'auto' chooses aggregate.mix itself"),
        ({"aggregate": {"reduce": "auto", "hostile": 8}}, "no rule withstands half or more"),
        ({"attack": {"rule": "backdoor + nope", "clients": 1}}, "attack.rule: attack 'nope' is unknown"),
        ({"attack": {"rule": "sign_flip +", "clients": 1}}, "attack.rule: attack '' cannot be read"),
        ({"aggregate": {"hostile": 3}}, "is for aggregate.reduce = 'auto' alone"),
        ({"aggregate": {"reduce": "auto", "hostile": 99}}, "more than data.clients = 15"),
        (
            {
                "server": {},
                "model": {"build": "mlp", "private": ("head.*",)},
                "data": {"holdout": 0.2},
                "attack": {"rule": "backdoor", "clients": 1},
            },
            "measured on the common model",
        ),
        (
            {
                "data": {"source": "lines", "clients": 3},
                "model": {"build": "line", "loss": "mse"},
                "server": {},
                "attack": {"rule": "backdoor", "clients": 1},
            },
            "needs one class label per example",
        ),
    ],
)
def test_what_can_not_be_is_said_before_anything_is_trained(tmp_path, changes, words):
    with pytest.raises(InputError, match=words.replace("(", r"\(")):
        ended(tmp_path, **changes)
    assert not (tmp_path / "run").exists()


def test_auto_chooses_by_what_is_known_and_says_why(tmp_path):
    with_data, why = choose(Job(**{**SMALL, "aggregate": "auto"}))
    assert (with_data.weigh, with_data.reduce) == (("learned",), "weighted_trimmed_mean(share=0.2)")
    assert why.startswith("3 of 15 updates a round may be hostile: the server's own 100 examples")
    job = Job(**{**SMALL, "server": {}, "aggregate": "auto"})
    skewed, alike = torch.diag(torch.full((10,), 50)), torch.full((15, 10), 20)
    assert (heterogeneity(skewed), heterogeneity(alike)) == (pytest.approx(0.9), 0.0)
    unknown, why = choose(job)
    assert unknown.mix == ("nnm(f=3)",)
    mixed, why = choose(job, skewed)
    assert (mixed.mix, mixed.reduce) == (("nnm(f=3)",), "trimmed_mean(trim=3)")
    assert "label shares are 90% apart" in why
    plain, why = choose(job, alike)
    assert (plain.mix, plain.reduce) == ((), "trimmed_mean(trim=3)")
    trusting, _ = choose(job.with_settings(["aggregate.hostile=0"]), skewed)
    assert trusting.reduce == "mean"
    wary, _ = choose(Job(**{**SMALL, "aggregate": {"reduce": "auto", "hostile": 7}}))
    assert wary.weigh == ("learned",)
    assert job.with_settings(["aggregate=auto"]).aggregate.reduce == "auto"
    run = ended(tmp_path, aggregate="auto", rounds=2)
    assert run.job.aggregate.reduce == "auto"
    with run.dir.ledger(readonly=True) as ledger:
        meta = ledger.meta
    assert ["weigh", "learned(keep=0.5, steps=20, memory=0.5)"] in meta["plan"]
    assert meta["auto"].startswith("3 of 15")
    assert "chosen by <code>auto</code>" in run.report().read_text()


def test_a_sampled_cohort_allows_for_what_comes_in_all_rounds_but_for_a_thousandth():
    assert hostile_in_cohort(20, 100, 100, 30) == 20
    assert hostile_in_cohort(1, 100, 10, 30) == 1
    f = hostile_in_cohort(10, 100, 20, 30)
    assert 30 * hypergeom.sf(f, 100, 10, 20) <= 1e-3 < 30 * hypergeom.sf(f - 1, 100, 10, 20)


def test_marks_lie_in_the_last_corner_or_the_last_features():
    rule = build("attack", "backdoor", share=1.0, size=2, target=99)
    x, y = rule(torch.zeros(2, 6, 6) + torch.arange(2).view(2, 1, 1), torch.zeros(2, dtype=torch.int64), 4, Key.root(0))
    assert torch.nonzero(x[0]).tolist() == [[3, 3], [3, 4], [4, 3], [4, 4]]
    assert y.tolist() == [3, 3]
    flat, _ = rule(
        torch.tensor([[1.0, 2.0, 3.0, 4.0], [9.0, 0.0, 0.0, 0.0]]), torch.zeros(2, dtype=torch.int64), 4, Key.root(0)
    )
    assert flat.tolist() == [[1.0, 2.0, 9.0, 9.0], [9.0, 0.0, 9.0, 9.0]]
