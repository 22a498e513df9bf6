"""A module as an ONNX model with a free batch side, and its card inside."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fedkeel.core.errors import InputError
from fedkeel.release.onnx import CARD
from fedkeel.ship.card import ModelCard

if TYPE_CHECKING:
    from onnx import ModelProto

INPUT, OUTPUT = "input", "output"


def write_onnx(module: nn.Module, example: Tensor, card: ModelCard, path: Path) -> None:
    """Write the module's graph, which takes (batch, *example.shape[1:]) as the card says. Raises `InputError`."""
    try:
        import onnx
        import onnxscript  # noqa: F401 (torch asks for it, late and in many words)
    except ImportError:
        raise missing() from None
    batch = torch.export.Dim("batch", min=1, max=1 << 20)
    two = example[:1].repeat_interleave(2, 0)  # torch takes a side of 1 for fixed
    try:
        with _quiet():
            program = torch.onnx.export(
                module.eval(),
                (two,),
                dynamo=True,
                dynamic_shapes=({0: batch},),
                input_names=[INPUT],
                output_names=[OUTPUT],
                verbose=False,
            )
        assert program is not None
        program.optimize()
        made = program.model_proto
    except Exception as error:  # of many kinds, none of them documented
        said = " ".join(str(error).split())[:160]
        raise InputError(f"this model has no ONNX graph ({said}): build it of layers that torch.onnx exports") from None
    made.producer_name = "fedkeel"
    seal(made, card)
    onnx.save(made, str(path))


def seal(model: ModelProto, card: ModelCard) -> None:
    """Put the card into an ONNX model's metadata, where `fedkeel model diff` reads it.

    Sets of operators that no node uses are struck out: tools name them, and a runtime would have to know them.
    """
    kept = [entry for entry in model.metadata_props if entry.key != CARD]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    entry = model.metadata_props.add()
    entry.key, entry.value = CARD, card.to_json()
    used = {_plain(node.domain) for node in model.graph.node} | {""}
    used |= {_plain(node.domain) for function in model.functions for node in function.node}
    asked = [one for one in model.opset_import if _plain(one.domain) in used]
    del model.opset_import[:]
    model.opset_import.extend(asked)


def _plain(domain: str) -> str:
    return "" if domain == "ai.onnx" else domain


def missing() -> InputError:
    """What to say where the libraries are not there."""
    return InputError("export to ONNX needs its libraries: pip install 'fedkeel[export]'")


@contextmanager
def _quiet() -> Iterator[None]:
    """Torch's exporter warns of its own parts, and of torchvision."""
    noisy = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [log.level for log in noisy]
    try:
        for log in noisy:
            log.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in zip(noisy, levels, strict=True):
            log.setLevel(level)
