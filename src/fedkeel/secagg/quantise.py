"""Rows as whole numbers of a grid's unit: what can be added under masks, exactly."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedkeel.core.errors import DecodeError, InputError
from fedkeel.core.keys import Key
from fedkeel.secagg.terms import Words

Rounding = Literal["zero", "nearest", "stochastic"]
_FAR = {"zero": 0.0, "nearest": 0.5, "stochastic": 1.0}  # how far rounding may move a value outwards, in units
_SLACK = 2.0**-30
"""A norm is scaled to this much less than its bound, relatively: more than float64 loses on the way."""
_BLOCK = 1 << 15


@dataclass(frozen=True, slots=True)
class Grid:
    """Rows are clipped, and each column becomes a whole number of `unit`, mod 2^bits.

    `by` "column": each value is clipped to `bound`; "norm": a row whose L2 norm is above `bound` is scaled down to it.
    `rounding` "zero" never lets a norm grow, which differential privacy counts on; "nearest" loses least; "stochastic",
    up or down by chance, is right in the mean. With a power of two as the unit nothing else is lost.
    """

    bound: float
    unit: float
    by: Literal["column", "norm"] = "column"
    rounding: Rounding = "nearest"
    bits: int = 32

    def __post_init__(self) -> None:
        if not 0 < self.bound < math.inf:
            raise InputError(f"bound = {self.bound}: write a positive number, the most that a row may be")
        if not 0 < self.unit < math.inf or not 1 <= self.bound / self.unit < 2.0**62:
            raise InputError(f"unit = {self.unit}: write a positive number, {self.bound} (the bound) or less")
        if self.by not in ("column", "norm") or self.rounding not in _FAR or self.bits not in (32, 64):
            raise InputError(
                f"by = '{self.by}', rounding = '{self.rounding}', bits = {self.bits}: write 'column' or 'norm', "
                f"one of {', '.join(_FAR)}, and 32 or 64"
            )
        self.check(1)

    @classmethod
    def finest(
        cls,
        bound: float,
        rows: int,
        by: Literal["column", "norm"] = "column",
        rounding: Rounding = "nearest",
        bits: int = 32,
    ) -> Grid:
        """The grid with the smallest power of two as its unit on which sums of so many rows fit."""
        if not 0 < bound < math.inf or rows < 1:
            raise InputError(f"bound = {bound}, rows = {rows}: write positive numbers")
        exponent = math.frexp(bound)[1] + math.frexp(rows)[1] - math.frexp(_limit(bits))[1] - 2
        while rows * _levels(bound, math.ldexp(1.0, exponent)) > _limit(bits):
            exponent += 1
        return cls(bound, math.ldexp(1.0, exponent), by, rounding, bits)

    @property
    def levels(self) -> int:
        """The most that a column comes to, in units."""
        return _levels(self.bound, self.unit)

    def check(self, rows: int) -> None:
        """Raise `InputError` unless a sum of so many rows fits the words, and float64 afterwards."""
        if rows * self.levels > _limit(self.bits):
            raise InputError(
                f"unit = {self.unit}: the sum of {rows} rows of {self.levels} units a column does not fit "
                f"{self.bits} bits (at most {_limit(self.bits) // self.levels} rows do): make groups smaller, the unit "
                f"coarser, or write bits = 64"
            )

    def encode(self, row: Tensor, key: Key | None = None) -> Words:
        """A finite float32 row (P,) as words (P,). Stochastic rounding draws from `key`."""
        values = row.detach().numpy()
        draws = key.numpy() if key is not None else None
        if self.rounding == "stochastic" and draws is None:
            raise ValueError("stochastic rounding needs a key")
        norm = math.sqrt(sum(_squares(part) for _, part in _blocks(values)))
        if not math.isfinite(norm):
            raise ValueError("the row is not finite, and nobody could see that in the sum")
        factor = 1.0 / self.unit
        if self.by == "norm" and norm > (most := self.bound * (1 - _SLACK)):
            factor *= most / norm
        out = np.empty(len(values), np.int32 if self.bits == 32 else np.int64)
        for at, part in _blocks(values):
            np.multiply(part, factor, out=part)
            if self.rounding == "zero":
                np.trunc(part, out=part)
            elif self.rounding == "nearest":
                np.rint(part, out=part)
            elif draws is not None:
                whole = np.floor(part)
                part = whole + (draws.random(len(part)) < part - whole)
            out[at : at + len(part)] = np.clip(part, -self.levels, self.levels, out=part)
        return out.view(np.dtype(f"<u{self.bits // 8}"))

    def decode(self, total: Words, rows: int) -> NDArray[np.float64]:
        """The sum of so many rows, (P,) float64, exact. Raises `DecodeError` if rows within the bound sum to less."""
        self.check(rows)
        signed = total.view(np.int32 if self.bits == 32 else np.int64)
        most = rows * self.levels
        if len(signed) and not -most <= int(signed.min()) <= int(signed.max()) <= most:
            raise DecodeError(f"a column of the sum is beyond what {rows} rows of at most {self.bound} come to")
        values = signed.astype(np.float64)
        if self.by == "norm":
            farthest = rows * (self.bound / self.unit + _FAR[self.rounding] * math.sqrt(len(values)))
            if math.sqrt(_squares(values)) > farthest * (1 + _SLACK):
                raise DecodeError(f"the sum is longer than {rows} rows of norm {self.bound} come to")
        values *= self.unit
        return values


def _levels(bound: float, unit: float) -> int:
    return math.floor(bound / unit)


def _limit(bits: int) -> int:
    """The largest sum: of 64 bits float64 holds 53."""
    return min((1 << (bits - 1)) - 1, 1 << 53)


def _squares(values: NDArray[np.float64]) -> float:
    """Their sum, in pairs. Not by BLAS, whose threads would wait for each other over so little."""
    return float(np.square(values).sum())


def _blocks(values: NDArray[Any]) -> Iterator[tuple[int, NDArray[np.float64]]]:
    """Where each block of a row begins, and its values in float64, in memory that is used again."""
    buffer = np.empty(min(_BLOCK, len(values)))
    for at in range(0, len(values), _BLOCK):
        part = buffer[: len(values) - at]
        part[:] = values[at : at + len(part)]
        yield at, part
