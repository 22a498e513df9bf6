"""Keys, agreement, sealing and signatures: the `cryptography` library's, bound to a session's terms."""

from __future__ import annotations

import hashlib

from fedkeel.core.errors import needs_extra
from fedkeel.secagg.terms import ProtocolError, Terms

with needs_extra("privacy", "secure aggregation"):
    from cryptography.exceptions import InvalidSignature, InvalidTag
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

KEY = 32
SIGNATURE = 64
TAG = 16
_ONCE = bytes(12)


class KeyPair:
    """An X25519 key pair, fresh unless the private half is given."""

    def __init__(self, private: bytes | None = None) -> None:
        make = X25519PrivateKey.from_private_bytes
        self._private = X25519PrivateKey.generate() if private is None else make(private)
        self.public = self._private.public_key().public_bytes_raw()

    @property
    def private(self) -> bytes:
        return self._private.private_bytes_raw()

    def agree(self, public: bytes) -> bytes:
        """The secret shared with the owner of a public key. Raises `ProtocolError` for a point of low order."""
        try:
            return self._private.exchange(X25519PublicKey.from_public_bytes(public))
        except ValueError:
            raise ProtocolError("a public key is a point of low order, with which nothing is secret") from None


def _bound(purpose: str, terms: Terms, *places: int) -> bytes:
    where = b"".join(place.to_bytes(4, "little") for place in places)
    return b"fedkeel secagg 1 " + purpose.encode() + b"\0" + terms.digest + where


def _derived(shared: bytes, info: bytes) -> bytes:
    return HKDF(SHA256(), KEY, None, info).derive(shared)


def mask_seed(shared: bytes, terms: Terms, one: int, other: int) -> bytes:
    """The seed of the mask that two places share, whoever asks."""
    return _derived(shared, _bound("mask", terms, min(one, other), max(one, other)))


def seal(shared: bytes, terms: Terms, sender: int, receiver: int, text: bytes) -> bytes:
    """Encrypt the one message that a place sends another. Its key is used for nothing else, so its nonce is 0."""
    bound = _bound("shares", terms, sender, receiver)
    return ChaCha20Poly1305(_derived(shared, bound)).encrypt(_ONCE, text, bound)


def unseal(shared: bytes, terms: Terms, sender: int, receiver: int, data: bytes) -> bytes | None:
    """What `seal` was given; None where it is not that."""
    bound = _bound("shares", terms, sender, receiver)
    try:
        return ChaCha20Poly1305(_derived(shared, bound)).decrypt(_ONCE, data, bound)
    except InvalidTag:
        return None


def commitment(seed: bytes, terms: Terms, place: int) -> bytes:
    """The SHA-256 by which the server knows a seed again. The seed's 256 bits are what hides it."""
    return hashlib.sha256(_bound("seed", terms, place) + seed).digest()


def keys_text(terms: Terms, place: int, keys: bytes) -> bytes:
    """What a client signs of its two public keys."""
    return _bound("keys", terms, place) + keys


def survivors_text(terms: Terms, survivors: frozenset[int]) -> bytes:
    """What a client signs of a list of survivors."""
    return _bound("survivors", terms, *sorted(survivors))


def signed_by(public: bytes, signature: bytes, text: bytes) -> bool:
    """Whether the owner of an Ed25519 key signed this."""
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, text)
    except (InvalidSignature, ValueError):
        return False
    return True


def sign(private: bytes, text: bytes) -> bytes:
    """An Ed25519 signature, by a private key of 32 bytes."""
    return Ed25519PrivateKey.from_private_bytes(private).sign(text)


def identity() -> tuple[bytes, bytes]:
    """A fresh Ed25519 key pair: private, public."""
    private = Ed25519PrivateKey.generate()
    return private.private_bytes_raw(), private.public_key().public_bytes_raw()
