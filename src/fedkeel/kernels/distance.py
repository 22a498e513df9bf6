"""Norms, inner products and distances between rows, right to float32 for any finite float32 rows, 1e38 included.

Columns go through float64 in blocks, so there is never an (n, P) copy; squares of float32 values cannot overflow it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from fedkeel.kernels import blocks

_BLOCK_VALUES = 1 << 18  # float64 values of one block: 2 MiB
_PART_VALUES = 1 << 20  # less than this is not worth another worker
_DEVICE_VALUES = 1 << 27  # on a GPU a block only bounds the memory
_MANY_ROWS = 2048  # above, a second (n, n) matrix is not worth it: torch uses its own threads
_CANCELLED = 1e-7  # a squared distance this small beside the rows' squared norms has lost digits: measure it again


def sq_norms(U: Tensor) -> Tensor:
    """Squared L2 norms of rows (n, P) -> (n,) float64. NaN or infinite iff a column of the row is."""

    def work(columns: slice) -> Tensor:
        total = torch.zeros(U.shape[0], dtype=torch.float64, device=U.device)
        for block in _float64_blocks(U, None, columns):
            total += torch.linalg.vecdot(block, block)
        return total

    return _sum_over_columns(U, U.shape[0], work)


def gram(U: Tensor, origin: int | None = None, rows: Sequence[int] | None = None) -> Tensor:
    """Inner products <U_i - o, U_j - o>, (n, n) float64, of the picked `rows` (all by default), without copying them.

    o is row `origin` of those picked, or their mean. Centring comes first, block by block: what the rows have in
    common cancels exactly before anything is squared.
    """
    n = U.shape[0] if rows is None else len(rows)

    def work(columns: slice) -> Tensor:
        total = torch.zeros(n, n, dtype=torch.float64, device=U.device)
        for block in _float64_blocks(U, rows, columns):
            block -= block.mean(0) if origin is None else block[origin].clone()
            total.addmm_(block, block.T)
        return total

    return _sum_over_columns(U, n, work)


def sq_distances(U: Tensor, rows: Sequence[int] | None = None) -> Tensor:
    """Squared distances between rows (n, P) -> (n, n) float64, symmetric, not negative, exactly 0 on the diagonal.

    One centred Gram matrix. Where rows lie so close together beside their distance from the centre that the
    difference cancels (one row of 1e38 among rows of 1e-3; two tight groups far apart), such a group is measured
    again about its own mean. A row with a NaN or an infinity is at distance NaN from every other row, and disturbs no
    other pair.
    """
    picked = list(range(U.shape[0])) if rows is None else list(rows)
    if not picked:
        return torch.zeros(0, 0, dtype=torch.float64, device=U.device)
    G = gram(U, rows=rows)
    if not bool(torch.isfinite(G).all()):
        return _finite_part(U, picked)
    g = G.diagonal()
    sums = g[:, None] + g[None, :]
    D = (sums - (G + G.T)).clamp_(min=0)
    D.fill_diagonal_(0)
    close = (sums * _CANCELLED) >= D
    for group in _groups(close):
        if 1 < len(group) < len(picked):
            index = torch.tensor(group, device=U.device)
            D[index[:, None], index] = sq_distances(U, [picked[i] for i in group])
    return D


def _finite_part(U: Tensor, picked: list[int]) -> Tensor:
    """Distances when some rows are not finite (what the checks refuse; here it must only stay visible)."""
    D = torch.full((len(picked), len(picked)), torch.nan, dtype=torch.float64, device=U.device)
    D.fill_diagonal_(0)
    finite = torch.isfinite(sq_norms(U))
    good = [i for i, row in enumerate(picked) if bool(finite[row])]
    index = torch.tensor(good, dtype=torch.int64, device=U.device)
    if len(good) < len(picked):
        D[index[:, None], index] = sq_distances(U, [picked[i] for i in good])
    return D


def _groups(close: Tensor) -> list[list[int]]:
    """Connected components of a symmetric boolean relation (n, n)."""
    if int(close.sum()) == close.shape[0]:
        return []
    near, left, found = close.cpu(), set(range(close.shape[0])), []
    while left:
        group = {min(left)}
        edge = group
        while edge:
            edge = set(torch.nonzero(near[sorted(edge)].any(0)).flatten().tolist()) - group
            group = group | edge
        left -= group
        found.append(sorted(group))
    return found


def _float64_blocks(U: Tensor, rows: Sequence[int] | None, columns: slice) -> Iterator[Tensor]:
    """The picked rows, block by block of columns, each time in the same working memory."""
    n = U.shape[0] if rows is None else len(rows)
    size = max(_BLOCK_VALUES // max(n, 1), 4096) if U.device.type == "cpu" else _DEVICE_VALUES // max(n, 1) + 1
    size = min(size, max(columns.stop - columns.start, 1))
    scratch = torch.empty(n, size, dtype=torch.float64, device=U.device)
    for part in blocks.spans(columns, size):
        block = scratch[:, : part.stop - part.start]
        block.copy_(U[:, part] if rows is None else U[list(rows), part])
        yield block


def _sum_over_columns(U: Tensor, n: int, work: Callable[[slice], Tensor]) -> Tensor:
    """work(all columns), by several workers where that pays."""
    alone = U.device.type != "cpu" or n > _MANY_ROWS
    found = blocks.partials(U.shape[1], U.shape[1] if alone else _PART_VALUES // max(n, 1) + 1, work)
    return torch.stack(found).sum(0) if len(found) > 1 else found[0]
