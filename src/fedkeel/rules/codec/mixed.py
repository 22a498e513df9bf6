"""Other codecs for parts of a row."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fedkeel.core.errors import DecodeError, InputError, nearest
from fedkeel.core.keys import Key
from fedkeel.core.layout import Entry, Layout
from fedkeel.core.registry import parse, rule
from fedkeel.core.types import Codec
from fedkeel.kernels import distance
from fedkeel.kernels.quantise import Codes, Floats
from fedkeel.rules.codec.common import by_row, flat, joined, joined_bytes, part, shared, split

_KEY = Key(0)  # of codecs that draw nothing
_DROPPED, _NOT_FINITE = 0, 255
_MENU: tuple[tuple[str, float], ...] = (
    ("sign", 1),
    ("int4(stochastic=False)", 1),
    ("int8(stochastic=False)", 1),
    ("float16", 1),
    ("float32", 1),
    *(
        (f"top_k(share={share}, values='{values}')", 4 / share)
        for share in (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
        for values in ("sign", "int4", "int8")
    ),
)
"""What `adaptive` chooses among, by number from 1, and the least columns that each is tried for. All are deterministic;
a number never changes its meaning."""


@rule("codec")
def layered(layout: Layout, *, layers: dict[str, str], rest: str = "int8") -> Codec:
    """Other codecs for other layers: name pattern -> codec as text, as {"*.bias": "float16"}; the first that fits.

    A pattern fits a tensor's name by wildcards, or as the name of a module that holds it (`encoder`). All tensors of a
    pattern are one row for its codec, in the order of the layout; `rest` is for those that none fits. Error bounds and
    claims are those of the parts. Payload: the parts' payloads in the order of the patterns, `rest` last, parts without
    columns left out; ahead of one whose codec does not fix its length, that length in 8 bytes.
    """
    groups = _groups(layout, layers, rest)
    codecs: list[Codec] = [parse("codec", text)(part(entry for entry, _ in members)) for text, members in groups]
    places = [[columns for _, columns in members] for _, members in groups]
    widths = [sum(columns.stop - columns.start for columns in place) for place in places]

    def encode(U: Tensor, keys: Sequence[Key]) -> list[bytes | memoryview]:
        U = U.detach().to("cpu", torch.float32)
        found = [
            codec.encode(torch.cat([U[:, columns] for columns in place], dim=1), [key.fold(i) for key in keys])
            for i, (codec, place) in enumerate(zip(codecs, places, strict=True))
        ]
        return [b"".join(joined(codecs, [payloads[i] for payloads in found])) for i in range(len(keys))]

    def decode(payload: memoryview, out: Tensor) -> None:
        for codec, place, width, given in zip(codecs, places, widths, split(codecs, widths, payload), strict=True):
            values = torch.empty(width)
            codec.decode(given, values)
            _spread(values, place, out)

    def error(row: Tensor) -> Tensor:
        bound = torch.zeros_like(row)
        for codec, place in zip(codecs, places, strict=True):
            _spread(codec.error(torch.cat([row[columns] for columns in place])), place, bound)
        return bound

    most = sum(joined_bytes(codec, width) for codec, width in zip(codecs, widths, strict=True))
    return Codec(
        encode,
        decode,
        lambda _: most,
        error,
        lossless=all(codec.lossless for codec in codecs),
        unbiased=all(codec.unbiased for codec in codecs),
        exact=all(codec.exact for codec in codecs),
    )


def _groups(layout: Layout, layers: Mapping[str, str], rest: str) -> list[tuple[str, list[tuple[Entry, slice]]]]:
    """(codec, its tensors), those that have any. Raises `InputError` for a pattern that fits no tensor."""
    tensors = shared(layout)
    left, groups = list(tensors), []
    for pattern, text in layers.items():
        fits = [t for t in tensors if fnmatch.fnmatchcase(t[0].name, pattern) or t[0].name.startswith(pattern + ".")]
        if tensors and not fits:
            known = nearest(pattern, [entry.name for entry, _ in tensors])
            raise InputError(f"codec 'layered': layers pattern '{pattern}' fits no tensor of the model: {known}")
        groups.append((text, [t for t in left if t in fits]))
        left = [t for t in left if t not in fits]
    return [(text, members) for text, members in [*groups, (rest, left)] if members]


def _spread(values: Tensor, place: Sequence[slice], out: Tensor) -> None:
    """Put values one after the other into these columns."""
    at = 0
    for columns in place:
        length = columns.stop - columns.start
        out[columns] = values[at : at + length]
        at += length


@dataclass(frozen=True, slots=True)
class _Choice:
    """One way to send a tensor: what it takes, the squared error that it leaves, and how."""

    size: int
    error: float
    number: int
    payload: bytes | memoryview


@rule("codec")
def adaptive(
    layout: Layout,
    *,
    ratio: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 50.0,
    bytes: Annotated[int, Field(ge=1)] | None = None,
) -> Codec:
    """Within a number of bytes, for each tensor of each row the codec that leaves the least squared error in all.

    The bytes are those of float32 / `ratio`, at least one a tensor, or `bytes`. Each tensor is tried with each of a
    menu: left out, sign, int4, int8, float16, float32, top_k at ten shares from 0.0002 to 0.2 (where that is four
    columns or more) with its values as signs, int4 or int8. Of what each takes and the error it leaves, the lower
    convex hull; then from nothing, again and again, the step that takes off most error a byte and fits (greedy, Everett
    1963), and with what room is left whatever of the menu still betters a tensor. Deterministic, so for use with error
    feedback; the stated bound is the error itself. Payload: a byte for each tensor that has columns, 0 left out
    (zeros), 255 not finite (NaN), else its number in the menu; then the parts' payloads, ahead of a top_k its length in
    8 bytes.
    """
    tensors = [columns for _, columns in shared(layout)]
    if bytes is not None and bytes < len(tensors):
        raise InputError(f"codec 'adaptive': bytes = {bytes} is below one for each of {len(tensors)} tensors: raise it")
    budget = max(int(4 * layout.columns / ratio), len(tensors)) if bytes is None else bytes
    widths = [columns.stop - columns.start for columns in tensors]
    menus = {width: _menu(width) for width in set(widths)}

    def encode(row: Floats, key: Key) -> Codes:
        room = budget - len(tensors)
        tried = [_tried(row[columns], menus[w], room) for columns, w in zip(tensors, widths, strict=True)]
        chosen = _chosen(tried, room)
        used = [(menus[w][c.number], c) for c, w in zip(chosen, widths, strict=True) if c.number in menus[w]]
        parts = joined([codec for codec, _ in used], [c.payload for _, c in used])
        numbers = np.array([c.number for c in chosen], np.uint8)
        return np.concatenate([numbers, *(np.frombuffer(p, np.uint8) for p in parts)])

    def decode(payload: memoryview, out: Tensor) -> None:
        if not len(tensors) <= len(payload) <= budget:
            raise DecodeError(f"the payload has {len(payload)} bytes, it takes {len(tensors)} to {budget}")
        out.numpy().fill(0)
        used = []
        for columns, width, number in zip(tensors, widths, payload[: len(tensors)], strict=True):
            if number == _NOT_FINITE:
                out[columns] = torch.nan
            elif number in menus[width]:
                used.append((menus[width][number], columns, width))
            elif number != _DROPPED:
                raise DecodeError(f"a tensor of {width} columns has codec number {number}")
        parts = split([u[0] for u in used], [u[2] for u in used], payload[len(tensors) :])
        for (codec, columns, _), given in zip(used, parts, strict=True):
            codec.decode(given, out[columns])

    def error(row: Tensor) -> Tensor:
        out = torch.empty_like(row)
        decode(encode(row.numpy(), _KEY).data, out)
        return (out.double() - row.double()).abs().to(torch.float32) * (1 + 2.0**-20)

    return Codec(by_row(encode), decode, lambda _: budget, error)


@lru_cache(maxsize=4096)
def _menu(columns: int) -> Mapping[int, Codec]:
    """The menu's codecs for a tensor, by number."""
    return {i: parse("codec", text)(flat(columns)) for i, (text, least) in enumerate(_MENU, 1) if columns >= least}


