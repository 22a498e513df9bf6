"""Masks: the keystream of AES-256 in counter mode, read as little-endian words, added to a row or taken off."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

import numpy as np

from fedkeel.core.errors import needs_extra
from fedkeel.secagg.terms import Words

with needs_extra("privacy", "secure aggregation"):
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

BLOCK = 1 << 17
"""Bytes of keystream at a time: they and the words under them stay in the cache, whatever the number of masks."""
_TOGETHER = 64
_ZEROS = memoryview(bytes(BLOCK))
_SPARE = 15  # what the library may ask for beyond the data, before its version 45


def apply(words: Words, masks: Iterable[tuple[bytes, int]]) -> None:
    """Add to words (P,), in place, the mask of each 32-byte seed whose sign is 1, take off that of each with -1.

    A seed is the key of one stream and is never used for another, so the counter begins at 0.
    """
    buffer = bytearray(BLOCK + _SPARE)
    fresh = np.frombuffer(buffer, words.dtype, count=BLOCK // words.itemsize)
    step = len(fresh)
    waiting = iter(masks)
    while some := list(islice(waiting, _TOGETHER)):
        streams = [
            (Cipher(algorithms.AES(seed), modes.CTR(bytes(16))).encryptor(), np.add if sign > 0 else np.subtract)
            for seed, sign in some
        ]
        for start in range(0, len(words), step):
            part = words[start : start + step]
            for stream, operation in streams:
                stream.update_into(_ZEROS[: part.nbytes], buffer)
                operation(part, fresh[: len(part)], out=part)
