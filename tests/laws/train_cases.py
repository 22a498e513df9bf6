"""The modules and the data that the laws of training run over: small, ragged, one for each thing that can go wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedkeel.core.keys import Key
from fedkeel.core.layout import Layout
from fedkeel.core.registry import Rule, build
from fedkeel.kernels import native
from fedkeel.train import ClientData, LocalWork, Scale, Task, Tokens

compiled = pytest.mark.skipif(isinstance(native.library(), str), reason=str(native.library()))
BATCH = 6
COUNTS = (20, 3, 12, 7, 6, 1)  # partial batches, clients smaller than a batch, a lone last example


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 9), nn.ReLU(), nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 4))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 5, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(5, 6, 3, padding="same"), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(24, 4),
    )  # fmt: skip


class Residual(nn.Module):
    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, stride=2, padding=1, bias=False)
        self.norm1, self.norm2 = norm(8), norm(8)
        self.conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm1(self.stem(x)))
        h = torch.relu(h + self.norm2(self.conv(h)))
        return self.head(h.mean((2, 3)))


class Viewing(nn.Module):
    """Flattens by `view`, which channels last cannot do; and has a parameter that no output depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3)
        self.head = nn.Linear(108, 4)
        self.unused = nn.Parameter(torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.conv(x)).view(len(x), -1))


def frozen() -> nn.Module:
    module = mlp()
    module[1].requires_grad_(False)
    return module


class Counter(nn.Module):
    """Keeps an integer buffer that steers its output, and puts a new tensor in a float buffer's place."""

    steps: Tensor
    average: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(64, 4)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("average", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x.flatten(1))
        self.steps += 1
        self.average = 0.9 * self.average + 0.1 * h.detach().mean(0)
        return h / self.steps + self.average


class Text(nn.Module):
    """Embedding and LSTM; the output layer is tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.out = nn.Linear(8, 11)
        self.out.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.lstm(self.embed(x))[0])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
        self.out = nn.Linear(8, 11)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layer(self.embed(x)))


class LowRank(nn.Module):
    """Weights that are products of parameters: each one's gradient reads the other, and its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(5, 64) / 8), nn.Parameter(torch.randn(9, 5) / 2)
        self.square = nn.Parameter(torch.randn(9, 9) / 3)
        self.out = nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(functional.linear(x.flatten(1), self.b @ self.a))
        return self.out(functional.linear(h, self.square @ self.square.T))


class Branching(nn.Module):
    """Takes a path that depends on the data: no fixed sequence of operations."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x.flatten(1))
        return h if h.sum() > 0 else 2 * h


def dropout() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 9), nn.GELU(), nn.Dropout(0.4), nn.Linear(9, 4))


@dataclass(frozen=True)
class Case:
    make: Callable[[], nn.Module]
    kind: str = "image"  # or "text", "number"
    private: tuple[str, ...] = ()
    refused: tuple[str, ...] = ("native",)  # backends that say why they cannot


CASES = {
    "mlp": Case(mlp, refused=()),
    "private": Case(mlp, private=("5.*",), refused=()),
    "private_first": Case(
        lambda: Residual(nn.BatchNorm2d), private=("norm1.*", "head.bias"), refused=("rows", "native")
    ),
    "frozen": Case(frozen, refused=()),
    "cnn": Case(cnn),
    "group_norm": Case(lambda: Residual(lambda c: nn.GroupNorm(2, c))),
    "batch_norm": Case(lambda: Residual(nn.BatchNorm2d), refused=("rows", "native")),
    "viewing": Case(Viewing, refused=()),
    "counter": Case(Counter, refused=("rows", "native")),
    "dropout": Case(dropout, refused=("rows", "native")),
    "text": Case(Text, "text", refused=("rows", "native")),
    "attention": Case(Attention, "text"),
    "regression": Case(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.Softplus(), nn.Linear(5, 1)), "number"),
    "low_rank": Case(LowRank, refused=()),
    "branching": Case(Branching, refused=("traced", "rows", "native")),
}


def module_of(case: Case) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return case.make()


def data_of(case: Case, counts: tuple[int, ...] = COUNTS) -> ClientData:
    generator = Key.root(3).torch()
    n = sum(counts)
    offsets = torch.tensor([0, *counts]).cumsum(0)
    if case.kind == "text":
        x = torch.randint(0, 11, (n, 5), generator=generator, dtype=torch.uint8)
        return ClientData(x, torch.randint(0, 11, (n, 5), generator=generator), offsets, Tokens())
    x = torch.randint(0, 256, (n, 1, 8, 8), generator=generator, dtype=torch.uint8)
    if case.kind == "number":
        return ClientData(x, torch.randn(n, generator=generator), offsets, Scale(127.5, 1 / 64))
    return ClientData(x, torch.randint(0, 4, (n,), generator=generator), offsets, Scale(127.5, 1 / 64))


def work_of(case: Case, *corrections: Rule, stopping: Rule | None = None) -> LocalWork:
    loss = build("loss", "mse" if case.kind == "number" else "cross_entropy")
    return LocalWork(BATCH, 0.05, stopping or build("stopping", "epochs"), loss, corrections)


def tasks_of(data: ClientData, layout: Layout, memory: tuple[str, ...] = ()) -> list[Task]:
    """One task for every client, with private columns and memories of its own."""
    result = []
    for client in range(len(data)):
        key = Key.root(5).fold(client)
        generator = key.fold("test").torch()
        private = torch.rand(layout.width - layout.columns, generator=generator) * 0.1 + 0.5
        kept = {name: torch.randn(layout.columns, generator=generator) * 0.1 for name in memory}
        result.append(Task(client, key, private if len(private) else None, kept))
    return result
