"""Update intervals: how long a client works until its next update. Contract: (factor, cosine, before, loss) -> factor.

Asked of each client whose update was used: the factor of the last task's steps (1 at first), the cosine of its update
with the aggregate, and the training losses that it claimed in the answer before (NaN at first) and in this one (NaN
where it claims none). The answer, kept from 1/64 to 64, scales the steps of its next task: of `train.stopping =
"budget(steps=...)"`.
"""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field

from fedkeel.core.registry import rule

Factor = Annotated[float, Field(gt=1, le=4)]


@rule("interval")
def fixed(factor: float, cosine: float, before: float, loss: float) -> float:
    """Always as long: an update every so many steps, as train.stopping says."""
    return 1.0


@rule("interval")
def agreement(
    factor: float,
    cosine: float,
    before: float,
    loss: float,
    *,
    agree: Annotated[float, Field(ge=-1, le=1)] = 0.5,
    stall: Annotated[float, Field(ge=0, lt=1)] = 0.01,
    change: Factor = 1.25,
    most: Annotated[float, Field(ge=1, le=64)] = 4.0,
    least: Annotated[float, Field(ge=1 / 64, le=1)] = 0.25,
) -> float:
    """Longer by `change` while a client's update agrees with the others', shorter while its loss stalls.

    It agrees where the cosine with the aggregate is `agree` or more; the loss stalls where it fell by less than the
    share `stall` since the client's last answer, and that counts first. Where neither is so nothing changes. From
    `least` to `most` times the steps.
    """
    if math.isfinite(before) and math.isfinite(loss) and loss > (1 - stall) * before:
        factor /= change
    elif cosine >= agree:
        factor *= change
    return min(max(factor, least), most)
