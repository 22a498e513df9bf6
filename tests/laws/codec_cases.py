"""What the tests of codecs share."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from fedkeel.core.keys import Key
from fedkeel.core.layout import Entry, Layout
from fedkeel.core.registry import parse
from fedkeel.core.types import Codec

KEY = Key.root(7)
FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
ROWS = st.lists(
    FLOATS | st.sampled_from([0.0, -0.0, 1.0, 0.5, -1.5, 3.4028235e38, 1e-45, 65504.0, 65520.0]), min_size=1
)


def flat(columns: int) -> Layout:
    return Layout((Entry("values", (columns,), "float32", "param", True),))


def codec(text: str, layout: Layout | int) -> Codec:
    built: Codec = parse("codec", text)(flat(layout) if isinstance(layout, int) else layout)
    return built


def payload(text: str, row: Tensor, layout: Layout | None = None, key: Key = KEY) -> bytes:
    return bytes(codec(text, layout or len(row)).encode(row[None], [key])[0])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_hand(values: list[int], low: int, *, unary: bool = True) -> bytes:
    """Rice codes as text: the low bits of all, then the rest in unary; each part filled up to whole bytes."""
    parts = ["".join(f"{v & (1 << low) - 1:0{low}b}"[::-1] if low else "" for v in values)]
    parts += ["".join("0" * (v >> low) + "1" for v in values)] if unary else []
    filled = [part + "0" * (-len(part) % 8) for part in parts]
    return b"".join(int(part[::-1], 2).to_bytes(len(part) // 8, "little") for part in filled if part)


MATRICES = Layout(
    (
        Entry("conv.weight", (12, 6, 3, 3), "float32", "param", True),
        Entry("fc.weight", (40, 30), "float32", "param", True),
        Entry("fc.bias", (40,), "float32", "param", True),
    )
)
