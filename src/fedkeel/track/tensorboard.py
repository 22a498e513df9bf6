"""Event files for TensorBoard. They are read back first: what is in them is where an earlier writer stood."""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fedkeel.core.errors import InputError, RunError
from fedkeel.track.points import Line


class TensorBoard:
    """A folder of event files of one run. Points that a resumed run replaced are cut off as TensorBoard has it."""

    def __init__(self, folder: Path, run: Path) -> None:
        """Raises `InputError` for a folder of other events, of another writer, or that can not be written."""
        try:
            from tensorboard.summary.writer.event_file_writer import EventFileWriter
        except ImportError:
            raise InputError("--tensorboard needs its library: pip install 'fedkeel[tensorboard]'") from None
        self._folder, self._writer = folder, EventFileWriter
        self._suffix = f".fedkeel-{hashlib.sha256(os.fsencode(run.resolve())).hexdigest()[:12]}"
        self._file: Any = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(folder, os.O_RDONLY)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise InputError(f"--tensorboard '{folder}' is being written: end the other `fedkeel track`") from None
        except OSError as error:
            raise InputError(
                f"--tensorboard '{folder}' can not be written ({error.strerror}): name another folder"
            ) from None
        try:
            self._read()
        except BaseException:
            os.close(self._lock)
            raise

    def _read(self) -> None:
        from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
        from tensorboard.compat.proto.event_pb2 import SessionLog

        self.walls: dict[int, float] = {}
        self._names: dict[int, set[str]] = {}
        self._last: dict[str, int] = {}  # name -> the last round with a point of it
        self._newest = 0
        for path in sorted(self._folder.glob("*tfevents*")):
            if path.suffix != self._suffix:
                raise InputError(
                    f"--tensorboard '{self._folder}' holds events of another run ('{path.name}'): name a folder "
                    "of this run's own"
                )
            self._newest = int(path.name.split(".")[3])
            for event in LegacyEventFileLoader(str(path)).Load():
                if event.session_log.status == SessionLog.START:
                    self._forget(event.step)
                for value in event.summary.value:
                    self._note(event.step, event.wall_time, value.tag)
        # An earlier writer may have been killed in the middle of its last round.
        self.upto = max(max(self.walls, default=0) - 1, 0)

    def _note(self, round: int, wall: float, name: str) -> None:
        self.walls[round] = wall
        self._names.setdefault(round, set()).add(name)
        self._last[name] = max(self._last.get(name, 0), round)

    def _forget(self, round: int) -> None:
        for known in [r for r in self.walls if r >= round]:
            del self.walls[known], self._names[known]
        self._last = {name: min(last, round - 1) for name, last in self._last.items()}
        self.upto = max(round - 1, 0)

    def rewind(self, round: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        start = SessionLog(status=SessionLog.START)
        with self._kept():
            self._open().add_event(Event(wall_time=time.time(), step=round, session_log=start))
            self._file.flush()
            self._forget(round)

    @contextmanager
    def _kept(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if self._file is not None:  # its thread has ended; what did reach the disk is read back
                with suppress(OSError):
                    self._file.close()
                self._file = None
            self._read()
            raise RunError(f"--tensorboard '{self._folder}' could not be written ({error.strerror})") from None

    def write(self, lines: list[Line]) -> None:
        with self._kept():
            self._write(lines)

    def _write(self, lines: list[Line]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        file = self._open()
        for line in lines:
            new = {name: v for name, v in line.values.items() if name not in self._names.get(line.round, ())}
            if any(self._last.get(name, -1) > line.round for name in new):
                # TensorBoard takes a step back for a restart, and would drop what is there: it is written anew.
                self.rewind(line.round)
                break
            for name, value in new.items():
                summary = Summary(value=[Summary.Value(tag=name, simple_value=value)])
                file.add_event(Event(wall_time=line.wall, step=line.round, summary=summary))
                self._note(line.round, line.wall, name)
            self.upto = max(self.upto, line.round)
        file.flush()

    def _open(self) -> Any:
        if self._file is None:
            while int(time.time()) <= self._newest:  # TensorBoard reads files in the order of their seconds
                time.sleep(0.05)
            self._file = self._writer(str(self._folder), filename_suffix=self._suffix)
        return self._file

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        os.close(self._lock)
