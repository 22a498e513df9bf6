"""Devices: how long a client's work and its messages take, when it is there, and when it drops out, in virtual time."""

from __future__ import annotations

import csv
import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np

from fedkeel.config import DeviceClass, Job
from fedkeel.core.errors import InputError, nearest
from fedkeel.core.keys import Key
from fedkeel.core.registry import parse
from fedkeel.core.roster import Register
from fedkeel.world.availability import Availability, Mask, Moments

REFERENCE = {"A": 1.0, "B": 2.3, "C": 5.7}
"""The built-in classes: the relative time that a round's local work takes."""
_NORMAL = NormalDist()


@dataclass(frozen=True, slots=True)
class Trip:
    """What becomes of a task: `ends` is when the work is done, `lost` when the server learns that it never will be, and
    `why`."""

    ends: float
    lost: float | None = None
    why: str = ""


class Devices:
    """The devices of all clients. What is drawn for a task depends on its number alone.

    A task takes latency + bytes / down, then time * (round_seconds + step_seconds * steps) * jitter, then
    latency + bytes / up.
    """

    def __init__(self, job: Job, register: Register, key: Key) -> None:
        """The register is told the classes. Raises `InputError` for classes that do not fit."""
        self.register, names = register, register.names
        section = job.devices
        self._section = section
        self._key = key.fold("trip")
        self.classes = _classes(section.profile, section.classes)
        self._place = register.index
        self._class = _assigned(self.classes, names, key.fold("classes"))
        kinds = tuple(self.classes.values())
        # One place a client; no bandwidth is a message that takes no time.
        self._time, self._up, self._down, self._dropout = (
            np.array([getattr(kind, name) or missing for kind in kinds])[self._class]
            for name, missing in (("time", 1.0), ("up", math.inf), ("down", math.inf), ("dropout", 0.0))
        )
        labels = np.array(list(self.classes))[self._class].tolist()
        if section.file is not None:
            self._read(Path(section.file), labels)
        register.classify(labels)
        self._presence = {
            at: (members, self._availability(kind, [names[i] for i in members.tolist()], key.fold("available", name)))
            for at, (name, kind) in enumerate(self.classes.items())
            if len(members := np.flatnonzero(self._class == at))
        }
        self.leave = any(kind.available != "always" for kind in kinds)
        self._known = np.ones(len(names), bool), np.full(len(names), math.inf)
        self._from = self._changes = -math.inf
        free = not bool((np.isfinite(self._up) | np.isfinite(self._down) | (self._dropout > 0)).any())
        plain = free and bool((self._time == self._time[0]).all())
        self.level = plain and not (section.jitter or section.latency or self.leave or section.step_seconds)
        """Whether every task takes the same time, whatever is sent."""

    def _availability(self, kind: DeviceClass, names: Sequence[str], key: Key) -> Availability:
        try:
            found: Availability = parse("availability", kind.available)(names, key)
        except InputError as error:
            raise InputError(f"devices.classes: {error}") from None
        return found

    def _read(self, path: Path, labels: list[str]) -> None:
        """Single devices, over what their classes say. Raises `InputError` naming the line."""
        figures = {"time": self._time, "up": self._up, "down": self._down, "dropout": self._dropout}
        try:
            with path.open(newline="", encoding="utf-8") as file:
                rows = csv.DictReader(file, restkey="")
                if unknown := {"client", *(rows.fieldnames or ())} - {"client", "class", *figures}:
                    raise InputError(
                        f"devices.file '{path}' has column '{min(unknown)}': {nearest(min(unknown), figures)}"
                    )
                for number, row in enumerate(rows, 2):
                    place = self._place.get(row.get("client") or "")
                    if place is None:
                        raise InputError(
                            f"devices.file '{path}', line {number}: there is no client '{row.get('client')}'"
                        )
                    labels[place] = row.get("class") or labels[place]
                    given = {name: value for name in figures if (value := row.get(name))}
                    try:
                        kind = DeviceClass.model_validate({name: float(value) for name, value in given.items()})
                    except ValueError as error:
                        said = str(error).splitlines()
                        raise InputError(f"devices.file '{path}', line {number}: {given} ({said[0]})") from None
                    for name in given:
                        figures[name][place] = getattr(kind, name)
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise InputError(f"devices.file '{path}' cannot be read ({error}): name a CSV file") from None

    @property
    def of(self) -> dict[str, str]:
        """Client -> the class of its device; nothing where there is but one."""
        return (
            {name: self.register.device(name) for name in self.register.names} if len(self.register.groups) > 1 else {}
        )

    def speed(self, client: str) -> float:
        """Local work in a time, relative to a device of time 1."""
        return 1 / float(self._time[self._place[client]])

    # -- presence, as the coordinator asks for it

    def here(self, now: float) -> Mask | None:
        return self._at(now)[0] if self.leave else None

    def next_change(self, now: float) -> float:
        return float(self._at(now)[1].min(initial=math.inf)) if self.leave else math.inf

    def _at(self, now: float) -> tuple[Mask, Moments]:
        """Who is there, and until when that holds of each."""
        if not self._from <= now < self._changes:
            mask, until = np.zeros(len(self._class), bool), np.full(len(self._class), math.inf)
            for members, at in self._presence.values():
                mask[members], until[members] = at(now)
            self._from, self._changes, self._known = now, float(until.min(initial=math.inf)), (mask, until)
        return self._known

    def _leaves(self, place: int, now: float, end: float) -> float | None:
        """When the device leaves before the end; None: it stays."""
        (members, at), moment = self._presence[int(self._class[place])], now
        mine = int(np.searchsorted(members, place))
        while moment < end:
            here, until = at(moment)
            if not here[mine]:
                return moment
            moment = float(until[mine])
        return None

    # -- a task's way

    def trip(self, client: str, task: int, now: float, bytes_down: int, steps: int = 0) -> Trip:
        """When a task that is given out now will be done; steps only count where they take time."""
        place, section, key = self._place[client], self._section, self._key
        work = float(self._time[place]) * (section.round_seconds + section.step_seconds * steps)
        if section.jitter:
            work *= math.exp(section.jitter * _NORMAL.inv_cdf(_uniform(key.fold(task, "jitter"))))
        began = now + section.latency + bytes_down / float(self._down[place])
        ends = began + work
        if self.leave and (left := self._leaves(place, now, ends)) is not None:
            return Trip(math.inf, left + section.notice, "its device left before its work was done")
        if self._dropout[place] and _uniform(key.fold(task, "dropout")) < self._dropout[place]:
            at = began + work * _uniform(key.fold(task, "moment"))
            return Trip(math.inf, at + section.notice, "its device dropped out")
        return Trip(ends)

    def arrival(self, client: str, done: float, size: int) -> float:
        """When an answer of so many bytes is at the server."""
        return done + self._section.latency + size / float(self._up[self._place[client]])

    @property
    def by_steps(self) -> bool:
        """Whether the time of a task is known only when its steps are."""
        return self._section.step_seconds > 0


