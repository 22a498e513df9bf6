"""The run's own round as a release: what an observer of the models sees of given rows, by the job's own rules."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedkeel.audit import updates
from fedkeel.core.errors import CohortError
from fedkeel.core.keys import Key
from fedkeel.core.types import Claims, Cohort, ServerState
from fedkeel.kernels import distance
from fedkeel.round import aggregate
from fedkeel.round.groups import Groups
from fedkeel.round.privacy import KEPT, NORM, Noiser, uncorrelated
from fedkeel.round.secure import Secure
from fedkeel.train import Task
from fedkeel.world.federation import Federation


@dataclass
class Round:
    """A `Release`: all that a job does to rows up to the direction that the model takes, at a state of its server.

    The first rows are the clients that train, any further ones canaries. Every call draws anew: it counts them. What
    the optimiser makes of the direction tells no more than the direction. Where the accounting counts on sampling a
    canary takes part by the same chance.
    """

    federation: Federation
    state: ServerState
    key: Key
    clients: tuple[str, ...]
    calls: int = field(default=0, init=False)

    def __call__(self, rows: Tensor) -> Tensor:
        federation = self.federation
        self.calls += 1
        key = self.key.fold("call", self.calls)
        clients = [*self.clients, *(f"canary-{i}" for i in range(len(rows) - len(self.clients)))][: len(rows)]
        plan = federation.plan
        if plan.privacy is not None and plan.privacy.sampling in ("poisson", "fixed"):
            drawn = torch.rand(len(rows), generator=key.fold("sample").torch(), dtype=torch.float64)
            here = (drawn < plan.privacy.cohort / plan.privacy.population).tolist()
            taken = [i for i in range(len(rows)) if i < len(self.clients) or here[i]]
            rows, clients = rows[taken], [clients[i] for i in taken]
        arrived = updates.sent_by_job(federation, rows, clients, key, control=self.state.control)
        counts = torch.tensor([float(self._examples(client)) for client in clients], dtype=torch.float64)
        cohort = self._cohort(arrived, clients, counts, key)
        if plan.noised:
            return self._released(cohort)
        try:
            if plan.secure is not None:
                return self._of_groups(plan.secure, cohort, key)
            return aggregate.aggregate(plan, cohort, self.state, {}).direction
        except CohortError:  # the round would be skipped, and the model kept
            return torch.zeros_like(self.state.theta)

    def _cohort(self, rows: Tensor, clients: Sequence[str], counts: Tensor, key: Key) -> Cohort:
        layout, none = self.federation.layout, torch.zeros_like
        return Cohort(
            rows,
            tuple(clients),
            counts,
            none(counts),
            torch.ones_like(counts),
            distance.sq_norms(rows).sqrt(),
            layout.params,
            tuple(found for e in layout.entries for found in layout.slices(e.name)[:1]),
            ({},) * len(rows),
            ((),) * len(rows),
            key.fold("cohort"),
            self.federation.referee,
            gap=(none(self.state.theta),) * len(rows) if self.federation.plan.looks_back else None,
        )

    def _of_groups(self, rule: Secure, cohort: Cohort, key: Key) -> Tensor:
        """What the rules make of the means of groups, dealt anew."""

        def described(rows: Tensor, claims: Sequence[Claims]) -> Cohort:
            counts = torch.tensor([float(claim.num_examples) for claim in claims], dtype=torch.float64)
            return self._cohort(rows, [claim.client for claim in claims], counts, key)

        digest, counts = self.federation.layout.digest, cohort.num_examples.tolist()
        claims = [
            Claims(client, i, 0, digest, int(n), 1)
            for i, (client, n) in enumerate(zip(cohort.client, counts, strict=True))
        ]
        groups = Groups(self.federation.plan, rule, cohort.U.shape[1], key, described)
        return groups.preview(list(cohort.U), claims, self.state)

    def _released(self, cohort: Cohort) -> Tensor:
        """The noised sum of a cohort, as the server adds it up."""
        plan = self.federation.plan
        assert plan.privacy is not None
        kept = uncorrelated(self.state.kept.get(KEPT, {}))  # each call is a first round
        noiser, weights = Noiser(plan.privacy, kept), torch.ones(len(cohort), dtype=torch.float64)
        for rule in plan.weighers:
            most = rule.hook("most")
            assert most is not None
            weights *= rule(cohort, self.state) / most()
        for row, weight in zip(cohort.U, weights.tolist(), strict=True):
            noiser.add(row, weight, Claims("", 0, 0, "", 1, 1))
        return noiser.release(cohort.U.shape[1], plan.rows, self.calls).direction

    def _examples(self, client: str) -> int:
        """How many examples a client says it has; a canary what is usual."""
        data, names = self.federation.data, self.federation.names
        if client in names:
            return data.count(names.index(client))
        return int(data.offsets.diff().median())


def honest(federation: Federation, state: ServerState, key: Key) -> tuple[tuple[str, ...], Tensor]:
    """A cohort of honest clients and the updates (n, P) that they make of the run's model."""
    hostile = set(federation.adversary.clients)
    places = [i for i, name in enumerate(federation.names) if name not in hostile and federation.data.count(i)]
    order = torch.randperm(len(places), generator=key.fold("cohort").torch())[: federation.plan.cohort].tolist()
    chosen = sorted(places[i] for i in order)
    private = federation.private()
    tasks = [Task(i, key.fold("client", federation.names[i]), private) for i in chosen]
    trainer = federation.trainer()
    try:
        done = {t.client: t.delta.clone() for t in trainer.train(state.theta, tasks) if t.failure is None}
    finally:
        trainer.close()
    kept = sorted(i for i in done if bool(torch.isfinite(done[i]).all()))
    return tuple(federation.names[i] for i in kept), torch.stack([done[i] for i in kept])


def clip_norm(federation: Federation, state: ServerState, rows: Tensor) -> float:
    """How long a canary is: the least norm that the job clips to, or else the median of honest updates' (n, P)."""
    if federation.plan.privacy is not None:
        return float(state.control[NORM]) if NORM in state.control else federation.plan.privacy.mechanism.norm
    norms = [float(rule.parameters["norm"]) for rule in federation.plan.transforms if "clips" in rule.definition.traits]
    return min(norms) if norms else math.sqrt(float(distance.sq_norms(rows).median()))
