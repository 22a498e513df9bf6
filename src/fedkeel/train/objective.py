"""The objective on a batch: the job's rule, given the module as a function of its tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedkeel.core.errors import InputError
from fedkeel.core.layout import PERSONAL, Layout
from fedkeel.core.registry import Rule
from fedkeel.core.types import Local, Tensors
from fedkeel.core.work import LocalWork

_EXTRA = PERSONAL + ":"


def personal(module: nn.Module, objective: Rule) -> dict[str, tuple[Tensor, bool]]:
    """What each client has of its own under an objective, for `Layout.of`: name -> first value, whether trained."""
    found: dict[str, tuple[Tensor, bool]] = {}
    traits = objective.definition.traits
    if {"copy", "last"} & traits:
        layout = Layout.of(module)
        views = layout.views(layout.flatten(module))
        for entry in layout.entries:
            found[entry.name] = views[entry.name].to(getattr(torch, entry.dtype)), entry.trainable and "copy" in traits
    further = objective.init()
    if not isinstance(further, Mapping) or not all(isinstance(value, Tensor) for value in further.values()):
        raise InputError(f"'{objective!r}': its init gave {further!r}: give names with tensors")
    return found | {":" + name: (value, True) for name, value in further.items()}


def batch_losses(
    module: nn.Module,
    layout: Layout,
    work: LocalWork,
    tensors: dict[str, Tensor],
    start: Tensors,
    x: Tensor,
    y: Tensor,
    *,
    trial: bool = False,
) -> tuple[Tensor, Tensor]:
    """(losses to descend, losses to report) of a batch.

    `tensors` are all of the layout's and the module's further buffers, by name; buffers that the module replaces are
    replaced there. `start` are the parameters at the round's beginning, where the objective looks back.
    """
    model, own, extra = parted(tensors)
    # Its passes must not count twice in what is no column, as how many batches were normalised.
    further = {n: b.clone() for n, b in model.items() if own and n not in layout.offsets}
    own |= further

    def run(which: Tensors, inputs: Tensor) -> Tensor:
        output: Tensor = functional_call(module, which, (inputs,))  # type: ignore[arg-type]
        return output

    def features(which: Tensors, inputs: Tensor) -> tuple[Tensor, Tensor]:
        seen: list[Tensor] = []
        hooks = [part.register_forward_pre_hook(_noting(seen, len(inputs))) for part in _layers(module)]
        try:
            output = run(which, inputs)
            if trial and seen[-1].data_ptr() == inputs.data_ptr():
                raise InputError("the last layer that is called is given the inputs themselves: there are no features")
            return output, seen[-1]
        finally:
            for hook in hooks:
                hook.remove()

    def loss(output: Tensor, target: Tensor) -> Tensor:
        found: Tensor = work.loss(output, target)
        return found

    trained = tuple(e.name for e in layout.entries if e.trainable and not e.name.startswith(PERSONAL))
    begun = {name: tensor for name, tensor in start.items() if not name.startswith(PERSONAL)}
    descended, reported = work.objective(Local(run, features, loss, x, y, trained, model, own, extra, begun))
    tensors |= model
    tensors |= {PERSONAL + name: tensor for name, tensor in own.items() if name not in further}
    return descended, reported


def parted(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """(the model's, the client's own copy's, its extra numbers) by their own names."""
    model = {name: t for name, t in tensors.items() if not name.startswith(PERSONAL)}
    extra = {name.removeprefix(_EXTRA): t for name, t in tensors.items() if name.startswith(_EXTRA)}
    own = {
        name.removeprefix(PERSONAL): t
        for name, t in tensors.items()
        if name.startswith(PERSONAL) and not name.startswith(_EXTRA)
    }
    return model, own, extra


def own_columns(layout: Layout) -> int:
    """How many of the first columns are trained copies and numbers that are the client's own."""
    return sum(e.size for e in layout.entries if e.trainable and e.name.startswith(PERSONAL))


def pulled(work: LocalWork, layout: Layout, g: Tensor, theta: Tensor, theta0: Tensor) -> Tensor:
    """The gradient (..., T) of the trainable columns, the copy's pulled to the shared parameters as the rule does."""
    pull = work.objective.hook("pull")
    if pull is None:
        return g
    # The copies lie in the order of the shared parameters, before whatever else is the client's own.
    shared = slice(layout.shared.start, layout.trainable.stop)
    own = slice(0, shared.stop - shared.start)
    moved = pull(g[..., own], theta[..., own], theta0[..., shared])
    return torch.cat([moved, g[..., own.stop :]], -1)


def _layers(module: nn.Module) -> list[nn.Module]:
    """The parts of a module that have parameters of their own."""
    return [part for part in module.modules() if next(part.parameters(recurse=False), None) is not None]


def _noting(seen: list[Tensor], examples: int) -> Callable[[nn.Module, tuple[object, ...]], None]:
    """Note what a layer is given, if it is a batch: a parametrisation is a layer that is given weights."""

    def note(_: nn.Module, given: tuple[object, ...]) -> None:
        if given and isinstance(given[0], Tensor) and given[0].shape[:1] == (examples,):
            seen.append(given[0])

    return note


def try_objective(module: nn.Module, layout: Layout, work: LocalWork, x: Tensor, y: Tensor) -> None:
    """Ask an objective for its losses on a few examples. Raises `InputError` where it does not give what it must."""
    rule = work.objective
    said = f"'{rule!r}'"
    if {"copy", "last"} <= rule.definition.traits:
        raise InputError(f"{said} has the traits copy and last: a copy is trained, or is the last model; choose one")
    if "copy" in rule.definition.traits and rule.hook("own") is None:
        raise InputError(f"{said} keeps a copy and does not say which model is the client's: give it the hook 'own'")
    leaves = {name: view.clone() for name, view in layout.views(layout.flatten(module)).items()}
    types = {e.name: getattr(torch, e.dtype) for e in layout.entries}
    tensors = {name: leaf.to(types[name]) for name, leaf in leaves.items()}
    start = {e.name: tensors[e.name].clone() for e in layout.entries if e.trainable}
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        for e in layout.entries:
            if e.trainable:
                tensors[e.name].requires_grad_()
        found = batch_losses(copy.deepcopy(module), layout, work, tensors, start, x, y, trial=True)
    for losses, what in zip(found, ("descends", "reports"), strict=True):
        if losses.ndim != 1 or not len(losses):
            raise InputError(f"{said} {what} losses of shape {tuple(losses.shape)}: give one for each example")
    if found[1].shape != y.shape[:1]:
        raise InputError(f"{said} reports losses of shape {tuple(found[1].shape)} for {len(y)} examples: one for each")
