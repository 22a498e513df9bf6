"""Compare two versions of a model: identical, patch, minor or major, with each difference."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from fedkeel.release import interface
from fedkeel.release.contract import Contract
from fedkeel.release.difference import Comparison, Difference, Level, matched
from fedkeel.ship.card import Parameter

_PARTS = ("parameters", "inputs", "outputs", "labels", "preprocessing", "network", "needs", "weights")


def compare(old: Contract, new: Contract) -> Comparison:
    """What stands between those who work with `old` and the model `new`.

    Minor is what a door adapts (`world.bridge`): labels appended, features with a default added or dropped, and
    the tensors that widen with those. What a caller would not notice, and get wrong, is major: another order, unit,
    normalisation, meaning.
    """
    widths: interface.Widths = set()
    found: list[Difference] = []
    if old.labels is not None and new.labels is not None:
        if len(old.labels) < len(new.labels) and new.labels[: len(old.labels)] == old.labels and old.labels:
            widths.add((len(old.labels), len(new.labels)))
        found += interface.labels(old.labels, new.labels)
    by_labels = set(widths)
    if old.inputs is not None and new.inputs is not None:
        widths |= interface.widths_of(old.inputs, new.inputs)
        found += interface.inputs(old.inputs, new.inputs)
    if old.outputs is not None and new.outputs is not None:
        found += interface.outputs(old.outputs, new.outputs, by_labels)
    if old.preprocessing and new.preprocessing and old.preprocessing != new.preprocessing:
        text = "raw data are made into inputs in another way"
        found.append(
            Difference(Level.MAJOR, "preprocessing", "preprocessing", old.preprocessing, new.preprocessing, text)
        )
    found += _network(old, new)
    if old.parameters is not None and new.parameters is not None:
        ordered = old.layout is not None and new.layout is not None
        before = len(found)
        if old.counters == new.counters:
            found += _parameters(old.parameters, new.parameters, widths)
        else:
            found += _parameters(_travelling(old.parameters), _travelling(new.parameters), widths)
        moved = _order(old.parameters, new.parameters) != _order(new.parameters, old.parameters)
        if ordered and (moved or (len(found) == before and old.layout != new.layout)):
            text = "parameters in another order, or others of them are shared"
            found.append(Difference(Level.MAJOR, "layout", "parameters", old.layout, new.layout, text))
    if old.needs is not None and new.needs is not None:
        found += _needs(old.needs, new.needs)
    was, now = old.weights, new.weights
    if old.counters != new.counters:
        was, now = (side.weights_without or side.weights for side in (old, new))
    if was and now and was != now:
        found.append(Difference(Level.PATCH, "weights", "weights", was, now, "other weights"))
    if not found and old.card and new.card and old.card != new.card:
        text = "what the card tells of the model besides"
        found.append(Difference(Level.PATCH, "metadata", "card", old.card, new.card, text))
    untold = [part for part in _PARTS if (getattr(old, part) is None) != (getattr(new, part) is None)]
    return Comparison(old, new, tuple(sorted(found, key=lambda one: -one.level)), tuple(untold))


def _network(old: Contract, new: Contract) -> Iterator[Difference]:
    if old.network is None or new.network is None or old.network == new.network or old.sealed != new.sealed:
        return
    if old.sealed:  # nobody but the file itself depends on it
        yield Difference(Level.PATCH, "network", "network", old.network, new.network, "the graph inside is another")
    else:
        text = (
            f"the network was {old.network[:120]} and is {new.network[:120]}: updates of one mean nothing to the other"
        )
        yield Difference(Level.MAJOR, "network", "network", old.network, new.network, text)


def _parameters(old: Sequence[Parameter], new: Sequence[Parameter], widths: interface.Widths) -> Iterator[Difference]:
    found = matched(old, new, lambda one: one.name, lambda one: (one.shape, one.dtype))
    for one, other in found.renamed:
        text = f"tensor '{one.name}' is gone and '{other.name}' has its shape: renamed, as it seems"
        yield Difference(Level.MAJOR, "parameter_renamed", other.name, one.name, other.name, text)
    for one in found.gone:
        text = f"tensor '{one.name}' ({_sides(one.shape)}) removed"
        yield Difference(Level.MAJOR, "parameter_removed", one.name, list(one.shape), None, text)
    for other in found.added:
        text = f"tensor '{other.name}' ({_sides(other.shape)}) added"
        yield Difference(Level.MAJOR, "parameter_added", other.name, None, list(other.shape), text)
    for one, other in found.stayed:
        if one.dtype != other.dtype:
            text = f"dtype of tensor '{one.name}' was {one.dtype} and is {other.dtype}"
            yield Difference(Level.MAJOR, "parameter_dtype", one.name, one.dtype, other.dtype, text)
        if one.shape != other.shape:
            grown = _grown(one.shape, other.shape, widths)
            text = f"tensor '{one.name}' was {_sides(one.shape)} and is {_sides(other.shape)}"
            level, kind = (Level.MINOR, "parameter_widened") if grown else (Level.MAJOR, "parameter_shape")
            said = f"{text}, with the labels or features" if grown else text
            yield Difference(level, kind, one.name, list(one.shape), list(other.shape), said)


def _order(mine: Sequence[Parameter], theirs: Sequence[Parameter]) -> list[str]:
    """The names that both have, in the order of the one."""
    names = {one.name for one in theirs}
    return [one.name for one in mine if one.name in names]


def _grown(old: tuple[int, ...], new: tuple[int, ...], widths: interface.Widths) -> bool:
    """What labels or features explain is all that changed."""
    return len(old) == len(new) and all(a == b or (a, b) in widths for a, b in zip(old, new, strict=True))


def _travelling(parameters: Sequence[Parameter]) -> tuple[Parameter, ...]:
    return tuple(one for one in parameters if one.dtype != "int64")


def _needs(old: Mapping[str, int], new: Mapping[str, int]) -> Iterator[Difference]:
    for name in sorted(old.keys() | new.keys()):
        was, now = old.get(name), new.get(name)
        if was == now:
            continue
        if now is None:
            yield Difference(Level.PATCH, "needs_less", name, was, None, f"{name} is not needed any more")
        elif was is None:
            yield Difference(Level.MAJOR, "needs_new", name, None, now, f"{name} {now} is needed now")
        elif now > was:
            text = f"{name} was {was} and is {now}: older runtimes refuse it"
            yield Difference(Level.MAJOR, "needs_more", name, was, now, text)
        else:
            yield Difference(Level.PATCH, "needs_less", name, was, now, f"{name} was {was} and is {now}")


def _sides(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "one number"
