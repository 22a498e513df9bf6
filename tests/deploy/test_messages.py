"""What comes over the network is believed only so far."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytestmark = pytest.mark.filterwarnings("default")  # Flower's own dependencies warn

NAMES = frozenset({"loss", "accuracy"})


@pytest.mark.parametrize(
    "values",
    [
        {"loss": 1e200, "accuracy": 0.5},
        {"loss": math.inf, "accuracy": 0.5},
        {"loss": 0.1, "accuracy": 1.5},
        {"loss": 0.1, "accuracy": math.nan},
        {"loss": "low", "accuracy": 0.5},
        {"loss": 0.1},
        {"loss": 0.1, "accuracy": 0.5, "fame": 1.0},
    ],
)
def test_figures_that_can_not_be_are_refused(values: dict[str, Any]) -> None:
    from fedkeel.core.errors import DecodeError
    from fedkeel.deploy import messages

    with pytest.raises(DecodeError):
        messages.read_figures(messages.figures_content(values, 10), NAMES)
    honest = {"loss": 0.5, "accuracy": 0.5}
    for examples in (0, -1, 2**60):
        with pytest.raises(DecodeError):
            messages.read_figures(messages.figures_content(honest, examples), NAMES)
    assert messages.read_figures(messages.figures_content(honest, 10), NAMES) == (honest, 10)


@given(st.lists(st.floats(allow_infinity=False, width=64), min_size=2, max_size=6))
def test_no_figure_that_is_believed_ends_the_server(losses: list[float]) -> None:
    from fedkeel.core.errors import DecodeError
    from fedkeel.deploy import messages
    from fedkeel.world.evaluation import mean_interval

    believed = []
    for loss in losses:
        try:
            content = messages.figures_content({"loss": loss}, 1)
            believed.append(messages.read_figures(content, frozenset({"loss"}))[0]["loss"])
        except DecodeError:
            assert abs(loss) > 1e30
    if believed:
        mean_interval("loss", believed)
