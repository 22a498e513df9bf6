"""Randomness as an argument: keys that are folded, never global generators."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True, slots=True)
class Key:
    """A 64-bit key. `Key.root(seed).fold(round, client, "batches")` names one stream of draws.

    Folding hashes (BLAKE2b), so streams of different rounds, clients and purposes are independent, and a draw
    depends on its key alone: not on the order of clients, the chunk size or where a run was resumed.
    """

    value: int

    @classmethod
    def root(cls, seed: int) -> Key:
        """The key of a run, from its seed."""
        return cls(0).fold("fedkeel", seed)

    @classmethod
    def secret(cls) -> Key:
        """A key that nobody knows, of the operating system's generator."""
        return cls(int.from_bytes(os.urandom(8), "little"))

    def fold(self, *parts: int | str) -> Key:
        """The key of a part: fold(a, b) is fold(a).fold(b), and 1 differs from "1"."""
        value = self.value
        for part in parts:
            tagged = f"{'i' if isinstance(part, int) else 's'}{part}".encode()
            digest = hashlib.blake2b(tagged, digest_size=8, key=value.to_bytes(8, "little")).digest()
            value = int.from_bytes(digest, "little")
        return Key(value)

    def torch(self, device: torch.device | str = "cpu") -> torch.Generator:
        """A fresh generator at the start of this key's stream."""
        generator = torch.Generator(device=device)
        generator.manual_seed(self.value & 0x7FFF_FFFF_FFFF_FFFF)
        return generator

    def numpy(self) -> np.random.Generator:
        """A fresh numpy generator (Philox) at the start of this key's stream."""
        return np.random.Generator(np.random.Philox(key=self.value))
