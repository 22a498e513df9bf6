"""The plan: a job's rules, built, in the order in which a round applies them. Its repr is the recipe."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

from fedkeel.core.errors import InputError
from fedkeel.core.registry import Rule, require_once
from fedkeel.core.work import LocalWork
from fedkeel.round.privacy import Privacy
from fedkeel.round.quarantine import Quarantine
from fedkeel.round.secure import Secure, most

STREAM_ABOVE = 256 * 2**20
"""Bytes of a cohort's matrix above which a mean is summed as updates arrive, and no matrix is kept."""


@dataclass(frozen=True)
class Plan:
    """select, [device: transforms, codec, zstd], checks, screens, weighers, mixers, reducer, optimiser.

    `cohort` clients are selected a round. Clients that tell their label shares tell those of `label_classes` classes;
    0: what they tell is ignored. `work` is what clients do, where the server needs to know; `population` how many there
    are in all, at least the cohort. `down` codes the model's way down; None: it is sent in full. `privacy` is what
    `promise.promised` made of a mechanism. With `secure` updates are added up under masks, in groups, and screens,
    mixers and the reducer see the groups' means. The constructor refuses combinations that can never close a round.
    """

    select: Rule
    schedule: Rule
    codec: Rule
    reducer: Rule
    optimiser: Rule
    cohort: int
    transforms: tuple[Rule, ...] = ()
    checks: tuple[Rule, ...] = ()
    screens: tuple[Rule, ...] = ()
    weighers: tuple[Rule, ...] = ()
    mixers: tuple[Rule, ...] = ()
    zstd: int = 0
    quarantine: Quarantine | None = None
    contribution: Rule | None = None
    label_classes: int = 0
    work: LocalWork | None = None
    population: int = 0
    longest_wait: int | None = None
    interval: Rule | None = None
    error_feedback: bool = False
    down: Rule | None = None
    down_zstd: int = 0
    privacy: Privacy | None = None
    secure: Secure | None = None

    def __post_init__(self) -> None:
        if self.cohort < 1:
            raise InputError(f"select.cohort = {self.cohort}: at least one client must take part in a round")
        self._check_schedule()
        where = (
            f"select.cohort is {self.cohort}"
            if self.rows == self.cohort
            else f"'{self.schedule!r}' closes with {self.rows}"
        )
        if self.secure is not None:
            self._check_secure(self.secure)
            where = f"secagg.size = {self.secure.size} makes {self.seen} sums of {self.rows} updates"
        for rule in (*self.screens, *self.seeing_weighers, *self.mixers, self.reducer):
            if rule.needs > self.seen:
                raise InputError(
                    f"{rule.kind} '{rule!r}' needs at least {rule.needs} rows, but {where}: "
                    f"raise that or lower the rule's parameter"
                )
        # What a transform keeps and draws goes by its name, what a screen or weigher keeps by the whole of its text.
        require_once([rule.name for rule in self.transforms])
        require_once([repr(r) for r in (*self.screens, *self.weighers) if r.definition.init is not None])
        self._check_what_is_left()
        self._check_partners()

    @cached_property
    def rows(self) -> int:
        """How many updates a close may count on."""
        hook = self.schedule.hook("rows")
        return self.cohort if hook is None else int(hook(self.cohort))

    @cached_property
    def seen(self) -> int:
        """How many rows screens, mixers and the reducer may count on: updates, or sums of them."""
        return self.rows if self.secure is None else self.secure.groups(self.rows)

    @property
    def own_weighers(self) -> tuple[Rule, ...]:
        """By which clients weigh their updates themselves, before they are added up under masks."""
        return () if self.secure is None else tuple(w for w in self.weighers if "per_row" in w.definition.traits)

    @property
    def seeing_weighers(self) -> tuple[Rule, ...]:
        """The others: of the rows that rules see."""
        return tuple(rule for rule in self.weighers if rule not in self.own_weighers)

    @cached_property
    def max_staleness(self) -> int:
        """How many models behind an update may be."""
        hook = self.schedule.hook("staleness")
        return 0 if hook is None else int(hook())

    @property
    def looks_back(self) -> bool:
        """Whether a rule asks how far the model has gone since a client began."""
        return any("looks_back" in mixer.definition.traits for mixer in self.mixers)

    @property
    def noised(self) -> bool:
        """Whether the server adds noise to a sum: then every round is released, whoever took part."""
        return self.privacy is not None and self.privacy.central

    @property
    def remembers(self) -> bool:
        """Whether corrections keep something of the updates that clients send."""
        return any(rule.hook("after") for rule in self.corrections)

    def _check_schedule(self) -> None:
        quorum = self.schedule.parameters.get("quorum", 1)
        if quorum > self.cohort:
            raise InputError(f"schedule quorum = {quorum} is above select.cohort = {self.cohort}: no round could close")
        if self.longest_wait is not None and self.population > self.rows * self.longest_wait:
            raise InputError(
                f"select.longest_wait = {self.longest_wait}: with {self.rows} of {self.population} clients a round "
                f"somebody waits longer: write at least {-(-self.population // self.rows)}"
            )
        if self.rows > self.population > 0:
            raise InputError(
                f"schedule '{self.schedule!r}' closes with {self.rows} updates, of different clients, and there are "
                f"{self.population}: lower the buffer"
            )
        changes = self.work is not None and self.work.rate.name != "constant"
        if changes and self.max_staleness and any("control" in rule.definition.traits for rule in self.corrections):
            raise InputError(
                f"train.lr_schedule = '{self.work.rate!r}' makes late updates of another learning rate than those that "  # type: ignore[union-attr]
                "corrections reckon with: leave out one of train.lr_schedule, train.corrections, and late updates"
            )

    def _check_secure(self, secure: Secure) -> None:
        """Refuse what needs a single update, which nobody sees under masks."""

        def refuse(what: str, why: str, remedy: str) -> None:
            raise InputError(f"{what} and sums under masks (secagg.size): {why}; {remedy}")

        if self.max_staleness:
            refuse(f"schedule '{self.schedule!r}'", "who is late has nobody to add up with", "write sync or semi_sync")
        if secure.least > self.rows:
            raise InputError(
                f"secagg.size = {secure.size} needs {secure.least} clients to the end, and {self.rows} take part in a "
                "round: lower it, or raise select.cohort"
            )
        for rule in self.checks:
            if "header" not in rule.definition.traits:
                refuse(f"check '{rule!r}'", "it looks at single updates", "leave it out")
        for rule in (*self.screens, *self.weighers):
            if rule.definition.init is not None:
                refuse(f"{rule.kind} '{rule!r}'", "it keeps something of each client's updates", "leave it out")
        for rule in self.own_weighers:
            if most(rule) == math.inf:
                why = "a client weighs its update itself, by a weight that has a bound and depends on nobody else"
                refuse(f"weigher '{rule!r}'", why, "write examples(cap=100), say, or equal")
        for rule in (*self.mixers, *self.corrections):
            if {"by_steps", "looks_back"} & rule.definition.traits or rule.hook("control"):
                refuse(f"{rule.kind} '{rule!r}'", "it goes by each client's update and steps", "leave it out")
        for key, named in (("record.contribution", self.contribution), ("schedule.interval", self.interval)):
            if named is not None:
                refuse(f"{key} = '{named!r}'", "it goes by each client's update", "leave it out")
        if self.codec.name != "float32" or self.zstd or self.error_feedback:
            refuse("client.codec, zstd and error_feedback", "a masked row can not be made smaller", "leave them out")

    def _check_partners(self) -> None:
        """Refuse half of a method that has a client's and a server's half, and mixers out of their place."""
        halves = [rule for rule in (*self.corrections, self.optimiser) if "partner" in rule.definition.traits]
        for rule in halves:
            others = [o for o in halves if o.kind != rule.kind]
            if [(o.name, o.parameters) for o in others] != [(rule.name, rule.parameters)]:
                key = "server.optimiser" if rule.kind == "correction" else "train.corrections"
                raise InputError(f"{rule.kind} '{rule!r}' is half of a method: name '{rule!r}' under {key} as well")
        own = [bool({"by_steps", "looks_back"} & mixer.definition.traits) for mixer in self.mixers]
        if own != sorted(own, reverse=True):
            late = self.mixers[own.index(True, own.index(False))]
            raise InputError(f"mixer '{late!r}' goes by what each client did: name it first in aggregate.mix")

    def _check_what_is_left(self) -> None:
        """Refuse a rule that needs more rows than those before it leave."""
        left, by = self.seen, ""

        def take(rule: Rule, given: int) -> None:
            nonlocal left, by
            if rule.needs > given:
                raise InputError(
                    f"{rule.kind} '{rule!r}' needs at least {rule.needs} rows, but {by} "
                    f"leaves {given} of {self.seen}: choose one of the two, or the reducer 'mean'"
                )
            if rule.leaves(given) < left:
                left, by = rule.leaves(given), f"{rule.kind} '{rule!r}'"

        for rule in self.screens:  # each of them sees the whole cohort
            take(rule, self.seen)
        screened = left
        for rule in self.seeing_weighers:
            take(rule, screened)
        for rule in (*self.mixers, self.reducer):
            take(rule, left)

    @property
    def corrections(self) -> tuple[Rule, ...]:
        """What changes the clients' gradients."""
        return () if self.work is None else self.work.corrections

    @cached_property
    def least(self) -> int:
        """The smallest cohort that this plan can reduce."""
        for cohort in range(1, self.cohort):
            try:
                return replace(self, cohort=cohort).cohort
            except InputError:
                continue
        return self.cohort

    def check_referee(self, there: bool) -> None:
        """Refuse rules that judge with the server's own examples where it has none."""
        for rule in (*self.screens, *self.weighers, *((self.contribution,) if self.contribution else ())):
            if "server_data" in rule.definition.traits and not there:
                raise InputError(
                    f"{rule.kind} '{rule!r}' judges with the server's own examples, but it has none: "
                    "set server.examples, as 200"
                )

    def streams(self, columns: int) -> bool:
        """Whether this plan sums rows as they come: a mean by per-row weights, too large to be worth keeping."""
        per_row = all("per_row" in w.definition.traits for w in self.weighers)
        kept = self.screens or self.mixers or self.contribution
        mean = "streams" in self.reducer.definition.traits and not kept and self.secure is None
        return mean and per_row and 4 * self.rows * columns > STREAM_ABOVE

    @property
    def steps(self) -> list[tuple[str, str]]:
        """(stage, rules) in order, for people."""
        codec = f"{self.codec!r} + zstd({self.zstd})" if self.zstd else repr(self.codec)
        codec = f"error feedback, {codec}" if self.error_feedback else codec
        down = f"{self.down!r} + zstd({self.down_zstd})" if self.down_zstd else repr(self.down)
        stages: list[tuple[str, tuple[object, ...]]] = [
            ("select", (f"{self.cohort} by {self.select!r}",)),
            ("schedule", (self.schedule,)),
            ("train", (self.work.optimiser, *self.corrections) if self.work and self.corrections else ()),
            ("interval", (self.interval,) if self.interval else ()),
            ("transform", self.transforms),
            ("hide", (self.privacy,) if self.privacy else ()),
            ("encode", (codec,) if self.secure is None else ()),
            ("check", self.checks),
            ("quarantine", (self.quarantine,) if self.quarantine else ()),
            *([] if self.secure is None else [("weigh", self.own_weighers), ("sum", (self.secure,))]),
            ("screen", self.screens),
            ("weigh", self.seeing_weighers),
            ("mix", self.mixers),
            ("reduce", (self.reducer,)),
            ("value", (self.contribution,) if self.contribution else ()),
            ("optimise", (self.optimiser,)),
            ("publish", (down,) if self.down else ()),
        ]
        return [(stage, ", ".join(map(str, rules))) for stage, rules in stages if rules]

    def __repr__(self) -> str:
        return " -> ".join(f"{stage}: {rules}" for stage, rules in self.steps)
