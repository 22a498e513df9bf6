"""Admitted rows to one direction: screen, weigh, mix, reduce. Nothing here knows how the rows came."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from fedkeel.core.errors import CohortError
from fedkeel.core.registry import Rule
from fedkeel.core.types import Cohort, Refusal, ServerState
from fedkeel.kernels import distance
from fedkeel.round.plan import Plan


class Used(NamedTuple):
    """The rows that were left after screening, their weights, and which rows of the whole cohort they were."""

    cohort: Cohort
    weights: Tensor
    rows: list[int]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the arithmetic gave: the direction (P,), its norm; by row of the cohort shares of weight, cosines, trust.

    `kept` is what stateful rules keep from now on; `scale` is what absolute weights make of the direction's length.
    """

    direction: Tensor = field(default_factory=lambda: torch.zeros(0))
    norm: float = 0.0
    weights: Mapping[int, float] = field(default_factory=dict)
    cosines: Mapping[int, float] = field(default_factory=dict)
    trust: Mapping[int, float] = field(default_factory=dict)
    kept: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    used: Used | None = None
    scale: float = 1.0


def aggregate(
    plan: Plan, cohort: Cohort, state: ServerState, refused: dict[int, Refusal], given: Tensor | None = None
) -> Outcome:
    """The aggregate of the cohort; what screens and weighers refuse goes into `refused`, by row.

    `given` are weights (n,) that the rows have already: of sums that clients have weighed themselves.

    Where screens refuse rows the others move up in `cohort.U`, in place: no second matrix. Raises `CohortError` when
    too few are left for the plan's rules, or a rule gives what its kind may not.
    """
    memory = dict(state.kept)

    def asked(rule: Rule, cohort: Cohort) -> object:
        if rule.definition.init is None:
            return rule(cohort, state)
        given, memory[repr(rule)] = rule(cohort, state, memory.get(repr(rule), rule.init()))
        return given

    for rule in plan.screens:
        found = asked(rule, cohort)
        assert isinstance(found, Mapping)
        for row, (reason, score) in found.items():
            refused.setdefault(int(row), Refusal("screen", rule.name, str(reason), float(score)))
    rows = [row for row in range(len(cohort)) if row not in refused]
    if not rows:
        raise CohortError("no update was left after screening")
    if len(rows) < len(cohort):
        cohort = _compacted(cohort, rows)
    for rule in (*plan.seeing_weighers, plan.reducer):
        if rule.needs > len(cohort):
            raise CohortError(f"{rule.kind} '{rule!r}' needs {rule.needs} rows, {len(cohort)} were left")
    weights = torch.ones(len(cohort), dtype=torch.float64) if given is None else given[rows]
    absolute = torch.ones_like(weights)
    for rule in plan.seeing_weighers:
        own = asked(rule, cohort)
        assert isinstance(own, Tensor)
        if own.shape != weights.shape or not bool((torch.isfinite(own) & (own >= 0)).all()):
            raise CohortError(f"weigher '{rule!r}' gave weights that are not {len(weights)} numbers of 0 or more")
        for row in torch.nonzero((own == 0) & (weights > 0)).flatten().tolist():
            held = _trust(rule, memory, cohort.client[row])
            why = "" if held is None else f": its client's trust is {held:.3f}, 1 is the mean"
            refused[rows[row]] = Refusal("weigh", rule.name, f"{rule.name} gave it weight 0{why}", held)
        weights = weights * own
        if "absolute" in rule.definition.traits:
            absolute = absolute * own
    shares = weights / sum_of(weights)
    trust = {
        row: held
        for rule in plan.seeing_weighers
        for row, client in zip(rows, cohort.client, strict=True)
        if (held := _trust(rule, memory, client)) is not None
    }
    direction = reduced(plan, cohort, weights)
    if direction.shape != state.theta.shape:
        raise CohortError(f"reducer '{plan.reducer!r}' gave shape {tuple(direction.shape)}, not (P,)")
    scale = scale_of(weights, absolute)
    direction = direction if scale == 1 else direction * scale
    norm = math.sqrt(distance.sq_norm(direction))
    alike = cosines(cohort, direction, norm)
    return Outcome(
        direction,
        norm,
        dict(zip(rows, shares.tolist(), strict=True)),
        dict(zip(rows, alike, strict=True)),
        trust,
        memory,
        Used(cohort, weights, rows),
        scale,
    )


