"""The objective on a batch: the job's rule, given the module as a function of its tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

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
    return found | {":" + name: (value, True) for name, value in objective.init().items()}


def batch_losses(
    module: nn.Module, layout: Layout, work: LocalWork, tensors: dict[str, Tensor], start: Tensors, x: Tensor, y: Tensor
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
        hook = _last_layer(module).register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        try:
            return run(which, inputs), seen[-1]
        finally:
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


def _last_layer(module: nn.Module) -> nn.Module:
    """The last part of a module that has parameters of its own and is called with one tensor."""
    parts: Iterable[nn.Module] = module.modules()
    return [part for part in parts if next(part.parameters(recurse=False), None) is not None][-1]
