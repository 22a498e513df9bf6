"""Runs side by side are told apart by as much of their paths as it takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedkeel.api import _labels


@pytest.mark.parametrize(
    ("paths", "labels"),
    [
        (["/r/a", "/r/b"], ["a", "b"]),
        (["/r/a/run", "/r/b/run"], ["a/run", "b/run"]),
        (["/r/x/run", "/s/x/run", "/s/y/run"], ["r/x/run", "s/x/run", "s/y/run"]),
        (["/run", "/s/run"], ["//run", "s/run"]),
        (["/r/run", "/r/run"], ["run", "run"]),
    ],
)
def test_labels_are_as_short_as_they_can_be(paths: list[str], labels: list[str]) -> None:
    assert _labels([Path(p) for p in paths]) == labels
