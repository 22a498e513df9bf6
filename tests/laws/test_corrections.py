"""Corrections against their formulas, and that every backend applies them alike; their laws: `testing.corrections`."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from train_cases import CASES, compiled, data_of, module_of, tasks_of, work_of

from fedkeel.core.layout import Layout
from fedkeel.core.registry import build, definition, parse, rule
from fedkeel.train import make_trainer

PARAMETERS: dict[str, dict[str, float]] = {"l2": {"coef": 0.3}, "fedprox": {"mu": 0.2}, "feddyn": {"alpha": 0.2}}


@rule("correction", name="test_drift", traits=("elementwise", "memory", "control"))
def drift(g: Tensor, theta: Tensor, theta0: Tensor, c_i: Tensor | None, c: Tensor | None) -> Tensor:
    """Uses all that a correction may use, column by column."""
    assert c_i is not None
    assert c is not None
    return g - c_i + 2 * c + 0.3 * (theta - theta0)


@rule("correction", name="test_clip")
def clip(g: Tensor, theta: Tensor, theta0: Tensor, c_i: Tensor | None, c: Tensor | None) -> Tensor:
    """Looks at the whole gradient: its norm becomes 0.1 at most."""
    assert c_i is None
    return g * (0.1 / g.norm(dim=-1, keepdim=True)).clamp(max=1.0)


def test_l2_is_the_gradient_of_half_the_squared_norm() -> None:
    theta = torch.randn(9, generator=torch.Generator().manual_seed(2), requires_grad=True)
    (expected,) = torch.autograd.grad(0.3 / 2 * theta.square().sum(), theta)
    corrected = build("correction", "l2", coef=0.3)(torch.zeros(9), theta.detach(), torch.zeros(9), None, None)
    torch.testing.assert_close(corrected, expected)


def test_none_changes_nothing() -> None:
    g = torch.randn(5)
    assert torch.equal(build("correction", "none")(g, g, g, None, None), g)
    assert definition("correction", "none").signature == "none"


@pytest.mark.parametrize("backend", ["loop", "traced", "rows"])
@pytest.mark.parametrize("chain", [("test_drift",), ("test_clip",), ("test_drift", "l2", "test_clip")], ids=str)
@pytest.mark.parametrize("name", ["mlp", "private", "cnn", "viewing"])
def test_every_backend_corrects_as_the_formula_says(name: str, chain: tuple[str, ...], backend: str) -> None:
    """Against plain SGD on the formula, written out: memory and control reach the right columns."""
    case = CASES[name]
    rules = [build("correction", r, **PARAMETERS.get(r, {})) for r in chain]
    module, data = module_of(case), data_of(case, (8, 5))
    layout, work = Layout.of(module, case.private), work_of(case, *rules)
    theta = layout.flatten(module)[layout.shared]
    control = {"test_drift": torch.linspace(-0.1, 0.1, layout.columns)}
    tasks = tasks_of(data, layout, ("test_drift",))
    trainer = make_trainer(backend, module, layout, data, work, workers=1)
    found = {t.client: t.delta.clone() for t in trainer.train(theta, tasks, control)}
    none = torch.zeros(layout.width)
    for task in tasks:
        c_i, c = none.clone(), none.clone()
        c_i[layout.shared], c[layout.shared] = task.memory["test_drift"], control["test_drift"]
        vector = layout.flatten(module)
        vector[layout.shared] = theta
        if task.private is not None:
            vector[: layout.shared.start] = task.private
        start0, T = vector.clone(), layout.trainable
        start, stop = data.range(task.client)
        order = torch.randperm(stop - start, generator=task.key.fold("batches", 0).torch()) + start
        for batch in order.split(work.batch_size):
            leaf = vector.clone().requires_grad_()
            out = torch.func.functional_call(module, layout.views(leaf), (data.prepare(data.x[batch]),))
            (g,) = torch.autograd.grad(work.loss(out, data.y[batch]).mean(), leaf)
            g = g[T]
            for r in rules:
                uses = "memory" in r.definition.traits
                g = r(g, vector[T], start0[T], c_i[T] if uses else None, c[T] if uses else None)
            vector[T] -= work.lr * g
        torch.testing.assert_close(found[task.client], (vector - start0)[layout.shared], rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("backend", ["traced", "rows", pytest.param("native", marks=compiled)])
@pytest.mark.parametrize("optimiser", ["sgd", "sgd(momentum=0.9)", "adam(eps=0.01)"])
@pytest.mark.parametrize(
    "chain",
    [("scaffold",), ("fedcm",), ("feddyn", "l2"), ("fedprox", "scaffold"), ("adaptive_fedprox", "fedcm")],
    ids=str,
)
@pytest.mark.parametrize("name", ["mlp", "private"])
def test_every_backend_equals_the_loop_whatever_the_method(
    name: str, chain: tuple[str, ...], optimiser: str, backend: str
) -> None:
    """With vectors at client and server as they are in the middle of a run; several workers pass them on."""
    if backend == "native" and "adaptive_fedprox" in chain:
        pytest.skip("a dial is broadcast, which has no compiled kernel")
    case = CASES[name]
    rules = [build("correction", r, **PARAMETERS.get(r, {})) for r in chain]
    module, data = module_of(case), data_of(case)
    layout = Layout.of(module, case.private)
    work = replace(work_of(case, *rules), optimiser=parse("optimiser", optimiser))
    theta = layout.flatten(module)[layout.shared]
    control = {r: torch.linspace(-0.1, 0.1, layout.columns) for r in chain}
    control["adaptive_fedprox"] = torch.tensor([0.4, 7.0, 7.0])
    tasks = tasks_of(data, layout, chain)

    def deltas(backend: str, workers: int) -> dict[int, Tensor]:
        with closing(make_trainer(backend, module, layout, data, work, workers=workers)) as trainer:
            return {t.client: t.delta.clone() for t in trainer.train(theta, tasks, control)}

    expected, found = deltas("loop", 1), deltas(backend, 2)
    for client, delta in expected.items():
        torch.testing.assert_close(found[client], delta, rtol=1e-3, atol=2e-6)
    without = replace(work, corrections=())
    with closing(make_trainer("loop", module, layout, data, without, workers=1)) as trainer:
        plain = {t.client: t.delta.clone() for t in trainer.train(theta, tasks, control)}
    assert all(not torch.allclose(plain[c], expected[c], rtol=1e-2) for c in plain)
