"""A table of patients, in as many columns and labels as a test wants."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

import fedkeel

COLUMNS = (
    fedkeel.Feature(name="age", unit="a", low=0.0, high=120.0),
    fedkeel.Feature(name="dose", unit="mg"),
    fedkeel.Feature(name="pulse", unit="1/min"),
    fedkeel.Feature(name="weight", unit="kg", default=0.5),
    fedkeel.Feature(name="height", unit="m", default=-0.25),
)
LABELS = ("ill", "well", "unsure", "gone")


@fedkeel.rule("source")
def patients(
    key: fedkeel.Key,
    *,
    columns: Annotated[int, Field(ge=1, le=5)] = 3,
    labels: Annotated[int, Field(ge=2, le=4)] = 2,
    without: str = "",
    dose: str = "mg",
) -> fedkeel.Pool:
    """Made up; `without` leaves a column out, `dose` is its unit."""
    draws = key.numpy()
    x = draws.normal(size=(400, 5)).astype(np.float32)
    y = (x[:, 0] + x[:, 1] > 0).astype(np.int64) + 2 * (x[:, 2] > 1.0)
    kept = [at for at, column in enumerate(COLUMNS[:columns]) if column.name != without]
    features = [COLUMNS[at].model_copy(update={"unit": dose} if COLUMNS[at].name == "dose" else {}) for at in kept]
    rows = y < labels
    return fedkeel.Pool.from_arrays(x[rows][:, kept], y[rows], key=key, features=features, labels=LABELS[:labels])
