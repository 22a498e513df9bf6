"""What is measured of a federation: the shared model on the common test set, and every client's own on its holdout."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fedkeel.core.keys import Key
from fedkeel.core.types import ClientMemory
from fedkeel.train import Task, Trainer
from fedkeel.train.contract import Prepare

if TYPE_CHECKING:
    from fedkeel.world.federation import Federation

Z95 = 1.959963984540054
Value = float | tuple[float, float, float]
GLOBAL, CLIENTS, CLIENT, GROUP, CLASS = "global", "clients", "client/", "group/", "class/"


class Figures(NamedTuple):
    """What was measured: the shared model (`global`), all clients' own (`clients`), one's, a group's, a class's.

    A group is the job's (`record.groups`), a class that of devices.
    """

    scope: str
    values: dict[str, Value]
    examples: int


def measure(federation: Federation, theta: Tensor, memory: ClientMemory, tuner: Trainer | None) -> list[Figures]:
    """The figures of a model theta (P,), the one that the report is about first.

    `global` is the shared model on the test set; under an attack with a trigger, `backdoor` is its success: the share
    of marked examples of other classes that are taken for the wanted one. Where layers are private there is no such
    model, and it is the mean over clients. Where clients hold examples back, `clients` is the mean over clients of each
    one's own model on those, hostile ones left out, with the mean of the worst tenth and the standard deviation (of
    accuracies, or of losses where there are no classes); where a
    client's own model is not the shared one, that is measured beside it (`shared_accuracy`). `tuner` takes each
    client's model some steps on its own data first. Clients that train alone and hold nothing back are tested on the
    test set.
    """
    apart = federation.holdout is not None or federation.alone
    found = over_clients(federation, own(federation, theta, memory, tuner)) if apart else []
    return [*of_shared(federation, theta, found), *found]


Measured = dict[str, tuple[dict[str, float], int]]
"""Client -> figures of its own model, and on how many examples."""


def of_shared(federation: Federation, theta: Tensor, clients: Sequence[Figures]) -> list[Figures]:
    """The figures of the shared model; where layers are private, of the mean over clients, if they were measured."""
    if not federation.job.model.private:
        return [_shared(federation, theta)]
    if not clients:
        return []
    plain = {name: value for name, value in clients[0].values.items() if name in ("loss", "accuracy")}
    return [Figures(GLOBAL, plain, clients[0].examples)]


def own(federation: Federation, theta: Tensor, memory: ClientMemory, tuner: Trainer | None) -> Measured:
    """Every client's own model, of those whose examples the federation holds."""
    return _Clients(federation, theta, memory, tuner).measured()


def asked_of_clients(federation: Federation) -> bool:
    """Whether clients have figures of their own."""
    return federation.job.data.holdout > 0 or federation.alone


def figure_names(federation: Federation) -> frozenset[str]:
    """What is measured of a client's own model."""
    plain = {"loss", "accuracy"} if federation.pool.classes else {"loss"}
    differs = federation.job.record.fine_tune is not None or federation.personal
    if not differs or federation.job.model.private:
        return frozenset(plain)
    return frozenset(plain | {f"shared_{name}" for name in plain})


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


def over_clients(federation: Federation, measured: Measured) -> list[Figures]:
    """All clients together, then the groups, then one by one."""
    names = list(measured)
    sizes = [size for _, size in measured.values()]
    metrics = list(measured[names[0]][0])
    # What a hostile client's own model is worth to it is nobody's concern.
    hostile = set(federation.adversary.clients)
    counted = [i for i, name in enumerate(names) if name not in hostile] or list(range(len(names)))
    figures = [values for values, _ in measured.values()]
    held = {metric: [figures[i][metric] for i in counted] for metric in metrics}
    overall: dict[str, Value] = {metric: mean_interval(metric, values) for metric, values in held.items()}
    main, best_first = ("accuracy", True) if "accuracy" in held else ("loss", False)
    worst = sorted(held[main], reverse=not best_first)[: max(1, len(held[main]) // 10)]
    overall["worst_decile"] = sum(worst) / len(worst)
    overall["spread"] = float(torch.tensor(held[main], dtype=torch.float64).std(correction=0))
    found = [Figures(CLIENTS, overall, sum(sizes[i] for i in counted))]
    for scope, mine in _parts(federation, names).items():
        members = [i for i in counted if names[i] in mine]
        if members:
            theirs = {metric: mean_interval(metric, [figures[i][metric] for i in members]) for metric in metrics}
            found.append(Figures(scope, dict(theirs), sum(sizes[i] for i in members)))
    return found + [Figures(CLIENT + name, dict(values), size) for name, (values, size) in measured.items()]


def _parts(federation: Federation, names: Sequence[str]) -> dict[str, set[str]]:
    """Scope -> clients of the groups that the job names, and of the classes of devices."""
    groups = federation.job.record.groups.items()
    found = {GROUP + group: set(fnmatch.filter(names, pattern)) for group, pattern in groups}
    for name, kind in federation.devices.of.items():
        found.setdefault(CLASS + kind, set()).add(name)
    return found


class _Clients:
    """Every client's own model on its own holdout."""

    def __init__(self, federation: Federation, theta: Tensor, memory: ClientMemory, tuner: Trainer | None) -> None:
        self.federation, self.theta, self.memory, self.tuner = federation, theta, memory, tuner
        self.first = federation.private()

    def measured(self) -> Measured:
        """Client -> figures of its model, and on how many examples."""
        federation = self.federation
        differs = (self.tuner is not None or federation.personal) and not federation.job.model.private
        found = {}
        for index, vector in self._own():
            x, y, prepare = self._examples(index)
            values = federation.measure(vector, x, y, prepare, federation.work.objective)
            if differs:
                shared = federation.measure(self.theta, x, y, prepare)
                values |= {f"shared_{metric}": value for metric, value in shared.items()}
            found[index] = {k: v for k, v in values.items() if not k.endswith("examples")}, len(x)
        return {federation.members[index]: found[index] for index in sorted(found)}

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
                yield index, theta if own is None else layout.joined(theta, own)
            return
        key = Key.root(federation.job.seed).fold("fine_tune")
        plain = federation.plain_layout
        private = self.first if federation.job.model.private else None
        tasks = [
            Task(index, key.fold(name), None if private is None else self.memory.of(name).get("private", private))
            for index, name in enumerate(federation.members)
        ]
        given = {task.client: task.private for task in tasks}
        for done in self.tuner.train(theta, tasks):
            failed = done.failure is not None  # then its model stays what it was
            moved, own = (theta, given[done.client]) if failed else (theta + done.delta, done.private)
            yield done.client, moved if own is None else plain.joined(moved, own)


def wilson(share: float, count: int) -> tuple[float, float]:
    """The 95% interval of a share seen in `count` draws (Wilson 1927)."""
    z2 = Z95**2
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z95 / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def mean_interval(metric: str, values: list[float]) -> tuple[float, float, float]:
    """The mean over clients and its 95% interval, kept where the metric can be."""
    mean = sum(values) / len(values)
    if len(values) < 2 or not math.isfinite(mean):
        return mean, mean, mean
    half = Z95 * math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))
    low, high = (0.0, 1.0) if metric.endswith("accuracy") else (-math.inf, math.inf)
    return mean, max(low, mean - half), min(high, mean + half)
