"""Sessions in which somebody does not keep to the protocol: it costs a group its sum at most, and tells nothing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sessions import Session

from fedkeel.core.errors import CohortError, DecodeError, InputError
from fedkeel.secagg import crypto, messages, shamir
from fedkeel.secagg.client import Client, Signer
from fedkeel.secagg.crypto import KeyPair
from fedkeel.secagg.messages import Consents, Delivery, Keys, Survivors, Unmask
from fedkeel.secagg.server import Server
from fedkeel.secagg.terms import ProtocolError

# -- a server that does not keep to the protocol


def announced(session: Session, places) -> bytes:
    return messages.write(Survivors(frozenset(places)), session.terms)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sets(st.integers(0, 6)), max_size=12), st.booleans())
def test_whatever_a_client_is_told_it_unmasks_one_list(lists, signed):
    """Lists of survivors and signatures of any of them, in any order, among them one that is right."""
    session = Session(7, threshold=4, signed=signed).until("rows", {"shares": ["c6"]})
    places = session.terms.places
    seeds, keys = set(), set()
    for told in [*lists[::2], set(range(6)), *lists[1::2]]:
        signatures = {}
        for name, client in session.clients.items():
            try:
                answer = messages.read(client.answer(announced(session, told)), session.terms)
            except ProtocolError:
                continue
            if signed:
                signatures[places[name]] = answer.signature
            elif name == "c0":
                seeds |= answer.seeds.keys()
                keys |= answer.mask_keys.keys()
        if signed:
            try:
                data = session.clients["c0"].answer(messages.write(Consents(signatures), session.terms))
            except ProtocolError:
                continue
            answer = messages.read(data, session.terms)
            seeds |= answer.seeds.keys()
            keys |= answer.mask_keys.keys()
    assert not seeds & keys
    assert not seeds or (0 in seeds and len(seeds) >= 4 and seeds | keys == set(range(6)))
    assert seeds or signed  # unsigned, the right list or one before it was answered


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


def test_who_is_lost_has_no_voice():
    """A client that colludes signs a list without itself."""
    session = Session(6, signed=True).until("unmask", {"rows": ["c5"]})
    signatures = dict(messages.read(session.orders["c0"], session.terms).signatures)
    text = crypto.survivors_text(session.terms, frozenset(range(5)))
    signatures[5] = crypto.sign(session.private["c5"], text)
    del signatures[1]
    with pytest.raises(ProtocolError, match=r"4 of those who hold .* have signed"):
        session.clients["c0"].answer(messages.write(Consents(signatures), session.terms))


def test_a_signature_of_other_survivors_is_refused_and_costs_its_client_only():
    session = Session(6, signed=True).until("consents")
    text = crypto.survivors_text(session.terms, frozenset(range(5)))
    bad = messages.write(messages.Consent("c3", crypto.sign(session.private["c3"], text)), session.terms)
    assert "not signed" in session.server.offer("c3", bad).reason
    session.until("done", {"consents": ["c3"]})
    assert session.server.total().tolist() == session.sum_of(session.terms.members)


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


def test_a_liars_shares_are_tried_last_once_it_was_seen(monkeypatch):
    asked = []
    recover = shamir.recover
    monkeypatch.setattr(shamir, "recover", lambda shares, *more: asked.append(list(shares)) or recover(shares, *more))
    session = Session(6, threshold=4).until("unmask")
    lies = dict.fromkeys(range(6), bytes(shamir.SHARE))
    session.answers["c1"] = messages.write(Unmask("c1", lies, {}), session.terms)
    session.step()
    assert asked == [[1, 2, 3, 4, 5, 6]] + [[1, 3, 4, 5, 6, 2]] * 5
    assert session.server.total().tolist() == session.sum_of(session.terms.members)


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


def test_decode_errors_leave_a_client_as_it_was():
    session = Session(3)
    for bad in (b"", b"x" * 100, session.answers["c0"][:-1]):
        with pytest.raises(DecodeError):
            session.clients["c0"].answer(bad)
    session.until("done")
