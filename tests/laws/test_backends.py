"""Every backend equals the plain loop to rounding, and itself bit for bit, whoever trains beside it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from train_cases import BATCH, CASES, Case, compiled, data_of, module_of, tasks_of, work_of

from fedkeel.core.layout import Layout
from fedkeel.core.registry import build, rule
from fedkeel.train import ClientData, LocalWork, Task, Trained, Trainer, make_trainer
from fedkeel.train.backends import fits

NATIVE = pytest.param("native", marks=compiled)
FAST = ("traced", NATIVE, "rows")


@rule("stopping", name="test_until_lower")
def until_lower(num_examples: int, batch_size: int, losses: list[float]) -> int:
    """Stops after the epoch in which the loss fell below 1.2, or after 9 steps."""
    return 0 if losses and (min(losses) < 1.2 or len(losses) >= 9) else len(losses) + 1


@rule("correction", name="test_proximal", traits=("elementwise",))
def proximal(g: Tensor, theta: Tensor, theta0: Tensor, c_i: None, c: None, *, coef: float = 0.8) -> Tensor:
    """g + coef (theta - theta0), as FedProx has it."""
    return g.add(theta - theta0, alpha=coef)


def outcomes(trainer: Trainer, theta: torch.Tensor, tasks: list[Task], **control: torch.Tensor) -> dict[int, Trained]:
    found = {}
    for one in trainer.train(theta, tasks, control):
        found[one.client] = Trained(
            one.client, one.delta.clone(), one.private, one.steps, one.loss, one.num_examples, one.failure
        )
    trainer.close()
    return found


def both(case: Case, backend: str, work: LocalWork, data: ClientData | None = None) -> None:
    """Train every client by a backend and by the loop, and compare."""
    module = module_of(case)
    layout = Layout.of(module, case.private)
    data = data or data_of(case)
    theta = layout.flatten(module)[layout.shared] + 0.01
    tasks = tasks_of(data, layout)
    expected = outcomes(make_trainer("loop", module, layout, data, work, workers=1), theta, tasks)
    found = outcomes(make_trainer(backend, module, layout, data, work, workers=1), theta, tasks)
    assert found.keys() == expected.keys()
    for client, want in expected.items():
        got = found[client]
        assert (got.steps, got.num_examples, got.failure) == (want.steps, want.num_examples, want.failure)
        assert got.loss == pytest.approx(want.loss, rel=1e-5)
        torch.testing.assert_close(got.delta, want.delta, rtol=1e-4, atol=2e-6)
        assert (got.private is None) == (want.private is None)
        if want.private is not None:
            torch.testing.assert_close(got.private, want.private, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("name", CASES)
def test_a_backend_equals_the_loop_or_says_why_it_does_not_fit(name: str, backend: str) -> None:
    case = CASES[name]
    if backend in case.refused:
        module = module_of(case)
        reason = fits(backend, module, Layout.of(module, case.private), data_of(case), work_of(case))
        assert reason
    else:
        mid_epoch = build("stopping", "steps", steps=5)
        both(case, backend, work_of(case, build("correction", "l2", coef=0.1), stopping=mid_epoch))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("name", ["mlp", "low_rank"])
def test_corrections_that_add_the_weights_twice_are_added_once_each(name: str, backend: str) -> None:
    rules = [build("correction", rule, coef=0.8) for rule in ("l2", "test_proximal", "l2")]
    case = CASES[name]
    both(case, backend, replace(work_of(case, *rules, stopping=build("stopping", "epochs", epochs=4)), lr=0.01))


@pytest.mark.parametrize("backend", FAST)
def test_a_rule_that_looks_at_the_losses_stops_alike(backend: str) -> None:
    both(CASES["mlp"], backend, work_of(CASES["mlp"], stopping=build("stopping", "test_until_lower")))
    both(CASES["mlp"], backend, work_of(CASES["mlp"], stopping=build("stopping", "plateau", epsilon=0.05, most=6)))


def test_batch_norm_fits_the_rows_when_no_batch_is_partial() -> None:
    both(CASES["batch_norm"], "rows", work_of(CASES["batch_norm"]), data_of(CASES["batch_norm"], (12, 6, 18, 6, 6)))


def test_the_loop_is_sgd_as_it_is_written_in_the_textbook() -> None:
    case = CASES["mlp"]
    module, data = module_of(case), data_of(case)
    layout, work = Layout.of(module), work_of(case, stopping=build("stopping", "epochs", epochs=2))
    theta = layout.flatten(module)
    tasks = tasks_of(data, layout)
    found = outcomes(make_trainer("loop", module, layout, data, work, workers=1), theta, tasks)
    for task in tasks:
        layout.load_(module, theta)
        optimiser = torch.optim.SGD(module.parameters(), lr=work.lr)
        start, stop = data.range(task.client)
        losses = []
        for epoch in range(2):
            order = torch.randperm(stop - start, generator=task.key.fold("batches", epoch).torch()) + start
            for batch in order.split(BATCH):
                optimiser.zero_grad()
                loss = torch.nn.functional.cross_entropy(module((data.x[batch].float() - 127.5) / 64), data.y[batch])
                loss.backward()
                optimiser.step()
                losses.append(loss.item())
        torch.testing.assert_close(found[task.client].delta, layout.flatten(module) - theta, rtol=1e-4, atol=1e-6)
        assert found[task.client].loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)
        assert found[task.client].steps == len(losses)


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        *((name, b) for b in ("loop", "traced") for name in ("cnn", "batch_norm", "dropout", "counter", "private")),
        *(pytest.param(name, "native", marks=compiled) for name in ("mlp", "private")),
    ],
)
def test_a_result_is_bitwise_its_own_whatever_the_company_the_order_and_the_workers(name: str, backend: str) -> None:
    case = CASES[name]
    module, data = module_of(case), data_of(case)
    layout, work = Layout.of(module, case.private), work_of(case)
    theta = layout.flatten(module)[layout.shared]
    tasks = tasks_of(data, layout)
    alone = make_trainer(backend, module, layout, data, work, workers=1)
    expected = {}
    for task in tasks:
        expected |= outcomes(alone, theta, [task])
    for workers in (1, 3):
        trainer = make_trainer(backend, module, layout, data, work, workers=workers)
        again = outcomes(trainer, theta, tasks[::-1])
        for client, want in expected.items():
            assert torch.equal(again[client].delta, want.delta)
            assert again[client].loss == want.loss
            if want.private is not None:
                assert torch.equal(again[client].private, want.private)


@pytest.mark.parametrize("backend", ["loop", *FAST])
def test_training_leaves_the_module_the_inputs_and_the_random_state_alone(backend: str) -> None:
    case = CASES["dropout" if backend in ("loop", "traced") else "mlp"]
    module, data = module_of(case), data_of(case)
    layout, work = Layout.of(module), work_of(case)
    theta = layout.flatten(module)[layout.shared]
    before = [theta.clone(), data.x.clone(), layout.flatten(module)]
    random, threads, mode = torch.get_rng_state(), torch.get_num_threads(), module.eval().training
    trainer = make_trainer(backend, module, layout, data, work, workers=1)
    for _ in trainer.train(theta, tasks_of(data, layout)):
        assert torch.equal(torch.get_rng_state(), random)
    assert [torch.equal(a, b) for a, b in zip(before, (theta, data.x, layout.flatten(module)), strict=True)] == [
        True
    ] * 3
    assert torch.equal(torch.get_rng_state(), random)
    assert (torch.get_num_threads(), module.training) == (threads, mode)


@pytest.mark.parametrize("backend", ["loop", *FAST])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_loss_that_becomes_nan_ends_that_client_alone(backend: str, workers: int) -> None:
    case = CASES["mlp"]
    module, data = module_of(case), data_of(case)
    layout, work = Layout.of(module), work_of(case, stopping=build("stopping", "epochs", epochs=2))
    x = data.x.float()
    start, stop = data.range(2)
    x[start:stop] = math.nan
    data = ClientData(x, data.y, data.offsets, data.prepare)
    theta = layout.flatten(module)
    found = outcomes(make_trainer(backend, module, layout, data, work, workers=workers), theta, tasks_of(data, layout))
    assert len(found) == len(data)
    assert found[2].failure == "loss became NaN at step 1"
    for client in set(found) - {2}:
        assert found[client].failure is None
        assert math.isfinite(found[client].loss)
        assert bool(found[client].delta.isfinite().all())


@pytest.mark.parametrize(
    ("means", "asked"),
    [
        ([], 1),
        ([2.0], 2),
        ([2.0, 1.99], 3),
        ([2.0, 1.99, 1.985], 3),  # twice running: enough
        ([2.0, 1.0, 0.99], 4),
        ([2.0, 1.0, 0.99, 0.5, 0.49, 0.48], 6),
        ([5.0, 4.0, 3.0, 2.0, 1.0, 0.5, 0.1], 7),  # at most
    ],
)
def test_a_plateau_is_two_epochs_that_change_little(means: list[float], asked: int) -> None:
    rule = build("stopping", "plateau", epsilon=0.02, most=7)
    losses = [mean + off for mean in means for off in (-0.3, 0.1, 0.2)]  # three steps an epoch
    assert rule(12, 5, losses) == 3 * asked


def test_a_plateau_saves_steps_where_the_data_is_learnt() -> None:
    case = replace(CASES["mlp"])
    module, data = module_of(case), data_of(case)
    layout = Layout.of(module)
    work = replace(work_of(case, stopping=build("stopping", "plateau", epsilon=0.5, most=9)), lr=0.0001)
    done = make_trainer("loop", module, layout, data, work).train(layout.flatten(module), tasks_of(data, layout))
    epochs = {t.client: t.steps / -(-data.count(t.client) // work.batch_size) for t in done}
    assert set(epochs.values()) == {3.0}
