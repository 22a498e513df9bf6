"""Ten thousand clients and a hundred thousand rounds: each row is read once, and answers stay small."""

from __future__ import annotations

import json

import pytest
import records

from fedkeel.core.types import ClientRow
from fedkeel.dashboard import prometheus, view
from fedkeel.dashboard.bins import POINTS
from fedkeel.dashboard.feed import ROWS, Feed
from fedkeel.ship.ledger import Ledger

ROUNDS, CLIENTS, UPDATES = 100_000, 10_000, 2


@pytest.fixture(scope="module")
def feed(tmp_path_factory):
    path = tmp_path_factory.mktemp("large") / "ledger.sqlite"
    records.many(path, ROUNDS, CLIENTS, UPDATES)
    feed, steps = Feed(path), []
    more = True
    while more:
        before = feed.read
        more = feed.step()
        steps.append(feed.read - before)
        assert view.status(feed) == ("reading" if more else "running")
    assert max(steps) <= ROWS + UPDATES  # no step holds up those who ask meanwhile
    return feed


def size(value):
    return len(json.dumps(value, separators=(",", ":")))


def test_each_row_is_read_once(feed):
    assert feed.read == ROUNDS * UPDATES
    seen = feed.revision
    feed.step()
    assert (feed.read, feed.revision) == (ROUNDS * UPDATES, seen)
    with Ledger(feed.path) as ledger:
        records.write(ledger, ROUNDS + 1, *(ClientRow(f"client-{i:05}", None, weight=0.1) for i in range(7)))
    feed.step()
    assert feed.read == ROUNDS * UPDATES + 7
    assert feed.revision == seen + 1
    assert feed.tally.round == ROUNDS + 1


def test_answers_stay_small(feed):
    found = view.overview(feed)
    curves = [*found["metrics"].values(), found["spans"]]
    assert all(POINTS // 4 < len(curve["round"]) <= POINTS for curve in curves)
    assert found["metrics"]["accuracy"]["round"][-1] == ROUNDS
    assert size(found) < 120_000
    assert found["total"]["clients"] == CLIENTS
    for sort in ("name", "trust", "bytes"):
        assert size(view.clients(feed, sort=sort, limit=view.PAGE)) < 50_000
    assert len(prometheus.exposition(feed)) < 10_000


def test_a_federation_of_many_classes_metrics_and_rules_is_told_in_bounds(tmp_path):
    path = tmp_path / "ledger.sqlite"
    with records.begin(path, {f"client-{i}": f"class {i}" for i in range(300)}) as ledger, ledger.transaction():
        for round in range(1, 1300):
            name = f"client-{round % 300}"
            reason = records.REFUSED.refusal._replace(rule=f"rule {round}", reason="x" * 5000)
            rows = ClientRow(name, reason if round % 2 else None, weight=0.5, staleness=round % 100, trust=round)
            records.write(ledger, round, rows)
            values = {f"metric {i}": round / 7 for i in range(30)}
            ledger.write_metrics(round, round, {"accuracy": 0.5, "loss": round / 3, **values})
            for i in range(40):
                ledger.write_metrics(round, round, {"accuracy": (round / 1e4, 0.0, 1.0)}, scope=f"class/class {i}")
    feed = Feed(path)
    while feed.step():
        pass
    assert size(view.overview(feed)) < 600_000
