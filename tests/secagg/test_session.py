"""Sessions among the honest: the exact sum of who survives, whoever drops out when; below the threshold, nothing."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sessions import Session, drawn_rows

from fedkeel.core.errors import CohortError
from fedkeel.core.keys import Key
from fedkeel.secagg import messages, shamir
from fedkeel.secagg.groups import deal
from fedkeel.secagg.messages import Unmask
from fedkeel.secagg.simulate import group_sums, masked_sum, plain_sum
from fedkeel.secagg.terms import Terms, threshold_of

STAGES = ("keys", "shares", "rows", "consents", "unmask")


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("size", [2, 3, 5, 10])
def test_the_sum_is_exact(size, bits):
    session = Session(size, bits=bits).until("done")
    assert session.server.total().tolist() == session.sum_of(session.terms.members)
    assert session.server.survivors == session.terms.members


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("stage", STAGES)
def test_one_may_drop_out_at_any_stage(stage, signed):
    session = Session(5, signed=signed).until("done", {stage: ["c2"]})
    there = [n for n in session.terms.members if n != "c2" or stage in ("consents", "unmask")]
    assert list(session.server.survivors) == there
    assert session.server.total().tolist() == session.sum_of(there)


def test_three_of_ten_at_three_stages():
    session = Session(10).until("done", {"keys": ["c0"], "shares": ["c5"], "rows": ["c9"]})
    assert session.server.total().tolist() == session.sum_of([f"c{i}" for i in (1, 2, 3, 4, 6, 7, 8)])


@pytest.mark.parametrize("stage", ["keys", "shares", "rows", "unmask"])
def test_exactly_the_threshold_is_enough_and_one_less_is_not(stage):
    enough = Session(8, threshold=5).until("done", {stage: ["c0", "c3", "c6"]})
    left = [n for n in enough.terms.members if n not in ("c0", "c3", "c6") or stage == "unmask"]
    assert enough.server.total().tolist() == enough.sum_of(left)

    session = Session(8, threshold=5).until(stage)
    lost = ["c0", "c3", "c6", "c7"]
    with pytest.raises(CohortError, match=r"^secure aggregation: 4 of a group of 8 [a-z ]+, 5 are needed$"):
        session.step(lost)
    assert session.server.stage == "failed"
    assert not session.server.waiting
    with pytest.raises(ValueError, match="still under masks"):
        session.server.total()
    with pytest.raises(ValueError, match="at its end"):
        session.server.advance()


def test_too_few_shares_reveal_nothing():
    """What the server holds of a session that failed at the end: threshold - 1 shares of every secret it lacks."""
    session = Session(8, threshold=5).until("unmask")
    given_ = [messages.read(session.answers[name], session.terms) for name in ("c0", "c1", "c2", "c3")]
    assert all(isinstance(each, Unmask) for each in given_)
    for place in range(8):
        shares = {i + 1: each.seeds[place] for i, each in enumerate(given_)}
        # Any secret goes with these four shares: a fifth that leads to it exists.
        wanted = int.from_bytes(b"any secret of 32 bytes, this one", "little")
        points = {0: wanted, **{p: int.from_bytes(s, "little") for p, s in shares.items()}}
        fifth = shamir.interpolate(points, 5)
        assert shamir.interpolate({**{p: points[p] for p in shares}, 5: fifth}) == wanted


LOST = st.dictionaries(st.integers(0, 11), st.sampled_from(STAGES), max_size=5)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 9), LOST, st.booleans(), st.sampled_from([0, 0, 2, 4]), st.sampled_from([32, 64]), st.data())
def test_masked_and_plain_sums_are_equal(size, lost, signed, degree, bits, data):
    """The law: the same survivors, the same bits, the same reason where there is no sum."""
    names = [f"client {i}" for i in range(size)]
    holding = degree + 1 if 0 < degree < size - 1 else size
    threshold = data.draw(st.integers(max(2, holding // 2 + 1), holding))
    terms = Terms.drawn(names, 5, threshold=threshold, bits=bits, degree=degree, signed=signed)
    rows = drawn_rows(terms, seed=size)
    gone = {names[i]: stage for i, stage in lost.items() if i < size}
    masked, plain = masked_sum(terms, rows, gone), plain_sum(terms, rows, gone)
    assert masked.survivors == plain.survivors
    assert masked.reason == plain.reason
    assert (masked.total is None) == (plain.total is None) == (plain.reason is not None)
    if masked.total is not None:
        assert masked.total.tobytes() == plain.total.tobytes()
        by_hand = [sum(int(rows[n][c]) for n in masked.survivors) % 2**bits for c in range(5)]
        assert masked.total.tolist() == by_hand
        assert len(masked.survivors) >= threshold


@settings(max_examples=25, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(3, 6))
def test_order_repeats_and_rubbish_change_nothing(luck: random.Random, size):
    session = Session(size, signed=luck.random() < 0.5)
    server = session.server
    while server.stage != "done":
        post = [(n, d) for n, d in session.answers.items() for _ in range(luck.randint(1, 2))]
        post += [(luck.choice(session.terms.members), luck.randbytes(luck.randint(0, 200))) for _ in range(3)]
        post += [("nobody", d) for d in list(session.answers.values())[:1]]
        post += [
            (a, session.answers[b]) for a, b in zip(list(session.answers), list(session.answers)[1:], strict=False)
        ]
        luck.shuffle(post)
        let_in = Counter(name for name, data in post if server.offer(name, data) is None)
        assert let_in == Counter(list(session.answers))
        assert server.ready
        assert not server.waiting
        session.orders = server.advance()
        session.answers = {n: session.clients[n].answer(d) for n, d in session.orders.items()}
    assert server.total().tolist() == session.sum_of(session.terms.members)


def test_a_larger_group_with_a_neighbour_graph():
    session = Session(40, degree=10, threshold=6)
    session.until("done", {"keys": ["c3"], "shares": ["c17"], "rows": ["c20", "c31"], "unmask": ["c9"]})
    left = session.terms.places.keys() - {"c3", "c17", "c20", "c31"}
    assert session.server.total().tolist() == session.sum_of(left)


def test_a_neighbour_graph_costs_a_client_its_neighbours_only():
    sizes = {degree: len(Session(40, degree=degree).until("shares").answers["c0"]) for degree in (4, 10, 0)}
    assert sizes[10] - sizes[4] == 6 * (4 + messages.SEALED)
    assert sizes[0] - sizes[10] == 29 * (4 + messages.SEALED)


def test_ready_says_when_a_stage_may_be_closed():
    session = Session(5, threshold=3)
    for place, name in enumerate(session.terms.members):
        assert session.server.ready == (place >= 3)
        assert len(session.server.waiting) == 5 - place
        assert session.server.offer(name, session.answers[name]) is None


def test_one_group_that_fails_does_not_touch_the_others():
    names = [f"c{i}" for i in range(17)]
    groups = [Terms.drawn(members, 6) for members in deal(names, 5, Key(3))]
    rows = {n: r for terms in groups for n, r in drawn_rows(terms, 7).items()}
    lost = dict.fromkeys(groups[1].members[:4], "rows") | {groups[2].members[0]: "unmask"}
    masked, plain = (group_sums(groups, rows, lost, masked=kind) for kind in (True, False))
    assert [g.total is None for g in masked] == [False, True, False]
    for a, b in zip(masked, plain, strict=True):
        assert (a.survivors, a.reason) == (b.survivors, b.reason)
        assert a.total is b.total is None or np.array_equal(a.total, b.total)


def test_the_clients_row_is_not_changed():
    session = Session(3)
    before = session.rows["c0"].copy()
    session.until("done")
    assert np.array_equal(session.rows["c0"], before)


def test_threshold_of_default_terms():
    assert [Terms.drawn([str(i) for i in range(n)], 1).threshold for n in (2, 3, 5, 10, 20)] == [2, 3, 4, 7, 14]
    assert Terms.drawn([str(i) for i in range(50)], 1, degree=10).threshold == threshold_of(11) == 8


@pytest.mark.parametrize("size", [3, 5, 130])  # places above 127 take more bytes
def test_traffic_is_what_a_session_sends(size):
    session = Session(size, columns=7)
    up = {name: len(data) for name, data in session.answers.items()}
    down = dict.fromkeys(up, len(messages.write_terms(session.terms)))
    while session.server.stage != "done":
        for name, data in session.answers.items():
            assert session.server.offer(name, data) is None
        orders = session.server.advance()
        session.answers = {name: session.clients[name].answer(data) for name, data in orders.items()}
        for name, data in orders.items():
            down[name] += len(data)
            up[name] += len(session.answers[name])
    assert messages.traffic(session.terms) == {name: (down[name], up[name]) for name in up}
