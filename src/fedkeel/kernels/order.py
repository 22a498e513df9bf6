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
_WEIGHTED_COLUMNS = 1 << 13
NORMAL = 1.4826  # the MAD of normal values times this is their standard deviation
_ROUNDING = 1e-6  # of sums of weights, in float
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
    return _statistic(U, picked, trim, 0)


def mean_around_median(U: Tensor, keep: int, rows: Sequence[int] | None = None) -> Tensor:
    """Per column, the mean of the `keep` values nearest to the median; all else as `trimmed_mean`.

    Sorted, the values kept are a window x_i .. x_(i+keep-1): it moves on from x_j to x_(j+keep) as long as that one is
    nearer to the median. Of two that are as near, the smaller stays.
    """
    picked = list(range(U.shape[0])) if rows is None else list(rows)
    if not 1 <= keep <= len(picked):
        raise ValueError(f"{keep} of {len(picked)} rows can not be kept")
    if keep == len(picked):
        return _statistic(U, picked, 0, 0)
    return _statistic(U, picked, 0, keep)


def usual(values: Tensor) -> tuple[float, float]:
    """The median of values (k,), and 1.4826 times their median absolute deviation (MAD)."""
    middle = float(values.quantile(0.5))
    return middle, NORMAL * float((values - middle).abs().quantile(0.5))


