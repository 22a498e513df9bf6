"""The ledger: every round, every verdict, every metric of a run, in one SQLite file that others may read meanwhile."""

from __future__ import annotations

import json
import math
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedkeel.core.errors import InputError, RunError

if TYPE_CHECKING:  # a reader of the ledger needs no torch
    from fedkeel.core.types import ClientRow, RoundReport

SCHEMA = 4
_APPLICATION = 0x66656B6C  # "fekl": tells our file from any other SQLite file
_TABLES = """
CREATE TABLE meta(key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE rounds(
    round INTEGER PRIMARY KEY, version INTEGER NOT NULL, time REAL NOT NULL, skipped TEXT, update_norm REAL,
    bytes_up INTEGER NOT NULL, bytes_down INTEGER NOT NULL, epsilon REAL, seconds TEXT NOT NULL, wall REAL NOT NULL,
    charge TEXT);
CREATE TABLE redone(number INTEGER PRIMARY KEY, round INTEGER NOT NULL, charge TEXT NOT NULL);
CREATE TABLE updates(
    round INTEGER NOT NULL REFERENCES rounds ON DELETE CASCADE, client TEXT NOT NULL,
    stage TEXT, rule TEXT, reason TEXT, score REAL, weight REAL, norm REAL, cosine REAL, variance REAL, trust REAL,
    contribution REAL,
    num_examples INTEGER, steps INTEGER, staleness INTEGER, bytes_up INTEGER NOT NULL,
    bytes_down INTEGER NOT NULL, seconds REAL, metrics TEXT NOT NULL, hostile INTEGER);
CREATE TABLE clients(client TEXT PRIMARY KEY, device TEXT NOT NULL) WITHOUT ROWID;
CREATE INDEX updates_round ON updates(round);
CREATE TABLE metrics(
    round INTEGER NOT NULL, scope TEXT NOT NULL, name TEXT NOT NULL, version INTEGER NOT NULL,
    value REAL, low REAL, high REAL, examples INTEGER, PRIMARY KEY(round, scope, name)) WITHOUT ROWID;
"""

_encode = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode

Value = float | tuple[float, float, float]
Row = dict[str, Any]


