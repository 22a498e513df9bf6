"""A job made real: the data with its clients, the model with its layout, the plan, the local work, the hostile ones."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fedkeel.config import Job
from fedkeel.core.errors import InputError
from fedkeel.core.keys import Key
from fedkeel.core.layout import Layout
from fedkeel.core.types import ClientMemory
from fedkeel.round import device
from fedkeel.round.plan import Plan
from fedkeel.round.quarantine import Quarantine
from fedkeel.round.wire import MAX_NAME
from fedkeel.sim.composition import AUTO, choose
from fedkeel.sim.hostile import Adversary
from fedkeel.sim.models import build_model
from fedkeel.sim.pool import Pool, clients, keep_back, label_histogram
from fedkeel.train import LocalWork, ServerExamples, Trainer, evaluate, make_trainer
from fedkeel.train.contract import ClientData, Prepare

Z95 = 1.959963984540054
Value = float | tuple[float, float, float]


@dataclass(frozen=True)
class Federation:
    """Everything a simulation needs but its state.

    `data` is what the clients train on (its labels already flipped where the attack is on data), `holdout` what each
    keeps to test its own model. `chosen` says why, where the job left the choice of rules to `auto`.
    """

    job: Job
    key: Key
    pool: Pool
    data: ClientData
    holdout: ClientData | None
    names: tuple[str, ...]
    module: nn.Module
    layout: Layout
    plan: Plan
    work: LocalWork
    adversary: Adversary
    referee: ServerExamples | None
    chosen: str | None

    @classmethod
    def of(cls, job: Job) -> Federation:
        """Build and check everything, or raise `InputError`; nothing is trained or written."""
        plan, work, key = build_plan(job), build_work(job), Key.root(job.seed)
        with _about("data.source"):
            pool: Pool = job.rule("data.source", "source")(key.fold("source"))
            if not isinstance(pool, Pool):
                raise InputError(f"the source returned {type(pool).__name__}: return a fedkeel.Pool")
        own: Pool | None = None
        if job.server.examples:
            with _about("server.examples"):
                pool, own = keep_back(pool, job.server.examples, key.fold("server"))
        with _about("data.partition"):
            split = job.rule("data.partition", "partition")(pool, job.data.clients, key.fold("partition"))
            data, holdout = clients(pool, split, key.fold("clients"), holdout=job.data.holdout)
        for name in split.names:
            if not 0 < len(name.encode(errors="replace")) <= MAX_NAME or not name.isprintable():
                raise InputError(f"client name {name[:40]!r} is not valid: give 1 to {MAX_NAME} printable bytes")
        with _about("model.build"):
            module = build_model(job.rule("model.build", "model"), pool, key.fold("model"))
        with _about("model.loss"):
            _try_loss(module, pool, work)
        layout = Layout.of(module, job.model.private)
        with _about("train.corrections"):
            work.check()
            apart = [r for r in work.corrections if "shared_only" in r.definition.traits]
            if apart and layout.width > layout.columns:
                raise InputError(
                    f"'{apart[0]!r}' can not correct private layers: leave out model.private, or choose another"
                )
        if layout.width > layout.columns and holdout is None:
            raise InputError(
                "model.private keeps layers on the clients, so each client's own model must be tested: "
                "set data.holdout, as 0.2"
            )
        adversary = Adversary.among(split.names, job.attack.clients, job.attacks, key.fold("attack"))
        adversary.check(pool, layout)
        data = adversary.poison(data, split.names, pool.classes)
        referee = None
        if own is not None:
            if layout.width > layout.columns:
                raise InputError("server.examples can not judge models with private layers: leave out one of the two")
            offsets = torch.tensor([0, len(own)])
            referee = ServerExamples(module, layout, ClientData(own.x, own.y, offsets, own.prepare), work)
        plan.check_referee(referee is not None)
        chosen = None
        if job.aggregate.reduce == AUTO:
            told = label_histogram(data, pool.classes) if pool.classes and job.client.labels else None
            section, chosen = choose(job, told)
            plan = build_plan(job.model_copy(update={"aggregate": section}))
        plan = replace(plan, label_classes=pool.classes if job.client.labels else 0)
        return cls(job, key, pool, data, holdout, split.names, module, layout, plan, work, adversary, referee, chosen)

    def trainer(self, backend: str | None = None) -> Trainer:
        train = self.job.train
        if train.device not in ("cpu", "cuda"):
            raise InputError(f"train.device = '{train.device}' is unknown: write cpu or cuda")
        if train.device == "cuda" and not torch.cuda.is_available():
            raise InputError("train.device = 'cuda', but PyTorch finds no CUDA device here: write cpu")
        return make_trainer(
            backend or train.backend,
            self.module,
            self.layout,
            self.data,
            self.work,
            device=train.device,
            workers=train.workers,
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
        return {name: device.label_shares(name, counts[i], noise, memory) for i, name in enumerate(self.names)}

    def private(self) -> Tensor | None:
        """The first private columns of every client (W - P,), or None where all columns are shared."""
        if self.layout.width == self.layout.columns:
            return None
        return join_private(self.layout.flatten(self.module), self.layout)

    def evaluate(self, theta: Tensor, memory: ClientMemory) -> tuple[dict[str, Value], int]:
        """The model's metrics with 95% intervals, and on how many examples.

        Under an attack with a trigger, `backdoor` is its success: the share of marked examples of other classes that
        are taken for the wanted one.
        With private columns: the mean over clients of each one's own model on its own holdout.
        """
        start = self.private()
        if start is None:
            pool = self.pool
            found = self._measure(theta, pool.test_x, pool.test_y, pool.prepare)
            examples = int(found["examples"])
            values = _with_intervals(found, examples)
            marked = self.adversary.triggered(pool.test_x, pool.test_y, pool.classes)
            if marked is not None and len(marked[0]):
                success = self._measure(theta, *marked, pool.prepare)["accuracy"]
                values["backdoor"] = (success, *wilson(success, len(marked[0])))
            return values, examples
        assert self.holdout is not None
        per_client = []
        for index, name in enumerate(self.names):
            first, last = self.holdout.range(index)
            own = memory.of(name).get("private", start)
            vector = split_private(theta, own, self.layout)
            x, y = self.holdout.x[first:last], self.holdout.y[first:last]
            per_client.append(self._measure(vector, x, y, self.holdout.prepare))
        values = {
            metric: _mean_interval([float(found[metric]) for found in per_client])
            for metric in ("loss", "accuracy")
            if metric in per_client[0]
        }
        return values, len(self.holdout.x)

    def _measure(self, vector: Tensor, x: Tensor, y: Tensor, prepare: Prepare) -> dict[str, float]:
        found = evaluate(self.module, self.layout, vector, x, y, prepare, self.work.loss)
        return {k: v for k, v in found.items() if v is not None}


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
    return Plan(
        select=job.rule("select.rule", "selector"),
        schedule=job.rule("schedule.rule", "scheduler"),
        codec=job.rule("client.codec", "codec"),
        reducer=job.rule("aggregate.reduce", "reducer"),
        optimiser=job.rule("server.optimiser", "server_optimiser"),
        cohort=job.cohort,
        transforms=job.rules("client.transforms", "row_transform"),
        checks=job.rules("aggregate.checks", "check"),
        screens=job.rules("aggregate.screens", "screen"),
        weighers=job.rules("aggregate.weigh", "weigher"),
        mixers=job.rules("aggregate.mix", "mixer"),
        zstd=job.client.zstd,
        contribution=job.rule("record.contribution", "contribution") if job.record.contribution else None,
        quarantine=None if job.quarantine.limit is None else Quarantine(job.quarantine.limit, job.quarantine.decay),
        work=build_work(job),
        population=job.data.clients,
    )


def build_work(job: Job) -> LocalWork:
    return LocalWork(
        batch_size=job.train.batch_size,
        lr=job.train.lr,
        stopping=job.rule("train.stopping", "stopping"),
        loss=job.rule("model.loss", "loss"),
        corrections=job.rules("train.corrections", "correction"),
        optimiser=job.rule("train.optimiser", "optimiser"),
    )


def split_private(theta: Tensor, private: Tensor, layout: Layout) -> Tensor:
    """The full vector (W,) of shared (P,) and private (W - P,) columns."""
    first = layout.shared.start
    return torch.cat([private[:first], theta, private[first:]])


def join_private(full: Tensor, layout: Layout) -> Tensor:
    """The private columns (W - P,) of a full vector (W,): trainable ones, then buffers."""
    return torch.cat([full[: layout.shared.start], full[layout.shared.stop :]])


def _with_intervals(found: dict[str, float], examples: int) -> dict[str, Value]:
    values: dict[str, Value] = {"loss": found["loss"]}
    if "accuracy" in found:
        values["accuracy"] = (found["accuracy"], *wilson(found["accuracy"], examples))
    return values


def wilson(share: float, count: int) -> tuple[float, float]:
    """The 95% interval of a share seen in `count` draws (Wilson 1927)."""
    z2 = Z95**2
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z95 / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def _mean_interval(values: list[float]) -> tuple[float, float, float]:
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, mean, mean
    half = Z95 * math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))
    return mean, mean - half, mean + half
