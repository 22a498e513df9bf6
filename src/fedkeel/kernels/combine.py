"""Weighted sums of rows: one matrix-vector product, right to float32 however many rows there are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fedkeel.kernels import blocks

_ROWS = 32  # summed in U's own precision; such sums are added up in float64
_COLUMNS = 1 << 15


def weighted_sum(U: Tensor, w: Tensor) -> Tensor:
    """sum_i w_i U_i: rows (n, P), coefficients w (n,) float64 -> (P,), of U's dtype.

    Error: at most 34 * 2^-24 * sum_i |w_i U_i| per column for float32, independent of n. Rows with coefficient 0 are
    not read, whatever they hold.
    """
    runs = _runs(w)
    w = w.to(U.device, U.dtype)
    if len(runs) == 1:
        return w[runs[0]] @ U[runs[0]]
    out = torch.empty(U.shape[1], dtype=U.dtype, device=U.device)

    def work(parts: Iterator[slice]) -> None:
        for part in parts:
            total = torch.zeros(part.stop - part.start, dtype=torch.float64, device=U.device)
            for run in runs:
                total += w[run] @ U[run, part]
            out[part] = total

    blocks.share(U.shape[1], _COLUMNS if U.device.type == "cpu" else max(U.shape[1], 1), work)
    return out


def mixed(U: Tensor, M: Tensor, rows: Sequence[int]) -> Tensor:
    """M @ U[rows]: coefficients M (m, k) float64 of the k picked rows -> (m, P), of U's dtype.

    Rows that are not picked are not read. Products and sums are of U's own precision.
    """
    picked = list(rows) != list(range(U.shape[0]))
    M = M.to(U.device, U.dtype)
    out = torch.empty(M.shape[0], U.shape[1], dtype=U.dtype, device=U.device)

    def work(parts: Iterator[slice]) -> None:
        for part in parts:
            torch.mm(M, U[list(rows), part] if picked else U[:, part], out=out[:, part])

    blocks.share(U.shape[1], _COLUMNS if U.device.type == "cpu" else max(U.shape[1], 1), work)
    return out


def _runs(w: Tensor) -> list[slice]:
    """Consecutive rows with coefficients other than 0, at most `_ROWS` at a time."""
    runs: list[slice] = []
    for i in torch.nonzero(w).flatten().tolist():
        if runs and runs[-1].stop == i and i - runs[-1].start < _ROWS:
            runs[-1] = slice(runs[-1].start, i + 1)
        else:
            runs.append(slice(i, i + 1))
    return runs
