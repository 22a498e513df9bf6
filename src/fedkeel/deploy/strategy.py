"""A Flower strategy that is fedkeel's server: admission, screens, aggregation, codecs, ledger and checkpoints."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from logging import INFO, WARNING
from pathlib import Path
from typing import Any, cast

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result
from flwr.supercore import log
from torch import Tensor

from fedkeel import plugins
from fedkeel.config import Data, Job, load
from fedkeel.core.errors import DecodeError, InputError
from fedkeel.core.keys import Key
from fedkeel.core.types import Claims, ClientMemory, Refusal, RoundReport
from fedkeel.deploy import figures, messages, weights
from fedkeel.deploy.grid import PatientGrid
from fedkeel.deploy.mods import ORDER, Task, envelope_of
from fedkeel.deploy.post import Post, Sent, failure, stranger
from fedkeel.deploy.rounds import Rounds
from fedkeel.round.plan import Plan
from fedkeel.world.federation import build_plan

LOOK = 1.0
"""Seconds between two looks at who is there."""
_NOT_HERE = (
    "privacy.mechanism",
    "train.corrections",
    "model.private",
    "select.rule",
    "schedule.rule",
    "schedule.interval",
    "schedule.seconds",
    "server.codec",
    "server.examples",
    "client.labels",
    "attack.rule",
    "record.fine_tune",
    "record.groups",
)
Aggregation = Callable[[list[RecordDict], str], MetricRecord]


class FedKeel(FedAvg):
    """Flower's `FedAvg` for whom it asks, fedkeel's server for what becomes of the answers.

    `job` is a `fedkeel.Job` or a job file, `sections` are the same in place: `FedKeel(aggregate={"reduce": "median"},
    client={"codec": "int8"})`. Of a job it takes `seed`, `aggregate`, `client`, `quarantine`, `server.optimiser`,
    `record.checkpoint_every`, `record.contribution` and `plugins`; data, model, training and the number of clients are
    the app's own, and what needs more than a Flower app does (`InputError`) is refused. `run` is the directory of the
    record: a new one, or that of a run to go on with; without it, or where it is "", nothing is written.

    The arguments of `FedAvg` mean what they mean there, with one difference: for `min_available_nodes` and
    `min_train_nodes` it waits `patience` seconds at most, then takes those who are there, or skips the round. A reply
    that can not be used is refused with a reason, and never ends the run.
    """

    def __init__(
        self,
        job: Job | Path | str | None = None,
        *,
        run: Path | str | None = None,
        patience: float = 60.0,
        buffers: tuple[str, ...] = weights.BUFFERS,
        fraction_train: float = 1.0,
        fraction_evaluate: float = 1.0,
        min_train_nodes: int = 2,
        min_evaluate_nodes: int = 2,
        min_available_nodes: int = 2,
        weighted_by_key: str = "num-examples",
        arrayrecord_key: str = "arrays",
        configrecord_key: str = "config",
        train_metrics_aggr_fn: Aggregation | None = None,
        evaluate_metrics_aggr_fn: Aggregation | None = None,
        **sections: Any,
    ) -> None:
        """`buffers` are name patterns of float arrays that are averaged but not moved by the server's optimiser."""
        shares = fraction_train, fraction_evaluate, min_train_nodes, min_evaluate_nodes, min_available_nodes
        super().__init__(*shares, weighted_by_key, arrayrecord_key, configrecord_key)
        self.job, self.plan = _planned(job, sections, max(self.min_train_nodes, 1))
        self.report: RoundReport | None = None
        """What the last round did."""
        self._run = Path(run) if run else None
        self._patience, self._buffers = patience, buffers
        self._aggregations = train_metrics_aggr_fn, evaluate_metrics_aggr_fn
        self._client = json.dumps(self.job.client.model_dump(mode="json"), sort_keys=True)
        self._by_mod = self.job.client != type(self.job.client)()
        # An app need not count steps; where rules go by them a client that does not say is refused.
        self._steps = 0 if any("by_steps" in rule.definition.traits for rule in self.plan.mixers) else 1
        self._training, self._evaluation = Post(), Post()
        self._rounds: Rounds | None = None
        self._skip: str | None = None
        self._asked = False

    def summary(self) -> None:
        """Log what it does."""
        super().summary()
        for stage, rules in self.plan.steps:
            if stage not in ("select", "schedule", "train"):
                log(INFO, "\t\t├── %s: %s", stage, rules)

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """As Flower's. A run that goes on has `num_rounds` in all; what was trained before is not trained again."""
        rounds = self._begun(initial_arrays)
        left = max(num_rounds - rounds.server.state.round, 0)
        judged = None if evaluate_fn is None else self._judging(evaluate_fn)
        rounds.write_meta(rounds=num_rounds, headline="clients" if evaluate_fn is None else "global")
        careful = cast(Grid, PatientGrid(grid))
        try:
            result = super().start(careful, rounds.arrays, left, timeout, train_config, evaluate_config, judged)
            if not result.arrays:  # no round was applied
                result.arrays = rounds.arrays
            return result
        finally:
            self.close()

    def close(self) -> None:
        """Write the last checkpoint and let go of the run's directory; `start` does so at its end."""
        if self._rounds is not None:
            self._rounds.end()
            self._rounds = None

    # -- training

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Messages to those who take part; none where too few are there, and the round is skipped."""
        if self.fraction_train == 0:
            return []
        rounds = self._begun(arrays)
        rounds.take_up(arrays)
        self._asked, self._skip = True, None
        nodes = self._there(grid, max(self.min_available_nodes, self.min_train_nodes))
        shut = rounds.server.shut_out([str(node) for node in nodes])
        free = [node for node in nodes if str(node) not in shut]
        if len(free) < self.plan.least:
            self._skip = f"{len(free)} nodes are there, the rules need {self.plan.least}"
            return self._training.send([])
        size = max(int(len(nodes) * self.fraction_train), self.min_train_nodes, self.plan.least)
        chosen = _drawn(free, size, rounds.key.fold("select", rounds.server.state.round))
        log(INFO, "configure_train: %d of %d nodes take part", len(chosen), len(nodes))
        return self._training.send([self._sent(rounds, node, arrays, config) for node in chosen])

    def _sent(self, rounds: Rounds, node: int, arrays: ArrayRecord, config: ConfigRecord) -> Sent:
        """A task for a node, and the message that gives it."""
        client = str(node)
        number = rounds.server.give(client, rounds.now)
        _, _, round, version, *_ = rounds.server.given(client)
        task = Task(client, number, round, version, self.weighted_by_key, self._steps, self._buffers, self._client)
        told = ConfigRecord({**config, "server-round": round, ORDER: task.text()})
        content = RecordDict({self.arrayrecord_key: arrays, self.configrecord_key: told})
        return Sent(client, number, Message(content, node, MessageType.TRAIN))

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The next model and what was measured on the way; nothing where the round was skipped."""
        if not self._asked or (rounds := self._rounds) is None:
            return None, None
        self._asked = False
        for reply in replies:
            self._admit(rounds, reply)
        for sent in self._training.open:
            if rounds.server.awaits(sent.client):
                lost = Refusal("transport", "reply", "no answer came in time")
                rounds.server.give_up(sent.client, lost, rounds.now)
        self.report = report = rounds.close_round(self._skip)
        for row in report.clients:
            if row.refusal is not None:
                log(WARNING, "\t> %s: %s", row.client, row.refusal.reason)
        if report.skipped is not None:
            log(WARNING, "aggregate_train: round skipped: %s", report.skipped)
            return None, None
        used = [row for row in report.clients if row.weight > 0]
        shares = torch.tensor([row.weight for row in used], dtype=torch.float64)
        said = [(row.num_examples or 0, row.metrics) for row in used]
        return rounds.arrays, self._aggregated(said, shares, self._aggregations[0])

    def _admit(self, rounds: Rounds, reply: Message) -> None:
        """Let one reply in, or have the round's minutes say why not."""
        sent, server, now = self._training.asked(reply), rounds.server, rounds.now
        if sent is None:
            why = Refusal("late", "task", "it answers no message of this round or the one before")
            server.turn_away(str(reply.metadata.src_node_id), None, why, now)
            return
        try:
            if reply.has_error():
                stage, why_not = failure(reply)
                server.turn_away(sent.client, sent.task, Refusal(stage, "reply", why_not), now)
            elif foreign := stranger(reply, sent):
                who = str(reply.metadata.src_node_id)
                server.turn_away(who, None, Refusal("check", "identity", foreign), now)
            elif isinstance(data := self._envelope(reply.content, sent), str):
                server.turn_away(sent.client, sent.task, Refusal("train", "reply", data), now)
            else:
                server.offer(sent.client, data, now)
        except Exception as error:  # ours, or whatever Flower's records do with hostile content
            server.turn_away(sent.client, sent.task, Refusal("decode", "reply", _words(error)), now)

    def _envelope(self, content: RecordDict, sent: Sent) -> bytes | memoryview | str:
        """A reply as an envelope: the one that our mod made, or one of plain weights; or the mod's words why not."""
        if messages.UPDATE in content or messages.FAILURE in content:
            return messages.read_reply(content)
        if self._by_mod:
            words = f"it sends its weights in full, client is {self._client}"
            raise DecodeError(f"{words}: put fedkeel.deploy.mods.seal into its ClientApp's mods")
        given = sent.message.content
        task = Task.read(str(cast(ConfigRecord, given[self.configrecord_key])[ORDER]))
        base = cast(ArrayRecord, given[self.arrayrecord_key])
        return envelope_of(base, content, task, self.plan, ClientMemory())

    # -- evaluation

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Messages to those who evaluate; who is in quarantine does not."""
        if self.fraction_evaluate == 0:
            return []
        rounds = self._begun(arrays)
        nodes = self._there(grid, max(self.min_available_nodes, self.min_evaluate_nodes))
        shut = rounds.server.shut_out([str(node) for node in nodes])
        size = max(int(len(nodes) * self.fraction_evaluate), self.min_evaluate_nodes)
        key = rounds.key.fold("evaluate", rounds.server.state.round)
        chosen = _drawn([node for node in nodes if str(node) not in shut], size, key)
        told = ConfigRecord({**config, "server-round": rounds.server.state.round})
        content = RecordDict({self.arrayrecord_key: arrays, self.configrecord_key: told})
        sent = [Sent(str(node), 0, Message(content, node, MessageType.EVALUATE)) for node in chosen]
        return self._evaluation.send(sent)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """What the clients measured, each figure by the plan's weights and reducer; refused ones are written down."""
        if (rounds := self._rounds) is None:
            return None
        measured: dict[str, Claims] = {}
        refused: dict[str, Refusal] = {}
        for reply in replies:
            sent = self._evaluation.asked(reply, before=False)
            client = str(reply.metadata.src_node_id) if sent is None else sent.client
            if client in measured:
                continue  # the first answer counts
            found = self._measured(rounds, reply, sent)
            if isinstance(found, Refusal):
                refused[client] = found
            else:
                measured[client] = found
        for client in {sent.client for sent in self._evaluation.open} - measured.keys() - refused.keys():
            refused[client] = Refusal("transport", "reply", "evaluation: no answer came in time")
        for client, why in refused.items():
            log(WARNING, "\t> %s: %s", client, why.reason)
        rounds.write_refused(refused)
        if not measured:
            return None
        claims = list(measured.values())
        shares = figures.weights(self.plan, rounds.server.state, claims)
        said = [(claim.num_examples, claim.metrics) for claim in claims]
        made = self._aggregated(said, shares, self._aggregations[1])
        if made is not None:
            rounds.write_figures("clients", _scalars(made), sum(claim.num_examples for claim in claims))
        return made

    def _measured(self, rounds: Rounds, reply: Message, sent: Sent | None) -> Claims | Refusal:
        try:
            if sent is None:
                return Refusal("late", "task", "evaluation: it answers no message of this round")
            if reply.has_error():
                stage, why = failure(reply)
                return Refusal(stage, "reply", f"evaluation: {why}")
            if foreign := stranger(reply, sent):
                return Refusal("check", "identity", f"evaluation: {foreign}")
            said = weights.told(reply.content, self.weighted_by_key, finite=True)
            state = rounds.server.state
            claims = weights.claims_of(said, sent.client, 0, state.version, rounds.layout)
            return figures.refusal(self.plan, rounds.server, claims) or claims
        except Exception as error:
            return Refusal("decode", "reply", f"evaluation: {_words(error)}")

    # -- what both need

    def _begun(self, arrays: ArrayRecord) -> Rounds:
        """The run, begun with these weights where it has not begun."""
        if self._rounds is None:
            self._rounds = Rounds(self.job, self.plan, arrays, self._buffers, self._run)
        return self._rounds

    def _there(self, grid: Grid, wanted: int) -> list[int]:
        """Who is connected, in order; for as many as are wanted it waits, but not for ever."""
        until = time.monotonic() + self._patience
        while len(nodes := sorted(grid.get_node_ids())) < wanted and time.monotonic() < until:
            log(INFO, "%d nodes are there, %d are wanted: waiting", len(nodes), wanted)
            time.sleep(LOOK)
        return nodes

    def _judging(
        self, evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None]
    ) -> Callable[[int, ArrayRecord], MetricRecord | None]:
        """The app's own evaluation on the server, written down."""

        def judged(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
            found = evaluate_fn(server_round, arrays)
            if found is not None and self._rounds is not None:
                self._rounds.write_figures("global", _scalars(found))
            return found

        return judged

    def _aggregated(
        self, said: Sequence[tuple[int, Mapping[str, float]]], shares: Tensor, custom: Aggregation | None
    ) -> MetricRecord | None:
        """What clients say of (examples, metrics) as one record: by the app's own function, or the plan's reducer."""
        if custom is None:
            found = figures.reduced(self.plan, [metrics for _, metrics in said], shares)
            return MetricRecord({**found}) if found else None
        contents = [
            RecordDict({"metrics": MetricRecord({**metrics, self.weighted_by_key: count})}) for count, metrics in said
        ]
        try:
            return custom(contents, self.weighted_by_key)
        except Exception as error:  # perhaps provoked by what a client said
            log(WARNING, "the app's aggregation of metrics raised %s: %s", type(error).__name__, error)
            return None


def _planned(job: Job | Path | str | None, sections: Mapping[str, Any], cohort: int) -> tuple[Job, Plan]:
    """The job as far as it concerns an app, and its plan for a cohort that may be so small. Raises `InputError`."""
    if job is not None and sections:
        raise InputError(f"FedKeel was given a job and {sorted(sections)}: give one of the two")
    given = job if isinstance(job, Job) else Job(**sections) if job is None else load(job)
    plugins.load(given.plugins)
    plain = Job()
    for key in _NOT_HERE:
        section, _, name = key.partition(".")
        if (value := getattr(getattr(given, section), name)) != getattr(getattr(plain, section), name):
            raise InputError(f"{key} = {value!r} needs more than a Flower app does: leave it out")
    given = given.model_copy(update={"data": Data(clients=cohort), "select": plain.select})
    try:
        plan = build_plan(given)
    except InputError as error:
        raise InputError(f"{error} (select.cohort is min_train_nodes here)") from None
    plan.check_referee(False)
    return given, plan


def _drawn(nodes: list[int], size: int, key: Key) -> list[int]:
    """So many of the nodes, in order; all where there are no more."""
    if size >= len(nodes):
        return nodes
    return [nodes[place] for place in sorted(key.numpy().choice(len(nodes), size, replace=False))]


def _words(error: Exception) -> str:
    """What is wrong with a reply, in one line."""
    said = " ".join(str(error).split())[: messages.MOST_WORDS]
    return (
        said if isinstance(error, DecodeError | ValueError) else f"it can not be read ({type(error).__name__}: {said})"
    )


def _scalars(found: MetricRecord) -> dict[str, float]:
    return {name: float(value) for name, value in found.items() if not isinstance(value, list)}
