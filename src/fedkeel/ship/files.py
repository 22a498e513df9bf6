"""Files that a reader, a crash or a full disk finds either as they were or as they should be, never in part."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from fedkeel.core.errors import RunError

TEMPORARY = ".part"


def write(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """Replace `path` atomically: a neighbour is written, put on the disk, and renamed over it.

    Raises `RunError` (disk full, directory missing, no permission); the old file then stands as it was.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        with open(temporary, "wb") as file:
            for chunk in chunks:
                file.write(chunk)
            put(file, temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):  # the first failure is the one to tell
            temporary.unlink(missing_ok=True)
        raise RunError(f"{path} could not be written ({error.strerror}): {_remedy(error)}") from error


def put(file: BinaryIO, temporary: Path, path: Path) -> None:
    """Let the file that was written under a temporary name take the place of `path`, once it is on the disk."""
    file.flush()
    os.fsync(file.fileno())
    os.replace(temporary, path)
    _sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Replace a text file atomically, UTF-8; what UTF-8 cannot hold (lone surrogates) is escaped."""
    write(path, [text.encode("utf-8", "backslashreplace")])


def _sync(directory: Path) -> None:
    """Put the directory's own entry on the disk: without it a rename can be lost with the power."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remedy(error: OSError) -> str:
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return "create the directory again"
    if isinstance(error, PermissionError | IsADirectoryError):
        return "choose a place that you may write to"
    return "make room on the disk; what was written before is whole"
