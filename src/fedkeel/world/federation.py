"""A job made real: the data with its clients, the model with its layout, the plan, the local work, the hostile ones."""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fedkeel.config import Job
from fedkeel.core.errors import InputError, nearest
from fedkeel.core.keys import Key
from fedkeel.core.layout import Layout
from fedkeel.core.registry import Rule, build, definition
from fedkeel.core.roster import Register
from fedkeel.core.types import ClientMemory, Mechanism
from fedkeel.round import device
from fedkeel.round.plan import Plan
from fedkeel.round.privacy import Beside
from fedkeel.round.promise import check_layout, promised
from fedkeel.round.quarantine import Quarantine
from fedkeel.round.secure import Secure
from fedkeel.round.wire import MAX_NAME, built
from fedkeel.train import LocalWork, ServerExamples, Trainer, evaluate, make_trainer, outputs
from fedkeel.train.contract import ClientData, Prepare
from fedkeel.train.objective import personal, try_objective
from fedkeel.world.composition import AUTO, choose
from fedkeel.world.devices import Devices
from fedkeel.world.evaluation import CLIENTS, GLOBAL
from fedkeel.world.hostile import Adversary
from fedkeel.world.models import build_model
from fedkeel.world.pool import Pool, clients, keep_back, label_histogram, set_apart

POOLED = "pooled"
"""The one client of a job whose clients' examples are put together."""


class Held(NamedTuple):
    """Data that is there: a pool for the model's shape and its tests, whose examples they are, and the server's own."""

    pool: Pool
    members: tuple[str, ...]
    data: ClientData
    holdout: ClientData | None = None
    server: Pool | None = None


