"""Shamir's secret sharing (1979): of 32 bytes, any `threshold` shares give them back, fewer tell nothing.

Over the prime field of 2^256 + 297, the least that holds 32 bytes in one element: a share is 33 bytes, and there may be
as many holders as one likes (bytes over GF(2^8) would end at 255). Python's integers; not in constant time.
"""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

PRIME = 2**256 + 297
SECRET = 32
SHARE = 33
TRIES = 4096
"""How many sets of shares are tried before a secret is given up: 4096 sets of 14 leave out any 4 wrong ones of 18."""


class Recovered(NamedTuple):
    """A secret, and the points whose shares stood in its way: none if the first ones gave it.

    Those shares are wrong, unless liars chose theirs so that they fit the secret together and the others' do not.
    """

    secret: bytes
    apart: tuple[int, ...]


def split(secret: bytes, threshold: int, points: Sequence[int]) -> dict[int, bytes]:
    """A share for each point (distinct, above 0), from the operating system's generator."""
    if len(secret) != SECRET:
        raise ValueError(f"a secret has {SECRET} bytes, not {len(secret)}")
    coefficients = [int.from_bytes(secret, "little"), *(secrets.randbelow(PRIME) for _ in range(threshold - 1))]
    return {point: evaluate(coefficients, point).to_bytes(SHARE, "little") for point in points}


def evaluate(coefficients: Sequence[int], point: int, prime: int = PRIME) -> int:
    """The polynomial with these coefficients, the constant first."""
    value = 0
    for coefficient in reversed(coefficients):
        value = (value * point + coefficient) % prime
    return value


def interpolate(shares: Mapping[int, int], at: int = 0, prime: int = PRIME) -> int:
    """What the polynomial through these shares is at a point."""
    weights = _weights(tuple(shares), at, prime)
    return sum(weight * share for weight, share in zip(weights, shares.values(), strict=True)) % prime


@lru_cache(maxsize=256)
def _weights(points: tuple[int, ...], at: int, prime: int) -> tuple[int, ...]:
    """Lagrange's: the same holders answer for every secret of a group."""
    out = []
    for own in points:
        above, below = 1, 1
        for other in points:
            if other != own:
                above = above * (at - other) % prime
                below = below * (own - other) % prime
        out.append(above * pow(below, -1, prime) % prime)
    return tuple(out)


def valid(share: bytes) -> bool:
    """Whether these bytes are an element of the field."""
    return len(share) == SHARE and int.from_bytes(share, "little") < PRIME


def recover(shares: Mapping[int, bytes], threshold: int, right: Callable[[bytes], bool]) -> Recovered | None:
    """The secret that `right` knows, from valid shares, though some may be wrong; None where it is not found.

    The first `threshold` shares are tried first, so those in doubt go last.
    """
    numbers = {point: int.from_bytes(share, "little") for point, share in shares.items()}
    for tried, chosen in enumerate(itertools.islice(_choices(list(numbers), threshold), TRIES)):
        used = {point: numbers[point] for point in chosen}
        value = interpolate(used)
        if value >> 8 * SECRET:
            continue
        secret = value.to_bytes(SECRET, "little")
        if right(secret):
            rest = [point for point in numbers if point not in used] if tried else []
            return Recovered(secret, tuple(point for point in rest if interpolate(used, point) != numbers[point]))
    return None


def _choices(points: Sequence[int], count: int) -> Iterator[tuple[int, ...]]:
    """All sets of `count` points; those that leave out fewer of the first ones come first."""
    for last in range(count - 1, len(points)):
        for others in itertools.combinations(range(last), count - 1):
            yield (*(points[i] for i in others), points[last])
