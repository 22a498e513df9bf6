"""Laws of codecs."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Iterator

import torch
from torch import Tensor

from fedkeel.core.errors import DecodeError
from fedkeel.core.keys import Key
from fedkeel.core.layout import Entry, Kind, Layout
from fedkeel.core.registry import Rule
from fedkeel.core.types import Codec
from fedkeel.testing.harness import KEY, hold, law, rows, same

HUGE = 3.4e38
_SPARE = 1 << 20  # bytes that a decoder may use beside some arrays of the row's size
_WORDS = 64  # bytes a column that it may use in all


def _entry(name: str, *shape: int, kind: Kind = "param") -> Entry:
    return Entry(name, shape, "float32", kind, kind == "param")


SMALL = Layout(
    (
        Entry("own.weight", (3, 2), "float32", "private", True),
        _entry("conv.weight", 4, 3, 3, 3),
        _entry("conv.bias", 4),
        _entry("fc.weight", 12, 25),
        _entry("none.weight", 0, 3),
        _entry("gain"),
        _entry("norm.running_mean", 5, kind="buffer"),
        Entry("own.mean", (3,), "float32", "private", False),
    )
)
LAYOUTS = (
    SMALL,
    Layout((_entry("weight", 1),)),
    Layout((Entry("own.weight", (3, 2), "float32", "private", True),)),
    Layout((_entry("fc.weight", 70, 993), _entry("fc.bias", 491))),
)
"""Those of the laws: many shapes, one column, none, and more columns than kernels take at a time."""


def hard_rows(columns: int) -> Iterator[tuple[str, Tensor]]:
    """Finite rows (P,) that are hard to round, and what they are."""
    normal = rows(1, columns)[0]
    spike, place = torch.zeros(columns), torch.arange(columns)
    spike[columns // 2 : columns // 2 + 1] = -1.0
    yield "normal values", normal
    yield "values over many sizes", normal * 10.0 ** (place % 60 - 30)
    yield "zeros", torch.zeros(columns)
    yield "negative zeros", -torch.zeros(columns)
    yield "one value", spike
    yield "equal values", torch.full((columns,), 0.1)
    yield "equal sizes", torch.where(place % 3 == 0, -2.5, 2.5)
    yield "huge values", torch.where(place % 2 == 0, -HUGE, HUGE)
    yield "the largest value", torch.full((columns,), torch.finfo(torch.float32).max)
    yield "a huge value among small ones", torch.where(place == columns // 3, HUGE, 1e-3)
    yield "tiny values", normal * 1e-30
    yield "denormal values", (place % 7 - 3) * 1e-45


def decoded(codec: Codec, payload: bytes | memoryview, columns: int) -> Tensor:
    """A payload's row, every column of which the decoder must have written."""
    first, second = torch.full((columns,), math.nan), torch.zeros(columns)
    for out in (first, second):
        codec.decode(memoryview(payload), out)
    hold(same(first, second), "the decoder left a column as it was, or gave two results")
    return first


def sent(codec: Codec, row: Tensor, key: Key = KEY) -> Tensor:
    """What arrives of a row."""
    (payload,) = codec.encode(row[None], [key])
    return decoded(codec, payload, len(row))


@law("codec")
def does_to_n_rows_what_it_does_to_each(rule: Rule) -> None:
    for layout in LAYOUTS:
        codec, columns = rule(layout), layout.columns
        for n in (0, 1, 5):
            U = rows(n, columns) * torch.logspace(-3, 3, n)[:, None]
            keys, before = [KEY.fold(i) for i in range(n)], U.clone()
            found = [bytes(payload) for payload in codec.encode(U, keys)]
            hold(same(U, before), "encoding changed the rows")
            hold(len(found) == n, f"{n} rows became {len(found)} payloads")
            hold(found == [bytes(p) for p in codec.encode(U, keys)], "encoded again a row became other bytes")
            wide = torch.cat([U, U], dim=1)[:, :columns]  # rows that do not follow each other in memory
            hold(found == [bytes(p) for p in codec.encode(wide, keys)], "it depends on how the rows lie in memory")
            for i in range(n):
                alone = bytes(rule(layout).encode(U[i : i + 1], keys[i : i + 1])[0])
                hold(found[i] == alone, f"row {i} of {n} fares otherwise than alone")


@law("codec")
def stays_within_its_error(rule: Rule) -> None:
    for layout in LAYOUTS:
        codec = rule(layout)
        for what, row in hard_rows(layout.columns):
            bound = codec.error(row)
            hold(bound.shape == row.shape, f"the error of a row {tuple(row.shape)} is {tuple(bound.shape)}")
            for key in (KEY, KEY.fold(1)):
                gap = (sent(codec, row, key).double() - row.double()).abs()
                _within(gap, bound, f"{what} come back")


