"""The roster: who there is, and what the server knows of each, in arrays with one place a client."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedkeel.core.errors import InputError

_KEPT = ("selected", "last", "version", "loss", "before", "examples", "seconds", "factor")
Floats = NDArray[np.float32]
Whole = NDArray[np.int64]


class Register:
    """Clients sorted by id, and the classes of their devices: what stays. One place in each array a client."""

    def __init__(self, names: Sequence[str], groups: Mapping[str, str] | None = None) -> None:
        """`groups` names the class of each client's device; one for all where there is none."""
        self.names = tuple(sorted(names))
        self.index = {name: i for i, name in enumerate(self.names)}
        if len(self.index) != len(names):
            raise InputError(f"{len(names)} clients have {len(self.index)} different ids: give each its own")
        self.classify([groups[name] for name in self.names] if groups else ["all"] * len(self.names))

    def classify(self, labels: Sequence[str]) -> None:
        """The class of each client's device, in the order of the names."""
        self.groups = tuple(sorted(set(labels)))
        place = {group: i for i, group in enumerate(self.groups)}
        self.group = np.fromiter((place[label] for label in labels), np.int16, len(labels))
        self.sizes = np.bincount(self.group, minlength=len(self.groups))

    def device(self, client: str) -> str:
        """The class of a client's device."""
        return self.groups[int(self.group[self.index[client]])]


class Roster:
    """A register, and what the clients have done so far. One place in each array a client.

    selected: how often each was given work; last: in which round, 0 for never. loss, examples, seconds: what its latest
    admitted answer claimed, and how long it took by the federation's clock; NaN before the first. busy: it is at work,
    or rests. version: of the model that it was given last, -1 for none. before: the loss of the answer before the
    latest. factor: of the steps of its next task.
    """

    def __init__(self, clients: Register | Sequence[str], known: Mapping[str, Tensor] | None = None) -> None:
        """`known` is what `state` gave."""
        self.register = clients if isinstance(clients, Register) else Register(clients)
        self.names, self.index = self.register.names, self.register.index
        self.groups, self.group, self.sizes = self.register.groups, self.register.group, self.register.sizes
        count = len(self.names)
        self.busy = np.zeros(count, bool)
        self.selected, self.last = np.zeros(count, np.int32), np.zeros(count, np.int32)
        self.loss, self.before, self.examples, self.seconds = (np.full(count, np.nan, np.float32) for _ in range(4))
        self.factor = np.ones(count, np.float32)
        self.version = np.full(count, -1, np.int32)
        for name, values in (known or {}).items():
            getattr(self, name)[:] = values.numpy()
        self.given = np.bincount(self.group, self.selected, len(self.groups)).astype(np.int64)

    def select(self, place: int, round: int, version: int = 0) -> None:
        """A client is given work on a model version."""
        self.busy[place] = True
        self.version[place] = version
        self.selected[place] += 1
        self.last[place] = round
        self.given[self.group[place]] += 1

    def answered(self, place: int, seconds: float, examples: float, loss: float) -> None:
        """A client's answer was let in."""
        self.before[place] = self.loss[place]
        self.seconds[place], self.examples[place], self.loss[place] = seconds, examples, loss

    def devices(self, clients: Sequence[str]) -> tuple[tuple[str, ...], dict[str, int]]:
        """The classes of these clients' devices, and how many clients there are of each class."""
        sizes = dict(zip(self.groups, self.sizes.tolist(), strict=True))
        return tuple(map(self.register.device, clients)), sizes

    def state(self) -> dict[str, Tensor]:
        """What to keep: copies."""
        return {name: torch.from_numpy(getattr(self, name).copy()) for name in _KEPT}

    def overdue(self, free: Whole, round: int, rows: int, longest: int) -> Whole:
        """Those of the free clients who must be given work now if nobody is to wait for more than `longest` rounds.

        Earliest deadline first: as few as leave the deadlines of all others within reach of `rows` clients a round.
        """
        due = self.last[free].astype(np.int64) + longest
        order = np.argsort(due, kind="stable")
        behind = np.arange(1, len(free) + 1) - rows * np.maximum(due[order] - round, 0)
        return free[order[: max(0, int(behind.max(initial=0)))]]


@dataclass(frozen=True)
class Candidates:
    """The clients that may be given work now, sorted by id: what a selector chooses from, by position.

    Arrays (n,): `group` indexes `groups`, the classes of devices; `loss`, `examples`, `seconds` are of the client's
    latest admitted answer, NaN before it; `selected` counts how often it was given work, `last` is the round of the
    latest, 0 for never. `sizes` and `given` (groups,) count all clients of each group, and the work that they were
    given.
    """

    roster: Roster
    rows: Whole

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def group(self) -> NDArray[np.int16]:
        return self.roster.group[self.rows]

    @property
    def loss(self) -> Floats:
        return self.roster.loss[self.rows]

    @property
    def examples(self) -> Floats:
        return self.roster.examples[self.rows]

    @property
    def seconds(self) -> Floats:
        return self.roster.seconds[self.rows]

    @property
    def selected(self) -> NDArray[np.int32]:
        return self.roster.selected[self.rows]

    @property
    def last(self) -> NDArray[np.int32]:
        return self.roster.last[self.rows]

    @property
    def groups(self) -> tuple[str, ...]:
        return self.roster.groups

    @property
    def sizes(self) -> Whole:
        return self.roster.sizes

    @property
    def given(self) -> Whole:
        return self.roster.given

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(self.roster.names[i] for i in self.rows.tolist())

    @classmethod
    def of(cls, names: Sequence[str]) -> Candidates:
        """Clients of whom nothing is known yet."""
        roster = Roster(names)
        return cls(roster, np.arange(len(roster.names)))