def weighted_trimmed_mean(U: Tensor, weights: Sequence[float], share: float, rows: Sequence[int]) -> Tensor:
    """Per column, the mean of the picked rows' values by their weights, without the `share` of the weight at each end.

    Weights above 0, one a picked row, of sum 1; 0 <= share < 0.5. A value that the cut goes through counts with what
    is left of its weight. All else as `trimmed_mean`.
    """
    picked = list(rows)
    U, out = U.detach(), torch.empty(U.shape[1], dtype=U.dtype, device=U.device)
    compiled = native.library()
    whole = np.array([*weights, share], np.float32)
    fits = U.device.type == "cpu" and U.dtype == torch.float32 and U.stride(1) == 1 and len(picked) <= NETWORK_ROWS
    if fits and not isinstance(compiled, str):
        _compiled(compiled, [U[i].data_ptr() for i in picked], network.sorter(len(picked)), 0, out, whole)
        return out

    def work(parts: Iterator[slice]) -> None:
        for part in parts:
            out[part] = _weighted(U[picked, part], torch.tensor(weights, dtype=torch.float64, device=U.device), share)

    on_cpu = min(_WEIGHTED_COLUMNS, max(_BLOCK_BYTES // (32 * len(picked)), 1))
    blocks.share(U.shape[1], on_cpu if U.device.type == "cpu" else _DEVICE_COLUMNS, work)
    return out


def _weighted(block: Tensor, weights: Tensor, share: float) -> Tensor:
    """(n, columns) -> (columns,): the weighted trimmed mean, by sorting."""
    values, order = block.T.contiguous().sort(dim=1)
    upto = weights[order].cumsum(1)
    below = torch.cat([torch.zeros_like(upto[:, :1]), upto[:, :-1]], 1)
    inside = upto.clamp(max=1 - share) - below.clamp(min=share)
    inside = torch.where(inside > min(_ROUNDING, 0.1 / len(block)), inside, 0.0)
    total = torch.where(inside > 0, values.to(torch.float64) * inside, 0.0).sum(1) / inside.sum(1)
    return torch.where(values[:, -1].isnan(), torch.nan, total).to(block.dtype)


def _statistic(U: Tensor, picked: list[int], trim: int, keep: int) -> Tensor:
    """The trimmed mean, or where `keep` is not 0 the mean of so many values around the median."""
    U, out = U.detach(), torch.empty(U.shape[1], dtype=U.dtype, device=U.device)
    n, compiled = len(picked), native.library()
    plan = None
    if n <= NETWORK_ROWS:
        plan = network.sorter(n) if keep else network.plan(n, trim)
    if U.device.type != "cpu" or U.dtype not in (torch.float32, torch.float64):
        _on_device(U, picked, plan, trim, keep, out)
    elif plan and U.dtype == torch.float32 and U.stride(1) == 1 and not isinstance(compiled, str):
        _compiled(compiled, [U[i].data_ptr() for i in picked], plan, keep, out)
    else:
        _on_cpu([U[i].numpy() for i in picked], plan, trim, keep, out.numpy())
    return out


def _compiled(
    library: native.Library,
    rows: list[int],
    plan: network.Plan,
    keep: int,
    out: Tensor,
    weights: NDArray[np.float32] | None = None,
) -> None:
    """By the compiled kernel: rows by their addresses."""
    addresses, steps = np.array(rows, np.uintp), np.array(plan.comparators, np.int32)
    kept = np.array(plan.kept, np.int32)
    places = (steps.ctypes.data, kept.ctypes.data, out.data_ptr(), weights.ctypes.data if weights is not None else 0)
    described = np.array([len(rows), len(steps), plan.scratch, len(kept), keep, *places], np.int64)

    def work(parts: Iterator[slice]) -> None:
        for part in parts:
            if library.select(described.ctypes.data, addresses.ctypes.data, part.start, part.stop):
                raise MemoryError(f"no memory for the working rows of {len(rows)} rows")

    blocks.share(out.numel(), _COMPILED_COLUMNS, work)


def _on_cpu(rows: list[NDArray[Any]], plan: network.Plan | None, trim: int, keep: int, out: NDArray[Any]) -> None:
    """numpy: its calls cost a third of torch's here, and it lets go of the interpreter lock."""
    n, columns = len(rows), out.size
    least = 1 << 13 if plan else 1  # a sort is long beside its call
    size = min(max(_BLOCK_BYTES // (out.itemsize * n), least), 1 << 15, max(columns, 1))

    def work(parts: Iterator[slice]) -> None:
        scratch = np.empty((plan.scratch if plan else 0, size), out.dtype)
        total = np.empty(size, np.float64)
        for part in parts:
            block = [row[part] for row in rows]
            if plan is None:
                out[part] = _sorted_mean(np.stack(block), trim, keep)
                continue
            kept = _run(plan, block, scratch)
            if keep:
                out[part] = _around([torch.from_numpy(value) for value in kept], keep).numpy()
            else:
                _mean_of(kept, total, out[part])

    blocks.share(columns, size, work)


def _run(plan: network.Plan, block: list[NDArray[Any]], scratch: NDArray[Any]) -> list[NDArray[Any]]:
    """One block of columns through the network: the registers that it keeps."""
    registers = block + list(scratch[:, : block[0].size])
    minimum, maximum = np.minimum, np.maximum
    for is_max, a, b, target in plan.steps:
        (maximum if is_max else minimum)(registers[a], registers[b], out=registers[target])
    return [registers[k] for k in plan.kept]


def _mean_of(kept: list[NDArray[Any]], total: NDArray[np.float64], out: NDArray[Any]) -> None:
    if len(kept) == 1:
        np.copyto(out, kept[0])
        return
    total = total[: out.size]
    with np.errstate(over="ignore", invalid="ignore"):  # of infinite rows; the result shows it
        np.add(kept[0], kept[1], out=total, dtype=np.float64)
        for value in kept[2:]:
            np.add(total, value, out=total)
        np.multiply(total, 1 / len(kept), out=total)  # float64: a mean of equal values still rounds to that value
        np.copyto(out, total, casting="same_kind")


def _around(ordered: Sequence[Tensor], keep: int) -> Tensor:
    """The mean of the `keep` values nearest to the median, of values in order."""
    n = len(ordered)
    middle = ordered[n // 2] if n % 2 else 0.5 * ordered[n // 2 - 1] + 0.5 * ordered[n // 2]
    kept = list(ordered[:keep])
    for j in range(n - keep):
        later = ordered[j + keep]
        kept[j % keep] = torch.where(middle - ordered[j] > later - middle, later, kept[j % keep])
    total = kept[0].to(torch.float64)
    for value in kept[1:]:
        total = total + value
    return (total * (1 / keep)).to(middle.dtype)


def _sorted_mean(block: NDArray[Any], trim: int, keep: int) -> NDArray[Any]:
    """Many rows: sort each column. A NaN counts as the largest value, so it is looked for."""
    values: NDArray[Any] = torch.from_numpy(block).T.contiguous().numpy()  # by tiles: three times as fast as numpy's
    values.sort(axis=1)
    if keep:
        mean: NDArray[Any] = _around(torch.from_numpy(values).unbind(1), keep).numpy()
    else:
        mean = values[:, trim : values.shape[1] - trim].mean(axis=1, dtype=np.float64)
    return np.where(np.isnan(values[:, -1]), np.nan, mean)


def _on_device(U: Tensor, rows: list[int], plan: network.Plan | None, trim: int, keep: int, out: Tensor) -> None:
    n = len(rows)
    for part in blocks.spans(slice(0, out.numel()), _DEVICE_COLUMNS):
        if plan is None:
            ordered = U[rows, part].sort(dim=0).values
            mean = _around(list(ordered), keep) if keep else ordered[trim : n - trim].mean(0, dtype=torch.float64)
            out[part] = torch.where(ordered[-1].isnan(), torch.nan, mean)
            continue
        registers = [U[i, part] for i in rows]
        registers += list(torch.empty(plan.scratch, registers[0].numel(), dtype=U.dtype, device=U.device))
        for is_max, a, b, target in plan.steps:
            (torch.maximum if is_max else torch.minimum)(registers[a], registers[b], out=registers[target])
        kept = [registers[k] for k in plan.kept]
        if keep:
            out[part] = _around(kept, keep)
            continue
        total = kept[0].to(torch.float64)
        for value in kept[1:]:
            total += value
        out[part] = total / len(kept)
