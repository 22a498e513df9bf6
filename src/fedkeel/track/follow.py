"""Hand on a run to its trackers: once, or as it goes on."""

from __future__ import annotations

import json
import os
import sqlite3
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedkeel.core.errors import FedkeelError, InputError
from fedkeel.ship.ledger import Ledger
from fedkeel.track.mlflow import MLflow
from fedkeel.track.points import Reader, Target

POLL = 1.0  # seconds between two looks at the ledger
_REPORT = 60.0  # seconds that a report may take after the last round
_FACTS = ("job", "seed", "backend", "plan", "fedkeel", "rounds", "settings")


@dataclass(frozen=True)
class Standing:
    """Where a run stands. `status` is one of MLflow's: RUNNING, FINISHED or FAILED."""

    status: str
    over: bool  # it will not be resumed
    round: int
    wall: float
    facts: dict[str, Any]


def standing(path: Path) -> Standing:
    """Ask the ledger, and what lies beside it."""
    marks = ",".join("?" * len(_FACTS))
    with Ledger(path, readonly=True) as ledger, ledger.snapshot():
        found = ledger.scan(f"SELECT key, value FROM meta WHERE key IN ({marks})", *_FACTS)
        facts = {key: json.loads(value) for key, value in found}
        ((round, wall, used),) = ledger.scan("SELECT max(round), max(wall), sum(skipped IS NULL) FROM rounds")
    planned, gone = facts.get("rounds"), _gone(path.parent)
    over = (path.parent / "model" / "card.json").is_file()
    # An app of the user's own writes no model, and its last figures come after its last round.
    over = over or (gone and isinstance(planned, int) and (round or 0) >= planned)
    status = "FINISHED" if over and used else "FAILED" if over or gone else "RUNNING"
    return Standing(status, over, round or 0, wall or 0.0, facts)


def _gone(run: Path) -> bool:
    """Whether the process that wrote the run has ended. Its lock is not tried: a run that begins would stumble."""
    try:
        os.kill(int((run / ".lock").read_text()), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError, OverflowError):
        return False
    return False


def once(path: Path, targets: Sequence[Target], clients: bool = False) -> Standing:
    """Write all there is. Raises `InputError` where there is nothing yet."""
    if not path.is_file():
        raise InputError(f"run '{path.parent}' has no ledger yet: begin it first, or add --follow")
    return _look(path, [Reader(path, target, clients) for target in targets])


def follow(path: Path, targets: Sequence[Target], clients: bool, say: Callable[[str], None]) -> Standing:
    """Write on until the run is over. What a tracker or the disk refuses is told, and tried again."""
    readers = [Reader(path, target, clients) for target in targets]
    told, until = "", 0.0
    while True:
        try:
            now = _look(path, readers) if path.is_file() else None
            told = ""
        except (FedkeelError, OSError, sqlite3.Error) as error:
            now = None
            if told != (told := str(error)):
                say(f"{told}; trying again")
        if now is not None and now.over:
            until = until or time.monotonic() + _REPORT
            if (path.parent / "report.html").is_file() or _gone(path.parent) or time.monotonic() > until:
                return _look(path, readers)
        time.sleep(POLL)


def _look(path: Path, readers: Sequence[Reader]) -> Standing:
    now = standing(path)
    for reader in readers:
        target = reader.target
        if isinstance(target, MLflow):
            target.describe(now.facts)
        over = now.status != "RUNNING"
        while reader.step(over):
            pass
        if over:
            reader.step(over)  # what came late, however late
        if isinstance(target, MLflow):
            target.stand(now.status, now.wall, path.parent)
    return now