@dataclass(frozen=True)
class Federation:
    """Everything that a simulation, a server or a client needs but its state.

    `data` is what the clients train on (its labels already flipped where the attack is on data), `validation` what
    they look at while they do, `holdout` what each keeps to test its own model. `names` are those who train, `members`
    those who hold examples: the same, unless the job pools them. `plain_layout` is the module's own, without what an
    objective gives to each client. `chosen` says why, where the job left the choice of rules to `auto`.
    """

    job: Job
    key: Key
    pool: Pool
    data: ClientData
    validation: ClientData | None
    holdout: ClientData | None
    names: tuple[str, ...]
    members: tuple[str, ...]
    module: nn.Module
    layout: Layout
    plain_layout: Layout
    plan: Plan
    work: LocalWork
    adversary: Adversary
    referee: ServerExamples | None
    devices: Devices
    chosen: str | None

    @classmethod
    def of(cls, job: Job) -> Federation:
        """Build and check everything, or raise `InputError`; nothing is trained or written."""
        return cls.made(job, cls.held(job))

    @classmethod
    def held(cls, job: Job) -> Held:
        """The job's own data, all clients'."""
        build_plan(job)  # what is wrong with the job comes before what is wrong with the data
        key = Key.root(job.seed)
        with _about("data.source"):
            pool: Pool = job.rule("data.source", "source")(key.fold("source"))
            if not isinstance(pool, Pool):
                raise InputError(f"the source returned {type(pool).__name__}: return a fedkeel.Pool")
        kept: Pool | None = None
        if job.server.examples:
            with _about("server.examples"):
                pool, kept = keep_back(pool, job.server.examples, key.fold("server"))
        with _about("data.partition"):
            split = job.rule("data.partition", "partition")(pool, job.data.clients, key.fold("partition"))
            data, holdout = clients(pool, split, key.fold("clients"), holdout=job.data.holdout)
        return Held(pool, split.names, data, holdout, kept)

    @classmethod
    def made(cls, job: Job, held: Held) -> Federation:
        """The same, of data that is there already: all clients', one's own, or none, on a server."""
        plan, work, key = build_plan(job), build_work(job), Key.root(job.seed)
        pool, members, data, holdout, kept = held
        for name in members:
            if not 0 < len(name.encode(errors="replace")) <= MAX_NAME or not name.isprintable():
                raise InputError(f"client name {name[:40]!r} is not valid: give 1 to {MAX_NAME} printable bytes")
        named = [(f"record.groups.{group}", pattern) for group, pattern in job.record.groups.items()]
        for key_of, pattern in named:
            if not fnmatch.filter(members, pattern):
                raise InputError(f"{key_of}: '{pattern}' matches no client: their names are as '{members[0]}'")
        with _about("model.build"):
            module = build_model(job.rule("model.build", "model"), pool, key.fold("model"))
        with _about("model.loss"):
            _try_loss(module, pool, work)
        with _about("train.objective"):
            own = personal(module, work.objective)
        if own and job.model.private:
            raise InputError(
                f"train.objective = '{work.objective!r}' gives each client a model: leave out model.private"
            )
        plain_layout = Layout.of(module, job.model.private)
        layout = Layout.of(module, job.model.private, own) if own else plain_layout
        if work.objective.definition is not definition("objective", "plain"):
            with _about("train.objective"):
                try_objective(module, layout, work, pool.prepare(pool.x[:4]), pool.y[:4])
        if work.private_first and not 0 < layout.shared.start < layout.trainable.stop:
            raise InputError(
                "train.private_first trains private layers before the shared: name some, not all, in model.private"
            )
        _check_stopping(job)
        if plan.interval is not None and "speed" not in work.stopping.definition.traits:
            raise InputError(
                f"schedule.interval = '{plan.interval!r}' scales the steps of train.stopping = 'budget(steps=...)': "
                f"write that instead of '{work.stopping!r}'"
            )
        _check_fine_tune(job, work)
        with _about("train.corrections"):
            work.check()
            apart = [r for r in work.corrections if "shared_only" in r.definition.traits]
            if apart and plain_layout.shared.start:
                raise InputError(
                    f"'{apart[0]!r}' can not correct private layers: leave out model.private, or choose another"
                )
        if holdout is None and layout.columns and (job.model.private or work.objective.hook("own")):
            raise InputError(
                "clients have models of their own here (model.private or train.objective), which must be tested: "
                "set data.holdout, as 0.2"
            )
        if job.data.pooled and (job.model.private or own):
            raise InputError(
                "data.pooled trains one model for all: leave out model.private, or the train.objective that gives each "
                "client its own"
            )
        if job.record.groups and holdout is None and layout.columns:
            raise InputError("record.groups are measured on what their clients hold back: set data.holdout, as 0.2")
        if job.data.pooled:
            data = replace(data, offsets=data.offsets[[0, -1]])
        names = (POOLED,) if job.data.pooled else members
        devices = Devices(job, Register(names), key.fold("devices"))
        adversary = Adversary.among(names, job.attack.clients, job.attacks, key.fold("attack"))
        adversary.check(pool, layout)
        data = adversary.poison(data, names, pool.classes)
        validation = None
        if job.train.validation and len(data.y):  # a server of nodes with data of their own has none
            with _about("train.validation"):
                data, validation = set_apart(data, job.train.validation, names, key.fold("validation"))
        referee = None
        if kept is not None and layout.columns:  # who trains alone asks nobody
            if job.model.private:
                raise InputError("server.examples can not judge models with private layers: leave out one of the two")
            offsets = torch.tensor([0, len(kept)])
            mine = ClientData(kept.x, kept.y, offsets, kept.prepare)
            apart_from = None
            if job.train.validation:
                with _about("server.examples"):
                    apart_from = set_apart(
                        mine, job.train.validation, ("the server",), key.fold("server", "validation")
                    )
            referee = ServerExamples(module, layout, mine, work, apart_from)
        if not layout.columns:
            _check_alone(job, plan)
        else:
            check_feedback(plan, layout)
        check_layout(plan, layout)
        plan.check_referee(referee is not None)
        chosen = None
        if job.aggregate.reduce == AUTO:
            told = label_histogram(data, pool.classes) if pool.classes and job.client.labels and len(data.y) else None
            section, chosen = choose(job, told)
            plan = build_plan(job.model_copy(update={"aggregate": section}))
        plan = replace(plan, label_classes=pool.classes if job.client.labels else 0)
        if job.privacy.mechanism is not None and plan.privacy is None:
            plan = _promised(job, plan, data)
            work = plan.work or work
        if not layout.columns:  # an empty payload says nothing, again and again
            plan = replace(plan, checks=tuple(rule for rule in plan.checks if rule.name != "replayed"))
        fields = (module, layout, plain_layout, plan, work, adversary, referee, devices, chosen)
        return cls(job, key, pool, data, validation, holdout, names, members, *fields)

    def only(self, client: str) -> Federation:
        """The federation as one client has it: its examples and nobody else's. Raises `InputError` for a stranger."""
        if client not in self.names:
            raise InputError(f"there is no client '{client}': {nearest(client, self.names)}")
        place = self.names.index(client)

        def own(data: ClientData | None) -> ClientData | None:
            if data is None:
                return None
            first, last = data.range(place)
            return ClientData(
                data.x[first:last].clone(), data.y[first:last].clone(), torch.tensor([0, last - first]), data.prepare
            )

        data = own(self.data)
        assert data is not None
        validation, holdout = own(self.validation), own(self.holdout)
        return replace(self, data=data, validation=validation, holdout=holdout, names=(client,), members=(client,))

    def trainer(self, backend: str | None = None, round: int = 1) -> Trainer:
        """What trains the clients, at the learning rate of a round."""
        return self._trainer(self.layout, self.work.at(round), backend, self.validation)

    def _trainer(
        self, layout: Layout, work: LocalWork, backend: str | None, validation: ClientData | None = None
    ) -> Trainer:
        train = self.job.train
        if train.device not in ("cpu", "cuda"):
            raise InputError(f"train.device = '{train.device}' is unknown: write cpu or cuda")
        if train.device == "cuda" and not torch.cuda.is_available():
            raise InputError("train.device = 'cuda', but PyTorch finds no CUDA device here: write cpu")
        return make_trainer(
            backend or train.backend,
            self.module,
            layout,
            self.data,
            work,
            device=train.device,
            workers=train.workers,
            validation=validation,
        )

    def theta(self) -> Tensor:
        """The first model (P,)."""
        return self.layout.flatten(self.module)[self.layout.shared].clone()

    def label_shares(self, memory: ClientMemory) -> dict[str, tuple[float, ...]]:
        """What each client says of its labels; nothing unless the job has them told. Noise is kept in their memory."""
        if not (self.job.client.labels and self.pool.classes):
            return {}
        counts = label_histogram(self.data, self.pool.classes)
        noise = self.job.client.label_noise
        whole = self.plan.privacy is not None and self.plan.privacy.mechanism.place == "client"
        return {
            name: device.label_shares(name, counts[i], noise, memory, whole=whole) for i, name in enumerate(self.names)
        }

    def private(self) -> Tensor | None:
        """The first private columns of every client (W - P,), or None where all columns are shared."""
        if self.layout.width == self.layout.columns:
            return None
        return self.layout.private(self.layout.flatten(self.module))

    @property
    def personal(self) -> bool:
        """Whether clients have models of their own."""
        return bool(self.job.model.private) or self.work.objective.hook("own") is not None

    @property
    def headline(self) -> str:
        """Whose figures a run is about: the clients' own models' where they have some, else the shared one's."""
        return CLIENTS if self.personal or self.job.record.fine_tune else GLOBAL

    @property
    def alone(self) -> bool:
        """Whether every layer is private: each client trains by itself."""
        return self.layout.columns == 0

    def tuner(self) -> Trainer | None:
        """What takes each client's model some steps on its own data before it is tested, if the job asks for it."""
        if self.job.record.fine_tune is None:
            return None
        stopping = self.job.rule("record.fine_tune", "stopping")
        plain = build("objective", "plain")
        work = replace(self.work, stopping=stopping, corrections=(), objective=plain, private_first=None)
        if rate := self.work.objective.hook("rate"):
            work = replace(work, lr=rate(), optimiser=build("optimiser", "sgd"))
        return self._trainer(self.plain_layout, work, None)

    def measure(
        self, vector: Tensor, x: Tensor, y: Tensor, prepare: Prepare, objective: Rule | None = None
    ) -> dict[str, float]:
        """Loss and accuracy of a model; given the objective, of the client's own that a vector (W,) holds."""
        found = evaluate(self.module, self.layout, vector, x, y, prepare, self.work.loss, objective=objective)
        return {k: v for k, v in found.items() if v is not None}

    def answers(self, vector: Tensor, x: Tensor, prepare: Prepare) -> Tensor:
        """What the model `vector` (P,) answers to x: its outputs, one row an example."""
        return torch.cat([output.clone() for _, output in outputs(self.module, self.layout, vector, x, prepare)])


