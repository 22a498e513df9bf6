"""A disk that is full, at any byte, leaves what was written before whole."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fedkeel.core.types import ClientMemory, ServerState
from fedkeel.ship import checkpoint
from fedkeel.ship.ledger import Ledger

# A limit on the size of a file stands in for the disk's end: writing past it fails as writing to a full disk does.
LIMITED = """
import resource, signal, sys
import torch
from pathlib import Path
from fedkeel.core.errors import RunError
from fedkeel.core.types import ClientMemory, ServerState, ClientRow, RoundReport
from fedkeel.ship import checkpoint
from fedkeel.ship.ledger import Ledger

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
directory, limit = Path(sys.argv[1]), int(sys.argv[2])
ledger = Ledger(directory / "ledger.sqlite")
rows = tuple(ClientRow(f"client {i}", None) for i in range(3000))
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    {action}
except RunError as error:
    print(error)
else:
    sys.exit("nothing failed")
"""
SAVE = "checkpoint.save(directory, ServerState(torch.ones(50_000), round=2), ClientMemory(), {})"
WRITE = "ledger.write_round(RoundReport(2, 2, 0.0, rows))"


def attempt(directory: Path, limit: int, action: str) -> str:
    script = LIMITED.replace("{action}", action)
    command = [sys.executable, "-c", script, str(directory), str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    return done.stdout


@pytest.mark.parametrize("limit", [0, 100, 199_000])
def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path, limit):
    before = checkpoint.save(tmp_path, ServerState(torch.zeros(50_000), round=1), ClientMemory(), {})
    content = before.read_bytes()
    sentence = attempt(tmp_path, limit, SAVE)
    assert "round-000002.safetensors could not be written (File too large): make room on the disk" in sentence
    assert "the last checkpoint is of round 1" in sentence
    assert checkpoint.latest(tmp_path) == before
    assert before.read_bytes() == content
    assert not list(tmp_path.glob("*.part"))


def test_a_full_disk_leaves_the_ledger_as_it_was(tmp_path):
    Ledger(tmp_path / "ledger.sqlite").close()
    sentence = attempt(tmp_path, 100_000, WRITE)
    assert "could not be written" in sentence
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        assert ledger.rounds() == ledger.updates() == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_no_space_left_is_told_in_a_sentence(tmp_path):
    """/dev/full answers every write with ENOSPC."""
    (tmp_path / "round-000002.safetensors.part").symlink_to("/dev/full")
    sentence = attempt(tmp_path, 10**9, SAVE)
    assert "No space left on device" in sentence
    assert "there is no checkpoint yet" in sentence
    assert checkpoint.latest(tmp_path) is None
