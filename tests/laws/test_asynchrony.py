"""Asynchronous federations on quadratics: equal to sync where nothing is late, and to an oracle where much is.

The oracle below knows nothing of coordinator, wire or clock: a list of clients, each with the moment at which it is
done and the model that it started from.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import fedkeel
from fedkeel import testing
from fedkeel.core.errors import InputError
from fedkeel.core.registry import build, rule
from fedkeel.core.types import ClientMemory, RoundReport, ServerState, View
from fedkeel.sim.simulator import Simulator
from fedkeel.world.federation import Federation
from fedkeel.world.pool import Pool

CLIENTS, P, LR, STEPS = 6, 3, 0.05, 4
COUNTS = (6, 9, 12, 15, 18, 21)
TIMES = (1.0, 1.0, 2.3, 2.3, 5.7, 5.7)
Vector = NDArray[np.float64]
CHECKS = ("layout", "version", "claims", "duplicate", "finite")


def tables() -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(7)
    xs = [torch.randn(n, P, generator=generator) for n in COUNTS]
    return xs, [x @ (torch.randn(P, generator=generator) * 2) for x in xs]


@rule("source", name="test_late_quadratics")
def quadratics(key: fedkeel.Key) -> Pool:
    """Regressions whose clients disagree (tests)."""
    xs, ys = tables()
    x, y = torch.cat(xs), torch.cat(ys)[:, None]
    group = torch.repeat_interleave(torch.arange(CLIENTS), torch.tensor(COUNTS))
    return Pool(x, y, x[:2], y[:2], 0, group=group, group_names=tuple(f"c{i}" for i in range(CLIENTS)))


@rule("model", name="test_late_linear")
def linear(inputs: tuple[int, ...], classes: int) -> nn.Module:
    """w without a bias, from 0 (tests)."""
    module = nn.Linear(inputs[0], 1, bias=False)
    nn.init.zeros_(module.weight)
    return module


def work(client: int, theta: Vector) -> Vector:
    """What the client's update is, by hand: full batches, plain steps."""
    xs, ys = tables()
    x, y, w = xs[client].double().numpy(), ys[client].double().numpy(), theta.copy()
    for _ in range(STEPS):
        w -= LR * 2 * x.T @ (x @ w - y) / len(y)
    return w - theta


@dataclass
class Silent:
    reports: list[RoundReport] = field(default_factory=list)
    checkpoints: int = 0

    def round(self, report: RoundReport) -> None:
        self.reports.append(report)

    def metrics(self, *args: object) -> None: ...

    def checkpoint(self, *args: object) -> None:
        self.checkpoints += 1


def simulate(rounds: int, schedule: str, seconds: float | None = None, **sections) -> tuple[Vector, list[RoundReport]]:
    recorder = Silent()
    job = fedkeel.Job(
        rounds=rounds,
        schedule={"rule": schedule, "seconds": seconds},
        data={"source": "test_late_quadratics", "partition": "natural", "clients": CLIENTS},
        model={"build": "test_late_linear", "loss": "mse"},
        record={"evaluate_every": rounds, "checkpoint_every": rounds},
        **{
            **sections,
            "aggregate": {"checks": CHECKS, "weigh": ("examples",)} | sections.get("aggregate", {}),
            "train": {"batch_size": 100, "lr": LR, "stopping": f"steps(steps={STEPS})", "backend": "loop", "workers": 1}
            | sections.get("train", {}),
        },
    )
    federation = Federation.of(job)
    state = ServerState(federation.theta())
    final = Simulator(federation, federation.trainer(), state, ClientMemory(), recorder).run()
    return final.theta.double().numpy(), recorder.reports


def classes(times=TIMES) -> dict:
    return {"classes": {f"k{i}": {"clients": f"c{i}", "time": time} for i, time in enumerate(times)}}


@pytest.mark.parametrize("round_seconds", [0.0, 1.0])
@pytest.mark.parametrize(
    ("schedule", "cohort", "rounds"),
    [
        ("semi_sync(deadline=5.0)", 4, 5),
        ("semi_sync(deadline=5.0, late='use')", 4, 5),
        ("fedbuff(buffer=4)", 4, 5),
        ("fedasync", 1, 8),
    ],
)
@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"aggregate": {"weigh": ("examples", "staleness")}, "server": {"optimiser": "momentum(beta=0.5)"}},
        {"aggregate": {"mix": ("models",)}, "select": {"rule": "stratified"}},
        {"train": {"corrections": ("scaffold",)}},
    ],
)
def test_with_equal_delays_every_schedule_is_sync_bit_for_bit(schedule, cohort, rounds, sections, round_seconds):
    select = {"cohort": cohort, **sections.get("select", {})}
    given = {**sections, "select": select, "devices": {"round_seconds": round_seconds}}
    theta, reports = simulate(rounds, schedule, **given)
    wanted, others = simulate(rounds, "sync", **given)
    assert theta.tobytes() == wanted.tobytes()
    assert [report.time for report in reports] == [round_seconds * (i + 1) for i in range(rounds)]
    for here, there in zip(reports, others, strict=True):
        used = [c for c in here.clients if c.refusal is None]
        assert [(c.client, c.weight, c.staleness) for c in used] == [(c.client, c.weight, 0) for c in there.clients]
        assert here.bytes_up == there.bytes_up


