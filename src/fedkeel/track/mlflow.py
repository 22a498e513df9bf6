"""A run in MLflow. Its tags tell how far it got; what is sent twice, MLflow itself keeps once."""

from __future__ import annotations

import logging
import os
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from fedkeel.core.errors import FedkeelError, InputError, RunError
from fedkeel.track.points import Line, name

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

_METRICS, _PARAMS, _VALUE, _TAG = 1000, 100, 6000, 5000  # at once, at once, characters, characters
_DIRECTORY, _SENT, _BEGUN, _REPLACED = (f"fedkeel.{key}" for key in ("directory", "sent", "begun", "replaced"))
_SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}
_FILES = ("report.html", "job.toml", "model/*")


class MLflow:
    """A run of an experiment. A history that a resume replaced stays as it is, and a new MLflow run is begun."""

    def __init__(self, uri: str, experiment: str, run: Path) -> None:
        """Raises `InputError` for an address or a name that MLflow does not take, `RunError` where it fails."""
        self._client = opened(uri)
        self._directory = str(run.resolve())
        self._facts: Mapping[str, Any] = {}
        self._status = ""
        self.walls: dict[int, float] = {}
        self.upto = 0
        with plain(InputError):
            self._experiment = self._in(experiment, uri)
            self._id = self._find()

    def _in(self, experiment: str, uri: str) -> str:
        found = self._client.get_experiment_by_name(experiment)
        if found is None:
            return str(self._client.create_experiment(experiment, artifact_location=artifacts(uri)))
        if found.lifecycle_stage != "active":
            raise InputError(f"--experiment '{experiment}' was deleted: restore it in MLflow, or name another")
        return str(found.experiment_id)

    def _find(self) -> str:
        """The run that stands for this directory, or nothing."""
        quote = '"' if "'" in self._directory else "'"
        wanted = f"tags.`{_DIRECTORY}` = {quote}{self._directory}{quote}"
        found: list[Run] = self._client.search_runs([self._experiment], wanted, order_by=["start_time DESC"])
        for run in found:
            tags = run.data.tags
            if tags.get(_DIRECTORY) == self._directory and _REPLACED not in tags:
                # What was begun and not sent counts for a rewind too: some of it may be there.
                self.walls = dict(_mark(tags[key]) for key in (_BEGUN, _SENT) if key in tags)
                self.upto = _mark(tags[_SENT])[0] if _SENT in tags else 0
                self._status = run.info.status
                return str(run.info.run_id)
        return ""

    def describe(self, facts: Mapping[str, Any]) -> None:
        """What the ledger says of the run as a whole; told when a run is begun in MLflow."""
        self._facts = facts

    def rewind(self, round: int) -> None:
        with plain():
            self._client.set_tag(self._id, _REPLACED, "by a later run of the same directory")
            self._client.set_terminated(self._id, "KILLED")
        self._id, self.walls, self.upto = "", {}, 0

    def _begin(self, wall: float) -> None:
        facts = {key: str(self._facts[key]) for key in ("job", "seed", "backend") if key in self._facts}
        facts["version"] = str(self._facts.get("fedkeel", ""))
        facts["plan"] = "; ".join(f"{step}: {rule}" for step, rule in self._facts.get("plan") or ())
        tags = {f"fedkeel.{key}": value[:_TAG] for key, value in facts.items()} | {_DIRECTORY: self._directory}
        run = self._client.create_run(self._experiment, _milliseconds(wall), tags, facts.get("job", "")[:200] or None)
        self._id, self._status = run.info.run_id, "RUNNING"

    def write(self, lines: list[Line]) -> None:
        from mlflow.entities import Metric, Param

        last = max(lines, key=lambda line: line.round)
        mark = f"{last.round} {last.wall!r}"
        points = [
            Metric(key, value, _milliseconds(line.wall), line.round)
            for line in lines
            for key, value in line.values.items()
        ]
        params = [Param(key, value) for key, value in _params(self._facts.get("settings"))] if not self.upto else []
        with plain():
            if not self._id:
                self._begin(lines[0].wall)
            for first in range(0, len(params), _PARAMS):
                self._client.log_batch(self._id, params=params[first : first + _PARAMS])
            if last.round > self.upto:
                self._client.set_tag(self._id, _BEGUN, mark)
            for first in range(0, len(points), _METRICS):
                self._client.log_batch(self._id, points[first : first + _METRICS])
            if last.round > self.upto:
                self._client.set_tag(self._id, _SENT, mark)
                self.walls, self.upto = {last.round: last.wall}, last.round

    def stand(self, status: str, wall: float, run: Path) -> None:
        """Tell RUNNING, FINISHED or FAILED, and keep the files of a run that is over."""
        if not self._id:
            return
        with plain():
            if status == "FINISHED":
                self._keep(run)
            if status != self._status and status == "RUNNING":
                self._client.update_run(self._id, status)
            elif status != self._status:
                self._client.set_terminated(self._id, status, _milliseconds(wall))
            self._status = status

    def _keep(self, run: Path) -> None:
        there: dict[str, dict[str, int]] = {}
        for path in sorted(path for pattern in _FILES for path in run.glob(pattern) if path.is_file()):
            folder = path.parent.relative_to(run).as_posix().strip(".")
            if folder not in there:
                kept = self._client.list_artifacts(self._id, folder or None)
                there[folder] = {file.path: file.file_size or 0 for file in kept}
            if there[folder].get(path.relative_to(run).as_posix()) != path.stat().st_size:
                self._client.log_artifact(self._id, str(path), folder or None)


