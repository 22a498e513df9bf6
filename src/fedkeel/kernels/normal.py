"""Normals from random bits, by Box and Muller 1958, and their way into a sum."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedkeel.kernels import native

_FINE = 20
"""Bits of a step's noise below its scale."""


def normals(words: Tensor) -> Tensor:
    """(2n,) float64 of (2n,) int64, n words for the radius, to 9.4 standard deviations, and n for the angle.

    Compiled and not, they agree to rounding.
    """
    pairs, compiled = len(words) // 2, native.library()
    if not isinstance(compiled, str):
        out = torch.empty(2 * pairs, dtype=torch.float64)
        compiled.normals(words.data_ptr(), pairs, out.data_ptr())
        return out
    radius, angle = words.to(torch.float64).view(2, pairs)
    radius.add_(0.5).abs_().mul_(2.0**-63).log_().mul_(-2).sqrt_()
    angle.mul_(math.pi * 2.0**-63)
    return torch.cat([radius * angle.cos(), radius.mul_(angle.sin_())])


def add_noise(x: Tensor, noise: Tensor, scale: float, share: float) -> None:
    """x = (x + scale * noise) * share in place, x (n,) float32 and noise (n,) float64.

    The sum is rounded to whole units of a 2^20th of the scale, so that its low bits tell nothing of x (Mironov 2012):
    float32 holds them up to 16 scales, and rounds what lies beyond once more.
    """
    every = 1.5 * 2.0 ** (52 + math.frexp(scale)[1] - 1 - _FINE) if scale else 0.0
    compiled = native.library()
    if not isinstance(compiled, str) and x.device.type == "cpu" and x.is_contiguous():
        compiled.noised(noise.data_ptr(), len(x), scale, every, share, x.data_ptr(), x.data_ptr())
    else:
        x.copy_(noise.to(x.device).mul(scale).add_(x).add_(every).sub_(every).mul_(share))