BOUND = 5.0
"""What losses are cut to where a job says nothing: classes by chance have ln of their number, 2.3 for ten."""
LONGEST = 100.0
"""The norm of updates under masks where a job names none: grids of 32 bits are fine enough for it."""


def _check_alone(job: Job, plan: Plan) -> None:
    """Clients that share nothing: there is nothing to judge, and no reason to name what would."""
    if (
        plan.screens
        or plan.mixers
        or plan.contribution
        or plan.secure
        or any("per_row" not in w.definition.traits for w in plan.weighers)
    ):
        raise InputError(
            "model.private keeps every layer on the client, so that there is nothing to screen, weigh, mix or value: "
            "leave out aggregate.screens, aggregate.weigh, aggregate.mix, record.contribution and secagg"
        )


def check_feedback(plan: Plan, layout: Layout) -> None:
    """Refuse error feedback where nothing is left over, or more than there is: what is left would pile up."""
    if plan.error_feedback:
        if built(plan.codec, layout)[1].lossless:
            raise InputError(f"client.error_feedback has nothing to add: '{plan.codec!r}' loses nothing; leave out one")
        _check_loss("client.error_feedback", plan.codec, layout)
    if plan.down is not None:
        _check_loss("server.codec", plan.down, layout)


def _check_loss(key: str, rule: Rule, layout: Layout) -> None:
    _, codec = built(rule, layout)
    row = torch.randn(layout.columns, generator=Key.root(0).torch())
    payload, arrived = codec.encode(row[None], [Key.root(0)])[0], torch.empty_like(row)
    codec.decode(memoryview(payload), arrived)
    lost = float((row - arrived).norm() / row.norm())
    if not lost < 1:
        raise InputError(
            f"{key} adds what '{rule!r}' loses to what it is given next, and it loses {lost:.1f} times that: "
            "choose a codec that loses less (random_k: scaled=False)"
        )


