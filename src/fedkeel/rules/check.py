"""Checks at the door: one update against what the server knows. A reason in words, or None.

Trait "header": the check reads claims alone and runs before the payload is hashed or decoded.
"""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field

from fedkeel.core.registry import rule
from fedkeel.core.types import Door, Update


@rule("check", traits=("header",))
def layout(update: Update, door: Door) -> str | None:
    """Refuse an update of a model with other tensors (names, shapes, dtypes, kinds)."""
    theirs = update.claims.layout_digest
    if theirs != door.layout_digest:
        return f"its model's layout is {theirs[:12]}, this federation's is {door.layout_digest[:12]}"
    return None


@rule("check", traits=("header",))
def version(update: Update, door: Door) -> str | None:
    """Refuse an update of a model version that is too old, or that was never given out."""
    base = update.claims.base_version
    if base > door.version:
        return f"it claims model version {base}, the newest is {door.version}"
    if door.version - base > door.max_staleness:
        return f"it is from model version {base}, {door.version - base} behind; at most {door.max_staleness} are used"
    return None


@rule("check", traits=("header",))
def claims(
    update: Update,
    door: Door,
    *,
    max_examples: Annotated[int, Field(ge=1)] = 1_000_000,
    max_steps: Annotated[int, Field(ge=1)] = 1_000_000,
) -> str | None:
    """Refuse absurd claims: example or step counts below 1 or above a cap (a weight is the client's own word)."""
    count, steps = update.claims.num_examples, update.claims.steps
    if not 1 <= count <= max_examples:
        return f"it claims {count} examples, allowed are 1 to {max_examples}"
    if not 1 <= steps <= max_steps:
        return f"it claims {steps} steps, allowed are 1 to {max_steps}"
    return None


@rule("check", traits=("header",))
def duplicate(update: Update, door: Door) -> str | None:
    """Refuse a second answer to the same task."""
    if update.claims.task in door.answered:
        return f"task {update.claims.task} has an answer already"
    return None


@rule("check")
def replayed(update: Update, door: Door) -> str | None:
    """Refuse a payload that repeats, bit for bit, the one last admitted from this client; zero updates may repeat."""
    if update.norm > 0 and door.last_payload.get(update.claims.client) == update.payload_digest.hex():
        return "its payload repeats the last one admitted from this client, bit for bit"
    return None


@rule("check")
def finite(update: Update, door: Door) -> str | None:
    """Refuse an update with a NaN or an infinity in any column."""
    return None if update.finite else "it has columns that are NaN or infinite"


@rule("check")
def norm_bound(update: Update, door: Door, *, limit: Annotated[float, Field(gt=0)]) -> str | None:
    """Refuse an update whose L2 norm (all columns, buffers included) is above `limit`, or not a number."""
    if math.isnan(update.norm) or update.norm > limit:
        return f"its norm is {update.norm:.4g}, allowed is {limit:.4g}"
    return None
