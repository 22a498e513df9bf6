"""What an ONNX file tells of its model. Needs the extra `fedkeel[export]`."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fedkeel.core.errors import InputError
from fedkeel.release.contract import Contract
from fedkeel.ship import tensors
from fedkeel.ship.card import Inputs, ModelCard, Outputs

if TYPE_CHECKING:
    from onnx import ModelProto, ValueInfoProto

CARD = "fedkeel.card"
"""The metadata key under which an exported model carries its card."""
MOST_BYTES = 2 << 30
"""What ONNX's own format can hold."""


def of_onnx(path: Path, source: str) -> Contract:
    """Inputs and outputs by name, what a runtime needs, and the labels of a card inside. Raises `InputError`."""
    model = load(path, source)
    inner = {tensor.name for tensor in model.graph.initializer}
    card = embedded(model, source)
    return Contract(
        source,
        version=card.version if card else None,
        inputs=tuple(_input(item, card) for item in model.graph.input if item.name not in inner),
        outputs=tuple(Outputs(name=i.name, shape=_shape(i), dtype=_dtype(i)) for i in model.graph.output),
        labels=card.labels if card else None,
        preprocessing=card.preprocessing if card else None,
        network=_graph(model),
        sealed=True,
        needs={"IR": model.ir_version}
        | {f"opset {one.domain or 'ai.onnx'}": one.version for one in model.opset_import},
        weights=_weights(model, source),
        card=card.digest if card else None,
    )


def load(path: Path, source: str) -> ModelProto:
    """A whole and valid ONNX model. Raises `InputError`."""
    try:
        import onnx
    except ImportError:
        raise InputError(f"'{source}' is ONNX, and onnx is not installed: pip install 'fedkeel[export]'") from None
    if path.stat().st_size > MOST_BYTES:
        raise InputError(f"'{source}' is larger than 2 GiB, which ONNX cannot hold: name another file")
    try:
        model = onnx.load(str(path))
        onnx.checker.check_model(model)
    except Exception as error:  # protobuf's and onnx's own, of many kinds
        said = " ".join(str(error).split())[:160]
        raise InputError(f"'{source}' is no valid ONNX model ({said}): export it again") from None
    return model


def embedded(model: ModelProto, source: str) -> ModelCard | None:
    """The card that fedkeel's export put in."""
    for entry in model.metadata_props:
        if entry.key == CARD:
            try:
                return ModelCard.from_json(entry.value)
            except InputError as error:
                raise InputError(f"'{source}' carries a card that is not valid: {error}") from None
    return None


def _input(item: ValueInfoProto, card: ModelCard | None) -> Inputs:
    """As the graph has it; unit, range and features from the card, where there is one."""
    known: dict[str, Any] = {}
    if card is not None and len(card.inputs) == 1:
        kept = card.inputs[0]
        known = {key: getattr(kept, key) for key in ("unit", "low", "high", "normalisation", "features")}
    return Inputs(name=item.name, shape=_shape(item), dtype=_dtype(item), **known)


def _shape(item: ValueInfoProto) -> tuple[int | None, ...]:
    sides = item.type.tensor_type.shape.dim
    return tuple(side.dim_value if side.HasField("dim_value") else None for side in sides)


def _dtype(item: ValueInfoProto) -> str:
    from onnx import helper

    kind = item.type.tensor_type.elem_type
    return np.dtype(helper.tensor_dtype_to_np_dtype(kind)).name if kind else item.type.WhichOneof("value") or "unknown"


def _graph(model: ModelProto) -> str:
    """A digest of the computation in which no inner name counts: tensors are numbered as they are met."""
    numbers: dict[str, int] = {}

    def number(name: str) -> int:
        return numbers.setdefault(name, len(numbers)) if name else -1

    for item in model.graph.input:
        number(item.name)
    rows: list[Any] = []
    for node in model.graph.node:
        attributes = sorted(hashlib.sha256(a.SerializeToString(deterministic=True)).hexdigest() for a in node.attribute)
        ins, outs = [number(name) for name in node.input], [number(name) for name in node.output]
        rows.append([node.domain, node.op_type, ins, outs, attributes])
    rows += sorted([number(t.name), t.data_type, list(t.dims)] for t in model.graph.initializer)
    rows.append([number(item.name) for item in model.graph.output])
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _weights(model: ModelProto, source: str) -> str:
    """The fingerprint of the graph's constants by the order of their use: exporters name them as they like."""
    from onnx import numpy_helper

    used = {name: None for node in model.graph.node for name in node.input}
    held = {tensor.name: tensor for tensor in model.graph.initializer}
    named = {}
    for at, name in enumerate([name for name in used if name in held]):
        try:
            named[f"{at:06d}"] = torch.from_numpy(np.array(numpy_helper.to_array(held[name])))
        except (TypeError, ValueError) as error:
            raise InputError(f"'{source}': constant '{name[:60]}' cannot be read ({error}): export it again") from None
    return tensors.fingerprint(named)