def _tried(values: Floats, menu: Mapping[int, Codec], room: int) -> list[_Choice]:
    """The ways to send a tensor that fit into the room, rising in size; the first is to leave it out."""
    row = torch.from_numpy(values)
    energy = distance.sq_norm(row)
    if not np.isfinite(energy):
        return [_Choice(0, 0.0, _NOT_FINITE, b"")]
    found = [_Choice(0, energy, _DROPPED, b"")]
    if energy == 0:
        return found
    out = np.empty_like(values)
    for number, codec in menu.items():
        if codec.exact and codec.max_bytes(len(row)) > room:
            continue
        (payload,) = codec.encode(row[None], [_KEY])
        codec.decode(memoryview(payload), torch.from_numpy(out))
        left = distance.sq_norm(torch.from_numpy(np.subtract(out, values, out=out)))
        found.append(_Choice(len(payload) + (0 if codec.exact else 8), left, number, payload))
    return sorted((c for c in found if c.size <= room), key=lambda c: (c.size, c.error))


def _hull(tried: Sequence[_Choice]) -> list[_Choice]:
    """Those from the first on of which each step takes off less error a byte than the one before."""
    hull = [tried[0]]
    for choice in tried[1:]:
        if choice.error < hull[-1].error:
            while len(hull) > 1 and _gain(hull[-2], hull[-1]) <= _gain(hull[-2], choice):
                hull.pop()
            hull.append(choice)
    return hull


def _gain(before: _Choice, after: _Choice) -> float:
    """Squared error taken off a byte."""
    return (before.error - after.error) / max(after.size - before.size, 1e-9)


def _chosen(tried: Sequence[Sequence[_Choice]], room: int) -> list[_Choice]:
    """One way for each tensor, within the room: steps up the hulls by falling gain, then what else fits."""
    hulls = [_hull(ways) for ways in tried]
    steps = [(-_gain(a, b), i, j) for i, hull in enumerate(hulls) for j, (a, b) in enumerate(pairwise(hull), 1)]
    at = [0] * len(hulls)
    for _, i, j in sorted(steps):
        more = hulls[i][j].size - hulls[i][j - 1].size
        if at[i] == j - 1 and more <= room:
            at[i], room = j, room - more
    chosen = [hull[j] for hull, j in zip(hulls, at, strict=True)]
    for i in sorted(range(len(chosen)), key=lambda i: -chosen[i].error):
        best = min((c for c in tried[i] if c.size <= chosen[i].size + room), key=lambda c: (c.error, c.size))
        room -= best.size - chosen[i].size
        chosen[i] = best
    return chosen
