"""Laws of objectives: what a client's steps descend."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedkeel.core.keys import Key
from fedkeel.core.layout import Layout
from fedkeel.core.registry import Rule, build
from fedkeel.core.work import LocalWork
from fedkeel.testing.harness import KEY, hold, law, near, same
from fedkeel.train import ClientData, Task, make_trainer
from fedkeel.train.backends import fits
from fedkeel.train.objective import batch_losses, parted, personal

BATCH, CLASSES = 8, 3


def _federation(rule: Rule) -> tuple[nn.Module, Layout, ClientData, LocalWork]:
    with torch.random.fork_rng(devices=[]):
        module = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, CLASSES))
    generator = KEY.fold("objective").torch()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    x, y = torch.randn(26, 4, generator=generator), torch.randint(CLASSES, (26,), generator=generator)
    work = LocalWork(BATCH, 0.1, build("stopping", "epochs", epochs=2), build("loss", "cross_entropy"), objective=rule)
    return module, Layout.of(module, (), personal(module, rule)), ClientData(x, y, torch.tensor([0, 16, 26])), work


def _batch(rule: Rule, count: int) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """(leaves by name, losses to descend, losses to report), the model somewhat beside its start."""
    module, layout, data, work = _federation(rule)
    vector = layout.flatten(module)
    start = {name: view.clone() for name, view in layout.views(vector).items()}
    moved = vector + 0.1 * torch.randn(len(vector), generator=KEY.fold("moved").torch())
    leaves = {name: view.clone().requires_grad_() for name, view in layout.views(moved).items()}
    x, y = data.x[:count], data.y[:count]
    return leaves, *batch_losses(module, layout, work, dict(leaves), start, x, y)


@law("objective")
def gives_a_loss_for_every_example(rule: Rule) -> None:
    for count in (1, BATCH - 1, BATCH):
        leaves, descended, reported = _batch(rule, count)
        hold(reported.shape == (count,), f"of {count} examples it reports losses of shape {tuple(reported.shape)}")
        hold(descended.ndim == 1 and len(descended) > 0, f"it descends losses of shape {tuple(descended.shape)}")
        hold(bool(descended.isfinite().all() & reported.isfinite().all()), "a loss is not finite")
        trained = {
            name: leaf for name, leaf in leaves.items() if "last" not in rule.definition.traits or "/" not in name
        }
        found = torch.autograd.grad(descended.mean(), list(trained.values()), allow_unused=True)
        for name, g in zip(trained, found, strict=True):
            hold(g is not None, f"nothing moves '{name}'")
            hold(g is not None and bool(g.isfinite().all()), f"the gradient of '{name}' is not finite")


@law("objective")
def leaves_batch_and_models_alone(rule: Rule) -> None:
    module, layout, data, work = _federation(rule)
    vector = layout.flatten(module)
    before, x, y = vector.clone(), data.x[:BATCH].clone(), data.y[:BATCH].clone()
    views = layout.views(vector)
    batch_losses(module, layout, work, dict(views), dict(layout.views(vector.clone())), x, y)
    hold(same(vector, before), "it changed a model")
    hold(same(x, data.x[:BATCH]) and same(y, data.y[:BATCH]), "it changed the batch")


@law("objective")
def is_the_same_recorded(rule: Rule) -> None:
    given = _federation(rule)
    theta = given[1].flatten(given[0])[given[1].shared]
    refused = fits("traced", *given)
    hold(refused is None, f"it can not be recorded: {refused}")
    found = []
    for backend in ("loop", "traced"):
        trainer = make_trainer(backend, *given, workers=1)
        (done,) = trainer.train(theta, [Task(0, Key.root(1))])
        hold(done.failure is None, f"training failed: {done.failure}")
        found.append(torch.cat([t for t in (done.delta, done.private) if t is not None]))
    near(found[1], found[0], 1, "recorded, it steps elsewhere", 1e-4)


@law("objective", "copy")
def names_the_clients_own_model(rule: Rule) -> None:
    module, layout, _, _ = _federation(rule)
    model, own, extra = parted(layout.views(layout.flatten(module)))
    hook = rule.hook("own")
    hold(hook is not None, "it keeps a copy, and does not say which model is the client's: give it the hook 'own'")
    assert hook is not None
    found = hook(model, own, extra, list(model))
    hold(set(found) == set(model), f"its own model has {sorted(found)}, the module {sorted(model)}")
    hold(all(found[name].shape == model[name].shape for name in model), "its own model has other shapes")
