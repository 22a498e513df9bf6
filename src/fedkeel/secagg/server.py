"""The server's half of a session: what comes in is let in or refused, and each stage is closed when the driver says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np

from fedkeel.core.errors import CohortError, DecodeError
from fedkeel.core.types import Refusal
from fedkeel.secagg import crypto, masks, messages, shamir
from fedkeel.secagg.crypto import KEY, KeyPair
from fedkeel.secagg.messages import Advertise, Consent, Consents, Delivery, Keys, Masked, Shares, Survivors, Unmask
from fedkeel.secagg.terms import ProtocolError, Terms, Words

Stage = Literal["keys", "shares", "rows", "consents", "unmask", "done", "failed"]
_AWAITED = {"keys": Advertise, "shares": Shares, "rows": Masked, "consents": Consent, "unmask": Unmask}


class Server:
    """`offer` what comes, `advance` when all have answered or no more will come, until the stage is "done"; `total`.

    A message that is refused leaves no trace, and its sender may still send another. Who has not answered when a stage
    is closed is lost, and its row is not in the sum unless it had come. `known`: the clients' Ed25519 public keys, for
    a signed session.
    """

    def __init__(self, terms: Terms, known: Mapping[str, bytes] | None = None) -> None:
        self.terms = terms
        self.stage: Stage = "keys"
        self.doubted: dict[str, Refusal] = {}
        """Whose shares stood in the way of a secret. It may be its owner who dealt wrong ones, and liars who agree can
        make it look like the others: so nobody is shut out for this."""
        self._known = known or {}
        self._probe = KeyPair()
        self._awaited = frozenset(range(len(terms.members)))
        self._answered: set[int] = set()
        self._keys: dict[int, bytes] = {}
        self._signatures: dict[int, bytes] = {}
        self._commitments: dict[int, bytes] = {}
        self._sealed: dict[int, Mapping[int, bytes]] = {}
        self._shared: frozenset[int] = frozenset()
        self._rows: frozenset[int] = frozenset()
        self._sum = np.zeros(terms.columns, terms.dtype)
        self._shares: dict[int, dict[int, bytes]] = {}

    @property
    def waiting(self) -> tuple[str, ...]:
        """Whose answers are still to come in this stage."""
        return tuple(self.terms.members[place] for place in sorted(self._awaited - self._answered))

    @property
    def ready(self) -> bool:
        """Whether enough has come for this stage to be closed with success, as far as can be told."""
        try:
            self._check()
        except CohortError:
            return False
        return True

    @property
    def survivors(self) -> tuple[str, ...]:
        """Whose rows the sum is of, once that stage is closed."""
        return tuple(self.terms.members[place] for place in sorted(self._rows))

    def total(self) -> Words:
        """The sum of the survivors' rows (P,), mod 2^bits, once the stage is "done"."""
        if self.stage != "done":
            raise ValueError(f"the sum is still under masks: the stage is '{self.stage}'")
        return self._sum

    def offer(self, client: str, data: bytes | memoryview) -> Refusal | None:
        """Let in one message from `client`, as the transport knows it, or say why not. Cost: O(bytes)."""
        place = self.terms.places.get(client)
        try:
            if place is None or place not in self._awaited:
                raise DecodeError("it is not awaited in this stage")
            if place in self._answered:
                raise DecodeError("this stage has an answer already")
            message = messages.read(data, self.terms)
            if message.sender != client:
                raise DecodeError("it is in another's name")
            if type(message) is not _AWAITED.get(self.stage):
                raise DecodeError(f"'{self.stage}' is awaited, not a message of kind {type(message).__name__.lower()}")
            self._let_in(place, message)
        except (DecodeError, ProtocolError) as error:
            return Refusal("decode", "secure aggregation", str(error))
        self._answered.add(place)
        return None

    def advance(self) -> dict[str, bytes]:
        """Close the stage: what each client that goes on is sent now. Raises `CohortError` where too few are left.

        Then the sum is lost, and what has come so far tells nothing of any row.
        """
        close = {
            "keys": self._send_keys,
            "shares": self._deliver,
            "rows": self._announce,
            "consents": self._send_consents,
            "unmask": self._unmask,
        }.get(self.stage)
        if close is None:
            raise ValueError(f"the session is at its end: the stage is '{self.stage}'")
        try:
            self._check()
            return close()
        except CohortError:
            self._enter("failed", frozenset())
            raise

    def _check(self) -> None:
        if self.stage in ("keys", "shares"):
            self.terms.kept(self._answered)
        elif self.stage == "rows":
            self.terms.check_recovery(self._shared, self._answered, self._answered)
        else:
            self.terms.check_recovery(self._shared, self._rows, self._answered)

    # -- what comes in

    def _let_in(self, place: int, message: messages.Message) -> None:
        """Take up a message of the stage, or raise."""
        terms = self.terms
        if isinstance(message, Advertise):
            text = crypto.keys_text(terms, place, message.keys)
            self._require_signed(place, message.signature, text)
            for key in (message.keys[:KEY], message.keys[KEY:]):
                self._probe.agree(key)  # a point of low order is refused here, before it stops the others
            self._keys[place] = message.keys + message.signature
        elif isinstance(message, Shares):
            if message.sealed.keys() != (terms.holders(place) & self._awaited) - {place}:
                raise DecodeError("it does not have shares for those whose keys it was sent")
            self._commitments[place], self._sealed[place] = message.commitment, message.sealed
        elif isinstance(message, Masked):
            row = np.frombuffer(message.row, terms.dtype)
            np.add(self._sum, row, out=self._sum)
        elif isinstance(message, Consent):
            self._require_signed(place, message.signature, crypto.survivors_text(terms, self._rows))
            self._signatures[place] = message.signature
        elif isinstance(message, Unmask):
            near = terms.holders(place) & self._shared
            if not (message.seeds.keys() <= near & self._rows and message.mask_keys.keys() <= near - self._rows):
                raise DecodeError("it gives shares that it was not asked for")
            given = {**message.seeds, **message.mask_keys}
            if not all(shamir.valid(share) for share in given.values()):
                raise DecodeError("a share is no element of the field")
            for other, share in given.items():
                self._shares.setdefault(other, {})[place + 1] = share

    def _require_signed(self, place: int, signature: bytes, text: bytes) -> None:
        known = self._known.get(self.terms.members[place], b"")
        if self.terms.signed and not crypto.signed_by(known, signature, text):
            raise DecodeError("it is not signed by the key that is known of the client")

    # -- what goes out

    def _enter(self, stage: Stage, awaited: frozenset[int]) -> None:
        self.stage, self._awaited, self._answered = stage, awaited, set()

    def _to_each(self, table: Mapping[int, bytes]) -> dict[str, Mapping[int, bytes]]:
        """Of a table by places what each awaited client is to know: its holders' entries."""
        return {
            self.terms.members[place]: {o: table[o] for o in self.terms.holders(place) if o in table}
            for place in self._awaited
        }

    def _send_keys(self) -> dict[str, bytes]:
        kept = self.terms.kept(self._answered)
        self._enter("shares", kept)
        tables = self._to_each({place: self._keys[place] for place in kept})
        return {name: messages.write(Keys(table), self.terms) for name, table in tables.items()}

    def _deliver(self) -> dict[str, bytes]:
        self._shared = self.terms.kept(self._answered)
        self._enter("rows", self._shared)
        out = {}
        for place in self._shared:
            near = (self.terms.holders(place) & self._shared) - {place}
            sealed = {other: self._sealed[other][place] for other in near}
            out[self.terms.members[place]] = messages.write(Delivery(sealed), self.terms)
        self._sealed.clear()
        return out

    def _announce(self) -> dict[str, bytes]:
        self._rows = frozenset(self._answered)
        self._enter("consents" if self.terms.signed else "unmask", self._rows)
        data = messages.write(Survivors(self._rows), self.terms)
        return dict.fromkeys(self.survivors, data)

    def _send_consents(self) -> dict[str, bytes]:
        self._enter("unmask", frozenset(self._answered))
        tables = self._to_each(self._signatures)
        return {name: messages.write(Consents(table), self.terms) for name, table in tables.items()}

    # -- the sum

    def _unmask(self) -> dict[str, bytes]:
        terms = self.terms
        seeds = [(self._recovered(place), -1) for place in sorted(self._rows)]
        for place in sorted(self._shared - self._rows):
            pair = KeyPair(self._recovered(place))
            for other in sorted(terms.holders(place) & self._rows):
                shared = pair.agree(self._keys[other][KEY : 2 * KEY])
                # The survivor added it where its own place is the lower one.
                seeds.append((crypto.mask_seed(shared, terms, place, other), -1 if other < place else 1))
        masks.apply(self._sum, seeds)
        self._enter("done", frozenset())
        return {}

    def _recovered(self, place: int) -> bytes:
        """A survivor's seed, or the private mask key of who was lost; shares of those who gave a wrong one go last."""
        name = self.terms.members[place]

        def right(secret: bytes) -> bool:
            if place in self._rows:
                return crypto.commitment(secret, self.terms, place) == self._commitments[place]
            return KeyPair(secret).public == self._keys[place][KEY : 2 * KEY]

        shares = self._shares.get(place, {})
        ordered = sorted(shares, key=lambda point: (self.terms.members[point - 1] in self.doubted, point))
        found = shamir.recover({point: shares[point] for point in ordered}, self.terms.threshold, right)
        if found is None:
            raise CohortError(
                f"secure aggregation: the secret of '{name}' could not be put together from {len(shares)} shares, "
                f"{self.terms.threshold} right ones are needed"
            )
        for point in found.apart:
            reason = f"its share of the secret of '{name}' does not fit those that gave it"
            self.doubted.setdefault(self.terms.members[point - 1], Refusal("decode", "secure aggregation", reason))
        return found.secret
