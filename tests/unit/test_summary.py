"""What the report shows equals what is counted by hand from the ledger's rows."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import pytest
from made_up import record

from fedkeel.ship import summary, words
from fedkeel.ship.rundir import RunDir
from fedkeel.ship.summary import Counts, Point


@pytest.fixture(scope="module")
def federation(tmp_path_factory) -> Path:
    return record(tmp_path_factory.mktemp("runs") / "x").path


def test_counts_and_grid_equal_counting_by_hand(federation):
    run = summary.load(federation)
    with RunDir(federation).ledger(readonly=True) as ledger:
        updates = ledger.updates()
    lost = [u for u in updates if u["stage"] == "transport"]
    tally = Counter((bool(u["hostile"]), bool(u["stage"])) for u in updates if u not in lost)
    assert run.counts == Counts(
        True, 10, 50, tally[False, False], tally[False, True], tally[True, False], tally[True, True], len(lost)
    )
    assert run.counts.recall == tally[True, True] / (tally[True, True] + tally[True, False])
    assert run.counts.precision == tally[True, True] / (tally[True, True] + tally[False, True])
    assert [row["round"] for row in run.verdicts] == list(range(1, 31))
    assert sum(row["hostile_refused"] for row in run.verdicts) == tally[True, True]
    assert run.grid is not None
    assert run.grid.hostile == 10
    place = {name: i for i, name in enumerate(sorted({u["client"] for u in updates}, key=summary.natural))}
    for u in updates:
        row, column = place[u["client"]], u["round"] - 1
        assert run.grid.weight[row][column] == u["weight"]
        assert run.grid.refused[row][column] == (u["stage"] in ("check", "screen"))


def test_bins_are_means(tmp_path):
    path = record(tmp_path / "x", clients=320, rounds=310, hostile=31, picked=5).path
    run = summary.load(path)
    with RunDir(path).ledger(readonly=True) as ledger:
        rounds, updates = ledger.rounds(), ledger.updates()
    width = 3
    assert len(run.traffic) == math.ceil(310 / width)
    up = [sum(r["bytes_up"] for r in rounds[i : i + width]) / width for i in range(0, 309, width)]
    assert [row["up"] for row in run.traffic[:-1]] == pytest.approx(up)
    admitted = Counter((u["round"] - 1) // width for u in updates if u["stage"] is None)
    assert [r["honest_admitted"] + r["hostile_admitted"] for r in run.verdicts[:-1]] == pytest.approx(
        [admitted[i] / width for i in range(103)]
    )
    assert run.grid is not None
    assert (len(run.grid.weight), len(run.grid.weight[0])) == (math.ceil(run.counts.clients / 3), 104)
    assert sum(run.parts.values()) == pytest.approx(sum(sum(r["seconds"].values()) for r in rounds))


def test_thin_keeps_the_ends():
    assert summary.thin(range(5), 5) == [0, 1, 2, 3, 4]
    kept = summary.thin(range(1001), 11)
    assert kept == list(range(0, 1001, 100))


def test_natural_order():
    names = ["c10", "c2", "", "b", "2", "10"]
    assert sorted(names, key=summary.natural) == ["", "2", "10", "b", "c2", "c10"]


@pytest.mark.parametrize(
    ("said", "words_of_it"),
    [
        (words.size(0), "0 B"), (words.size(999), "999 B"), (words.size(999.9), "1 kB"),
        (words.duration(0.0123), "0.012 s"), (words.duration(59.4), "59 s"), (words.duration(7500), "2 h 5 min"),
        (words.duration(59.9), "1 min 0 s"), (words.count(1, "client"), "1 client"),
        (words.count(1200, "client"), "1,200 clients"), (words.number(math.nan), "no number"),
        (words.figure_of(Point(1, 0.5, 0.25, 0.75), True), "50.0% (25.0 to 75.0%)"),
        (words.difference(Point(1, 0.1), Point(1, 0.9), True), "\N{MINUS SIGN}80.0 points"),
        (words.short("a\nb" * 9, 8), "a\\nba\\n…"),
        (words.verdict(Counts(True, 2, 9, 5, 0, 0, 7)), "2 hostile clients sent 7 updates: every one was refused."),
        (words.verdict(Counts(True, 1, 9, 5, 2, 1, 0)),
         "1 hostile client sent 1 update: every one was admitted. 2 of 7 honest updates were refused."),
        (words.verdict(Counts(True, 0, 9, 5, 2, 0, 0)), "No client was hostile: 2 of 7 updates were refused."),
        (words.verdict(Counts(False, 0, 9, 5, 0, 0, 0)), "All 5 updates were admitted."),
    ],
)  # fmt: skip
def test_words(said, words_of_it):
    assert said == words_of_it
