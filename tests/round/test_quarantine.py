"""Quarantine: who is refused often is left out for a while, and nobody else ever is."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import answer, make_layout, make_plan
from hypothesis import given, settings
from hypothesis import strategies as st
from test_coordinator import drive, shut_out

from fedkeel.core.types import ClientRow, Refusal
from fedkeel.round.quarantine import Book, Quarantine

LAYOUT = make_layout()
CLIENTS = tuple("abcde")


def rows(*offenders: str, stage: str = "screen", rule: str = "cosine") -> list[ClientRow]:
    return [ClientRow(client, Refusal(stage, rule, "why")) for client in offenders]  # type: ignore[arg-type]


def refused_every(gap: int, rule: Quarantine, rounds: int = 200) -> bool:
    book = Book(rule, {})
    shut = False
    for number in range(1, rounds + 1):
        book.close(number, rows("a") if number % gap == 0 else [], set(CLIENTS))
        shut = shut or bool(book.shut_out(CLIENTS, 1))
    return shut


@settings(deadline=None)
@given(limit=st.floats(1.1, 8.0), decay=st.floats(0.3, 0.95), gap=st.integers(1, 12))
def test_only_who_is_refused_often_is_ever_shut_out(limit: float, decay: float, gap: int) -> None:
    """Refused once in `gap` rounds, a record tops out at 1 / (1 - decay^gap)."""
    most = 1 / (1 - decay**gap)
    if abs(most - limit) > 1e-6:
        assert refused_every(gap, Quarantine(limit, decay)) == (most > limit)


def test_it_ends_below_half_of_the_limit() -> None:
    book = Book(Quarantine(2.0, 0.8), {})
    stays = []
    for number in range(1, 12):
        book.close(number, rows("a") if number <= 3 else [], set(CLIENTS))
        stays.append("a" in book.shut_out(CLIENTS, 1))
    # 1, 1.8, 2.44, 1.95, 1.56, 1.25, 0.9995
    assert stays == [False, False, True, True, True, True, False, False, False, False, False]


@pytest.mark.parametrize(
    ("stage", "rule"),
    [
        *(("late", "deadline"), ("transport", "failure"), ("train", "failure"), ("check", "duplicate")),
        ("screen", "near_duplicates"),
    ],
)
def test_a_bad_network_is_no_offence(stage: str, rule: str) -> None:
    book = Book(Quarantine(1.0, 0.5), {})
    for number in range(1, 9):
        book.close(number, rows("a", stage=stage, rule=rule), set(CLIENTS))
    assert book.to_json() == {}


def test_a_record_shrinks_only_while_its_client_has_work() -> None:
    """Of a sampled federation: refused whenever it is asked, one round in ten."""
    book = Book(Quarantine(3.0, 0.9), {})
    for number in range(1, 61):
        asked = number % 10 == 0
        book.close(number, rows("a") if asked else [], {"a"} if asked else {"b"})
        if book.shut_out(CLIENTS, 1):
            break
    assert number == 40  # 1, 1.9, 2.71, 3.44: as in four rounds running


def test_who_was_not_asked_leaves_no_record() -> None:
    book = Book(Quarantine(1.0, 0.99), {})
    for number in range(1, 50):
        book.close(number, rows(*(f"stranger-{number}-{i}" for i in range(20)), stage="decode"), set(CLIENTS))
    assert book.to_json() == {}


def test_half_of_the_clients_always_stay_the_least_refused_ones() -> None:
    book = Book(Quarantine(1.0, 0.9), {})
    book.close(1, rows("b"), set(CLIENTS))
    book.close(2, rows(*CLIENTS), set(CLIENTS))
    assert set(book.shut_out(CLIENTS, 1)) <= {"b", "a", "c", "d", "e"}
    assert "b" in book.shut_out(CLIENTS, 1)
    assert len(book.shut_out(CLIENTS, 1)) == 2
    assert len(book.shut_out(CLIENTS, 4)) == 1
    assert book.shut_out(CLIENTS, 5) == {}


def test_records_survive_as_json() -> None:
    book = Book(Quarantine(2.0, 0.9), {})
    for number in range(1, 5):
        book.close(number, rows("a", *(["b"] if number % 2 else [])), set(CLIENTS))
    again = Book(Quarantine(2.0, 0.9), json.loads(json.dumps(book.to_json())))
    for number in range(5, 12):
        book.close(number, [], set(CLIENTS))
        again.close(number, [], set(CLIENTS))
        assert again.to_json() == book.to_json()
        assert again.shut_out(CLIENTS, 1) == book.shut_out(CLIENTS, 1)


def test_a_client_of_broken_updates_gets_no_more_work_and_comes_back() -> None:
    plan = make_plan(5, quarantine=Quarantine(2.0, 0.7))
    given: list[tuple[int, str]] = []

    def answers(order):
        given.append((order.round, order.client))
        bad = order.client == "c" and order.round <= 4
        return answer(plan, LAYOUT, order, torch.full((3,), torch.nan if bad else float(order.task + 1)))

    _, reports = drive(plan, answers, rounds=9)
    # The record: 1, 1.7, 2.19 (shut), 1.53, 1.07, 0.75 (in again)
    assert [r.round for r in reports if "c" in shut_out(r)] == [4, 5, 6]
    assert [number for number, client in given if client == "c"] == [1, 2, 3, 7, 8, 9]
    why = next(c.refusal for c in reports[3].clients if c.client == "c")
    assert why is not None
    assert why.reason == "in quarantine since round 3: its record is 2.19, out below 1"
    assert all(r.skipped is None for r in reports)


def test_as_many_clients_stay_as_the_rules_need() -> None:
    plan = make_plan(5, reduce="trimmed_mean(trim=2)", quarantine=Quarantine(1.0, 0.9))
    assert plan.least == 5

    def answers(order):
        return answer(plan, LAYOUT, order, torch.full((3,), torch.nan if order.client == "a" else 1.0 + order.task))

    _, reports = drive(plan, answers, rounds=4)
    assert all(shut_out(r) == set() for r in reports)
