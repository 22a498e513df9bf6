"""Availability: when devices can work. Contract: (names, key) -> Availability, for the devices of one class."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fedkeel.core.errors import InputError
from fedkeel.core.keys import Key
from fedkeel.core.registry import rule

Mask = NDArray[np.bool_]
Moments = NDArray[np.float64]
Availability = Callable[[float], tuple[Mask, Moments]]
"""(now in seconds) -> which of the devices (n,) are there, and until when that holds of each, at least: after now.

Infinity: for good."""
Hours = Annotated[float, Field(gt=0, le=24)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1)]
HOUR, DAY = 3600.0, 86400.0


@rule("availability")
def always(names: Sequence[str], key: Key) -> Availability:
    """Devices are there all the time."""
    everybody, forever = np.ones(len(names), bool), np.full(len(names), math.inf)
    return lambda now: (everybody, forever)


@rule("availability")
def daily(names: Sequence[str], key: Key, *, hours: Hours = 8.0, spread: Hours = 24.0) -> Availability:
    """Devices are there for so many hours a day, as phones that charge: from a time of each one's own.

    That time is drawn once, evenly over the first `spread` hours of the day, which begins at second 0 of the run: with
    a spread of 24 the number of devices at hand is about the same at any time, with less it swings.
    """
    begins = key.numpy().uniform(0, spread * HOUR, len(names))
    length = hours * HOUR

    def at(now: float) -> tuple[Mask, Moments]:
        since = np.mod(now - begins, DAY)
        here = since < length
        left = np.where(here, length - since, DAY - since) if hours < 24 else np.full(len(names), math.inf)
        return here, _after(now, now + left)

    return at


@rule("availability")
def slots(names: Sequence[str], key: Key, *, share: Share = 0.5, seconds: Seconds = HOUR) -> Availability:
    """In every slot of so many seconds each device is there with probability `share`, by its own luck."""

    def at(now: float) -> tuple[Mask, Moments]:
        slot = int(now // seconds)
        here = key.fold(slot).numpy().random(len(names)) < share
        return here, _after(now, np.full(len(names), (slot + 1) * seconds))

    return at


@rule("availability")
def trace(
    names: Sequence[str], key: Key, *, file: str, repeat: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
) -> Availability:
    """What a CSV file says: lines of client, start, stop, in seconds of the run; who is not in it is never there.

    With `repeat` the trace begins anew after so many seconds. Raises `InputError` for a file that can not be read, a
    line without numbers or with stop <= start, or a file that names none of the clients.
    """
    place = {name: i for i, name in enumerate(names)}
    client, start, stop = _spans(Path(file), place, repeat)

    edges, owner = np.concatenate([start, stop]), np.concatenate([client, client])

    def at(now: float) -> tuple[Mask, Moments]:
        then = now % repeat if repeat else now
        here = np.zeros(len(names), bool)
        here[client[(start <= then) & (then < stop)]] = True
        until = np.full(len(names), repeat or math.inf)
        later = edges > then
        np.minimum.at(until, owner[later], edges[later])
        return here, _after(now, now + (until - then))

    return at


def _spans(
    path: Path, place: dict[str, int], repeat: float
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    client, spans = [], []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for number, row in enumerate(csv.reader(file), 1):
                if (number == 1 and row[:1] == ["client"]) or not row:
                    continue
                try:
                    name, start, stop = row[0], float(row[1]), float(row[2])
                except (IndexError, ValueError):
                    raise InputError(
                        f"{path}, line {number}: {row} is no client,start,stop: write two seconds"
                    ) from None
                if not 0 <= start < stop or (repeat and stop > repeat):
                    end = f"repeat = {repeat:g}" if repeat else "infinity"
                    raise InputError(f"{path}, line {number}: {start:g} to {stop:g} is no span of time from 0 to {end}")
                if name in place:
                    client.append(place[name])
                    spans.append((start, stop))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"availability trace '{path}' cannot be read ({error}): name a CSV file") from None
    if not client:
        raise InputError(f"availability trace '{path}' names none of the clients, which are as '{next(iter(place))}'")
    start, stop = np.array(spans).T
    return np.array(client), start, stop


def _after(now: float, moments: Moments) -> Moments:
    """These moments; later than now, also where the difference is lost in rounding."""
    return np.maximum(moments, math.nextafter(now, math.inf))
