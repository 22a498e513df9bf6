"""The server's half of a round: admission, then arithmetic. It owns the model's state and no clock."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import replace
from functools import cache, partial

import torch
from torch import Tensor

from fedkeel.core.errors import CohortError, DecodeError
from fedkeel.core.keys import Key
from fedkeel.core.layout import Layout
from fedkeel.core.roster import Roster
from fedkeel.core.types import (
    Claims,
    ClientRow,
    Closed,
    Cohort,
    Door,
    InFlight,
    Referee,
    Refusal,
    RoundReport,
    ServerState,
    Update,
)
from fedkeel.core.work import LocalWork
from fedkeel.kernels import distance
from fedkeel.round import secure, wire
from fedkeel.round.admission import Admitted, first_refusal, measured
from fedkeel.round.aggregate import Outcome, Used, aggregate, cosines, per_step_, reduced, scale_of, sum_of
from fedkeel.round.controls import first_control, next_control
from fedkeel.round.downlink import Downlink
from fedkeel.round.groups import Groups
from fedkeel.round.minutes import Minutes
from fedkeel.round.plan import Plan
from fedkeel.round.privacy import KEPT, NORM, Account, Noiser
from fedkeel.round.quarantine import Book
from fedkeel.round.rows import RowStore, RowSum
from fedkeel.secagg.groups import GroupSum
from fedkeel.secagg.terms import Terms

_log = logging.getLogger("fedkeel")


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
        self.state = state.replace(opt=opt, control=state.control or first_control(plan, layout))
        self.account = Account(plan.privacy, state.privacy) if plan.privacy else None
        """What is spent of privacy, where the plan promises any."""
        self._groups = Groups(plan, plan.secure, layout.columns, key, self._described) if plan.secure else None
        self._noiser = Noiser(plan.privacy, state.kept.get(KEPT, {})) if plan.privacy and plan.noised else None
        self._codec_name, self._codec = wire.built(plan.codec, layout)
        self._header_checks = [c for c in plan.checks if "header" in c.definition.traits]
        self._body_checks = [c for c in plan.checks if "header" not in c.definition.traits]
        columns = layout.columns
        self._streams = plan.streams(columns)
        self._store = RowStore(columns, 0 if self._streams or plan.secure is not None else plan.rows, state.next_task)
        self._told = [rule for rule in plan.corrections if rule.hook("control")]
        self._by_steps = any("control" in rule.definition.traits for rule in self._told)
        self._sum = RowSum(columns if self._streams else 0, scaled=self._by_steps)
        self._given = {order.client: order for order in state.in_flight}
        self._outstanding = {client: order.task for client, order in self._given.items()}
        self._bases = dict(state.bases)
        self._downlink = Downlink(plan.down, plan.down_zstd, layout, state.theta, state.downlink)
        self._sent = 0
        self._answered: set[int] = set()
        self._admitted: list[Admitted] = []
        self._minutes = Minutes(plan.cohort)
        self._last_payload: dict[str, str] = dict(state.trust.get("last_payload", {}))
        self._book = Book(plan.quarantine, state.trust.get("offences", {}))
        self._left_out: dict[str, Refusal] = {}
        self._ended: set[str] = set()
        self.roster: Roster | None = None
        """What is known of the clients' devices, once a coordinator has taken up the server."""

    def snapshot(self) -> ServerState:
        """The state to checkpoint, right after a close: updates that lie in an open buffer are not in it."""
        trust = {"last_payload": dict(self._last_payload), "offences": self._book.to_json()}
        trust = {**self.state.trust, **trust}
        out, bases = tuple(self._given.values()), dict(self._bases)
        privacy = {**self.state.privacy, **(self.account.state() if self.account else {})}
        down = self._downlink.state()
        return self.state.replace(trust=trust, privacy=privacy, in_flight=out, bases=bases, downlink=down)

    @property
    def theta(self) -> Tensor:
        """The model (P,) that clients are given."""
        return self._downlink.theta(self.state.theta)

    def way_down(self, have: int) -> list[bytes] | None:
        """The coded steps to the model from a version that a client has; None: it is sent in full."""
        return self._downlink.steps(have, self.state.version)

    def settled(self, client: str) -> int | None:
        """The latest of the client's tasks whose update was used, as far as corrections need to know."""
        found: int | None = self.state.trust.get("used", {}).get(client)
        return found

    # -- the door

    def shut_out(self, clients: Sequence[str]) -> Set[str]:
        """Who of the clients is in quarantine and gets no task this round; the report will say so of each."""
        self._left_out = self._book.shut_out(clients, self.plan.least) if self._book else {}
        return self._left_out.keys()

    def give(self, client: str, now: float = 0.0, have: int = -1) -> int:
        """A new task for the client: its answer, and no other, will be let in. `have`: the model version that it has.

        It is sent the model, and in full what corrections take from the server.
        """
        state = self.state
        sent = self._downlink.bytes(have, state.version) + 4 * sum(c.numel() for c in state.control.values())
        task = state.next_task
        self.state = state.replace(next_task=task + 1)
        self._given[client] = InFlight(client, task, state.round + 1, state.version, now, sent)
        self._outstanding[client] = task
        self._sent += sent
        if self.account is not None:
            self.account.give(client)
        if self.plan.looks_back:
            self._bases[state.version] = self.theta
        return task

    def given(self, client: str) -> InFlight:
        """The task that the client has."""
        return self._given[client]

    def _take(self, client: str) -> InFlight | None:
        """The client's task has ended; None if it had none."""
        self._ended.add(client)
        self._outstanding.pop(client, None)
        return self._given.pop(client, None)

    def give_up(self, client: str, refusal: Refusal, now: float) -> None:
        """The client's task will have no answer: it failed, or was lost."""
        if (order := self._take(client)) is not None:
            self._minutes.given_up(order, refusal, now)
            self._fold()

    def turn_away(self, client: str, task: int | None, refusal: Refusal, now: float, size: int = 0) -> None:
        """Refuse an answer of which there is no envelope; it ends the client's task if it is one to that."""
        ended = self._take(client) if task is not None and task == self._outstanding.get(client) else None
        self._fold()
        self._minutes.refused(client, size, None, refusal, ended, now, self.awaits(client))

    def awaits(self, client: str) -> bool:
        """Whether the client has a task that may still be answered."""
        return client in self._outstanding

    @property
    def received(self) -> int:
        return len(self._admitted)

    @property
    def newest(self) -> Claims:
        """What the client says whose update was let in last."""
        return self._admitted[-1].update.claims

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

    def offer(self, client: str, data: bytes | memoryview, now: float = 0.0, *, intact: bool = False) -> Refusal | None:
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
                if self._groups is None:
                    update = measured(update, self._decode(sealed, intact))
                elif sealed.codec != secure.MASKED or len(sealed.payload):
                    raise DecodeError("it has a row, and rows are added up under masks")
                refusal = first_refusal(self._body_checks, update, self.door)
                if refusal is None:
                    self._admit(client, update, now)
                    return None
        except DecodeError as error:
            refusal = Refusal("decode", "envelope", str(error))
        ended = None
        if update is None or update.claims.task == self._outstanding.get(client):
            ended = self._take(client)
            self._fold()
        self._minutes.refused(client, len(data), update, refusal, ended, now, self.awaits(client))
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
        refusal = first_refusal(self._header_checks, update, self.door)
        if refusal is None and not open_task:
            # Structural, whatever checks a job names: no task is answered twice, none without being given.
            return Refusal("check", "task", f"task {claims.task} is not one that this client was given")
        if refusal is None and claims.base_version != (given := self._given[client].version):
            return Refusal("check", "task", f"it claims model version {claims.base_version}, it was given {given}")
        if refusal is None and (behind := self.state.version - claims.base_version) > self.plan.max_staleness:
            why = f"it is {behind} models behind, at most {self.plan.max_staleness} are used"
            return Refusal("check", "version", why)
        return refusal

    def _admit(self, client: str, update: Update, now: float) -> None:
        order = self._take(client)
        assert order is not None
        task = order.task
        self._answered.add(task)
        admitted = Admitted(task, update, self.state.version - update.claims.base_version)
        admitted.seconds, admitted.bytes_down = now - order.since, order.bytes_down
        if self._groups is not None:
            admitted.weight = secure.weight_of(self.plan.own_weighers, update.claims)
            self._admitted.append(admitted)
            return
        if self._streams or self._noiser:
            assert update.delta is not None
            alone = self._cohort(update.delta[None], [admitted])
            given = [(rule, float(rule(alone, self.state)[0])) for rule in self.plan.weighers]
            admitted.weight = math.prod(weight for _, weight in given)
            admitted.absolute = math.prod(weight for rule, weight in given if "absolute" in rule.definition.traits)
        if self._noiser:
            assert update.delta is not None
            most = math.prod(hook() for rule, _ in given if (hook := rule.hook("most")))
            self._noiser.add(update.delta, admitted.weight / most, update.claims)
        elif self._streams:
            tau = float(alone.tau[0]) if self._by_steps and admitted.weight else 1.0
            self._sum.admit(task, admitted.weight, -1 / (tau * self._lr) if tau else math.nan)
        if not self._streams:
            self._store.admit(task)
        self._admitted.append(admitted)
        self._fold()

    def _fold(self) -> None:
        if self._streams:
            self._sum.fold(min(self._outstanding.values(), default=math.inf))

    # -- the close

    def groups(self) -> tuple[Terms, ...]:
        """Who of those admitted add up with whom, at a close under masks; empty where they are too few."""
        claims = [a.update.claims for a in self._admitted]
        return () if self._groups is None else self._groups.deal(claims, self.state.round)

    def close(self, now: float, skip: str | None = None, sums: Sequence[GroupSum] = ()) -> RoundReport:
        """Reduce what was admitted, step the model, and report. `skip` keeps the model, and says why.

        Under masks what was admitted has no rows, and `sums` are those of `groups`.

        Tasks still outstanding stay so (asynchronous work); the coordinator gives up those that it abandons.
        """
        self._admitted.sort(key=lambda a: a.task)
        refused: dict[int, Refusal] = {}
        outcome, worth, before = Outcome(), {}, self.state
        if skip is None:
            try:
                outcome = self._add_up(self._groups, sums, refused) if self._groups else self._reduce(refused)
                self._step(outcome)
                worth = self._contributions(outcome, before)
                self._tell(outcome)
            except CohortError as error:
                skip = str(error)
            except Exception as error:  # a user's rule, perhaps provoked by a row: the round is lost, not the run
                skip = f"a rule raised {type(error).__name__}: {' '.join(str(error).split())[:200]}"
            if skip is not None:
                self.state = before
            else:
                self._downlink.publish(self.state.theta, self._key.fold("downlink", self.state.version))
        if self.account is not None:
            self.account.count()
        report = RoundReport(
            self.state.round + 1,
            self.state.version,
            now,
            self._lines(None if skip else outcome, refused, worth),
            skip,
            0.0 if skip else outcome.norm,
            self._sent,
            self.account.epsilon if self.account else None,
            charge=self.account.cost if self.account else None,
        )
        self._book.close(report.round, report.clients, self._ended)
        self._next_buffer()
        return report

    def preview(self, U: Tensor, claims: Sequence[Claims]) -> Tensor:
        """What these rows (n, P) would come to if they were all that is sent, (P,); nothing changes.

        Zero where the round would be skipped. Rules that draw draw as they will at the close.
        """
        admitted, rows = [], []
        for row, claim in zip(U, claims, strict=True):
            update = measured(Update(claim, b"", 0), row)
            if first_refusal(self._body_checks, update, self.door) is None:
                admitted.append(Admitted(claim.task, update, self.state.version - claim.base_version))
                rows.append(row)
        try:
            if self._groups is not None:
                return self._groups.preview(rows, [a.update.claims for a in admitted], self.state)
            return aggregate(self.plan, self._cohort(torch.stack(rows), admitted), self.state, {}).direction
        except Exception:  # whatever costs the round at the close: no row at all, too few, a rule that raises
            return torch.zeros_like(self.state.theta)

    def _reduce(self, refused: dict[int, Refusal]) -> Outcome:
        """The aggregate of the admitted rows; who is refused on the way goes into `refused`, by position."""
        if self._noiser:
            return self._release(self._noiser)
        if not self._admitted:
            raise CohortError("no update was admitted")
        if not self._streams:
            return aggregate(self.plan, self._cohort(self._store.in_order(), self._admitted), self.state, refused)
        weights = torch.tensor([a.weight for a in self._admitted], dtype=torch.float64)
        scale = scale_of(weights, torch.tensor([a.absolute for a in self._admitted], dtype=torch.float64))
        total = sum_of(weights)
        direction = self._sum.over(total / scale)
        shares = dict(enumerate((weights / total).tolist()))
        return Outcome(direction, math.sqrt(distance.sq_norm(direction)), shares, scale=scale)

    def _add_up(self, groups: Groups, sums: Sequence[GroupSum], refused: dict[int, Refusal]) -> Outcome:
        """The aggregate of the groups' sums."""
        places = {a.update.claims.client: i for i, a in enumerate(self._admitted)}
        for client, (down, up) in ((c, size) for found in sums for c, size in found.traffic.items()):
            admitted = self._admitted[places[client]]
            admitted.update = replace(admitted.update, bytes_up=admitted.update.bytes_up + up)
            admitted.bytes_down += down
        claims = [a.update.claims for a in self._admitted]
        if self._noiser is None:
            added = groups.add_up(sums, claims, self.state)
            refused.update({places[client]: why for client, why in added.refused.items()})
            return replace(added.outcome, weights={places[client]: w for client, w in added.weights.items()})
        whole, out = groups.total(sums, list(places))
        refused.update({places[client]: why for client, why in out.items()})
        for client in out:
            self._admitted[places[client]].weight = 0.0
        self._noiser.add_sum(whole, [claim for claim in claims if claim.client not in out])
        return self._release(self._noiser)

    def _described(self, rows: Tensor, claims: Sequence[Claims]) -> Cohort:
        updates = [measured(Update(claim, b"", 0), row) for row, claim in zip(rows, claims, strict=True)]
        return self._cohort(rows, [Admitted(place, update, 0) for place, update in enumerate(updates)])

    def _release(self, noiser: Noiser) -> Outcome:
        """The noised sum, also of no updates at all; what the ledger says of each row is not released."""
        direction, kept = noiser.release(self.layout.columns, self.plan.rows, self.state.round)
        norm, weights = math.sqrt(distance.sq_norm(direction)), _float64(a.weight for a in self._admitted)
        shares = (weights / weights.sum()).nan_to_num().tolist()
        found, used = {}, None
        if self._admitted and not self._streams and self._groups is None:
            cohort = self._cohort(self._store.in_order(), self._admitted)
            used = Used(cohort, weights, list(range(len(cohort))))
            found = dict(enumerate(cosines(cohort, direction, norm)))
        memory = {**self.state.kept, KEPT: kept}
        return Outcome(direction, norm, dict(enumerate(shares)), found, kept=memory, used=used)

    def _cohort(self, U: Tensor, admitted: Sequence[Admitted]) -> Cohort:
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
            self._gaps(claims) if self.plan.looks_back else None,
            *(self.roster.devices([c.client for c in claims]) if self.roster and self._groups is None else ()),
        )

    def _gaps(self, claims: Sequence[Claims]) -> tuple[Tensor, ...]:
        """How far the model has gone since each client began, (P,) each, those of one version the same tensor."""
        versions = {c.base_version for c in claims}
        found = {version: self.state.theta - self._bases[version] for version in versions}
        return tuple(found[c.base_version] for c in claims)

    def _step(self, outcome: Outcome) -> None:
        """Move the model: the optimiser on parameters, buffers by plain addition."""
        params, state, direction = self.layout.params, self.state, outcome.direction
        theta, opt = self.plan.optimiser(state.theta[params], direction[params], state.opt, self._share(outcome))
        if params.stop < direction.numel():
            theta = torch.cat([theta, state.theta[params.stop :] + direction[params.stop :]])
        if not math.isfinite(distance.sq_norm(theta)):
            raise CohortError("the aggregate is not finite")
        self.state = state.replace(theta=theta, opt=opt, kept=outcome.kept, version=state.version + 1)
        if self._noiser and NORM in state.control:
            norm = torch.tensor([self._noiser.norm])
            self.state = self.state.replace(control={**state.control, NORM: norm})

    @property
    def _work(self) -> LocalWork | None:
        """What clients do in this round."""
        return self.plan.work.at(self.state.round + 1) if self.plan.work else None

    @property
    def _lr(self) -> float:
        return self._work.lr if self._work else 1.0

    def _share(self, outcome: Outcome) -> float:
        """Of all clients, those whose updates were used; as planned, where that is not to be told."""
        if self._noiser:
            return self.plan.rows / max(self.plan.population, self.plan.rows)
        used = sum(weight > 0 for weight in outcome.weights.values())
        return min(1.0, used / max(self.plan.population, self.plan.cohort))

    def _tell(self, outcome: Outcome) -> None:
        """What corrections send from now on, and whose update was used. Spoils the rows: the last of a round."""
        used = [self._admitted[row].update.claims for row, weight in outcome.weights.items() if weight > 0]
        if self.plan.remembers:
            settled = {**self.state.trust.get("used", {}), **{claims.client: claims.task for claims in used}}
            self.state = self.state.replace(trust={**self.state.trust, "used": settled})
        if not self._told:
            return
        losses = [claims.metrics["loss"] for claims in used if "loss" in claims.metrics]
        loss = statistics.median(losses) if losses else math.nan
        closed = Closed(outcome.direction, self._share(outcome), loss, cache(lambda: self._per_step(outcome)))
        control = next_control(self._told, self.state.control, closed)
        self.state = self.state.replace(control=control)

    def _per_step(self, outcome: Outcome) -> Tensor:
        if outcome.used is not None:
            return per_step_(self.plan, outcome.used, outcome.direction / outcome.scale, self._lr)
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

    def _lines(
        self, outcome: Outcome | None, refused: Mapping[int, Refusal], worth: Mapping[int, float]
    ) -> tuple[ClientRow, ...]:
        rows = [
            a.line(refused.get(i)) if outcome is None else a.used_line(i, outcome, worth.get(i), refused.get(i))
            for i, a in enumerate(self._admitted)
        ]
        used = {row.client for row in rows}  # under asynchrony, of a task that was given before the quarantine
        left_out = [ClientRow(client, refusal) for client, refusal in self._left_out.items() if client not in used]
        return (*rows, *self._minutes.lines(), *left_out)

    def _next_buffer(self) -> None:
        for admitted in self._admitted:
            self._last_payload[admitted.update.claims.client] = admitted.update.payload_digest.hex()
        self.state = self.state.replace(round=self.state.round + 1)
        self._admitted.clear()
        self._left_out = {}
        if self._groups is not None:
            self._groups.clear()
        self._ended.clear()
        self._sent = 0
        if self._noiser:
            self._noiser.clear()
        if self.account is not None:
            self.account.begin()
        out = {order.version for order in self._given.values()}
        self._bases = {version: theta for version, theta in self._bases.items() if version in out}
        self._minutes.clear()
        self._answered.clear()
        self._store.clear(self.state.next_task)
        self._sum.clear()


def _float64(values: Iterable[float]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.float64)
