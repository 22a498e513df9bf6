"""What gate rules measure, against oracles."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkeel.core.registry import build, names, parse
from fedkeel.gate.evidence import Answers
from fedkeel.gate.rules import _marked, _paired


def evidence(answers: Answers, classes: int) -> Any:
    """As much of the evidence as rules on answers read."""
    loss = build("loss", "cross_entropy" if classes else "mse")
    federation = SimpleNamespace(pool=SimpleNamespace(classes=classes), work=SimpleNamespace(loss=loss))
    current = SimpleNamespace(card=SimpleNamespace(version="1.0.0"))
    labels = tuple(str(label) for label in range(classes))
    card = SimpleNamespace(labels=labels)
    return SimpleNamespace(answers=answers, federation=federation, current=current, card=card, stage="production")


def hot(right: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Outputs that are right where it is said."""
    return torch.nn.functional.one_hot(torch.where(right, y, (y + 1) % 2), 2).float()


def test_the_calibration_error_is_that_of_the_definition():
    generator = torch.Generator().manual_seed(3)
    outputs, y = 3 * torch.randn(500, 4, generator=generator), torch.randint(4, (500,), generator=generator)
    found = build("gate", "calibration", most=1.0, bins=10)(evidence(Answers(y, outputs, None), 4))
    sure, taken = outputs.softmax(1).max(1)
    expected = 0.0
    for low in range(10):
        inside = (sure >= low / 10) & (sure < (low + 1) / 10)
        if inside.any():
            gap = (taken == y)[inside].double().mean() - sure[inside].double().mean()
            expected += float(inside.double().mean() * gap.abs())
    assert abs(found.figures["calibration_error"] - expected) < 1e-6
    sharp = torch.nn.functional.one_hot(y, 4) * 50.0
    assert build("gate", "calibration", most=0.001)(evidence(Answers(y, sharp, None), 4)).passed


def test_the_paired_interval_covers():
    """95% intervals hold the true difference about 95 times in 100, also for few pairs and rare changes."""
    generator = torch.Generator().manual_seed(8)
    for count, gain, loss in ((100, 0.1, 0.05), (400, 0.02, 0.02), (60, 0.3, 0.1)):
        held, tries = 0, 1500
        for _ in range(tries):
            draw = torch.rand(count, generator=generator)
            right, was = draw < gain, (draw >= gain) & (draw < gain + loss)
            y = torch.zeros(count, dtype=torch.int64)
            low, difference, n = _paired(evidence(a := Answers(y, hot(right, y), hot(was, y)), 2), a, None)
            assert n == count
            assert low <= difference
            held += low <= gain - loss
        assert 0.955 <= held / tries <= 0.998  # the lower end alone: 97.5%


@given(st.integers(1, 60), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=60)
def test_a_model_is_not_worse_than_itself_but_than_a_better_one(count: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(2, (count,), generator=generator)
    right = torch.rand(count, generator=generator) < 0.5
    same = evidence(Answers(y, hot(right, y), hot(right, y)), 2)
    assert build("gate", "no_label_worse", margin=0.0)(same).passed
    assert abs(build("gate", "not_worse", margin=1.0)(same).figures["difference"]) == 0
    worse = evidence(Answers(y, hot(torch.zeros_like(right), y), hot(torch.ones_like(right), y)), 2)
    assert not build("gate", "not_worse", margin=0.01)(worse).passed
    assert not build("gate", "no_label_worse", margin=0.5)(worse).passed


def test_errors_of_a_regression_are_compared_relative_to_the_standing_ones():
    generator = torch.Generator().manual_seed(1)
    y = torch.randn(2000, generator=generator)
    noise = torch.randn(2000, generator=generator)
    halved = evidence(Answers(y, (y + 0.5**0.5 * noise)[:, None], (y + noise)[:, None]), 0)
    found = build("gate", "not_worse", margin=0.01)(halved)
    assert found.passed
    assert abs(found.figures["difference"] - 0.5) < 1e-4
    worse = evidence(Answers(y, (y + 1.2 * noise)[:, None], (y + noise)[:, None]), 0)
    assert not build("gate", "not_worse", margin=0.01)(worse).passed


def test_marks_change_what_they_name_and_nothing_else():
    x = torch.rand(5, 1, 8, 8)
    for name, marked in _marked(x.clone(), 3):
        changed = (marked != x).any(0)[0]
        rows, columns = changed.any(1).nonzero().flatten(), changed.any(0).nonzero().flatten()
        assert (len(rows), len(columns)) == (3, 3)
        assert (rows[0] == 1) == ("top" in name)
        assert (columns[0] == 1) == ("left" in name)
        assert float(marked[:, :, rows[0], columns[0]].unique()) == float(x.max() if "bright" in name else x.min())
    table = torch.rand(6, 20) * torch.arange(1, 21)
    for name, marked in _marked(table.clone(), 3):
        where = slice(3) if "first" in name else slice(-3, None)
        extreme = table.amax(0) if "bright" in name else table.amin(0)
        assert torch.equal(marked[:, where], extreme[where].expand(6, 3))
        rest = torch.ones(20, dtype=torch.bool)
        rest[where] = False
        assert torch.equal(marked[:, rest], table[:, rest])


def test_every_rule_of_the_gate_is_in_a_test():
    tested = {
        *("metadata", "fingerprint", "version", "compatible", "configuration", "figures", "accuracy", "groups"),
        *("worst_decile", "calibration", "not_worse", "no_label_worse", "refused", "backdoor", "budget", "exported"),
    }
    assert {name for name in names("gate") if name not in ("never", "broken", "silent")} == tested
    assert repr(parse("gate", "not_worse(margin=0.02)")) == "not_worse(margin=0.02)"
