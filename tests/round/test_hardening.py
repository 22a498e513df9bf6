"""What a reviewer broke once: hostile buffers, rules that raise, refusals of a round that is skipped."""

from __future__ import annotations

import pytest
import torch
from helpers import answer, make_coordinator, make_layout, make_plan, make_server
from torch import nn

import fedkeel
from fedkeel.core.layout import Layout
from fedkeel.core.registry import RegistrationError, parse
from fedkeel.round.coordinator import Record, Train
from fedkeel.round.rows import RowStore

LAYOUT = make_layout()
NAMES = tuple("abcdefg")


def round_of(plan, rows, layout=LAYOUT):
    """One round in which client i answers with rows[i]."""
    coordinator = make_coordinator(plan, NAMES[: len(rows)], 1, layout)
    commands = coordinator.start(0.0)
    for order, row in zip([c for c in commands if isinstance(c, Train)], rows, strict=True):
        commands += coordinator.on_message(order.client, answer(plan, layout, order, row), 0.0)
    return coordinator.server, next(c.report for c in commands if isinstance(c, Record))


def test_hostile_buffers_are_measured_and_outvoted():
    layout = Layout.of(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)))
    rows = 0.1 * torch.randn(7, layout.columns, generator=torch.Generator().manual_seed(0))
    rows[0] = rows[1:].mean(0)
    rows[0, layout.params.stop :] = -1e6
    server, report = round_of(make_plan(7, weigh=("krum(f=1)",)), rows, layout)
    assert report.refused["a"].rule == "krum"
    assert server.state.theta.abs().max() < 1
    _, report = round_of(make_plan(7, checks=("finite", "norm_bound(limit=10.0)")), rows, layout)
    assert report.refused["a"].rule == "norm_bound"


@fedkeel.rule("screen")
def everyone_for_tests(cohort, state, *, spare: int = 0):
    """Refuse all rows but the last `spare` (tests)."""
    return dict.fromkeys(range(len(cohort) - spare), ("looks odd", 1.5))


@fedkeel.rule("reducer", traits=("unweighted",))
def raising_for_tests(U, w, *, shape: bool = False):
    """Raise, or give the wrong shape (tests)."""
    if shape:
        return U.sum()
    raise KeyError("oops")


@fedkeel.rule("weigher")
def negative_for_tests(cohort, state):
    """Give weights below 0 (tests)."""
    return -torch.ones(len(cohort), dtype=torch.float64)


@fedkeel.rule("scheduler")
def idle_for_tests(view, *, wake: float | None = None):
    """Start, then never close (tests)."""
    return fedkeel.Decision(start=view.cohort if view.started == 0 else 0, wake=wake)


@fedkeel.rule("selector")
def odd_for_tests(candidates, count, round, key, *, how: str):
    """Choose nobody, a stranger, one twice, too many, or no positions (tests)."""
    return {"nobody": (), "stranger": (len(candidates),), "twice": (0, 0), "many": (0, 1, 2), "names": ("a",)}[how]


def test_refusals_of_a_skipped_round_are_kept():
    plan = make_plan(3, screens=(parse("screen", "everyone_for_tests"),))
    _, report = round_of(plan, torch.ones(3, 3))
    assert report.skipped == "no update was left after screening"
    assert [(row.refusal.rule, row.refusal.score) for row in report.clients] == [("everyone_for_tests", 1.5)] * 3
    plan = make_plan(3, screens=(parse("screen", "everyone_for_tests(spare=1)"),), reduce="trimmed_mean(trim=1)")
    _, report = round_of(plan, torch.ones(3, 3))
    assert "trimmed_mean" in report.skipped
    assert len(report.refused) == 2


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"reduce": "raising_for_tests"}, "a rule raised KeyError: 'oops'"),
        ({"reduce": "raising_for_tests(shape=True)"}, "gave shape ()"),
        ({"weigh": ("negative_for_tests",)}, "numbers of 0 or more"),
    ],
)
def test_a_users_rule_that_goes_wrong_costs_the_round_and_keeps_the_model(extra, said):
    server, report = round_of(make_plan(3, **extra), torch.ones(3, 3))
    assert said in report.skipped
    assert server.state.version == 0


@pytest.mark.parametrize("wake", ["None", "-1.0"])
def test_a_scheduler_that_can_not_end_a_round_is_told_so(wake):
    coordinator = make_coordinator(make_plan(2, schedule=f"idle_for_tests(wake={wake})"), "ab", 1)

    def drive():
        for order in [c for c in coordinator.start(0.0) if isinstance(c, Train)]:
            coordinator.on_failure(order.client, order.task, "lost", 1.0)

    with pytest.raises(fedkeel.RunError, match="neither starts, closes nor waits"):
        drive()


@pytest.mark.parametrize("how", ["nobody", "stranger", "twice", "many", "names"])
def test_a_selector_must_choose_free_clients_once(how):
    plan = make_plan(2)
    object.__setattr__(plan, "select", parse("selector", f"odd_for_tests(how='{how}')"))
    with pytest.raises(fedkeel.RunError, match="positions of free clients, once each"):
        make_coordinator(plan, "abc", 1).start(0.0)


def test_the_version_is_the_servers_word():
    plan = make_plan(1, checks=())
    server = make_server(plan)
    task = server.give("a")
    order = Train("a", task, 1, 10**6, None)
    assert "it was given 0" in server.offer("a", answer(plan, LAYOUT, order, torch.ones(3))).reason


def test_strangers_cost_one_line():
    server = make_server(make_plan(2))
    for i in range(500):
        server.offer(f"stranger-{i}", b"junk")
    rows = server.close(0.0, skip="test").clients
    assert len(rows) < 120
    assert sum(int(r.refusal.reason.split()[0]) if r.refusal.rule == "flood" else 1 for r in rows) == 500


def test_an_attack_must_say_what_it_acts_on():
    with pytest.raises(RegistrationError, match="'rows', 'claims', 'data'"):

        @fedkeel.rule("attack")
        def vague(U, bad, keys):
            """Do something (tests)."""


def test_a_store_that_overflows_keeps_every_row_and_its_order():
    generator = torch.Generator().manual_seed(0)
    for trial in range(200):
        first = int(torch.randint(0, 9, (), generator=generator))
        store = RowStore(3, 2, first)
        for _ in range(2):
            tasks = [first + int(t) for t in torch.randperm(8, generator=generator)[: 1 + trial % 8]]
            kept = [task for task in tasks if (task + trial) % 3]
            for task in tasks:
                row = store.slot(task)
                row.fill_(task)
                if task in kept:
                    store.admit(task)
            assert store.in_order()[:, 0].tolist() == sorted(map(float, kept))
            first += 8
            store.clear(first)
