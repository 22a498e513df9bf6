"""A session played by hand: whoever reads these tests sees each message before it is sent."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import numpy as np

from fedkeel.secagg import crypto
from fedkeel.secagg.client import Client, Signer
from fedkeel.secagg.server import Server
from fedkeel.secagg.terms import Terms, Words


def drawn_rows(terms: Terms, seed: int = 0) -> dict[str, Words]:
    generator = np.random.default_rng(seed)
    top = np.iinfo(terms.dtype).max
    return {name: generator.integers(0, top, terms.columns, terms.dtype, endpoint=True) for name in terms.members}


class Session:
    """Clients and a server around one table; `answers` are on their way to the server, `orders` were its last."""

    def __init__(self, size: int = 5, columns: int = 16, terms: Terms | None = None, **more: object) -> None:
        names = [f"c{i}" for i in range(size)]
        self.terms = terms or Terms.drawn(names, columns, **more)  # type: ignore[arg-type]
        pairs = {name: crypto.identity() for name in self.terms.members}
        self.known = {name: public for name, (_, public) in pairs.items()}
        self.private = {name: private for name, (private, _) in pairs.items()}
        self.rows = drawn_rows(self.terms)
        self.server = Server(self.terms, self.known)
        self.clients = {name: self.client(name) for name in self.terms.members}
        self.orders: dict[str, bytes] = {}
        self.answers = {name: client.advertise() for name, client in self.clients.items()}

    def client(self, name: str) -> Client:
        signer = Signer(self.private[name], self.known) if self.terms.signed else None
        client = Client(name, self.terms, signer)
        client.hold(self.rows[name])
        return client

    def step(self, lost: Collection[str] = (), change: Callable[[str, bytes], bytes] | None = None) -> None:
        """Offer what has been answered, but for the lost; close the stage; let everybody answer."""
        for name in lost:
            self.clients.pop(name)
        for name in self.answers.keys() & self.clients.keys():
            data = self.answers[name]
            assert self.server.offer(name, change(name, data) if change else data) is None
        self.orders = self.server.advance()
        self.answers = {n: self.clients[n].answer(self.orders[n]) for n in self.orders.keys() & self.clients.keys()}

    def until(self, stage: str, lost: Mapping[str, Collection[str]] | None = None) -> Session:
        while self.server.stage != stage:
            self.step((lost or {}).get(self.server.stage, ()))
        return self

    def sum_of(self, names: Collection[str]) -> list[int]:
        """By Python's integers."""
        return [sum(int(self.rows[n][c]) for n in names) % 2**self.terms.bits for c in range(self.terms.columns)]