class Ledger:
    """A run's record, opened for writing (made if it is not there) or read-only beside a writer.

    Rounds, updates and metrics come back as plain dictionaries, one a row, in the order of their rounds. SQLite has
    no NaN: a figure that is none comes back as None. Figures beyond 64 bits (a hostile claim) are capped.
    `wall` is the time of writing in seconds since 1970; `hostile` is 1 or 0 where the simulator knew, else None.
    """

    def __init__(self, path: Path | str, *, readonly: bool = False) -> None:
        """Raises `InputError` for a file that is missing (read-only), corrupt, foreign or of a newer schema."""
        self.path = Path(path)
        self._readonly = readonly
        if readonly and not self.path.is_file():
            raise InputError(f"ledger {self.path} does not exist: name the directory of a run")
        try:
            self._db = self._connect()
            self._prepare()
        except sqlite3.Error as error:
            if error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR):
                raise RunError(f"ledger {self.path} could not be opened: {error}; make room on its disk") from None
            raise InputError(f"{self.path} is no ledger of a run ({error}): name the directory of a run") from None

    def _connect(self) -> sqlite3.Connection:
        uri = self.path.resolve().as_uri()
        if not self._readonly:
            return _connect(uri + "?mode=rwc")
        db = _connect(uri + "?mode=ro")
        try:
            _scalar(db, "PRAGMA schema_version")
        except sqlite3.OperationalError:
            # Where nothing may be written SQLite cannot share its log with a writer; but then there is no writer.
            db.close()
            db = _connect(uri + "?immutable=1")
        return db

    def _prepare(self) -> None:
        """Make the tables of a new file, refuse a foreign one, and set how we write."""
        try:
            if not self._readonly and _scalar(self._db, "PRAGMA schema_version") == 0:
                marks = f"PRAGMA application_id = {_APPLICATION}; PRAGMA user_version = {SCHEMA};"
                self._db.executescript(f"BEGIN IMMEDIATE; {_TABLES} {marks} COMMIT;")
            if _scalar(self._db, "PRAGMA application_id") != _APPLICATION:
                raise InputError(f"{self.path} is a database, but no ledger of a run: name the directory of a run")
            if (schema := _scalar(self._db, "PRAGMA user_version")) != SCHEMA:
                raise InputError(
                    f"{self.path} has schema {schema}, this fedkeel reads {SCHEMA}: use the fedkeel that wrote it"
                )
            if not self._readonly:
                self._db.execute("PRAGMA journal_mode = WAL")
                self._db.execute("PRAGMA synchronous = NORMAL")
                self._db.execute("PRAGMA foreign_keys = ON")
        except BaseException:
            self._db.close()
            raise

    def close(self) -> None:
        self._db.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All that is written inside stands together or not at all. May be nested: the outermost one counts.

        Raises `RunError` when SQLite cannot write (disk full, another writer, a round written twice).
        """
        if self._db.in_transaction:
            yield
            return
        try:
            self._db.execute("BEGIN IMMEDIATE")
            yield
            self._db.execute("COMMIT")
        except sqlite3.Error as error:
            self._db.rollback()
            raise RunError(
                f"ledger {self.path} could not be written: {error}; nothing of this round is in it"
            ) from error
        except BaseException:
            self._db.rollback()
            raise

    def sync(self) -> None:
        """Put every transaction on the disk, so that a checkpoint written next never knows more than the ledger."""
        try:
            self._db.execute("PRAGMA wal_checkpoint(PASSIVE)")
        except sqlite3.Error as error:
            raise RunError(f"ledger {self.path} could not be written: {error}") from error

    def write_round(self, report: RoundReport, hostile: set[str] | None = None) -> None:
        """Write a round and its updates; `hostile` names the clients known (to a simulator) to be hostile."""
        skipped, seconds = _text(report.skipped), _json(dict(report.seconds))
        head = (report.round, report.version, report.time, skipped, report.update_norm, report.bytes_up)
        charge = None if report.charge is None else _json(report.charge)
        line = (*head, report.bytes_down, report.epsilon, seconds, time.time(), charge)
        if charge is not None and not self._db.in_transaction:
            self._db.execute("PRAGMA synchronous = FULL")  # what was spent is known after a power cut too
        with self.transaction():
            self._db.execute("INSERT INTO rounds VALUES (?,?,?,?,?,?,?,?,?,?,?)", line)
            self._db.execute("DELETE FROM redone WHERE round = ?", (-report.round,))
            self.write_updates(report.round, report.clients, hostile)

    def write_given(self, round: int, clients: Sequence[str]) -> None:
        """Clients were given work in an open round, whose noise is their own: it costs them, whatever becomes of it.

        `write_round` says so for good; where it never comes to that, `redone` tells it.
        """
        self._db.execute("PRAGMA synchronous = FULL")
        charge = _json({"events": {}, "uses": dict.fromkeys(clients, 1)})
        with self.transaction():
            self._db.execute("INSERT INTO redone(round, charge) VALUES (?, ?)", (-round, charge))

    def write_updates(self, round: int, clients: Sequence[ClientRow], hostile: set[str] | None = None) -> None:
        """Write lines of a round: with it, or after it, of what came when it was closed."""
        rows = [_update(round, client, hostile) for client in clients]
        with self.transaction():
            self._db.executemany("INSERT INTO updates VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)", rows)

    def write_metrics(
        self,
        round: int,
        version: int,
        values: Mapping[str, Value],
        examples: int | None = None,
        scope: str = "global",
    ) -> None:
        """Write an evaluation: name -> value or (value, low, high); `scope` tells the global model's from others'."""
        rows = []
        for name, value in values.items():
            point, low, high = value if isinstance(value, tuple) else (value, None, None)
            rows.append((round, _text(scope), _text(name), version, point, low, high, examples))
        with self.transaction():
            self._db.executemany("INSERT OR REPLACE INTO metrics VALUES (?,?,?,?,?,?,?,?)", rows)

    def write_meta(self, values: Mapping[str, Any]) -> None:
        """Add or replace facts about the run, as JSON values."""
        with self.transaction():
            rows = [(key, _json(value)) for key, value in values.items()]
            self._db.executemany("INSERT OR REPLACE INTO meta VALUES (?,?)", rows)

    def write_clients(self, devices: Mapping[str, str]) -> None:
        """Write down the class of each client's device."""
        with self.transaction():
            rows = [(_text(client), _text(device)) for client, device in devices.items()]
            self._db.executemany("INSERT OR REPLACE INTO clients VALUES (?,?)", rows)

    def rewind(self, round: int) -> None:
        """Delete everything after a round: a run resumed from its checkpoint writes it anew.

        What those rounds spent of privacy stays spent: `redone` tells it.
        """
        with self.transaction():
            self._db.execute(
                "INSERT INTO redone(round, charge) "
                "SELECT round, charge FROM rounds WHERE round > ? AND charge IS NOT NULL ORDER BY round",
                (round,),
            )
            self._db.execute("UPDATE redone SET round = -round WHERE round < 0")  # of a round that was open
            self._db.execute("DELETE FROM rounds WHERE round > ?", (round,))
            self._db.execute("DELETE FROM metrics WHERE round > ?", (round,))

    @property
    def meta(self) -> dict[str, Any]:
        return {row["key"]: json.loads(row["value"]) for row in self.query("SELECT * FROM meta ORDER BY key")}

    def rounds(self) -> list[Row]:
        return _parsed(_parsed(self.query("SELECT * FROM rounds ORDER BY round"), "seconds"), "charge")

    def redone(self, after: int = 0) -> list[Row]:
        """What rounds cost that were done and are done again: number (from 1), round, charge."""
        return _parsed(self.query("SELECT * FROM redone WHERE number > ? ORDER BY number", after), "charge")

    def updates(self, round: int | None = None) -> list[Row]:
        """Every update of a round, or of the run, in the order of the cohort."""
        where, values = ("", ()) if round is None else (" WHERE round = ?", (round,))
        return _parsed(self.query(f"SELECT * FROM updates{where} ORDER BY round, rowid", *values), "metrics")

    def metrics(self, name: str | None = None, scope: str | None = "global") -> list[Row]:
        """Evaluations by round; of one name, and of one scope or (None) of all."""
        wanted = [(column, value) for column, value in (("name", name), ("scope", scope)) if value is not None]
        where = " AND ".join(f"{column} = ?" for column, _ in wanted) or "1"
        query = f"SELECT * FROM metrics WHERE {where} ORDER BY round, scope, name"
        return self.query(query, *(value for _, value in wanted))

    def latest(self, besides: str) -> dict[str, dict[str, float | None]]:
        """Scope -> name -> value of the last round that was measured; without scopes that begin with `besides`."""
        found: dict[str, dict[str, float | None]] = {}
        rows = self.query("SELECT * FROM metrics WHERE round = (SELECT MAX(round) FROM metrics) ORDER BY scope, name")
        for row in rows:
            if not row["scope"].startswith(besides):
                found.setdefault(row["scope"], {})[row["name"]] = row["value"]
        return found

    def query(self, sql: str, *values: Any) -> list[Row]:
        """The rows of any SELECT, for readers that let SQLite aggregate. Raises `InputError` for a corrupt file."""
        try:
            cursor = self._db.execute(sql, values)
            columns = [column[0] for column in cursor.description]
            return [dict(zip(columns, row, strict=True)) for row in cursor]
        except sqlite3.DatabaseError as error:
            raise InputError(f"ledger {self.path} cannot be read ({error}): restore it from a copy") from None

    def scan(self, sql: str, *values: Any) -> Iterator[tuple[Any, ...]]:
        """The rows of any SELECT one by one, as plain tuples, for readers of many. Raises as `query` does."""
        try:
            # `yield from` would close the cursor of who stops early, perhaps after the ledger itself was closed.
            for row in self._db.execute(sql, values):  # noqa: UP028
                yield row
        except sqlite3.DatabaseError as error:
            raise InputError(f"ledger {self.path} cannot be read ({error}): restore it from a copy") from None

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """All that is read inside is of one moment, whatever a writer does meanwhile."""
        try:
            self._db.execute("BEGIN")
            yield
        finally:
            if self._db.in_transaction:
                self._db.rollback()


