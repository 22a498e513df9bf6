"""The server's half of a round: admission, then arithmetic. It owns the model's state and no clock."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from torch import Tensor

from fedkeel.core.errors import CohortError, DecodeError
from fedkeel.core.keys import Key
from fedkeel.core.layout import Layout
from fedkeel.core.registry import Rule
from fedkeel.core.types import (
    Claims,
    ClientRow,
    Closed,
    Cohort,
    Door,
    Referee,
    Refusal,
    RoundReport,
    ServerState,
    Update,
)
from fedkeel.core.work import LocalWork
from fedkeel.kernels import distance
from fedkeel.round import wire
from fedkeel.round.aggregate import Outcome, aggregate, per_step_, reduced, sum_of
from fedkeel.round.plan import Plan
from fedkeel.round.quarantine import Book
from fedkeel.round.rows import RowStore, RowSum

_log = logging.getLogger("fedkeel")
MESSAGES_KEPT = 8
"""Refused messages of one client that a round keeps in words; of more only the number is kept."""


@dataclass(slots=True)
class _Admitted:
    task: int
    update: Update
    staleness: int
    weight: float = 0.0


class Server:
    """`expect` what was given out, `offer` what comes in, `close` the round. Every message ends in one report.

    A refusal is returned and recorded, never raised: one bad client can not stop a round. `key` is the federation's:
    screens, weighers and mixers draw from it. `referee` judges for rules with the trait "server_data"; a plan with
    such rules raises `InputError` without one.
    """

    def __init__(
        self, plan: Plan, layout: Layout, state: ServerState, key: Key, referee: Referee | None = None
    ) -> None:
        plan.check_referee(referee is not None)
        self.plan = plan
        self._referee = referee
        self._layers = tuple(part for e in layout.entries if e.kind != "private" for part in layout.slices(e.name))
        self._key = key
        self.layout = layout
        opt = state.opt or plan.optimiser.init(state.theta[layout.params])
        self.state = state.replace(opt=opt, control=state.control or _first_control(plan, layout))
        self._codec_name, self._codec = wire.built(plan.codec, layout)
        self._header_checks = [c for c in plan.checks if "header" in c.definition.traits]
        self._body_checks = [c for c in plan.checks if "header" not in c.definition.traits]
        columns = layout.columns
        self._streams = plan.streams(columns)
        self._store = RowStore(columns, 0 if self._streams else plan.cohort, state.next_task)
        self._told = [rule for rule in plan.corrections if rule.hook("control")]
        self._by_steps = any("control" in rule.definition.traits for rule in self._told)
        self._sum = RowSum(columns if self._streams else 0, scaled=self._by_steps)
        self._outstanding: dict[str, int] = {}
        self._versions: dict[str, int] = {}
        self._answered: set[int] = set()
        self._admitted: list[_Admitted] = []
        self._refused: list[ClientRow] = []
        self._messages: dict[str, tuple[int, int]] = {}
        self._last_payload: dict[str, str] = dict(state.trust.get("last_payload", {}))
        self._book = Book(plan.quarantine, state.trust.get("offences", {}))
        self._left_out: dict[str, Refusal] = {}
        self._asked: set[str] = set()

    def snapshot(self) -> ServerState:
        """The state to checkpoint. Work that is outstanding is not in it: a resumed round gives it out again."""
        trust = {"last_payload": dict(self._last_payload), "offences": self._book.to_json()}
        return self.state.replace(trust={**self.state.trust, **trust})

    @property
    def bytes_down(self) -> int:
        """What a client is sent to begin with: the model and what corrections take from the server, as float32."""
        return 4 * (self.layout.columns + sum(c.numel() for c in self.state.control.values()))

    def settled(self, client: str) -> int | None:
        """The latest of the client's tasks whose update was used, as far as corrections need to know."""
        found: int | None = self.state.trust.get("used", {}).get(client)
        return found

    # -- the door

    def shut_out(self, clients: Sequence[str]) -> Set[str]:
        """Who of the clients is in quarantine and gets no task this round; the report will say so of each."""
        self._left_out = self._book.shut_out(clients, self.plan.least)
        return self._left_out.keys()

    def give(self, client: str) -> int:
        """A new task for the client: its answer, and no other, will be let in."""
        task = self.state.next_task
        self.state = self.state.replace(next_task=task + 1)
        self._outstanding[client] = task
        self._asked.add(client)
        self._versions[client] = self.state.version
        return task

    def give_up(self, client: str, refusal: Refusal) -> None:
        """The client's task will have no answer: it failed, or was lost."""
        if self._outstanding.pop(client, None) is not None:
            self._refused.append(ClientRow(client, refusal))
            self._fold()

    def awaits(self, client: str) -> bool:
        """Whether the client has a task that may still be answered."""
        return client in self._outstanding

    @property
    def received(self) -> int:
        return len(self._admitted)

    @property
    def door(self) -> Door:
        """What the checks compare with."""
        return Door(
            self.layout.digest,
            self.state.version,
            self.plan.max_staleness,
            self._outstanding,
            self._answered,
            self._last_payload,
        )

    def offer(self, client: str, data: bytes, *, intact: bool = False) -> Refusal | None:
        """Let one message from `client` (as the transport knows it) through the door, or say why not.

        A refused answer ends the client's task; a message about another task (late, doubled, replayed) does not.
        `intact`: these are the very bytes that `wire.seal` made in this process, so the payload is not hashed again.
        Cost: O(bytes).
        """
        update: Update | None = None
        try:
            sealed = wire.read(data)
            update = Update(sealed.claims, sealed.digest, len(data))
            refusal = self._check_header(client, update)
            if refusal is None:
                update = self._measure(update, self._decode(sealed, intact))
                refusal = _first_refusal(self._body_checks, update, self.door)
                if refusal is None:
                    self._admit(client, update)
                    return None
        except DecodeError as error:
            refusal = Refusal("decode", "envelope", str(error))
        self._refuse(client, len(data), update, refusal)
        if update is None or update.claims.task == self._outstanding.get(client):
            self._outstanding.pop(client, None)
            self._fold()
        return refusal

    def _decode(self, sealed: wire.Sealed, intact: bool) -> Tensor:
        task = sealed.claims.task
        columns = self._sum.slot(task) if self._streams else self._store.slot(task)
        wire.open_payload(sealed, self._codec_name, self._codec, columns, intact=intact)
        return columns

    def _check_header(self, client: str, update: Update) -> Refusal | None:
        claims = update.claims
        if claims.client != client:
            return Refusal("check", "identity", f"it claims to be from '{claims.client[:64]}'")
        open_task = self._outstanding.get(client) == claims.task
        if not open_task and claims.task not in self._answered and claims.task < self.state.next_task:
            return Refusal("late", "task", f"task {claims.task} is closed")
        refusal = _first_refusal(self._header_checks, update, self.door)
        if refusal is None and not open_task:
            # Structural, whatever checks a job names: no task is answered twice, none without being given.
            return Refusal("check", "task", f"task {claims.task} is not one that this client was given")
        if refusal is None and claims.base_version != self._versions[client]:
            given = self._versions[client]
            return Refusal("check", "task", f"it claims model version {claims.base_version}, it was given {given}")
        return refusal

    def _measure(self, update: Update, delta: Tensor) -> Update:
        square, columns = distance.sq_norm(delta), delta.numel()
        variance = max(square / columns - (float(delta.sum()) / columns) ** 2, 0.0) if columns else 0.0
        return replace(update, delta=delta, norm=math.sqrt(square), variance=variance, finite=math.isfinite(square))

    def _admit(self, client: str, update: Update) -> None:
        task = self._outstanding.pop(client)
        self._answered.add(task)
        admitted = _Admitted(task, update, self.state.version - update.claims.base_version)
        if self._streams:
            assert update.delta is not None
            alone = self._cohort(update.delta[None], [admitted])
            admitted.weight = math.prod(float(w(alone, self.state)[0]) for w in self.plan.weighers)
            tau = float(alone.tau[0]) if self._by_steps and admitted.weight else 1.0
            self._sum.admit(task, admitted.weight, -1 / (tau * self._lr) if tau else math.nan)
        else:
            self._store.admit(task)
        self._admitted.append(admitted)
        self._fold()

    def _fold(self) -> None:
        if self._streams:
            self._sum.fold(min(self._outstanding.values(), default=math.inf))

    def _refuse(self, client: str, size: int, update: Update | None, refusal: Refusal) -> None:
        count, more = self._messages.get(client, (0, 0))
        over = count >= MESSAGES_KEPT or len(self._refused) >= MESSAGES_KEPT * (self.plan.cohort + MESSAGES_KEPT)
        if count == 0 and over and not self.awaits(client):
            client = "(others)"  # senders beyond counting: one line for all
            count, more = self._messages.get(client, (0, 0))
        self._messages[client] = (count + 1, more + size if over else 0)
        if over:
            return
        row = ClientRow(client, refusal, bytes_up=size) if update is None else _described(update)
        self._refused.append(replace(row, client=client, refusal=refusal))

    # -- the close

    def close(self, now: float, skip: str | None = None) -> RoundReport:
        """Reduce what was admitted, step the model, and report. `skip` keeps the model, and says why.

        Tasks still outstanding stay so (asynchronous work); the coordinator gives up those that it abandons.
        """
        self._admitted.sort(key=lambda a: a.task)
        refused: dict[int, Refusal] = {}
        outcome, worth, before = Outcome(), {}, self.state
        if skip is None:
            try:
                outcome = self._reduce(refused)
                self._step(outcome)
                worth = self._contributions(outcome, before)
                self._tell(outcome)
            except CohortError as error:
                skip = str(error)
            except Exception as error:  # a user's rule, perhaps provoked by a row: the round is lost, not the run
                skip = f"a rule raised {type(error).__name__}: {' '.join(str(error).split())[:200]}"
            if skip is not None:
                self.state = before
        report = RoundReport(
            self.state.round + 1,
            self.state.version,
            now,
            self._rows(outcome, refused, worth, skip),
            skip,
            0.0 if skip else outcome.norm,
        )
        self._book.close(report.round, report.clients, self._asked)
        self._next_buffer()
        return report

    def preview(self, U: Tensor, claims: Sequence[Claims]) -> Tensor:
        """What these rows (n, P) would come to if they were all that is sent, (P,); nothing changes.

        Zero where the round would be skipped. Rules that draw draw as they will at the close.
        """
        admitted, rows = [], []
        for row, claim in zip(U, claims, strict=True):
            update = self._measure(Update(claim, b"", 0), row)
            if _first_refusal(self._body_checks, update, self.door) is None:
                admitted.append(_Admitted(claim.task, update, self.state.version - claim.base_version))
                rows.append(row)
        try:
            return aggregate(self.plan, self._cohort(torch.stack(rows), admitted), self.state, {}).direction
        except Exception:  # whatever costs the round at the close: no row at all, too few, a rule that raises
            return torch.zeros_like(self.state.theta)

    def _reduce(self, refused: dict[int, Refusal]) -> Outcome:
        """The aggregate of the admitted rows; who is refused on the way goes into `refused`, by position."""
        if not self._admitted:
            raise CohortError("no update was admitted")
        if not self._streams:
            return aggregate(self.plan, self._cohort(self._store.in_order(), self._admitted), self.state, refused)
        self._sum.fold(math.inf)
        weights = torch.tensor([a.weight for a in self._admitted], dtype=torch.float64)
        total = sum_of(weights)
        direction = (self._sum.total / total).to(torch.float32)
        return Outcome(direction, math.sqrt(distance.sq_norm(direction)), dict(enumerate((weights / total).tolist())))

    def _cohort(self, U: Tensor, admitted: Sequence[_Admitted]) -> Cohort:
        claims = [a.update.claims for a in admitted]
        return Cohort(
            U,
            tuple(c.client for c in claims),
            _float64(c.num_examples for c in claims),
            _float64(a.staleness for a in admitted),
            _float64(c.steps for c in claims),
            _float64(a.update.norm for a in admitted),
            self.layout.params,
            self._layers,
            tuple(c.metrics for c in claims),
            tuple(c.labels if len(c.labels) == self.plan.label_classes else () for c in claims),
            self._key.fold("cohort", self.state.round),
            self._referee,
            partial(reduced, self.plan),
            self._work.worth if self._work else None,
        )

    def _step(self, outcome: Outcome) -> None:
        """Move the model: the optimiser on parameters, buffers by plain addition."""
        params, state, direction = self.layout.params, self.state, outcome.direction
        theta, opt = self.plan.optimiser(state.theta[params], direction[params], state.opt, self._share(outcome))
        if params.stop < direction.numel():
            theta = torch.cat([theta, state.theta[params.stop :] + direction[params.stop :]])
        if not math.isfinite(distance.sq_norm(theta)):
            raise CohortError("the aggregate is not finite")
        self.state = state.replace(theta=theta, opt=opt, kept=outcome.kept, version=state.version + 1)

    @property
    def _work(self) -> LocalWork | None:
        """What clients do in this round."""
        return self.plan.work.at(self.state.round + 1) if self.plan.work else None

    @property
    def _lr(self) -> float:
        return self._work.lr if self._work else 1.0

    def _share(self, outcome: Outcome) -> float:
        """Of all clients, those whose updates were used."""
        used = sum(weight > 0 for weight in outcome.weights.values())
        return min(1.0, used / max(self.plan.population, self.plan.cohort))

    def _tell(self, outcome: Outcome) -> None:
        """What corrections send from now on, and whose update was used. Spoils the rows: the last of a round."""
        used = [self._admitted[row].update.claims for row, weight in outcome.weights.items() if weight > 0]
        if any(rule.hook("after") for rule in self.plan.corrections):
            settled = {**self.state.trust.get("used", {}), **{claims.client: claims.task for claims in used}}
            self.state = self.state.replace(trust={**self.state.trust, "used": settled})
        if not self._told:
            return
        losses = [claims.metrics["loss"] for claims in used if "loss" in claims.metrics]
        loss = statistics.median(losses) if losses else math.nan
        closed = Closed(outcome.direction, self._share(outcome), loss, cache(lambda: self._per_step(outcome)))
        control = dict(self.state.control)
        for rule in self._told:
            hook = rule.hook("control")
            assert hook is not None
            was, control[rule.name] = control[rule.name], hook(control[rule.name], closed)
            finite = "dial" in rule.definition.traits or math.isfinite(distance.sq_norm(control[rule.name]))
            if control[rule.name].shape != was.shape or not finite:
                raise CohortError(f"what correction '{rule!r}' would send is not finite, or has changed its shape")
        self.state = self.state.replace(control=control)

    def _per_step(self, outcome: Outcome) -> Tensor:
        if outcome.used is not None:
            return per_step_(self.plan, outcome.used, outcome.direction, self._lr)
        weights = torch.tensor([a.weight for a in self._admitted], dtype=torch.float64)
        found = (self._sum.scaled / sum_of(weights)).to(torch.float32)
        found[self.layout.params.stop :] = 0
        return found

    def _contributions(self, outcome: Outcome, before: ServerState) -> dict[int, float]:
        """What each row was worth, where the plan asks for it; a rule that fails costs its figures alone."""
        rule, used = self.plan.contribution, outcome.used
        if rule is None or used is None:
            return {}
        try:
            values = rule(used.cohort, used.weights, before).tolist()
            return {row: v for row, v in zip(used.rows, values, strict=True) if math.isfinite(v)}
        except Exception as error:
            _log.warning("contribution '%r' failed in round %d: %s", rule, before.round + 1, error)
            return {}

    def _rows(
        self, outcome: Outcome, refused: Mapping[int, Refusal], worth: Mapping[int, float], skip: str | None
    ) -> tuple[ClientRow, ...]:
        rows = []
        for i, admitted in enumerate(self._admitted):
            row = _described(admitted.update)
            weight = 0.0 if skip else outcome.weights.get(i, 0.0)
            rows.append(
                replace(
                    row,
                    refusal=refused.get(i),
                    weight=weight,
                    cosine=None if skip else outcome.cosines.get(i),
                    trust=None if skip else outcome.trust.get(i),
                    contribution=None if skip else worth.get(i),
                    staleness=admitted.staleness,
                )
            )
        for client, (count, size) in self._messages.items():
            kept = 0 if client == "(others)" else MESSAGES_KEPT
            if count > kept:
                flood = Refusal("check", "flood", f"{count - kept} more refused messages")
                self._refused.append(ClientRow(client, flood, bytes_up=size))
        left_out = [ClientRow(client, refusal) for client, refusal in self._left_out.items()]
        return (*rows, *self._refused, *left_out)

    def _next_buffer(self) -> None:
        for admitted in self._admitted:
            self._last_payload[admitted.update.claims.client] = admitted.update.payload_digest.hex()
        self.state = self.state.replace(round=self.state.round + 1)
        self._admitted.clear()
        self._refused.clear()
        self._left_out = {}
        self._asked = set(self._outstanding)
        self._messages.clear()
        self._answered.clear()
        self._store.clear(self.state.next_task)
        self._sum.clear()


