"""What a model is judged by: its run's record, its files, its answers, and what stands at the stage now."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from torch import Tensor

from fedkeel import plugins
from fedkeel.api import Run
from fedkeel.config import Job, load
from fedkeel.core.errors import InputError
from fedkeel.core.types import LOST, ServerState
from fedkeel.gate import standing
from fedkeel.release.compare import compare
from fedkeel.release.contract import Contract
from fedkeel.release.difference import Comparison
from fedkeel.release.registry import Registry, Release
from fedkeel.ship import card as cards
from fedkeel.ship.card import ModelCard
from fedkeel.world.carded import make_card
from fedkeel.world.evaluation import CLIENT
from fedkeel.world.federation import Federation


class Finding(NamedTuple):
    """What a rule found: whether it lets the model pass, a sentence that says why, and its figures."""

    passed: bool
    text: str
    figures: Mapping[str, float | None] = {}


class Answers(NamedTuple):
    """The same test examples as two models see them: targets `y` (n, ...), outputs `mine` and `theirs` (n, C, ...).

    `theirs` is None where nothing stands at the stage.
    """

    y: Tensor
    mine: Tensor
    theirs: Tensor | None


class Current(NamedTuple):
    """What stands at the stage: its release, card, tensors by name, and the job that it came from."""

    release: Release
    card: ModelCard
    named: Mapping[str, Tensor]
    job: Job


@dataclass(frozen=True)
class Figure:
    """A figure of the record, with its 95% interval where it has one."""

    value: float | None
    low: float | None
    high: float | None
    examples: int | None


class Evidence:
    """All of it, each part read when it is asked for. Whatever cannot be read raises `InputError`: nothing passes then.

    `stage`: where the model is to go.
    """

    def __init__(self, run: Run, registry: Registry, stage: str) -> None:
        self.run = run
        self.stage = stage
        self._registry = registry
        plugins.load(self.job.plugins)

    @cached_property
    def job(self) -> Job:
        """The job of the run."""
        return self.run.job

    @cached_property
    def model(self) -> tuple[ModelCard, dict[str, Tensor]]:
        """The card and the tensors that are to be released; they belong together."""
        return cards.read(self.run.dir.model)

    @property
    def card(self) -> ModelCard:
        """The card that is to be released."""
        return self.model[0]

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What the ledger says of the run as a whole."""
        with self.run.dir.ledger(readonly=True) as ledger:
            return ledger.meta

    @cached_property
    def federation(self) -> Federation:
        """The run's federation, made again: a deployment's as its server has it."""
        server = self.run.path.resolve().parent
        if (server / "server.toml").is_file():
            from fedkeel.deploy import loaders
            from fedkeel.deploy.folder import ServerFolder

            return loaders.at_server(ServerFolder(server))
        return Federation.of(self.job)

    @cached_property
    def theta(self) -> Tensor:
        """The weights (P,) that are to be released."""
        return _vector(self.federation, self.model[1])

    @cached_property
    def state(self) -> ServerState:
        """What the run came to, by its last checkpoint."""
        return self.run.state

    @cached_property
    def remade(self) -> ModelCard:
        """The card as job, data, last checkpoint and ledger give it."""
        with self.run.dir.ledger(readonly=True) as ledger:
            metrics, parent = ledger.latest(besides=CLIENT), ledger.meta.get("parent")
        privacy = self.card.privacy
        if privacy is not None:
            privacy = privacy.model_copy(update={"epsilon": self.run.epsilon})
        made, _ = make_card(self.federation, self.state, metrics, privacy, parent)
        return made

    @cached_property
    def standing(self) -> Release | None:
        """The release at the stage, when it was first asked for."""
        return self._registry.at(self.job.name, self.stage)

    @cached_property
    def current(self) -> Current | None:
        """What stands at the stage, every byte checked; None: nothing."""
        release = self.standing
        if release is None:
            return None
        with self._checked_out(release) as place:
            made, named = cards.read(place)
            return Current(release, made, named, load(place / "job.toml"))

    @contextmanager
    def _checked_out(self, release: Release) -> Iterator[Path]:
        with TemporaryDirectory(prefix="fedkeel-") as folder:
            yield self._registry.checkout(release, Path(folder) / "release")

    @cached_property
    def comparison(self) -> Comparison | None:
        """What the model differs in from what stands at the stage; None: nothing stands there."""
        if self.current is None:
            return None
        return compare(Contract.of(self.current.card, self.stage), Contract.of(self.card, "this run"))

    @cached_property
    def answers(self) -> Answers:
        """What the model, and the one at the stage, answer to the run's test set.

        Where the two are different versions, the test set is adapted for the older as a client's data are, and
        examples of labels that it does not have are left out for both.
        """
        federation, pool = self.federation, self.federation.pool
        if self.job.model.private:
            raise InputError(
                "clients keep layers of this model, so that nobody else can test it: judge clients' figures"
            )
        mine = federation.answers(self.theta, pool.test_x, pool.prepare)
        if self.current is None:
            return Answers(pool.test_y, mine, None)
        with self._checked_out(self.current.release) as place:
            theirs = standing.answers(place, pool, self.card.preprocessing)
        known = standing.known(pool.test_y, self.current.card)
        return Answers(pool.test_y[known], mine[known], theirs)

    def figures(self, name: str) -> dict[str, Figure]:
        """Scope -> the figure of that name in the last round that was measured; clients one by one left out."""
        with self.run.dir.ledger(readonly=True) as ledger:
            rows = ledger.metrics(name, scope=None)
        last = max((row["round"] for row in rows), default=None)
        return {
            row["scope"]: Figure(row["value"], row["low"], row["high"], row["examples"])
            for row in rows
            if row["round"] == last and not row["scope"].startswith(CLIENT)
        }

    @cached_property
    def refusals(self) -> tuple[int, int]:
        """How many updates were refused, of how many that came whole."""
        marks = ",".join("?" * len(LOST))
        counted = "count(*) AS came, count(stage) AS refused"
        sql = f"SELECT {counted} FROM updates WHERE stage IS NULL OR stage NOT IN ({marks})"
        with self.run.dir.ledger(readonly=True) as ledger:
            (row,) = ledger.query(sql, *LOST)
        return int(row["refused"]), int(row["came"])


def _vector(federation: Federation, named: Mapping[str, Tensor]) -> Tensor:
    """Theta (P,) from a model file's tensors."""
    theta = federation.theta()
    for name, into in federation.layout.views(theta).items():
        into.copy_(named[name].to(into.dtype))
    return theta
