"""What a model must pass to be released. Contract: (evidence) -> Finding.

A rule that cannot be judged, as the evidence is missing, does not pass: `InputError` from a rule blocks with its text.
"""

from __future__ import annotations

import fnmatch
import json
import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from fedkeel.core.errors import InputError
from fedkeel.core.registry import rule
from fedkeel.edge.export import MODEL, REPORT, read_report
from fedkeel.edge.measure import Session, parity
from fedkeel.gate.evidence import Answers, Evidence, Figure, Finding
from fedkeel.release.compare import compare
from fedkeel.release.contract import Contract
from fedkeel.release.store import measured
from fedkeel.ship import card, tensors
from fedkeel.world.evaluation import CLIENTS, GLOBAL, GROUP, Z95

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_PROTECTIONS = ("aggregate.*", "privacy.*", "secagg.*", "quarantine.*", "data.holdout", "server.examples")
_MOST_PROBED = 2000


@rule("gate")
def metadata(evidence: Evidence) -> Finding:
    """The card tells what job, data, last checkpoint and ledger of its run tell."""
    told, made = evidence.card, evidence.remade
    found = compare(Contract.of(made, "the run"), Contract.of(told, "the card"))
    if found.differences and found.differences[0].kind != "metadata":
        return Finding(False, f"the card does not fit its run: {found.differences[0].text}")
    if told.digest != made.digest:
        ours, theirs = told.model_dump(mode="json"), made.model_dump(mode="json")
        field = next(name for name in ours if ours[name] != theirs[name])
        return Finding(False, f"the card does not fit its run: {_unlike(field, ours[field], theirs[field])}")
    if evidence.facts.get("rounds") != evidence.job.rounds or evidence.state.round != evidence.job.rounds:
        return Finding(False, f"the run is at round {evidence.state.round} of {evidence.job.rounds}: resume it")
    return Finding(True, f"the card is that of the run: {told.version}, {told.lineage.rounds} rounds")


@rule("gate")
def fingerprint(evidence: Evidence) -> Finding:
    """The weights in the file are those that the card names, and those of the run's last checkpoint."""
    told = evidence.card.lineage.fingerprint
    came = tensors.fingerprint(card.stored(evidence.federation.layout, evidence.state.theta))
    if came != told:
        return Finding(False, f"the model file has weights {told[:12]}, the run came to {came[:12]}: write it anew")
    return Finding(True, f"weights {told[:12]}")


@rule("gate")
def version(evidence: Evidence) -> Finding:
    """The declared version says at least what the model differs in from the one at the stage."""
    found = evidence.comparison
    if found is None:
        return Finding(True, f"{evidence.card.version} is the first in {evidence.stage}")
    if found.objection:
        return Finding(False, found.objection)
    return Finding(True, f"{found.old.version} -> {found.new.version}: {found.level.word}")


@rule("gate")
def compatible(evidence: Evidence, *, at_most: str = "minor") -> Finding:
    """The difference from the model at the stage breaks nobody: it is no more than `at_most`, declared or not."""
    from fedkeel.release.difference import Level

    if at_most.upper() not in Level.__members__:
        raise InputError(f"at_most = '{at_most}' is no level: choose identical, patch, minor or major")
    found = evidence.comparison
    if found is None:
        return Finding(True, f"nothing is in {evidence.stage} yet")
    text = f"{found.level.word}" + f": {found.differences[0].text}" * bool(found.differences)
    return Finding(found.level <= Level[at_most.upper()], text)


@rule("gate")
def configuration(evidence: Evidence, *, fixed: tuple[str, ...] = _PROTECTIONS) -> Finding:
    """The job is the one that the run was begun with, and keys that match `fixed` are as in the job at the stage.

    By default that is what protects a federation; the other keys that changed are told. A job that attacks itself, or
    whose noise can be made again, is an experiment and does not pass.
    """
    for key, found in (
        ("attack.clients", evidence.job.attack.clients),
        ("privacy.insecure_reproducible_noise", evidence.job.privacy.insecure_reproducible_noise),
    ):
        if found:
            return Finding(False, f"{key} = {json.dumps(found)} is for experiments: run the job without it")
    with evidence.run.dir.ledger(readonly=True) as ledger:
        begun = ledger.meta.get("settings")
    if begun is not None and begun != evidence.run.dir.job.read_text("utf-8"):
        return Finding(False, "job.toml was changed since the run was begun: restore it")
    if evidence.current is None:
        return Finding(True, f"nothing is in {evidence.stage} yet")
    was, now = _flat(evidence.current.job.model_dump(mode="json")), _flat(evidence.job.model_dump(mode="json"))
    changed = sorted(key for key in was.keys() | now.keys() if was.get(key) != now.get(key))
    told = [f"{key}: {was.get(key)!r} -> {now.get(key)!r}" for key in changed]
    broken = [text for key, text in zip(changed, told, strict=True) if any(fnmatch.fnmatch(key, f) for f in fixed)]
    if broken:
        return Finding(False, f"changed and fixed: {'; '.join(broken[:3])}{_more(broken, 3)}")
    return Finding(True, f"changed: {', '.join(told[:3])}{_more(told, 3)}" if told else "nothing changed")


