"""The record of a run: what the simulator, or a server on the network, writes as it goes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fedkeel.config import Job
from fedkeel.core.errors import InputError
from fedkeel.core.types import LOST, ClientMemory, RoundReport, ServerState
from fedkeel.round.plan import Plan
from fedkeel.round.privacy import KEPT, Account, uncorrelated
from fedkeel.ship import card, checkpoint
from fedkeel.ship.ledger import Ledger
from fedkeel.ship.rundir import RunDir
from fedkeel.world.carded import CARD, make_card, offer
from fedkeel.world.evaluation import CLIENT, Figures, Value
from fedkeel.world.federation import Federation
from fedkeel.world.pool import label_histogram
from fedkeel.world.starting import first_model


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run stands: what a watcher is told after every round, and once before the first (round 0)."""

    path: Path
    round: int
    rounds: int
    metrics: Mapping[str, Value]
    used: int
    refused: int
    skipped: str | None


Watcher = Callable[[Progress], None]


class Record:
    """Writes what the simulator says into the run directory, and tells the watcher."""

    def __init__(self, directory: RunDir, ledger: Ledger, federation: Federation, watch: Watcher | None) -> None:
        self.directory = directory
        self.ledger = ledger
        self.federation = federation
        self.watch = watch
        self._latest: Mapping[str, Value] = {}

    def round(self, report: RoundReport) -> None:
        adversary = self.federation.adversary
        self.ledger.write_round(report, set(adversary.clients))
        if self.watch is not None:
            refused = sum(row.refusal is not None and row.refusal.stage not in LOST for row in report.clients)
            used = sum(row.weight > 0 for row in report.clients)
            rounds = self.federation.job.rounds
            self.watch(Progress(self.directory.path, report.round, rounds, self._latest, used, refused, report.skipped))

    def metrics(self, round: int, version: int, figures: Sequence[Figures]) -> None:
        with self.ledger.transaction():
            for found in figures:
                self.ledger.write_metrics(round, version, found.values, found.examples, found.scope)
        mine = (found.values for found in figures if found.scope == self.federation.headline)
        self._latest = next(mine, self._latest)
        if round == 0 and self.watch is not None:
            self.watch(Progress(self.directory.path, 0, self.federation.job.rounds, self._latest, 0, 0, None))

    def checkpoint(
        self,
        state: ServerState,
        memory: ClientMemory,
        extra: Mapping[str, Any],
        attached: Mapping[str, Tensor] | None = None,
    ) -> None:
        digest = self.federation.layout.digest
        self.ledger.sync()  # a checkpoint must never be newer than the ledger, even after a power cut
        checkpoint.save(self.directory.checkpoints, state, memory, extra, attached=attached, layout_digest=digest)
        checkpoint.prune(self.directory.checkpoints)

    def _privacy(self, state: ServerState) -> card.Privacy | None:
        """What the model's card says of privacy: of all rounds, also of those that were done again and have no row."""
        promised = self.federation.plan.privacy
        if promised is None:
            return None
        spent = Account(promised, state.privacy).epsilon
        self.ledger.write_meta({"epsilon": spent})
        words = promised.in_words()
        counted = "; as well: ".join(words[key] for key in ("counts on", "counted as well") if key in words)
        return card.Privacy(
            epsilon=spent,
            delta=promised.delta,
            hides=words["hides"],
            by=words["by"],
            counts_on=counted,
            noise_from=words["noise from"],
        )

    def given(self, round: int, clients: Sequence[str]) -> None:
        """Clients are given work now: what they send, with noise of their own, leaves them before the round closes."""
        privacy = self.federation.plan.privacy
        if privacy is not None and not privacy.central and clients:
            self.ledger.write_given(round, clients)

    def model(self, state: ServerState) -> None:
        """Write the final model, with its card."""
        made, named = make_card(
            self.federation,
            state,
            self.ledger.latest(besides=CLIENT),
            self._privacy(state),
            self.ledger.meta.get("parent"),
        )
        card.write(self.directory.model, made, named)


def first(federation: Federation) -> tuple[ServerState, dict[str, Any]]:
    """What a run begins with, and what the ledger says of that."""
    theta, parent = first_model(federation)
    return ServerState(theta), {} if parent is None else {"parent": parent}


def kept(job: Job, texts: Mapping[str, str]) -> Job:
    """The job as it is written down beside copies of its plugins, name -> text."""
    return job.model_copy(update={"plugins": tuple(f"plugins/{name}" for name in texts)})


def begun(path: Path, job: Job, texts: Mapping[str, str]) -> RunDir:
    """The directory of a new run, which keeps its job and its plugins."""
    return RunDir.create(path, kept(job, texts).to_toml(), texts)


def check_rules(directory: RunDir, ledger: Ledger, plan: Plan, remedy: str) -> None:
    """Raises `InputError` where a run was begun with other rules than the plan's."""
    if (before := ledger.meta.get("plan")) not in (None, [list(step) for step in plan.steps]):
        raise InputError(f"'{directory.path}' was begun with other rules ({before}): {remedy}")


def rewound(ledger: Ledger, state: ServerState) -> ServerState:
    """Take the ledger back to a checkpoint's round; the state knows then what the rounds after it have spent.

    Noise that rounds were to take back in part was taken back in those that are done again: correlation begins anew, or
    clients of the rounds before would be seen through it once more than is counted.
    """
    ledger.rewind(state.round)
    privacy: dict[str, Any] = {"events": {}, "uses": {}, "redone": 0, **state.privacy}
    for row in ledger.redone(after=privacy["redone"]):
        for kind in ("events", "uses"):
            counts = Counter(privacy[kind])
            counts.update(row["charge"][kind])
            privacy[kind] = dict(counts)
        privacy["redone"] = row["number"]
        # Work that was out at the checkpoint was given before, and what came of it is released once more.
        privacy["uses"] = dict(Counter(privacy["uses"]) + Counter(order.client for order in state.in_flight))
    if privacy["redone"] == state.privacy.get("redone", 0):
        return state
    return state.replace(privacy=privacy, kept={**state.kept, KEPT: uncorrelated(state.kept.get(KEPT, {}))})


def described(federation: Federation, backend: str, settings: str) -> dict[str, Any]:
    """What the ledger says of a run as a whole."""
    from importlib.metadata import version

    job, pool, privacy = federation.job, federation.pool, federation.plan.privacy
    histogram = (
        label_histogram(federation.data, pool.classes).tolist() if pool.classes and len(federation.data.y) else None
    )
    return {
        "job": job.name,
        "seed": job.seed,
        "rounds": job.rounds,
        "plan": federation.plan.steps,
        **({"auto": federation.chosen} if federation.chosen else {}),
        "headline": federation.headline,
        "backend": backend,
        "fedkeel": version("fedkeel"),
        "torch": version("torch"),
        "columns": federation.layout.columns,
        "clients": list(federation.names),
        "labels": list(pool.labels),
        CARD: offer(federation),
        "label_histogram": histogram,
        "hostile": sorted(federation.adversary.clients),
        **({"privacy": privacy.in_words() | {"delta": privacy.delta}} if privacy else {}),
        **({"insecure": True} if privacy and privacy.secret else {}),
        "settings": settings,
    }
