"""What travels between server and nodes, as Flower's records: orders down, envelopes or reasons up.

Nothing that comes in is trusted: any content gives an `Order`, an envelope's bytes, a reason, or a `DecodeError`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence, Set
from typing import NamedTuple

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from torch import Tensor

import fedkeel
from fedkeel import plugins
from fedkeel.core.errors import DecodeError
from fedkeel.round.coordinator import Train
from fedkeel.world.carded import CARD, offer
from fedkeel.world.clients import Base
from fedkeel.world.federation import Federation

_OF_THE_HOST = ("train.device", "train.workers", "train.backend", "model.start", "model.version")
"""What a host chooses for itself; the version goes with the card."""
_PLUGIN = "plugin "
ORDER, MODEL, UPDATE, FAILURE = "fedkeel.order", "fedkeel.model", "fedkeel.update", "fedkeel.failure"
FIGURES, SUM = "fedkeel.figures", "fedkeel.sum"
_VECTOR, _ENVELOPE = "fedkeel.float32", "fedkeel.envelope"
_CONTROL, _WAY, _STEP = "control/", "step/", "fedkeel.step"
MOST_FIGURE = 1e30
"""The largest figure of a client's own model that is believed; what is not a number is one that diverged."""
MOST_WORDS = 500
"""Characters of a node's reason that are kept."""


class Order(NamedTuple):
    """What a node is asked for: the work, and the model to begin with; or the coded steps to it from `train.have`."""

    train: Train
    theta: Tensor | None
    steps: tuple[bytes, ...]
    control: Mapping[str, Tensor]


def agreement(federation: Federation) -> dict[str, str]:
    """What server and client must have alike, so that an update means the same to both; a text or digest of each."""
    job, promised = federation.job.model_dump(mode="json"), federation.plan.privacy
    found = {"fedkeel": fedkeel.__version__, "seed": str(job["seed"]), CARD: offer(federation)}
    for section in ("train", "model", "client"):
        found |= {f"{section}.{key}": str(value)[:80] for key, value in job[section].items()}
    found |= {f"privacy.{key}": str(value)[:80] for key, value in job["privacy"].items()}
    if promised is not None:  # what it comes to depends on the rounds, the cohort and the selector as well
        found["privacy: noise"] = f"{promised.noise:.6g} in at most {promised.most_uses} rounds"
    found |= {f"secagg.{key}": str(job["secagg"][key]) for key in ("size", "norm")}
    found |= {f"server.{key}": str(job["server"][key]) for key in ("codec", "zstd")}
    for key in _OF_THE_HOST:
        del found[key]
    texts = plugins.read(federation.job.plugins)
    return found | {f"{_PLUGIN}{name}": hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in texts.items()}


def version(offered: str) -> str | None:
    """The version that a card declares, before it is read as a whole; None where it is no card."""
    try:
        return str(json.loads(offered)["version"])
    except (ValueError, KeyError, TypeError):
        return None


def differing(ours: Mapping[str, str], theirs: Mapping[str, str], upgrade: bool = False) -> str | None:
    """In what a server's agreement differs from a client's, in words, their cards aside; None: in nothing.

    `upgrade`: the two declare different versions of the model; what makes the model and the data may then differ.
    """
    for name in sorted((ours.keys() | theirs.keys()) - {CARD}):
        if upgrade and name.startswith(_PLUGIN):
            continue
        mine, other = ours.get(name, "none"), theirs.get(name, "none")
        if mine != other:
            return f"{name} is {other[:40]} at the server and {mine[:40]} here"
    return None


def model_record(base: Base, steps: Sequence[bytes] | None = None) -> ArrayRecord:
    """The model's way down, in full or in steps; one record for all who are sent the same: Flower stores it once."""
    record = ArrayRecord()
    if steps is None:
        record["theta"] = _array(base.theta)
    for at, step in enumerate(steps or ()):
        record[f"{_WAY}{at:06d}"] = Array("uint8", (len(step),), _STEP, step)
    for name, vector in base.control.items():
        record[_CONTROL + name] = _array(vector)
    return record


def _array(vector: Tensor) -> Array:
    flat = vector.detach().cpu().to(torch.float32).contiguous()
    array = Array("float32", tuple(flat.shape), _VECTOR, b"")
    array.__dict__["data"] = flat.numpy().data.cast("B")  # Flower cuts it into parts: the model itself is not copied
    return array


def order_content(order: Train, model: ArrayRecord, agreed: Mapping[str, str]) -> RecordDict:
    config: dict[str, int | float | str] = {
        "client": order.client,
        "task": order.task,
        "round": order.round,
        "version": order.version,
        "settled": -1 if order.settled is None else order.settled,
        "factor": order.factor,
        "have": order.have,
        "agreement": json.dumps(dict(agreed), sort_keys=True),
    }
    return RecordDict({ORDER: ConfigRecord({**config}), MODEL: model})


