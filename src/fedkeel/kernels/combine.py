"""Weighted sums of rows: one matrix-vector product, right to float32 however many rows there are."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fedkeel.kernels import blocks

_ROWS = 32  # summed in U's own precision; such sums are added up in float64
_COLUMNS = 1 << 14


def weighted_sum(U: Tensor, w: Tensor) -> Tensor:
    """sum_i w_i U_i: rows (n, P), coefficients w (n,) float64 -> (P,), of U's dtype.

    Error: at most 34 * 2^-24 * sum_i |w_i U_i| per column for float32, independent of n. Rows with coefficient 0 count
    for nothing, whatever they hold.
    """
    w = w.to(U.device)
    total = _sum(U, w)
    used = w != 0
    if not bool(used.all()) and not bool(torch.isfinite(total).all()):
        return _sum(U[used], w[used])  # 0 * inf is NaN; only rows that no check let in come here
    return total


def _sum(U: Tensor, w: Tensor) -> Tensor:
    chunks = [slice(start, start + _ROWS) for start in range(0, len(w), _ROWS)]
    chunks = [chunk for chunk in chunks if bool(w[chunk].any())]
    coefficients = w.to(U.dtype)
    if len(chunks) == 1:
        return coefficients[chunks[0]] @ U[chunks[0]]
    out = torch.empty(U.shape[1], dtype=U.dtype, device=U.device)

    def work(parts: Iterator[slice]) -> None:
        for part in parts:
            total = torch.zeros(part.stop - part.start, dtype=torch.float64, device=U.device)
            for chunk in chunks:
                total += coefficients[chunk] @ U[chunk, part]
            out[part] = total

    blocks.share(U.shape[1], _COLUMNS if U.device.type == "cpu" else max(U.shape[1], 1), work)
    return out
