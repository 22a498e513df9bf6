"""Modules that a tracer can get wrong: each either trains as the plain loop does, or is refused with the reason."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedkeel.core.layout import Layout
from fedkeel.core.registry import build
from fedkeel.train import ClientData, LocalWork, Scale, Tokens
from fedkeel.train.backends import fits


class OneLayerTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(torch.relu(self.a(x.flatten(1))))))


class SameGradient(nn.Module):
    """Two vectors whose gradients are one tensor, and a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.p, self.q = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.ones(4))
        self.scale, self.b = nn.Parameter(torch.ones(())), nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.b(x.flatten(1)) + self.p + self.q


class WeightTimesItself(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(64, 4) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        h = x.flatten(1) @ self.w
        return h + 0.1 * (h @ self.w.t() @ self.w)


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x.flatten(1))
        h[:, :2] = h[:, 2:4] * 2
        return self.b(functional.relu(h.mul_(2).add_(1), inplace=True))


class Recurrent(nn.Module):
    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.layer, self.out = layer, nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layer(x.flatten(1).view(-1, 8, 8))[0][:, -1])


class Cells(nn.Module):
    """Eight steps of a cell in Python: a weight's gradient is a sum of eight products."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.LSTMCell(8, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        h, c = torch.zeros(len(x), 6), torch.zeros(len(x), 6)
        for row in x.flatten(1).view(-1, 8, 8).unbind(1):
            h, c = self.cell(row, (h, c))
        return self.out(h)


class Double(nn.Module):
    """Parameters of another type than the federation's vector."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.body, self.dtype = nn.Linear(64, 4).to(dtype), dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.flatten(1).to(self.dtype)).float()


class Masked(nn.Module):
    """Attention under a causal mask, over an embedding with a padding row."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8, padding_idx=0)
        self.attend, self.out = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 11)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        mask = torch.triu(torch.ones(5, 5, dtype=torch.bool), 1)
        return self.out(h + self.attend(h, h, h, attn_mask=mask)[0])


class AsksForItsCount(nn.Module):
    """Averages its statistics over all steps, and so reads a number out of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = nn.BatchNorm2d(1, momentum=None), nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(x).flatten(1))


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.SiLU(), nn.Conv2d(4, 8, 3, groups=4), nn.ELU(), nn.ConvTranspose2d(8, 4, 2),
        nn.InstanceNorm2d(4, affine=True, track_running_stats=True), nn.LeakyReLU(), nn.AvgPool2d(2),
        nn.Upsample(scale_factor=2), nn.PReLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(4, 4, bias=False),
    )  # fmt: skip


def weight_norm() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.utils.parametrizations.weight_norm(nn.Linear(64, 4)))


TRACED: dict[str, Callable[[], nn.Module]] = {
    "one_layer_twice": OneLayerTwice,
    "same_gradient": SameGradient,
    "weight_times_itself": WeightTimesItself,
    "in_place": InPlace,
    "gru": lambda: Recurrent(nn.GRU(8, 6, batch_first=True), 6),
    "lstm": lambda: Recurrent(nn.LSTM(8, 6, batch_first=True, bidirectional=True, num_layers=2, dropout=0.3), 12),
    "cells": Cells,
    "float64": lambda: Double(torch.float64),
    "bfloat16": lambda: Double(torch.bfloat16),
    "masked": Masked,
    "convolutions": convolutions,
    "weight_norm": weight_norm,
}


def reason(backend: str, module: nn.Module, *corrections: str) -> str | None:
    generator = torch.Generator().manual_seed(0)
    offsets = torch.tensor([0, 7, 12])
    if isinstance(module, Masked):
        x = torch.randint(0, 11, (12, 5), generator=generator)
        data = ClientData(x, x.roll(-1, 1), offsets, Tokens())
    else:
        x = torch.randint(0, 256, (12, 1, 8, 8), generator=generator, dtype=torch.uint8)
        data = ClientData(x, torch.randint(0, 4, (12,), generator=generator), offsets, Scale(127.5, 1 / 64))
    rules = tuple(build("correction", name, coef=0.1) for name in corrections)
    work = LocalWork(5, 0.05, build("stopping", "epochs"), build("loss", "cross_entropy"), rules)
    return fits(backend, module, Layout.of(module), data, work)


@pytest.mark.parametrize("corrections", [(), ("l2",)], ids=str)
@pytest.mark.parametrize("name", TRACED)
def test_it_is_traced_exactly(name: str, corrections: tuple[str, ...]) -> None:
    assert reason("traced", TRACED[name](), *corrections) is None


@pytest.mark.parametrize("name", ["same_gradient", "weight_times_itself", "in_place", "weight_norm", "cells"])
def test_it_is_trained_in_rows_exactly(name: str) -> None:
    assert reason("rows", TRACED[name](), "l2") is None


@pytest.mark.parametrize(
    ("backend", "make", "why"),
    [
        ("traced", AsksForItsCount, "its path depends on the data"),
        ("rows", AsksForItsCount, "vmap"),
        ("rows", lambda: nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(64, 4)), "its step differs"),
        ("rows", lambda: nn.Sequential(nn.Dropout(0.2), nn.Flatten(), nn.Linear(64, 4)), "random"),
    ],
    ids=["count-traced", "count-rows", "batch_norm-rows", "dropout-rows"],
)
def test_it_is_refused_with_the_reason(backend: str, make: Callable[[], nn.Module], why: str) -> None:
    assert why in (reason(backend, make()) or "")
