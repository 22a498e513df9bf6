"""Attacks: what hostile clients do, for simulation. What an attack acts on is its trait.

"rows":   `(U (n, P), bad (f,) int64, keys) -> (f, P)`, what the clients `bad` send instead of their own rows. U holds
          what every client would honestly send; each attack says what of it the attackers see.
"claims": `(num_examples (f,) int64, keys) -> (f,) int64`, the example counts they claim.
"data":   `(y, classes, key) -> y`, the labels one client trains on.

keys holds one `Key` per hostile client.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from fedkeel.core.keys import Key
from fedkeel.core.registry import rule
from fedkeel.kernels import blocks

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_COLUMNS = 1 << 15
_MOST_EXAMPLES = 2**53  # integers up to here survive any JSON reader and float64


@rule("attack", traits=("rows",))
def sign_flip(U: Tensor, bad: Tensor, keys: Sequence[Key], *, scale: Positive = 1.0) -> Tensor:
    """Each sends its own row times -scale (Li et al. 2019, RSA, section 5); it sees its own row only."""
    return U[bad] * -scale


@rule("attack", traits=("rows",))
def gaussian(U: Tensor, bad: Tensor, keys: Sequence[Key], *, std: Positive = 200.0) -> Tensor:
    """Each sends noise N(0, std^2) instead of its row (Blanchard et al. 2017, section 6); it sees nothing."""
    rows = [torch.randn(U.shape[1], generator=key.fold("gaussian").torch()) for key in keys]
    noise = torch.stack(rows) if rows else torch.empty(0, U.shape[1])
    return noise.mul_(std).to(U)


@rule("attack", traits=("rows",))
def nan(U: Tensor, bad: Tensor, keys: Sequence[Key]) -> Tensor:
    """Each sends a row of NaN: what a diverged or careless client sends. It sees nothing."""
    return torch.full((len(bad), U.shape[1]), torch.nan, dtype=U.dtype, device=U.device)


@rule("attack", traits=("rows",))
def alie(
    U: Tensor, bad: Tensor, keys: Sequence[Key], *, z: Annotated[float, Field(allow_inf_nan=False)] | None = None
) -> Tensor:
    """All send mean - z * std of the benign rows, per column: A Little Is Enough (Baruch et al. 2019, algorithm 3).

    They see every benign row, and take mean and std over those. By default z is the paper's z_max =
    Phi^-1((n - f - s) / (n - f)), s = floor(n / 2 + 1) - f: so far out that s benign rows are expected to lie farther.
    """
    n, f = U.shape[0], len(bad)
    benign = torch.ones(n, dtype=torch.bool, device=U.device)
    benign[bad] = False
    if not bool(benign.any()):
        return U[bad]
    z = _z_max(n, f) if z is None else z
    row = torch.empty(U.shape[1], dtype=U.dtype, device=U.device)
    for part in blocks.spans(slice(0, U.shape[1]), _COLUMNS):
        std, mean = torch.std_mean(U[benign, part].to(torch.float64), dim=0, correction=0)
        row[part] = mean - z * std
    return row.expand(f, -1).clone()


def _z_max(n: int, f: int) -> float:
    supporters = max(n // 2 + 1 - f, 1)
    share = (n - f - supporters) / (n - f)
    return NormalDist().inv_cdf(share) if share > 0.5 else 0.0


@rule("attack", traits=("claims",))
def inflated_count(num_examples: Tensor, keys: Sequence[Key], *, factor: Positive = 1000.0) -> Tensor:
    """Claim `factor` times as many examples as were trained on, at most 2^53: weights are the client's own claim."""
    claimed = [min(math.ceil(count * factor), _MOST_EXAMPLES) for count in num_examples.tolist()]
    return torch.tensor(claimed, dtype=torch.int64, device=num_examples.device)


@rule("attack", traits=("data",))
def label_flip(y: Tensor, classes: int, key: Key) -> Tensor:
    """Train on labels y -> classes - 1 - y (Fang et al. 2020, section 4.1)."""
    return classes - 1 - y
