"""What a plan may promise: how its sampling is counted, and which rules leave no promise at all."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Literal

from fedkeel.core.errors import InputError
from fedkeel.core.keys import Key
from fedkeel.core.layout import Layout
from fedkeel.core.types import ExampleNoise, Mechanism
from fedkeel.core.work import LocalWork
from fedkeel.round import accountant
from fedkeel.round.accountant import Method, Poisson
from fedkeel.round.plan import Plan
from fedkeel.round.privacy import Beside, Privacy

_FALLING = 4
"""Kinds of clients in a row that cost less than one before, after which no more are looked at."""


def promised(
    plan: Plan,
    mechanism: Mechanism,
    *,
    rounds: int,
    delta: float,
    epsilon: float | None = None,
    uses: int | None = None,
    method: Method = "pld",
    secret: Key | None = None,
    least: int | None = None,
    beside: Beside | None = None,
) -> Plan:
    """The plan with a mechanism, whose noise is solved for where the budget is what is given.

    `least` is how many examples a client has at least, for noise in steps.

    Raises `InputError` for rules after which nothing could be promised, and for budgets that can not be kept.
    """
    if mechanism.place == "server":
        _check_sum(plan)
    if mechanism.place == "client":
        _check_told(plan)
        if plan.secure is not None:
            raise InputError(
                f"secagg.size = {plan.secure.size} hides updates that carry noise of their own already, which is far "
                "more than a sum needs: leave out one of the two, or write privacy.mechanism = 'central'"
            )
    sampling = _sampling(plan, mechanism)
    if uses is not None and sampling in ("poisson", "fixed"):
        raise InputError(
            f"privacy.uses = {uses} bounds each client's rounds, and with select.rule = '{plan.select!r}' the rounds "
            "of all are what is counted: leave it out"
        )
    if mechanism.bands > 1 and plan.max_staleness:
        raise InputError(
            f"schedule.rule = '{plan.schedule!r}' uses late updates, so that a client's may come closer together than "
            f"the {mechanism.bands} bands of privacy.mechanism: use sync, or central noise"
        )
    if mechanism.bands > 1 and plan.rows * mechanism.bands > plan.population:
        raise InputError(
            f"privacy.mechanism: with bands = {mechanism.bands} a client rests for so many rounds, and {plan.rows} of "
            f"{plan.population} clients a round rest for {plan.population // plan.rows}: lower bands to that"
        )
    most = min(rounds, uses or _uses(plan, mechanism, rounds))
    population = max(plan.population, plan.rows)
    privacy = Privacy(
        mechanism, sampling, rounds, most, plan.rows, population, delta, epsilon, method, secret, limit=uses
    )
    privacy = replace(privacy, beside=beside or Beside(), masked=plan.secure is not None)
    if epsilon is not None and privacy.beside.labels >= epsilon:
        raise InputError(
            f"privacy.epsilon = {epsilon:g} is spent on the labels alone, which client.label_noise hides with epsilon "
            f"{privacy.beside.labels:.3g}: raise client.label_noise, or the budget"
        )
    if mechanism.place == "step":
        privacy = _with_steps(privacy, plan, least)
    elif mechanism.noise is None:
        _check_budget(epsilon)
        privacy = privacy.solved()
    if mechanism.noise is not None and epsilon is not None and (planned := privacy.planned()) > epsilon:
        raise InputError(
            f"privacy.epsilon = {epsilon:g} does not last for {rounds} rounds with noise = {mechanism.noise:g}, which "
            f"come to {planned:.3g}: leave out noise, lower rounds, or raise it"
        )
    if mechanism.quantile is not None and plan.rows / 10 <= privacy.noise:
        raise InputError(
            f"privacy.mechanism = 'adaptive' tells where the norms lie to a twentieth of the cohort, and {plan.rows} "
            f"clients a round are too few for noise = {privacy.noise:.3g}: use central, or a cohort above "
            f"{math.ceil(10 * privacy.noise)}"
        )
    if mechanism.place == "step" and plan.work is not None:
        given = ExampleNoise(mechanism.norm, privacy.noise, secret is not None)
        return replace(plan, privacy=privacy, work=replace(plan.work, example_noise=given))
    return replace(plan, privacy=privacy)


def _check_budget(epsilon: float | None) -> None:
    if epsilon is None:
        raise InputError(
            "privacy.mechanism says no noise: set privacy.epsilon, as 8.0, and as little as that allows is added"
        )


def _with_steps(privacy: Privacy, plan: Plan, least: int | None) -> Privacy:
    """What a round costs an example, with the clients for which that is most, and the noise where it is solved for.

    Which clients those are depends on the noise, and on the number of rounds; so they are looked for at the noise that
    was solved for those that were found, until there are no others.
    """
    work = plan.work
    if work is None or least is None:
        raise InputError(
            "privacy.mechanism adds noise to steps, and what that hides depends on how many examples clients have: set "
            "privacy.least_examples"
        )
    if "static" not in work.stopping.definition.traits or "speed" in work.stopping.definition.traits:
        raise InputError(
            f"train.stopping = '{work.stopping!r}' tells only later how many steps a client takes, and "
            "privacy.mechanism has to know before: write epochs or steps"
        )
    known: tuple[Poisson, ...] = ()
    given, found = privacy.mechanism.noise, privacy
    if given is None:
        _check_budget(privacy.epsilon)
        found = replace(privacy, mechanism=replace(privacy.mechanism, noise=1.0))
    while True:
        worst = {_worst(found, work, least, uses) for uses in (1, privacy.uses)} - set(known)
        if not worst:
            return found
        known += tuple(sorted(worst))
        found = replace(privacy, steps=known)
        found = found if given is not None else found.solved()


def _worst(privacy: Privacy, work: LocalWork, least: int, uses: int) -> Poisson:
    """What a round costs an example of the client for which so many rounds cost most.

    Fewer examples are drawn at a higher rate, and steps go up by one past each multiple of the batch size: so it is one
    with the fewest examples, or with one more than a multiple. With noise enough it is the first of those; with little
    a later one, until cost falls.
    """
    size = work.batch_size
    top, worst, since = -math.inf, Poisson(1.0, 1.0), 0
    for n in itertools.chain([least], itertools.count(-(-least // size) * size + 1, size)):
        event = Poisson(min(1.0, size / n), 1.0, int(work.stopping(n, size, [])))
        spent = accountant.epsilon({event._replace(noise=privacy.noise): uses}, privacy.delta, privacy.method)
        since = 0 if spent > top else since + 1
        top, worst = max((top, worst), (spent, event))
        if since == _FALLING:
            return worst
    raise AssertionError("unreachable")


def check_layout(plan: Plan, layout: Layout) -> None:
    """Refuse models with statistics that leave the client as they are: no norm bounds them."""
    if plan.privacy is not None and layout.params.stop < layout.columns:
        raise InputError(
            "privacy.mechanism bounds and noises parameters, and this model has buffers that travel as they are "
            "(BatchNorm's statistics): use GroupNorm, or keep them with model.private"
        )


def _sampling(plan: Plan, mechanism: Mechanism) -> Literal["poisson", "fixed", "uses", "steps"]:
    """What may be counted on of who takes part."""
    if mechanism.place == "step":
        return "steps"
    together = "waits_for_all" in plan.schedule.definition.traits and plan.longest_wait is None
    if mechanism.place == "server" and mechanism.bands == 1 and together and plan.rows < plan.population:
        if "poisson" in plan.select.definition.traits:
            return "poisson"
        if plan.select.name == "uniform":
            return "fixed"
    return "uses"


def _uses(plan: Plan, mechanism: Mechanism, rounds: int) -> int:
    """In how many rounds a client takes part at most, as far as the selector says."""
    if plan.select.name == "round_robin" and "waits_for_all" in plan.schedule.definition.traits:
        return -(-rounds * plan.rows // max(plan.population, plan.rows))
    return -(-rounds // mechanism.bands)


def _check_sum(plan: Plan) -> None:
    """Central noise is for a sum that one client moves by a known bound at most."""

    def refuse(what: str, why: str, remedy: str) -> None:
        raise InputError(f"{what} and noise on the sum (privacy.mechanism): {why}; {remedy}, or use local noise")

    if plan.reducer.name != "mean":
        why = "nobody knows how far one client can move it"
        refuse(f"reducer '{plan.reducer!r}'", why, "write aggregate.reduce = 'mean'")
    for rule in (*plan.screens, *plan.mixers):
        why = "what it makes of one client's update depends on the others'"
        refuse(f"{rule.kind} '{rule!r}'", why, "leave it out")
    for rule in plan.weighers:
        hook = rule.hook("most")
        if hook is None or "per_row" not in rule.definition.traits:
            refuse(f"weigher '{rule!r}'", "nobody knows how much a client can weigh", "use equal, or examples(cap=...)")
        elif not math.isfinite(hook()):
            refuse(f"weigher '{rule!r}'", "without a cap there is no bound", "write examples(cap=100), say")
    for rule in plan.corrections:
        if rule.hook("control"):
            why = "what it sends to the clients is made of updates without noise"
            refuse(f"correction '{rule!r}'", why, "leave it out")
    if plan.quarantine:
        refuse("quarantine", "who is shut out depends on the updates without noise", "leave out quarantine.limit")
    if "by_data" in plan.select.definition.traits:
        why = "who is chosen depends on the clients' losses without noise"
        refuse(f"selector '{plan.select!r}'", why, "use poisson")
    if plan.schedule.parameters.get("quorum", 1) > 1:
        refuse("a quorum", "whether a round counts would tell how many took part", "leave out quorum")
    if plan.secure is None and "finite" not in {rule.name for rule in plan.checks}:
        refuse("aggregate.checks without 'finite'", "a NaN has no bound", "put it back")


def _check_told(plan: Plan) -> None:
    """Where the server is not trusted it is told nothing that noise does not cover: no counts, losses, steps."""
    for rule in plan.weighers:
        if "by_examples" in rule.definition.traits:
            raise InputError(
                f"weigher '{rule!r}' goes by how many examples a client has, which privacy.mechanism does not tell: "
                "write aggregate.weigh = ['equal']"
            )
    for rule in (*plan.mixers, *plan.corrections):
        by_steps = "by_steps" in rule.definition.traits or rule.hook("after") or rule.hook("control")
        if by_steps and plan.work is not None and plan.work.stopping.name != "steps":
            raise InputError(
                f"{rule.kind} '{rule!r}' goes by how many steps clients took, which tell of their data: write "
                "train.stopping = 'steps(steps=...)', the same for all, or leave it out"
            )