@dataclass
class Oracle:
    """Buffered asynchrony of everybody, all the time, by hand."""

    buffer: int
    mix_models: bool = False
    scale: Callable[[int], float] = lambda s: (1 + s) ** -0.5
    rate: float = 1.0

    def run(self, closes: int) -> tuple[Vector, list[list[tuple[int, int]]], list[float]]:
        theta, version = np.zeros(P), 0
        done = sorted((TIMES[c], c, c) for c in range(CLIENTS))  # moment, task, client
        started = {c: (theta.copy(), 0) for c in range(CLIENTS)}
        buffered: list[tuple[int, int, int, Vector]] = []
        used, when, tasks, resting, free = [], [], CLIENTS, [], []
        given = dict.fromkeys(range(CLIENTS), 1)
        while len(used) < closes:
            now = done[0][0]
            while done and done[0][0] == now and len(used) < closes:
                _, task, client = done.pop(0)
                resting.append(client)
                base, then = started[client]
                row = work(client, base) - (theta - base if self.mix_models else 0)
                buffered.append((task, client, then, row))
                if len(buffered) == self.buffer:
                    buffered.sort(key=lambda item: item[0])
                    total = sum(COUNTS[c] for _, c, _, _ in buffered)
                    step = sum(COUNTS[c] / total * self.scale(version - then) * r for _, c, then, r in buffered)
                    used.append([(c, version - then) for _, c, then, _ in buffered])
                    theta, version = theta + self.rate * step, version + 1
                    when.append(now)
                    free += resting
                    buffered, resting = [], []
            for client in sorted(free, key=lambda c: (given[c], c)):  # as round_robin does
                started[client] = theta.copy(), version
                done.append((now + TIMES[client], tasks, client))
                tasks, given[client] = tasks + 1, given[client] + 1
            free = []
            done.sort()
        return theta, used, when


@pytest.mark.parametrize(
    ("oracle", "schedule", "sections"),
    [
        (Oracle(1), "fedasync", {}),
        (Oracle(3), "fedbuff(buffer=3)", {}),
        (Oracle(4), "fedbuff(buffer=4)", {}),
        (
            Oracle(1, mix_models=True, scale=lambda s: 1 / (0.5 * max(s - 1, 0) + 1), rate=0.6),
            "fedasync",
            {
                "aggregate": {"weigh": ("examples", "staleness(form='hinge', a=0.5, b=1.0)"), "mix": ("models",)},
                "server": {"optimiser": "sgd(lr=0.6)"},
            },
        ),
    ],
)
def test_asynchronous_rounds_are_those_of_the_papers(oracle, schedule, sections):
    closes = 12
    aggregate = {"weigh": ("examples", "staleness")} | sections.get("aggregate", {})
    given = {"devices": classes(), "select": {"rule": "round_robin"}, **sections, "aggregate": aggregate}
    theta, reports = simulate(closes, schedule, **given)
    wanted, used, when = oracle.run(closes)
    found = [[(int(c.client[1:]), c.staleness) for c in report.clients if c.refusal is None] for report in reports]
    assert [sorted(f) for f in found] == [sorted(u) for u in used]
    assert [report.time for report in reports] == pytest.approx(when)
    assert theta == pytest.approx(wanted, rel=1e-5, abs=1e-6)


def test_with_everybody_at_work_asynchrony_gets_through_as_the_closed_form_says():
    """Per client 1, 1/2.3, 1/5.7 updates a second against 1/5.7 for all: (1 + 1/2.3 + 1/5.7) / 3 * 5.7 = 3.06."""
    until = 5.7 * 40
    _, together = simulate(10**6, "sync", devices=classes(), seconds=until)
    _, apart = simulate(10**6, "fedasync", devices=classes(), seconds=until)
    counts = [sum(c.refusal is None for r in reports for c in r.clients) for reports in (together, apart)]
    assert counts[1] / counts[0] == pytest.approx(5.7 * np.mean([1 / t for t in TIMES]), rel=0.01)


