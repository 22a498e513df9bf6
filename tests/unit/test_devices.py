"""Devices: classes, times, availability, drop-outs, in virtual time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import fedkeel
from fedkeel.config import Job
from fedkeel.core.errors import InputError
from fedkeel.core.keys import Key
from fedkeel.core.registry import build, names, parse
from fedkeel.core.roster import Register
from fedkeel.world.devices import Devices

NAMES = [f"client-{i:03d}" for i in range(120)]


def devices(clients: int = 120, **section) -> Devices:
    return Devices(Job(data={"clients": clients}, devices=section), Register(NAMES[:clients]), Key.root(0))


def job(**sections) -> Job:
    values = {
        "rounds": 6,
        "data": {"clients": 12, "partition": "dirichlet(alpha=1.0)", "holdout": 0.2},
        "model": {"build": "logistic"},
        "train": {"backend": "loop", "workers": 1},
        "devices": {"profile": "reference"},
        "record": {"checkpoint_every": 2},
    }
    return Job(
        **{**values, **{k: {**values.get(k, {}), **v} if isinstance(v, dict) else v for k, v in sections.items()}}
    )


def test_reference_classes_come_in_equal_parts_with_their_times():
    found = devices(profile="reference")
    counts = {name: list(found.of.values()).count(name) for name in "ABC"}
    assert counts == {"A": 40, "B": 40, "C": 40}
    for name, kind in found.of.items():
        assert found.trip(name, 0, 10.0, 0).ends == 10.0 + {"A": 1.0, "B": 2.3, "C": 5.7}[kind]
    assert list(found.of.values()) != sorted(found.of.values()), "classes are drawn, not in order"
    assert found.of == devices(profile="reference").of


def test_shares_and_patterns():
    found = devices(classes={"server": {"clients": "client-00*"}, "phone": {"share": 3.0}, "tablet": {"share": 1.0}})
    kinds = list(found.of.values())
    assert all(found.of[f"client-00{i}"] == "server" for i in range(10))
    assert (kinds.count("phone"), kinds.count("tablet")) == (82, 28)  # 110 in parts of 3 to 1


def test_a_task_takes_its_messages_its_rounds_and_its_steps():
    kind = {"time": 2.0, "down": 1000.0, "up": 500.0}
    found = devices(classes={"slow": kind}, round_seconds=3.0, step_seconds=0.5, latency=0.25)
    assert found.by_steps
    assert found.trip("client-000", 7, 100.0, 4000, steps=10).ends == 100 + 0.25 + 4 + 2 * (3 + 5)
    assert found.arrival("client-000", 200.0, 1000) == 200 + 0.25 + 2


def test_jitter_has_the_spread_that_it_says_and_depends_on_the_task_alone():
    found = devices(jitter=0.5)
    times = [found.trip("client-000", task, 0.0, 0).ends for task in range(2000)]
    logs = np.log(times)
    assert abs(float(logs.mean())) < 0.05
    assert float(logs.std()) == pytest.approx(0.5, abs=0.03)
    assert devices(jitter=0.5).trip("client-119", 5, 0.0, 0).ends == times[5]


def test_drop_outs_are_as_frequent_as_the_job_says_and_noticed_later():
    found = devices(classes={"a": {"dropout": 0.3}}, notice=10.0)
    lost = [trip.lost for task in range(3000) if (trip := found.trip("client-000", task, 5.0, 0)).lost is not None]
    assert len(lost) / 3000 == pytest.approx(0.3, abs=0.03)
    assert min(lost) > 15.0
    assert max(lost) < 16.0


@pytest.mark.parametrize(
    "text",
    [
        "always",
        "daily",
        "daily(hours=24.0)",
        "slots",
        *(f"slots(seconds={s!r})" for s in (0.1, 0.7, 86400 / 7, 1000 / 3)),
    ],
)
def test_availability_changes_when_it_says_so_and_never_in_between(text):
    assert {"always", "daily", "slots", "trace"} == set(names("availability")), "each has a test"
    at = parse("availability", text)(NAMES, Key.root(4))
    now, seen = 0.0, []
    for _ in range(60):
        mask, until = at(now)
        assert mask.shape == until.shape == (len(NAMES),)
        assert mask.dtype == bool
        assert (until > now).all()
        change = float(until.min())
        if not math.isfinite(change):
            break
        if change - now > 1e-6:  # not within the rounding of an edge
            assert (at(change - 1e-7)[0] == mask).all()
        seen.append(float(mask.mean()))
        now = change
    assert not seen or 0 < np.mean(seen) < 1


def test_daily_devices_are_there_so_many_hours_a_day():
    at = build("availability", "daily", hours=6.0)(NAMES, Key.root(1))
    hours = np.array([at(3600.0 * (h + 0.5))[0] for h in range(240)])
    assert hours.reshape(10, 24, -1).sum(axis=1) == pytest.approx(6, abs=1)
    assert abs(hours.mean(axis=1) - 0.25).max() < 0.15, "spread over the day"
    together = build("availability", "daily", hours=6.0, spread=1.0)(NAMES, Key.root(1))
    assert together(3600.0 * 3)[0].all()
    assert not together(3600.0 * 12)[0].any()


def test_slots_are_there_by_their_share():
    at = build("availability", "slots", share=0.3, seconds=10.0)(NAMES, Key.root(1))
    masks = np.array([at(10.0 * i + 5)[0] for i in range(200)])
    assert masks.mean() == pytest.approx(0.3, abs=0.02)
    assert (at(12.0)[0] == at(19.9)[0]).all()


def test_a_trace_is_followed_and_repeated(tmp_path):
    file = tmp_path / "trace.csv"
    file.write_text("client,start,stop\nclient-000,0,10\nclient-000,20,30\nclient-001,5,25\nsomebody,0,39\n")
    at = build("availability", "trace", file=str(file), repeat=40.0)(NAMES[:3], Key.root(0))
    seen = {now: (at(now)[0].tolist(), at(now)[1].tolist()) for now in (0.0, 5.0, 10.0, 22.0, 26.0, 31.0, 45.0)}
    assert seen[0.0] == ([True, False, False], [10.0, 5.0, 40.0])
    assert seen[5.0] == ([True, True, False], [10.0, 25.0, 40.0])
    assert seen[10.0] == ([False, True, False], [20.0, 25.0, 40.0])
    assert seen[22.0] == ([True, True, False], [30.0, 25.0, 40.0])
    assert seen[26.0] == ([True, False, False], [30.0, 40.0, 40.0])
    assert seen[31.0] == ([False, False, False], [40.0, 40.0, 40.0])
    assert seen[45.0] == ([True, True, False], [50.0, 65.0, 80.0])


def test_a_device_that_goes_and_comes_back_has_worked_in_vain(tmp_path):
    file = tmp_path / "trace.csv"
    file.write_text("client-000,0,10\nclient-000,50,1000\nclient-001,0,10\nclient-001,10,1000\n")
    kind = {"available": f"trace(file='{file}')"}
    found = devices(2, classes={"a": kind}, round_seconds=100.0, notice=7.0)
    assert found.trip("client-000", 0, 0.0, 0).lost == 17.0
    assert "left" in found.trip("client-000", 0, 0.0, 0).why
    assert found.trip("client-001", 1, 0.0, 0).ends == 100.0, "no gap: it was there all the time"
    assert found.trip("client-000", 2, 60.0, 0).ends == 160.0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("client-000,zero,1\n", "line 1: .* is no client,start,stop"),
        ("client-000,5,5\n", "line 1: 5 to 5 is no span"),
        ("client-000,5,99\n", "5 to 99 is no span of time from 0 to repeat = 40"),
        ("nobody,0,1\n", "names none of the clients, which are as 'client-000'"),
        (None, "cannot be read"),
    ],
)
def test_a_trace_that_can_not_be_followed_is_refused_with_its_line(tmp_path, text, words):
    file = tmp_path / "trace.csv"
    if text is not None:
        file.write_text(text)
    with pytest.raises(InputError, match=words):
        devices(classes={"a": {"available": f"trace(file='{file}', repeat=40.0)"}})


def test_a_federation_waits_for_devices_and_loses_those_that_leave(tmp_path):
    """All are there in the first hour of each day alone, and a round's work takes 40 minutes: one a day ends."""
    classes = {"phone": {"available": "daily(hours=1.0, spread=0.000001)"}}
    done = fedkeel.run(
        job(rounds=3, devices={"profile": "equal", "classes": classes, "round_seconds": 2400.0}), tmp_path / "a"
    )
    assert [row["time"] for row in done.rounds] == pytest.approx([2400.0, 3600.0, 86400 + 2400.0], abs=1)
    assert [row["skipped"] is None for row in done.rounds] == [True, False, True]  # they left during the second
    late = fedkeel.run(
        job(rounds=2, devices={"profile": "equal", "classes": classes, "round_seconds": 4000.0}), tmp_path / "b"
    )
    assert {row["reason"] for row in late.updates} == {"its device left before its work was done"}


