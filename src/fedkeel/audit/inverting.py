"""Gradient inversion of a run's own updates: which batches, at which models, and what is done to them on the way."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call

from fedkeel.audit import inversion, updates
from fedkeel.core.keys import Key
from fedkeel.world.federation import Federation

MULTIPLIERS = (0.01, 0.1, 1.0)
"""Standard deviations of the noise that is tried, in units of the update's own norm."""
AS_IT_IS, AS_SENT, MASKED = "as it is", "as the job sends it", "as it is, which masks keep from the server"
_ACROSS = 4  # examples in a line of a picture


class _Case(NamedTuple):
    model: str
    theta: Tensor
    batch: updates.Batch
    work: str
    sent: updates.Sent


def unfit(federation: Federation) -> str | None:
    """Why a federation's updates can not be inverted here, or None."""
    pool, layout = federation.pool, federation.layout
    if layout.width != layout.columns:
        return "clients have layers of their own, which an attacker does not know"
    if not pool.classes or "classes" not in federation.work.loss.definition.traits or pool.y.ndim != 1:
        return "it is written for classifiers with one label an example"
    if not pool.prepare(pool.test_x[:1]).is_floating_point():
        return "the model's inputs are symbols, which no gradient leads to"
    views = layout.views(federation.theta())
    tensors = {e.name: views[e.name].requires_grad_(e.trainable) for e in layout.entries}
    x = pool.prepare(pool.x[:2]).clone().requires_grad_()
    try:
        loss = federation.work.loss(functional_call(federation.module, tensors, (x,)), pool.y[:2]).mean()
        slopes = torch.autograd.grad(loss, [tensors[e.name] for e in layout.entries if e.trainable], create_graph=True)
        torch.autograd.grad(torch.stack([slope.square().sum() for slope in slopes]).sum(), [x])
    except (RuntimeError, NotImplementedError) as error:
        said = " ".join(str(error).split())[:200]
        return f"the model can not be differentiated twice in its inputs ({said})"
    return None


def treatments(federation: Federation, sent: updates.Sent, client: str, key: Key) -> Iterator[tuple[str, Tensor]]:
    """(name, update (P,)): as it is, what the job makes of it where that is another, and with noise."""
    if federation.plan.secure is not None:  # of sums the server sees no more than this, and nobody's own
        yield MASKED, sent.delta
    else:
        yield AS_IT_IS, sent.delta
        arrived = updates.sent_by_job(federation, sent.delta[None], [client], key, sent.steps)[0]
        if not torch.equal(arrived, sent.delta):
            yield AS_SENT, arrived
    for multiplier in MULTIPLIERS:
        noise = key.fold("noise", str(multiplier))
        yield f"noise {multiplier:g}", updates.noised(sent.delta, federation.layout.params, multiplier, noise)