def scale_of(weights: Tensor, absolute: Tensor) -> float:
    """How long the step is: the mean of the factors of the weights (n,) that are absolute, by the other factors."""
    if bool((absolute == 1).all()):
        return 1.0
    others = torch.where(absolute > 0, weights / absolute.clamp_min(1e-300), 0.0)
    return float(weights.sum() / others.sum())


def reduced(plan: Plan, cohort: Cohort, weights: Tensor, *, by_steps: bool = True) -> Tensor:
    """The plan's mixers and reducer on rows of these weights; `by_steps=False` leaves out mixers that go by clients."""
    mixed = cohort.U
    for place, rule in enumerate(plan.mixers):
        traits = rule.definition.traits
        told: tuple[object, ...] = (cohort.tau, cohort.params) if "by_steps" in traits else ()
        told += (cohort.gap,) if "looks_back" in traits else ()
        if by_steps or not told:
            mixed, weights = rule(mixed, weights, cohort.key.fold("mix", place), *told)
    found: Tensor = plan.reducer(mixed, weights)
    return found


def per_step_(plan: Plan, used: Used, direction: Tensor, lr: float) -> Tensor:
    """The aggregate (P,) of the rows, each divided by -tau * lr: the mean step as a gradient; zero for buffers.

    Rows are brought to the mean tau before they are mixed and reduced, in place, as nobody may want them afterwards,
    and what comes out is divided: a rule that knows an absolute size meets updates of the size that it was made for.
    Raises `CohortError` where the steps of a row that counts are 0.
    """
    cohort, weights = used.cohort, used.weights
    tau, shares = cohort.tau, weights / weights.sum()
    counts = weights > 0
    if not bool((tau[counts] > 0).all()):
        raise CohortError("an update of 0 steps says nothing of a step: put the check 'claims' before it")
    mean, found = float(shares @ tau), direction
    if not bool((tau[counts] == tau[counts][0]).all()):
        for row in torch.nonzero(counts).flatten().tolist():
            cohort.U[row, cohort.params] *= mean / float(tau[row])
        found = reduced(plan, cohort, weights, by_steps=False)
    found = found / (-mean * lr)
    found[cohort.params.stop :] = 0
    return found


def sum_of(weights: Tensor) -> float:
    """The sum of the weights (n,); `CohortError` unless it is a number above 0."""
    total = float(weights.sum())
    if not (math.isfinite(total) and total > 0):
        raise CohortError(f"the weights of {len(weights)} updates sum to {total:g}")
    return total


def _trust(rule: Rule, memory: Mapping[str, Mapping[str, Tensor]], client: str) -> float | None:
    """What the weigher keeps of the client, if that is its trust."""
    held = memory[repr(rule)].get(client) if "trust" in rule.definition.traits else None
    return None if held is None else float(held)


def _compacted(cohort: Cohort, rows: list[int]) -> Cohort:
    for to, row in enumerate(rows):  # ascending, so nothing needed is overwritten
        if to != row:
            cohort.U[to] = cohort.U[row]
    return replace(
        cohort,
        U=cohort.U[: len(rows)],
        client=tuple(cohort.client[row] for row in rows),
        num_examples=cohort.num_examples[rows],
        staleness=cohort.staleness[rows],
        steps=cohort.steps[rows],
        norm=cohort.norm[rows],
        metrics=tuple(cohort.metrics[row] for row in rows),
        labels=tuple(cohort.labels[row] for row in rows),
        gap=None if cohort.gap is None else tuple(cohort.gap[row] for row in rows),
        device=tuple(cohort.device[row] for row in rows) if cohort.device else (),
    )


def cosines(cohort: Cohort, direction: Tensor, norm: float) -> list[float]:
    """Of each row with a direction (P,) of this norm; 0 where one of them is 0."""
    along = (cohort.U @ direction).double()
    lengths = cohort.norm * norm
    return torch.where(lengths > 0, along / lengths.clamp_min(1e-300), 0.0).clamp(-1, 1).tolist()
