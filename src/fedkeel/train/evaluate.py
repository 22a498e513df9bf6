"""Evaluation of a flat vector: loss and accuracy over a set, in chunks, without gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedkeel.core.layout import Layout
from fedkeel.core.registry import Rule
from fedkeel.train.arrange import arranger
from fedkeel.train.contract import Prepare
from fedkeel.train.objective import parted


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode, and back to whatever mode each part was in."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


def evaluate(
    module: nn.Module,
    layout: Layout,
    vector: Tensor,
    x: Tensor,
    y: Tensor,
    prepare: Prepare,
    loss: Rule,
    batch_size: int = 500,
    objective: Rule | None = None,
) -> dict[str, float | int | None]:
    """Mean loss and accuracy of the model `vector`, (W,) or (P,) with the module's own private columns, on x and y.

    Returns `loss` and `accuracy` (the share of targets that the largest output names; None unless the loss is one of
    classes), NaN for no examples, and `examples`. Memory is bounded by the batch; the module is left as it was.
    Given an `objective` under which clients have models of their own, it is the client's own that is measured.
    """
    classes = "classes" in loss.definition.traits
    total = torch.zeros((), dtype=torch.float64)
    correct = targets = 0
    for start, output in outputs(module, layout, vector, x, prepare, batch_size, objective):
        target = y[start : start + batch_size]
        total += loss(output, target).sum(dtype=torch.float64).cpu()
        if classes:
            correct += int((output.argmax(-1) == target).sum())
            targets += target.numel()
    examples = len(x)
    mean = float(total) / examples if examples else float("nan")
    accuracy = (correct / targets if targets else float("nan")) if classes else None
    return {"loss": mean, "accuracy": accuracy, "examples": examples}


def outputs(
    module: nn.Module,
    layout: Layout,
    vector: Tensor,
    x: Tensor,
    prepare: Prepare,
    batch_size: int = 500,
    objective: Rule | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """(first example, output) of one batch after the other, of the model that `evaluate` measures."""
    views = layout.views(vector)
    found = {e.name: views[e.name].to(getattr(torch, e.dtype)) for e in layout.entries if e.name in views}
    tensors, own, extra = parted(found)
    if objective is not None and (its_own := objective.hook("own")):
        tensors = its_own(tensors, own, extra, [e.name for e in layout.entries if e.trainable and e.name in tensors])
    arrange = arranger(module, x, prepare)
    with torch.inference_mode(), evaluating(module):
        for start in range(0, len(x), batch_size):
            yield start, functional_call(module, tensors, (arrange(prepare(x[start : start + batch_size])),))
