"""Gaussian noise for privacy: from the operating system's generator, on a grid, so that its last bits tell nothing.

What a mechanism hides must not be told by rounding (Mironov 2012). So rows are cut to whole numbers of a grid's unit
before they are added, their sum is exact, and the noise is rounded to the same grid: as round(v + z) = v + round(z) for
v on the grid, what comes out is the Gaussian mechanism's own output, rounded; rounding costs no privacy.
"""

from __future__ import annotations

import hashlib
import math
import os

import torch
from torch import Tensor

from fedkeel.core.errors import needs_extra
from fedkeel.core.keys import Key
from fedkeel.kernels.normal import normals

_ZEROS = memoryview(bytes(1 << 16))  # what is enciphered
_FINE = 30
"""Bits of a grid below the standard deviation of the noise, or the bound of a row."""


class Noise:
    """A stream of standard normals, float64. Without a key it begins at 256 bits of the operating system's generator.

    With a key it is the same stream in every run: for tests, and jobs that say `insecure_reproducible_noise`. Bits are
    AES-256 in counter mode, of which nobody can tell what comes next from what came before. A process that was forked
    begins anew.
    """

    def __init__(self, key: Key | None = None) -> None:
        self._key = key
        self._begin()

    def _begin(self) -> None:
        with needs_extra("privacy", "privacy noise"):
            from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
        seed = os.urandom(32) if self._key is None else hashlib.sha256(self._key.value.to_bytes(8, "little")).digest()
        self._process = os.getpid()
        self._cipher = Cipher(algorithms.AES(seed), modes.CTR(bytes(16))).encryptor()

    def words(self, count: int) -> Tensor:
        """(count,) int64, every bit of them random."""
        if os.getpid() != self._process:
            self._begin()
        if not count:
            return torch.zeros(0, dtype=torch.int64)
        room = memoryview(bytearray(8 * count + 15))  # the cipher asks for a block more
        for at in range(0, 8 * count, len(_ZEROS)):
            self._cipher.update_into(_ZEROS[: 8 * count - at], room[at:])
        return torch.frombuffer(room, dtype=torch.int64, count=count)

    def normals(self, count: int) -> Tensor:
        """(count,) float64, by Box and Muller 1958: to 9.4 standard deviations, beyond which lies 1e-20."""
        return normals(self.words(-(-count // 2) * 2))[:count]


def unit_of(scale: float) -> float:
    """The grid for numbers of about this size: a power of two, 2^30 times as fine."""
    return math.ldexp(1.0, math.frexp(scale)[1] - 1 - _FINE)


def cut(row: Tensor, unit: float) -> Tensor:
    """The row (..., P) in whole units, int64, cut towards zero: its norm does not grow. Below 2^62 units each."""
    return (row.to(torch.float64) / unit).to(torch.int64)


def rounded(noise: Tensor, unit: float) -> Tensor:
    """Noise (P,), float64, in whole units, int64."""
    return (noise / unit).round_().to(torch.int64)
