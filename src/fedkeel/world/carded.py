"""The card of a federation's model: what its job, its data and its rules say of it."""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import textwrap
from collections.abc import Mapping
from dataclasses import replace
from types import FunctionType

import torch
from torch import Tensor

from fedkeel.core.types import ServerState
from fedkeel.release.contract import Contract
from fedkeel.ship import card, tensors
from fedkeel.train import Prepare, Scale
from fedkeel.world.federation import Federation
from fedkeel.world.pool import Pool

CARD = "card"
"""Where the ledger and an agreement have the offered card."""


def make_card(
    federation: Federation,
    state: ServerState,
    metrics: Mapping[str, Mapping[str, float | None]],
    privacy: card.Privacy | None,
    parent: str | None,
) -> tuple[card.ModelCard, dict[str, Tensor]]:
    """The card of the model in `state`, and its tensors. `metrics`: what was measured last, by scope."""
    named = card.stored(federation.layout, state.theta)
    lineage = card.Lineage(
        job=federation.job.name,
        rounds=state.round,
        recipe=repr(federation.plan),
        fingerprint=tensors.fingerprint(named),
        data=_data(federation),
        parent=parent,
    )
    made = interface(federation, lineage)
    return made.model_copy(update={"privacy": privacy, "metrics": metrics}), named


def interface(federation: Federation, lineage: card.Lineage) -> card.ModelCard:
    """What must match between all who work with a federation's model."""
    job, pool, layout = federation.job, federation.pool, federation.layout
    shapes = card.stored(layout, torch.empty(layout.columns, device="meta"))
    return card.ModelCard(
        version=job.model.version,
        parameters=card.described(shapes),
        layout_digest=layout.digest,
        inputs=(_inputs(pool),),
        outputs=_outputs(federation),
        labels=pool.labels,
        preprocessing=hashlib.sha256(_in_full(pool.prepare).encode()).hexdigest(),
        network=repr(job.rule("model.build", "model")),
        lineage=lineage,
    )


def offer(federation: Federation) -> str:
    """The card of a federation's model before it is trained: as server and clients compare it."""
    lineage = card.Lineage(job=federation.job.name, rounds=0, recipe="", fingerprint="")
    return json.dumps(json.loads(interface(federation, lineage).to_json()), separators=(",", ":"))


def contract(federation: Federation, source: str) -> Contract:
    """The interface of a federation's model, its weights aside."""
    return untrained(card.ModelCard.from_json(offer(federation)), source)


def untrained(made: card.ModelCard, source: str) -> Contract:
    """What an offered card tells."""
    return replace(Contract.of(made, source), weights=None, card=None)


def _inputs(pool: Pool) -> card.Inputs:
    example, low, high = pool.prepare(pool.x[:1]), None, None
    if pool.x.dtype == torch.uint8 and isinstance(pool.prepare, Scale):
        low, high = pool.prepare(torch.tensor([0, 255], dtype=torch.uint8)).sort().values.tolist()
    return card.Inputs(
        shape=tuple(example.shape[1:]),
        dtype=_dtype(example),
        normalisation=_in_words(pool.prepare),
        low=low,
        high=high,
        features=pool.features,
    )


def _outputs(federation: Federation) -> tuple[card.Outputs, ...]:
    """Found by trying; of a module that gives something else than a tensor nothing is said."""
    pool, module = federation.pool, federation.module
    was = module.training
    with torch.no_grad():
        given = module.eval()(pool.prepare(pool.x[:1]).repeat_interleave(2, 0))
    module.train(was)
    if not isinstance(given, Tensor):
        return ()
    return (card.Outputs(shape=tuple(given.shape[1:]), dtype=_dtype(given)),)


def _data(federation: Federation) -> dict[str, str]:
    """Fingerprints of what is here: a server on the network has the test set only."""
    pool, data = federation.pool, federation.data
    found = {"test": tensors.fingerprint({"x": pool.test_x, "y": pool.test_y})}
    if len(data.y):
        found["train"] = tensors.fingerprint({"x": data.x, "y": data.y})
    return found


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _in_words(prepare: Prepare) -> str:
    """What was done to the inputs, the same text in every process."""
    code = _code(prepare)
    return repr(prepare) if code is None else code.__qualname__


def _in_full(prepare: Prepare) -> str:
    """What is digested: of code itself, without comments and documentation; of an object what it says it is."""
    code = _code(prepare)
    if code is None:
        return repr(prepare)
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(code)))
    except (OSError, TypeError, SyntaxError):  # typed in, or a lambda within a call
        return code.__qualname__
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def _code(prepare: Prepare) -> FunctionType | type | None:
    """The function or class that says what is done where the object itself does not: its repr may be its address."""
    if isinstance(prepare, FunctionType):
        return prepare
    says = inspect.getattr_static(type(prepare), "__repr__") is not object.__repr__
    return None if says else type(prepare)
