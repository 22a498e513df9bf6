"""An update at the door: what is measured of it, the checks that it has to pass, and what is kept once it is in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from fedkeel.core.registry import Rule
from fedkeel.core.types import ClientRow, Door, Refusal, Update
from fedkeel.kernels import distance
from fedkeel.round.aggregate import Outcome
from fedkeel.round.minutes import described


@dataclass(slots=True)
class Admitted:
    """An update that was let in. `absolute` is the part of its weight by absolute weighers."""

    task: int
    update: Update
    staleness: int
    weight: float = 0.0
    absolute: float = 1.0
    seconds: float = 0.0
    bytes_down: int = 0

    def line(self, refusal: Refusal | None) -> ClientRow:
        """Its line of a round's report where no update was used."""
        row = described(self.update)
        seconds, down = self.seconds, self.bytes_down
        return replace(row, refusal=refusal, weight=0.0, staleness=self.staleness, bytes_down=down, seconds=seconds)

    def used_line(self, at: int, outcome: Outcome, worth: float | None, refusal: Refusal | None) -> ClientRow:
        """Its line where an aggregate came about; it was the row `at` of the cohort."""
        return replace(
            self.line(refusal),
            weight=outcome.weights.get(at, 0.0),
            cosine=outcome.cosines.get(at),
            trust=outcome.trust.get(at),
            contribution=worth,
        )


def measured(update: Update, delta: Tensor) -> Update:
    """The update with its row (P,) and what is to be known of it. Cost: one pass."""
    square, columns = distance.sq_norm(delta), delta.numel()
    variance = max(square / columns - (float(delta.sum()) / columns) ** 2, 0.0) if columns else 0.0
    return replace(update, delta=delta, norm=math.sqrt(square), variance=variance, finite=math.isfinite(square))


def first_refusal(checks: Sequence[Rule], update: Update, door: Door) -> Refusal | None:
    """What the first check says that does not let it in; None: all do."""
    for check in checks:
        try:
            reason = check(update, door)
        except Exception as error:  # a user's rule that fails must neither stop the round nor let anything in
            reason = f"the check raised {type(error).__name__}: {error}"
        if reason is not None:
            return Refusal("check", check.name, str(reason), update.norm if check.name == "norm_bound" else None)
    return None