def test_a_federation_that_nobody_will_join_ends_all_the_same(tmp_path):
    file = tmp_path / "trace.csv"
    file.write_text("".join(f"client-{i:02d},0,3\n" for i in range(12)))
    done = fedkeel.run(
        job(rounds=5, devices={"profile": "equal", "classes": {"a": {"available": f"trace(file='{file}')"}}}),
        tmp_path / "a",
    )
    assert [row["skipped"] is None for row in done.rounds] == [True, True, True, False, False]
    assert [row["skipped"] for row in done.rounds][3:] == ["no client is free, and none will be"] * 2


@pytest.mark.parametrize(
    "sections",
    [
        {"schedule": {"rule": "fedbuff(buffer=4)"}},
        {"schedule": {"rule": "fedasync"}, "aggregate": {"mix": ("models",), "weigh": ("examples", "staleness")}},
        {"schedule": {"rule": "semi_sync(deadline=2.0, late='use')"}, "select": {"cohort": 6, "rule": "oort"}},
        {
            "schedule": {"rule": "fedbuff(buffer=3)"},
            "devices": {
                "profile": "equal",
                "classes": {
                    "a": {"time": 2.0, "up": 3000.0, "dropout": 0.2, "available": "slots(share=0.7, seconds=9.0)"},
                    "b": {"down": 9000.0},
                },
                "jitter": 0.3,
                "step_seconds": 0.05,
                "notice": 2.0,
            },
            "train": {"corrections": ("scaffold",), "stopping": "plateau(epsilon=0.05)"},
            "aggregate": {"weigh": ("examples", "staleness", "even_share")},
            "select": {"cohort": 6, "longest_wait": 6},
        },
        {
            "schedule": {"rule": "fedbuff(buffer=3)"},
            "attack": {"rule": "alie", "clients": 3},
            "model": {"private": ("*.bias",)},
        },
    ],
)
def test_an_interrupted_asynchronous_run_resumes_bit_for_bit(tmp_path, sections):
    """With work in flight, trained and not, from models of several versions."""
    whole = fedkeel.run(job(rounds=9, **sections), tmp_path / "whole", with_report=False)

    def stop(progress):
        if progress.round == 5:
            raise KeyboardInterrupt

    with pytest.raises(fedkeel.InterruptedRunError):
        fedkeel.run(job(rounds=9, **sections), tmp_path / "broken", watch=stop, with_report=False)
    resumed = fedkeel.resume(tmp_path / "broken", with_report=False)
    assert torch.equal(resumed.state.theta, whole.state.theta)
    assert resumed.updates == whole.updates
    assert [{k: v for k, v in r.items() if k not in ("seconds", "wall")} for r in resumed.rounds] == [
        {k: v for k, v in r.items() if k not in ("seconds", "wall")} for r in whole.rounds
    ]
    assert all(
        torch.equal(a.nan_to_num(-1), whole.state.roster[n].nan_to_num(-1)) for n, a in resumed.state.roster.items()
    )


