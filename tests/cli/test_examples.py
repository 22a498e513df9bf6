"""Every example runs as its reader would run it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_an_example_runs_and_learns(path, tmp_path):
    # peft asks transformers for something under its old name.
    warned = ["-W", "error", "-W", "ignore:`is_gradient_checkpointing`:FutureWarning"]
    done = subprocess.run(
        [sys.executable, *warned, str(path)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    accuracy = float(re.search(r"accuracy ([\d.]+)", done.stdout).group(1))
    assert accuracy > 0.7, done.stdout
    assert Path(tmp_path, re.search(r"report: (.+)", done.stdout).group(1)).is_file()


def test_there_is_one_of_each():
    assert {p.stem for p in EXAMPLES} >= {"own_model", "own_data", "own_rules", "adapters"}
