"""Norms, inner products and distances between rows, right to float32 for any finite float32 rows, 1e38 included.

Columns go through in blocks, so there is never an (n, P) copy. Sums over columns are float64, which squares of float32
values cannot overflow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from fedkeel.kernels import blocks, native

_BLOCK_VALUES = 1 << 18
_DEVICE_VALUES = 1 << 27  # on a GPU a block only bounds the memory
_PART_VALUES = 1 << 20  # less than this is not worth another worker
_MANY_ROWS = 2048  # above, a second (n, n) matrix is not worth it: torch uses its own threads

# A squared distance that is this small beside the two rows' squared norms has lost digits: it is measured again.
_CANCELLED = {torch.float32: 1 / 32, torch.float64: 1e-7}
_ALIKE = 1 << 10  # squared lengths that differ by less than this cost no digits that matter
_RUN = 8192  # columns of one float32 product: its rounding stays below 1e-6 of the sum
_FAINT = 1e-30  # squared norms that float32 products may have underflown in


def sq_norms(U: Tensor) -> Tensor:
    """Squared L2 norms of rows (n, P) -> (n,) float64. NaN or infinite iff a column of the row is."""

    def work(columns: slice) -> Tensor:
        total = torch.zeros(U.shape[0], dtype=torch.float64, device=U.device)
        for source, block in _blocks(U, None, columns, torch.float64):
            block.copy_(source)
            total += torch.linalg.vecdot(block, block)
        return total

    return _sum_over_columns(U, U.shape[0], work)


def sq_norm(row: Tensor) -> float:
    """Squared L2 norm of one row (P,), right to float32. NaN or infinite iff a column is.

    Compiled, all in float64. Without the compiled kernels by float32 products over short runs, summed in float64: a
    third of the cost of `sq_norms`, which takes over where such products overflow or vanish.
    """
    if row.device.type != "cpu" or row.dtype != torch.float32:
        return float(sq_norms(row[None])[0])
    compiled = native.library()
    if not isinstance(compiled, str) and row.is_contiguous():
        return float(compiled.sq_norm(row.data_ptr(), row.numel()))
    values = row.detach().numpy()
    with np.errstate(over="ignore", invalid="ignore"):  # seen below
        parts = [float(np.dot(part, part)) for part in np.split(values, range(_RUN, values.size, _RUN))]
    total = math.fsum(parts)
    return total if _FAINT < total < math.inf else float(sq_norms(row[None])[0])


def cosines(U: Tensor, norms: Tensor, rows: Sequence[int]) -> Tensor:
    """Cosines between the picked rows, (k, k) float64, given all rows' norms (n,) float64, none of them 0.

    Rows are scaled to length 1 before anything is multiplied, so that a long row blurs nobody else's direction.
    """
    lengths = norms[list(rows)].to(U.device)[:, None]

    def work(columns: slice) -> Tensor:
        total = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=U.device)
        for source, block in _blocks(U, rows, columns, torch.float64):
            block.copy_(source)
            block /= lengths
            total += block @ block.T
        return total

    return _sum_over_columns(U, len(rows), work).clamp_(-1, 1)


def along(U: Tensor, direction: Tensor) -> Tensor:
    """Inner products of the rows (n, P) with a direction (P,), (n,) float64, summed in float64."""

    def work(columns: slice) -> Tensor:
        total = torch.zeros(U.shape[0], dtype=torch.float64, device=U.device)
        at = columns.start
        for source, block in _blocks(U, None, columns, torch.float64):
            block.copy_(source)
            total += block @ direction[at : at + block.shape[1]].to(torch.float64)
            at += block.shape[1]
        return total

    return _sum_over_columns(U, U.shape[0], work)


def gram(
    U: Tensor, origin: int | None = None, rows: Sequence[int] | None = None, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Inner products <U_i - o, U_j - o>, (n, n) float64, of the picked `rows` (all by default), without copying them.

    o is row `origin` of those picked, or their mean. Centring comes first, block by block: what the rows have in common
    cancels before anything is squared. `dtype` is that of the products within a block: float32 is twice as fast, right
    to some 1e-8 of the rows' squared norms, and overflows above 1e19.
    """
    n = U.shape[0] if rows is None else len(rows)
    compiled = native.library()
    if (
        dtype == U.dtype == torch.float32
        and U.device.type == "cpu"
        and U.stride(1) == 1
        and not isinstance(compiled, str)
    ):
        return _compiled_gram(compiled, U, range(n) if rows is None else rows, origin)

    def work(columns: slice) -> Tensor:
        total = torch.zeros(n, n, dtype=torch.float64, device=U.device)
        share = torch.full((n,), 1 / n, dtype=dtype, device=U.device)
        for source, block in _blocks(U, rows, columns, dtype):
            if source.dtype == dtype:
                torch.sub(source, share @ source if origin is None else source[origin], out=block)
            else:
                block.copy_(source)
                block -= block.mean(0) if origin is None else block[origin].clone()
            total += block @ block.T
        return total

    return _sum_over_columns(U, n, work)


def gram_about(U: Tensor, origin: int, rows: Sequence[int] | None = None, D: Tensor | None = None) -> Tensor:
    """Inner products of the picked rows less row `origin` of them, each right to some 1e-7 of its two rows' lengths.

    Given their squared distances D (`sq_distances`), from these by the law of cosines where no length is more than 32
    times another, so that little cancels. Else from float32 products where these neither overflow nor vanish, else from
    float64 ones.
    """
    if D is not None and len(D) > 1:
        away = D[origin]
        others = torch.arange(len(D), device=D.device) != origin
        if float(away.max()) <= _ALIKE * float(away[others].min()):
            return (away[:, None] + away[None, :] - D) / 2
    if U.dtype == torch.float32:
        G = gram(U, origin, rows, torch.float32)
        others = torch.arange(len(G), device=G.device) != origin
        if bool(torch.isfinite(G).all() and (G.diagonal()[others] > _FAINT).all()):
            return G
    return gram(U, origin, rows)


