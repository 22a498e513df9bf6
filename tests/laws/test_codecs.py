"""Codecs: the laws with and without the compiled kernels, and what decoders and users are told."""

from __future__ import annotations

import math
import struct

import pytest
import torch
from codec_cases import KEY, MATRICES, ROWS, codec, normal, payload
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkeel import testing
from fedkeel.core.errors import DecodeError, InputError
from fedkeel.core.keys import Key
from fedkeel.core.registry import parse
from fedkeel.testing.codecs import SMALL, sent

pytestmark = pytest.mark.usefixtures("kernels")

VARIANTS = [
    "float32",
    "float16",
    "bfloat16",
    "int8",
    "int8(per='channel', stochastic=False)",
    "int8(per='row')",
    "int4(per='channel')",
    "int4(per='row', stochastic=False)",
    "sign",
    "sign(per='channel')",
    "qsgd(levels=1, bucket=64)",
    "qsgd(levels=127)",
    "top_k",
    "top_k(share=1.0, values='int8')",
    "top_k(share=0.1, values='int4')",
    "top_k(share=0.3, values='sign')",
    "random_k(share=0.07)",
    "random_k(scaled=False)",
    "power_sgd(rank=1, iterations=1)",
    "layered(layers={'*': 'qsgd(bucket=100)'})",
    "adaptive(ratio=6)",
]


@pytest.mark.parametrize("text", VARIANTS[:-1])  # adaptive's turn comes with the enrolment: it takes long
def test_a_codec_keeps_the_laws_whatever_its_parameters(text: str) -> None:
    testing.check("codec", parse("codec", text))


@pytest.mark.parametrize("text", VARIANTS)
@settings(max_examples=40, deadline=None)
@given(values=ROWS, seed=st.integers(0, 3))
def test_any_finite_row_comes_back_within_the_error(text: str, values: list[float], seed: int) -> None:
    row = torch.tensor(values)
    built = codec(text, len(row))
    gap = (sent(built, row, Key.root(seed)).double() - row.double()).abs()
    assert bool((gap <= built.error(row)).all())


@pytest.mark.parametrize("text", VARIANTS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_bytes_are_a_row_or_a_decode_error(text: str, data: st.DataObject) -> None:
    built, out = codec(text, SMALL), torch.empty(SMALL.columns)
    good = bytes(built.encode(normal(1, SMALL.columns), [KEY])[0])
    given_bytes = data.draw(st.binary(max_size=40) | st.binary(min_size=len(good), max_size=len(good)))
    at = data.draw(st.integers(0, len(good)))
    for bad in (given_bytes, good[:at], given_bytes + good, good[:at] + given_bytes + good[at + len(given_bytes) :]):
        try:
            built.decode(memoryview(bad), out)
        except DecodeError:
            continue


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("layered(layers={'convv.*': 'float16'})", "fits no tensor of the model: did you mean 'conv"),
        ("layered(layers={'*': 'float17'})", "did you mean 'float16'"),
        ("layered(layers={'*': 'int8(stochastc=True)'})", "did you mean 'stochastic'"),
        ("layered(layers={'*': 16})", "'layers'"),
        ("layered", "needs parameter 'layers'"),
        ("adaptive(bytes=4)", "below one for each of 5 tensors"),
        ("adaptive(ratio=0)", "'ratio'"),
        ("top_k(share=0.0)", "'share'"),
        ("top_k(values='float64')", "'values'"),
        ("random_k(share=1.5)", "'share'"),
        ("int8(per='layer')", "'per'"),
        ("qsgd(levels=128)", "'levels'"),
        ("power_sgd(rank=0)", "'rank'"),
    ],
)
def test_a_user_is_told_what_is_wrong(text: str, said: str) -> None:
    with pytest.raises(InputError, match=said) as error:
        codec(text, SMALL)
    assert "\n" not in str(error.value)


# -- what is refused


def test_forged_payloads_are_refused_with_their_reason() -> None:
    row = normal(100)
    bad = struct.pack("<f", math.inf)
    cases = [
        ("int8", bad + payload("int8", row)[4:], "scale"),
        ("int8", struct.pack("<f", -1.0) + payload("int8", row)[4:], "scale"),
        ("int8", struct.pack("<f", 0.0) + payload("int8", row)[4:], "scale"),
        ("sign", bad + payload("sign", row)[4:], "scale"),
        ("qsgd", bad + payload("qsgd", row)[4:], "scale"),
        ("qsgd", payload("qsgd", row)[:4] + b"\x09" + payload("qsgd", row)[5:], "low bits"),
        ("qsgd", payload("qsgd", row)[:4] + b"\x05" + b"\xff" * 63, "above|largest"),
        ("top_k(share=0.02)", payload("top_k(share=0.02)", row)[:8] + b"\xff\xff", "numbers are coded|position"),
        ("top_k(share=0.02)", payload("top_k(share=0.02)", row)[:8], "take|hold|coded"),
        ("adaptive", b"\x77" + payload("adaptive", row)[1:], "number 119"),
        ("adaptive(bytes=100)", b"\x06" + struct.pack("<Q", 2**60) + b"1234", "bytes is declared|number"),
        ("adaptive(bytes=300)", b"\x1e" + struct.pack("<Q", 2**60) + b"1234", "bytes is declared"),
        ("layered(layers={'*': 'top_k'})", struct.pack("<Q", 2**63) + b"1234", "is declared"),
        ("layered(layers={'*': 'top_k'})", b"1234", "ends before"),
        ("layered(layers={'*': 'top_k'})", payload("layered(layers={'*': 'top_k'})", row) + b"1", "follow"),
    ]
    for text, data, said in cases:
        with pytest.raises(DecodeError, match=said):
            codec(text, 100).decode(memoryview(data), torch.empty(100))


def test_a_low_rank_factor_that_is_not_finite_is_refused() -> None:
    data = bytearray(payload("power_sgd", normal(MATRICES.columns), MATRICES))
    for number in (math.nan, math.inf):
        data[40:44] = struct.pack("<f", number)
        with pytest.raises(DecodeError, match="not finite"):
            codec("power_sgd", MATRICES).decode(memoryview(data), torch.empty(MATRICES.columns))
