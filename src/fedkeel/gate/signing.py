"""Signatures of releases, by OpenSSF Model Signing with a key of one's own: nothing is asked of a network.

A signature covers the name and the content of every file of a release; it lies beside them, in `model.sig`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from fedkeel.core.errors import InputError
from fedkeel.release.registry import SIGNATURE
from fedkeel.ship import card as cards
from fedkeel.ship.card import ModelCard


def make_keys(directory: Path) -> tuple[Path, Path]:
    """A new pair (secret, public), an elliptic curve's (P-256): `release.key`, for its owner's eyes, and `release.pub`.

    Raises `InputError` where one is there already.
    """
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ec
    except ImportError:
        raise _missing() from None
    secret, public = directory / "release.key", directory / "release.pub"
    made = ec.generate_private_key(ec.SECP256R1())
    pem = serialization.Encoding.PEM
    form = serialization.PrivateFormat.PKCS8
    private = made.private_bytes(pem, form, serialization.NoEncryption())
    told = made.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for path, content, mode in ((secret, private, 0o600), (public, told, 0o644)):
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
                file.write(content)
    except FileExistsError as error:
        raise InputError(f"'{error.filename}' is there already: choose another directory") from None
    except OSError as error:
        raise InputError(f"'{directory}' cannot be written ({error.strerror}): choose another directory") from None
    return secret, public


def check_key(key: Path) -> None:
    """Raises `InputError` for what is no secret key to sign with."""
    with _library("sign", key):
        from cryptography.hazmat.primitives import serialization

        serialization.load_pem_private_key(key.read_bytes(), None)


def sign(directory: Path, key: Path, signature: Path) -> None:
    """Write the signature of all files in a directory. Raises `InputError` for a key that is none."""
    with _library("sign", key):
        from model_signing import signing

        config: Any = signing.Config()  # type: ignore[no-untyped-call]
        config.use_elliptic_key_signer(private_key=key)
        config.set_hashing_config(_all_but(signature))
        config.sign(directory, signature)


def verify(directory: Path, key: Path) -> None:
    """Raises `InputError` unless `model.sig` is the key's signature of all other files there, and of no more."""
    signature = directory / SIGNATURE
    if not signature.is_file():
        raise InputError(f"'{directory}' is not signed: it has no {SIGNATURE}")
    with _library("verify", key, f"'{directory}' is not what was signed"):
        from model_signing import verifying

        config: Any = verifying.Config()  # type: ignore[no-untyped-call]
        config.use_elliptic_key_verifier(public_key=key)
        config.set_hashing_config(_all_but(signature))
        config.verify(directory, signature)


def load_model(directory: Path | str, key: Path | str | None = None) -> tuple[ModelCard, dict[str, Tensor]]:
    """The card and the tensors of a release, for serving: whole, belonging together, and signed if a key is given.

    Nothing is read of the model before the signature is found good. Raises `InputError`.
    """
    if key is not None:
        verify(Path(directory), Path(key))
    return cards.read(Path(directory))


def _all_but(signature: Path) -> Any:
    """Every file counts, also those that version control would leave out."""
    from model_signing import hashing

    config: Any = hashing.Config()  # type: ignore[no-untyped-call]
    return config.set_ignored_paths(paths=[signature], ignore_git_paths=False)


@contextmanager
def _library(task: str, key: Path, refusal: str | None = None) -> Iterator[None]:
    """Its exceptions as ours; `refusal`: what it means where the content is at fault, not the key."""
    if not key.is_file():
        raise InputError(f"key '{key}' does not exist: fedkeel release keys makes a pair")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of its own dependencies
            yield
    except ImportError:
        raise _missing() from None
    except Exception as error:  # it documents ValueError alone, and lets those of its parts through
        said = " ".join(str(error).split())[:160] or type(error).__name__
        if refusal is None:
            raise InputError(f"key '{key}' cannot {task} ({said}): name one that fedkeel release keys made") from None
        raise InputError(f"{refusal} ({said}): get it from the registry again") from None


def _missing() -> InputError:
    return InputError("signatures need their library: pip install 'fedkeel[signing]'")