def test_semi_sync_closes_at_the_deadline_and_uses_what_is_late_in_the_next_round():
    given = {"devices": classes(), "aggregate": {"weigh": ("equal", "staleness(form='polynomial', a=1.0)")}}
    given["select"] = {"rule": "round_robin"}
    _, reports = simulate(3, "semi_sync(deadline=2.5, late='use')", **given)
    seen = [[(c.client, c.staleness) for c in r.clients if c.refusal is None] for r in reports]
    assert [r.time for r in reports] == pytest.approx([2.5, 4.8, 7.1])  # the deadline; then all who began have answered
    assert seen[0] == [("c0", 0), ("c1", 0), ("c2", 0), ("c3", 0)]
    assert seen[2] == [("c4", 2), ("c5", 2), ("c0", 0), ("c1", 0), ("c2", 0), ("c3", 0)]
    lengths = [c.weight for c in reports[2].clients if c.refusal is None]
    assert lengths == pytest.approx([1 / 3 / (2 / 3 + 4)] * 2 + [1 / (2 / 3 + 4)] * 4)
    _, dropped = simulate(2, "semi_sync(deadline=2.5)", **given)
    late = [(c.client, c.refusal.stage) for c in dropped[0].clients if c.refusal is not None]
    assert late == [("c4", "late"), ("c5", "late")]


def test_over_selection_closes_with_the_first_of_the_cohort():
    given = {"devices": classes(), "select": {"cohort": 4, "rule": "round_robin"}}
    _, reports = simulate(2, "semi_sync(deadline=9.0, over=0.5)", **given)
    assert [r.time for r in reports] == [2.3, 4.6]
    assert [c.client for c in reports[0].clients if c.refusal is None] == ["c0", "c1", "c2", "c3"]


def test_staleness_shortens_the_step_and_not_only_the_share():
    """A buffer of one: without it the weight of a single row would be nothing but a share of 1."""
    plain, _ = simulate(1, "fedasync", devices=classes())
    damped, _ = simulate(1, "fedasync", devices=classes(), aggregate={"weigh": ("staleness",)})
    assert plain.tobytes() == damped.tobytes()  # the first is of no age
    a, b = (
        simulate(9, "fedasync", devices=classes(), aggregate={"weigh": ("equal", f"staleness(a={a})")})[0]
        for a in (1e-9, 3.0)
    )
    assert np.abs(a - b).max() > 0.05


def optimum() -> Vector:
    """Where the mean of the clients' losses is least."""
    tables_ = [(x.double().numpy(), y.double().numpy()) for x, y in zip(*tables(), strict=True)]
    H = sum(x.T @ x * 2 / len(y) for x, y in tables_)
    g = sum(x.T @ y * 2 / len(y) for x, y in tables_)
    return np.linalg.solve(H, g)


def test_even_share_takes_back_what_fast_clients_have_too_much():
    kinds = {name: {"clients": f"c[{2 * i}{2 * i + 1}]", "time": TIMES[2 * i]} for i, name in enumerate("ABC")}
    given = {"devices": {"classes": kinds}, "train": {"lr": 0.008, "stopping": "steps(steps=1)"}}
    gaps = {}
    for weigh in ("equal", "even_share"):
        theta, _ = simulate(1000, "fedbuff(buffer=3)", aggregate={"weigh": (weigh,)}, **given)
        gaps[weigh] = float(np.abs(theta - optimum()).max())
    assert gaps["even_share"] < 0.1 * gaps["equal"], gaps


def test_scaffold_ends_at_the_optimum_under_asynchrony_and_fedavg_does_not():
    """A client rests until its update was used, so that its c_i and the server's c stay of one mind."""
    equal = {"aggregate": {"weigh": ("equal",)}, "devices": classes((1.0, 1.1, 1.2, 1.3, 1.4, 1.5))}
    gaps = {}
    for name, corrections in {"FedAvg": (), "SCAFFOLD": ("scaffold",)}.items():
        theta, _ = simulate(600, "fedbuff(buffer=3)", train={"corrections": corrections}, **equal)
        gaps[name] = float(np.abs(theta - optimum()).max())
    assert gaps["SCAFFOLD"] < 0.05 * gaps["FedAvg"], gaps


@pytest.mark.parametrize(
    ("schedule", "sections", "words"),
    [
        ("fedbuff(buffer=2)", {"aggregate": {"reduce": "trimmed_mean(trim=1)"}}, "closes with 2"),
        ("fedbuff(buffer=7)", {}, "7 updates, of different clients, and there are 6: lower the buffer"),
        (
            "fedbuff(buffer=3)",
            {"train": {"corrections": ("scaffold",), "lr_schedule": "exponential(factor=0.9)"}},
            "lr_schedule.*late updates",
        ),
        ("sync", {"select": {"cohort": 2, "longest_wait": 2}}, "write at least 3"),
        ("sync", {"devices": {"profile": "reference", "classes": {"a": {}}}}, "both say what devices there are"),
        ("sync", {"devices": {"classes": {"a": {"available": "weekly"}}}}, "availability 'weekly' is unknown"),
    ],
)
def test_what_can_not_work_is_refused_before_it_begins(schedule, sections, words):
    with pytest.raises(InputError, match=words):
        simulate(2, schedule, **sections)


