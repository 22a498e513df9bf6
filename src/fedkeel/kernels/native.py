"""The compiled kernels, if they were built: found, checked and set to an instruction set when first asked for.

The environment variable FEDKEEL_NATIVE chooses: `off`, or `base`, `avx2`, `avx512` (default: the widest there is).
Results of one instruction set do not depend on the machine or on how many threads run; those of two sets, and those
without the kernels, agree to rounding.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import numpy as np

ABI = 11  # native.c has the same: a library built from other sources is left alone
SETS = ("avx512", "avx2", "base")

_OPERAND = np.dtype([("base", "<i8"), ("at", "<i8"), ("ld", "<i8")])
OPERATION = np.dtype(
    [(name, "<i8") for name in ("code", "m", "n", "k", "start")]
    + [(name, "<f4") for name in ("alpha", "keep", "beta", "unused")]
    + [(name, _OPERAND) for name in ("a", "b", "c", "d", "out")]
)
"""One operation of a program, as `op` in native.c."""
ROUNDING = np.dtype(
    [(name, "<i8") for name in ("count", "levels", "stochastic", "nibbles", "bounds", "factor")]
    + [("low", "<u4"), ("high", "<u4")]
)
"""How a row becomes small integers, as `rounding` in native.c."""


class Library:
    """The functions of the library, under one instruction set."""

    def __init__(self, path: Path, wanted: str | None) -> None:
        library = ctypes.CDLL(str(path))
        library.fedkeel_use.restype = ctypes.c_char_p
        chosen = library.fedkeel_use(wanted.encode() if wanted else None)
        if chosen is None:
            raise OSError(f"this machine has no {wanted}")
        self.instruction_set: str = chosen.decode()
        self.run = library.fedkeel_run
        self.run.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
        self.run.restype = ctypes.c_int64
        self.sq_norm = library.fedkeel_sq_norm
        self.sq_norm.argtypes = [ctypes.c_void_p, ctypes.c_int64]
        self.sq_norm.restype = ctypes.c_double
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        self.select = library.fedkeel_select
        self.select.argtypes = [pointer, pointer, number, number]
        self.gram = library.fedkeel_gram
        self.gram.argtypes = [pointer, *[number] * 4, pointer]
        self.quantise = library.fedkeel_quantise
        self.dequantise = library.fedkeel_dequantise
        self.quantise.argtypes = self.dequantise.argtypes = [pointer] * 3
        self.peaks = library.fedkeel_peaks
        self.peaks.argtypes = [pointer, pointer, number, pointer]
        self.above = library.fedkeel_above
        self.above.argtypes = [pointer, *[number] * 3, pointer]
        self.above.restype = number
        self.normals = library.fedkeel_normals
        self.normals.argtypes = [pointer, number, pointer]
        self.noised = library.fedkeel_noised
        self.noised.argtypes = [pointer, number, *[ctypes.c_double] * 3, pointer, pointer]
        self.pack, self.unpack = library.fedkeel_pack, library.fedkeel_unpack
        self.pack.argtypes = self.unpack.argtypes = [pointer, number, number, pointer]
        self.unary = library.fedkeel_unary
        self.unary.argtypes = [pointer, number, pointer]
        self.from_unary = library.fedkeel_from_unary
        self.from_unary.argtypes = [pointer, number, number, pointer]
        self.from_unary.restype = number


@cache
def library() -> Library | str:
    """The compiled kernels, or why there are none."""
    wanted = os.environ.get("FEDKEEL_NATIVE", "").lower()
    if wanted == "off":
        return "FEDKEEL_NATIVE=off turns the compiled kernels off"
    if wanted and wanted not in SETS:
        return f"FEDKEEL_NATIVE={wanted} names no instruction set: write off, {', '.join(SETS)}"
    paths = [Path(__file__).with_name(f"_native{suffix}") for suffix in EXTENSION_SUFFIXES]
    path = next((p for p in paths if p.exists()), None)
    if path is None:
        return "the compiled kernels were not built: install a C compiler (gcc 12 or clang), then fedkeel again"
    try:
        if ctypes.CDLL(str(path)).fedkeel_abi() != ABI:
            return "the compiled kernels were built from other sources: install fedkeel again"
        return Library(path, wanted or None)
    except (OSError, AttributeError) as error:
        return f"the compiled kernels do not load ({error})"
