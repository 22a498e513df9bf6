"""The coordinator under every order of events: no update counts twice, none is lost in silence, the run ends."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
import torch
from helpers import CHECKS, answer, make_coordinator, make_layout, make_plan
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fedkeel.core.errors import InputError
from fedkeel.core.registry import build
from fedkeel.core.types import Refusal, RoundReport
from fedkeel.round.coordinator import Checkpoint, Command, Done, Evaluate, Record, Sum, Train, Wait
from fedkeel.round.quarantine import Quarantine
from fedkeel.round.secure import Secure
from fedkeel.secagg.simulate import group_sums

LAYOUT = make_layout()
CLIENTS = tuple("abcde")
SCHEDULES = (
    "sync(quorum={quorum})",
    "semi_sync(deadline=5.0, quorum={quorum}, over=0.5)",
    "semi_sync(deadline=5.0, quorum={quorum}, late='use', max_staleness=1)",
    "fedbuff(buffer=3)",
    "fedbuff(buffer=2, max_staleness=1)",
    "fedasync",
)


def shut_out(report: RoundReport) -> set[str]:
    return {c.client for c in report.clients if c.refusal is not None and c.refusal.stage == "quarantine"}


class Federation(RuleBasedStateMachine):
    """Messages are answered, lost, late, doubled, reordered, corrupted; clients fail; time passes."""

    @initialize(
        cohort=st.integers(1, 5),
        schedule=st.sampled_from(SCHEDULES),
        quorum=st.integers(1, 3),
        reduce=st.sampled_from(["mean", "median"]),
        until=st.sampled_from([None, None, 12.0]),
        quarantine=st.sampled_from([None, Quarantine(1.0, 0.4)]),
        secure=st.sampled_from([None, Secure(3, 1e3)]),
        seed=st.integers(0, 99),
    )
    def begin(self, cohort, schedule, quorum, until, reduce, quarantine, secure, seed):
        schedule = schedule.format(quorum=min(quorum, cohort))
        rules: dict[str, object] = {"weigh": ("examples", "staleness"), "quarantine": quarantine}
        if (
            secure is not None
            and cohort >= secure.least
            and schedule.startswith(("sync", "semi"))
            and "use" not in schedule
        ):
            rules |= {"secure": secure, "weigh": ("examples(cap=10)",), "checks": CHECKS[:4]}
        self.plan = make_plan(cohort, schedule=schedule, reduce=reduce, **rules)
        self.summing: Sum | None = None
        self.deadline = 5.0 if "deadline" in schedule or until else None
        self.rounds, self.until = 3, until
        self.coordinator = make_coordinator(self.plan, CLIENTS, self.rounds, until=until or math.inf)
        self.random = random.Random(seed)
        offer = self.coordinator.server.offer

        def watched(*args, **options):
            self.refusal = offer(*args, **options)
            return self.refusal

        self.coordinator.server.offer = watched
        self.now = 0.0
        self.given: list[Train] = []
        self.unanswered: dict[int, Train] = {}
        self.sent: list[tuple[str, bytes, int]] = []  # everything that was ever on the wire: client, bytes, task
        self.admitted: Counter[int] = Counter()
        self.messages = self.spent = 0  # spent: refused messages that ended a task
        self.reports: list[RoundReport] = []
        self.wakes: list[float] = []
        self.over = False
        self.carry_out(self.coordinator.start(self.now))

    def carry_out(self, commands: list[Command]) -> None:
        for command in commands:
            assert not self.over, "a command came after Done"
            match command:
                case Train():
                    self.given.append(command)
                    self.unanswered[command.task] = command
                case Sum():
                    assert self.summing is None
                    self.summing = command
                case Record(report):
                    self.reports.append(report)
                case Wait(until):
                    assert until > self.now
                    self.wakes.append(until)
                case Done():
                    self.over = True
                case Evaluate() | Checkpoint():
                    assert command.round == len(self.reports) + isinstance(command, Evaluate) * (command.round > 0)

    def deliver(self, client: str, data: bytes, task: int | None) -> None:
        over = self.over
        self.refusal = Refusal("late", "end", "nobody looked at it")
        version = self.coordinator.server.state.version
        awaited = self.coordinator.server.awaits(client)
        commands = self.coordinator.on_message(client, data, self.now)
        if over:
            assert commands == []
            assert self.coordinator.server.state.version == version
            return
        self.messages += 1
        if self.refusal is None:
            assert task is not None
            self.admitted[task] += 1
        elif awaited and client not in (c.client for c in commands if isinstance(c, Train)):
            self.spent += not self.coordinator.server.awaits(client)
        elif awaited:
            self.spent += 1  # its refused answer closed the round, and it has work again
        self.carry_out(commands)

    @precondition(lambda self: self.unanswered)
    @rule(data=st.data())
    def answers(self, data):
        task = data.draw(st.sampled_from(sorted(self.unanswered)))
        order = self.unanswered.pop(task)
        row = torch.tensor([float(task), 1.0, float(self.random.random())])
        sealed = answer(self.plan, LAYOUT, order, row)
        self.sent.append((order.client, sealed, task))
        self.deliver(order.client, sealed, task)

    @precondition(lambda self: self.unanswered)
    @rule(data=st.data())
    def answer_is_held_back(self, data):
        task = data.draw(st.sampled_from(sorted(self.unanswered)))
        order = self.unanswered[task]
        self.sent.append((order.client, answer(self.plan, LAYOUT, order, torch.rand(3)), task))

    @precondition(lambda self: self.sent)
    @rule(data=st.data())
    def old_message_comes_again(self, data):
        client, sealed, task = data.draw(st.sampled_from(self.sent))
        if task in self.unanswered and not self.over and self.admitted[task] == 0:
            self.unanswered.pop(task)
        self.deliver(client, sealed, task)

    @precondition(lambda self: self.sent)
    @rule(data=st.data(), thief=st.sampled_from(CLIENTS))
    def message_comes_under_another_name(self, data, thief):
        client, sealed, _ = data.draw(st.sampled_from(self.sent))
        if thief != client:
            self.deliver(thief, sealed, None)

    @rule(client=st.sampled_from([*CLIENTS, "stranger"]), junk=st.binary(max_size=60))
    def junk_comes(self, client, junk):
        self.deliver(client, junk, None)

    @precondition(lambda self: self.sent)
    @rule(data=st.data(), at=st.integers(0, 10_000))
    def message_comes_corrupted(self, data, at):
        client, sealed, _ = data.draw(st.sampled_from(self.sent))
        broken = bytearray(sealed)
        broken[at % len(broken)] ^= 0x40
        self.deliver(client, bytes(broken), None)

    @precondition(lambda self: self.unanswered)
    @rule(data=st.data())
    def client_fails(self, data):
        task = data.draw(st.sampled_from(sorted(self.unanswered)))
        order = self.unanswered.pop(task)  # reported again, or for a task that a refused answer ended: no effect
        self.carry_out(self.coordinator.on_failure(order.client, order.task, "it broke", self.now))

    @precondition(lambda self: self.summing is not None)
    @rule(lost=st.dictionaries(st.sampled_from(CLIENTS), st.sampled_from(["keys", "shares", "rows", "unmask"])))
    def sums_come(self, lost):
        summing, self.summing = self.summing, None
        members = {client for terms in summing.groups for client in terms.members}
        grid = self.plan.secure.grid(self.plan.secure.norm)
        rows = {client: grid.encode(torch.rand(3)) for client in members}
        sums = group_sums(summing.groups, rows, lost, masked=False)
        self.carry_out(self.coordinator.on_sums(sums, self.now))
        assert self.coordinator.on_sums(sums, self.now) == []

    @rule(seconds=st.floats(0.1, 4.0))
    def time_passes(self, seconds):
        self.now += seconds
        self.carry_out(self.coordinator.on_tick(self.now))

    @invariant()
    def no_update_counts_twice(self):
        assert all(count == 1 for task, count in self.admitted.items() if count)

    @invariant()
    def a_round_is_reported_once_and_in_order(self):
        assert [r.round for r in self.reports] == list(range(1, len(self.reports) + 1))
        assert all((r.skipped is None) == any(c.weight > 0 for c in r.clients) for r in self.reports)
        assert self.coordinator.server.state.version == sum(r.skipped is None for r in self.reports)

    @invariant()
    def nothing_used_was_refused(self):
        for report in self.reports:
            for row in report.clients:
                assert row.refusal is None or row.weight == 0
            used = [row.client for row in report.clients if row.refusal is None]
            assert not set(used) & shut_out(report)
            assert len(used) == len(set(used)) or self.plan.max_staleness  # a fast client may fill half a buffer
            if report.skipped is None:
                assert sum(row.weight for row in report.clients) == pytest.approx(1)

    def teardown(self):
        """Whatever happened, failures that the transport reports (or the clock) end the run, with all accounted for."""
        if not hasattr(self, "coordinator"):
            return
        for _ in range(100):
            if self.over:
                break
            if self.summing is not None:
                self.sums_come({})
            for order in list(self.unanswered.values()):
                del self.unanswered[order.task]
                self.carry_out(self.coordinator.on_failure(order.client, order.task, "lost", self.now))
            if self.deadline:
                self.now += self.deadline
                self.carry_out(self.coordinator.on_tick(self.now))
        assert self.over
        assert len(self.reports) == self.rounds or (self.until and self.now >= self.until)
        rows = sum(len(r.clients) - len(shut_out(r)) for r in self.reports)
        more = sum(
            int(row.refusal.reason.split()[0]) - 1
            for r in self.reports
            for row in r.clients
            if row.refusal is not None and row.refusal.rule == "flood"
        )
        refused_messages = self.messages - sum(self.admitted.values())
        # Every task ends once: as an admitted row, a refused answer, a failure, or given up at the close.
        assert rows + more == refused_messages + len(self.given) - self.spent


TestFederation = Federation.TestCase
TestFederation.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def drive(plan, answers, rounds=1, clients=CLIENTS):
    """Run rounds in which each order is answered by `answers(order) -> bytes | None` (None: a failure)."""
    coordinator = make_coordinator(plan, clients, rounds)
    pending, reports, now = coordinator.start(0.0), [], 0.0
    while pending:
        following = []
        for command in pending:
            if isinstance(command, Record):
                reports.append(command.report)
            if isinstance(command, Train):
                data = answers(command)
                if data is None:
                    following += coordinator.on_failure(command.client, command.task, "no answer", now)
                else:
                    following += coordinator.on_message(command.client, data, now)
        pending = following
    return coordinator.server, reports


def test_a_round_is_the_weighted_mean_of_the_answers():
    plan = make_plan(3)
    rows = {"a": torch.tensor([1.0, 0, 0]), "b": torch.tensor([0, 2.0, 0]), "c": torch.tensor([0, 0, 4.0])}
    server, reports = drive(
        plan, lambda o: answer(plan, LAYOUT, o, rows[o.client], examples=1 + (o.client == "c")), clients=CLIENTS[:3]
    )
    assert torch.allclose(server.state.theta, torch.tensor([0.25, 0.5, 2.0]))
    assert [row.weight for row in reports[0].clients] == [0.25, 0.25, 0.5]
    assert [row.client for row in reports[0].clients] == ["a", "b", "c"]


@pytest.mark.parametrize("reduce", ["mean", "median", "geometric_median"])
def test_the_order_of_arrival_changes_no_bit(reduce):
    plan = make_plan(5, reduce=reduce)
    rows = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    thetas = []
    for order in ([0, 1, 2, 3, 4], [4, 2, 0, 3, 1], [1, 0, 4, 3, 2]):
        coordinator = make_coordinator(plan, CLIENTS, 1)
        given = [c for c in coordinator.start(0.0) if isinstance(c, Train)]
        for i in order:
            coordinator.on_message(given[i].client, answer(plan, LAYOUT, given[i], rows[i], examples=i + 1), 1.0)
        thetas.append(coordinator.server.state.theta.numpy().tobytes())
    assert len(set(thetas)) == 1


def test_one_bad_client_does_not_stop_a_round():
    plan = make_plan(3)

    def answers(order):
        if order.client == "b":
            return answer(plan, LAYOUT, order, torch.tensor([float("nan"), 0, 0]))
        return answer(plan, LAYOUT, order, torch.ones(3))

    coordinator = make_coordinator(plan, CLIENTS[:3], 1)
    given = [c for c in coordinator.start(0.0) if isinstance(c, Train)]
    commands = [c for o in given for c in coordinator.on_message(o.client, answers(o), 0.0)]
    report = next(c.report for c in commands if isinstance(c, Record))
    assert torch.equal(coordinator.server.state.theta, torch.ones(3))
    assert [(row.client, row.refusal.rule) for row in report.clients if row.refusal] == [("b", "finite")]


def test_an_old_message_does_not_use_up_new_work():
    plan = make_plan(2)
    coordinator = make_coordinator(plan, CLIENTS[:2], 2)
    first = [c for c in coordinator.start(0.0) if isinstance(c, Train)]
    old = [answer(plan, LAYOUT, o, torch.ones(3)) for o in first]
    again = [c for o, m in zip(first, old, strict=True) for c in coordinator.on_message(o.client, m, 0.0)]
    second = [c for c in again if isinstance(c, Train)]
    for order, message in zip(second, old, strict=False):
        coordinator.on_message(order.client, message, 1.0)  # the network delivers round 1 once more
    for order in second:
        coordinator.on_message(order.client, answer(plan, LAYOUT, order, 2 * torch.ones(3)), 2.0)
    assert torch.equal(coordinator.server.state.theta, 3 * torch.ones(3))


def test_a_deadline_closes_the_round_and_a_late_answer_is_refused_as_late():
    plan = make_plan(2, schedule="semi_sync(deadline=10.0, quorum=1)")
    coordinator = make_coordinator(plan, CLIENTS[:2], 2)
    commands = coordinator.start(0.0)
    first, second = (c for c in commands if isinstance(c, Train))
    assert first.deadline == 10.0
    assert commands[-1] == Wait(10.0)
    coordinator.on_message(first.client, answer(plan, LAYOUT, first, torch.ones(3)), 3.0)
    closed = coordinator.on_tick(10.0)
    report = next(c.report for c in closed if isinstance(c, Record))
    assert report.refused[second.client].stage == "late"
    coordinator.on_message(second.client, answer(plan, LAYOUT, second, 9 * torch.ones(3)), 11.0)
    assert torch.equal(coordinator.server.state.theta, torch.ones(3))
    report = next(c.report for c in coordinator.on_tick(20.0) if isinstance(c, Record))
    late = [row.refusal for row in report.clients if row.client == second.client and row.refusal is not None]
    assert [(r.stage, r.reason) for r in late][:1] == [("late", f"task {second.task} is closed")]


def test_a_round_below_its_quorum_is_skipped_and_the_model_kept():
    plan = make_plan(3, schedule="sync(quorum=2)")
    server, reports = drive(plan, lambda o: answer(plan, LAYOUT, o, torch.ones(3)) if o.client == "a" else None)
    assert "quorum is 2" in reports[0].skipped
    assert server.state.version == 0
    assert torch.equal(server.state.theta, torch.zeros(3))
    assert all(row.weight == 0 for row in reports[0].clients)


def test_too_few_rows_for_a_rule_skip_the_round_with_the_reason():
    plan = make_plan(5, reduce="trimmed_mean(trim=2)")
    server, reports = drive(plan, lambda o: None if o.client == "a" else answer(plan, LAYOUT, o, torch.ones(3)))
    assert "trimmed_mean" in reports[0].skipped
    assert server.state.version == 0


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"reduce": "trimmed_mean(trim=3)"}, "needs at least 7 rows"),
        ({"weigh": ("krum(f=2)",)}, "needs at least 7 rows"),
        ({"weigh": ("trust", "trust")}, "'trust.*' is written twice, and the two would share"),
        ({"transforms": (build("row_transform", "clip", norm=1.0),) * 2}, "'clip' is written twice, and the two would"),
        ({"schedule": "sync(quorum=6)"}, "quorum"),
    ],
)
def test_plans_that_can_never_close_a_round_are_refused(extra, said):
    with pytest.raises(InputError, match=said):
        make_plan(5, **extra)


def test_the_recipe_names_every_stage_in_order():
    recipe = repr(make_plan(5, weigh=("examples",), reduce="trimmed_mean(trim=2)"))
    stages = [part.partition(":")[0] for part in recipe.split(" -> ")]
    assert stages == ["select", "schedule", "encode", "check", "weigh", "reduce", "optimise"]
    assert "trimmed_mean(trim=2)" in recipe
