"""Rows on the disk, more than memory holds, reduced block by block of columns."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import inspect
import io
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedkeel.core.errors import InputError, InterruptedRunError, RunError
from fedkeel.core.registry import Rule, definition, names
from fedkeel.ship import files

Floats = NDArray[np.float32]

WORKING = 64 << 20
"""Bytes that a reducer may need beside its rows for each thread: blocks of sorted columns; and as many once more."""
_LEAST_COLUMNS = 1 << 12  # of a block: shorter reads than 16 KiB a row would wait for the disk
_MOST_COLUMNS = 1 << 22


@dataclass(frozen=True)
class _Row:
    """Where a row of float32 values begins."""

    path: Path
    at: int

    def read(self, columns: slice, into: Floats) -> None:
        room = into.view(np.uint8).data
        try:
            with open(self.path, "rb", buffering=0) as file:
                file.seek(self.at + 4 * columns.start)
                while room and (count := file.readinto(room)):
                    room = room[count:]
        except OSError as error:
            raise RunError(
                f"{self.path} can not be read any more ({error.strerror}): put it back, then go on"
            ) from None
        if room:
            raise RunError(f"{self.path} became shorter while it was read: write it again, then go on")


def reduce_files(
    rows: Path | str | Sequence[Path | str],
    reducer: Rule,
    out: Path | str,
    weights: Path | str | Sequence[float] | None,
    *,
    memory: int,
    watch: Callable[[int, int], None],
) -> Path:
    """`fedkeel.reduce_files`, its rule built and its bound in bytes.

    It holds two blocks of rows, of which one is read while the other is reduced, and what the threads work in: of
    these there are no more than a quarter of the bound has room for.
    """
    paths = [Path(rows)] if isinstance(rows, str | Path) else [Path(path) for path in rows]
    places, columns = _places(paths)
    w = _weights(weights, len(places))
    if "coordinatewise" not in reducer.definition.traits:
        able = [name for name in names("reducer") if "coordinatewise" in definition("reducer", name).traits]
        raise InputError(f"reducer '{reducer.name}' looks at whole rows: out of core there are {', '.join(able)}")
    if int((w > 0).sum()) < reducer.needs:
        raise InputError(
            f"reducer '{reducer!r}' needs {reducer.needs} rows of weight above 0, not {int((w > 0).sum())}"
        )
    threads = max(1, min(torch.get_num_threads(), memory // (4 * WORKING)))
    size = min((memory - (threads + 1) * WORKING) // (8 * len(places)), columns, _MOST_COLUMNS)
    if size < min(_LEAST_COLUMNS, columns):
        least = 2 * WORKING + 8 * len(places) * min(_LEAST_COLUMNS, columns)
        raise InputError(f"memory = {memory} bytes is too little for {len(places)} rows: give at least {least}")
    out = Path(out)
    given = [*paths, *([Path(weights)] if isinstance(weights, str | Path) else [])]
    if any(out.resolve() == path.resolve() for path in given):
        raise InputError(f"'{out}' is one of the files that are read: choose another one to write")
    with _threads(threads), _output(out, columns, _description(paths, reducer, w)) as (write, begin):
        try:
            watch(begin, columns)
            for part, block in _blocks(places, slice(begin, columns), size):
                found = reducer(block, w)
                if found.dtype != torch.float32 or found.shape != (part.stop - part.start,):
                    said = f"{found.dtype} {tuple(found.shape)} of {part.stop - part.start} columns"
                    raise RunError(f"reducer '{reducer!r}' made {said}: it must give float32, one value a column")
                write(found)
                watch(part.stop, columns)
        except KeyboardInterrupt:
            raise InterruptedRunError("interrupted: with the same arguments it goes on where it was") from None
    return out


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _blocks(places: Sequence[_Row], columns: slice, size: int) -> Iterator[tuple[slice, Tensor]]:
    """Blocks (n, size) in order; the next one is read while the caller works on one."""
    rooms = [np.empty((len(places), min(size, max(columns.stop - columns.start, 1))), np.float32) for _ in range(2)]
    parts = [slice(a, min(a + size, columns.stop)) for a in range(columns.start, columns.stop, size)]

    def read(number: int) -> Tensor:
        width = parts[number].stop - parts[number].start
        room = rooms[number % 2]
        for row, place in zip(room, places, strict=True):
            place.read(parts[number], row[:width])
        return torch.from_numpy(room[:, :width])

    with ThreadPoolExecutor(1, thread_name_prefix="fedkeel-read") as reader:
        coming = reader.submit(read, 0) if parts else None
        for number, part in enumerate(parts):
            assert coming is not None
            block = coming.result()
            coming = reader.submit(read, number + 1) if number + 1 < len(parts) else None
            yield part, block


@contextlib.contextmanager
def _output(out: Path, columns: int, description: str) -> Iterator[tuple[Callable[[Tensor], None], int]]:
    """Where the columns go, in order, and how many an earlier call left; the file is there once all of them are."""
    partial, note = (out.with_name(out.name + ending) for ending in (".part", ".part.json"))
    try:
        with open(partial, "a+b") as file:
            _lock(file, partial)
            head, begin = _header(columns), 0
            with contextlib.suppress(OSError, ValueError):
                if note.read_text() == description:
                    begin = min(max(partial.stat().st_size - len(head), 0) // 4, columns)
            # Before the note: what it speaks of must never be another call's.
            file.truncate(len(head) + 4 * begin if begin else 0)
            if not begin:
                file.write(head)
            note.write_text(description)

            def write(values: Tensor) -> None:
                file.write(values.contiguous().numpy().tobytes())
                file.flush()

            yield write, begin
            files.put(file, partial, out)
            note.unlink()
    except OSError as error:
        raise RunError(f"{out} could not be written ({error.strerror}): make room, or choose another place") from error


def _lock(file: BinaryIO, path: Path) -> None:
    """Hold the file until it is closed; `InputError` if another call does, or has just taken it away."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        mine = os.fstat(file.fileno()).st_ino == path.stat().st_ino
    except (BlockingIOError, FileNotFoundError):
        mine = False
    if not mine:
        raise InputError(f"'{path}' is being written by another call: wait for it, or choose another file")