def study(
    federation: Federation,
    models: Mapping[str, Tensor],
    sizes: Sequence[int],
    key: Key,
    *,
    iterations: int,
    watch: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Every batch size at every model (name -> (P,)): one step, and the client's whole work where that is another.

    `cases` holds the figures, `pictures` a PNG of each reconstruction beside the original, in base64, in their order.
    """
    pool = federation.pool
    known = pool.prepare(pool.test_x)
    box = float(known.min()), float(known.max())
    mean = known.mean(0)
    cases = list(_cases(federation, models, sizes, key))
    told: list[dict[str, Any]] = []
    pictures: list[dict[str, str]] = []
    for number, case in enumerate(cases):
        truth = pool.prepare(case.batch.x)
        own = key.fold("case", case.model, len(truth), case.work)
        guess = inversion.baseline(truth, mean, *box, own.fold("guess"))
        line: dict[str, Any] = {
            "model": case.model,
            "size": len(truth),
            "work": case.work,
            "steps": case.sent.steps,
            "baseline": guess._asdict(),
            "treatments": [],
        }
        shown = {"original": picture(truth, *box)}
        for name, delta in treatments(federation, case.sent, case.batch.client, own):
            sight = inversion.Sight(
                federation.module,
                federation.layout,
                case.theta,
                case.sent._replace(delta=delta),
                len(truth),
                pool.inputs,
                *box,
            )
            found, figures = _attacked(sight, case.batch.y, truth, pool.classes, own.fold("attack"), iterations)
            line["treatments"].append({"name": name} | figures)
            shown[name] = picture(found, *box)
        told.append(line)
        pictures.append(shown)
        watch(number + 1, len(cases))
    return {"inputs": list(pool.inputs), "box": list(box), "cases": told, "pictures": pictures}


def _cases(federation: Federation, models: Mapping[str, Tensor], sizes: Sequence[int], key: Key) -> Iterator[_Case]:
    data, hostile = federation.data, set(federation.adversary.clients)
    places = [i for i, name in enumerate(federation.names) if name not in hostile]
    place = max(places, key=data.count)  # who has most has enough
    first, last = data.range(place)
    order = first + torch.randperm(last - first, generator=key.fold("examples").torch())
    for model, theta in models.items():
        for size in sorted({min(size, last - first) for size in sizes}):
            batch = updates.Batch(federation.names[place], data.x[order[:size]], data.y[order[:size]])
            drawn = key.fold("work", model, size)
            one = updates.trained(federation, theta, batch, updates.one_step(federation, size), drawn)
            yield _Case(model, theta, batch, "one step", one)
            whole = updates.trained(federation, theta, batch, federation.work, drawn)
            if not torch.allclose(whole.delta, one.delta, rtol=1e-4, atol=1e-8):
                yield _Case(model, theta, batch, "whole work", whole)


def _attacked(
    sight: inversion.Sight, y: Tensor, truth: Tensor, classes: int, key: Key, iterations: int
) -> tuple[Tensor, dict[str, Any]]:
    """The best that any attack made of an update, which an attacker could not choose so well, and the figures of all.

    Labels that the last layer does not tell are taken as known.
    """
    told = inversion.labels(sight, classes)
    wanted = sorted(y.tolist()) if told is None else told
    span = sight.high - sight.low
    attacks = inversion.invert(sight, torch.tensor(wanted), key, iterations=iterations)
    found = {a.attack: (a, inversion.matched(a.x, truth)) for a in attacks}
    scores = {name: inversion.score(x, truth, span) for name, (_, x) in found.items()}
    best = max(scores, key=lambda name: scores[name].psnr)
    return found[best][1], {
        **scores[best]._asdict(),
        "attack": best,
        "distance": found[best][0].distance,
        "labels": None if told is None else inversion.overlap(told, y.tolist()),
        "attacks": {name: s.psnr for name, s in scores.items()},
    }


def picture(x: Tensor, low: float, high: float) -> str:
    """Inputs (B, ...) side by side as a PNG in base64: images as they are, series and plain numbers as heat maps."""
    from matplotlib.image import imsave

    tiles = [_tile(one, low, high) for one in x]
    height, width, _ = tiles[0].shape
    across = 1 if width > 4 * height else min(_ACROSS, max(1, int(np.ceil(len(tiles) ** 0.5))))
    down = -(-len(tiles) // across)
    canvas = np.zeros((down * (height + 1) - 1, across * (width + 1) - 1, 4), dtype=np.uint8)  # clear in between
    for i, tile in enumerate(tiles):
        top, left = i // across * (height + 1), i % across * (width + 1)
        canvas[top : top + height, left : left + width] = tile
    buffer = io.BytesIO()
    imsave(buffer, canvas, format="png")
    return base64.b64encode(buffer.getvalue()).decode()


def _tile(one: Tensor, low: float, high: float) -> Any:
    """One input as (height, width, 4) bytes."""
    grey = ((one.double() - low) / ((high - low) or 1.0)).clamp(0, 1).mul(255).round().to(torch.uint8).numpy()
    if grey.ndim == 3 and grey.shape[0] == 3:
        colour = grey.transpose(1, 2, 0)
    else:
        flat = grey[0] if grey.ndim == 3 and grey.shape[0] == 1 else grey.reshape(-1, grey.shape[-1])
        colour = np.repeat(flat[:, :, None], 3, axis=2)
    return np.concatenate([colour, np.full((*colour.shape[:2], 1), 255, dtype=np.uint8)], axis=2)
