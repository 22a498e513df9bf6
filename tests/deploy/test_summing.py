"""Sums under masks on a network of our own: answers lost, late, doubled and false, nodes gone at every stage."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkeel.deploy.summing import Asked, Seat, Summing
from fedkeel.secagg.client import Client
from fedkeel.secagg.messages import is_terms, read_terms
from fedkeel.secagg.terms import Terms

NAMES = tuple(f"c{i}" for i in range(7))
STAGES = ("keys", "shares", "rows", "unmask")


class Net:
    """Nodes that answer at once, but for what is lost; a clock that moves when nobody has anything to say."""

    def __init__(self, columns: int = 5, seconds: float = 10.0) -> None:
        self.now, self.number = 0.0, 0
        self.terms = Terms.drawn(NAMES, columns)
        self.rows = {
            name: np.random.default_rng(i).integers(0, 2**32, columns, np.uint32)
            for i, name in enumerate(self.terms.members)
        }
        self.seats = {name: Seat(i, "then") for i, name in enumerate(self.terms.members)}
        self.nodes: dict[str, Client] = {}
        self.last: dict[str, tuple[bytes, bytes]] = {}
        self.inbox: list[tuple[str, int, bytes]] = []
        self.stage: dict[str, int] = {}
        self.summing = Summing((self.terms,), seconds, 0.0, self.say)

    def say(self, told: Mapping[str, bytes]) -> Mapping[str, Asked]:
        asked = {}
        for client, data in told.items():
            if client in self.seats:
                self.number += 1
                asked[client] = Asked(self.seats[client], self.number)
                self.inbox.append((client, self.number, data))
        return asked

    def answer(self, client: str, data: bytes) -> bytes:
        """As a node does: the same answer to the same message."""
        if self.last.get(client, (b"", b""))[0] != data:
            if is_terms(data):
                self.nodes[client] = Client(client, read_terms(data))
                self.nodes[client].hold(self.rows[client])
                said = self.nodes[client].advertise()
            else:
                said = self.nodes[client].answer(data)
            self.last[client] = data, said
        return self.last[client][1]

    def total(self, clients: tuple[str, ...]) -> np.ndarray:
        return np.sum([self.rows[client] for client in clients], axis=0, dtype=np.uint32)


def play(net: Net, *, lost: set[tuple[str, str]] = frozenset(), gone: Mapping[str, str] | None = None) -> int:
    """To the end: `lost` answers (client, stage) once each, nodes that are `gone` from a stage on. Steps taken."""
    lost, steps = set(lost), 0
    while not net.summing.over:
        steps += 1
        assert steps < 200
        net.summing.step(net.now)
        stage = net.summing._sessions[0].server.stage
        for client, since in (gone or {}).items():
            if stage == since:
                net.seats.pop(client, None)
        messages, net.inbox = net.inbox, []
        for client, number, data in messages:
            if client not in net.seats:
                continue
            said = net.answer(client, data)
            if (client, stage) in lost:
                lost.remove((client, stage))
                continue
            net.summing.heard(client, number, memoryview(said), "")
            net.summing.heard(client, number, memoryview(said), "")  # Flower may deliver twice
        if not messages:
            net.now += 1.0
            net.summing.look(net.seats)
            for client in sorted(net.summing.waiting):
                net.number += 1
                net.summing.echo(client, net.number)
    return steps


@settings(max_examples=60, deadline=None)
@given(
    lost=st.sets(st.tuples(st.sampled_from(NAMES), st.sampled_from(STAGES)), max_size=12),
    gone=st.dictionaries(st.sampled_from(NAMES), st.sampled_from(STAGES), max_size=3),
)
def test_what_is_lost_is_asked_again_and_the_sum_is_that_of_those_who_stayed(lost, gone):
    net = Net()
    play(net, lost=lost, gone=gone)
    (found,) = net.summing.sums()
    early = {client for client, stage in gone.items() if stage != "unmask"}
    if len(NAMES) - len(gone) < net.terms.threshold:
        assert found.total is None
        assert f"{net.terms.threshold} are needed" in found.reason
    else:
        assert set(found.survivors) == set(NAMES) - early
        assert np.array_equal(found.total, net.total(found.survivors))
    assert set(found.traffic) == set(NAMES)
    assert all(down > 0 for down, _ in found.traffic.values())


def test_a_silent_node_costs_the_time_of_one_stage_and_a_false_answer_none():
    net = Net(seconds=4.0)
    silent, liar = NAMES[0], NAMES[1]
    answer = net.answer
    net.answer = lambda client, data: b"junk" if client == liar else answer(client, data)
    net.summing.echo = lambda client, number: None  # it is there, and never answers
    while not net.summing.over:
        net.summing.step(net.now)
        messages, net.inbox = net.inbox, []
        for client, number, data in messages:
            if client != silent:
                net.summing.heard(client, number, memoryview(net.answer(client, data)), "")
        net.now += 0.5
    (found,) = net.summing.sums()
    assert 4.0 <= net.now < 8.0
    assert set(found.survivors) == set(NAMES[2:])  # five of seven: the least that may
    assert np.array_equal(found.total, net.total(found.survivors))


def test_an_old_answer_and_a_strangers_change_nothing():
    net = Net()
    net.summing.step(0.0)
    client, number, data = net.inbox[0]
    net.summing.heard(client, number - 1, memoryview(net.answer(client, data)), "")
    net.summing.heard("stranger", number, memoryview(b""), "")
    assert client in net.summing.waiting
    play(net)
    assert net.summing.sums()[0].survivors == tuple(sorted(NAMES))


@pytest.mark.parametrize("why", ["its node raised", "no reply"])
def test_a_node_that_says_that_it_can_not_is_asked_no_more(why):
    net = Net()
    net.summing.step(0.0)
    client, number, _ = net.inbox.pop(0)
    net.summing.heard(client, number, None, why)
    play(net)
    (found,) = net.summing.sums()
    assert client not in found.survivors
    assert len(found.survivors) == 6
