"""The hostile clients of a simulation: what they do to their data, their claims, or the rows that they send."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedkeel.core.errors import InputError
from fedkeel.core.keys import Key
from fedkeel.core.layout import Layout
from fedkeel.core.registry import Rule, build
from fedkeel.core.types import Claims
from fedkeel.train.contract import ClientData
from fedkeel.world.pool import Pool

Aggregate = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Adversary:
    """Who is hostile, and the attacks they carry out together; their traits say on what: "data", "claims", "rows"."""

    clients: frozenset[str]
    attacks: tuple[Rule, ...]
    key: Key

    @classmethod
    def among(cls, names: Sequence[str], count: int, attacks: tuple[Rule, ...], key: Key) -> Adversary:
        """`count` of the clients, drawn by the key."""
        order = torch.randperm(len(names), generator=key.fold("who").torch())
        return cls(frozenset(names[i] for i in order[:count].tolist()), attacks, key)

    def _on(self, what: str) -> list[Rule]:
        return [a for a in self.attacks if what in a.definition.traits] if self.clients else []

    @property
    def crafts_rows(self) -> bool:
        """Whether an attack needs to see the cohort's rows before they are sent."""
        return bool(self._on("rows"))

    def poison(self, data: ClientData, names: Sequence[str], classes: int) -> ClientData:
        """The clients' data with the hostile ones' changed."""
        attacks = self._on("data")
        if not attacks:
            return data
        x, y = data.x.clone(), data.y.clone()
        for index, name in enumerate(names):
            if name in self.clients:
                start, stop = data.range(index)
                for attack in attacks:
                    key = self.key.fold("data", name)
                    x[start:stop], y[start:stop] = attack(x[start:stop], y[start:stop], classes, key)
        return replace(data, x=x, y=y)

    def check(self, pool: Pool, layout: Layout) -> None:
        """Refuse attacks on data that have no classes to turn, and marks whose success nobody could measure."""
        for attack in self._on("data"):
            if not pool.classes or pool.y.dim() > 1:
                raise InputError(
                    f"attack.rule = '{attack!r}' needs one class label per example, which this data has not: choose "
                    "another attack"
                )
        for attack in self._on("trigger"):
            if pool.x.dim() < 2:
                raise InputError(f"attack.rule = '{attack!r}' marks features, and an example here is a single number")
            if layout.width > layout.columns:
                raise InputError(
                    f"attack.rule = '{attack!r}' is measured on the common model, and model.private leaves none: "
                    "leave out one of the two"
                )

    def triggered(self, x: Tensor, y: Tensor, classes: int) -> tuple[Tensor, Tensor] | None:
        """The examples of other classes than the wanted one, marked, with the label that is wanted; None if none is."""
        for attack in self._on("trigger"):
            whole = build("attack", attack.name, **{**attack.parameters, "share": 1.0})
            marked, wanted = whole(x, y, classes, self.key.fold("trigger"))
            others = wanted != y
            return marked[others], wanted[others]
        return None

    def claim(self, claims: Claims) -> Claims:
        """What the client claims: a hostile one may lie about its examples."""
        if claims.client in self.clients:
            for attack in self._on("claims"):
                key = self.key.fold("claims", claims.task)
                lie = attack(torch.tensor([claims.num_examples]), [key])
                claims = replace(claims, num_examples=int(lie[0]))
        return claims

    def craft_(self, rows: Tensor, clients: Sequence[str], round: int, aggregate: Aggregate) -> Tensor:
        """Replace the hostile clients' rows of (n, P), in place, by what the attacks make of all rows.

        `aggregate` is what the server would make of rows: adaptive attacks ask it.
        """
        bad = [i for i, client in enumerate(clients) if client in self.clients]
        for attack in self._on("rows") if bad else ():
            keys = [self.key.fold("rows", round, clients[i]) for i in bad]
            known = (aggregate,) if "adaptive" in attack.definition.traits else ()
            rows[bad] = attack(rows, torch.tensor(bad), keys, *known)
        return rows
