"""The registry of releases: contents under their digests, an index in SQLite, and stages that point at releases.

Every change is one SQLite transaction: a reader, a second writer or a crash finds it done or not begun. Contents are on
the disk before the index names them, and leave the disk after it does not.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fedkeel.core.errors import InputError, RunError, nearest
from fedkeel.release.store import Store, Stored

STAGES = ("candidate", "staging", "production")
INDEX = "index.sqlite"
SIGNATURE = "model.sig"
_APPLICATION = 0x66656B72  # "fekr"
_SCHEMA = 1
_TABLES = """
CREATE TABLE releases(
    id TEXT PRIMARY KEY, name TEXT NOT NULL, version TEXT NOT NULL, fingerprint TEXT NOT NULL, added REAL NOT NULL,
    files TEXT NOT NULL, kept INTEGER NOT NULL, signature TEXT, UNIQUE(name, version)) WITHOUT ROWID;
CREATE TABLE stages(
    name TEXT NOT NULL, stage TEXT NOT NULL, release TEXT NOT NULL REFERENCES releases,
    PRIMARY KEY(name, stage)) WITHOUT ROWID;
CREATE TABLE moves(
    number INTEGER PRIMARY KEY, wall REAL NOT NULL, name TEXT NOT NULL, stage TEXT NOT NULL, kind TEXT NOT NULL,
    release TEXT NOT NULL, version TEXT NOT NULL, previous TEXT, verdict TEXT);