def _connect(uri: str) -> sqlite3.Connection:
    return sqlite3.connect(uri, uri=True, timeout=30.0, isolation_level=None)


def _scalar(db: sqlite3.Connection, sql: str) -> int:
    return int(db.execute(sql).fetchone()[0])


def _update(round: int, row: ClientRow, hostile: set[str] | None) -> tuple[Any, ...]:
    stage, rule, reason, score = row.refusal or (None, None, None, None)
    counts = (_whole(row.num_examples), _whole(row.steps), _whole(row.staleness), _whole(row.bytes_up))
    metrics = _json(dict(row.metrics)) if row.metrics else "{}"
    truth = None if hostile is None else row.client in hostile
    client, reason = _text(row.client), _text(reason)
    figures = (score, row.weight, row.norm, row.cosine, row.variance, row.trust, row.contribution)
    sent = (row.bytes_down, row.seconds)
    return (round, client, stage, rule, reason, *figures, *counts, *sent, metrics, truth)


def _whole(value: int | None) -> int | None:
    """SQLite holds 64 bits; a hostile client claims more."""
    return value if value is None or -(2**63) <= value < 2**63 else (2**63 - 1 if value > 0 else -(2**63))


def _text(value: str | None) -> str | None:
    """SQLite holds Unicode; a hostile client names lone surrogates."""
    return value if value is None or value.isascii() else value.encode("utf-8", "backslashreplace").decode()


def _json(value: Any) -> str:
    """JSON has no NaN and no infinity: they become null."""
    try:
        return _encode(value)
    except ValueError:
        return _encode(_finite(value))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value


def _parsed(rows: list[Row], column: str) -> list[Row]:
    for row in rows:
        row[column] = None if row[column] is None else json.loads(row[column])
    return rows
