"""A Flower app's weights as rows, and back. What a client sends is read as strictly as an envelope."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import NamedTuple

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from flwr.common.constant import SType
from numpy.typing import NDArray
from torch import Tensor

from fedkeel.core.errors import DecodeError, InputError
from fedkeel.core.layout import Entry, Layout
from fedkeel.core.types import Claims

BUFFERS = ("*running_mean", "*running_var")
"""What PyTorch calls the statistics of its normalising layers."""
STEPS = "num-steps"
"""The metric in which a client may say how many steps it took."""
_FLOATS = ("float16", "float32", "float64")
_WHOLE = ("bool", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)))
_DTYPES = {name: np.dtype(name) for name in (*_FLOATS, *_WHOLE)}
_READERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


class Told(NamedTuple):
    """What a client says beside its weights."""

    examples: int
    steps: int
    metrics: Mapping[str, float]


def layout_of(arrays: ArrayRecord, buffers: Sequence[str]) -> Layout:
    """The layout of a model's arrays: floats are columns, those whose names match `buffers` no parameters.

    Arrays of integers (counters) are none: they stay as the app first gave them. Raises `InputError`.
    """
    found = []
    for name, array in arrays.items():
        dtype = _DTYPES.get(array.dtype)
        if array.stype != SType.NUMPY or dtype is None:
            raise InputError(f"array '{name}' is {array.dtype} as '{array.stype}': give numpy arrays of real numbers")
        if array.dtype in _FLOATS:
            buffer = any(fnmatch.fnmatchcase(name, pattern) for pattern in buffers)
            found.append(Entry(name, tuple(array.shape), str(dtype), "buffer" if buffer else "param", not buffer))
    layout = Layout(tuple(sorted(found, key=lambda entry: not entry.trainable)))
    if not layout.params.stop:
        raise InputError("the initial arrays hold no parameter (an array of floats): nothing can be federated")
    return layout


def row_of(arrays: ArrayRecord, layout: Layout, names: Sequence[str]) -> Tensor:
    """The weights (P,), float32, of arrays that must have these names and the layout's shapes and dtypes.

    Raises `DecodeError`; nothing is allocated before the sizes were compared.
    """
    if missing := [name for name in names if name not in arrays]:
        raise DecodeError(f"its arrays lack '{missing[0]}'")
    if len(arrays) > len(names):
        strange = next(name for name in arrays if name not in set(names))
        raise DecodeError(f"its arrays hold '{strange[:64]}', which the model does not")
    parts = [_values(entry, arrays[entry.name]) for entry in layout.entries]
    return torch.from_numpy(np.concatenate([part.astype(np.float32, copy=False) for part in parts]))


def _values(entry: Entry, array: Array) -> NDArray[np.generic]:
    """The array's values, flat, in the order of C."""
    if array.stype != SType.NUMPY:
        raise DecodeError(f"array '{entry.name}' is coded as '{array.stype[:40]}'")
    stream = BytesIO(array.data)
    try:
        shape, fortran, dtype = _READERS[np.lib.format.read_magic(stream)](stream)
    except Exception as error:  # hostile bytes meet numpy's parser
        raise DecodeError(f"array '{entry.name}' is no numpy file ({type(error).__name__})") from None
    if dtype != np.dtype(entry.dtype):
        raise DecodeError(f"array '{entry.name}' is {dtype}, the model's is {entry.dtype}")
    if shape != entry.shape:
        raise DecodeError(f"array '{entry.name}' has shape {str(shape)[:64]}, the model's has {entry.shape}")
    body = memoryview(array.data)[stream.tell() :]
    if len(body) != entry.size * dtype.itemsize:
        raise DecodeError(f"array '{entry.name}' has {len(body)} bytes, its shape is {entry.shape}")
    values = np.frombuffer(body, dtype)
    return values.reshape(shape, order="F").reshape(-1) if fortran else values


def record_of(row: Tensor, layout: Layout, first: ArrayRecord) -> ArrayRecord:
    """The arrays of weights (P,), in the order and dtypes of the first ones, which give those that are no columns."""
    views = layout.views(row)
    made = {}
    for name, array in first.items():
        if name in views:
            array = Array(views[name].numpy().astype(np.dtype(array.dtype)))
        made[name] = array
    return ArrayRecord(made)


def only_arrays(content: RecordDict) -> ArrayRecord:
    """The one record of arrays in a message. Raises `DecodeError`."""
    found = list(content.array_records.values())
    if len(found) != 1:
        raise DecodeError(f"it holds {len(found)} records of arrays, not one")
    return found[0]


def told(content: RecordDict, weighted_by: str, *, steps: int = 1, finite: bool = False) -> Told:
    """What the metrics of a message say, lists left out. Raises `DecodeError`.

    `steps` are those of a client that does not say. Figures that are not finite are left out, or must be `finite`.
    """
    found = list(content.metric_records.values())
    if len(found) != 1:
        raise DecodeError(f"it holds {len(found)} records of metrics, not one")
    own = (weighted_by, STEPS)
    figures = {
        name: float(value) for name, value in found[0].items() if name not in own and not isinstance(value, list)
    }
    metrics = {name: value for name, value in figures.items() if math.isfinite(value)}
    if finite and (strange := figures.keys() - metrics.keys()):
        name = min(strange)
        raise DecodeError(f"its '{name[:64]}' is {figures[name]}")
    return Told(_count(found[0], weighted_by), _count(found[0], STEPS) if STEPS in found[0] else steps, metrics)


def _count(metrics: MetricRecord, name: str) -> int:
    value = metrics.get(name)
    if value is None:
        raise DecodeError(f"its metrics lack '{name[:64]}'")
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if isinstance(value, list) or not whole or not 0 <= value < 2**63:
        raise DecodeError(f"its '{name[:64]}' is {str(value)[:40]}, which is no count")
    return int(value)


def claims_of(said: Told, client: str, task: int, version: int, layout: Layout) -> Claims:
    """A client's claims of a task, of what it says."""
    return Claims(client, task, version, layout.digest, said.examples, said.steps, said.metrics)