def _uniform(key: Key) -> float:
    """In (0, 1)."""
    return (key.value + 0.5) / 2.0**64


def _classes(profile: str, own: Mapping[str, DeviceClass]) -> dict[str, DeviceClass]:
    if own:
        return dict(own)
    if profile == "reference":
        return {name: DeviceClass(time=time) for name, time in REFERENCE.items()}
    return {"all": DeviceClass()}


def _assigned(
    classes: Mapping[str, DeviceClass], names: Sequence[str], key: Key
) -> np.ndarray[tuple[int], np.dtype[np.int16]]:
    """The class of each client: by pattern, the first that fits; the rest by shares, as even as they go, at random."""
    found = np.full(len(names), -1, np.int16)
    for at, (name, kind) in enumerate(classes.items()):
        if kind.clients is not None:
            mine = [i for i, client in enumerate(names) if fnmatch.fnmatchcase(client, kind.clients)]
            if not mine:
                raise InputError(
                    f"devices.classes.{name}.clients = '{kind.clients}' matches no client: "
                    f"their names are as '{names[0]}'"
                )
            found[[i for i in mine if found[i] < 0]] = at
    rest = np.flatnonzero(found < 0)
    shared = [(at, kind.share) for at, kind in enumerate(classes.values()) if kind.clients is None]
    if len(rest) and not shared:
        raise InputError(
            f"client '{names[rest[0]]}' is in none of devices.classes: add a class without a pattern, for all others"
        )
    if len(rest):
        places, shares = np.array([at for at, _ in shared]), np.array([share for _, share in shared])
        ends = np.rint(np.cumsum(shares) / shares.sum() * len(rest)).astype(int)
        found[rest[key.numpy().permutation(len(rest))]] = np.repeat(places, np.diff(ends, prepend=0))
    return found