def _check_stopping(job: Job) -> None:
    for name in ("stopping", "private_first"):
        key = f"train.{name}"
        rule = job.rule(key, "stopping") if getattr(job.train, name) else None
        if rule is not None and "validation" in rule.definition.traits and not job.train.validation:
            raise InputError(f"{key} = '{rule!r}' goes by validation losses: set train.validation, as 0.1")


def _check_fine_tune(job: Job, work: LocalWork) -> None:
    if job.record.fine_tune is None:
        return
    if "validation" in job.rule("record.fine_tune", "stopping").definition.traits:
        raise InputError(
            f"record.fine_tune = '{job.record.fine_tune}' goes by validation losses: write epochs or steps"
        )
    if not job.data.holdout:
        raise InputError(
            "record.fine_tune tests each client's tuned model on its own examples: set data.holdout, as 0.2"
        )
    if job.data.pooled:
        raise InputError("record.fine_tune is for clients, and data.pooled leaves none: leave out one of the two")
    if work.objective.hook("own"):
        raise InputError(
            f"record.fine_tune tunes the shared model, but train.objective = '{work.objective!r}' has each client test "
            "its own: leave out one of the two"
        )


def _try_loss(module: nn.Module, pool: Pool, work: LocalWork) -> None:
    """Evaluate the loss on two examples: what cannot be one must not wait for the first round."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        was = module.training
        output = module.eval()(pool.prepare(pool.x[:1]).repeat_interleave(2, 0))
        module.train(was)
        losses = work.loss(output, pool.y[:1].repeat_interleave(2, 0))
    if tuple(losses.shape) != (2,):
        raise InputError(f"it gives shape {tuple(losses.shape)} for 2 examples: return one loss per example, (B,)")


@contextlib.contextmanager
def _about(key: str) -> Iterator[None]:
    """Name the job's key in what is wrong with it."""
    try:
        yield
    except InputError as error:
        text = str(error)
        raise InputError(text if text.startswith(key) else f"{key}: {text}") from None
    except Exception as error:  # a user's function
        said = " ".join(str(error).split())[:300]
        raise InputError(f"{key} failed ({type(error).__name__}: {said}): mend what it names") from error


def build_plan(job: Job) -> Plan:
    """The plan of a job, its rules built and checked against the cohort; for `auto`, as of unknown data."""
    if job.aggregate.reduce == AUTO:
        job = job.model_copy(update={"aggregate": choose(job)[0]})
    plan = Plan(
        select=job.rule("select.rule", "selector"),
        schedule=job.rule("schedule.rule", "scheduler"),
        codec=job.rule("client.codec", "codec"),
        reducer=job.rule("aggregate.reduce", "reducer"),
        optimiser=job.rule("server.optimiser", "server_optimiser"),
        cohort=job.cohort,
        transforms=job.rules("client.transforms", "row_transform"),
        checks=_checks(job),
        screens=job.rules("aggregate.screens", "screen"),
        weighers=job.rules("aggregate.weigh", "weigher"),
        mixers=job.rules("aggregate.mix", "mixer"),
        zstd=job.client.zstd,
        contribution=job.rule("record.contribution", "contribution") if job.record.contribution else None,
        quarantine=None if job.quarantine.limit is None else Quarantine(job.quarantine.limit, job.quarantine.decay),
        work=build_work(job),
        population=1 if job.data.pooled else job.data.clients,
        longest_wait=job.select.longest_wait,
        interval=None if job.schedule.interval == "fixed" else job.rule("schedule.interval", "interval"),
        error_feedback=job.client.error_feedback,
        down=None if job.server.codec == "float32" else job.rule("server.codec", "codec"),
        down_zstd=job.server.zstd,
        secure=_secure(job),
    )
    return plan if job.privacy.mechanism is None else _promised(job, plan)


