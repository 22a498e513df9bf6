"""Short stand-ins of long rows: count sketches, whose inner products are those of the rows, give or take little."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from fedkeel.kernels import blocks

WIDTH = 2048
"""Columns of a sketch: a cosine of two sketches is off by some 1 / sqrt(WIDTH), 2%."""
_KEY = "sketch key"  # no client's name: a rule keeps it beside them


def keyed(kept: Mapping[str, Tensor], secret: int) -> dict[str, Tensor]:
    """What a rule keeps, with the key of its sketches in it: the server's secret of the rule's first round.

    Who knew the signs could send rows whose sketches say nothing of them.
    """
    return {_KEY: torch.tensor([secret & 0x7FFF_FFFF_FFFF_FFFF], dtype=torch.int64), **kept}


def sketch(U: Tensor, kept: Mapping[str, Tensor]) -> Tensor:
    """Rows (n, P) -> (n, min(P, WIDTH)) float64, by the key that is kept (Charikar, Chen and Farach-Colton 2002).

    Every column has a random sign; runs of WIDTH columns are turned by a random number of places each, and added up. A
    row of at most WIDTH columns keeps its inner products exactly.
    """
    columns = U.shape[1]
    width = min(columns, WIDTH)
    total = torch.zeros(U.shape[0], width, dtype=torch.float64, device=U.device)
    draws = np.random.Generator(np.random.Philox(key=int(kept[_KEY][0])))
    for part in blocks.spans(slice(0, columns), max(width, 1)):
        size = part.stop - part.start
        sign = torch.from_numpy(draws.integers(0, 2, size, dtype=np.int8)).to(U.device, torch.float64) * 2 - 1
        turned = (torch.arange(size) + int(draws.integers(0, width))) % width
        total.index_add_(1, turned.to(U.device), U[:, part].to(torch.float64) * sign)
    return total