"""


@dataclass(frozen=True, slots=True)
class Release:
    """A model that was let in: its files never change. `id` is the SHA-256 of name, version and all contents.

    `kept`: the contents are there; garbage collection drops those of releases that no stage needs. `signature`: of all
    files, where it was signed; it may be given later, and is no part of the id.
    """

    id: str
    name: str
    version: str
    fingerprint: str
    added: float
    files: Mapping[str, Stored]
    kept: bool = True
    signature: Stored | None = None

    @property
    def contents(self) -> dict[str, Stored]:
        """The files, and the signature of them."""
        return {**self.files, **({SIGNATURE: self.signature} if self.signature else {})}


class Move(NamedTuple):
    """A line of the history. `kind`: published, blocked or rolled back; `previous`: what the stage pointed at."""

    number: int
    wall: float
    name: str
    stage: str
    kind: str
    release: str
    version: str
    previous: str | None
    verdict: dict[str, Any] | None


class Registry:
    """A directory with releases of one or several models."""

    def __init__(self, path: Path | str, *, create: bool = False) -> None:
        """Raises `InputError` where there is no registry, or one of a newer schema; `create` makes it."""
        self.path = Path(path)
        self.store = Store(self.path / "objects")
        index = self.path / INDEX
        if not create and not index.is_file():
            raise InputError(f"'{path}' is no registry: make one with fedkeel release init, or name its directory")
        try:
            if create:
                self.path.mkdir(parents=True, exist_ok=True)
            mode = "rwc" if create else "rw" if os.access(index, os.W_OK) else "ro"
            uri = f"{index.resolve().as_uri()}?mode={mode}"
            self._db = sqlite3.connect(uri, uri=True, timeout=60.0, isolation_level=None)
        except (sqlite3.Error, OSError) as error:
            raise InputError(f"registry '{path}' cannot be opened ({error}): choose another directory") from None
        try:
            self._prepare(create)
        except sqlite3.Error as error:
            self.close()
            raise InputError(f"'{index}' is no index of a registry ({error}): restore it from a copy") from None
        except BaseException:
            self.close()
            raise

    def _prepare(self, create: bool) -> None:
        self._db.execute("PRAGMA synchronous = FULL")
        self._db.execute("PRAGMA foreign_keys = ON")
        if create and self._pragma("user_version") == 0:
            with self._writing():
                if self._pragma("user_version") == 0:  # nobody else was faster
                    for statement in _TABLES.split(";\n"):
                        self._db.execute(statement)
                    self._db.execute(f"PRAGMA application_id = {_APPLICATION}")
                    self._db.execute(f"PRAGMA user_version = {_SCHEMA}")
        if self._pragma("application_id") != _APPLICATION:
            raise InputError(f"'{self.path / INDEX}' is no index of a registry: name the directory of a registry")
        if (schema := self._pragma("user_version")) != _SCHEMA:
            raise InputError(
                f"registry '{self.path}' has schema {schema}, this fedkeel reads {_SCHEMA}: update fedkeel"
            )

    def _pragma(self, name: str) -> int:
        return int(self._db.execute(f"PRAGMA {name}").fetchone()[0])

    def close(self) -> None:
        self._db.close()

    def __enter__(self) -> Registry:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Reading

    @property
    def names(self) -> list[str]:
        """The models that have releases."""
        return [row[0] for row in self._rows("SELECT DISTINCT name FROM releases ORDER BY name")]

    @property
    def judged(self) -> list[str]:
        """The models that were published or blocked."""
        return [row[0] for row in self._rows("SELECT DISTINCT name FROM moves ORDER BY name")]

    def releases(self, name: str) -> list[Release]:
        """All releases of a model, in the order of their coming."""
        return [_release(row) for row in self._rows("SELECT * FROM releases WHERE name = ? ORDER BY added, id", name)]

    def stages(self, name: str) -> dict[str, Release]:
        """Stage -> the release that it points at."""
        sql = "SELECT r.*, s.stage FROM releases r JOIN stages s ON s.release = r.id WHERE s.name = ?"
        return {row[-1]: _release(row[:-1]) for row in self._rows(sql, name)}

    def at(self, name: str, stage: str) -> Release | None:
        """The release at a stage."""
        return self.stages(name).get(stage)

    def find(self, name: str | None, which: str) -> Release:
        """The release at a stage, or of a version; `name` may be left out where there is one model. Or `InputError`."""
        names = self.names
        if name is None:
            if len(names) != 1:
                held = f"has {len(names)} models ({', '.join(names[:5])})" if names else "holds no release yet"
                raise InputError(f"registry '{self.path}' {held}: name one, as {self.path}/NAME@production")
            name = names[0]
        if name not in names:
            raise InputError(f"registry '{self.path}' has no model '{name}': {nearest(name, names)}")
        found = self.at(name, which)
        found = found or next((one for one in self.releases(name) if which in (one.version, one.id)), None)
        if found is None:
            held = ", ".join([*self.stages(name), *(one.version for one in self.releases(name)[-5:])])
            raise InputError(f"model '{name}' has nothing at '{which}': it has {held}")
        return found

    def history(self, name: str, stage: str | None = None) -> list[Move]:
        """What was published, blocked and rolled back, in order."""
        wanted = (name,) if stage is None else (name, stage)
        sql = f"SELECT * FROM moves WHERE name = ? {'AND stage = ?' * (stage is not None)} ORDER BY number"
        return [_move(row) for row in self._rows(sql, *wanted)]

    def checkout(self, release: Release, into: Path | str) -> Path:
        """Write a release's files into a new directory, every byte checked. Raises `InputError`; then there is none."""
        into = Path(into)
        if into.exists() or into.is_symlink():
            raise InputError(f"'{into}' exists already: choose a new directory")
        if not release.kept:
            raise InputError(f"'{release.name}' {release.version} was collected: publish its run again")
        temporary = into.with_name(f".{into.name}.{os.getpid()}.part")
        try:
            for file, stored in release.contents.items():
                target = temporary / file
                target.parent.mkdir(parents=True, exist_ok=True)
                self.store.copy(stored, target, _what(release, file))
            os.rename(temporary, into)
        except OSError as error:
            raise RunError(f"'{into}' could not be written ({error.strerror}): choose another place") from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return into

    def verify(self) -> list[str]:
        """Every content of every kept release, read and compared: what is wrong, in words."""
        problems = []
        for release in map(_release, self._rows("SELECT * FROM releases WHERE kept ORDER BY name, added")):
            for file, stored in release.contents.items():
                try:
                    self.store.check(stored, _what(release, file))
                except InputError as error:
                    problems.append(str(error))
        return problems

    # Writing

    def publish(
        self,
        name: str,
        version: str,
        fingerprint: str,
        files: Mapping[str, Path],
        stage: str,
        verdict: Mapping[str, Any],
        expected: str | None,
        judged: Mapping[str, Stored] | None = None,
        signature: Path | None = None,
    ) -> Release:
        """Take the files in and let the stage point at them.

        `expected`: the release at the stage that the verdict was found against (None: there was none); `judged`: what
        the files were then. Raises `InputError` where either is another by now, or the version is another release's.
        """
        _known(stage)
        with self._writing():
            stored = {_inside(file): self.store.put(path) for file, path in files.items()}
            if judged is not None and stored != judged:
                raise InputError(f"files of '{name}' {version} were changed while they were judged: publish them again")
            release = Release(identity(name, version, stored), name, version, fingerprint, time.time(), stored)
            self._let_in(release)
            if signature is not None:
                signed = json.dumps(self.store.put(signature))
                self._db.execute("UPDATE releases SET signature = ? WHERE id = ?", (signed, release.id))
            now = self.at(name, stage)
            if (now.id if now else None) != expected:
                moved = f"{now.version} is in {stage} now" if now else f"nothing is in {stage} now"
                raise InputError(f"{moved}, which was not so when '{name}' {version} was judged: publish it again")
            self._point(release, stage, "published", expected, verdict)
            return self.find(name, release.id)

    def blocked(self, name: str, version: str, fingerprint: str, stage: str, verdict: Mapping[str, Any]) -> None:
        """Note that a model was not let in."""
        with self._writing():
            now = self.at(name, _known(stage))
            self._note(name, stage, "blocked", fingerprint, version, now.id if now else None, verdict)

    def rollback(self, name: str, stage: str) -> Release:
        """Let a stage point at what it pointed at before. Raises `InputError` where there is nothing before."""
        with self._writing():
            stack = self._stack(name, _known(stage))
            if len(stack) < 2:
                raise InputError(f"nothing was in {stage} of '{name}' before: there is nothing to roll back to")
            release = self.find(name, stack[-2])
            if not release.kept:
                raise InputError(f"'{name}' {release.version} was collected: publish its run again")
            for file, content in release.contents.items():
                self.store.check(content, _what(release, file))
            self._point(release, stage, "rolled back", stack[-1], None)
        return release

    def collect(self, keep: int = 3) -> tuple[int, int]:
        """Drop the contents of releases that no stage points at, nor pointed at in its last `keep` steps back.

        Gives (releases dropped, bytes freed). Names, versions and history stay: a version is never given twice.
        """
        with self._writing():
            needed = set()
            for name, stage in self._rows("SELECT name, stage FROM stages"):
                needed |= set(self._stack(name, stage)[-1 - keep :])
            held = self._rows("SELECT id FROM releases WHERE kept")
            dropped = [row for row in held if row[0] not in needed]
            self._db.executemany("UPDATE releases SET kept = 0 WHERE id = ?", dropped)
        with self._writing():  # the index is on the disk without them: now they can go, and nobody adds meanwhile
            kept = map(_release, self._rows("SELECT * FROM releases WHERE kept"))
            freed = self.store.collect({stored.digest for release in kept for stored in release.contents.values()})
        return len(dropped), freed

    def _let_in(self, release: Release) -> None:
        """Raises `InputError` where the version is taken by another release."""
        taken = [one for one in self.releases(release.name) if one.version == release.version]
        if taken and taken[0].id != release.id:
            what = "other weights" if taken[0].fingerprint != release.fingerprint else "another card, job or export"
            raise InputError(
                f"'{release.name}' {release.version} is released already, with {what}: raise model.version"
            )
        files = json.dumps(release.files, sort_keys=True)
        row = (release.id, release.name, release.version, release.fingerprint, release.added, files)
        self._db.execute("INSERT INTO releases VALUES (?,?,?,?,?,?,1,NULL) ON CONFLICT(id) DO UPDATE SET kept = 1", row)

    def _point(
        self, release: Release, stage: str, kind: str, previous: str | None, verdict: Mapping[str, Any] | None
    ) -> None:
        self._db.execute("INSERT OR REPLACE INTO stages VALUES (?,?,?)", (release.name, stage, release.id))
        self._note(release.name, stage, kind, release.id, release.version, previous, verdict)

    def _note(self, *told: Any) -> None:
        *plain, verdict = told
        text = None if verdict is None else json.dumps(verdict, allow_nan=False)
        self._db.execute("INSERT INTO moves VALUES (NULL,?,?,?,?,?,?,?,?)", (time.time(), *plain, text))

    def _stack(self, name: str, stage: str) -> list[str]:
        """What the stage pointed at, the last one now; who was rolled back is not among them."""
        stack: list[str] = []
        for move in self.history(name, stage):
            if move.kind == "published" and stack[-1:] != [move.release]:
                stack.append(move.release)
            elif move.kind == "rolled back":
                stack.pop()
        return stack

    def _rows(self, sql: str, *values: Any) -> Sequence[tuple[Any, ...]]:
        try:
            return self._db.execute(sql, values).fetchall()
        except sqlite3.Error as error:
            raise InputError(f"registry '{self.path}' cannot be read ({error}): restore it from a copy") from None

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """All that is written inside stands together or not at all, and nobody else writes meanwhile."""
        try:
            self._db.execute("BEGIN IMMEDIATE")
            yield
            self._db.execute("COMMIT")
        except (sqlite3.Error, OSError) as error:
            raise RunError(
                f"registry '{self.path}' could not be written ({error}): nothing of this is in it"
            ) from error
        finally:
            if self._db.in_transaction:
                self._db.rollback()


