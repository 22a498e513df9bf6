"""A federation that begins with a model that is there: the same one, or one that grew since."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fedkeel.core.errors import InputError
from fedkeel.release.compare import compare
from fedkeel.release.contract import Contract
from fedkeel.release.difference import Level
from fedkeel.ship import card, checkpoint, tensors
from fedkeel.ship.rundir import RunDir
from fedkeel.world.carded import CARD, contract
from fedkeel.world.federation import Federation


def first_model(federation: Federation) -> tuple[Tensor, str | None]:
    """The first model (P,), and the fingerprint of the one that it comes from (`model.start`), if of any.

    Where the model grew with its labels or features, what is there is kept: weights of a new feature begin at zero, so
    that it says nothing yet, those of a new label fresh. Raises `InputError` where the two do not fit, or where the
    job's version does not say that they differ.
    """
    fresh = federation.theta()
    if (start := federation.job.model.start) is None:
        return fresh, None
    made, named = _read(start)
    was = Contract.of(made, start)
    found = compare(was, replace(contract(federation, "the job"), weights="of the run"))
    if found.level == Level.MAJOR:
        worst = [one.text for one in found.differences if one.level == Level.MAJOR]
        more = f", and {len(worst) - 1} more" * (len(worst) > 1)
        raise InputError(f"model.start = '{start}' is no beginning of this model: {worst[0]}{more}: choose another")
    if found.objection:
        raise InputError(f"model.version does not fit model.start = '{start}': {found.objection}")
    kept = _kept(was, federation)
    for name, into in federation.layout.views(fresh).items():
        into.copy_(_grown(named[name].to(into.dtype), into, kept))
    return fresh, made.lineage.fingerprint


def _read(start: str) -> tuple[card.ModelCard, dict[str, Tensor]]:
    """The model of a finished run, or what a run that was stopped has come to."""
    for place in (Path(start), Path(start) / "model"):
        if (place / "card.json").is_file():
            return card.read(place)
    try:
        run = RunDir(Path(start))
        newest = checkpoint.latest(run.checkpoints)
    except InputError:
        newest = None
    if newest is None:
        raise InputError(f"model.start = '{start}' holds no model and no checkpoint: name the directory of a run")
    with run.ledger(readonly=True) as ledger:
        text = ledger.meta.get(CARD)
    if text is None:
        raise InputError(f"model.start = '{start}' was begun by an older fedkeel: let it end, or resume it")
    made = card.ModelCard.from_json(text)
    state, *_ = checkpoint.load(newest, layout_digest=made.layout_digest)
    sizes = [torch.Size(parameter.shape).numel() for parameter in made.parameters]
    named = {
        parameter.name: piece.reshape(parameter.shape).to(getattr(torch, parameter.dtype))
        for parameter, piece in zip(made.parameters, torch.split(state.theta, sizes), strict=True)
    }
    lineage = made.lineage.model_copy(update={"fingerprint": tensors.fingerprint(named)})
    return made.model_copy(update={"lineage": lineage}), named


class _Kept(NamedTuple):
    """How many features there were and are, and the places of those that stayed, then and now."""

    sides: tuple[int, int]
    then: list[int]
    now: list[int]


def _kept(was: Contract, federation: Federation) -> _Kept | None:
    """None where the features are as they were."""
    before, after = was.inputs[0].features if was.inputs else (), federation.pool.features
    names = {feature.name: at for at, feature in enumerate(after)}
    if not before or not after or [feature.name for feature in before] == list(names):
        return None
    sides = (len(before), len(after))
    if sides == (len(was.labels or ()), len(federation.pool.labels)):
        raise InputError(
            f"model.start: labels and features both grew from {sides[0]} to {sides[1]}, and which of them a tensor has "
            "cannot be told: let one of them grow at a time"
        )
    pairs = [(at, names[feature.name]) for at, feature in enumerate(before) if feature.name in names]
    return _Kept(sides, [then for then, _ in pairs], [now for _, now in pairs])


def _grown(old: Tensor, fresh: Tensor, kept: _Kept | None) -> Tensor:
    """The old values in their places; zero where a feature is new, fresh where a label is."""
    if old.shape == fresh.shape:
        return old
    for axis, sides in enumerate(zip(old.shape, fresh.shape, strict=True)):
        if kept is not None and sides == kept.sides:
            wider = old.new_zeros([*old.shape[:axis], sides[1], *old.shape[axis + 1 :]])
            old = wider.index_copy_(axis, torch.tensor(kept.now), old.index_select(axis, torch.tensor(kept.then)))
    wider = fresh.clone()
    wider[tuple(slice(side) for side in old.shape)] = old
    return wider
