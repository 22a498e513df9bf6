"""Codecs of matrices and of whole models: low rank, by layer, within a budget."""

from __future__ import annotations

import math

import pytest
import torch
from codec_cases import KEY, MATRICES, codec, normal, payload
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedkeel.core.layout import Entry, Layout
from fedkeel.core.registry import build
from fedkeel.testing.codecs import SMALL, sent

pytestmark = pytest.mark.usefixtures("kernels")

# -- low rank


def test_power_sgd_gives_back_matrices_of_its_rank() -> None:
    row = torch.cat([(normal(m, 3) @ normal(3, n, seed=1)).flatten() for m, n in ((12, 54), (40, 30))] + [normal(40)])
    found = sent(codec("power_sgd(rank=3)", MATRICES), row)
    torch.testing.assert_close(found, row, atol=1e-4, rtol=1e-4)
    assert torch.equal(found[-40:], row[-40:])
    assert len(payload("power_sgd(rank=3)", row, MATRICES)) == 4 * (1 + 3 * 66 + 1 + 3 * 70 + 40)


def test_power_sgd_is_near_the_best_of_its_rank() -> None:
    """Eckart and Young: none of rank r is nearer than the first r singular values."""
    spectrum = torch.diag(0.7 ** torch.arange(30.0))
    M = torch.linalg.qr(normal(40, 30)).Q @ spectrum @ torch.linalg.qr(normal(30, 30, seed=1)).Q
    row = torch.cat([torch.zeros(648), M.flatten(), torch.zeros(40)])
    best = float(torch.linalg.svdvals(M)[4:].norm())
    errors = [float((sent(codec(f"power_sgd(rank=4, iterations={i})", MATRICES), row) - row).norm()) for i in (1, 2, 4)]
    assert best * 0.999 <= errors[2] <= 1.02 * best
    assert errors[1] <= 1.2 * best
    assert errors[2] <= errors[1] <= errors[0]


# -- mixed


def test_layered_gives_each_layer_the_first_codec_that_fits() -> None:
    row = normal(SMALL.columns)
    layers = {"*.bias": "float32", "conv": "top_k(share=0.1)", "*weight": "float16"}
    built = build("codec", "layered", layers=layers, rest="sign")(SMALL)
    found = sent(built, row)

    def of(vector: Tensor, name: str) -> Tensor:
        return vector[SMALL.slices(name)[0]]

    assert torch.equal(of(found, "conv.bias"), of(row, "conv.bias"))
    assert torch.equal(of(found, "fc.weight"), of(row, "fc.weight").half().float())
    conv = of(row, "conv.weight")
    wanted = sent(codec("top_k(share=0.1)", 108), conv)
    assert torch.equal(of(found, "conv.weight"), wanted)
    assert not built.exact
    assert not built.unbiased
    size = 4 * 4 + 8 + len(payload("top_k(share=0.1)", conv)) + 2 * 300 + (2 * 4 + 1)
    assert len(built.encode(row[None], [KEY])[0]) == size


def test_layered_claims_what_its_parts_claim() -> None:
    built = codec("layered(layers={'fc': 'int4', 'conv': 'random_k(share=0.5)'}, rest='float32')", SMALL)
    assert (built.lossless, built.unbiased, built.exact) == (False, True, True)
    assert codec("layered(layers={'*': 'float32'})", SMALL).lossless


@settings(max_examples=30, deadline=None)
@given(st.floats(0.5, 500), st.integers(0, 20), st.sampled_from([1e-20, 1.0, 1e30]))
def test_adaptive_never_exceeds_its_budget(ratio: float, seed: int, size: float) -> None:
    row = normal(SMALL.columns, seed=seed) * size
    row[SMALL.slices("fc.weight")[0]] *= 100
    budget = max(int(4 * SMALL.columns / ratio), 5)
    assert len(payload(f"adaptive(ratio={ratio})", row, SMALL)) <= budget
    assert len(payload(f"adaptive(bytes={budget})", row, SMALL)) <= budget


def test_adaptive_spends_its_bytes_where_they_save_most() -> None:
    """It is at least as near as any one codec of its menu of the same size, and nearer the more bytes it has."""
    layout = Layout(tuple(Entry(f"{i}", (50, 40), "float32", "param", True) for i in range(4)))
    row = torch.cat([normal(2000) * 0.01, normal(2000) ** 5, normal(2000).sign() * 3, normal(2000)])
    for text in (
        "top_k(share=0.01, values='int8')",
        "top_k(share=0.1, values='int4')",
        "sign",
        "int4(stochastic=False)",
    ):
        single = codec(f"layered(layers={{'*': {text!r}}})", layout)
        budget = len(single.encode(row[None], [KEY])[0]) + 4 + 3 * 8  # its own bookkeeping
        mixed = sent(codec(f"adaptive(bytes={budget})", layout), row)
        assert float((mixed - row).norm()) <= float((sent(single, row) - row).norm())
    errors = [
        float((sent(codec(f"adaptive(bytes={b})", layout), row) - row).norm()) for b in (4, 100, 1000, 9000, 40000)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] == pytest.approx(float(row.norm()))
    assert errors[-1] == 0


def test_adaptive_sends_a_tensor_that_is_not_finite_as_one() -> None:
    row = normal(SMALL.columns)
    row[SMALL.slices("conv.bias")[0].start] = math.inf
    found = sent(codec("adaptive(ratio=3)", SMALL), row)
    assert bool(found[SMALL.slices("conv.bias")[0]].isnan().all())
    assert int(found.isnan().sum()) == 4