def identity(name: str, version: str, files: Mapping[str, Stored]) -> str:
    """The id of a release: SHA-256 of what it is called and of all its contents."""
    told = {"name": name, "version": version, "files": {file: list(stored) for file, stored in files.items()}}
    return hashlib.sha256(json.dumps(told, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def parse(reference: str) -> tuple[Path, str | None, str] | None:
    """(directory, model or None, stage or version) of DIR, DIR@WHICH, DIR/NAME or DIR/NAME@WHICH; None: no registry."""
    place, _, which = reference.rpartition("@") if "@" in reference else (reference, "", "production")
    path = Path(place)
    if (path / INDEX).is_file():
        return path, None, which
    if not path.exists() and (path.parent / INDEX).is_file():  # a file beside the index is a file
        return path.parent, path.name, which
    return None


def _release(row: Sequence[Any]) -> Release:
    """Raises `InputError` where the row is not what was written."""
    try:
        id, name, version, fingerprint, added, files, kept, signature = row
        listed = {_inside(file): Stored(str(digest), int(size)) for file, (digest, size) in json.loads(files).items()}
        signed = None if signature is None else Stored._make(json.loads(signature))
        sound = identity(name, version, listed) == id
    except (ValueError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise InputError("the registry's index lists other files than were released: restore the registry from a copy")
    return Release(id, name, version, fingerprint, added, listed, bool(kept), signed)


def _move(row: Sequence[Any]) -> Move:
    *plain, verdict = row
    return Move._make([*plain, None if verdict is None else json.loads(verdict)])


def _inside(file: str) -> str:
    """A name within a release: it leads nowhere else. Raises `InputError`."""
    parts = file.split("/")
    if file == SIGNATURE or "\\" in file or "\0" in file or any(part in ("", ".", "..") for part in parts):
        raise InputError(f"a release cannot hold a file {file!r}: name it within the release")
    return file


def _known(stage: str) -> str:
    if stage not in STAGES:
        raise InputError(f"stage '{stage}' is unknown: {nearest(stage, STAGES)}")
    return stage


def _what(release: Release, file: str) -> str:
    return f"{file} of '{release.name}' {release.version}"
