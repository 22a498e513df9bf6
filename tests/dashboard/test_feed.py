"""What is read bit by bit, through rewinds and all, is what one reading of the whole ledger gives."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from pathlib import Path

import pytest
import records
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkeel.core.errors import InputError
from fedkeel.core.types import LOST, ClientRow, Refusal
from fedkeel.dashboard import health, tally, view
from fedkeel.dashboard.bins import Bins, Point, Span
from fedkeel.dashboard.feed import UPDATE_COLUMNS, Feed, find
from fedkeel.ship.ledger import Ledger

REFUSALS = st.sampled_from(
    [
        None,
        Refusal("check", "finite", "a column is NaN"),
        Refusal("quarantine", "quarantine", "its record is 3"),
        Refusal("train", "client", "it raised"),
        Refusal("late", "end", "the run is over"),
    ]
)
ROWS = st.builds(
    ClientRow,
    client=st.sampled_from(["a", "b", "c", "a stranger"]),
    refusal=REFUSALS,
    weight=st.sampled_from([0.0, 0.5]),
    trust=st.none() | st.floats(0, 5),
    staleness=st.none() | st.integers(0, 9),
    bytes_up=st.integers(0, 10**6),
    bytes_down=st.integers(0, 10**6),
)
ROUND = st.tuples(st.lists(ROWS, max_size=4), st.none() | st.just("too few"), st.none() | st.floats(0, 9))
DEEDS = st.lists(
    st.one_of(
        st.tuples(st.just("round"), ROUND),
        st.tuples(st.just("evaluate"), st.floats(0, 1)),
        st.tuples(st.just("rewind"), st.floats(0, 1)),
        st.tuples(st.just("step"), st.integers(1, 5)),
    ),
    max_size=25,
)


def caught_up(path: Path) -> Feed:
    feed = Feed(path)
    while feed.step():
        pass
    return feed


def told(feed: Feed) -> str:
    """All that the page would be told."""
    seen = {key: value for key, value in view.overview(feed).items() if key != "revision"}
    return json.dumps([seen, view.clients(feed, sort="name", limit=view.PAGE)["clients"]])


@settings(max_examples=60, deadline=None)
@given(DEEDS)
def test_bit_by_bit_is_all_at_once(deeds):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "ledger.sqlite")
        feed, number = Feed(path), 0
        with records.begin(path) as ledger:
            ledger.write_metrics(0, 0, {"accuracy": 0.1})
            for deed, value in deeds:
                if deed == "round":
                    rows, skipped, epsilon = value
                    number += 1
                    records.write(ledger, number, *rows, skipped=skipped, epsilon=epsilon)
                elif deed == "evaluate":
                    ledger.write_metrics(number, number, {"accuracy": (value, value / 2, 1.0), "loss": value})
                elif deed == "rewind":
                    number = int(number * value)
                    ledger.rewind(number)
                else:
                    feed.step(rows=value)
            while feed.step(rows=3):
                pass
            whole = caught_up(path)
            assert told(feed) == told(whole)
            assert feed.tally.best == whole.tally.best
            updates = ledger.updates()
        total = feed.tally.total
        over = sum((row["stage"], row["rule"]) == ("late", "end") for row in updates)
        assert total.used + total.unused + total.refused + total.lost + over == len(updates)
        assert total.lost + over == sum(row["stage"] in LOST for row in updates)
        assert sum(rule.updates for rule in feed.tally.rules.values()) == sum(bool(row["stage"]) for row in updates)
        assert sum(client.up for client in feed.tally.clients.values()) == sum(row["bytes_up"] for row in updates)


def test_what_is_lost_is_what_the_federation_calls_lost():
    assert set(LOST) == tally.LOST


@given(st.lists(st.integers(1, 5), min_size=1, max_size=80), st.integers(2, 9))
def test_bins_are_few_and_lose_nothing(gaps, most):
    bins, round = Bins(Span, most), 0
    for gap in gaps:
        round += gap
        bins.at(round).merge(Span(rounds=1, used=gap, round=round, oldest=gap))
    found = bins.items
    assert len(found) <= most
    assert sum(span.used for span in found) == sum(gaps)
    assert max(span.oldest for span in found) == max(gaps)
    assert [span.round for span in found] == sorted(span.round for span in found)
    assert found[-1].round == round


def test_a_point_keeps_the_last_figure_and_the_widest_interval():
    point = Point(1, 1.0, 0.5, 0.4, 0.6)
    point.merge(Point(2, 2.0, 0.9))
    assert point == Point(2, 2.0, 0.9, 0.4, 0.9)
    point.merge(Point(3, 3.0, None))
    assert point == Point(3, 3.0, None, 0.4, 0.9)


def test_before_the_run_and_before_its_first_round(tmp_path):
    feed = Feed(tmp_path / "ledger.sqlite")
    assert not feed.step()
    assert view.status(feed) == "waiting"
    seen = feed.revision
    feed.step()
    assert feed.revision == seen
    with records.begin(feed.path) as ledger:
        feed.step()
        assert view.status(feed) == "empty"
        assert feed.revision > seen
        records.write(ledger, 1)
        feed.step()
        assert view.status(feed) == "running"
        records.write(ledger, 100)
        feed.step()
        assert view.status(feed) == "ended"
    for file in tmp_path.iterdir():
        file.unlink()
    feed.step()
    assert view.status(feed) == "waiting"
    assert feed.tally.round == 0


def test_another_run_in_the_same_place_is_read_anew(tmp_path):
    path = tmp_path / "ledger.sqlite"
    with records.begin(path) as ledger:
        for round in range(1, 5):
            records.write(ledger, round)
    feed = caught_up(path)
    other = tmp_path / "other"
    other.mkdir()
    with records.begin(other / "ledger.sqlite", job="other") as ledger:
        for round in range(1, 7):
            records.write(ledger, round, records.USED)
    shutil.copy(other / "ledger.sqlite", path)
    feed.step()
    assert told(feed) == told(caught_up(path))
    assert feed.tally.total.refused == 0


def test_a_file_that_is_no_ledger_is_told_and_then_forgotten(tmp_path):
    path = tmp_path / "ledger.sqlite"
    path.write_text("what is this")
    feed = Feed(path)
    assert not feed.step()
    assert view.status(feed) == "unreadable"
    assert "is no ledger of a run" in view.overview(feed)["problem"]
    path.unlink()
    records.begin(path).close()
    feed.step()
    assert view.status(feed) == "empty"


def test_a_line_that_is_not_understood_is_told(tmp_path):
    path = tmp_path / "ledger.sqlite"
    with records.begin(path) as ledger:
        records.write(ledger, 1)
        records.write(ledger, 2)
        ledger._db.execute("UPDATE rounds SET seconds = 'x' WHERE round = 2")
        feed = Feed(path)
        assert not feed.step()
        assert view.status(feed) == "unreadable"
        assert "can not be understood" in feed.problem
        ledger._db.execute("UPDATE rounds SET seconds = '{}' WHERE round = 2")
        feed.step()
    assert told(feed) == told(caught_up(path))
    assert feed.tally.round == 2


def test_a_reader_holds_nothing_open_and_writes_nothing(tmp_path):
    path = tmp_path / "ledger.sqlite"
    with records.begin(path) as ledger:
        records.write(ledger, 1)
    before = path.read_bytes()
    caught_up(path)
    assert path.read_bytes() == before
    assert {file.name for file in tmp_path.iterdir()} <= {"ledger.sqlite", "ledger.sqlite-wal", "ledger.sqlite-shm"}


def test_updates_are_read_along_their_index(tmp_path):
    with records.begin(tmp_path / "ledger.sqlite") as ledger:
        sql = f"SELECT {UPDATE_COLUMNS} FROM updates WHERE round BETWEEN 3 AND 4 ORDER BY round, rowid"
        plan = " ".join(row["detail"] for row in ledger.query(f"EXPLAIN QUERY PLAN {sql}"))
        assert "USING INDEX updates_round" in plan
        assert "TEMP" not in plan


def test_what_to_look_at(tmp_path):
    path = tmp_path / "ledger.sqlite"
    with records.begin(path) as ledger:
        for round in range(1, 21):
            records.write(ledger, round, records.USED, accuracy=0.9)
        feed = caught_up(path)
        assert health.concerns(feed.tally, "global") == []
        ledger.write_metrics(20, 20, {"accuracy": (0.8, 0.7, 0.9)})  # perhaps as good as the best: 0.88 to 0.92
        feed.step()
        assert health.concerns(feed.tally, "global") == []
        for round in range(21, 31):
            records.write(ledger, round, records.REFUSED, accuracy=0.7, skipped="nobody was left")
        feed.step()
        found = {concern.what: concern for concern in health.concerns(feed.tally, "global")}
        assert list(found) == [
            "10 of the last 20 rounds skipped",
            "accuracy fell by 20.0 points",
            "50% of the updates of the last 20 rounds refused",
        ]
        assert "nobody was left" in found["10 of the last 20 rounds skipped"].why
        ledger.write_metrics(30, 30, {"loss": math.nan})
        feed.step()
        assert "loss is no number" in {concern.what for concern in health.concerns(feed.tally, "global")}


def test_the_table_of_clients_is_searched_sorted_and_paged(tmp_path):
    path = tmp_path / "ledger.sqlite"
    with records.begin(path, {f"client-{i}": "phone" if i % 2 else "board" for i in range(200)}) as ledger:
        records.write(ledger, 1, *(ClientRow(f"client-{i}", None, weight=1.0, trust=i / 100) for i in range(0, 200, 2)))
        records.write(ledger, 2, ClientRow("client-10", records.REFUSED.refusal))
    feed = caught_up(path)

    def names(**wanted):
        return [client["name"] for client in view.clients(feed, **wanted)["clients"]]

    assert names(limit=2) == ["client-10", "client-0"]
    assert names(sort="name", descending=False, offset=9, limit=2) == ["client-9", "client-10"]
    assert names(sort="trust", limit=1) == ["client-198"]
    assert names(search="PHONE", sort="name", descending=False, limit=1) == ["client-1"]
    found = view.clients(feed, search="client-19")
    assert found["total"] == 11
    assert view.clients(feed, search="client-10", limit=1)["clients"][0] | {"wall": 0} == {
        "name": "client-10", "device": "board", "state": "refused", "round": 2, "wall": 0, "used": 1, "unused": 0,
        "refused": 1, "lost": 0, "trust": 0.1, "staleness": None, "version": None, "bytes": 0,
        "reason": "cosine: its cosine is -0.4, below 0", "reason_round": 2, "hostile": False,
    }  # fmt: skip
    for wrong, sentence in (
        ({"sort": "nme"}, "sort='nme' is no column: did you mean 'name'"),
        ({"limit": 101}, "limit=101 is out of range: write 1 to 100"),
        ({"offset": -1}, "offset=-1"),
    ):
        with pytest.raises(InputError, match=sentence):
            view.clients(feed, **wrong)


def test_a_client_s_model_is_the_one_that_its_work_began_from(tmp_path):
    path = tmp_path / "ledger.sqlite"
    with records.begin(path) as ledger:
        records.write(ledger, 7, ClientRow("a", None, weight=1.0, staleness=2))  # added to version 6
    feed = caught_up(path)
    assert feed.tally.clients["a"].version == 4
    assert view.overview(feed)["versions"] == {"behind": [3], "clients": [1], "open": False}


def test_where_the_ledger_of_a_directory_is(tmp_path):
    def folder(name, *files):
        for file in files:
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).touch()
        (tmp_path / name).mkdir(exist_ok=True)
        return tmp_path / name

    for made in (folder("run", "ledger.sqlite", "job.toml"), folder("begun", "job.toml"), folder("empty")):
        assert find(made) == made / "ledger.sqlite"
    for made in (folder("deployed", "server/run/ledger.sqlite"), folder("waiting", "server/server.toml")):
        assert find(made) == made / "server" / "run" / "ledger.sqlite"
    assert find(tmp_path / "waiting" / "server") == tmp_path / "waiting" / "server" / "run" / "ledger.sqlite"
    for wrong, problem in ((folder("other", "notes.txt"), "holds no run"), (tmp_path / "no", "does not exist")):
        with pytest.raises(InputError, match=f"{problem}: name the directory of a run"):
            find(wrong)


def test_a_snapshot_is_of_one_moment(tmp_path):
    path = tmp_path / "ledger.sqlite"
    with records.begin(path) as ledger, Ledger(path, readonly=True) as reader:
        records.write(ledger, 1)
        with reader.snapshot():
            assert len(reader.rounds()) == 1
            records.write(ledger, 2)
            assert len(reader.rounds()) == 1
        assert len(reader.rounds()) == 2
