"""Registering a rule enrols it here: every rule of a kind that has laws is held to all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedkeel import testing
from fedkeel.core import registry
from fedkeel.core.errors import CohortError
from fedkeel.core.registry import Definition, Rule, definition, names

ENROLLED = [
    (kind, name)
    for kind in testing.LAWS
    for name in names(kind)
    if definition(kind, name).function.__module__.startswith("fedkeel.")  # other tests register rules that break laws
]


@pytest.mark.parametrize(("kind", "name"), ENROLLED)
def test_every_registered_rule_keeps_the_laws_of_its_kind(kind: str, name: str) -> None:
    testing.check(kind, testing.sample(kind, name))


def test_the_kinds_of_this_room_have_laws() -> None:
    assert set(testing.LAWS) >= {"reducer", "weigher", "row_transform", "server_optimiser", "attack", "mechanism"}


def broken(kind: str, function: Callable[..., Any], *traits: str, like: str) -> Rule:
    """A rule that is not registered, with the parameters of a registered one."""
    real = definition(kind, like)
    found = Definition(kind, "broken", function, real.parameters, real.types, real.needs, None, None, frozenset(traits))
    return Rule(found, dict(testing.sample(kind, like).parameters))


def nan_passes(U: Tensor, keys: Any, memory: Any, *, norm: float) -> Any:
    return U.nan_to_num(0.0), memory


def exceeds_by_rounding(U: Tensor, keys: Any, memory: Any, *, norm: float) -> Any:
    length = U.norm(dim=1, keepdim=True)
    return torch.where(length > norm, U * (norm / length), U), memory


def divides_by_zero(U: Tensor, keys: Any, memory: Any, *, norm: float) -> Any:
    return U * (norm / U.norm(dim=1, keepdim=True)).clamp(max=1 - 1e-6), memory


@pytest.mark.parametrize("function", [nan_passes, exceeds_by_rounding, divides_by_zero])
def test_a_broken_clip_is_found(function: Callable[..., Any]) -> None:
    with pytest.raises(AssertionError, match="breaks the law"):
        testing.check("row_transform", broken("row_transform", function, "clips", like="clip"))


def mutates(U: Tensor, w: Tensor) -> Tensor:
    """Weights are ignored."""
    U.copy_(U.sort(dim=0).values)
    return U[w > 0].median(0).values


def is_no_median(U: Tensor, w: Tensor) -> Tensor:
    """Weights are ignored."""
    return U[w > 0].double().mean(0).to(U.dtype)


def draws_globally(U: Tensor, w: Tensor) -> Tensor:
    """Weights are ignored."""
    np.random.rand()  # noqa: NPY002
    return U[w > 0].median(0).values


def says_nothing(U: Tensor, w: Tensor) -> Tensor:
    """The lower median."""
    return U[w > 0].median(0).values


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (mutates, "changed its inputs"),
        (is_no_median, "pull it"),
        (draws_globally, "global random generator"),
        (says_nothing, "docstring does not say so"),
    ],
)
def test_a_broken_reducer_is_found(function: Callable[..., Any], words: str) -> None:
    def counted(U: Tensor, w: Tensor) -> Tensor:
        if not bool(w.any()):
            raise CohortError("no rows")
        return function(U, w)

    counted.__doc__ = function.__doc__
    with pytest.raises(AssertionError, match=words):
        testing.check("reducer", broken("reducer", counted, "robust", "unweighted", "coordinatewise", like="median"))


def test_a_rule_for_which_no_parameters_can_be_made_fails_and_is_not_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    real = definition("reducer", "trimmed_mean")
    odd = Definition("reducer", "odd", real.function, real.parameters, {"trim": bytes}, None, None, None, frozenset())
    monkeypatch.setitem(registry._rules["reducer"], "odd", odd)
    with pytest.raises(AssertionError, match="no sample parameters fit trim"):
        testing.sample("reducer", "odd")


def test_a_rule_of_another_kind_is_refused() -> None:
    with pytest.raises(AssertionError, match="not a reducer"):
        testing.check("reducer", testing.sample("attack", "nan"))
