"""Schedulers: which clients start when, and when a buffer of updates closes.

Trait "waits_for_all": of answers that come at the same time none is left out, so their order does not matter.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from fedkeel.core.registry import rule
from fedkeel.core.types import Decision, View


@rule("scheduler", traits=("waits_for_all",))
def sync(
    view: View,
    *,
    deadline: Annotated[float, Field(gt=0)] | None = None,
    quorum: Annotated[int, Field(ge=1)] = 1,
) -> Decision:
    """Synchronous rounds: start a cohort, close when all have answered or failed, or at the deadline (seconds).

    With fewer than `quorum` admitted updates the round is skipped and the model kept. Without a deadline the
    transport must report every lost client as failed.
    """
    if view.started == 0:
        return Decision(start=view.cohort, wake=None if deadline is None else view.now + deadline)
    wake = None if deadline is None else view.opened + deadline
    close = view.in_flight == 0 or (wake is not None and view.now >= wake)
    if not close:
        return Decision(wake=wake)
    short = view.received < quorum
    skip = f"{view.received} of {view.started} clients gave a usable update, the quorum is {quorum}" if short else None
    return Decision(close=True, skip=skip)
