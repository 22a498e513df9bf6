"""The wire: pinned, every byte covered, and hostile lengths cost nothing."""

from __future__ import annotations

import hashlib
import random
import tracemalloc

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sessions import Session

from fedkeel.core.errors import DecodeError
from fedkeel.secagg import messages, shamir
from fedkeel.secagg.messages import MAGIC, PREFIX, SEALED
from fedkeel.secagg.terms import MAX_MEMBERS, ProtocolError, Terms

TERMS = Terms(bytes(range(16)), ("anna", "bert", "carl"), 2, 4)
SIGNED = Terms(bytes(range(16)), ("anna", "bert", "carl"), 2, 4, signed=True)
ROW = np.arange(4, dtype="<u4")
EXAMPLES = [
    messages.Advertise("anna", b"k" * 64, b""),
    messages.Keys({0: b"k" * 64, 2: b"l" * 64}),
    messages.Shares("bert", b"c" * 32, {0: b"s" * SEALED, 2: b"t" * SEALED}),
    messages.Delivery({1: b"s" * SEALED}),
    messages.Masked("carl", ROW.data.cast("B")),
    messages.Survivors(frozenset({0, 2})),
    messages.Consent("anna", b"g" * 64),
    messages.Consents({0: b"g" * 64, 1: b"h" * 64}),
    messages.Unmask("anna", {0: b"a" * 33, 1: b"b" * 33}, {2: b"c" * 33}),
]


def framed(fields, rest: bytes = b"") -> bytes:
    header = fields if isinstance(fields, bytes) else msgpack.packb(fields)
    return PREFIX.pack(MAGIC, len(header), hashlib.sha256(header + rest).digest()) + header + rest


def fields_of(data: bytes):
    return msgpack.unpackb(data[PREFIX.size : PREFIX.size + PREFIX.unpack_from(data)[1]])


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda m: type(m).__name__)
def test_what_goes_in_comes_out(message):
    assert messages.read(messages.write(message, TERMS), TERMS) == message


@pytest.mark.parametrize("terms", [TERMS, SIGNED, Terms(bytes(16), tuple("abcdefgh"), 4, 2**31, 64, 4)])
def test_terms_come_out(terms):
    assert messages.read_terms(messages.write_terms(terms)) == terms


def test_the_format_is_pinned():
    """Golden: clients and servers of different releases speak version 1."""
    everything = b"".join([messages.write(m, TERMS) for m in EXAMPLES] + [messages.write_terms(SIGNED)])
    assert hashlib.sha256(everything).hexdigest() == "98286def00b12fd22673f801f03d14bfd8a4e8afd35f344a974d9443924f5721"
    masked = messages.write(EXAMPLES[4], TERMS)
    header = (
        "84a776657273696f6e01a46b696e64a66d61736b6564a773657373696f6ec410000102030405060708090a0b0c0d0e0f"
        "a673656e646572a46361726c"
    )
    assert masked[: PREFIX.size] == b"FKS1" + b"\x3c\0\0\0" + hashlib.sha256(masked[PREFIX.size :]).digest()
    assert masked[PREFIX.size :].hex() == header + "00000000010000000200000003000000"
    assert TERMS.digest.hex() == "2810b2781f47134a53ad99682ce6496c69135673617c7c1bfe537c86165330ac"


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda m: type(m).__name__)
def test_any_changed_byte_is_refused(message):
    data = messages.write(message, TERMS)
    for at in range(len(data)):
        with pytest.raises(DecodeError):
            messages.read(data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :], TERMS)
    for cut in (0, 1, PREFIX.size, len(data) - 1):
        with pytest.raises(DecodeError):
            messages.read(data[:cut], TERMS)
    with pytest.raises(DecodeError):
        messages.read(data + b"\0", TERMS)


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda m: type(m).__name__)
def test_changed_fields_with_a_right_digest_are_refused(message):
    data = messages.write(message, TERMS)
    fields, rest = fields_of(data), data[PREFIX.size + PREFIX.unpack_from(data)[1] :]
    assert messages.read(framed(fields, rest), TERMS) == message
    wrong = [
        fields | {"version": 2},
        fields | {"version": True},
        fields | {"kind": "more"},
        fields | {"session": bytes(16)},
        fields | {"x": b""},
    ]
    wrong += [fields | {"kind": 7}, fields | {"sender": "dora"}, fields | {"sender": 3}, {}, [], 5]
    wrong += [{k: v for k, v in fields.items() if k != name} for name in fields]
    for name in fields.keys() - {"version", "kind", "session", "sender"}:
        wrong += [fields | {name: value} for value in ("text", 3, None, fields[name] + b"x")]
    for each in wrong:
        with pytest.raises(DecodeError):
            messages.read(framed(each, rest), TERMS)
    with pytest.raises(DecodeError, match="row of"):
        messages.read(framed(fields, rest[:-4] if rest else b"1234"), TERMS)


