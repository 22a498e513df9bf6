"""The hostile clients of a simulation: what they do to their labels, their claims, or the rows that they send."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedkeel.core.keys import Key
from fedkeel.core.registry import Rule
from fedkeel.core.types import Claims
from fedkeel.train.contract import ClientData


@dataclass(frozen=True)
class Adversary:
    """Who is hostile, and the attack they carry out together; its traits say on what: "data", "claims" or "rows"."""

    clients: frozenset[str]
    attack: Rule | None
    key: Key

    @classmethod
    def among(cls, names: Sequence[str], count: int, attack: Rule | None, key: Key) -> Adversary:
        """`count` of the clients, drawn by the key."""
        order = torch.randperm(len(names), generator=key.fold("who").torch())
        return cls(frozenset(names[i] for i in order[:count].tolist()), attack, key)

    def _on(self, what: str) -> Rule | None:
        return self.attack if self.clients and self.attack and what in self.attack.definition.traits else None

    @property
    def crafts_rows(self) -> bool:
        """Whether the attack needs to see the cohort's rows before they are sent."""
        return self._on("rows") is not None

    def poison(self, data: ClientData, names: Sequence[str], classes: int) -> ClientData:
        """The clients' data with the hostile ones' labels changed."""
        attack = self._on("data")
        if attack is None:
            return data
        y = data.y.clone()
        for index, name in enumerate(names):
            if name in self.clients:
                start, stop = data.range(index)
                y[start:stop] = attack(y[start:stop], classes, self.key.fold("data", name))
        return replace(data, y=y)

    def claim(self, claims: Claims) -> Claims:
        """What the client claims: a hostile one may lie about its examples."""
        attack = self._on("claims")
        if attack is None or claims.client not in self.clients:
            return claims
        key = self.key.fold("claims", claims.task)
        lie = attack(torch.tensor([claims.num_examples]), [key])
        return replace(claims, num_examples=int(lie[0]))

    def craft_(self, rows: Tensor, clients: Sequence[str], round: int) -> Tensor:
        """Replace the hostile clients' rows of (n, P), in place, by what the attack makes of all rows."""
        attack = self._on("rows")
        bad = [i for i, client in enumerate(clients) if client in self.clients]
        if attack is not None and bad:
            keys = [self.key.fold("rows", round, clients[i]) for i in bad]
            rows[bad] = attack(rows, torch.tensor(bad), keys)
        return rows
