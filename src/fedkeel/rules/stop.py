"""Stopping rules: `(num_examples, batch_size, losses) -> steps wanted in all`.

`losses` are the losses of the steps so far. A rule with the trait `static` does not look at them and is asked once,
before the first step; any other is asked again at the end of every epoch, and the client goes on while it wants more
steps than were done. A last partial batch counts as a step. A rule with the trait `validation` is asked likewise, and
`losses` are those on the client's validation examples: before the first step, and after every epoch. With the trait
`speed` a fourth argument is that of the client's device, as the job declares it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Annotated

from annotated_types import Ge

from fedkeel.core.registry import rule


@rule("stopping", name="epochs", traits=("static",))
def whole_epochs(
    num_examples: int, batch_size: int, losses: Sequence[float], *, epochs: Annotated[int, Ge(1)] = 1
) -> int:
    """So many passes over the client's examples: clients with more data do more steps (FedAvg's E)."""
    return epochs * -(-num_examples // batch_size)


@rule("stopping", name="steps", traits=("static",))
def fixed_steps(num_examples: int, batch_size: int, losses: Sequence[float], *, steps: Annotated[int, Ge(1)]) -> int:
    """So many steps for every client, whatever its data; a client with fewer batches starts over, reshuffled."""
    return steps


@rule("stopping", traits=("static", "speed"))
def budget(
    num_examples: int, batch_size: int, losses: Sequence[float], speed: float, *, steps: Annotated[int, Ge(1)]
) -> int:
    """What a device can do in the time in which one of speed 1 does so many steps: at least one, rounded down.

    Everyone is done at about the same time, slow devices with less work (FedNova's setting, Wang et al. 2020; put
    `fednova` first in aggregate.mix). A device's speed is 1 / time of its class: `devices`.
    """
    return max(1, int(steps * speed))


@rule("stopping")
def plateau(
    num_examples: int,
    batch_size: int,
    losses: Sequence[float],
    *,
    epsilon: Annotated[float, Ge(0)],
    checks: Annotated[int, Ge(1)] = 2,
    most: Annotated[int, Ge(1)] = 10,
) -> int:
    """Epochs until their mean loss has changed by less than `epsilon`, `checks` times running; at most `most`.

    The training loss that the steps report themselves, averaged over each epoch: no more is computed. Clients whose
    data is learnt do fewer steps; where they must not pull less for that, put `fednova` first in aggregate.mix.
    """
    epoch = max(1, -(-num_examples // batch_size))
    done = len(losses) // epoch
    means = [math.fsum(losses[at * epoch : (at + 1) * epoch]) / epoch for at in range(done)]
    still = [abs(after - before) < epsilon for before, after in itertools.pairwise(means)]
    over = done >= most or (len(still) >= checks and all(still[-checks:]))
    return done * epoch if over else (done + 1) * epoch


@rule("stopping", traits=("validation",))
def early(
    num_examples: int,
    batch_size: int,
    losses: Sequence[float],
    *,
    patience: Annotated[int, Ge(1)] = 1,
    most: Annotated[int, Ge(1)] = 10,
) -> int:
    """Epochs until the loss on the client's validation examples has not fallen for `patience` epochs; at most `most`.

    Early stopping against local overfitting (Prechelt 1998). The client sends the model of its best epoch, and says as
    many steps as that took. Needs train.validation, the share of its examples that a client validates on.
    """
    epoch = max(1, -(-num_examples // batch_size))
    done = max(0, len(losses) - 1)
    after = [math.inf if math.isnan(loss) else loss for loss in losses[1:]]
    over = done >= most or (done > 0 and done - 1 - after.index(min(after)) >= patience)
    return done * epoch if over else (done + 1) * epoch
