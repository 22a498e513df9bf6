"""The pool of workers: a death, an exception, an interrupt or an early end is a sentence, never a hang or a zombie."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from torch import Tensor, nn

from fedkeel.core.errors import RunError
from fedkeel.core.keys import Key
from fedkeel.core.layout import Layout
from fedkeel.core.registry import build
from fedkeel.train import ClientData, LocalWork, Task, Trainer, make_trainer
from fedkeel.train.pool import can_fork

pytestmark = pytest.mark.skipif(not can_fork, reason="workers are forked on Linux only")

WORK = LocalWork(4, 0.1, build("stopping", "epochs"), build("loss", "mse"))
PARENT = os.getpid()


class Touchy(nn.Module):
    """Raises on inputs above 10, ends its process on inputs above 100, unless that is the tests' own."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        if float(x.max()) > 100 and os.getpid() != PARENT:
            os.kill(os.getpid(), signal.SIGKILL)
        if float(x.max()) > 10:
            raise ValueError("an input above\n10")
        return self.body(x)


def trainer_of(worst: float, workers: int) -> tuple[Trainer, Tensor, list[Task]]:
    """Six clients of 2 to 12 examples, of which client 3 has the worst input."""
    counts = [4, 8, 2, 12, 6, 10]
    offsets = torch.tensor([0, *counts]).cumsum(0)
    x = torch.randn(int(offsets[-1]), 3, generator=torch.Generator().manual_seed(0)).clamp(-3, 3)
    x[offsets[3]] = worst
    module = Touchy()
    layout = Layout.of(module)
    data = ClientData(x, x.sum(1), offsets)
    tasks = [Task(client, Key.root(client)) for client in range(6)]
    return make_trainer("loop", module, layout, data, WORK, workers=workers), layout.flatten(module), tasks


def children() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


@pytest.mark.parametrize("workers", [1, 2])
def test_an_exception_of_the_module_fails_its_client_and_no_other(workers: int) -> None:
    trainer, theta, tasks = trainer_of(11.0, workers)
    found = {t.client: t for t in trainer.train(theta, tasks)}
    failed = {client: t.failure for client, t in found.items() if t.failure}
    assert list(failed) == [3]
    assert failed[3].startswith("the training step raised ValueError: an input above 10")
    assert len(found) == len(tasks)
    trainer.close()


def test_a_worker_that_dies_is_reported_and_the_trainer_can_go_on() -> None:
    trainer, theta, tasks = trainer_of(1000.0, 2)
    with pytest.raises(RunError, match=r"worker was killed by signal 9 \(out of memory\?\) while clients .*3"):
        list(trainer.train(theta, tasks))
    assert children() == []
    assert len(list(trainer.train(theta, [t for t in tasks if t.client != 3]))) == 5
    trainer.close()
    assert children() == []


def test_leaving_early_ends_the_workers_and_changes_no_later_result() -> None:
    trainer, theta, tasks = trainer_of(0.0, 2)
    expected = {t.client: t.delta.clone() for t in trainer.train(theta, tasks)}
    assert len(children()) == 2
    for _ in trainer.train(theta + 1, tasks):
        break
    assert children() == []
    for one in trainer.train(theta, tasks):
        assert torch.equal(one.delta, expected[one.client])
    trainer.close()
    trainer.close()
    assert children() == []


def test_more_clients_than_slots_and_more_workers_than_clients() -> None:
    trainer, theta, tasks = trainer_of(0.0, 3)
    assert sorted(t.client for t in trainer.train(theta, tasks)) == list(range(6))
    assert [t.client for t in trainer.train(theta, tasks[:1])] == [0]
    assert list(trainer.train(theta, [])) == []
    trainer.close()


def test_a_trainer_that_is_forgotten_takes_its_workers_along() -> None:
    trainer, theta, tasks = trainer_of(0.0, 2)
    list(trainer.train(theta, tasks))
    del trainer
    assert children() == []


SCRIPT = """
import torch
from torch import nn
from fedkeel.core.keys import Key
from fedkeel.core.layout import Layout
from fedkeel.core.registry import build
from fedkeel.train import ClientData, LocalWork, Task, make_trainer
module = nn.Linear(3, 1)
layout = Layout.of(module)
data = ClientData(torch.randn(8, 3), torch.randn(8, 1), torch.tensor([0, 4, 8]))
work = LocalWork(4, 0.0, build("stopping", "steps", steps=10**9), build("loss", "mse"))
tasks = [Task(client, Key.root(client)) for client in range(2)]
trainer = make_trainer("loop", module, layout, data, work, workers=2)
rounds = trainer.train(layout.flatten(module), tasks)
trainer._start()
print(*(worker.pid for worker in trainer._workers), flush=True)
try:
    next(rounds)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupt_or_a_kill_of_the_parent_leaves_no_worker_behind(number: signal.Signals, tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    steps = "10**9" if number == signal.SIGINT else "2000"  # orphans end with the client they are at
    script.write_text(
        SCRIPT.replace("10**9", steps).replace("next(rounds)", "import time; next(rounds); time.sleep(60)")
    )
    process = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )  # a session of its own, so that the signal goes to parent and workers alike, as a terminal's would
    assert process.stdout is not None
    workers = [psutil.Process(int(pid)) for pid in process.stdout.readline().split()]
    assert len(workers) == 2
    time.sleep(0.3)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.kill()
    rest = process.communicate(timeout=20)[0]
    assert ("interrupted" in rest) == (number == signal.SIGINT)
    gone, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive
    assert len(gone) == 2
