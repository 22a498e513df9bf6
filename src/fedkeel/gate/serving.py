"""The serving side: is what is deployed what was released?"""

from __future__ import annotations

from pathlib import Path

from fedkeel.core.errors import InputError
from fedkeel.release.describe import describe
from fedkeel.release.registry import Registry, parse
from fedkeel.release.store import measured

_HEX = frozenset("0123456789abcdef")


def drift(path: str, expected: str) -> str | None:
    """Why the model at `path` is not the expected one; None: it is.

    `expected` is a fingerprint of weights (64 hex digits), or a release in a registry (DIR/NAME@STAGE): then every file
    of it that the serving side needs is compared, byte by byte. What cannot be read is not what was released.
    """
    reference = parse(expected)
    if reference is None and not (len(expected) == 64 and _HEX.issuperset(expected)):
        raise InputError(
            f"'{expected[:80]}' is no fingerprint of 64 hex digits and no release: write DIR/NAME@production"
        )
    if reference is not None and _is_file_of(path, *reference):
        return None
    try:
        found = describe(path).weights
    except InputError as error:
        return str(error)
    if reference is None:
        return None if found == expected else f"'{path}' has weights {_short(found)}, expected are {_short(expected)}"
    place, name, which = reference
    with Registry(place) as registry:
        release = registry.find(name, which)
    told = f"'{release.name}' {release.version}"
    if found != release.fingerprint:
        return f"'{path}' has weights {_short(found)}, {told} has {_short(release.fingerprint)}"
    for folder in (Path(path), Path(path) / "model"):
        for file in ("card.json", "model.safetensors"):
            if (folder / file).is_file() and measured(folder / file) != release.files[file]:
                return f"'{folder / file}' is not that of {told}: other bytes, though its weights are the same"
    return None


def _is_file_of(path: str, place: Path, name: str | None, which: str) -> bool:
    """Whether a file is one of a release's, as its exports are, which have weights of their own."""
    if not Path(path).is_file():
        return False
    with Registry(place) as registry:
        return measured(Path(path)) in registry.find(name, which).files.values()


def _short(fingerprint: str | None) -> str:
    return "none" if fingerprint is None else fingerprint[:12]
