"""A client's half of a session: each message from the server is answered once, or refused."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from fedkeel.core.errors import InputError
from fedkeel.secagg import crypto, masks, messages, shamir
from fedkeel.secagg.crypto import KEY, KeyPair
from fedkeel.secagg.messages import Advertise, Consent, Consents, Delivery, Keys, Masked, Shares, Survivors, Unmask
from fedkeel.secagg.terms import ProtocolError, Terms, Words


@dataclass(frozen=True, slots=True)
class Signer:
    """Who a client is in signed sessions: its Ed25519 private key, and the public keys that it knows of everybody.

    It has them from elsewhere than the server, or they show nothing.
    """

    private: bytes
    known: Mapping[str, bytes]


class Client:
    """`hold` the row, `advertise`, then `answer` what comes. One object is one session: its keys and seed are fresh.

    Raises `DecodeError` for what is no message of this session and `ProtocolError` for one that may not be answered;
    either way nothing was given away, and what was agreed on stands.
    """

    def __init__(self, name: str, terms: Terms, signer: Signer | None = None) -> None:
        if name not in terms.places:
            raise ProtocolError(f"'{name}' is not in the group that it was sent the terms of")
        if terms.signed != (signer is not None):
            raise InputError(
                f"'{name}' has {'no' if signer is None else 'a'} key to sign with, and the session is "
                f"{'signed' if terms.signed else 'not'}: give both or neither"
            )
        self.terms = terms
        self.name = name
        self.unopened: tuple[str, ...] = ()
        """Whose shares could not be opened: their secrets have to be recovered without this client."""
        self._place = terms.places[name]
        self._signer = signer
        self._sealing, self._masking = KeyPair(), KeyPair()
        self._public = self._sealing.public + self._masking.public
        self._seed = os.urandom(shamir.SECRET)
        self._next: Literal["keys", "delivery", "survivors"] = "keys"
        self._row: Words | None = None
        self._peers: dict[int, bytes] = {}
        self._agreed: dict[int, bytes] = {}
        self._held: dict[int, bytes] = {}
        self._with: frozenset[int] = frozenset()
        self._survivors: frozenset[int] | None = None

    def hold(self, row: Words) -> None:
        """The quantised row (P,) to be summed. It is read when the neighbours' shares have come, and not changed."""
        if row.dtype != self.terms.dtype or row.shape != (self.terms.columns,):
            raise ValueError(f"a row of this session is {self.terms.columns} words of {self.terms.dtype}")
        self._row = row

    def advertise(self) -> bytes:
        """The first message, before the server has sent any."""
        text = crypto.keys_text(self.terms, self._place, self._public)
        return self._written(Advertise(self.name, self._public, self._signature(text)))

    def answer(self, data: bytes | memoryview) -> bytes:
        """What goes back for a message of the server's."""
        message = messages.read(data, self.terms)
        if message.sender:
            raise ProtocolError("this message is a client's, not the server's")
        if isinstance(message, Keys):
            return self._share(message)
        if isinstance(message, Delivery):
            return self._mask(message)
        if isinstance(message, Survivors):
            return self._agree_on(message)
        if isinstance(message, Consents):
            return self._unmask_signed(message)
        raise ProtocolError("this message is a client's, not the server's")

    def _share(self, message: Keys) -> bytes:
        self._expect("keys")
        terms, place = self.terms, self._place
        if not message.keys.keys() <= terms.holders(place) or place not in message.keys:
            raise ProtocolError("the keys are not those of the client's own neighbours and itself")
        if message.keys[place][: 2 * KEY] != self._public:
            raise ProtocolError("the server has other keys of this client than it sent")
        self._enough(len(message.keys), "have keys")
        for other, entry in message.keys.items():
            keys, signature = entry[: 2 * KEY], entry[2 * KEY :]
            if terms.signed and not self._signed(other, signature, crypto.keys_text(terms, other, keys)):
                raise ProtocolError(f"the keys of '{terms.members[other]}' are not signed by it")
        agreed = {o: self._sealing.agree(entry[:KEY]) for o, entry in message.keys.items() if o != place}
        points = [other + 1 for other in message.keys]
        of_seed = shamir.split(self._seed, terms.threshold, points)
        of_key = shamir.split(self._masking.private, terms.threshold, points)
        parts = {point - 1: of_seed[point] + of_key[point] for point in points}
        self._held = {place: parts[place]}
        self._peers = {other: entry[KEY : 2 * KEY] for other, entry in message.keys.items()}
        self._agreed = agreed
        self._next = "delivery"
        sealed = {other: crypto.seal(shared, terms, place, other, parts[other]) for other, shared in agreed.items()}
        return self._written(Shares(self.name, crypto.commitment(self._seed, terms, place), sealed))

    def _mask(self, message: Delivery) -> bytes:
        self._expect("delivery")
        terms, place = self.terms, self._place
        if not message.sealed.keys() <= self._agreed.keys():
            raise ProtocolError("shares have come of clients whose keys have not")
        if self._row is None:
            raise ValueError("there is no row to mask: call hold before")
        self._enough(len(message.sealed) + 1, "have shared")
        seeds = [(self._seed, 1)]
        for other in message.sealed:
            shared = self._masking.agree(self._peers[other])
            seeds.append((crypto.mask_seed(shared, terms, place, other), 1 if place < other else -1))
        self._next = "survivors"
        unopened = []
        for other, data in message.sealed.items():
            part = crypto.unseal(self._agreed[other], terms, other, place, data)
            if part is None:
                unopened.append(terms.members[other])
            else:
                self._held[other] = part
        self.unopened = tuple(unopened)
        self._with = frozenset(message.sealed) | {place}
        row, self._row = self._row.copy(), None
        masks.apply(row, seeds)
        del self._seed, self._sealing, self._masking
        return self._written(Masked(self.name, row.data.cast("B")))

    def _agree_on(self, message: Survivors) -> bytes:
        self._expect("survivors")
        near = message.places & self.terms.holders(self._place)
        if self._place not in near or not near <= self._with:
            raise ProtocolError("the survivors are not those who this client shares masks with and itself")
        self._enough(len(near), "survive")
        if self._survivors not in (None, message.places):
            raise ProtocolError("the server has announced other survivors before")
        self._survivors = message.places
        if self.terms.signed:
            text = crypto.survivors_text(self.terms, message.places)
            return self._written(Consent(self.name, self._signature(text)))
        return self._unmask(message.places)

    def _unmask_signed(self, message: Consents) -> bytes:
        if self._survivors is None:
            raise ProtocolError("signatures have come before any survivors")
        text = crypto.survivors_text(self.terms, self._survivors)
        near = message.signatures.keys() & self.terms.holders(self._place) & self._survivors
        agreeing = [other for other in near if self._signed(other, message.signatures[other], text)]
        self._enough(len(agreeing), "have signed the same survivors")
        return self._unmask(self._survivors)

    def _unmask(self, survivors: frozenset[int]) -> bytes:
        """Of each client one share and never the other: there is one list of survivors in a session."""
        seeds = {other: part[: shamir.SHARE] for other, part in self._held.items() if other in survivors}
        lost = {other: part[shamir.SHARE :] for other, part in self._held.items() if other not in survivors}
        return self._written(Unmask(self.name, seeds, lost))

    def _expect(self, stage: str) -> None:
        if self._next != stage:
            raise ProtocolError(f"'{stage}' has come, but this client waits for '{self._next}'")

    def _enough(self, count: int, what: str) -> None:
        if count < self.terms.threshold:
            raise ProtocolError(f"{count} of those who hold this client's shares {what}, not {self.terms.threshold}")

    def _signature(self, text: bytes) -> bytes:
        return crypto.sign(self._signer.private, text) if self._signer else b""

    def _signed(self, place: int, signature: bytes, text: bytes) -> bool:
        known = self._signer.known.get(self.terms.members[place], b"") if self._signer else b""
        return crypto.signed_by(known, signature, text)

    def _written(self, message: messages.Message) -> bytes:
        return messages.write(message, self.terms)