def test_keys_and_tables_of_a_wrong_length_or_order_are_refused():
    common = {"version": 1, "session": TERMS.session, "sender": "anna"}
    entry = b"k" * 33
    at = [place.to_bytes(4, "little") + entry for place in range(4)]
    for seeds in (at[1] + at[0], at[0] + at[0], at[3], at[0][:-1], b"".join(at) + at[0]):
        with pytest.raises(DecodeError, match="field 'seeds'"):
            messages.read(framed(common | {"kind": "unmask", "seeds": seeds, "mask_keys": b""}), TERMS)
    for keys in (b"", b"k" * 63, b"k" * 65):
        with pytest.raises(DecodeError, match="field 'keys'"):
            messages.read(framed(common | {"kind": "advertise", "keys": keys, "signature": b""}), TERMS)
    for terms, signature in ((TERMS, b"s" * 64), (SIGNED, b""), (SIGNED, b"s" * 63)):
        with pytest.raises(DecodeError, match="field 'signature'"):
            messages.read(framed(common | {"kind": "advertise", "keys": b"k" * 64, "signature": signature}), terms)


@pytest.mark.parametrize(
    "header",
    [
        b"\xdf\xff\xff\xff\xff",  # a map of 2^32 entries
        b"\xdd\xff\xff\xff\xff",  # an array
        b"\xc6\xff\xff\xff\xff",  # bytes
        b"\xdb\xff\xff\xff\xff",  # text
        b"\xc9\xff\xff\xff\xff\x01",  # an extension
        b"\x91" * 500,
        b"\x81\xa4kind\xdd\x7f\xff\xff\xff",
    ],
)
def test_hostile_lengths_do_not_allocate(header):
    terms = Terms(bytes(16), ("a", "b"), 2, 2**31, bits=64)
    session_header = PREFIX.pack(MAGIC, 2**32 - 1, bytes(32)) + header
    tracemalloc.start()
    for data in (framed(header), session_header):
        with pytest.raises(DecodeError):
            messages.read(data, terms)
        with pytest.raises(DecodeError):
            messages.read_terms(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000


def test_a_message_longer_than_any_of_its_session_is_not_even_hashed():
    data = framed({"a": b""}, bytes(10**6))
    with pytest.raises(DecodeError, match="no message of this session"):
        messages.read(data, TERMS)


@pytest.mark.parametrize(
    "change",
    [
        {"members": ["a"]},
        {"members": ["a", 3]},
        {"members": "ab"},
        {"members": [str(i) for i in range(MAX_MEMBERS + 1)]},
        {"threshold": 1},
        {"threshold": True},
        {"threshold": 2.0},
        {"columns": 2**40},
        {"bits": 8},
        {"session": b"x"},
        {"signed": 1},
        {"version": 2},
        {"kind": "keys"},
        {"more": 1},
    ],
)
def test_terms_that_make_no_sense_are_refused(change):
    fields = fields_of(messages.write_terms(TERMS))
    with pytest.raises(DecodeError):
        messages.read_terms(framed(fields | change))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_are_a_message_or_an_error(data):
    for bytes_ in (data, framed(data)):
        with pytest.raises(DecodeError):
            messages.read(bytes_, TERMS)
        with pytest.raises(DecodeError):
            messages.read_terms(bytes_)


JUNK = st.one_of(st.none(), st.integers(-(2**63), 2**63), st.binary(max_size=300), st.text(max_size=20), st.booleans())


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_hostile_fields_are_refused_by_server_and_clients_and_stop_nobody(data):
    luck = random.Random(data.draw(st.integers(0, 2**32)))
    session = Session(4, threshold=3)
    while session.server.stage != "done":
        for name in list(session.answers):
            fields = fields_of(session.answers[name])
            field = luck.choice(list(fields))
            bad = framed(fields | {field: data.draw(JUNK)})
            if bad != session.answers[name]:
                assert session.server.offer("c3", bad) is not None
                with pytest.raises((DecodeError, ProtocolError)):
                    session.clients[name].answer(bad)
        session.step(["c3"] if session.server.stage == "keys" else ())
    assert session.server.total().tolist() == session.sum_of(["c0", "c1", "c2"])


def test_sizes_are_what_is_stated():
    assert SEALED == 2 * shamir.SHARE + 16 == 82
    session = Session(10, columns=1000).until("rows")
    assert {len(data) for data in session.answers.values()} == {PREFIX.size + 58 + 4000}
