"""Where a SuperLink keeps what it was sent: rows in Flower's SQLite file, large contents in files beside it.

Flower 1.41 writes every part of a message into SQLite, twice (its log, its table), and keeps hundreds of megabytes of
pages in memory. Here a part of a message is written once, to a file with its digest for a name, and is not held.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import get_object_id, is_valid_sha256_hash
from flwr.supercore.inflatable.inflatable_utils import validate_object_content
from flwr.supercore.object_store import NoObjectInStoreError
from flwr.supercore.object_store.sql_object_store import SqlObjectStore
from flwr.supercore.state.schema.objectstore_models import StoredObject
from sqlalchemy import func, select, update

LARGE = 64 * 1024
"""Bytes from which on a content is a file."""
_IN_A_FILE = b"@"
"""In the place of a content that is a file, with its size; no content begins so."""


class FileObjectStore(SqlObjectStore):
    """Flower's own store, but for large contents. A content is there once its row says so: a kill loses none."""

    def __init__(self, database_path: str) -> None:
        super().__init__(database_path, verify=False)  # done here, on contents rather than on what stands for them
        self.folder = Path(database_path).with_suffix(".objects")
        self.folder.mkdir(mode=0o700, exist_ok=True)
        self._deleted: set[str] = set()
        self._lock = threading.Lock()

    def initialize(self, log_queries: bool = False, **engine_kwargs: object) -> list[str]:
        tables = super().initialize(log_queries, **engine_kwargs)
        for path in self.folder.iterdir():  # of a process that was killed
            self._drop(path)
        with self.session() as session:
            short = func.length(StoredObject.content) < 32
            told = session.execute(select(StoredObject.object_id, StoredObject.content).where(short))
            filed = [(number, content) for number, content in told if content.startswith(_IN_A_FILE)]
            gone = [number for number, content in filed if not self._whole(number, content)]
        for number in gone:
            self._ask_again(number)
        return tables

    def put(self, object_id: str, object_content: bytes) -> None:
        if object_id != get_object_id(object_content):
            raise ValueError(f"Object ID {object_id} does not match content hash")
        validate_object_content(content=object_content)
        if len(object_content) < LARGE:
            super().put(object_id, object_content)
            return
        if object_id not in self:  # nothing that nobody announced is written
            raise NoObjectInStoreError(f"Object with ID '{object_id}' was not pre-registered.")
        path = self.folder / object_id
        made = path.with_name(f"{object_id}.{os.urandom(4).hex()}")
        try:
            made.write_bytes(object_content)
            made.replace(path)
        finally:
            made.unlink(missing_ok=True)
        try:
            super().put(object_id, b"%b%d" % (_IN_A_FILE, len(object_content)))
        except NoObjectInStoreError:  # deleted in the meantime
            self._drop(path)
            raise

    def get(self, object_id: str) -> bytes | None:
        content = super().get(object_id)
        if content is None or not content.startswith(_IN_A_FILE):
            return content
        try:
            found = (self.folder / object_id).read_bytes()
        except FileNotFoundError:
            found = b""
        if len(found) == int(content[1:]):
            return found
        self._ask_again(object_id)  # power failed before all was on the disk
        return None

    def delete(self, object_id: str) -> None:
        super().delete(object_id)
        if not is_valid_sha256_hash(object_id):  # a node may say anything
            return
        # The transaction that this is part of may yet be rolled back: files go later, if their rows have gone.
        with self._lock:
            self._deleted.add(object_id)

    def clear(self) -> None:
        super().clear()
        for path in self.folder.iterdir():
            path.unlink(missing_ok=True)

    def preregister(self, run_id: int, object_tree: ObjectTree) -> list[str]:
        self._sweep()
        found: list[str] = super().preregister(run_id, object_tree)
        return found

    def delete_objects_in_run(self, run_id: int) -> None:
        super().delete_objects_in_run(run_id)
        self._sweep()

    def _sweep(self) -> None:
        """Delete the files of what was deleted. What is announced anew waits for that."""
        with self._lock:
            deleted, self._deleted = self._deleted, set()
        with self._mutation_session():
            for number in deleted:
                if (path := self.folder / number).exists() and not self._drop(path):
                    with self._lock:  # not yet: that transaction is still open, or was rolled back
                        self._deleted.add(number)

    def _whole(self, object_id: str, content: bytes) -> bool:
        path = self.folder / object_id
        return path.is_file() and path.stat().st_size == int(content[1:])

    def _ask_again(self, object_id: str) -> None:
        """A content is not there, whatever its row says: whoever announces it next is asked for it."""
        with self.session() as session:
            wanted = StoredObject.object_id == object_id
            session.execute(update(StoredObject).where(wanted).values(content=b"", is_available=0))

    def _drop(self, path: Path) -> bool:
        """Delete a file if no row speaks of it."""
        if path.name in self:
            return False
        path.unlink(missing_ok=True)
        return True