def _compiled_gram(library: native.Library, U: Tensor, rows: Sequence[int], origin: int | None) -> Tensor:
    addresses = np.array([U[i].data_ptr() for i in rows], np.uintp)
    n, place = len(addresses), -1 if origin is None else origin

    def work(columns: slice) -> Tensor:
        total = torch.zeros(n, n, dtype=torch.float64)
        if library.gram(addresses.ctypes.data, n, columns.start, columns.stop, place, total.data_ptr()):
            raise MemoryError(f"no memory for the inner products of {n} rows")
        return total

    lower = _sum_over_columns(U, n, work)
    return lower + lower.tril(-1).T


def sq_distances(U: Tensor, rows: Sequence[int] | None = None) -> Tensor:
    """Squared distances between rows (n, P) -> (n, n) float64, symmetric, not negative, exactly 0 on the diagonal.

    One centred Gram matrix, of float32 products in float64 sums for large matrices. Where rows lie so close together,
    beside their distance from the centre, that the difference cancels (one row of 1e38 among rows of 1e-3; two tight
    groups far apart), such a group is measured again about its own mean, and in the end in float64. A row with a NaN or
    an infinity is at distance NaN from every other row, and disturbs no other pair.
    """
    picked = list(range(U.shape[0])) if rows is None else list(rows)
    if U.dtype == torch.float32 and len(picked) * U.shape[1] > _PART_VALUES:
        G = gram(U, rows=rows, dtype=torch.float32)
        g = G.diagonal()
        if bool(torch.isfinite(G).all()) and float(g.min()) > _FAINT:
            D = _distances(U, picked, G, torch.float32)
            if D is not None:
                return D
    return _precisely(U, picked)


def _precisely(U: Tensor, picked: list[int]) -> Tensor:
    """Distances from float64 products."""
    if not picked:
        return torch.zeros(0, 0, dtype=torch.float64, device=U.device)
    G = gram(U, rows=picked)
    if bool(torch.isfinite(G).all()):
        D = _distances(U, picked, G, torch.float64)
        assert D is not None
        return D
    # Some rows are not finite: the checks refuse such rows, and here they must only stay visible.
    D = torch.full(G.shape, torch.nan, dtype=torch.float64, device=U.device).fill_diagonal_(0)
    finite = torch.isfinite(sq_norms(U))
    good = [i for i, row in enumerate(picked) if bool(finite[row])]
    if len(good) < len(picked):
        _measure_again_(D, U, picked, good)
    return D


def _distances(U: Tensor, picked: list[int], G: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Distances from the Gram matrix of products in `dtype`; None when float32 can not tell any rows apart."""
    g = G.diagonal()
    sums = g[:, None] + g[None, :]
    D = (sums - (G + G.T)).clamp_(min=0).fill_diagonal_(0)
    for group in _groups((sums * _CANCELLED[dtype]) >= D):
        if len(group) < len(picked):
            _measure_again_(D, U, picked, group)
        elif dtype == torch.float32:
            return None
    return D


def _measure_again_(D: Tensor, U: Tensor, picked: list[int], group: list[int]) -> None:
    index = torch.tensor(group, dtype=torch.int64, device=U.device)
    D[index[:, None], index] = sq_distances(U, [picked[i] for i in group])


def _groups(close: Tensor) -> list[list[int]]:
    """Connected components, of two rows or more, of a symmetric boolean relation (n, n)."""
    near, left, found = close.cpu(), set(range(close.shape[0])), []
    if int(near.sum()) == len(left):
        return []
    while left:
        group = {min(left)}
        edge = group
        while edge:
            edge = set(torch.nonzero(near[sorted(edge)].any(0)).flatten().tolist()) - group
            group = group | edge
        left -= group
        if len(group) > 1:
            found.append(sorted(group))
    return found


def _blocks(
    U: Tensor, rows: Sequence[int] | None, columns: slice, dtype: torch.dtype
) -> Iterator[tuple[Tensor, Tensor]]:
    """The picked rows, block by block of columns, each with the same working memory of `dtype` for a block's values."""
    n = U.shape[0] if rows is None else len(rows)
    size = max(_BLOCK_VALUES // max(n, 1), 4096) if U.device.type == "cpu" else _DEVICE_VALUES // max(n, 1) + 1
    size = min(size, max(columns.stop - columns.start, 1))
    scratch = torch.empty(n, size, dtype=dtype, device=U.device)
    every = rows is None or list(rows) == list(range(U.shape[0]))
    for part in blocks.spans(columns, size):
        source = U[:, part] if every else U[list(rows or ()), part]
        yield source, scratch[:, : part.stop - part.start]


def _sum_over_columns(U: Tensor, n: int, work: Callable[[slice], Tensor]) -> Tensor:
    """work(all columns), by several workers where that pays."""
    alone = U.device.type != "cpu" or n > _MANY_ROWS
    found = blocks.partials(U.shape[1], U.shape[1] if alone else _PART_VALUES // max(n, 1) + 1, work)
    return torch.stack(found).sum(0) if len(found) > 1 else found[0]
