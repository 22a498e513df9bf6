"""Smaller numbers for an ONNX model: schemes of eight bits, tried one after the other, and half floats."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from torch import Tensor

from fedkeel.core.errors import InputError
from fedkeel.edge.graph import INPUT, missing


@dataclass(frozen=True, slots=True)
class Scheme:
    """How to make eight bits of floats. `static`: activations too, by ranges seen on calibration examples.

    Weights are signed and have a scale a channel. `unsigned` activations multiply faster on x86; with weights of eight
    bits their products overflow 16 bits on CPUs without VNNI, which `reduced` (weights of seven bits) avoids.
    """

    name: str
    static: bool
    unsigned: bool
    reduced: bool


SCHEMES = (
    Scheme("static, unsigned activations, 7-bit weights", True, True, True),
    Scheme("static, unsigned activations, 8-bit weights", True, True, False),
    Scheme("static, signed activations, 8-bit weights", True, False, False),
    Scheme("dynamic, 8-bit weights", False, True, False),
)


def quantise(source: Path, target: Path, scheme: Scheme, calibration: Tensor) -> None:
    """Write the eight-bit form of an ONNX model. `calibration` (n, ...): inputs as the model takes them."""
    with _library(), TemporaryDirectory(prefix="fedkeel-") as folder:
        from onnxruntime import quantization as q
        from onnxruntime.quantization.shape_inference import quant_pre_process

        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(str(source), str(prepared))
        if not scheme.static:
            q.quantize_dynamic(str(prepared), str(target), per_channel=True, weight_type=q.QuantType.QInt8)
            return
        examples: Iterator[dict[str, Any]] = iter([{INPUT: x[None].numpy()} for x in calibration])

        class Reader(q.CalibrationDataReader):  # type: ignore[misc]
            def get_next(self) -> dict[str, Any] | None:
                return next(examples, None)

        q.quantize_static(
            str(prepared),
            str(target),
            Reader(),
            quant_format=q.QuantFormat.QDQ,
            per_channel=True,
            reduce_range=scheme.reduced,
            activation_type=q.QuantType.QUInt8 if scheme.unsigned else q.QuantType.QInt8,
            weight_type=q.QuantType.QInt8,
        )


def halve(source: Path, target: Path) -> None:
    """Write a model whose weights and sums are half floats; its inputs and outputs stay as they are."""
    with _library():
        import onnx
        from onnxruntime.transformers.float16 import convert_float_to_float16

        model = onnx.load(str(source))
        large = [t.name for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT and _beyond(t)]
        if large:
            raise InputError(
                f"tensor '{large[0]}' has values beyond those of half floats (65504): export to another target"
            )
        onnx.save(convert_float_to_float16(model, keep_io_types=True), str(target))


def _beyond(tensor: Any) -> bool:
    from onnx import numpy_helper

    return bool(np.abs(numpy_helper.to_array(tensor)).max(initial=0.0) > np.finfo(np.float16).max)


@contextmanager
def _library() -> Iterator[None]:
    """ONNX Runtime's tools, without what they log and warn of."""
    root, level = logging.getLogger(), logging.getLogger().level
    try:
        root.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except ImportError:
        raise missing() from None
    except InputError:
        raise
    except Exception as error:
        said = " ".join(str(error).split())[:160]
        raise InputError(f"this model cannot be made smaller ({said}): export it with --target onnx") from None
    finally:
        root.setLevel(level)
