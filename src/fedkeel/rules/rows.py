"""Row transforms: what a client does to its row before it is encoded, `(U (n, P), keys, memory) -> (U, memory)`.

Row i depends on row i, keys[i] and memory[i] alone: n rows in the simulator and one row on a device give the same
bits. U holds the parameter columns (buffers are never transformed). memory[i] maps names to vectors. Trait "clips": no
finite row leaves with a norm above the parameter `norm`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from fedkeel.core.keys import Key
from fedkeel.core.registry import rule
from fedkeel.kernels import distance

Memory = Sequence[Mapping[str, Tensor]]
_MARGIN = 1 - 1e-12  # room for a reader who sums the squares in another order


@rule("row_transform", traits=("clips",))
def clip(
    U: Tensor, keys: Sequence[Key], memory: Memory, *, norm: Annotated[float, Field(gt=0, allow_inf_nan=False)]
) -> tuple[Tensor, Memory]:
    """Scale rows that are longer than `norm` (L2) down to it, U_i * min(1, norm / |U_i|) (Abadi et al. 2016).

    The result's norm, in float64, never exceeds `norm`, whatever finite row comes in. A row that is not finite is
    returned as it is, for the check at the door to see. U itself is returned when nothing is to be done.
    """
    length = distance.sq_norms(U).sqrt()
    long = torch.nonzero(torch.isfinite(length) & (length > norm)).flatten().tolist()
    if not long:
        return U, memory
    clipped = U.clone()
    for i in long:
        _shrink_(clipped[i], U[i], float(length[i]), norm)
    return clipped, memory


def _shrink_(out: Tensor, row: Tensor, length: float, norm: float) -> None:
    """out = row * (norm / length), an ulp shorter, and shorter still where rounding adds up (denormal columns)."""
    shave = 2.0**-23
    factor = norm / length * (1 - shave)
    while True:
        if factor > 2.0**-64:
            torch.mul(row, factor, out=out)
        else:  # in float32 the factor itself could be denormal, or 0
            torch.mul(row, math.sqrt(factor), out=out).mul_(math.sqrt(factor))
        if float(distance.sq_norms(out[None]).sqrt()) <= norm * _MARGIN:
            return
        factor *= 1 - shave
        shave = min(2 * shave, 0.5)
