"""A client whose model is another version than the server's: refused with the difference, or its data are adapted."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedkeel.config import Job
from fedkeel.core.errors import InputError
from fedkeel.release.compare import compare
from fedkeel.release.contract import Contract
from fedkeel.release.difference import Comparison, Level
from fedkeel.ship.card import Feature, ModelCard
from fedkeel.train.contract import ClientData
from fedkeel.world.carded import contract, untrained
from fedkeel.world.federation import Federation, Held
from fedkeel.world.pool import Pool


def check(mine: Contract, offered: ModelCard) -> None:
    """Raises `InputError`, with the difference, where a client of the model `mine` can not train the server's.

    It can where one of the two is a minor step from the other, and declared as such: the newer one may be at either
    end, so that server and clients are brought to a new version one after the other, in any order.
    """
    theirs = untrained(offered, "the server")
    ways = sorted((compare(mine, theirs), compare(theirs, mine)), key=lambda one: one.level)
    reasons = [_why(found) for found in ways]
    if None not in reasons:
        versions = f"the server's model is {offered.version}, this client's {mine.version}"
        raise InputError(f"{versions}: {reasons[0]}: bring both to one version")


def bridged(job: Job, held: Held, offered: ModelCard) -> Federation:
    """The federation of the server's model, on data of a client's own version.

    Columns are found by their names; where the client has none, the feature's default stands for it. Features that the
    model does not have are left out, and so are examples of labels that it does not have. Raises `InputError`.
    """
    features, labels = offered.inputs[0].features, offered.labels
    classes = len(labels) or held.pool.classes
    places = columns(held.pool.features, features)
    x, y = examples(held.pool.x, held.pool.y, places, classes)
    test_x, test_y = examples(held.pool.test_x, held.pool.test_y, places, classes)
    if not len(y) or not len(test_y):
        raise InputError(f"this client has examples of none of the server's labels ({', '.join(labels[:5])})")
    pool = Pool(x, y, test_x, test_y, classes, held.pool.prepare, labels=labels, features=features)
    data = _adapted(held.data, places, classes)
    assert data is not None
    made = Federation.made(job, Held(pool, held.members, data, _adapted(held.holdout, places, classes)))
    if made.layout.digest != offered.layout_digest:
        theirs = untrained(offered, "the server")
        reason = _why(compare(contract(made, "this client"), theirs)) or "its tensors are others"
        raise InputError(
            f"the server's model {offered.version} cannot be built here: {reason}: bring both to one version"
        )
    return made


def _why(found: Comparison) -> str | None:
    if found.level < Level.MAJOR:
        return found.objection
    worst = [one.text for one in found.differences if one.level == Level.MAJOR]
    return worst[0] + f", and {len(worst) - 1} more" * (len(worst) > 1)


def columns(mine: Sequence[Feature], theirs: Sequence[Feature]) -> list[int | float] | None:
    """Of each feature of the server: its place among the client's, or what stands for it. None: they are the same."""
    if [one.name for one in mine] == [one.name for one in theirs]:
        return None
    places = {one.name: at for at, one in enumerate(mine)}
    found: list[int | float] = []
    for one in theirs:
        if one.name in places:
            found.append(places[one.name])
        elif one.default is not None:
            found.append(float(one.default))
        else:
            raise InputError(f"the server's model needs feature '{one.name}', which this client does not have")
    return found


def examples(x: Tensor, y: Tensor, places: list[int | float] | None, classes: int) -> tuple[Tensor, Tensor]:
    """Examples with a model's columns, where they are others, and of its labels alone."""
    if places is not None:
        x = torch.stack(
            [x[:, c].to(torch.float32) if isinstance(c, int) else torch.full((len(x),), c) for c in places], dim=1
        )
    kept = known(y, classes)
    return (x, y) if bool(kept.all()) else (x[kept], y[kept])


def _adapted(data: ClientData | None, places: list[int | float] | None, classes: int) -> ClientData | None:
    if data is None:
        return None
    x, y = examples(data.x, data.y, places, classes)
    counts = torch.cat([torch.zeros(1, dtype=torch.int64), known(data.y, classes).cumsum(0)])
    return ClientData(x, y, counts[data.offsets], data.prepare)


def known(y: Tensor, classes: int) -> Tensor:
    """Which examples have a label of the model; all where they have no labels."""
    if y.is_floating_point() or not classes:
        return torch.ones(len(y), dtype=torch.bool)
    return (y < classes).reshape(len(y), -1).all(dim=1)
