"""What users call: run a job, resume it, look at it, compare variants. The CLI does the same through these."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ByteSize, TypeAdapter, ValidationError

from fedkeel import plugins
from fedkeel.config import Job, load
from fedkeel.core.errors import InputError, InterruptedRunError, RunError
from fedkeel.core.registry import Rule, parse
from fedkeel.core.types import ClientMemory, ServerState
from fedkeel.ship import checkpoint, stored
from fedkeel.ship.ledger import Ledger
from fedkeel.ship.rundir import RunDir
from fedkeel.sim.flight import Flight
from fedkeel.sim.simulator import Simulator
from fedkeel.train import Trainer
from fedkeel.world.federation import Federation
from fedkeel.world.record import Record, Watcher, begun, check_rules, described, first, rewound


def reduce_files(
    rows: Path | str | Sequence[Path | str],
    reducer: Rule | str,
    out: Path | str,
    weights: Path | str | Sequence[float] | None = None,
    *,
    memory: int | str = "1GiB",
    watch: Callable[[int, int], None] = lambda done, columns: None,
) -> Path:
    """Reduce updates that lie in .npy files of float32 to one in a .npy file (P,), in `memory`, and return its path.

    `rows` is a file (n, P) in C order, or a file (P,) for each update; `weights` n numbers, or a file of them. The
    reducer, as "median", must have the trait "coordinatewise": columns go through it in blocks, and come out as they
    would in memory, but for the rounding of sums. `memory` ("512MB", or bytes) bounds what is held at once, beside the
    interpreter and torch themselves; with little of it fewer threads work. Interrupted and called again with the same
    arguments, it goes on where it was. `watch(done, columns)` is told how far it is.

    Raises `InputError` for files, weights, a reducer or a bound that do not fit, or while another call writes the same
    file, `RunError` where the disk fails.
    """
    try:
        size = int(TypeAdapter(ByteSize).validate_python(memory))
    except ValidationError:
        raise InputError(f"memory = {memory!r} is not valid: write a size, as 512MB") from None
    rule = parse("reducer", reducer) if isinstance(reducer, str) else reducer
    if not isinstance(rule, Rule) or rule.kind != "reducer":
        raise InputError(f"reducer = {reducer!r} is no reducer: write a name, as 'median', or build one")
    return stored.reduce_files(rows, rule, out, weights, memory=size, watch=watch)


class Run:
    """A run's directory, opened: its state, its metrics, its report."""

    def __init__(self, path: Path | str) -> None:
        """Raises `InputError` when there is no run at `path`."""
        self.dir = RunDir(path)

    @property
    def path(self) -> Path:
        """The run's directory."""
        return self.dir.path

    @property
    def job(self) -> Job:
        """The job as it was resolved when the run began."""
        return load(self.dir.job)

    @property
    def state(self) -> ServerState:
        """The server's state at the newest checkpoint that is whole."""
        newest = checkpoint.latest(self.dir.checkpoints)
        if newest is None:
            raise RunError(f"run '{self.path}' has no checkpoint yet: resume it")
        return checkpoint.load(newest)[0]

    @property
    def done(self) -> bool:
        """Whether the run reached its last round and wrote its model."""
        return (self.dir.model / "card.json").is_file()

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """A table, one row a figure: round, version, scope, name, value, low, high (95%), examples."""
        with self.dir.ledger(readonly=True) as ledger:
            return ledger.metrics(scope=None)

    @property
    def updates(self) -> list[dict[str, Any]]:
        """A table, one row an update: round, client, what refused it and why, weight, norm, cosine, bytes, ..."""
        with self.dir.ledger(readonly=True) as ledger:
            return ledger.updates()

    @property
    def rounds(self) -> list[dict[str, Any]]:
        """A table, one row a round: round, version, time, skipped, bytes up and down, seconds by part."""
        with self.dir.ledger(readonly=True) as ledger:
            return ledger.rounds()

    @property
    def epsilon(self) -> float | None:
        """What is spent of privacy so far, by rounds that were done again as well; None where none is promised."""
        with self.dir.ledger(readonly=True) as ledger:
            found = [row["epsilon"] for row in ledger.query("SELECT max(epsilon) AS epsilon FROM rounds")]
            return max((e for e in (*found, ledger.meta.get("epsilon")) if e is not None), default=None)

    def final(self, name: str = "accuracy", scope: str | None = None) -> dict[str, Any] | None:
        """The last row of a metric, or None when the run does not have it.

        The scope says of what: `global` (the shared model), `clients` (the mean over the clients' own models),
        `client/NAME`, `group/NAME`. By default it is what the run is about: the clients' own models where they have
        some, else the shared one.
        """
        with self.dir.ledger(readonly=True) as ledger:
            rows = ledger.metrics(name, scope or ledger.meta.get("headline", "global"))
        return rows[-1] if rows else None

    def report(self) -> Path:
        """Write the run's report (self-contained HTML) and return its path."""
        return report([self.path])

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"


