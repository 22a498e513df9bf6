"""What corrections send to the clients with the model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedkeel.core.errors import CohortError
from fedkeel.core.layout import Layout
from fedkeel.core.registry import Rule
from fedkeel.core.types import Closed
from fedkeel.kernels import distance
from fedkeel.round.plan import Plan
from fedkeel.round.privacy import NORM


def first_control(plan: Plan, layout: Layout) -> dict[str, Tensor]:
    """What is sent in the first round: corrections' zero vectors (P,), dials as they say, and a norm that moves."""
    found = {}
    for rule in plan.corrections:
        if "dial" in rule.definition.traits:
            found[rule.name] = rule.init()
        elif "control" in rule.definition.traits:
            found[rule.name] = torch.zeros(layout.columns)
    if plan.privacy is not None and plan.privacy.mechanism.quantile is not None:
        found[NORM] = torch.tensor([plan.privacy.mechanism.norm])
    return found


def next_control(told: Sequence[Rule], control: Mapping[str, Tensor], closed: Closed) -> dict[str, Tensor]:
    """After a round. Raises `CohortError` where a correction would send what is not finite, or of another shape."""
    found = dict(control)
    for rule in told:
        hook = rule.hook("control")
        assert hook is not None
        was, found[rule.name] = found[rule.name], hook(found[rule.name], closed)
        finite = "dial" in rule.definition.traits or math.isfinite(distance.sq_norm(found[rule.name]))
        if found[rule.name].shape != was.shape or not finite:
            raise CohortError(f"what correction '{rule!r}' would send is not finite, or has changed its shape")
    return found