def _checks(job: Job) -> tuple[Rule, ...]:
    """Those that the job names; under masks without two that clients answer for: finite rows, and none of before."""
    found = job.rules("aggregate.checks", "check")
    return found if job.secagg.size is None else tuple(r for r in found if r.name not in ("finite", "replayed"))


def _secure(job: Job) -> Secure | None:
    if job.secagg.size is None:
        return None
    noised = job.privacy.mechanism is not None and job.rule("privacy.mechanism", "mechanism")().place == "server"
    if noised and job.secagg.norm is not None:
        raise InputError(
            f"secagg.norm = {job.secagg.norm:g} and privacy.mechanism = '{job.privacy.mechanism}' both say how long an "
            "update may be: leave out secagg.norm"
        )
    return Secure(job.secagg.size, job.secagg.norm or LONGEST, noised)


def _promised(job: Job, plan: Plan, data: ClientData | None = None) -> Plan:
    """The plan with what the job says of privacy; where that depends on the clients' data, once they are there."""
    mechanism = job.rule("privacy.mechanism", "mechanism")()
    least = job.privacy.least_examples
    if least is not None and mechanism.place != "step":
        raise InputError(
            f"privacy.least_examples = {least} is for noise in steps, and privacy.mechanism = "
            f"'{job.privacy.mechanism}' adds none there: leave it out"
        )
    if data is not None and least is None and len(data.y):
        least = max(1, min(data.count(client) for client in range(len(data))))
    if mechanism.place != "server" and job.data.holdout:
        raise InputError(
            f"data.holdout = {job.data.holdout:g} has clients tell of their data without noise, and "
            f"privacy.mechanism = '{job.privacy.mechanism}' hides it from the server: leave out one of the two"
        )
    if mechanism.place == "step" and data is None:
        return plan
    return promised(
        plan,
        mechanism,
        rounds=job.rounds,
        delta=job.privacy.delta,
        epsilon=job.privacy.epsilon,
        uses=job.privacy.uses,
        method=job.privacy.accountant,
        secret=Key.root(job.seed).fold("privacy") if job.privacy.insecure_reproducible_noise else None,
        least=least,
        beside=_beside(job, mechanism),
    )


def _beside(job: Job, mechanism: Mechanism) -> Beside:
    """What clients tell beside their updates, where the server is not trusted."""
    noise, place = job.privacy.metrics_noise, mechanism.place
    if place == "server":
        if noise is not None:
            raise InputError(
                f"privacy.metrics_noise = {noise:g} hides losses from the server, which privacy.mechanism = "
                f"'{job.privacy.mechanism}' trusts with them: leave it out, or use local or examples"
            )
        return Beside()
    if job.client.labels and not job.client.label_noise:
        raise InputError(
            f"client.labels has clients tell of their data, and privacy.mechanism = '{job.privacy.mechanism}' hides it "
            "from the server: set client.label_noise, which is counted, or leave it out"
        )
    labels = (2 if place == "client" else 1) / job.client.label_noise if job.client.labels else 0.0
    if noise is None:
        return Beside(labels=labels)
    names = ("loss", "global_loss", "local_loss") if job.train.validation else ("loss",)
    return Beside(names, job.privacy.metrics_bound or BOUND, noise, labels)


def build_work(job: Job) -> LocalWork:
    return LocalWork(
        batch_size=job.train.batch_size,
        lr=job.train.lr,
        stopping=job.rule("train.stopping", "stopping"),
        loss=job.rule("model.loss", "loss"),
        corrections=job.rules("train.corrections", "correction"),
        optimiser=job.rule("train.optimiser", "optimiser"),
        objective=job.rule("train.objective", "objective"),
        private_first=job.rule("train.private_first", "stopping") if job.train.private_first else None,
        rate=job.rule("train.lr_schedule", "rate"),
        rounds=job.rounds,
    )