def opened(uri: str) -> MlflowClient:
    """A client of MLflow. Raises `InputError` for an address that it does not take, or where it is not installed."""
    _check(uri)
    # For who set nothing else: report nothing to others, and tell soon that a server is not there.
    for key, value in _SETTINGS.items():
        os.environ.setdefault(key, value)
    try:
        from mlflow.tracking import MlflowClient
    except ImportError:
        raise InputError("--mlflow needs its library: pip install 'fedkeel[mlflow]'") from None
    for noisy in ("mlflow", "alembic"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    with plain(InputError):
        return MlflowClient(uri)


def artifacts(uri: str) -> str | None:
    """Where the files of a new experiment go; None: where the server says."""
    if uri.startswith("sqlite:///"):  # MLflow would take the folder that we happen to be in
        return (_database(uri).parent / "mlartifacts").as_uri()
    return None


def _check(uri: str) -> None:
    """Raises `InputError`; never shows what may be a password."""
    remedy = "write sqlite:///mlflow.db, or the http(s) address of an MLflow server"
    scheme = urlsplit(uri).scheme.partition("+")[0]
    if scheme in ("", "file"):
        raise InputError(f"--mlflow '{uri}' is a folder, which MLflow no longer writes: {remedy}")
    if scheme not in ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks"):
        raise InputError(f"--mlflow has the unknown scheme '{scheme}': {remedy}")
    # MLflow itself would try again for minutes.
    if scheme == "sqlite" and not (folder := _database(uri).parent).is_dir():
        raise InputError(f"--mlflow '{uri}' lies in no folder: make '{folder}', or name another")


def _database(uri: str) -> Path:
    return Path(uri.partition(":///")[2]).resolve()


@contextmanager
def plain(kind: type[FedkeelError] = RunError) -> Iterator[None]:
    """MLflow's own exceptions in a sentence."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, ImportError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise kind(f"--mlflow failed ({why[:300]}): see that it names a database or a server that is there") from None


def _params(settings: object) -> Iterator[tuple[str, str]]:
    """The keys of the job file, `train.lr` and so on."""

    def flat(prefix: tuple[str, ...], table: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        for key, value in table.items():
            if isinstance(value, Mapping) and value:
                yield from flat((*prefix, key), value)
            else:
                yield name(*prefix, key).replace("/", ".")[-250:], str(value)[:_VALUE]

    if isinstance(settings, str):
        yield from flat((), tomllib.loads(settings))


def _mark(text: str) -> tuple[int, float]:
    round, wall = text.split()
    return int(round), float(wall)


def _milliseconds(wall: float) -> int:
    return int(wall * 1000)
