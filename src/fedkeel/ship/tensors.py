"""Named tensors on disk: safetensors files whose bytes are canonical, with a digest that is checked on reading."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedkeel.core.errors import InputError
from fedkeel.ship import files

# The safetensors name of each dtype that we write.
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) of named tensors: equal iff names, dtypes, shapes and raw little-endian bytes are equal.

    The order of the mapping, strides and device do not matter. It is taken of the tensors, not of a file, whose
    bytes depend on who wrote it.
    """
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        head = json.dumps([name, _dtype(name, tensor), list(tensor.shape)], separators=(",", ":")).encode()
        total.update(struct.pack("<Q", len(head)))
        total.update(head)
        total.update(_raw(tensor))
    return total.hexdigest()


def write(path: Path, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
    """Write a safetensors file atomically; `info` (JSON values) goes into its metadata, with a digest of it all.

    We lay the file out ourselves: the same content gives the same bytes, nothing is copied as a whole, and a full
    disk is an ordinary `RunError`. Any safetensors reader reads it.
    """
    text = json.dumps(info, sort_keys=True, separators=(",", ":"))
    header: dict[str, Any] = {"__metadata__": {"fedkeel": text, "sha256": _seal(tensors, text)}}
    # Wide dtypes first, so that every tensor lies aligned in a mapped file.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    start = 0
    for name in order:
        stop = start + tensors[name].numel() * tensors[name].element_size()
        dtype, shape = _dtype(name, tensors[name]), list(tensors[name].shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}
        start = stop
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)

    def chunks() -> Iterator[bytes | memoryview]:
        yield struct.pack("<Q", len(head)) + head
        for name in order:
            yield _raw(tensors[name])

    files.write(path, chunks())


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and info of a file that `write` made. Raises `InputError` unless every byte that counts is as written."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a mapping)
        text = metadata["fedkeel"]
        if metadata["sha256"] != _seal(tensors, text):
            raise ValueError("its digest does not match its content")
        info: dict[str, Any] = json.loads(text)
    except KeyError:
        raise InputError(f"{path} was not written by fedkeel: choose a file that it wrote") from None
    except (SafetensorError, OSError, ValueError, RuntimeError, OverflowError) as error:
        raise InputError(f"{path} cannot be read ({error}): choose another file or restore this one") from None
    return tensors, info


def _seal(tensors: Mapping[str, Tensor], text: str) -> str:
    return hashlib.sha256(f"{fingerprint(tensors)}{text}".encode()).hexdigest()


def _dtype(name: str, tensor: Tensor) -> str:
    if tensor.dtype not in _DTYPES:
        raise InputError(f"tensor '{name}' is {tensor.dtype}, which no checkpoint holds: convert it to float32")
    return _DTYPES[tensor.dtype]


def _raw(tensor: Tensor) -> memoryview:
    """The little-endian bytes of a tensor (torch runs on little-endian machines only), not copied if they lie flat."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
