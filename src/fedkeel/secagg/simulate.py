"""Whole sessions in one process: through the protocol, or the same integers without masks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

import numpy as np

from fedkeel.core.errors import CohortError
from fedkeel.secagg.client import Client, Signer
from fedkeel.secagg.server import Server
from fedkeel.secagg.terms import Terms, Words

Lost = Literal["keys", "shares", "row", "consent", "unmask"]
"""The first message that a client does not send: its keys, its shares, its row, its consent, what unmasks."""
_STAGE: dict[str, Lost] = {
    "keys": "keys",
    "shares": "shares",
    "rows": "row",
    "consents": "consent",
    "unmask": "unmask",
}


class GroupSum(NamedTuple):
    """The sum of the survivors' rows (P,), mod 2^bits; or None, and why there is none."""

    survivors: tuple[str, ...]
    total: Words | None
    reason: str | None = None


def masked_sum(
    terms: Terms,
    rows: Mapping[str, Words],
    lost: Mapping[str, Lost] | None = None,
    signers: Mapping[str, Signer] | None = None,
    known: Mapping[str, bytes] | None = None,
) -> GroupSum:
    """One group's session with all its messages. `rows` (P,) by member, those who are lost among them."""
    lost = lost or {}
    server = Server(terms, known)
    clients = {name: Client(name, terms, signers[name] if signers else None) for name in terms.members}
    answers = {name: client.advertise() for name, client in clients.items()}
    try:
        while server.stage != "done":
            for name, data in answers.items():
                if lost.get(name) == _STAGE[server.stage]:
                    clients.pop(name)
                elif (refusal := server.offer(name, data)) is not None:
                    raise CohortError(f"'{name}' was refused: {refusal.reason}")
            orders = server.advance()
            for name in orders.keys() & clients.keys():
                if server.stage == "rows":
                    clients[name].hold(rows[name])
            answers = {name: clients[name].answer(data) for name, data in orders.items() if name in clients}
    except CohortError as error:
        return GroupSum((), None, str(error))
    return GroupSum(server.survivors, server.total())


def plain_sum(terms: Terms, rows: Mapping[str, Words], lost: Mapping[str, Lost] | None = None) -> GroupSum:
    """What `masked_sum` gives, by adding up: the same survivors, integers and reasons."""
    lost = lost or {}
    stages = list(_STAGE.values())

    def without(present: frozenset[int], stage: Lost) -> frozenset[int]:
        if stage == "consent" and not terms.signed:
            return present
        gone = {terms.places[name] for name, first in lost.items() if first == stage}
        return present - gone

    try:
        advertised = terms.kept(without(frozenset(terms.places.values()), stages[0]))
        shared = terms.kept(without(advertised, "shares"))
        summed = without(shared, "row")
        terms.check_recovery(shared, summed, summed)
        agreed = without(summed, "consent")
        terms.check_recovery(shared, summed, agreed)
        terms.check_recovery(shared, summed, without(agreed, "unmask"))
    except CohortError as error:
        return GroupSum((), None, str(error))
    total = np.zeros(terms.columns, terms.dtype)
    survivors = tuple(terms.members[place] for place in sorted(summed))
    for name in survivors:
        np.add(total, rows[name], out=total)
    return GroupSum(survivors, total)
