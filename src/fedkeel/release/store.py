"""Files under the digest of their content: written once, found intact or refused."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Collection, Iterator
from io import BufferedReader
from pathlib import Path
from typing import NamedTuple

from fedkeel.core.errors import InputError
from fedkeel.ship import files

_CHUNK = 1 << 20


class Stored(NamedTuple):
    """A content: its SHA-256 (hex) and its size in bytes."""

    digest: str
    size: int


def measured(source: Path) -> Stored:
    """The digest and size of a regular file. Raises `InputError`."""
    with _opened(source, lambda: _no_file(source)) as file:
        return Stored(hashlib.file_digest(file, "sha256").hexdigest(), os.fstat(file.fileno()).st_size)


class Store:
    """A directory of contents, each under its digest. One writer at a time, which its user sees to."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def put(self, source: Path) -> Stored:
        """Take a regular file's content in; what is there already is written anew, so that it is whole again."""
        self.path.mkdir(parents=True, exist_ok=True)
        incoming = self.path / "incoming"  # what a killed writer left is overwritten, or collected
        digest, size = hashlib.sha256(), 0
        with _opened(source, lambda: _no_file(source)) as file:
            incoming.unlink(missing_ok=True)
            with open(incoming, "xb") as target:
                for chunk in iter(lambda: file.read(_CHUNK), b""):
                    target.write(chunk)
                    digest.update(chunk)
                    size += len(chunk)
                found = Stored(digest.hexdigest(), size)
                os.fchmod(target.fileno(), 0o444)
                place = self._place(found)
                place.parent.mkdir(exist_ok=True)
                files.put(target, incoming, place)
        return found

    def copy(self, wanted: Stored, target: Path, what: str) -> None:
        """Write a content to a new file. Raises `InputError` unless every byte of it is as it was taken in."""
        with open(target, "xb") as out:
            for chunk in self._read(wanted, what):
                out.write(chunk)
            out.flush()
            os.fsync(out.fileno())

    def check(self, wanted: Stored, what: str) -> None:
        """Raises `InputError` unless every byte of a content is as it was taken in."""
        for _ in self._read(wanted, what):
            pass

    def collect(self, keep: Collection[str]) -> int:
        """Remove what is not among these digests, and what killed writers left; how many bytes were freed."""
        freed = 0
        for path in sorted(self.path.rglob("*")) if self.path.is_dir() else []:
            if not path.is_dir() and path.name not in keep:
                freed += path.lstat().st_size
                path.unlink()
        return freed

    def _place(self, wanted: Stored) -> Path:
        return self.path / wanted.digest[:2] / wanted.digest

    def _read(self, wanted: Stored, what: str) -> Iterator[bytes]:
        """The content in chunks; the last one comes only when all of it was seen to be right."""
        refusal = f"{what} is not what was released ({wanted.digest[:12]}): restore the registry from a copy"
        place = self._place(wanted)
        if not place.resolve().is_relative_to(self.path.resolve()):
            raise InputError(refusal)
        digest, held = hashlib.sha256(), b""
        with _opened(place, lambda: refusal) as file:
            if os.fstat(file.fileno()).st_size != wanted.size:
                raise InputError(refusal)
            for chunk in iter(lambda: file.read(_CHUNK), b""):
                digest.update(chunk)
                if held:
                    yield held
                held = chunk
        if digest.hexdigest() != wanted.digest:
            raise InputError(refusal)
        yield held


def _no_file(source: Path) -> str:
    return f"'{source}' is no regular file: publish a run that fedkeel wrote"


def _opened(path: Path, refusal: Callable[[], str]) -> BufferedReader:
    """A regular file, itself no link, opened for reading. Raises `InputError`."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        raise InputError(refusal()) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise InputError(refusal())
    return os.fdopen(descriptor, "rb")
