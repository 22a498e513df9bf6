"""The contract of local training: tasks in, rows out. Every backend keeps it; the plain loop is the oracle."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from fedkeel.core.keys import Key
from fedkeel.core.work import LocalWork

__all__ = ["ClientData", "LocalWork", "Prepare", "Scale", "Task", "Tokens", "Trained", "Trainer"]

Prepare = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Scale:
    """Stored inputs to model inputs: `(x.float() - shift) * factor`, per batch, so images stay uint8 until then."""

    shift: float = 0.0
    factor: float = 1.0

    def __call__(self, x: Tensor) -> Tensor:
        if (self.shift, self.factor) == (0.0, 1.0):
            return x.to(torch.float32)
        x = x.to(torch.float32, copy=True)  # fresh, so that the rest can be done in place
        return (x.sub_(self.shift) if self.shift else x).mul_(self.factor)


@dataclass(frozen=True, slots=True)
class Tokens:
    """Stored inputs to model inputs, for symbols: int64."""

    def __call__(self, x: Tensor) -> Tensor:
        return x.to(torch.int64)


@dataclass(frozen=True, slots=True)
class ClientData:
    """All clients' training examples, once, in contiguous tensors: client i owns rows offsets[i]:offsets[i + 1].

    x (N, ...) of any dtype, y (N, ...); `prepare` turns rows of x into the model's input, each row by itself: backends
    call it on several batches at once.
    """

    x: Tensor
    y: Tensor
    offsets: Tensor
    prepare: Prepare = field(default_factory=Scale)

    def __len__(self) -> int:
        return self.offsets.numel() - 1

    def range(self, client: int) -> tuple[int, int]:
        return int(self.offsets[client]), int(self.offsets[client + 1])

    def count(self, client: int) -> int:
        start, stop = self.range(client)
        return stop - start


@dataclass(frozen=True, slots=True)
class Task:
    """One client's local work in one round.

    `client` indexes `ClientData`. `key` is the client's key of this round: epoch e is shuffled by
    `torch.randperm(n, generator=key.fold("batches", e).torch())`; what the model draws comes from `key.fold("model")`.
    `private` are its private columns [trainable | buffers], (W - P,), by default the module's own; `memory` is what its
    corrections keep, (P,) each under the correction's name, zero where there is none. `speed` is the device's, 1 being
    that of the one that stopping rules by speed speak of.
    """

    client: int
    key: Key
    private: Tensor | None = None
    memory: Mapping[str, Tensor] = field(default_factory=dict)
    speed: float = 1.0


@dataclass(frozen=True, slots=True)
class Trained:
    """What came of a task. `delta` (P,) = local minus global shared columns, valid until the next one is asked for.

    `loss` is the mean training loss over the steps, `first_loss` and `last_loss` those that the client began and ended
    with: on its validation examples if it has any, else on the first and the last batch. `failure` says why there is
    no update (the loss turned NaN, ...); `delta` is then of no meaning.
    """

    client: int
    delta: Tensor
    private: Tensor | None
    steps: int
    loss: float
    num_examples: int
    failure: str | None = None
    first_loss: float = math.nan
    last_loss: float = math.nan


class Trainer(Protocol):
    """A backend. `train` yields each task's outcome once, in any order; an outcome depends on its task and theta alone.

    theta (P,): the global shared columns; `control` (correction's name -> (P,), or its dial) is what corrections take
    from the server. Only one `train` may be under way; leaving it early is fine. `name` names this very backend to
    `make_trainer`. `train` raises `RunError` when a client's step raises, or a worker dies.
    """

    @property
    def name(self) -> str: ...

    def train(
        self, theta: Tensor, tasks: Sequence[Task], control: Mapping[str, Tensor] | None = None
    ) -> Iterator[Trained]: ...

    def close(self) -> None: ...