@rule("gate")
def figures(evidence: Evidence, *, within: Positive = 1e-4) -> Finding:
    """Measured anew, the model has the accuracy (or loss) that its ledger tells."""
    federation, pool = evidence.federation, evidence.federation.pool
    if evidence.job.model.private:
        raise InputError("clients keep layers of this model, so that nobody else can test it: leave the rule out")
    name = "accuracy" if pool.classes else "loss"
    told = _figure(evidence, name, GLOBAL).value
    measured = federation.measure(evidence.theta, pool.test_x, pool.test_y, pool.prepare)[name]
    fits = told is not None and abs(measured - told) <= within * max(1.0, abs(told))
    text = f"{name} {measured:.4f}, in the ledger {'none' if told is None else f'{told:.4f}'}"
    return Finding(fits, text, {name: measured})


@rule("gate")
def accuracy(evidence: Evidence, *, least: Share) -> Finding:
    """The 95% interval of the accuracy on the test set lies above `least`."""
    found = _figure(evidence, "accuracy", evidence.facts.get("headline", GLOBAL))
    return _at_least("accuracy", found, least)


@rule("gate")
def groups(evidence: Evidence, *, least: Share) -> Finding:
    """The accuracy of every group of clients (`record.groups`) is at least `least`."""
    found = {s.removeprefix(GROUP): f for s, f in evidence.figures("accuracy").items() if s.startswith(GROUP)}
    if not found:
        raise InputError("there is no figure by group: name record.groups and data.holdout in the job")
    name, worst = min(found.items(), key=lambda item: _value(item[1]))
    return Finding(
        _value(worst) >= least, f"worst group {name}: {_value(worst):.4f}, asked {least:g}", {name: worst.value}
    )


@rule("gate")
def worst_decile(evidence: Evidence, *, least: Share) -> Finding:
    """The mean accuracy of the worst tenth of the clients is at least `least`."""
    found = _value(_figure(evidence, "worst_decile", CLIENTS))
    return Finding(found >= least, f"worst tenth of the clients: {found:.4f}, asked {least:g}", {"worst_decile": found})


@rule("gate")
def calibration(evidence: Evidence, *, most: Share = 0.1, bins: Annotated[int, Field(ge=2)] = 15) -> Finding:
    """The expected calibration error (Guo et al. 2017, equation 3) on the test set is at most `most`."""
    answers = evidence.answers
    sure, taken = _classes(evidence, answers.mine).softmax(-1).max(-1)
    right = (taken == answers.y).double().flatten()
    place = (sure.flatten() * bins).long().clamp(max=bins - 1)
    gaps = torch.zeros(bins, dtype=torch.float64).index_add_(0, place, right - sure.flatten().double())
    error = float(gaps.abs().sum() / len(right))
    return Finding(error <= most, f"calibration error {error:.4f}, at most {most:g}", {"calibration_error": error})


@rule("gate")
def not_worse(evidence: Evidence, *, margin: Share = 0.01) -> Finding:
    """The accuracy is not lower than that of the model at the stage by `margin` or more, on the same examples.

    By the lower end of the 95% interval of the paired difference (Agresti and Min 2005: half a pair is added to each of
    the four cells). Without classes: mean squared errors, relative to the one at the stage.
    """
    if evidence.current is None:
        return Finding(True, f"nothing is in {evidence.stage} yet")
    low, difference, count = _paired(evidence, evidence.answers, None)
    text = f"{difference:+.4f} against {evidence.current.card.version}, 95% above {low:+.4f}, allowed {-margin:+g}"
    return Finding(low >= -margin, f"{text} ({count} examples)", {"difference": difference, "low": low})


@rule("gate")
def no_label_worse(evidence: Evidence, *, margin: Share = 0.1) -> Finding:
    """As `not_worse`, for each label by itself: the difference itself, as labels have few examples."""
    if evidence.current is None:
        return Finding(True, f"nothing is in {evidence.stage} yet")
    answers, names = evidence.answers, evidence.card.labels
    _classes(evidence, answers.mine)
    found = {}
    for label in range(evidence.federation.pool.classes):
        if not (answers.y == label).any():
            continue
        _, found[label], _ = _paired(evidence, answers, answers.y == label)
    worst = min(found, key=lambda label: found[label])
    name = names[worst] if worst < len(names) else str(worst)
    text = f"label '{name}': {found[worst]:+.4f} against {evidence.current.card.version}, allowed {-margin:+g}"
    return Finding(found[worst] >= -margin, text, {"difference": found[worst]})