def _first_control(plan: Plan, layout: Layout) -> dict[str, Tensor]:
    """What corrections send in the first round: zero vectors (P,), and dials as they say."""
    found = {}
    for rule in plan.corrections:
        if "dial" in rule.definition.traits:
            found[rule.name] = rule.init()
        elif "control" in rule.definition.traits:
            found[rule.name] = torch.zeros(layout.columns)
    return found


def _described(update: Update) -> ClientRow:
    claims = update.claims
    return ClientRow(
        claims.client,
        None,
        norm=update.norm if update.delta is not None and math.isfinite(update.norm) else None,
        variance=update.variance if update.delta is not None and math.isfinite(update.variance) else None,
        num_examples=claims.num_examples,
        steps=claims.steps,
        bytes_up=update.bytes_up,
        metrics=claims.metrics,
    )


def _first_refusal(checks: Sequence[Rule], update: Update, door: Door) -> Refusal | None:
    for check in checks:
        try:
            reason = check(update, door)
        except Exception as error:  # a user's rule that fails must neither stop the round nor let anything in
            reason = f"the check raised {type(error).__name__}: {error}"
        if reason is not None:
            return Refusal("check", check.name, str(reason), update.norm if check.name == "norm_bound" else None)
    return None


def _float64(values: Iterable[float]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.float64)
