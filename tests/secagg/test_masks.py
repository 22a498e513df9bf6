"""Masks and keys: pinned, uniform, and each bound to what it is for."""

from __future__ import annotations

import importlib.util
import os
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sessions import Session

from fedkeel.core.errors import InputError
from fedkeel.secagg import crypto, masks, messages
from fedkeel.secagg.terms import ProtocolError, Terms

TERMS = Terms(bytes(range(16)), ("a", "b", "c"), 2, 4)
LOW_ORDER = [0, 1, 2**255 - 19 - 1, 2**255 - 19, 2**255 - 19 + 1]


def test_the_keystream_is_pinned():
    """By another library: PyCryptodome's AES-256 of the counters 0 and 1, key 00..1f. 64 bits are of the same bytes."""
    words = np.ones(5, "<u4")
    masks.apply(words, [(bytes(range(32)), 1)])
    assert [f"{w - np.uint32(1):08x}" for w in words] == ["b60090f2", "d09f492a", "6a9af3a9", "80772edd", "ae765df0"]
    wide = np.zeros(2, "<u8")
    masks.apply(wide, [(bytes(range(32)), 1)])
    assert wide.tobytes() == (words - np.uint32(1)).tobytes()[:16]


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3 * masks.BLOCK // 4 + 5), st.sampled_from(["<u4", "<u8"]), st.integers(1, 70))
def test_what_is_added_can_be_taken_off(size, dtype, count):
    words = np.arange(size, dtype=dtype)
    seeds = [os.urandom(32) for _ in range(count)]
    masks.apply(words, [(seed, 1 if i % 2 else -1) for i, seed in enumerate(seeds)])
    assert size < 4 or not np.array_equal(words, np.arange(size, dtype=dtype))
    for i, seed in enumerate(seeds[::-1]):
        masks.apply(words, [(seed, -1 if (count - 1 - i) % 2 else 1)])
    assert np.array_equal(words, np.arange(size, dtype=dtype))


def test_blocks_are_one_stream():
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    words = np.zeros(masks.BLOCK // 2 + 3, "<u4")
    masks.apply(words, [(b"k" * 32, 1)])
    stream = Cipher(algorithms.AES(b"k" * 32), modes.CTR(bytes(16))).encryptor()
    assert words.tobytes() == stream.update(bytes(words.nbytes))


@pytest.mark.parametrize("bits", [32, 64])
def test_a_masked_row_is_uniform(bits):
    """Of zeros, as of any row. Chi-square of its bytes, 255 degrees of freedom: mean 255, standard deviation 22.6."""
    session = Session(4, columns=100_000, bits=bits)
    session.rows = {name: np.zeros(100_000, session.terms.dtype) for name in session.terms.members}
    session.clients = {name: session.client(name) for name in session.terms.members}
    session.answers = {name: client.advertise() for name, client in session.clients.items()}
    session.until("rows")
    rows = []
    for data in session.answers.values():
        message = messages.read(data, session.terms)
        assert isinstance(message, messages.Masked)
        rows.append(np.frombuffer(message.row, np.uint8))
    differences = [rows[0] - rows[1], rows[0] + rows[2]]
    for row in rows + differences:
        counts = np.bincount(row, minlength=256)
        expected = len(row) / 256
        assert 255 - 6 * 22.6 < ((counts - expected) ** 2 / expected).sum() < 255 + 6 * 22.6


@pytest.mark.parametrize("point", LOW_ORDER)
def test_points_of_low_order_are_refused(point):
    with pytest.raises(ProtocolError, match="low order"):
        crypto.KeyPair().agree(point.to_bytes(32, "little"))


def test_two_sides_agree_and_a_mask_is_the_same_for_both():
    one, other = crypto.KeyPair(), crypto.KeyPair()
    shared = one.agree(other.public)
    assert shared == other.agree(one.public)
    assert crypto.mask_seed(shared, TERMS, 0, 2) == crypto.mask_seed(shared, TERMS, 2, 0)
    assert crypto.mask_seed(shared, TERMS, 0, 1) != crypto.mask_seed(shared, TERMS, 0, 2)
    assert crypto.KeyPair(one.private).public == one.public


def test_what_is_sealed_opens_for_its_sender_receiver_and_session_only():
    shared, text = os.urandom(32), os.urandom(66)
    data = crypto.seal(shared, TERMS, 0, 1, text)
    elsewhere = Terms(bytes(16), TERMS.members, 2, 4)
    stricter = Terms(TERMS.session, TERMS.members, 3, 4)
    assert crypto.unseal(shared, TERMS, 0, 1, data) == text
    assert crypto.unseal(shared, TERMS, 1, 0, data) is None
    assert crypto.unseal(shared, TERMS, 0, 2, data) is None
    assert crypto.unseal(shared, elsewhere, 0, 1, data) is None
    assert crypto.unseal(shared, stricter, 0, 1, data) is None
    assert crypto.unseal(os.urandom(32), TERMS, 0, 1, data) is None
    assert crypto.unseal(shared, TERMS, 0, 1, bytes([data[0] ^ 1]) + data[1:]) is None


def test_signatures_are_of_their_text_and_key():
    private, public = crypto.identity()
    signature = crypto.sign(private, b"text")
    assert crypto.signed_by(public, signature, b"text")
    assert not crypto.signed_by(public, signature, b"other")
    assert not crypto.signed_by(crypto.identity()[1], signature, b"text")
    assert not crypto.signed_by(b"", signature, b"text")


@pytest.mark.parametrize("module", [masks, crypto])
def test_without_the_library_it_says_what_to_install(module, monkeypatch):
    monkeypatch.setitem(sys.modules, "cryptography", None)
    for name in [name for name in sys.modules if name.startswith("cryptography.")]:
        monkeypatch.delitem(sys.modules, name)
    spec = importlib.util.spec_from_file_location("anew", module.__file__)
    with pytest.raises(InputError, match=r'secure aggregation needs cryptography.*: pip install "fedkeel\[privacy\]"'):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
