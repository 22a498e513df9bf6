"""Rows on the disk, more than memory holds, reduced block by block of columns."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedkeel.core.errors import InputError, InterruptedRunError, RunError
from fedkeel.core.registry import Rule, definition, names

Floats = NDArray[np.float32]

WORKING = 192 << 20
"""Bytes that a reducer may need beside its rows: two workers' blocks of sorted columns."""
_LEAST_COLUMNS = 1 << 12  # of a block: shorter reads than 16 KiB a row would wait for the disk
_MOST_COLUMNS = 1 << 22


@dataclass(frozen=True)
class _Row:
    """Where a row of float32 values begins."""

    path: Path
    at: int

    def read(self, columns: slice, into: Floats) -> None:
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.at + 4 * columns.start)
            room = into.view(np.uint8).data
            while room and (count := file.readinto(room)):
                room = room[count:]
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
    """`fedkeel.reduce_files`, its rule built and its bound in bytes: two blocks of rows, of which one is read while the
    other is reduced, and `WORKING`.
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
    size = min((memory - WORKING) // (8 * len(places)), columns, _MOST_COLUMNS)
    if size < min(_LEAST_COLUMNS, columns):
        least = WORKING + 8 * len(places) * _LEAST_COLUMNS
        raise InputError(f"memory = {memory} bytes is too little for {len(places)} rows: give at least {least}")
    out = Path(out)
    with _output(out, columns, _description(paths, reducer, w)) as (file, begin):
        try:
            watch(begin, columns)
            for part, block in _blocks(places, slice(begin, columns), size):
                file(reducer(block, w))
                watch(part.stop, columns)
        except KeyboardInterrupt:
            raise InterruptedRunError("interrupted: with the same arguments it goes on where it was") from None
    return out


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
    begin = 0
    with contextlib.suppress(OSError, ValueError):
        if note.read_text() == description:
            begin = min(partial.stat().st_size // 4, columns)
    try:
        note.write_text(description)
        with open(partial, "r+b" if begin else "wb") as file:
            file.truncate(4 * begin)
            file.seek(4 * begin)

            def write(values: Tensor) -> None:
                file.write(values.contiguous().numpy().tobytes())
                file.flush()

            yield write, begin
        _finish(out, partial, columns)
        note.unlink()
    except OSError as error:
        raise RunError(f"{out} could not be written ({error.strerror}): what is done lies in {partial}") from error


def _finish(out: Path, partial: Path, columns: int) -> None:
    """The columns with the header of a .npy file before them."""
    whole = out.with_name(out.name + ".whole")
    with open(whole, "wb") as file, open(partial, "rb") as source:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (columns,)})
        while chunk := source.read(1 << 24):
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    os.replace(whole, out)
    partial.unlink()


def _places(paths: Sequence[Path]) -> tuple[list[_Row], int]:
    """Where every row begins, and how many columns each has."""
    places: list[_Row] = []
    width = -1
    for path in paths:
        try:
            with open(path, "rb") as file:
                version = np.lib.format.read_magic(file)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, turned, dtype = read(file)
                at = file.tell()
        except OSError as error:
            raise InputError(f"'{path}' can not be read ({error.strerror}): give .npy files") from None
        except ValueError:
            raise InputError(f"'{path}' is no .npy file: write it with numpy.save") from None
        if dtype != np.dtype("<f4") or len(shape) not in (1, 2) or (turned and len(shape) == 2):
            order = ", in Fortran order" if turned else ""
            raise InputError(f"'{path}' holds {dtype} {shape}{order}: write rows of float32, (n, P) in C order or (P,)")
        if len(shape) == 2 and len(paths) > 1:
            raise InputError(f"'{path}' holds rows {shape} and is one of {len(paths)} files: give it alone")
        if width not in (-1, shape[-1]):
            raise InputError(f"'{path}' has {shape[-1]} columns, '{paths[0]}' has {width}: give updates of one model")
        width = shape[-1]
        if path.stat().st_size < at + 4 * int(np.prod(shape)):
            raise InputError(f"'{path}' ends before its {shape} values do: write it again")
        places += [_Row(path, at + 4 * i * width) for i in range(shape[0] if len(shape) == 2 else 1)]
    if not places:
        raise InputError("there are no rows: give at least one file")
    return places, width


def _weights(weights: Path | str | Sequence[float] | None, n: int) -> Tensor:
    if isinstance(weights, str | Path):
        try:
            weights = np.load(weights).astype(np.float64).tolist()
        except (OSError, ValueError, TypeError):
            raise InputError(f"'{weights}' is no .npy file of numbers: write it with numpy.save") from None
    w = torch.ones(n, dtype=torch.float64) if weights is None else torch.tensor(weights, dtype=torch.float64)
    if w.shape != (n,) or not bool((w.isfinite() & (w >= 0)).all()) or not float(w.sum()) > 0:
        raise InputError(f"weights do not fit {n} rows: give {n} finite numbers of 0 or more, not all of them 0")
    return w


def _description(paths: Sequence[Path], reducer: Rule, w: Tensor) -> str:
    """What a partial result is part of."""
    digest = hashlib.sha256()
    for path in paths:
        found = path.stat()
        digest.update(f"{path.resolve()} {found.st_size} {found.st_mtime_ns}\n".encode())
    digest.update(w.numpy().tobytes())
    return json.dumps({"reducer": repr(reducer), "rows": digest.hexdigest()})