def test_no_client_has_two_places_in_a_buffer_and_one_that_is_refused_waits_for_its_close():
    """A device that is twenty times as fast as the others fills no buffer by itself, and can not use up the rounds."""
    fast = {"devices": classes((0.05, 1.0, 1.0, 1.0, 1.0, 1.0)), "aggregate": {"weigh": ("equal",)}}
    _, reports = simulate(12, "fedbuff(buffer=3)", **fast)
    for report in reports:
        used = [row.client for row in report.clients if row.refusal is None]
        assert len(used) == len(set(used)) == 3
    _, reports = simulate(12, "fedbuff(buffer=3)", attack={"rule": "nan", "clients": 1}, **fast)
    assert all(report.skipped is None for report in reports)
    offences = Counter(row.client for r in reports for row in r.clients if row.refusal and row.refusal.rule == "finite")
    assert len(offences) == 1
    assert max(offences.values()) <= len(reports)


@pytest.mark.parametrize("schedule", ["fedasync", "fedbuff(buffer=2)"])
def test_quarantine_shuts_out_under_asynchrony(schedule):
    """A record shrinks when a task of its client ends, and not with every round that closes meanwhile."""
    given = {"devices": classes(), "attack": {"rule": "nan", "clients": 1}, "quarantine": {"limit": 2.0}}
    _, reports = simulate(150, schedule, **given)
    assert any(row.refusal and row.refusal.stage == "quarantine" for r in reports for row in r.clients)


@pytest.mark.parametrize(("schedule", "seconds"), [("semi_sync(deadline=1.0)", None), ("sync", 1.0)])
def test_what_arrives_at_the_very_last_moment_counts(schedule, seconds):
    _, reports = simulate(1 if seconds is None else 10, schedule, seconds)
    assert [row.refusal for row in reports[0].clients] == [None] * CLIENTS


def test_over_selection_is_not_misled_by_rounding():
    view = View(100, 0, 0, 0, 0, 0, 0.0, 0.0)
    assert build("scheduler", "semi_sync", deadline=1.0, over=0.1)(view).start == 110


def test_a_task_that_is_given_up_is_stopped_and_sends_nothing():
    given = {"devices": classes((1.0, 1.0, 1.0, 1.0, 1.0, 5.7)), "select": {"rule": "round_robin"}}
    _, reports = simulate(8, "semi_sync(deadline=2.0)", **given)
    slow = [row for r in reports for row in r.clients if row.client == "c5"]
    assert len(slow) == 8
    assert {row.refusal.stage for row in slow} == {"late"}
    assert sum(row.bytes_up for row in slow) == 0


def test_a_round_that_waited_for_its_clients_still_gives_them_their_time(tmp_path):
    file = tmp_path / "trace.csv"
    file.write_text("".join(f"c{i},1000,9000\n" for i in range(CLIENTS)))
    devices = {"classes": {"a": {"available": f"trace(file='{file}')", "time": 30.0}}}
    _, reports = simulate(2, "semi_sync(deadline=60.0)", devices=devices)
    assert [report.time for report in reports] == [1030.0, 1060.0]
    assert all(report.skipped is None for report in reports)


@pytest.mark.parametrize("more", [{"attack": {"rule": "nan", "clients": 2}, "quarantine": {"limit": 1.0}}, {}])
def test_a_buffer_that_all_who_are_left_can_not_fill_closes(tmp_path, more):
    file = tmp_path / "trace.csv"
    file.write_text("".join(f"c{i},0,9000\n" for i in range(CLIENTS - 1)))
    devices = {"classes": {"a": {"available": f"trace(file='{file}')"}}}
    _, reports = simulate(
        4, f"fedbuff(buffer={CLIENTS})", devices=devices, train={"corrections": ("scaffold",)}, **more
    )
    assert [report.skipped for report in reports] == [None] * 4


def test_even_share_weighs_one_where_all_classes_come_by_their_parts():
    """Of many clients few are drawn: the weights must not shrink with the number of those that were never seen."""
    draw = np.random.default_rng(0)
    rule, population = build("weigher", "even_share"), {"A": 600, "B": 400}
    kept: dict[str, Tensor] = {}
    means = []
    for round in range(400):
        device = tuple(draw.choice(["A", "B"], 10, p=[0.6, 0.4]).tolist())
        cohort = replace(testing.cohort(testing.rows(10, 2)), device=device, population=population)
        weights, kept = rule(cohort, ServerState(torch.zeros(2), round=round), kept)
        means.append(float(weights.mean()))
    assert np.mean(means[:100]) == pytest.approx(1, abs=0.05)
    assert np.mean(means[300:]) == pytest.approx(1, abs=0.05)
