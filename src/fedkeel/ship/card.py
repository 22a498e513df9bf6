"""The model card: what a model expects, what its outputs mean and where it comes from. Canonical JSON beside it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedkeel.core.errors import InputError
from fedkeel.core.layout import Layout
from fedkeel.core.semver import SEMVER
from fedkeel.ship import files, tensors

_FORMAT = 2


@dataclass(frozen=True, slots=True)
class Inputs:
    """One example as the model takes it: its shape, dtype, and in words what was done to the raw data before."""

    shape: tuple[int, ...]
    dtype: str
    normalisation: str


@dataclass(frozen=True, slots=True)
class Parameter:
    """A tensor of the model file."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class Lineage:
    """Which run made the weights: `fingerprint` is `tensors.fingerprint` of the model file's tensors."""

    job: str
    rounds: int
    recipe: str
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Privacy:
    """What was spent on these weights, and the words for it. `epsilon` None: without a bound."""

    epsilon: float | None
    delta: float
    hides: str
    by: str
    counts_on: str
    noise_from: str


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What must match between trainer, server, client and serving, and the lineage of these weights.

    `labels[i]` is the meaning of output i; empty where outputs are no classes. `privacy`: None where
    nothing was promised. `version` is semantic (semver.org).
    """

    version: str
    parameters: tuple[Parameter, ...]
    layout_digest: str
    inputs: Inputs
    labels: tuple[str, ...]
    lineage: Lineage
    privacy: Privacy | None = None

    def __post_init__(self) -> None:
        if not SEMVER.fullmatch(self.version):
            raise InputError(f"model version '{self.version}' is no semantic version: write it like '1.0.0'")

    @property
    def digest(self) -> str:
        """SHA-256 of the card's canonical JSON."""
        return hashlib.sha256(_canonical(asdict(self)).encode()).hexdigest()

    def to_json(self) -> str:
        """Canonical: the same card gives the same text. Its digest is inside."""
        return _canonical(asdict(self) | {"digest": self.digest, "format": _FORMAT}) + "\n"

    @classmethod
    def from_json(cls, text: str) -> ModelCard:
        """Raises `InputError` for text that is no card, of another format, or changed since it was written."""
        try:
            fields: dict[str, Any] = json.loads(text)
            digest, form = fields.pop("digest"), fields.pop("format")
            if form != _FORMAT:
                raise InputError(f"the model card has format {form!r} and this fedkeel reads {_FORMAT}: update fedkeel")
            fields["inputs"] = Inputs(**fields["inputs"] | {"shape": tuple(fields["inputs"]["shape"])})
            fields["parameters"] = tuple(Parameter(**p | {"shape": tuple(p["shape"])}) for p in fields["parameters"])
            fields["labels"] = tuple(fields["labels"])
            fields["lineage"] = Lineage(**fields["lineage"])
            if fields["privacy"] is not None:
                fields["privacy"] = Privacy(**fields["privacy"])
            card = cls(**fields)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"this is no model card ({error}): name a card.json that fedkeel wrote") from None
        if card.digest != digest:
            raise InputError("the model card was changed after it was written: restore it, or write it anew")
        return card


def write(
    directory: Path,
    layout: Layout,
    theta: Tensor,
    *,
    version: str,
    inputs: Inputs,
    labels: tuple[str, ...],
    job: str,
    rounds: int,
    recipe: str,
    privacy: Privacy | None = None,
) -> ModelCard:
    """Write `model.safetensors` (theta (P,) as the module's named tensors, in their dtypes) and `card.json`.

    The file holds what travelled: parameters and float buffers. Private tensors, frozen ones and integer buffers are
    the module's own: load it with `strict=False`.
    """
    dtypes = {entry.name: getattr(torch, entry.dtype) for entry in layout.entries}
    named = {name: value.to(dtypes[name]) for name, value in layout.views(theta).items()}
    parameters = tuple(Parameter(n, tuple(v.shape), str(v.dtype).removeprefix("torch.")) for n, v in named.items())
    lineage = Lineage(job, rounds, recipe, tensors.fingerprint(named))
    card = ModelCard(version, parameters, layout.digest, inputs, labels, lineage, privacy)
    directory.mkdir(exist_ok=True)
    tensors.write(directory / "model.safetensors", named, {"card": card.digest})
    files.write_text(directory / "card.json", card.to_json())
    return card


def read(directory: Path) -> tuple[ModelCard, dict[str, Tensor]]:
    """The card and the tensors beside it. Raises `InputError` unless both are whole and belong together."""
    path = directory / "card.json"
    try:
        card = ModelCard.from_json(path.read_text("utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): name the model directory of a run") from None
    named, _ = tensors.read(directory / "model.safetensors")
    if tensors.fingerprint(named) != card.lineage.fingerprint:
        raise InputError(f"{directory} holds a card and a model that do not belong together: restore both")
    return card, named


def _canonical(value: Mapping[str, Any]) -> str:
    return json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False)
