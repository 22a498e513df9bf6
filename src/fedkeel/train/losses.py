"""Losses: `(output, target) -> (B,)`, one figure per example; a batch's loss is their mean."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from fedkeel.core.registry import rule


@rule("loss", traits=("classes",))
def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy in nats: logits (B, C) with classes (B,), or (B, T, V) with (B, T), averaged over T."""
    if output.ndim == 2:
        return functional.cross_entropy(output, target, reduction="none")
    each = functional.cross_entropy(output.flatten(0, -2), target.flatten(), reduction="none")
    return each.view(target.shape).flatten(1).mean(1)


@rule("loss")
def mse(output: Tensor, target: Tensor) -> Tensor:
    """Squared error, averaged over the output's dimensions: output (B, ...), target of the same shape or (B,)."""
    target = target.to(output.dtype).view_as(output)
    return (output - target).square().flatten(1).mean(1) if output.ndim > 1 else (output - target).square()