def test_every_task_and_byte_is_in_the_ledger(tmp_path):
    done = fedkeel.run(
        job(
            rounds=8,
            schedule={"rule": "fedbuff(buffer=3)"},
            devices={"profile": "equal", "classes": {"a": {"dropout": 0.3, "up": 1000.0}, "b": {"time": 3.0}}},
        ),
        tmp_path / "run",
    )
    given = done.state.next_task
    assert len(done.updates) == given
    assert sum(row["bytes_down"] for row in done.updates) == sum(row["bytes_down"] for row in done.rounds)
    ends = {row["rule"] for row in done.updates}
    assert ends == {None, "failure", "end"}
    used = [row for row in done.updates if row["stage"] is None]
    assert all(row["seconds"] > 0 and row["bytes_up"] > 0 for row in used)
    assert len(used) == 8 * 3


def test_single_devices_come_from_a_file(tmp_path):
    file = tmp_path / "devices.csv"
    file.write_text("client,class,time,up,dropout\nclient-000,old,9.5,,\nclient-001,,,250,0.5\n")
    found = devices(classes={"new": {"time": 2.0}}, file=str(file))
    assert found.trip("client-000", 0, 0.0, 10**6).ends == 9.5
    assert found.trip("client-002", 0, 0.0, 0).ends == 2.0
    assert found.arrival("client-001", 1.0, 500) == 3.0
    assert found.arrival("client-000", 1.0, 500) == 1.0
    assert {found.of[name] for name in NAMES[2:]} == {"new"}
    assert found.of["client-000"] == "old"
    assert not found.level


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("client,speed\nclient-000,3\n", "column 'speed'"),
        ("time\n3\n", "line 2: there is no client 'None'"),
        ("client,time\nnobody,3\n", "line 2: there is no client 'nobody'"),
        ("client,time\nclient-000,-3\n", "line 2: .*time"),
        ("client,time\nclient-000,fast\n", "line 2: .*could not convert"),
        (None, "cannot be read"),
    ],
)
def test_a_file_of_devices_that_can_not_be_read_is_refused_with_its_line(tmp_path, text, words):
    file = tmp_path / "devices.csv"
    if text is not None:
        file.write_text(text)
    with pytest.raises(InputError, match=words):
        devices(file=str(file))


