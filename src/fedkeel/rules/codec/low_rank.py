"""Matrices as products of thin ones."""

from __future__ import annotations

import math
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fedkeel.core.errors import DecodeError
from fedkeel.core.keys import Key
from fedkeel.core.layout import Entry, Layout
from fedkeel.core.registry import rule
from fedkeel.core.types import Codec
from fedkeel.kernels.quantise import LARGEST, Codes, Floats
from fedkeel.rules.codec.common import by_row, require_size, shared


@rule("codec")
def power_sgd(
    layout: Layout, *, rank: Annotated[int, Field(ge=1)] = 2, iterations: Annotated[int, Field(ge=1)] = 2
) -> Codec:
    """Each matrix (m, n) as a product of rank `rank`, by subspace iteration from the key. For use with error feedback.

    Vogels et al. 2019, "PowerSGD", algorithm 1, without its warm start, as a codec keeps nothing between rounds: from a
    Gaussian Q (n, rank), `iterations` times P = orthonormalise(M Q), Q = M^T P. A tensor of more dimensions is a matrix
    by its first one (a convolution: out x the rest). Tensors for which this saves nothing (vectors) travel as float32.
    A column of M is off by at most its L2 norm. Payload, tensor by tensor: the largest magnitude, P (m, rank) and
    Q (n, rank) of M divided by it, all float32: 4 (1 + rank (m + n)) bytes a matrix, 4 bytes a column of the others.
    """
    tensors = [(columns, _shape(entry), _thin(_shape(entry), rank)) for entry, columns in shared(layout)]
    sizes = [1 + rank * sum(shape) if thin else math.prod(shape) for _, shape, thin in tensors]
    size = 4 * sum(sizes)

    def encode(row: Floats, key: Key) -> Codes:
        parts = []
        for place, (columns, shape, thin) in enumerate(tensors):
            values = row[columns]
            if thin:
                start = key.fold(place).numpy().standard_normal((shape[1], rank), np.float32)
                values = _factors(values.reshape(shape), start, iterations)
            parts.append(values)
        return np.concatenate([np.zeros(0, np.float32), *parts]).astype("<f4").view(np.uint8)

    def decode(payload: memoryview, out: Tensor) -> None:
        require_size(payload, size, f"{len(tensors)} tensors by rank {rank}")
        values = torch.from_numpy(np.frombuffer(payload, "<f4").astype(np.float32))
        at = 0
        for (columns, shape, thin), length in zip(tensors, sizes, strict=True):
            found = values[at : at + length]
            out[columns] = _product(found, shape, rank).reshape(-1) if thin else found
            at += length

    def error(row: Tensor) -> Tensor:
        bound = torch.zeros_like(row)
        for columns, shape, thin in tensors:
            if thin:
                norms = row[columns].view(shape).double().norm(dim=0) * 1.001 + 1e-44
                bound[columns] = norms.to(torch.float32).expand(shape).reshape(-1)
        return bound

    return Codec(by_row(encode), decode, lambda _: size, error, exact=True)


def _shape(entry: Entry) -> tuple[int, int]:
    """(m, n): the first dimension, and all others."""
    first = entry.shape[0] if entry.shape else 1
    return first, entry.size // first


def _thin(shape: tuple[int, int], rank: int) -> bool:
    """Whether two thin matrices are smaller than the one."""
    return 1 + rank * sum(shape) < math.prod(shape)


def _factors(matrix: Floats, start: Floats, iterations: int) -> Floats:
    """The largest magnitude, then P and Q of the matrix divided by it; NaN for one that is not finite."""
    peak = np.abs(matrix).max()
    rank = start.shape[1]
    if not np.isfinite(peak) or peak == 0:
        return np.concatenate([[np.nan if peak else 0], np.zeros(rank * sum(matrix.shape))]).astype(np.float32)
    M, Q = torch.from_numpy(matrix / peak), torch.from_numpy(start)
    for _ in range(iterations):
        P = torch.linalg.qr(M @ Q).Q
        Q = M.T @ P
    return np.concatenate([[peak], P.reshape(-1).numpy(), Q.reshape(-1).numpy()]).astype(np.float32)


def _product(values: Tensor, shape: tuple[int, int], rank: int) -> Tensor:
    """The matrix of `_factors`' numbers. Raises `DecodeError` for numbers that it would not have written."""
    peak, middle = float(values[0]), 1 + rank * shape[0]
    if not bool(torch.isfinite(values[1:]).all()) or peak < 0 or math.isinf(peak):
        raise DecodeError("a low-rank factor is not finite")
    product: Tensor = values[1:middle].view(shape[0], rank) @ values[middle:].view(shape[1], rank).T
    return product.mul_(peak).clamp_(-LARGEST, LARGEST)
