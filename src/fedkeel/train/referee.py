"""What the server can find out with examples of its own: how good models are, and which way is down."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedkeel.core.errors import FedkeelError
from fedkeel.core.keys import Key
from fedkeel.core.layout import Layout
from fedkeel.core.types import Judged
from fedkeel.train.client import Client, seeded, single_thread
from fedkeel.train.contract import ClientData, LocalWork, Task
from fedkeel.train.evaluate import evaluate, evaluating
from fedkeel.train.loop import LoopStep

_BATCH = 500


class ServerExamples:
    """A `Referee` that holds the examples of `data`'s one client. Nothing that it is asked changes it.

    Results are single-threaded and depend on the arguments alone. Every column must be shared: a model with
    private layers can not be judged by the server.
    """

    def __init__(
        self,
        module: nn.Module,
        layout: Layout,
        data: ClientData,
        work: LocalWork,
        apart: tuple[ClientData, ClientData] | None = None,
    ) -> None:
        """`apart` are the same examples in two: what an update trains on, and what it validates on."""
        self._module, self._layout, self._data, self._work = module, layout, data, work
        self._training = data if apart is None else apart[0]
        self._validation = None if apart is None else apart[1]
        self.follow(work)
        self._inputs = data.prepare(data.x)

    def follow(self, work: LocalWork) -> None:
        """From now on update as clients do whose work is this."""
        step = LoopStep(self._module, self._layout, self._training, work)
        self._client = Client(self._module, self._layout, self._training, work, step, None, self._validation)

    def judge(self, models: Iterable[Tensor]) -> Judged:
        """Mean loss and accuracy of each model (P,) on the examples."""
        with _one_thread():
            found = [self._evaluated(model) for model in models]
        loss, accuracy = (
            torch.tensor([torch.nan if f[name] is None else f[name] for f in found], dtype=torch.float64)
            for name in ("loss", "accuracy")
        )
        return Judged(loss, accuracy)

    def _evaluated(self, model: Tensor) -> dict[str, float | int | None]:
        return evaluate(self._module, self._layout, model, self._inputs, self._data.y, _as_they_are, self._work.loss)

    def gradient(self, theta: Tensor) -> Tensor:
        """The gradient (P,) of the mean loss at theta, in evaluation mode; zero for buffers and whatever is frozen."""
        leaf = theta.detach().clone().requires_grad_()
        columns = self._layout.views(leaf)
        shared = [e for e in self._layout.entries if e.name in columns]
        tensors = {e.name: columns[e.name].to(getattr(torch, e.dtype)) for e in shared}
        total = torch.zeros((), dtype=torch.float32)
        with _one_thread(), torch.enable_grad(), evaluating(self._module):
            for x, y in zip(torch.split(self._inputs, _BATCH), torch.split(self._data.y, _BATCH), strict=True):
                total = total + self._work.loss(functional_call(self._module, tensors, (x,)), y).sum()
            (g,) = torch.autograd.grad(total / len(self._inputs), leaf)
        g[self._layout.params.stop :] = 0
        return g

    def update(self, theta: Tensor, key: Key) -> Tensor:
        """The update (P,) of a client with these examples, by the job's local work. Raises `FedkeelError`."""
        with _one_thread(), seeded(key, torch.device("cpu")):
            outcome = self._client.train(theta, Task(0, key), {})
        if outcome.failure is not None:
            raise FedkeelError(f"training on the server's own examples failed: {outcome.failure}")
        return self._client.step.vector[self._layout.shared] - theta


def _as_they_are(x: Tensor) -> Tensor:
    return x


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread, and nothing drawn from torch's own generator is left changed."""
    with single_thread(), seeded(Key.root(0), torch.device("cpu")):
        yield