def test_agreement_lengthens_what_agrees_and_shortens_what_stalls():
    rule = build("interval", "agreement", agree=0.5, stall=0.1, change=2.0, most=4.0, least=0.25)
    nan = math.nan
    assert rule(1.0, 0.6, nan, 1.0) == 2.0
    assert rule(4.0, 0.6, 2.0, 1.0) == 4.0
    assert rule(1.0, 0.4, 2.0, 1.0) == 1.0
    assert rule(1.0, 0.9, 1.0, 0.95) == 0.5
    assert rule(0.25, 0.9, 1.0, 1.2) == 0.25
    assert build("interval", "fixed")(3.0, 0.9, 1.0, 0.5) == 1.0


def test_intervals_adapt_client_by_client_and_survive_an_interruption(tmp_path):
    sections = {
        "rounds": 8,
        "data": {"clients": 12, "partition": "shards(classes_per_client=2)", "holdout": 0.2},
        "train": {"stopping": "budget(steps=8)"},
        "schedule": {"interval": "agreement(agree=0.2, change=1.5)"},
        "devices": {"profile": "equal"},
    }
    whole = fedkeel.run(job(**sections), tmp_path / "whole", with_report=False)
    steps = {}
    for row in whole.updates:
        steps.setdefault(row["round"], set()).add(row["steps"])
    assert steps[1] == {8}
    assert len(steps[8]) > 1
    assert max(steps[8]) <= 32

    def stop(progress):
        if progress.round == 5:
            raise KeyboardInterrupt

    with pytest.raises(fedkeel.InterruptedRunError):
        fedkeel.run(job(**sections), tmp_path / "broken", watch=stop, with_report=False)
    assert fedkeel.resume(tmp_path / "broken", with_report=False).updates == whole.updates
    with pytest.raises(InputError, match=r"scales the steps of train.stopping = 'budget"):
        fedkeel.run(job(**{**sections, "train": {}}), tmp_path / "no")
