"""The rounds of a Flower app's federation: our server, given the app's first weights, and the record of the run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path

from flwr.app import ArrayRecord
from torch import Tensor

from fedkeel.config import Job
from fedkeel.core.keys import Key
from fedkeel.core.types import ClientMemory, ClientRow, Refusal, RoundReport, ServerState
from fedkeel.deploy import weights
from fedkeel.deploy.head import opened
from fedkeel.round.plan import Plan
from fedkeel.round.server import Server
from fedkeel.ship import checkpoint
from fedkeel.ship.ledger import Ledger, Value
from fedkeel.world.federation import check_feedback

BACKEND = "a Flower app"


class Rounds:
    """One run of an app: what is asked of our `Server`, and written down where there is a directory."""

    def __init__(
        self,
        job: Job,
        plan: Plan,
        first: ArrayRecord,
        buffers: Sequence[str],
        path: Path | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """From the first weights, or from the last checkpoint of the run at `path`. Raises `InputError`, `RunError`."""
        self.layout = weights.layout_of(first, buffers)
        check_feedback(plan, self.layout)
        self.key = Key.root(job.seed)
        self._first, self._every, self._clock = first, job.record.checkpoint_every, clock
        self._open = ExitStack()
        self._ledger: Ledger | None = None
        self._path = path
        state, spent = ServerState(self.row(first)), 0.0
        try:
            if path is not None:
                directory = opened(path, job, plan)
                self._open.enter_context(directory.lock())
                self._ledger = self._open.enter_context(directory.ledger())
                if (newest := checkpoint.latest(directory.checkpoints)) is not None:
                    state, _, extra, _ = checkpoint.load(newest, layout_digest=self.layout.digest)
                    spent = extra["time"]
                self._ledger.rewind(state.round)
                self._ledger.write_meta(self._described(job, plan, directory.job.read_text()))
            self.server = Server(plan, self.layout, state, self.key)
        except BaseException:
            self._open.close()
            raise
        self._began = clock() - spent
        self._saved = state.round
        self._arrays = first if state.version == 0 else self._made()

    def _described(self, job: Job, plan: Plan, settings: str) -> dict[str, object]:
        return {
            "job": job.name,
            "seed": job.seed,
            "plan": plan.steps,
            "backend": BACKEND,
            "fedkeel": version("fedkeel"),
            "torch": version("torch"),
            "columns": self.layout.columns,
            "settings": settings,
        }

    @property
    def now(self) -> float:
        """Seconds since the run began; those between a stop and what went on from it left out."""
        return self._clock() - self._began

    @property
    def arrays(self) -> ArrayRecord:
        """The model that clients are given."""
        return self._arrays

    def row(self, arrays: ArrayRecord) -> Tensor:
        """Weights as a row (P,). Raises `DecodeError` where they are another model's."""
        return weights.row_of(arrays, self.layout, list(self._first))

    def take_up(self, arrays: ArrayRecord) -> None:
        """Go on from other weights of the same model, where the app has changed them itself."""
        if arrays is not self._arrays:
            self.server.state = self.server.state.replace(theta=self.row(arrays))
            self._arrays = arrays

    def close_round(self, skip: str | None = None) -> RoundReport:
        """Reduce what was let in, and write the round down."""
        report = self.server.close(self.now, skip)
        if report.skipped is None:
            self._arrays = self._made()
        if self._ledger is not None:
            self._ledger.write_round(report)
            if report.round % self._every == 0:
                self._save()
        return report

    def write_meta(self, **values: object) -> None:
        """Write down facts about the run."""
        if self._ledger is not None:
            self._ledger.write_meta(values)

    def write_figures(self, scope: str, values: Mapping[str, Value], examples: int | None = None) -> None:
        """Write down what was measured of the model of the round that closed last."""
        state = self.server.state
        if self._ledger is not None and values:
            self._ledger.write_metrics(state.round, state.version, values, examples, scope)

    def write_refused(self, refused: Mapping[str, Refusal]) -> None:
        """Write down whose evaluation of that model does not count, and why."""
        if self._ledger is not None and refused and self.server.state.round:
            lines = [ClientRow(client, why) for client, why in refused.items()]
            self._ledger.write_updates(self.server.state.round, lines)

    def end(self) -> None:
        """Write the last checkpoint, and let go of the directory."""
        try:
            if self._ledger is not None and self.server.state.round > self._saved:
                self._save()
        finally:
            self._open.close()

    def _save(self) -> None:
        assert self._path is not None
        assert self._ledger is not None
        self._ledger.sync()
        state, directory = self.server.snapshot(), self._path / "checkpoints"
        extra = {"time": self.now, "flight": []}
        checkpoint.save(directory, state, ClientMemory(), extra, layout_digest=self.layout.digest)
        checkpoint.prune(directory)
        self._saved = state.round

    def _made(self) -> ArrayRecord:
        return weights.record_of(self.server.theta, self.layout, self._first)
