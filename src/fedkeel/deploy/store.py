"""Where a SuperLink keeps what it was sent: rows in Flower's SQLite file, large contents in files beside it.

Flower 1.41 writes every part of a message into SQLite, twice (its log, its table), and keeps hundreds of megabytes of
pages in memory. Here a part of a message is written once, to a file with its digest for a name, and is not held.
"""

from __future__ import annotations

import os
from pathlib import Path

from flwr.supercore.inflatable.inflatable_object import get_object_id
from flwr.supercore.inflatable.inflatable_utils import validate_object_content
from flwr.supercore.object_store import NoObjectInStoreError
from flwr.supercore.object_store.sql_object_store import SqlObjectStore

LARGE = 64 * 1024
"""Bytes from which on a content is a file."""
_IN_A_FILE = b"@"
"""In the place of a content that is a file, with its size; no content begins so."""


class FileObjectStore(SqlObjectStore):
    """Flower's own store, but for large contents. A content is there once its row says so: a kill loses none."""

    def __init__(self, database_path: str) -> None:
        super().__init__(database_path, verify=False)  # done here, on contents rather than on what stands for them
        self.folder = Path(database_path).with_suffix(".objects")
        self.folder.mkdir(exist_ok=True)

    def initialize(self, log_queries: bool = False, **engine_kwargs: object) -> list[str]:
        tables = super().initialize(log_queries, **engine_kwargs)
        for path in self.folder.iterdir():  # of a process that was killed
            self._drop(path)
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
        except FileNotFoundError:  # deleted in the meantime
            return None
        return found if len(found) == int(content[1:]) else None  # else power failed before all was on the disk

    def delete(self, object_id: str) -> None:
        super().delete(object_id)
        if (path := self.folder / object_id).exists():
            self._drop(path)

    def clear(self) -> None:
        super().clear()
        for path in self.folder.iterdir():
            path.unlink(missing_ok=True)

    def _drop(self, path: Path) -> None:
        """Delete a file that no row speaks of."""
        if path.name not in self:
            path.unlink(missing_ok=True)
