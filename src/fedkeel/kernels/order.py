"""Order statistics per column: a pruned selection network run over cache-sized blocks of columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedkeel.kernels import blocks, native, network

NETWORK_ROWS = 128  # above, the network's n log^2 n comparisons lose to numpy's vectorised sort
_BLOCK_BYTES = 1 << 23  # working rows of one block: longer calls cost two workers fewer waits for each other
_COMPILED_COLUMNS = 1 << 16  # per call: long beside the call's cost, short beside a worker's share
_DEVICE_COLUMNS = 1 << 22  # on a GPU a block only bounds the memory


def trimmed_mean(U: Tensor, trim: int, rows: Sequence[int] | None = None) -> Tensor:
    """Per column, the mean of the values of ranks trim..n-trim-1 (from 0), summed in float64.

    U (n, P) -> (P,), of U's dtype; `rows` picks rows without copying them. Needs n > 2 * trim. trim = (n-1)//2 is the
    median (of an even number of rows: the mean of the middle two). A column that holds a NaN gives NaN, and no column's
    result depends on another column.
    """
    picked = list(range(U.shape[0])) if rows is None else list(rows)
    if len(picked) <= 2 * trim:
        raise ValueError(f"{len(picked)} rows leave nothing to average when {trim} are trimmed at each end")
    U, out = U.detach(), torch.empty(U.shape[1], dtype=U.dtype, device=U.device)
    compiled = native.library()
    if (
        U.device.type == "cpu"
        and U.dtype == torch.float32
        and U.stride(1) == 1
        and len(picked) <= NETWORK_ROWS
        and not isinstance(compiled, str)
    ):
        _compiled(compiled, [U[i].data_ptr() for i in picked], trim, out)
    elif U.device.type == "cpu" and U.dtype in (torch.float32, torch.float64):
        _on_cpu([U[i].numpy() for i in picked], trim, out.numpy())
    else:
        _on_device(U, picked, trim, out)
    return out


def _compiled(library: native.Library, rows: list[int], trim: int, out: Tensor) -> None:
    """By the compiled kernel: rows by their addresses."""
    chosen = network.plan(len(rows), trim)
    addresses, steps = np.array(rows, np.uintp), np.array(chosen.comparators, np.int32)
    kept = np.array(chosen.kept, np.int32)
    places = (steps.ctypes.data, kept.ctypes.data, out.data_ptr())
    described = np.array([len(rows), len(steps), chosen.scratch, len(kept), *places], np.int64)

    def work(parts: Iterator[slice]) -> None:
        for part in parts:
            if library.select(described.ctypes.data, addresses.ctypes.data, part.start, part.stop):
                raise MemoryError(f"no memory for the working rows of {len(rows)} rows")

    blocks.share(out.numel(), _COMPILED_COLUMNS, work)


def _on_cpu(rows: list[NDArray[Any]], trim: int, out: NDArray[Any]) -> None:
    """numpy: its calls cost a third of torch's here, and it lets go of the interpreter lock."""
    n, columns = len(rows), out.size
    chosen = network.plan(n, trim) if n <= NETWORK_ROWS else None
    size = min(max(_BLOCK_BYTES // (out.itemsize * n), 1 << 13), 1 << 15, max(columns, 1))

    def work(parts: Iterator[slice]) -> None:
        scratch = np.empty((chosen.scratch if chosen else 0, size), out.dtype)
        total = np.empty(size, np.float64)
        for part in parts:
            block = [row[part] for row in rows]
            if chosen is None:
                out[part] = _sorted_mean(np.stack(block), trim)
            else:
                _run(chosen, block, scratch, total, out[part])

    blocks.share(columns, size, work)


def _run(
    chosen: network.Plan,
    block: list[NDArray[Any]],
    scratch: NDArray[Any],
    total: NDArray[np.float64],
    out: NDArray[Any],
) -> None:
    """One block of columns through the network."""
    registers = block + list(scratch[:, : out.size])
    minimum, maximum = np.minimum, np.maximum
    for is_max, a, b, target in chosen.steps:
        (maximum if is_max else minimum)(registers[a], registers[b], out=registers[target])
    kept = [registers[k] for k in chosen.kept]
    if len(kept) == 1:
        np.copyto(out, kept[0])
        return
    total = total[: out.size]
    np.add(kept[0], kept[1], out=total, dtype=np.float64)
    for value in kept[2:]:
        np.add(total, value, out=total)
    np.multiply(total, 1 / len(kept), out=total)  # float64: a mean of equal values still rounds to that value
    np.copyto(out, total, casting="same_kind")


def _sorted_mean(block: NDArray[Any], trim: int) -> NDArray[Any]:
    """Many rows: sort each column. A NaN counts as the largest value, so it is looked for."""
    values: NDArray[Any] = torch.from_numpy(block).T.contiguous().numpy()  # by tiles: three times as fast as numpy's
    values.sort(axis=1)
    mean: NDArray[Any] = values[:, trim : values.shape[1] - trim].mean(axis=1, dtype=np.float64)
    return np.where(np.isnan(values[:, -1]), np.nan, mean)


def _on_device(U: Tensor, rows: list[int], trim: int, out: Tensor) -> None:
    n = len(rows)
    chosen = network.plan(n, trim) if n <= NETWORK_ROWS else None
    for part in blocks.spans(slice(0, out.numel()), _DEVICE_COLUMNS):
        if chosen is None:
            ordered = U[rows, part].sort(dim=0).values
            mean = ordered[trim : n - trim].mean(0, dtype=torch.float64)
            out[part] = torch.where(ordered[-1].isnan(), torch.nan, mean)
            continue
        registers = [U[i, part] for i in rows]
        registers += list(torch.empty(chosen.scratch, registers[0].numel(), dtype=U.dtype, device=U.device))
        for is_max, a, b, target in chosen.steps:
            (torch.maximum if is_max else torch.minimum)(registers[a], registers[b], out=registers[target])
        total = registers[chosen.kept[0]].to(torch.float64)
        for k in chosen.kept[1:]:
            total += registers[k]
        out[part] = total / len(chosen.kept)
