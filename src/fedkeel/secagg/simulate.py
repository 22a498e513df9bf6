"""Whole sessions in one process: through the protocol, or the same integers without masks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import numpy as np

from fedkeel.core.errors import CohortError, RunError
from fedkeel.secagg import crypto
from fedkeel.secagg.client import Client, Signer
from fedkeel.secagg.groups import GroupSum
from fedkeel.secagg.server import Server
from fedkeel.secagg.terms import Terms, Words

Lost = Literal["keys", "shares", "rows", "consents", "unmask"]
"""The first stage that a client does not answer."""


def group_sums(
    groups: Iterable[Terms], rows: Mapping[str, Words], lost: Mapping[str, Lost] | None = None, *, masked: bool = True
) -> list[GroupSum]:
    """Each group's sum of its members' rows (P,): by the protocol or, not `masked`, by adding up. The same bits."""
    one = masked_sum if masked else plain_sum
    return [one(terms, rows, lost or {}) for terms in groups]


def masked_sum(terms: Terms, rows: Mapping[str, Words], lost: Mapping[str, Lost]) -> GroupSum:
    """One group's session with all its messages."""
    identities = {name: crypto.identity() for name in terms.members} if terms.signed else {}
    known = {name: public for name, (_, public) in identities.items()}
    clients = {
        name: Client(name, terms, Signer(identities[name][0], known) if terms.signed else None)
        for name in terms.members
    }
    server = Server(terms, known)
    for name, client in clients.items():
        client.hold(rows[name])
    answers = {name: client.advertise() for name, client in clients.items()}
    try:
        while server.stage != "done":
            clients = {name: client for name, client in clients.items() if lost.get(name) != server.stage}
            for name in answers.keys() & clients.keys():
                if (refusal := server.offer(name, answers[name])) is not None:
                    raise RunError(f"secure aggregation: the message of '{name}' was refused: {refusal.reason}")
            orders = server.advance()
            answers = {name: clients[name].answer(orders[name]) for name in orders.keys() & clients.keys()}
    except CohortError as error:
        return GroupSum((), None, str(error))
    return GroupSum(server.survivors, server.total())


def plain_sum(terms: Terms, rows: Mapping[str, Words], lost: Mapping[str, Lost]) -> GroupSum:
    """What `masked_sum` gives, by adding up: the same survivors, integers and reasons."""

    def answering(awaited: Iterable[int], stage: Lost) -> frozenset[int]:
        return frozenset(place for place in awaited if lost.get(terms.members[place]) != stage)

    try:
        advertised = terms.kept(answering(terms.places.values(), "keys"))
        shared = terms.kept(answering(advertised, "shares"))
        summed = answering(shared, "rows")
        terms.check_recovery(shared, summed, summed)
        agreed = answering(summed, "consents") if terms.signed else summed
        terms.check_recovery(shared, summed, agreed)
        terms.check_recovery(shared, summed, answering(agreed, "unmask"))
    except CohortError as error:
        return GroupSum((), None, str(error))
    total = np.zeros(terms.columns, terms.dtype)
    survivors = tuple(terms.members[place] for place in sorted(summed))
    for name in survivors:
        np.add(total, rows[name], out=total)
    return GroupSum(survivors, total)
