"""Sessions: the exact sum of who survives, whoever drops out when; and nothing for who breaks the protocol."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sessions import Session, drawn_rows

from fedkeel.core.errors import CohortError, DecodeError, InputError
from fedkeel.core.keys import Key
from fedkeel.secagg import messages, shamir
from fedkeel.secagg.client import Client, Signer
from fedkeel.secagg.crypto import KeyPair
from fedkeel.secagg.groups import deal
from fedkeel.secagg.messages import Consents, Delivery, Keys, Survivors, Unmask
from fedkeel.secagg.server import Server
from fedkeel.secagg.simulate import group_sums, masked_sum, plain_sum
from fedkeel.secagg.terms import ProtocolError, Terms, threshold_of

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


# -- a server that does not keep to the protocol


def announced(session: Session, places) -> bytes:
    return messages.write(Survivors(frozenset(places)), session.terms)


def test_a_client_answers_one_list_of_survivors():
    session = Session(6).until("unmask")
    client = session.clients["c1"]
    first = announced(session, range(6))
    assert client.answer(first) == session.answers["c1"]
    for other in ({0, 1, 2, 3, 4}, {1, 2, 3, 4, 5}):
        with pytest.raises(ProtocolError, match="other survivors before"):
            client.answer(announced(session, other))
    assert client.answer(first) == session.answers["c1"]


def test_of_nobody_both_shares():
    session = Session(6).until("rows")
    session.step(["c4"])
    for name, data in session.answers.items():
        message = messages.read(data, session.terms)
        assert message.seeds.keys() | message.mask_keys.keys() == set(range(6)), name
        assert message.seeds.keys() & message.mask_keys.keys() == set()
        assert message.mask_keys.keys() == {4}


@pytest.mark.parametrize(
    ("places", "said"),
    [
        ({0, 1, 2}, "3 of those who hold .* survive, not 5"),
        ({1, 2, 3, 4, 5}, "and itself"),
        ({0, 1, 2, 3, 4}, None),
    ],
)
def test_survivors_that_are_too_few_or_without_the_client(places, said):
    session = Session(6).until("rows")
    client = session.clients["c0"]
    if said:
        with pytest.raises(ProtocolError, match=said):
            client.answer(announced(session, places))
    else:
        assert client.answer(announced(session, places))


LISTS = [{0, 1, 6, 7, 8, 9}, {1, 2, 6, 7, 8, 9}, {2, 3, 6, 7, 8, 9}, {3, 4, 6, 7, 8, 9}, {4, 5, 6, 7, 8, 9}]
LISTS += [{5, 0, 6, 7, 8, 9}, {0, 3, 6, 7, 8, 9}, {1, 4, 6, 7, 8, 9}, {2, 5, 6, 7, 8, 9}, {0, 3, 6, 7, 8, 9}]
"""Of ten clients, each is shown six survivors and itself among them; each of 0 to 5 is lost to six clients or more."""


@pytest.mark.parametrize("signed", [False, True])
def test_what_the_consistency_check_is_for(signed):
    """A server that shows each client another list gets the mask keys of six clients of ten, and so the sum of four,
    below a threshold of six; not from a signed session."""
    session = Session(10, threshold=6, signed=signed).until("rows")
    answers = [session.clients[f"c{i}"].answer(announced(session, places)) for i, places in enumerate(LISTS)]
    if signed:
        signatures = {i: messages.read(data, session.terms).signature for i, data in enumerate(answers)}
        for client in session.clients.values():
            with pytest.raises(ProtocolError, match="have signed the same survivors, not 6"):
                client.answer(messages.write(Consents(signatures), session.terms))
        return
    given_ = [messages.read(data, session.terms) for data in answers]
    for place in range(6):
        shares = {i + 1: each.mask_keys[place] for i, each in enumerate(given_) if place in each.mask_keys}
        public = session.clients[f"c{place}"]._public[32:]
        assert shamir.recover(shares, 6, lambda secret, public=public: KeyPair(secret).public == public)


def test_survivors_who_never_shared_are_refused():
    session = Session(6).until("rows", {"shares": ["c5"]})
    with pytest.raises(ProtocolError, match="not those who this client shares masks with"):
        session.clients["c0"].answer(announced(session, range(6)))


def test_messages_out_of_their_turn_are_refused():
    session = Session(5)
    client = session.clients["c0"]
    with pytest.raises(ProtocolError, match="waits for 'keys'"):
        client.answer(announced(session, range(5)))
    with pytest.raises(ProtocolError, match="waits for 'keys'"):
        client.answer(messages.write(Delivery({}), session.terms))
    with pytest.raises(ProtocolError, match="a client's"):
        client.answer(session.answers["c1"])
    with pytest.raises(ProtocolError, match="before any survivors"):
        client.answer(messages.write(Consents({}), session.terms))
    session.step()
    keys = session.orders["c0"]
    with pytest.raises(ProtocolError, match="waits for 'delivery'"):
        client.answer(keys)
    session.step()
    session.clients["c0"].hold(session.rows["c1"])
    with pytest.raises(ProtocolError, match="waits for 'survivors'"):
        client.answer(session.orders["c0"])  # another row under the same masks would tell their difference


def test_keys_that_are_not_the_clients_own_or_too_few_are_refused():
    session = Session(5).until("shares")
    fresh = Session(terms=session.terms)
    message = messages.read(session.orders["c0"], session.terms)
    own = messages.read(fresh.answers["c0"], session.terms).keys
    right = {**message.keys, 0: own}
    for keys, said in (
        (message.keys, "other keys of this client"),
        ({p: k for p, k in right.items() if p}, "neighbours and itself"),
        ({p: k for p, k in right.items() if p < 3}, "3 of those who hold .* have keys, not 4"),
        ({**right, 3: bytes(64)}, "low order"),
    ):
        with pytest.raises(ProtocolError, match=said):
            fresh.clients["c0"].answer(messages.write(Keys(keys), session.terms))
    assert fresh.clients["c0"].answer(messages.write(Keys(right), session.terms))  # nothing was lost by that


def test_a_delivery_that_is_too_small_or_of_strangers_is_refused():
    session = Session(5).until("shares", {"keys": ["c4"]})
    session.step()
    client = Session(terms=session.terms)
    delivery = messages.read(session.orders["c0"], session.terms)
    fresh = client.clients["c0"]
    keys = {p: messages.read(client.answers[f"c{p}"], client.terms).keys for p in range(4)}
    fresh.answer(messages.write(Keys(keys), client.terms))
    few = dict(list(delivery.sealed.items())[:2])
    with pytest.raises(ProtocolError, match=r"3 of those who hold .* have shared, not 4"):
        fresh.answer(messages.write(Delivery(few), client.terms))
    with pytest.raises(ProtocolError, match="whose keys have not"):
        fresh.answer(messages.write(Delivery({**delivery.sealed, 4: bytes(messages.SEALED)}), client.terms))


# -- signed sessions


def test_keys_that_the_server_made_up_are_refused():
    session = Session(5, signed=True)
    session.step()
    honest = messages.read(session.orders["c0"], session.terms)
    forged = Session(terms=session.terms)
    theirs = messages.read(forged.answers["c1"], session.terms)
    client = session.client("c0")
    mine = messages.read(client.advertise(), session.terms)
    keys = {**honest.keys, 0: mine.keys + mine.signature, 1: theirs.keys + theirs.signature}
    with pytest.raises(ProtocolError, match="keys of 'c1' are not signed by it"):
        client.answer(messages.write(Keys(keys), session.terms))


def test_no_share_is_given_before_enough_have_signed_the_same_survivors():
    """Two lists, shown to half the group each: neither half finds enough signatures."""
    session = Session(6, signed=True).until("rows")
    lists = [frozenset(range(6)), frozenset(range(5))]
    signatures = {}
    for place in range(5):
        consent = session.clients[f"c{place}"].answer(announced(session, lists[place % 2]))
        signatures[place] = messages.read(consent, session.terms).signature
    both = messages.write(Consents(signatures), session.terms)
    for place in range(5):
        with pytest.raises(ProtocolError, match="have signed the same survivors, not 5"):
            session.clients[f"c{place}"].answer(both)


def test_signatures_of_others_or_of_lost_clients_do_not_count():
    session = Session(6, signed=True).until("unmask", {"rows": ["c5"]})
    right = messages.read(session.orders["c0"], session.terms).signatures
    assert right.keys() == set(range(5))
    client = session.clients["c0"]
    for wrong in ({**right, 1: right[2]}, {p: s for p, s in right.items() if p != 1}, {**right, 1: bytes(64)}):
        with pytest.raises(ProtocolError, match=r"4 of those who hold .* have signed"):
            client.answer(messages.write(Consents(wrong), session.terms))
    assert client.answer(session.orders["c0"])


def test_a_session_is_signed_for_both_or_for_neither():
    unsigned, signed = Session(3), Session(3, signed=True)
    with pytest.raises(InputError, match="has no key to sign with"):
        Client("c0", signed.terms)
    with pytest.raises(InputError, match="has a key to sign with, and the session is not"):
        Client("c0", unsigned.terms, Signer(unsigned.private["c0"], unsigned.known))


def test_the_server_refuses_what_is_not_signed():
    session = Session(3, signed=True)
    other = Session(terms=session.terms)
    refusal = session.server.offer("c0", other.answers["c0"])
    assert refusal is not None
    assert "not signed" in refusal.reason
    assert Server(session.terms).offer("c0", session.answers["c0"]) is not None  # it knows nobody's key


# -- clients that do not keep to the protocol


@pytest.mark.parametrize("liar", ["c0", "c4"])
def test_a_wrong_share_is_left_out_where_there_are_more_than_enough(liar):
    session = Session(6, threshold=4).until("unmask", {"rows": ["c2"]})
    message = messages.read(session.answers[liar], session.terms)
    seeds = dict(message.seeds) | {1: bytes(shamir.SHARE)}
    lie = Unmask(liar, seeds, {2: bytes(shamir.SHARE)})
    session.answers[liar] = messages.write(lie, session.terms)
    session.step()
    assert session.server.total().tolist() == session.sum_of(["c0", "c1", "c3", "c4", "c5"])
    assert list(session.server.doubted) == [liar]
    assert "'c1' does not fit" in session.server.doubted[liar].reason


def test_a_wrong_share_among_just_enough_ends_the_group():
    session = Session(6, threshold=5).until("unmask", {"rows": ["c2"]})
    message = messages.read(session.answers["c0"], session.terms)
    session.answers["c0"] = messages.write(
        Unmask("c0", dict(message.seeds) | {3: bytes(shamir.SHARE)}, message.mask_keys), session.terms
    )
    with pytest.raises(CohortError, match="secret of 'c3' could not be put together from 5 shares, 5 right ones"):
        session.step()
    assert session.server.stage == "failed"


@pytest.mark.parametrize(("closed", "lost"), [((0, 1), []), ((0,), ["c3"])])
def test_shares_that_do_not_open_for_some_are_made_up_for_by_the_others(closed, lost):
    session = Session(6, threshold=4).until("shares")
    message = messages.read(session.answers["c3"], session.terms)
    sealed = {place: bytes(len(s)) if place in closed else s for place, s in message.sealed.items()}
    session.answers["c3"] = messages.write(messages.Shares("c3", message.commitment, sealed), session.terms)
    session.step()
    assert {name for name, client in session.clients.items() if client.unopened == ("c3",)} == {f"c{i}" for i in closed}
    session.until("done", {"rows": lost})
    assert session.server.total().tolist() == session.sum_of(session.terms.places.keys() - set(lost))


def test_shares_that_open_for_nobody_end_their_group_by_name():
    session = Session(5).until("shares")
    message = messages.read(session.answers["c3"], session.terms)
    sealed = {place: bytes(len(s)) for place, s in message.sealed.items()}
    session.answers["c3"] = messages.write(messages.Shares("c3", message.commitment, sealed), session.terms)
    with pytest.raises(CohortError, match="secret of 'c3' could not be put together from 1 shares"):
        session.until("done")


@pytest.mark.parametrize("keys", [bytes(64), b"\1" + bytes(63)])
def test_keys_of_low_order_are_refused_before_they_reach_the_others(keys):
    session = Session(5)
    bad = messages.write(messages.Advertise("c0", keys, b""), session.terms)
    refusal = session.server.offer("c0", bad)
    assert refusal is not None
    assert "low order" in refusal.reason
    session.until("done", {"keys": ["c0"]})
    assert session.server.total().tolist() == session.sum_of([f"c{i}" for i in range(1, 5)])


def test_shares_for_others_than_were_asked_are_refused():
    session = Session(5).until("shares", {"keys": ["c4"]})
    message = messages.read(session.answers["c0"], session.terms)
    entry = bytes(messages.SEALED)
    for sealed in ({**message.sealed, 4: entry}, {**message.sealed, 0: entry}, {1: entry}):
        bad = messages.write(messages.Shares("c0", message.commitment, sealed), session.terms)
        assert "does not have shares for those" in session.server.offer("c0", bad).reason
    assert session.server.offer("c0", session.answers["c0"]) is None


def test_shares_that_were_not_asked_for_are_refused():
    session = Session(5).until("unmask", {"rows": ["c4"]})
    message = messages.read(session.answers["c0"], session.terms)
    share = message.seeds[1]
    for seeds, keys, said in (
        ({**message.seeds, 4: share}, {}, "not asked for"),
        (message.seeds, {4: share, 1: share}, "not asked for"),
        ({1: b"\xff" * shamir.SHARE}, {}, "no element of the field"),
    ):
        bad = messages.write(Unmask("c0", seeds, keys), session.terms)
        assert said in session.server.offer("c0", bad).reason
    assert "not awaited" in session.server.offer("c4", session.answers["c0"]).reason
    session.step()
    assert session.server.stage == "done"


def test_rows_that_are_no_rows():
    session = Session(3)
    for row in (np.zeros(15, "<u4"), np.zeros(16, "<u8"), np.zeros((16, 1), "<u4")):
        with pytest.raises(ValueError, match="16 words of uint32"):
            session.clients["c0"].hold(row)
    session.clients["c0"] = Client("c0", session.terms)
    session.answers["c0"] = session.clients["c0"].advertise()
    session.step()
    with pytest.raises(ValueError, match="call hold before"):
        session.step()
    with pytest.raises(ProtocolError, match="'c9' is not in the group"):
        Client("c9", session.terms)


def test_the_clients_row_is_not_changed():
    session = Session(3)
    before = session.rows["c0"].copy()
    session.until("done")
    assert np.array_equal(session.rows["c0"], before)


def test_threshold_of_default_terms():
    assert [Terms.drawn([str(i) for i in range(n)], 1).threshold for n in (2, 3, 5, 10, 20)] == [2, 3, 4, 7, 14]
    assert Terms.drawn([str(i) for i in range(50)], 1, degree=10).threshold == threshold_of(11) == 8


def test_decode_errors_leave_a_client_as_it_was():
    session = Session(3)
    for bad in (b"", b"x" * 100, session.answers["c0"][:-1]):
        with pytest.raises(DecodeError):
            session.clients["c0"].answer(bad)
    session.until("done")
