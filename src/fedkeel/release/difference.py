"""Differences between two versions of a model, and what version number they ask for."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple, TypeVar

from semver import Version

from fedkeel.release.contract import Contract


class Level(IntEnum):
    """How much a difference asks of those who work with the old model."""

    IDENTICAL = 0
    PATCH = 1
    """Nothing: the weights, or what is told of the model."""
    MINOR = 2
    """Nothing, or what an adapter does for them: something was added, dropped or widened."""
    MAJOR = 3
    """They must change: what they send or read would mean something else, or does not fit."""

    @property
    def word(self) -> str:
        return self.name.lower()


class Difference(NamedTuple):
    """One difference: its class (`kind`), where it is, what was there and what is (JSON values), and a sentence."""

    level: Level
    kind: str
    where: str
    old: Any
    new: Any
    text: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """What differs, the worst first; `untold`: the parts that one of the two does not tell, so not compared."""

    old: Contract
    new: Contract
    differences: tuple[Difference, ...]
    untold: tuple[str, ...]

    @property
    def level(self) -> Level:
        return max((found.level for found in self.differences), default=Level.IDENTICAL)

    @property
    def least(self) -> Version | None:
        """The least version that the new one may declare; None where the old one declares none."""
        if self.old.version is None:
            return None
        was = Version.parse(self.old.version)
        if self.level == Level.IDENTICAL:
            return was
        if was.prerelease:  # promises nothing yet (semver.org, 9)
            return was.bump_prerelease()
        if was.major == 0:  # anything may change (semver.org, 4); as Cargo reads it, a digit further right
            return was.bump_minor() if self.level == Level.MAJOR else was.bump_patch()
        bumps = {Level.PATCH: was.bump_patch, Level.MINOR: was.bump_minor, Level.MAJOR: was.bump_major}
        return bumps[self.level]()

    @property
    def objection(self) -> str | None:
        """Why the declared versions do not agree with the differences; None: they do, or one declares none."""
        if self.old.version is None or self.new.version is None:
            return None
        was, now, least = Version.parse(self.old.version), Version.parse(self.new.version), self.least
        assert least is not None
        if now < was:
            return f"version {now} goes back behind {was}: declare {least} or later"
        same = self.level == Level.IDENTICAL
        # Of a prerelease nothing but order is asked; 1.3.0-rc.1 announces 1.3.0.
        fine = (now > was or same) if was.prerelease else now.finalize_version() >= least
        if fine:
            return None
        return f"the difference is {self.level.word} and {was} -> {now} declares less: declare {least} or later"

    def to_dict(self) -> dict[str, Any]:
        """For programs; JSON values."""
        return {
            "level": self.level.word,
            "old": {"source": self.old.source, "version": self.old.version, "weights": self.old.weights},
            "new": {"source": self.new.source, "version": self.new.version, "weights": self.new.weights},
            "differences": [found._asdict() | {"level": found.level.word} for found in self.differences],
            "not_compared": list(self.untold),
            "least_version": None if self.least is None else str(self.least),
            "objection": self.objection,
        }


T = TypeVar("T")


class Matched(NamedTuple):
    """Two lists of named things, by name: pairs that stayed, were renamed as it seems, are gone, are new."""

    stayed: list[tuple[Any, Any]]
    renamed: list[tuple[Any, Any]]
    gone: list[Any]
    added: list[Any]
    moved: bool
    """Those that stayed are in another order."""


def matched(old: Sequence[T], new: Sequence[T], name: Callable[[T], str], kind: Callable[[T], Hashable]) -> Matched:
    """Match by name; what is gone is a renamed thing where one of the same kind is new, in their order."""
    before, after = {name(item): item for item in old}, {name(item): item for item in new}
    gone = [item for item in old if name(item) not in after]
    added = [item for item in new if name(item) not in before]
    waiting: dict[Hashable, list[T]] = {}
    for item in added:
        waiting.setdefault(kind(item), []).append(item)
    renamed = [(item, waiting[kind(item)].pop(0)) for item in gone if waiting.get(kind(item))]
    left, taken = {name(one) for one, _ in renamed}, {name(other) for _, other in renamed}
    kept = [name(item) for item in old if name(item) in after]
    return Matched(
        [(before[key], after[key]) for key in kept],
        renamed,
        [item for item in gone if name(item) not in left],
        [item for item in added if name(item) not in taken],
        kept != [name(item) for item in new if name(item) in before],
    )
