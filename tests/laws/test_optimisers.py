"""A client's optimisers: PyTorch's own are the oracles, and every backend takes their steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from train_cases import BATCH, CASES, compiled, data_of, module_of, tasks_of, work_of

from fedkeel.core.errors import InputError
from fedkeel.core.layout import Layout
from fedkeel.core.registry import Rule, build, rule
from fedkeel.testing import check
from fedkeel.train import make_trainer
from fedkeel.train.backends import fits

NATIVE = pytest.param("native", marks=compiled)
ORACLES: list[tuple[str, dict[str, Any], Callable[..., torch.optim.Optimizer], dict[str, Any]]] = [
    ("sgd", {}, torch.optim.SGD, {}),
    ("sgd", {"momentum": 0.9}, torch.optim.SGD, {"momentum": 0.9}),
    ("sgd", {"momentum": 0.7, "nesterov": True}, torch.optim.SGD, {"momentum": 0.7, "nesterov": True}),
    ("adam", {}, torch.optim.Adam, {}),
    ("adam", {"beta1": 0.5, "beta2": 0.9, "eps": 1e-3}, torch.optim.Adam, {"betas": (0.5, 0.9), "eps": 1e-3}),
    ("adam", {"decay": 0.3}, torch.optim.AdamW, {"weight_decay": 0.3}),
]
IDS = [repr(build("optimiser", name, **given)) for name, given, _, _ in ORACLES]


@rule("optimiser", name="test_sign")
def sign(theta: Tensor, g: Tensor, slots: Sequence[Tensor], t: Tensor, lr: float) -> None:
    """A user's own: steps of lr along the gradient's sign, divided by the number of the step."""
    theta.sub_(g.sign() * (lr / t).to(g.dtype))


@rule("correction", name="test_keeping", traits=("memory",))
def keeping(g: Tensor, theta: Tensor, theta0: Tensor, c_i: Tensor, c: None) -> Tensor:
    """Keeps something."""
    return g - c_i


@pytest.mark.parametrize(("name", "given", "oracle", "options"), ORACLES, ids=IDS)
def test_steps_are_pytorchs(name: str, given: dict[str, Any], oracle: Any, options: dict[str, Any]) -> None:
    step = build("optimiser", name, **given)
    check("optimiser", step)
    generator = torch.Generator().manual_seed(3)
    start = torch.randn(200, generator=generator)
    parameter = nn.Parameter(start.clone())
    theirs, ours = oracle([parameter], lr=0.01, **options), start.clone()
    slots, clock = [torch.full_like(ours, value) for value in step.init()], torch.zeros((), dtype=torch.float64)
    for at in range(30):
        g = torch.randn(200, generator=generator) * 10.0 ** (at % 5 - 3)
        parameter.grad = g.clone()
        theirs.step()
        clock += 1
        step(ours, g, slots, clock, 0.01)
        torch.testing.assert_close(ours, parameter.data, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(("name", "given", "oracle", "options"), ORACLES, ids=IDS)
def test_a_clients_round_is_pytorchs(name: str, given: dict[str, Any], oracle: Any, options: dict[str, Any]) -> None:
    """Afresh for every client: nothing is left of the one before."""
    case = CASES["mlp"]
    module, data = module_of(case), data_of(case)
    layout = Layout.of(module)
    work = replace(work_of(case), optimiser=build("optimiser", name, **given), lr=0.01)
    theta, tasks = layout.flatten(module), tasks_of(data, layout)
    trainer = make_trainer("loop", module, layout, data, work, workers=1)
    for found in trainer.train(theta, tasks):
        layout.load_(module, theta)
        optimiser = oracle(module.parameters(), lr=0.01, **options)
        start, stop = data.range(found.client)
        key = next(task.key for task in tasks if task.client == found.client)
        order = torch.randperm(stop - start, generator=key.fold("batches", 0).torch()) + start
        for batch in order.split(BATCH):
            optimiser.zero_grad()
            nn.functional.cross_entropy(module((data.x[batch].float() - 127.5) / 64), data.y[batch]).backward()
            optimiser.step()
        torch.testing.assert_close(found.delta, layout.flatten(module) - theta, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("backend", ["traced", "rows", NATIVE])
@pytest.mark.parametrize("name", ["mlp", "private", "frozen", "cnn", "viewing", "low_rank"])
@pytest.mark.parametrize("corrections", [(), ("l2",)], ids=str)
@pytest.mark.parametrize(
    "optimiser",
    [build("optimiser", n, **p) for n, p, _, _ in (ORACLES[1], ORACLES[2], ORACLES[5])] + [build("optimiser", "adam")],
    ids=repr,
)
def test_every_backend_steps_as_the_loop_does(
    optimiser: Rule, corrections: tuple[str, ...], name: str, backend: str
) -> None:
    case = CASES[name]
    if backend in case.refused:
        pytest.skip(f"{backend} has no {name}")
    module, data = module_of(case), data_of(case)
    layout = Layout.of(module, case.private)
    rules = tuple(build("correction", c, coef=0.3) for c in corrections)
    epochs = build("stopping", "epochs", epochs=2)
    work = replace(work_of(case, *rules, stopping=epochs), optimiser=optimiser, lr=0.01)
    theta, tasks = layout.flatten(module)[layout.shared], tasks_of(data, layout)
    assert fits(backend, module, layout, data, work) is None
    expected = {
        t.client: (t.delta.clone(), t.private)
        for t in make_trainer("loop", module, layout, data, work, workers=1).train(theta, tasks)
    }
    seen = 0
    for workers in (1, 2):
        trainer = make_trainer(backend, module, layout, data, work, workers=workers)
        for t in trainer.train(theta, tasks):
            delta, private = expected[t.client]
            torch.testing.assert_close(t.delta, delta, rtol=2e-3, atol=1e-5)
            if private is not None and t.private is not None:
                torch.testing.assert_close(t.private, private, rtol=2e-3, atol=1e-5)
            seen += 1
        trainer.close()
    assert seen == 2 * len(data)


@pytest.mark.parametrize("backend", ["loop", "traced", "rows"])
def test_a_users_own_optimiser_runs_in_every_backend_but_native(backend: str) -> None:
    case = CASES["mlp"]
    step = build("optimiser", "test_sign")
    check("optimiser", step)
    module, data = module_of(case), data_of(case, (2 * BATCH, BATCH))
    layout = Layout.of(module)
    work = replace(work_of(case), optimiser=step, lr=0.25)
    theta = layout.flatten(module)
    found = {
        t.client: t.delta.clone()
        for t in make_trainer(backend, module, layout, data, work).train(theta, tasks_of(data, layout))
    }
    assert {round(t.item(), 6) for t in found[1].abs().unique()} <= {0.0, 0.25}
    assert {round(t.item(), 6) for t in found[0].abs().unique()} <= {0.0, 0.125, 0.25, 0.375}


@compiled
def test_native_says_that_it_has_no_kernel_for_an_optimiser() -> None:
    case = CASES["mlp"]
    module, data = module_of(case), data_of(case)
    work = replace(work_of(case), optimiser=build("optimiser", "test_sign"))
    why = fits("native", module, Layout.of(module), data, work)
    assert why == "the compiled kernels have no optimiser test_sign"


@pytest.mark.parametrize("backend", ["traced", "rows"])
def test_gradients_that_are_zero_but_for_rounding_keep_no_backend_away(backend: str) -> None:
    """The bias of attention's keys: Adam steps along its rounding, which differs."""
    case = CASES["attention"]
    module, data = module_of(case), data_of(case)
    work = replace(work_of(case), optimiser=build("optimiser", "adam"), lr=0.01)
    assert fits(backend, module, Layout.of(module), data, work) is None


def test_what_can_not_be_meant_is_refused() -> None:
    with pytest.raises(InputError, match="has no momentum to look ahead with: give momentum"):
        _ = replace(work_of(CASES["mlp"]), optimiser=build("optimiser", "sgd", nesterov=True)).slots
    with pytest.raises(InputError, match="'test_keeping' is written twice, and the two would share what they keep"):
        work_of(CASES["mlp"], *[build("correction", "test_keeping")] * 2)
