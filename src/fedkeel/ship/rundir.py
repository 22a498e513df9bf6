"""The directory of a run: where each part of the record lies, and a lock so that one process writes it."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from fedkeel.core.errors import InputError, RunError
from fedkeel.ship import files
from fedkeel.ship.ledger import Ledger

_LOCK = ".lock"


class RunDir:
    """`runs/<name>/`: job.toml, ledger.sqlite, checkpoints/, model/, report.html.

    A directory is a run as soon as its job.toml stands in it. `RunDir(path)` opens one, `RunDir.create` begins one.
    """

    def __init__(self, path: Path | str) -> None:
        """Raises `InputError` when there is no run at `path`."""
        self.path = Path(path)
        if not self.job.is_file():
            problem = "holds no run (no job.toml)" if self.path.is_dir() else "does not exist"
            raise InputError(f"run directory '{path}' {problem}: name a directory that `fedkeel run` made")

    @classmethod
    def create(cls, path: Path | str, job: str, plugins: Mapping[str, str] | None = None) -> RunDir:
        """Begin a run: the directories, a copy of the job's plugins (name -> text), and job.toml with the text `job`.

        Raises `InputError` for a directory that holds a run already, or anything else.
        """
        path = Path(path)
        if path.exists() and not path.is_dir():
            raise InputError(f"run directory '{path}' is a file: choose another directory")
        _refuse_used(path)
        try:
            (path / "checkpoints").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"run directory '{path}' cannot be made ({error.strerror}): choose another") from None
        with _locked(path):
            _refuse_used(path)  # another process may have come first
            for name, text in (plugins or {}).items():
                (path / "plugins").mkdir(exist_ok=True)
                files.write_text(path / "plugins" / name, text)
            files.write_text(path / "job.toml", job)  # last: a directory with a job.toml is a run
        return cls(path)

    @property
    def job(self) -> Path:
        """The resolved job file."""
        return self.path / "job.toml"

    @property
    def ledger_path(self) -> Path:
        return self.path / "ledger.sqlite"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        """The directory of the final model and its card."""
        return self.path / "model"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    def ledger(self, *, readonly: bool = False) -> Ledger:
        """Open the ledger: to write it (under the lock), or read-only beside a writer."""
        return Ledger(self.ledger_path, readonly=readonly)

    def lock(self) -> AbstractContextManager[None]:
        """Hold the directory for this process alone; the system lets go of it even after `kill -9`.

        Raises `RunError` while another process holds it.
        """
        return _locked(self.path)


def _refuse_used(path: Path) -> None:
    """What a run killed in its first moment left is as good as empty."""
    found = {p.name for p in path.iterdir()} if path.is_dir() else set()
    if "job.toml" in found:
        raise InputError(f"run directory '{path}' holds a run already: resume it, or choose another directory")
    if strange := sorted(found - {_LOCK, "checkpoints", "plugins", f"job.toml{files.TEMPORARY}"}):
        raise InputError(f"run directory '{path}' holds other files ('{strange[0]}'): choose an empty directory")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    try:
        descriptor = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise RunError(f"run directory '{path}' cannot be locked ({error.strerror}): make it writable") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 32).decode(errors="replace").strip()
            problem = f"run directory '{path}' is in use by process {holder or 'unknown'}"
            raise RunError(f"{problem}: wait for it, or choose another directory") from None
        os.truncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
        yield
    finally:
        os.close(descriptor)
