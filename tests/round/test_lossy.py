"""Every scheduler over a network that loses, doubles, delays and reorders half of its messages: the run ends, moves the
model, counts no update twice, and everything is in the ledger."""

from __future__ import annotations

import heapq
import itertools
import random
from collections import Counter

import pytest
import torch
from helpers import answer, make_coordinator, make_layout, make_plan
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkeel.core.registry import names
from fedkeel.core.types import RoundReport
from fedkeel.round.coordinator import Done, Record, Train, Wait
from fedkeel.ship.ledger import Ledger

LAYOUT = make_layout()
CLIENTS = tuple("abcdefgh")
SCHEDULES = {
    "sync": "sync",
    "semi_sync": "semi_sync(deadline=6.0, over=0.5, late='use')",
    "fedbuff": "fedbuff(buffer=3)",
    "fedasync": "fedasync",
}
NOTICED = 9.0
"""Seconds until the transport gives up on a client."""


def length(report: RoundReport) -> float:
    """What staleness left of the step: the mean of the factors, every update having the same number of examples."""
    factors = [(1 + row.staleness) ** -0.5 for row in report.clients if row.refusal is None]
    return 0.0 if report.skipped else sum(factors) / len(factors)


def test_every_scheduler_is_here() -> None:
    assert set(SCHEDULES) == {name for name in names("scheduler") if not name.endswith("_for_tests")}


@pytest.mark.parametrize("schedule", SCHEDULES)
@given(
    seed=st.integers(0, 10**6),
    lost=st.floats(0, 0.5),
    doubled=st.floats(0, 0.5),
    dropped=st.floats(0, 0.5),
)
@settings(max_examples=25, deadline=None)
def test_a_bad_network_costs_updates_and_nothing_else(tmp_path_factory, schedule, seed, lost, doubled, dropped) -> None:
    draw = random.Random(seed)
    plan = make_plan(5, schedule=SCHEDULES[schedule], weigh=("examples", "staleness"))
    rounds = 15
    coordinator = make_coordinator(plan, CLIENTS, rounds)
    ticks = itertools.count()
    events: list[tuple[float, int, str, object]] = []
    given_out: list[Train] = []
    reports, over, now = [], False, 0.0

    def carry_out(commands: list[object]) -> None:
        nonlocal over
        for command in commands:
            if isinstance(command, Train):
                given_out.append(command)
                if draw.random() < dropped:  # it never answers, and the transport says so in the end
                    heapq.heappush(events, (now + NOTICED, next(ticks), "failure", command))
                else:
                    took = draw.expovariate(0.5)
                    row = torch.tensor([1.0, draw.random(), draw.random()])
                    message = command.client, answer(plan, LAYOUT, command, row), command
                    copies = 1 + (draw.random() < doubled)
                    for _ in range(copies):  # each on its own way: they overtake one another
                        heapq.heappush(events, (now + took + draw.expovariate(0.3), next(ticks), "message", message))
                    heapq.heappush(events, (now + took + NOTICED, next(ticks), "failure", command))
            elif isinstance(command, Wait):
                heapq.heappush(events, (command.until, next(ticks), "tick", None))
            elif isinstance(command, Record):
                reports.append(command.report)
            over |= isinstance(command, Done)

    carry_out(coordinator.start(now))
    steps = 0
    while not over:
        steps += 1
        assert events, "nothing will happen any more, and the run is not over"
        assert steps < 20_000
        now, _, kind, what = heapq.heappop(events)
        if kind == "tick":
            carry_out(coordinator.on_tick(now))
        elif kind == "failure":
            carry_out(coordinator.on_failure(what.client, what.task, "no answer", now))
        elif draw.random() >= lost:
            client, data, _ = what
            carry_out(coordinator.on_message(client, data, now))

    assert [r.round for r in reports] == list(range(1, rounds + 1))
    assert coordinator.server.state.version >= rounds // 3, "progress is made"
    used = [row for r in reports for row in r.clients if row.refusal is None]
    assert len(used) <= len(given_out)
    # Each task ends exactly once: used, refused, failed, or given up.
    ends = Counter(row.client for r in reports for row in r.clients if row.seconds is not None)
    assert ends == Counter(order.client for order in given_out)
    # The first column of every update is 1: the model is as far as the lengths of the steps say.
    assert coordinator.server.state.theta[0].item() == pytest.approx(sum(length(r) for r in reports), rel=1e-4)
    with Ledger(tmp_path_factory.mktemp("lossy") / "ledger.sqlite") as ledger:
        for report in reports:
            ledger.write_round(report)
        assert len(ledger.updates()) == sum(len(r.clients) for r in reports)
        assert sum(row["stage"] is None for row in ledger.updates()) == len(used)
