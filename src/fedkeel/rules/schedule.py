"""Schedulers: which clients start when, and when a buffer of updates closes. Contract: (view) -> decision.

A scheduler is asked again after everything that happens, and after each thing that it wants. Hooks, called with the
parameters: `rows(cohort)` is how many updates a close may count on (the cohort, where there is none), `staleness()` how
many versions behind an update may be (0: what comes after the close is of no use, and the work is given up). Trait
"waits_for_all": of answers that come at the same time none is left out, so their order does not matter.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from fedkeel.core.registry import rule
from fedkeel.core.types import Decision, View

_MOST_LOST = 10
"""Of each update that a buffer waits for, tasks that may be lost."""
Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def _skip(view: View, quorum: int) -> str | None:
    if view.received >= quorum:
        return None
    return f"{view.received} of {view.started} clients gave a usable update, the quorum is {quorum}"


@rule("scheduler", traits=("waits_for_all",))
def sync(view: View, *, quorum: Count = 1) -> Decision:
    """Synchronous rounds: start a cohort, close when all have answered or failed.

    With fewer than `quorum` admitted updates the round is skipped and the model kept. The transport must report every
    lost client as failed; `semi_sync` has a deadline.
    """
    if view.started == 0:
        return Decision(start=view.cohort)
    return Decision(close=True, skip=_skip(view, quorum)) if view.in_flight == 0 else Decision()


def _semi_sync_staleness(late: str, max_staleness: int, **_: object) -> int:
    return max_staleness if late == "use" else 0


@rule("scheduler", hooks={"staleness": _semi_sync_staleness})
def semi_sync(
    view: View,
    *,
    deadline: Seconds,
    quorum: Count = 1,
    over: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0,
    late: Literal["drop", "use"] = "drop",
    max_staleness: Count = 10,
) -> Decision:
    """Rounds with a deadline (seconds): close then, or as soon as the cohort is full or nobody is left to answer.

    `over` starts so much more than the cohort (0.3: 30 %), of whom the first to answer fill it (over-selection,
    Bonawitz et al. 2019). What comes after the close is given up, or with late="use" goes into the round that is open
    then, up to `max_staleness` models behind: weigh it by `staleness`. With fewer than `quorum` admitted updates the
    round is skipped and the model kept.
    """
    if view.started == 0:
        wanted = math.ceil(round(view.cohort * (1 + over), 6))  # 100 * 1.1 is above 110
        return Decision(start=wanted, wake=view.now + deadline)
    end = view.began + deadline
    if view.received >= view.cohort or view.in_flight == view.earlier or (view.now >= end and not view.more):
        return Decision(close=True, skip=_skip(view, quorum))
    return Decision(wake=end)


def _fedbuff_rows(cohort: int, buffer: int, **_: object) -> int:
    return buffer


def _staleness(max_staleness: int, **_: object) -> int:
    return max_staleness


@rule("scheduler", hooks={"rows": _fedbuff_rows, "staleness": _staleness})
def fedbuff(view: View, *, buffer: Count = 10, max_staleness: Count = 100) -> Decision:
    """Buffered asynchronous rounds (FedBuff, Nguyen et al. 2022): close whenever `buffer` updates have come.

    As many clients as the cohort are at work all the time: who answers is replaced at once, by another client if there
    is one, as no client has two updates in a buffer. Put `staleness` among the weighers. Updates more than
    `max_staleness` models behind are refused. When ten clients for each place of the buffer were lost it closes with
    what it has.
    """
    if view.received >= buffer:
        return Decision(close=True)
    if view.lost >= _MOST_LOST * buffer:
        why = f"{view.lost} clients gave no usable update"
        return Decision(close=True, skip=None if view.received else why)
    return Decision(start=max(0, view.cohort - view.in_flight))


def _fedasync_rows(cohort: int, max_staleness: int) -> int:
    return 1


@rule("scheduler", hooks={"rows": _fedasync_rows, "staleness": _staleness})
def fedasync(view: View, *, max_staleness: Count = 100) -> Decision:
    """Asynchronous rounds (FedAsync, Xie et al. 2019): the model moves with every update; the cohort is always at work.

    The paper's mixing x = (1 - alpha s) x + alpha s x_k is the mixer `models`, the weigher `staleness` for s, and the
    server optimiser sgd(lr=alpha).
    """
    found: Decision = fedbuff(view, buffer=1)
    return found