@law("codec")
def takes_the_bytes_that_it_says(rule: Rule) -> None:
    for layout in LAYOUTS:
        codec, columns = rule(layout), layout.columns
        limit = codec.max_bytes(columns)
        for what, row in hard_rows(columns):
            size = len(codec.encode(row[None], [KEY])[0])
            hold(size <= limit, f"{what}: {size} bytes, the limit is {limit}")
            hold(size == limit or not codec.exact, f"{what}: {size} bytes, it says exactly {limit}")


@law("codec")
def keeps_a_row_that_is_not_finite_visible(rule: Rule) -> None:
    codec, columns = rule(SMALL), SMALL.columns
    ends = {at for e in SMALL.entries for c in SMALL.slices(e.name) for at in (c.start, c.stop - 1)}
    for at in sorted({*ends, *range(0, columns, 7)} & set(range(columns))):
        U = rows(2, columns)
        U[0, at] = (math.nan, math.inf, -math.inf)[at % 3]
        first, second = (decoded(codec, p, columns) for p in codec.encode(U, [KEY, KEY.fold(1)]))
        hold(not bool(torch.isfinite(first).all()), f"a row that holds {float(U[0, at])} came out finite")
        hold(bool(torch.isfinite(second).all()), f"a row that holds {float(U[0, at])} spoilt another")


@law("codec")
def refuses_or_decodes_any_bytes(rule: Rule) -> None:
    for layout in LAYOUTS:
        codec, columns = rule(layout), layout.columns
        payload = bytes(codec.encode(rows(1, columns), [KEY])[0])
        draws, size = KEY.fold("bytes", columns).numpy(), len(payload)
        for count in (1, 8, 1000):
            hold(_refused(codec, payload + draws.bytes(count), columns), f"{count} bytes too many were taken")
        for _ in range(100):
            _refused(codec, draws.bytes(int(draws.integers(codec.max_bytes(columns) + 2))), columns)
            _refused(codec, draws.bytes(size), columns)
            cut = payload[: int(draws.integers(size))] if size else b""
            hold(not codec.exact or not size or _refused(codec, cut, columns), f"{len(cut)} of {size} bytes were taken")
            flipped = bytearray(payload)
            for _ in range(int(draws.integers(1, 4)) if size else 0):
                # Where what all else goes by is likely to be: at either end.
                near = min(size, 40) if draws.integers(2) else size
                flipped[int(draws.integers(near)) - int(draws.integers(2)) * near] ^= 1 << int(draws.integers(8))
            _refused(codec, bytes(flipped), columns)


@law("codec")
def gives_back_every_bit_if_it_says_so(rule: Rule) -> None:
    for layout in LAYOUTS:
        codec = rule(layout)
        for what, row in hard_rows(layout.columns) if codec.lossless else ():
            hold(same(sent(codec, row), row), f"{what} did not come back bit for bit")


@law("codec")
def is_right_in_the_mean_if_it_says_so(rule: Rule) -> None:
    """By Hoeffding's inequality on each column, and by the normal law on sums over all of them."""
    codec, columns, times = rule(SMALL), SMALL.columns, 600
    if not codec.unbiased:
        return
    row = rows(1, columns)[0]
    U, keys = row.expand(times, -1), [KEY.fold("mean", i) for i in range(times)]
    gaps = torch.stack([decoded(codec, p, columns) for p in codec.encode(U, keys)]).double() - row.double()
    rounding = 1e-5 * codec.error(row).double() + 1e-6 * row.double().abs()
    allowed = 6 * codec.error(row).double() / math.sqrt(times) + rounding
    mean = gaps.mean(0).abs()
    _within(mean, allowed, f"the mean over {times} keys is")
    signs = torch.stack([torch.ones(columns), row.sign(), *(rows(20, columns, 1).sign())]).double()
    sums = gaps @ signs.T
    wide = 5 * sums.std(0) / math.sqrt(times) + float(rounding.sum())
    hold(bool((sums.mean(0).abs() <= wide).all()), f"over {times} keys sums of columns are off from the row's")


def _refused(codec: Codec, payload: bytes, columns: int) -> bool:
    """Whether the decoder refused these bytes; whatever it did, in bounded memory."""
    out = torch.empty(columns)
    tracemalloc.start()
    try:
        codec.decode(memoryview(payload), out)
        return False
    except DecodeError:
        return True
    except Exception as error:
        raise AssertionError(f"decoding {payload[:40].hex()}... raised {type(error).__name__}: {error}") from None
    finally:
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        hold(used <= _WORDS * columns + _SPARE, f"decoding {len(payload)} bytes took {used} bytes of memory")


def _within(gap: Tensor, bound: Tensor, what: str) -> None:
    """Hold that no column is off by more than the bound; the counterexample is the worst."""
    beyond = ~(gap <= bound)
    if bool(beyond.any()):
        at = int(torch.where(beyond, gap - bound, -math.inf).nan_to_num(math.inf).argmax())
        hold(False, f"{what} off by {float(gap[at])!r} where it says {float(bound[at])!r} (column {at})")