def read_order(content: RecordDict, columns: int) -> Order:
    """An order for a model of so many columns. Raises `DecodeError`."""
    config, model = _parts(content)
    whole = {name: _whole(config, name) for name in ("task", "round", "version", "settled", "have")}
    client, factor = config.get("client"), config.get("factor")
    if not isinstance(client, str) or not isinstance(factor, float) or not 0 < factor < math.inf:
        raise DecodeError("the order's client or factor is not valid")
    vectors = {name: _vector(array, columns) for name, array in model.items() if not name.startswith(_WAY)}
    control = {n.removeprefix(_CONTROL): v for n, v in vectors.items() if n.startswith(_CONTROL)}
    steps = tuple(bytes(array.data) for name, array in sorted(model.items()) if name.startswith(_WAY))
    settled = None if whole["settled"] < 0 else whole["settled"]
    train = Train(client, whole["task"], whole["round"], whole["version"], None, settled, factor, whole["have"])
    if "theta" not in vectors and (train.have < 0 or len(steps) != train.version - train.have):
        raise DecodeError(f"the order has neither a model nor the way to {train.version} from {train.have}")
    return Order(train, vectors.get("theta"), steps, control)


def read_agreement(content: RecordDict) -> dict[str, str]:
    """What the server of an order has, for `differing`; known before the rest can be read. Raises `DecodeError`."""
    config, _ = _parts(content)
    try:
        agreed = json.loads(str(config.get("agreement")))
        return {str(name): str(value) for name, value in agreed.items()}
    except (ValueError, AttributeError, RecursionError):
        raise DecodeError("the order's agreement is not valid") from None


def _parts(content: RecordDict) -> tuple[ConfigRecord, ArrayRecord]:
    config, model = content.get(ORDER), content.get(MODEL)
    if not isinstance(config, ConfigRecord) or not isinstance(model, ArrayRecord):
        raise DecodeError(f"it holds {sorted(content)[:5]}, not a fedkeel order")
    return config, model


def _whole(config: ConfigRecord, name: str) -> int:
    value = config.get(name)
    if type(value) is not int or not -1 <= value < 2**53:
        raise DecodeError(f"the order's {name} is not valid")
    return value


def _vector(array: Array, columns: int) -> Tensor:
    if array.stype != _VECTOR or len(array.data) != 4 * columns:
        raise DecodeError(
            f"an array of {len(array.data)} bytes, as '{array.stype[:40]}', is not one of {columns} columns"
        )
    vector = torch.from_numpy(np.frombuffer(array.data, "<f4").astype(np.float32))
    if not bool(vector.isfinite().all()):
        raise DecodeError("an array has values that are no numbers")
    return vector


def update_content(envelope: bytes) -> RecordDict:
    array = Array("uint8", (len(envelope),), _ENVELOPE, envelope)
    return RecordDict({UPDATE: ArrayRecord({"envelope": array})})


def sum_content(data: bytes) -> RecordDict:
    """A message of secure aggregation, down or up."""
    return RecordDict({SUM: ArrayRecord({"message": Array("uint8", (len(data),), _ENVELOPE, data)})})


def read_sum(content: RecordDict) -> memoryview | str:
    """A message of secure aggregation, or the node's reason why there is none. Raises `DecodeError`."""
    failure, found = content.get(FAILURE), content.get(SUM)
    if isinstance(failure, ConfigRecord):
        return in_words(failure.get("why"))
    if not isinstance(found, ArrayRecord) or set(found) != {"message"}:
        raise DecodeError("it holds no message of secure aggregation")
    return memoryview(found["message"].data)


def failure_content(why: str) -> RecordDict:
    return RecordDict({FAILURE: ConfigRecord({"why": why[:MOST_WORDS]})})


def figures_content(values: Mapping[str, float], examples: int) -> RecordDict:
    return RecordDict({FIGURES: ConfigRecord({"examples": examples, **values})})


def read_figures(content: RecordDict, names: Set[str]) -> tuple[dict[str, float], int]:
    """What a client measured of its own model, and on how many examples. Raises `DecodeError`."""
    failure, found = content.get(FAILURE), content.get(FIGURES)
    if isinstance(failure, ConfigRecord):
        raise DecodeError(in_words(failure.get("why")))
    if not isinstance(found, ConfigRecord) or set(found) != {"examples", *names}:
        raise DecodeError(f"it holds {[str(name)[:40] for name in sorted(content)[:5]]}, not the figures asked for")
    examples, values = found["examples"], {name: found[name] for name in sorted(names)}
    if type(examples) is not int or not 0 < examples < 2**53:
        raise DecodeError("its number of examples is not valid")
    figures: dict[str, float] = {}
    for name, value in values.items():
        if (
            not isinstance(value, float)
            or abs(value) > MOST_FIGURE
            or (name.endswith("accuracy") and not 0 <= value <= 1)
        ):
            raise DecodeError(f"its {name} is not valid")
        figures[name] = value
    return figures, examples


def in_words(reason: object) -> str:
    """A node's reason, on one line and not too long."""
    return " ".join(str(reason or "no reason was given").split())[:MOST_WORDS]


def read_reply(content: RecordDict) -> memoryview | str:
    """The envelope, or the node's reason why there is none. Raises `DecodeError`."""
    failure, update = content.get(FAILURE), content.get(UPDATE)
    if isinstance(failure, ConfigRecord):
        return in_words(failure.get("why"))
    if not isinstance(update, ArrayRecord) or set(update) != {"envelope"}:
        raise DecodeError(f"it holds {[str(name)[:40] for name in sorted(content)[:5]]}, not a fedkeel update")
    return memoryview(update["envelope"].data)
