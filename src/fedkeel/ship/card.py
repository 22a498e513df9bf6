"""The model card: what a model expects, what its outputs mean and where it comes from. Canonical JSON beside it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from semver import Version
from torch import Tensor

from fedkeel.core.errors import InputError
from fedkeel.core.layout import Layout
from fedkeel.ship import files, tensors

_FORMAT = 3
MOST_BYTES = 64 << 20
"""Of a card that is read."""

Side = Annotated[int, Field(ge=0)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class _Ranged(_Part):
    """Something with a unit and a range, in that unit; None: no bound, or none known."""

    unit: str = ""
    low: Finite | None = None
    high: Finite | None = None

    @model_validator(mode="after")
    def _in_order(self) -> _Ranged:
        if self.low is not None and self.high is not None and not self.low <= self.high:
            raise ValueError(f"its range is from {self.low:g} to {self.high:g}: write the lower bound first")
        return self


class Feature(_Ranged):
    """One named column of a table. `default`: what stands for it where a client has none; None: it is required."""

    name: str
    dtype: str = "float32"
    default: Finite | None = None


class Inputs(_Ranged):
    """A tensor that the model takes. `shape`: of one example, None where a side is free; `features` name its last axis.

    `normalisation`: what was done to the raw data before, in words. The range is that of the tensor's values.
    """

    shape: tuple[Side | None, ...]
    dtype: str
    normalisation: str = ""
    name: str = "input"
    features: tuple[Feature, ...] = ()

    @model_validator(mode="after")
    def _named_once(self) -> Inputs:
        names = [feature.name for feature in self.features]
        if names and (len(set(names)) < len(names) or not self.shape or self.shape[-1] not in (None, len(names))):
            raise ValueError(f"{len(names)} features of a shape {self.shape}: name each of its last axis once")
        return self


class Outputs(_Part):
    """A tensor that the model gives; `shape` and None in it as in `Inputs`."""

    shape: tuple[Side | None, ...]
    dtype: str
    name: str = "output"


class Parameter(_Part):
    """A tensor of the model file."""

    name: str
    shape: tuple[Side, ...]
    dtype: str


class Lineage(_Part):
    """Which run made the weights: `fingerprint` is `tensors.fingerprint` of the model file's tensors.

    `data`: name of a part of the data -> its fingerprint; the training data of a deployment is known to its clients
    only. `parent`: the fingerprint of the model that the run began with, None: with fresh weights.
    """

    job: str
    rounds: int
    recipe: str
    fingerprint: str
    data: Mapping[str, str] = {}
    parent: str | None = None


class Privacy(_Part):
    """What was spent on these weights, and the words for it. `epsilon` None: without a bound."""

    epsilon: float | None
    delta: float
    hides: str
    by: str
    counts_on: str
    noise_from: str


class ModelCard(_Part):
    """What must match between trainer, server, client and serving, and the lineage of these weights.

    `labels[i]` is the meaning of output i; empty where outputs are no classes. `preprocessing`: a digest of what turns
    raw data into inputs. `network`: the model in words, as 'mlp(hidden=(64,))'. `privacy`: None where nothing was
    promised. `metrics`: scope ('global', 'group/...') -> figure -> value, None where it is no number. `version` is
    semantic (semver.org). Raises `InputError` where it is not.
    """

    version: str
    parameters: tuple[Parameter, ...]
    layout_digest: str
    inputs: tuple[Inputs, ...]
    outputs: tuple[Outputs, ...]
    labels: tuple[str, ...]
    preprocessing: str
    network: str
    lineage: Lineage
    privacy: Privacy | None = None
    metrics: Mapping[str, Mapping[str, Finite | None]] = {}

    @model_validator(mode="after")
    def _versioned(self) -> ModelCard:
        if not Version.is_valid(self.version):
            raise InputError(f"model version '{self.version[:80]}' is no semantic version: write it like '1.0.0'")
        return self

    @property
    def digest(self) -> str:
        """SHA-256 of the card's canonical JSON."""
        return hashlib.sha256(canonical(self.model_dump(mode="json")).encode()).hexdigest()

    def to_json(self) -> str:
        """Canonical: the same card gives the same text. Its digest is inside."""
        return canonical(self.model_dump(mode="json") | {"digest": self.digest, "format": _FORMAT}) + "\n"

    @classmethod
    def from_json(cls, text: str) -> ModelCard:
        """Raises `InputError` for text that is no card, of another format, or changed since it was written."""
        try:
            fields: dict[str, Any] = json.loads(text)
            digest, form = fields.pop("digest"), fields.pop("format")
            if form != _FORMAT:
                remedy = "update fedkeel" if isinstance(form, int) and form > _FORMAT else "write the model anew"
                raise InputError(f"the model card has format {form!r} and this fedkeel reads {_FORMAT}: {remedy}")
            card = cls.model_validate_json(json.dumps(fields))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise InputError(f"this is no model card ({where}: {first['msg']}): name a card.json of fedkeel") from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(f"this is no model card ({error}): name a card.json that fedkeel wrote") from None
        if card.digest != digest:
            raise InputError("the model card was changed after it was written: restore it, or write it anew")
        return card


def described(named: Mapping[str, Tensor]) -> tuple[Parameter, ...]:
    """Named tensors as a card lists them, in their order."""
    return tuple(
        Parameter(name=name, shape=tuple(value.shape), dtype=str(value.dtype).removeprefix("torch."))
        for name, value in named.items()
    )


def stored(layout: Layout, theta: Tensor) -> dict[str, Tensor]:
    """Theta (P,) as the model file holds it: the module's named tensors, in their dtypes."""
    dtypes = {entry.name: getattr(torch, entry.dtype) for entry in layout.entries}
    return {name: value.to(dtypes[name]) for name, value in layout.views(theta).items()}


def write(directory: Path, card: ModelCard, named: Mapping[str, Tensor]) -> None:
    """Write `model.safetensors` and `card.json`.

    The file holds what travelled: parameters and float buffers. Private tensors, frozen ones and integer buffers are
    the module's own: load it with `strict=False`.
    """
    directory.mkdir(exist_ok=True)
    tensors.write(directory / "model.safetensors", named, {"card": card.digest})
    files.write_text(directory / "card.json", card.to_json())


def read_card(path: Path) -> ModelCard:
    """The card of a `card.json`. Raises `InputError`."""
    try:
        if path.stat().st_size > MOST_BYTES:
            raise InputError(f"{path} is larger than any model card: name a card.json that fedkeel wrote")
        return ModelCard.from_json(path.read_text("utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): name the model directory of a run") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is no text: name a card.json that fedkeel wrote") from None


def read(directory: Path) -> tuple[ModelCard, dict[str, Tensor]]:
    """The card and the tensors beside it. Raises `InputError` unless both are whole and belong together."""
    card = read_card(directory / "card.json")
    named, _ = tensors.read(directory / "model.safetensors")
    if tensors.fingerprint(named) != card.lineage.fingerprint:
        raise InputError(f"{directory} holds a card and a model that do not belong together: restore both")
    listed = {parameter.name: parameter for parameter in card.parameters}
    if listed != {parameter.name: parameter for parameter in described(named)}:
        raise InputError(f"{directory} holds a card that lists other tensors than its model has: restore both")
    return card, named


def canonical(value: Mapping[str, Any]) -> str:
    """One JSON text for one value."""
    return json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False)