def _header(columns: int) -> bytes:
    """What a .npy file (columns,) of float32 begins with."""
    written = io.BytesIO()
    np.lib.format.write_array_header_1_0(written, {"descr": "<f4", "fortran_order": False, "shape": (columns,)})
    return written.getvalue()


def _places(paths: Sequence[Path]) -> tuple[list[_Row], int]:
    """Where every row begins, and how many columns each has."""
    places: list[_Row] = []
    width = -1
    for path in paths:
        try:
            with open(path, "rb") as file:
                version = np.lib.format.read_magic(file)
                if version not in ((1, 0), (2, 0), (3, 0)):
                    raise ValueError(version)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, turned, dtype = read(file)
                at = file.tell()
        except OSError as error:
            raise InputError(f"'{path}' can not be read ({error.strerror}): give .npy files") from None
        except ValueError:
            raise InputError(f"'{path}' is no .npy file: write it with numpy.save") from None
        if dtype != np.dtype("<f4") or len(shape) not in (1, 2) or min(shape) < 1 or (turned and len(shape) == 2):
            order = ", in Fortran order" if turned else ""
            raise InputError(f"'{path}' holds {dtype} {shape}{order}: write rows of float32, (n, P) in C order or (P,)")
        if len(shape) == 2 and len(paths) > 1:
            raise InputError(f"'{path}' holds rows {shape} and is one of {len(paths)} files: give it alone")
        if width not in (-1, shape[-1]):
            raise InputError(f"'{path}' has {shape[-1]} columns, '{paths[0]}' has {width}: give updates of one model")
        width = shape[-1]
        if path.stat().st_size < at + 4 * math.prod(shape):
            raise InputError(f"'{path}' ends before its {shape} values do: write it again")
        places += [_Row(path, at + 4 * i * width) for i in range(shape[0] if len(shape) == 2 else 1)]
    if not places:
        raise InputError("there are no rows: give at least one file")
    return places, width


def _weights(weights: Path | str | Sequence[float] | None, n: int) -> Tensor:
    """Weights (n,) float64; all 1 where none are given."""
    try:
        found = np.load(weights, allow_pickle=False) if isinstance(weights, str | Path) else weights
        given = np.ones(n) if found is None else np.asarray(found)
        w = torch.from_numpy(given.astype(np.float64)) if given.dtype.kind in "fiu" else torch.zeros(0)
    except (OSError, ValueError, TypeError, OverflowError, EOFError):
        w = torch.zeros(0)
    if w.shape != (n,) or not bool((w.isfinite() & (w >= 0)).all()) or not float(w.sum()) > 0:
        where = f"'{weights}' holds no" if isinstance(weights, str | Path) else "these are no"
        raise InputError(f"{where} weights of {n} rows: give {n} finite numbers of 0 or more, not all of them 0")
    return w


def _description(paths: Sequence[Path], reducer: Rule, w: Tensor) -> str:
    """What a partial result is part of: the files as they are, the weights, the rule as it is written."""
    digest = hashlib.sha256()
    for path in paths:
        found = path.stat()
        digest.update(f"{path.resolve()} {found.st_size} {found.st_mtime_ns}\n".encode())
    digest.update(w.numpy().tobytes())
    with contextlib.suppress(OSError, TypeError):
        digest.update(inspect.getsource(reducer.definition.function).encode())
    return json.dumps({"reducer": repr(reducer), "rows": digest.hexdigest()})
