"""How laws are kept and run, and what they are made of."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedkeel.core.errors import InputError
from fedkeel.core.keys import Key
from fedkeel.core.registry import Rule, build, definition
from fedkeel.core.types import Cohort, Judged, ServerState

Law = Callable[[Rule], None]
LAWS: dict[str, list[tuple[str | None, Law]]] = {}
KEY = Key.root(20)


def law(kind: str, trait: str | None = None) -> Callable[[Law], Law]:
    """Register a law of every rule of the kind, or of those that claim the trait."""

    def register(function: Law) -> Law:
        LAWS.setdefault(kind, []).append((trait, function))
        return function

    return register


def laws(rule: Rule) -> list[Law]:
    """The laws that hold for this rule."""
    return [found for trait, found in LAWS.get(rule.kind, []) if trait is None or trait in rule.definition.traits]


def check(kind: str, rule: Rule) -> None:
    """Run every law of the kind on the rule, those of its traits included; no global random generator may move.

    Raises `AssertionError` naming the rule, the law and the counterexample.
    """
    hold(rule.kind == kind, f"it is a {rule.kind}, not a {kind}")
    hold(bool(laws(rule)), f"no law is known for the kind '{kind}'")
    for found in laws(rule):
        before = _generators()
        try:
            found(rule)
        except AssertionError as error:
            raise AssertionError(f"{kind} '{rule!r}' breaks the law '{found.__name__}': {error}") from None
        hold(before == _generators(), f"{kind} '{rule!r}' used a global random generator: draw from a key")


def sample(kind: str, name: str) -> Rule:
    """The registered rule with its defaults, and small values where a parameter has none.

    Raises `AssertionError` when no such values fit: a rule must not slip past its laws.
    """
    found = definition(kind, name)
    required = [p for p, spec in found.parameters.items() if spec.default is spec.empty]
    for values in product((1, 2, 0.5, "*", {"*": "float16"}), repeat=len(required)):
        try:
            return build(kind, name, **dict(zip(required, values, strict=True)))
        except InputError:
            continue
    raise AssertionError(f"{kind} '{found.signature}': no sample parameters fit {', '.join(required)}: give defaults")


def rows(n: int, columns: int, seed: int = 0) -> Tensor:
    """(n, columns) float32 normal draws, each row about a common offset, as updates are."""
    generator = KEY.fold("rows", n, columns, seed).torch()
    return torch.randn(columns, generator=generator) + torch.randn(n, columns, generator=generator)


@dataclasses.dataclass(frozen=True)
class Bowl:
    """A referee whose loss is |model - 1|^2 / 2: what good updates are is known. Accuracy falls with the loss."""

    columns: int

    def judge(self, models: Iterable[Tensor]) -> Judged:
        loss = torch.tensor([0.5 * float((m.double() - 1).square().sum()) for m in models], dtype=torch.float64)
        return Judged(loss, 1 / (1 + loss))

    def gradient(self, theta: Tensor) -> Tensor:
        return theta - 1

    def update(self, theta: Tensor, key: Key) -> Tensor:
        return 0.5 * (1 - theta)


def cohort(U: Tensor, order: Sequence[int] | None = None) -> Cohort:
    """A cohort of rows (n, P), client i having 10 (i + 1) examples; `order` lists the clients in another order."""
    at = list(range(U.shape[0])) if order is None else list(order)
    counts = torch.tensor([10.0 * (i + 1) for i in at], dtype=torch.float64)
    U = U[at]
    norm, zero = U.double().norm(dim=1), torch.zeros(len(at), dtype=torch.float64)
    names = tuple(f"client-{i:04d}" for i in at)
    columns, third = U.shape[1], -(-U.shape[1] // 3)
    layers = tuple(slice(start, min(start + third, columns)) for start in range(0, columns, max(third, 1)))
    metrics: tuple[dict[str, float], ...] = tuple({} for _ in at)
    labels = tuple((0.5 + i / 1000, 0.5 - i / 1000) for i in at)
    return Cohort(
        U, names, counts, zero, zero + 5, norm, slice(0, columns), layers, metrics, labels, KEY, Bowl(columns)
    )


def asked(rule: Rule, given: Cohort, kept: Mapping[str, Tensor] | None = None) -> Any:
    """What a screen or weigher says of the cohort, theta being 0; a stateful one after `kept`, by default the first."""
    args: list[Any] = [given, ServerState(torch.zeros(given.U.shape[1]))]
    if rule.definition.init is None:
        return repeatable(rule, *args)
    return repeatable(rule, *args, rule.init() if kept is None else kept)[0]


def hold(condition: bool, words: str) -> None:
    """Raise `AssertionError(words)` unless the condition holds."""
    if not condition:
        raise AssertionError(words)


def near(found: Tensor, wanted: Tensor, scale: float, what: str, tolerance: float = 2e-5) -> None:
    """Hold that two tensors differ by at most `tolerance * scale` anywhere."""
    gap = float((found.double() - wanted.double()).abs().max()) if found.numel() else 0.0
    hold(gap <= tolerance * scale, f"{what}: off by {gap:.3g} where values are up to {scale:.3g}")


def same(found: Any, wanted: Any) -> bool:
    """Equal bit for bit, through any nesting; NaN equals NaN."""
    if isinstance(found, Tensor):
        return found.dtype == wanted.dtype and found.shape == wanted.shape and _bytes(found) == _bytes(wanted)
    if dataclasses.is_dataclass(found):
        return all(same(getattr(found, f.name), getattr(wanted, f.name)) for f in dataclasses.fields(found))
    if isinstance(found, dict):
        return found.keys() == wanted.keys() and all(same(found[k], wanted[k]) for k in found)
    if isinstance(found, tuple | list):
        return len(found) == len(wanted) and all(same(a, b) for a, b in zip(found, wanted, strict=True))
    return bool(found == wanted) or (isinstance(found, float) and found != found and wanted != wanted)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().numpy().tobytes()


def _generators() -> bytes:
    return pickle.dumps((random.getstate(), np.random.get_state(), torch.get_rng_state().tolist()))  # noqa: NPY002


def repeatable(rule: Rule, *args: Any) -> Any:
    """rule(*args), which must leave its arguments untouched and give the same bits again."""
    before = copy.deepcopy(args)
    result = rule(*args)
    hold(same(list(args), list(before)), "it changed its inputs")
    hold(same(rule(*args), result), "called again it gave another result")
    return result