def run(job: Job, out: Path | str | None = None, *, watch: Watcher | None = None, with_report: bool = True) -> Run:
    """Run a federation to its end and return its record.

    `out` is a new directory; without it, the first free one of `runs/<name>`, `runs/<name>-2`, ... Raises `InputError`
    before anything is trained or written when the job is wrong, `RunError` when the run can not go on.
    """
    texts = plugins.read(job.plugins)
    plugins.load(job.plugins)
    federation = Federation.of(job)
    state, began = first(federation)
    with contextlib.closing(federation.trainer()) as trainer:
        directory = begun(Path(out or _free(job.name)), job, texts)
        with directory.lock(), directory.ledger() as ledger:
            ledger.write_meta(described(federation, trainer.name, directory.job.read_text()) | began)
            ledger.write_clients(federation.devices.of)
            _simulate(directory, ledger, federation, trainer, state, ClientMemory(), watch)
    return _finished(directory, with_report)


def resume(path: Path | str, *, watch: Watcher | None = None, with_report: bool = True) -> Run:
    """Go on with an interrupted run, to the same final weights as an unbroken one; a finished one is returned."""
    opened = Run(path)
    if opened.done:
        if with_report and not opened.dir.report.is_file():
            opened.report()
        return opened
    directory, job = opened.dir, opened.job
    plugins.load(job.plugins)
    federation = Federation.of(job)
    with directory.lock(), directory.ledger() as ledger:
        backend = ledger.meta.get("backend")
        text = directory.job.read_text()
        if ledger.meta.get("settings", text) != text:
            raise InputError(f"'{directory.job}' was changed since the run began: restore it, or begin a new run")
        check_rules(directory, ledger, federation.plan, "go on with the fedkeel that began it")
        with contextlib.closing(federation.trainer(backend)) as trainer:
            newest = checkpoint.latest(directory.checkpoints)
            if newest is None:
                state, began = first(federation)
                ledger.write_meta(began)
                memory, now, flight = ClientMemory(), 0.0, None
            else:
                state, memory, extra, attached = checkpoint.load(newest, layout_digest=federation.layout.digest)
                now, flight = extra["time"], Flight.restored(extra["flight"], attached)
            if len(ledger.rounds()) < state.round:
                raise InputError(f"ledger '{directory.ledger_path}' lacks rounds before {state.round}: restore it")
            state = rewound(ledger, state)
            ledger.write_meta(described(federation, trainer.name, text))
            _simulate(directory, ledger, federation, trainer, state, memory, watch, now, flight)
    return _finished(directory, with_report)


def report(paths: Sequence[Path | str], out: Path | str | None = None) -> Path:
    """Write one report over one or several runs, and return its path: beside the run, or `report.html` for several."""
    from fedkeel.ship.report import write

    runs = [RunDir(path) for path in paths]
    target = Path(out) if out else runs[0].report if len(runs) == 1 else Path("report.html")
    return write(target, list(zip(_labels([r.path.absolute() for r in runs]), (r.path for r in runs), strict=True)))


def _labels(paths: Sequence[Path]) -> list[str]:
    """The directories' names, with as many of their parents' as tell them apart."""
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        labels = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(labels)) == len(set(paths)):
            break
    return labels


def _simulate(
    directory: RunDir,
    ledger: Ledger,
    federation: Federation,
    trainer: Trainer,
    state: ServerState,
    memory: ClientMemory,
    watch: Watcher | None,
    now: float = 0.0,
    flight: Flight | None = None,
) -> None:
    record = Record(directory, ledger, federation, watch)
    try:
        final = Simulator(federation, trainer, state, memory, record, now, flight).run()
    except KeyboardInterrupt:
        raise InterruptedRunError(f"interrupted; go on with: fedkeel resume {directory.path}") from None
    record.model(final)


def _finished(directory: RunDir, with_report: bool) -> Run:
    done = Run(directory.path)
    if with_report:
        done.report()
    return done


def _free(name: str) -> Path:
    return next(path for path in _candidates(name) if not path.exists())


def _candidates(name: str) -> Iterator[Path]:
    yield Path("runs") / name
    number = 2
    while True:
        yield Path("runs") / f"{name}-{number}"
        number += 1
