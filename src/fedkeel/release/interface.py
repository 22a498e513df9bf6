"""Differences in what goes into a model and what comes out of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fedkeel.release.difference import Difference, Level, matched
from fedkeel.ship.card import Feature, Inputs, Outputs

Widths = set[tuple[int, int]]
"""(old, new) sizes of axes that grew or shrank with the labels or the features."""
Shape = tuple[int | None, ...]


def labels(old: Sequence[str], new: Sequence[str]) -> Iterator[Difference]:
    """Label i is the meaning of output i: only what is appended leaves all others as they were."""
    told = list(old), list(new)
    if old == new:
        return
    if not old:
        yield Difference(Level.MINOR, "labels_named", "labels", *told, "the outputs have labels now")
    elif tuple(new[: len(old)]) == tuple(old):
        text = f"label {_some(new[len(old) :])} appended"
        yield Difference(Level.MINOR, "labels_appended", "labels", *told, text)
    elif not new:
        yield Difference(Level.MAJOR, "labels_gone", "labels", *told, "the outputs have no labels any more")
    elif sorted(old) == sorted(new):
        first = next(i for i, (a, b) in enumerate(zip(old, new, strict=True)) if a != b)
        text = f"labels in another order: output {first} was {old[first]!r} and is {new[first]!r}"
        yield Difference(Level.MAJOR, "labels_reordered", "labels", *told, text)
    elif gone := [label for label in old if label not in new]:
        if len(old) == len(new):
            pairs = [f"{a!r} -> {b!r}" for a, b in zip(old, new, strict=True) if a != b]
            text = f"labels renamed or replaced: {', '.join(pairs[:3])}{', ...' * (len(pairs) > 3)}"
            yield Difference(Level.MAJOR, "labels_renamed", "labels", *told, text)
        else:
            yield Difference(Level.MAJOR, "labels_removed", "labels", *told, f"label {_some(gone)} removed")
    elif fresh := [label for label in new if label not in old]:
        text = f"label {_some(fresh)} inserted before others: append it"
        yield Difference(Level.MAJOR, "labels_inserted", "labels", *told, text)
    else:
        text = f"there were {len(old)} labels and are {len(new)}, some of one name"
        yield Difference(Level.MAJOR, "labels_repeated", "labels", *told, text)


def inputs(old: Sequence[Inputs], new: Sequence[Inputs]) -> Iterator[Difference]:
    """Of all tensors that go in, by name."""
    found = matched(old, new, lambda item: item.name, lambda item: (item.shape, item.dtype))
    for one, other in found.renamed:
        yield _renamed("input", one.name, other.name)
    for one in found.gone:
        yield Difference(Level.MAJOR, "input_removed", one.name, one.name, None, f"input '{one.name}' removed")
    for other in found.added:
        text = f"input '{other.name}' added: nobody sends it yet"
        yield Difference(Level.MAJOR, "input_added", other.name, None, other.name, text)
    if found.moved:
        yield _reordered("inputs", [item.name for item in old], [item.name for item in new])
    for one, other in found.stayed + found.renamed:
        yield from _input(one, other)


def outputs(old: Sequence[Outputs], new: Sequence[Outputs], widths: Widths) -> Iterator[Difference]:
    """Of all tensors that come out, by name; `widths`: what the labels explain."""
    found = matched(old, new, lambda item: item.name, lambda item: (item.shape, item.dtype))
    for one, other in found.renamed:
        yield _renamed("output", one.name, other.name)
    for one in found.gone:
        yield Difference(Level.MAJOR, "output_removed", one.name, one.name, None, f"output '{one.name}' removed")
    for other in found.added:
        yield Difference(Level.MINOR, "output_added", other.name, None, other.name, f"output '{other.name}' added")
    if found.moved:
        yield _reordered("outputs", [item.name for item in old], [item.name for item in new])
    for one, other in found.stayed + found.renamed:
        if one.dtype != other.dtype:
            yield _changed("output_dtype", f"output '{other.name}'", "dtype", one.dtype, other.dtype)
        yield from _shape("output", other.name, one.shape, other.shape, widths)


def widths_of(old: Sequence[Inputs], new: Sequence[Inputs]) -> Widths:
    """How many features there were and are."""
    before = {item.name: len(item.features) for item in old if item.features}
    return {(before[item.name], len(item.features)) for item in new if item.features and item.name in before}


def _input(old: Inputs, new: Inputs) -> Iterator[Difference]:
    name = f"input '{new.name}'"
    if old.dtype != new.dtype:
        yield _changed("input_dtype", name, "dtype", old.dtype, new.dtype)
    if old.unit != new.unit:
        yield _changed("input_unit", name, "unit", old.unit, new.unit)
    if old.normalisation != new.normalisation:
        yield _changed("normalisation", name, "normalisation", old.normalisation, new.normalisation)
    yield from _range("input", name, old, new)
    widths: Widths = set()
    if old.features and new.features:
        widths = {(len(old.features), len(new.features))}
        yield from _features(old, new)
    elif old.features:
        text = f"{name} has no named features any more"
        yield Difference(Level.MAJOR, "features_gone", new.name, _names(old), [], text)
    elif new.features:
        yield Difference(Level.MINOR, "features_named", new.name, [], _names(new), f"{name} has named features now")
    yield from _shape("input", new.name, old.shape, new.shape, widths)


def _features(old: Inputs, new: Inputs) -> Iterator[Difference]:
    places = {feature.name: at for side in (old, new) for at, feature in enumerate(side.features)}
    found = matched(old.features, new.features, lambda f: f.name, lambda f: (f.dtype, f.unit, places[f.name]))
    for one, other in found.renamed:
        yield _renamed("feature", one.name, other.name)
    for one in found.gone:
        yield Difference(Level.MINOR, "feature_removed", one.name, one.name, None, f"feature '{one.name}' dropped")
    for other in found.added:
        if other.default is None:
            text = f"feature '{other.name}' is new and required: give it a default"
            yield Difference(Level.MAJOR, "feature_required", other.name, None, other.name, text)
        else:
            text = f"feature '{other.name}' is new, {other.default:g} where a client has none"
            yield Difference(Level.MINOR, "feature_added", other.name, None, other.default, text)
    if found.gone and found.added and len(old.features) == len(new.features):
        text = "as many features as before, but others: rows without names would be read as what they are not"
        yield Difference(Level.MAJOR, "features_exchanged", new.name, _names(old), _names(new), text)
    if found.moved:
        yield _reordered("features", _names(old), _names(new))
    for one, other in found.stayed + found.renamed:
        yield from _feature(one, other)


def _feature(old: Feature, new: Feature) -> Iterator[Difference]:
    name = f"feature '{new.name}'"
    if old.dtype != new.dtype:
        yield _changed("feature_dtype", name, "dtype", old.dtype, new.dtype)
    if old.unit != new.unit:
        yield _changed("feature_unit", name, "unit", old.unit, new.unit)
    yield from _range("feature", name, old, new)
    if old.default != new.default:
        told = f"was {old.default} and is {new.default}"
        if new.default is None:
            yield Difference(Level.MAJOR, "default_removed", name, old.default, None, f"{name} is required now")
        elif old.default is None:
            yield Difference(Level.MINOR, "default_added", name, None, new.default, f"{name} is required no more")
        else:
            yield Difference(
                Level.MINOR, "default_changed", name, old.default, new.default, f"default of {name} {told}"
            )


def _range(kind: str, name: str, old: Inputs | Feature, new: Inputs | Feature) -> Iterator[Difference]:
    was, now = [old.low, old.high], [new.low, new.high]
    if was == now:
        return
    inf = float("inf")
    lower = (-inf if new.low is None else new.low) > (-inf if old.low is None else old.low)
    upper = (inf if new.high is None else new.high) < (inf if old.high is None else old.high)
    said = f"range of {name} was {_interval(old)} and is {_interval(new)}"
    if lower or upper:
        yield Difference(Level.MAJOR, f"{kind}_range_narrowed", name, was, now, f"{said}: narrower")
    else:
        yield Difference(Level.MINOR, f"{kind}_range_widened", name, was, now, said)


def _shape(kind: str, name: str, old: Shape, new: Shape, widths: Widths) -> Iterator[Difference]:
    if old == new:
        return
    said = f"shape of {kind} '{name}' was {_sides(old)} and is {_sides(new)}"
    told = name, list(old), list(new)
    if len(old) == len(new) and all(a == b or b is None for a, b in zip(old, new, strict=True)):
        yield Difference(Level.MINOR, f"{kind}_shape_freed", *told, said)
    elif len(old) == len(new) and old[:-1] == new[:-1] and (old[-1], new[-1]) in widths:
        why = "labels" if kind == "output" else "features"
        yield Difference(Level.MINOR, f"{kind}_widened", *told, f"{said}, with the {why}")
    else:
        yield Difference(Level.MAJOR, f"{kind}_shape", *told, said)


def _changed(kind: str, name: str, what: str, old: str, new: str) -> Difference:
    return Difference(Level.MAJOR, kind, name, old, new, f"{what} of {name} was {old or 'none'} and is {new or 'none'}")


def _renamed(kind: str, old: str, new: str) -> Difference:
    text = f"{kind} '{old}' is gone and '{new}' is alike: renamed, as it seems"
    return Difference(Level.MAJOR, f"{kind}_renamed", new, old, new, text)


def _reordered(kind: str, old: list[str], new: list[str]) -> Difference:
    return Difference(Level.MAJOR, f"{kind}_reordered", kind, old, new, f"{kind} in another order: {_some(new)}")


def _names(item: Inputs) -> list[str]:
    return [feature.name for feature in item.features]


def _interval(item: Inputs | Feature) -> str:
    low, high = ("any" if side is None else f"{side:g}" for side in (item.low, item.high))
    return f"{low} to {high}"


def _sides(shape: Shape) -> str:
    return "x".join("?" if side is None else str(side) for side in shape) or "one number"


def _some(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
