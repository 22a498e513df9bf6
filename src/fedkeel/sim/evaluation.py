"""What is measured of a federation: the shared model on the common test set, and every client's own on its holdout."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fedkeel.core.keys import Key
from fedkeel.core.layout import Layout
from fedkeel.core.registry import Rule
from fedkeel.core.types import ClientMemory
from fedkeel.train import Task, Trainer
from fedkeel.train.contract import Prepare

if TYPE_CHECKING:
    from fedkeel.sim.federation import Federation

Z95 = 1.959963984540054
Value = float | tuple[float, float, float]
GLOBAL, CLIENTS, CLIENT, GROUP = "global", "clients", "client/", "group/"


class Figures(NamedTuple):
    """What was measured of one thing: the shared model (`global`), all clients' own (`clients`), one's, a group's."""

    scope: str
    values: dict[str, Value]
    examples: int


def measure(federation: Federation, theta: Tensor, memory: ClientMemory, tuner: Trainer | None) -> list[Figures]:
    """The figures of a model theta (P,), the one that the report is about first.

    `global` is the shared model on the test set; under an attack with a trigger, `backdoor` is its success: the share
    of marked examples of other classes that are taken for the wanted one. Where layers are private there is no such
    model, and it is the mean over clients. Where clients hold examples back, `clients` is the mean over clients of each
    one's own model on those, with the mean of the worst tenth of the clients and the standard deviation; where a
    client's own model is not the shared one, that is measured beside it (`shared_accuracy`). `tuner` takes each
    client's model some steps on its own data first. Clients that train alone and hold nothing back are tested on the
    test set.
    """
    own = federation.holdout is not None or federation.alone
    found = _Clients(federation, theta, memory, tuner).figures() if own else []
    if federation.job.model.private:
        mean = found[0]
        plain = {name: value for name, value in mean.values.items() if name in ("loss", "accuracy")}
        return [Figures(GLOBAL, plain, mean.examples), *found]
    return [_shared(federation, theta), *found]


def _shared(federation: Federation, theta: Tensor) -> Figures:
    pool = federation.pool
    found = federation.measure(theta, pool.test_x, pool.test_y, pool.prepare)
    examples = int(found["examples"])
    values: dict[str, Value] = {"loss": found["loss"]}
    if "accuracy" in found:
        values["accuracy"] = (found["accuracy"], *wilson(found["accuracy"], examples))
    marked = federation.adversary.triggered(pool.test_x, pool.test_y, pool.classes)
    if marked is not None and len(marked[0]):
        success = federation.measure(theta, *marked, pool.prepare)["accuracy"]
        values["backdoor"] = (success, *wilson(success, len(marked[0])))
    return Figures(GLOBAL, values, examples)


class _Clients:
    """Every client's own model on its own holdout."""

    def __init__(self, federation: Federation, theta: Tensor, memory: ClientMemory, tuner: Trainer | None) -> None:
        self.federation, self.theta, self.memory, self.tuner = federation, theta, memory, tuner
        self.first = federation.private()

    def figures(self) -> list[Figures]:
        per_client = self._per_client()
        names = list(per_client)
        metrics = list(next(iter(per_client.values())).values)
        held = {name: [float(_point(f.values[name])) for f in per_client.values()] for name in metrics}
        overall: dict[str, Value] = {name: mean_interval(values) for name, values in held.items()}
        if "accuracy" in held:
            worst = sorted(held["accuracy"])[: max(1, len(names) // 10)]
            overall["worst_decile"] = sum(worst) / len(worst)
            overall["spread"] = float(torch.tensor(held["accuracy"], dtype=torch.float64).std(correction=0))
        groups = []
        for group, pattern in self.federation.job.record.groups.items():
            members = [i for i, name in enumerate(names) if fnmatch.fnmatchcase(name, pattern)]
            values: dict[str, Value] = {
                metric: mean_interval([values[i] for i in members]) for metric, values in held.items()
            }
            groups.append(Figures(GROUP + group, values, sum(per_client[names[i]].examples for i in members)))
        total = sum(figures.examples for figures in per_client.values())
        return [Figures(CLIENTS, overall, total), *groups, *per_client.values()]

    def _per_client(self) -> dict[str, Figures]:
        federation = self.federation
        differs = self.tuner is not None or federation.personal
        found = {}
        for index, vector in self._own():
            name = federation.members[index]
            x, y, prepare = self._examples(index)
            values = self._values(vector, x, y, prepare, federation.work.objective)
            if differs and not federation.job.model.private:
                shared = self._values(self.theta, x, y, prepare, None)
                values |= {f"shared_{name}": value for name, value in shared.items()}
            found[index] = Figures(CLIENT + name, values, len(x))
        return {federation.members[i]: found[i] for i in sorted(found)}

    def _examples(self, index: int) -> tuple[Tensor, Tensor, Prepare]:
        """What a client's own model is tested on."""
        pool, holdout = self.federation.pool, self.federation.holdout
        if holdout is None:
            return pool.test_x, pool.test_y, pool.prepare
        mine = slice(*holdout.range(index))
        return holdout.x[mine], holdout.y[mine], holdout.prepare

    def _own(self) -> Iterable[tuple[int, Tensor]]:
        """(client, its model): (W,), or (P,) where it is the shared one."""
        federation, theta, layout = self.federation, self.theta, self.federation.layout
        if self.tuner is None:
            for index, name in enumerate(federation.members):
                own = self.memory.of(name).get("private", self.first)
                yield index, theta if own is None else split_private(theta, own, layout)
            return
        key = Key.root(federation.job.seed).fold("fine_tune")
        plain = federation.plain_layout
        private = self.first if federation.job.model.private else None
        tasks = [
            Task(index, key.fold(name), None if private is None else self.memory.of(name).get("private", private))
            for index, name in enumerate(federation.members)
        ]
        for done in self.tuner.train(theta, tasks):
            moved = theta + done.delta if done.failure is None else theta
            yield done.client, moved if done.private is None else split_private(moved, done.private, plain)

    def _values(
        self, vector: Tensor, x: Tensor, y: Tensor, prepare: Prepare, objective: Rule | None
    ) -> dict[str, Value]:
        found = self.federation.measure(vector, x, y, prepare, objective)
        return {name: found[name] for name in ("loss", "accuracy") if name in found}


def split_private(theta: Tensor, private: Tensor, layout: Layout) -> Tensor:
    """The full vector (W,) of shared (P,) and private (W - P,) columns."""
    first = layout.shared.start
    return torch.cat([private[:first], theta, private[first:]])


def join_private(full: Tensor, layout: Layout) -> Tensor:
    """The private columns (W - P,) of a full vector (W,): trainable ones, then buffers."""
    return torch.cat([full[: layout.shared.start], full[layout.shared.stop :]])


def wilson(share: float, count: int) -> tuple[float, float]:
    """The 95% interval of a share seen in `count` draws (Wilson 1927)."""
    z2 = Z95**2
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z95 / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def mean_interval(values: list[float]) -> tuple[float, float, float]:
    """The mean over clients and its 95% interval."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, mean, mean
    half = Z95 * math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))
    return mean, mean - half, mean + half


def _point(value: Value) -> float:
    return value[0] if isinstance(value, tuple) else value