@rule("gate")
def refused(evidence: Evidence, *, most: Share = 0.3) -> Finding:
    """At most this share of the updates that came was refused."""
    refused, came = evidence.refusals
    if not came:
        raise InputError("no update came in this run: there is nothing that was learned")
    share = refused / came
    return Finding(
        share <= most, f"{refused} of {came} updates refused ({share:.1%}), at most {most:.0%}", {"share": share}
    )


@rule("gate")
def backdoor(evidence: Evidence, *, most: Share = 0.5, size: Annotated[int, Field(ge=1)] = 3) -> Finding:
    """No simple mark turns more than this share of the test examples to one label, beyond those that go there anyhow.

    Marks are `size` x `size` bright or dark pixels in a corner, one pixel from it, or the first or last `size` features
    of a flat input at their largest or smallest value (Gu et al. 2017). A mark of another form is not found; a flat
    input of less than four times `size` features has none.
    """
    pool, federation = evidence.federation.pool, evidence.federation
    if pool.test_x.dim() < 2 or not (pool.test_x.dtype == torch.uint8 or pool.test_x.is_floating_point()):
        raise InputError("inputs of this kind cannot be marked: leave the rule out of the registry's gate")
    _classes(evidence, evidence.answers.mine)
    if pool.test_x.dim() == 2 and pool.test_x.shape[1] < 4 * size:
        return Finding(
            True, f"{size} of {pool.test_x.shape[1]} features are no mark, but most of the input: not probed"
        )
    step = max(1, len(pool.test_y) // _MOST_PROBED)
    x, y = pool.test_x[::step], pool.test_y[::step]
    clean = federation.answers(evidence.theta, x, pool.prepare).argmax(-1)
    worst = (-1.0, "", 0)
    for name, marked in _marked(x, size):
        taken = federation.answers(evidence.theta, marked, pool.prepare).argmax(-1)
        for label in range(pool.classes):
            others = y != label
            if others.any():
                moved = float((taken == label)[others].double().mean() - (clean == label)[others].double().mean())
                worst = max(worst, (moved, name, label))
    names = evidence.card.labels
    told = names[worst[2]] if worst[2] < len(names) else str(worst[2])
    text = f"{worst[1]} turns {max(worst[0], 0):.1%} of other examples to '{told}', at most {most:.0%}"
    return Finding(worst[0] <= most, text, {"moved": worst[0]})


@rule("gate")
def budget(evidence: Evidence, *, epsilon: Positive | None = None, delta: Positive | None = None) -> Finding:
    """What was spent of privacy is what the card tells, within the job's budget and these bounds.

    Given `epsilon`, a model that promises nothing does not pass.
    """
    told, asked = evidence.card.privacy, evidence.job.privacy.epsilon
    if told is None:
        if evidence.job.privacy.mechanism is not None:
            return Finding(False, "the job promises privacy, the card tells none: write the model anew")
        text = "no privacy is promised" + ("" if epsilon is None else f", asked is epsilon {epsilon:g}")
        return Finding(epsilon is None, text)
    spent = evidence.run.epsilon
    if spent is None or told.epsilon is None:
        return Finding(False, "nothing bounds what was spent of privacy: give the job noise and a budget")
    bounds = [bound for bound in (asked, epsilon) if bound is not None]
    fits = spent <= told.epsilon * (1 + 1e-9) and all(spent <= bound * (1 + 1e-9) for bound in bounds)
    fits = fits and (delta is None or told.delta <= delta)
    bound = f", at most {min(bounds):g}" if bounds else ""
    return Finding(fits, f"epsilon {spent:.4g} spent at delta {told.delta:g}{bound}", {"epsilon": spent})


@rule("gate")
def exported(
    evidence: Evidence, *, target: str = "onnx-int8", lost: Share = 0.005, changed: Share = 0.01, lower: Share = 0.0
) -> Finding:
    """The run's export to `target` is of this model, loses and changes at most so much, and is faster by `lower`.

    Parity is measured anew on the test set; the latency, lower than eager PyTorch's by so large a share, is that which
    `fedkeel export` measured where it ran.
    """
    place = evidence.run.path / "exports" / target
    told = read_report(place)
    if told["model"] != measured(place / MODEL).digest:
        return Finding(False, f"{MODEL} is not that of its {REPORT}: export it again")
    if (told["weights"], told["card"]) != (evidence.card.lineage.fingerprint, evidence.card.digest):
        return Finding(False, "it was exported from another model: export it again")
    pool, federation = evidence.federation.pool, evidence.federation
    x, classes = pool.prepare(pool.test_x), "classes" in federation.work.loss.definition.traits
    theirs = federation.answers(evidence.theta, pool.test_x, pool.prepare)
    found = parity(Session(place / MODEL).answers(x), theirs, pool.test_y, classes)
    faster = told["latency_ms"]["lower"]
    if found.lost is None or found.agreement is None:
        text = f"outputs differ by {found.most:.2g} at most, {faster:.0%} lower latency, asked {lower:.0%}"
        return Finding(faster >= lower, text, {"most": found.most, "lower": faster})
    text = (
        f"{100 * found.lost:+.2f} points lost, {found.agreement:.2%} of predictions agree, {faster:.0%} lower latency; "
        f"asked {100 * lost:g}, {1 - changed:.0%}, {lower:.0%}"
    )
    passed = found.lost <= lost and found.agreement >= 1 - changed and faster >= lower
    return Finding(passed, text, {"lost": found.lost, "agreement": found.agreement, "lower": faster})


def _paired(evidence: Evidence, answers: Answers, mask: Tensor | None) -> tuple[float, float, int]:
    """(lower end of the 95% interval, difference, examples): how much more the model has right, in shares."""
    assert answers.theirs is not None
    y, mine, theirs = answers.y, answers.mine, answers.theirs
    if not evidence.federation.pool.classes:
        ours, others = ((side.flatten() - y.flatten()).square().double() for side in (mine, theirs))
        each = (others - ours) / others.mean().clamp(min=1e-12)
        half = Z95 * float(each.std(correction=1)) / math.sqrt(len(each)) if len(each) > 1 else math.inf
        return float(each.mean()) - half, float(each.mean()), len(each)
    right, was = ((_classes(evidence, side).argmax(-1) == y) for side in (mine, theirs))
    if mask is not None:
        right, was = right[mask], was[mask]
    count = right.numel()
    if not count:
        raise InputError("the test set has no examples of labels that both models know: give the run a test set")
    gained, lost = int((right & ~was).sum()), int((was & ~right).sum())
    more, less, n = gained + 0.5, lost + 0.5, count + 2
    half = Z95 * math.sqrt(more + less - (more - less) ** 2 / n) / n
    return (more - less) / n - half, (gained - lost) / count, count


def _classes(evidence: Evidence, outputs: Tensor) -> Tensor:
    """Outputs of classes, or a sentence."""
    if "classes" not in evidence.federation.work.loss.definition.traits:
        raise InputError("this model's outputs are no classes: leave the rule out of the registry's gate")
    return outputs


def _marked(x: Tensor, size: int) -> Iterator[tuple[str, Tensor]]:
    """(what was done in words, marked examples)."""
    if x.dim() > 2 and min(x.shape[-2:]) >= size + 2:
        first, last = slice(1, 1 + size), slice(-1 - size, -1)
        corners = {"top left": (first, first), "top right": (first, last), "bottom left": (last, first)}
        places: dict[str, tuple[Any, ...]] = {
            name: (..., *place) for name, place in {**corners, "bottom right": (last, last)}.items()
        }
    else:
        places = {"first features": (..., slice(size)), "last features": (..., slice(-size, None))}
    for place, where in places.items():
        for tone in ("bright", "dark"):
            marked = x.clone()
            if x.dim() > 2:
                marked[where] = x.max() if tone == "bright" else x.min()
            else:  # a column has its own range
                marked[where] = (x.amax(0) if tone == "bright" else x.amin(0))[where[1:]]
            yield f"a {tone} mark ({place})", marked


def _figure(evidence: Evidence, name: str, scope: str) -> Figure:
    found = evidence.figures(name).get(scope)
    if found is None or found.value is None:
        raise InputError(f"the run has no figure '{name}' of '{scope}': let the job measure it (data.holdout)")
    return found


def _at_least(name: str, found: Figure, least: float) -> Finding:
    value = _value(found)
    low = value if found.low is None else found.low
    return Finding(low >= least, f"{name} {value:.4f}, 95% above {low:.4f}, asked {least:g}", {name: value, "low": low})


def _value(figure: Figure) -> float:
    return -math.inf if figure.value is None else figure.value


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Key as in a job file -> value; name, seed and plugins' paths aside, which differ by nature."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}.")
        elif f"{prefix}{key}" not in ("seed", "plugins", "model.start", "model.version"):
            found[f"{prefix}{key}"] = value
    return found


def _unlike(field: str, told: Any, made: Any) -> str:
    if isinstance(told, Mapping) and isinstance(made, Mapping):
        for key in told.keys() | made.keys():
            if told.get(key) != made.get(key):
                return _unlike(f"{field}.{key}", told.get(key), made.get(key))
    return f"{field} is {str(told)[:80]} on it and {str(made)[:80]} in the run"


def _more(items: list[str], shown: int) -> str:
    return f", and {len(items) - shown} more" if len(items) > shown else ""
