"""Shamir's sharing: enough shares give the secret, fewer tell nothing at all, wrong ones are found."""

from __future__ import annotations

import itertools
import os
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkeel.secagg import shamir


def test_the_field_is_one():
    """Miller and Rabin with the first 40 primes as bases: a composite passes with odds of 4^-40."""
    n, odd, twos = shamir.PRIME, shamir.PRIME - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    primes = [p for p in range(2, 180) if all(p % q for q in range(2, p))][:40]
    for base in primes:
        powers = [pow(base, odd << i, n) for i in range(twos)]
        assert powers[0] == 1 or n - 1 in powers
    assert shamir.PRIME > 2 ** (8 * shamir.SECRET) > shamir.PRIME - 2**9


@settings(max_examples=30, deadline=None)
@given(st.binary(min_size=32, max_size=32), st.data())
def test_any_threshold_shares_give_the_secret(secret, data):
    threshold = data.draw(st.integers(2, 6))
    points = data.draw(st.lists(st.integers(1, 4096), min_size=threshold, max_size=8, unique=True))
    shares = shamir.split(secret, threshold, points)
    chosen = data.draw(st.permutations(points))[:threshold]
    found = shamir.recover({p: shares[p] for p in chosen}, threshold, lambda s: s == secret)
    assert found == (secret, ())
    assert all(shamir.valid(share) for share in shares.values())


def test_all_sets_of_a_few():
    secret = b"\xff" * 32
    shares = shamir.split(secret, 3, range(1, 7))
    for chosen in itertools.combinations(shares, 3):
        assert shamir.interpolate({p: int.from_bytes(shares[p], "little") for p in chosen}) == int.from_bytes(secret)


@pytest.mark.parametrize("threshold", [2, 3])
def test_fewer_shares_are_uniform_whatever_the_secret(threshold):
    """Exactly: over all polynomials on a field of 7, every view of threshold - 1 shares occurs equally often."""
    prime = 7
    for points in itertools.combinations(range(1, prime), threshold - 1):
        for secret in range(prime):
            views = Counter(
                tuple(shamir.evaluate((secret, *rest), point, prime) for point in points)
                for rest in itertools.product(range(prime), repeat=threshold - 1)
            )
            assert len(views) == prime ** (threshold - 1)
            assert set(views.values()) == {1}


def test_coefficients_are_drawn_anew():
    assert shamir.split(bytes(32), 2, [1]) != shamir.split(bytes(32), 2, [1])


def test_too_few_shares_are_not_enough():
    secret = os.urandom(32)
    shares = shamir.split(secret, 4, range(1, 6))
    few = {p: shares[p] for p in (1, 3, 5)}
    assert shamir.recover(few, 4, lambda s: s == secret) is None
    assert shamir.recover(few, 3, lambda s: s == secret) is None


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 5), st.integers(0, 3), st.data())
def test_wrong_shares_are_left_out_and_named(threshold, spare, data):
    secret = os.urandom(32)
    points = list(range(1, threshold + spare + 1))
    shares = shamir.split(secret, threshold, points)
    wrong = data.draw(st.lists(st.sampled_from(points), max_size=spare, unique=True))
    for point in wrong:
        shares[point] = os.urandom(32) + b"\0"
    found = shamir.recover(shares, threshold, lambda s: s == secret)
    assert found is not None
    assert found.secret == secret
    assert set(found.apart) == (set(wrong) if min(wrong, default=threshold + 1) <= threshold else set())


def test_liars_who_agree_may_look_right_but_the_secret_is():
    """Lagrange's weights of 2, 4, 6 are 3, -3, 1: the same error in the first two cancels."""
    secret = os.urandom(32)
    shares = shamir.split(secret, 3, [1, 2, 4, 6, 7])
    shares[1] = bytes(shamir.SHARE)
    for point in (2, 4):
        shares[point] = ((int.from_bytes(shares[point], "little") + 1) % shamir.PRIME).to_bytes(33, "little")
    assert shamir.recover(shares, 3, lambda s: s == secret) == (secret, (1, 7))


def test_a_hopeless_secret_is_given_up_soon():
    shares = shamir.split(os.urandom(32), 20, range(1, 41))
    asked = []
    assert shamir.recover(shares, 20, lambda s: bool(asked.append(s))) is None
    assert len(asked) <= shamir.TRIES


def test_what_is_no_element_of_the_field():
    assert not shamir.valid(b"\xff" * 33)
    assert not shamir.valid(bytes(32))
    assert not shamir.valid(shamir.PRIME.to_bytes(33, "little"))
    assert shamir.valid((shamir.PRIME - 1).to_bytes(33, "little"))
    with pytest.raises(ValueError, match="32 bytes"):
        shamir.split(bytes(33), 2, [1, 2])


def test_a_value_that_is_no_secret_is_passed_over():
    shares = {point: shamir.evaluate((2**256 + 5, 7), point).to_bytes(33, "little") for point in (1, 2)}
    assert shamir.recover(shares, 2, lambda s: True) is None
