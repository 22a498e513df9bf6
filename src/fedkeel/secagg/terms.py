"""What a group agrees on before it begins: who is in it, how many must stay, who holds whose shares."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedkeel.core.errors import CohortError, FedkeelError, InputError

Words = NDArray[np.unsignedinteger[Any]]
"""A quantised row or a sum of them, (P,): integers mod 2^32 or 2^64."""

SESSION = 16
MAX_MEMBERS = 4096
MAX_COLUMNS = 2**31
MAX_NAME = 256


class ProtocolError(FedkeelError):
    """What the server asks of a client breaks the protocol, or would reveal a row: the client gives nothing."""


def threshold_of(holders: int) -> int:
    """More than two thirds of those who hold a client's shares, at least two: the threshold where nobody names one."""
    return max(2, 2 * holders // 3 + 1)


@dataclass(frozen=True)
class Terms:
    """One session of one group. Places are positions in `members`.

    `session`: 16 bytes that no other session has, drawn at random. Of those who hold a client's shares, `threshold`
    must stay to the end, and fewer learn nothing. `bits`: rows are integers mod 2^bits. `degree`: how many neighbours
    each client has on a ring in random order, an even number; 0: everybody is everybody's. `signed`: keys and the list
    of survivors are signed.
    """

    session: bytes
    members: tuple[str, ...]
    threshold: int
    columns: int
    bits: int = 32
    degree: int = 0
    signed: bool = False

    def __post_init__(self) -> None:
        size = len(self.members)
        if len(self.session) != SESSION:
            raise InputError(f"session has {len(self.session)} bytes: draw {SESSION} at random")
        if not 2 <= size <= MAX_MEMBERS or len(set(self.members)) != size:
            raise InputError(f"a group of {size}: name 2 to {MAX_MEMBERS} clients, each once")
        if not all(0 < len(name.encode(errors="replace")) <= MAX_NAME for name in self.members):
            raise InputError(f"a client's name is empty or longer than {MAX_NAME} bytes: shorten it")
        if self.degree and (self.degree % 2 or not 2 <= self.degree < size - 1):
            raise InputError(f"degree = {self.degree}: write an even number below {size - 1}, or 0 for the whole group")
        if not 2 <= self.threshold <= self.holding < 2 * self.threshold:
            raise InputError(
                f"threshold = {self.threshold} of {self.holding} holders: write more than half of them and at least 2, "
                f"as {threshold_of(self.holding)}"
            )
        if not 0 < self.columns <= MAX_COLUMNS:
            raise InputError(f"columns = {self.columns}: a row has 1 to {MAX_COLUMNS}")
        if self.bits not in (32, 64):
            raise InputError(f"bits = {self.bits}: write 32 or 64")

    @classmethod
    def drawn(
        cls,
        members: Sequence[str],
        columns: int,
        *,
        threshold: int | None = None,
        bits: int = 32,
        degree: int = 0,
        signed: bool = False,
    ) -> Terms:
        """The terms of a new session. A group that a degree is too large for has no graph."""
        degree = degree if degree < len(members) - 1 else 0
        threshold = threshold_of(degree + 1 if degree else len(members)) if threshold is None else threshold
        return cls(os.urandom(SESSION), tuple(members), threshold, columns, bits, degree, signed)

    @property
    def holding(self) -> int:
        """How many hold shares of a client, itself among them."""
        return self.degree + 1 if self.degree else len(self.members)

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger[Any]]:
        """Of a word, little-endian."""
        return np.dtype("<u4" if self.bits == 32 else "<u8")

    @property
    def row_bytes(self) -> int:
        return self.columns * self.bits // 8

    @cached_property
    def digest(self) -> bytes:
        """The SHA-256 of all of it. Whatever is encrypted, derived or signed is bound to it."""
        parts = (self.threshold, self.columns, self.bits, self.degree, int(self.signed), len(self.members))
        names = [name.encode() for name in self.members]
        text = [self.session, *(part.to_bytes(8, "little") for part in parts)]
        for name in names:
            text += [len(name).to_bytes(8, "little"), name]
        return hashlib.sha256(b"fedkeel secagg 1 terms" + b"".join(text)).digest()

    @cached_property
    def places(self) -> dict[str, int]:
        return {name: place for place, name in enumerate(self.members)}

    @cached_property
    def _everybody(self) -> frozenset[int]:
        return frozenset(range(len(self.members)))

    @cached_property
    def _near(self) -> tuple[frozenset[int], ...]:
        """Who lies within degree / 2 steps of each place, itself among them, on the ring that the session draws."""
        size = len(self.members)
        ring = sorted(
            range(size), key=lambda place: hashlib.sha256(self.session + place.to_bytes(4, "little")).digest()
        )
        half = self.degree // 2
        near: list[frozenset[int]] = [frozenset()] * size
        for at, place in enumerate(ring):
            near[place] = frozenset(ring[(at + step) % size] for step in range(-half, half + 1))
        return tuple(near)

    def holders(self, place: int) -> frozenset[int]:
        """Who holds shares of the client at a place: its neighbours and itself."""
        return self._near[place] if self.degree else self._everybody

    def kept(self, present: Set[int]) -> frozenset[int]:
        """Those of the present whose shares enough of the present hold. Raises `CohortError` where nobody is left."""
        left = frozenset(present)
        while True:
            staying = frozenset(place for place in left if len(self.holders(place) & left) >= self.threshold)
            if staying == left:
                break
            left = staying
        if not left:
            raise CohortError(self._too_few(len(present), "are there"))
        return left

    def check_recovery(self, shared: Set[int], rows: Set[int], answering: Set[int]) -> None:
        """Raise `CohortError` unless enough of `answering` hold shares of all whose secrets the sum of `rows` takes.

        It takes the seeds of those whose rows came, and the mask keys of the others who had shared.
        """
        if not rows:
            raise CohortError(self._too_few(0, "sent a row"))
        if any(len(self.holders(place) & answering) < self.threshold for place in shared):
            raise CohortError(self._too_few(len(answering), "stayed to unmask the sum"))

    def _too_few(self, count: int, what: str) -> str:
        of = f" of each one's {self.holding} holders" if self.degree else ""
        return f"secure aggregation: {count} of a group of {len(self.members)} {what}, {self.threshold}{of} are needed"
