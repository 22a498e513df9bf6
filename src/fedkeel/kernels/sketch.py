"""Short stand-ins of long rows: count sketches, whose inner products are those of the rows, give or take little."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fedkeel.kernels import blocks

WIDTH = 2048
"""Columns of a sketch: a cosine of two sketches is off by some 1 / sqrt(WIDTH), 2%."""


def sketch(U: Tensor) -> Tensor:
    """Rows (n, P) -> (n, min(P, WIDTH)) float64: random signs, columns folded onto one another (Charikar et al. 2002).

    The signs are the same in every process and for every P. A row of at most WIDTH columns keeps its inner products
    exactly.
    """
    columns = U.shape[1]
    width = min(columns, WIDTH)
    total = torch.zeros(U.shape[0], width, dtype=torch.float64, device=U.device)
    signs = np.random.Generator(np.random.Philox(key=WIDTH))
    for part in blocks.spans(slice(0, columns), max(width, 1)):
        size = part.stop - part.start
        sign = torch.from_numpy(signs.integers(0, 2, size, dtype=np.int8)).to(U.device, torch.float64) * 2 - 1
        total[:, :size] += U[:, part].to(torch.float64) * sign
    return total
