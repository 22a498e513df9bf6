"""Checkpoints: everything a federation needs to go on, in one safetensors file per round."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

from torch import Tensor

from fedkeel.core.errors import InputError, RunError
from fedkeel.core.types import ClientMemory, InFlight, ServerState
from fedkeel.ship import files, tensors
from fedkeel.ship.tensors import fingerprint

__all__ = ["fingerprint", "latest", "load", "prune", "save"]

_NAME = re.compile(r"round-(\d{6,})\.safetensors")
_FORMAT = 2
_log = logging.getLogger("fedkeel")


def save(
    directory: Path,
    state: ServerState,
    memory: ClientMemory,
    extra: Mapping[str, Any],
    *,
    attached: Mapping[str, Tensor] | None = None,
    layout_digest: str | None = None,
) -> Path:
    """Write `directory/round-000010.safetensors` atomically and return its path.

    It holds theta, opt/*, control/*, roster/*, downlink/*, bases/<version>, kept/<rule>/<name>, memory/<client>/<name>
    and attached/* as tensors; version, round, work in flight, trust, privacy, the layout's digest and `extra` as JSON.
    A kill at any moment, a full disk or a missing directory (`RunError`) leaves the checkpoints before it whole.
    """
    content: dict[str, Tensor] = {"theta": state.theta}
    content |= {f"opt/{name}": value for name, value in state.opt.items()}
    content |= {f"control/{name}": value for name, value in state.control.items()}
    content |= {f"roster/{name}": value for name, value in state.roster.items()}
    content |= {f"downlink/{name}": value for name, value in state.downlink.items()}
    content |= {f"bases/{version}": value for version, value in state.bases.items()}
    content |= {f"attached/{name}": value for name, value in (attached or {}).items()}
    for rule, values in state.kept.items():
        content |= {f"kept/{quote(rule, safe='')}/{quote(name, safe='')}": value for name, value in values.items()}
    for client, name, value in memory.items():
        content[f"memory/{quote(client, safe='')}/{name}"] = value
    info = {
        "format": _FORMAT,
        "version": state.version,
        "round": state.round,
        "next_task": state.next_task,
        "in_flight": [list(order) for order in state.in_flight],
        "trust": dict(state.trust),
        "privacy": dict(state.privacy),
        "layout": layout_digest,
        "extra": dict(extra),
    }
    path = directory / f"round-{state.round:06d}.safetensors"
    try:
        tensors.write(path, content, info)
    except RunError as error:
        kept = _rounds(directory)
        rest = f"the last checkpoint is of round {max(kept)}" if kept else "there is no checkpoint yet"
        raise RunError(f"{error}; {rest}") from error.__cause__
    return path


class Loaded(NamedTuple):
    """What a checkpoint holds."""

    state: ServerState
    memory: ClientMemory
    extra: dict[str, Any]
    attached: dict[str, Tensor]


def load(path: Path, *, layout_digest: str | None = None) -> Loaded:
    """The state, the clients' memory, `extra` and what was attached to a checkpoint.

    Raises `InputError` for a file that is corrupt, of another format, or of another model than `layout_digest`.
    """
    content, info = tensors.read(path)
    if info.get("format") != _FORMAT:
        raise InputError(f"{path} is no checkpoint of format {_FORMAT}: choose one that this version of fedkeel wrote")
    if layout_digest is not None and info["layout"] is not None and info["layout"] != layout_digest:
        raise InputError(f"{path} holds a model of another layout: resume with the model that the run began with")
    kinds = ("opt", "control", "roster", "bases", "downlink", "attached")
    groups: dict[str, dict[str, Tensor]] = {kind: {} for kind in kinds}
    held: dict[str, dict[str, Tensor]] = {}
    kept: dict[str, dict[str, Tensor]] = {}
    for key, value in content.items():
        group, _, name = key.partition("/")
        if group in groups:
            groups[group][name] = value
        elif group == "memory":
            client, _, name = name.partition("/")
            held.setdefault(unquote(client), {})[name] = value
        elif group == "kept":
            rule, _, name = name.partition("/")
            kept.setdefault(unquote(rule), {})[unquote(name)] = value
    memory = ClientMemory()
    for client, values in held.items():
        memory.keep(client, values)
    state = ServerState(
        content["theta"],
        version=info["version"],
        round=info["round"],
        next_task=info["next_task"],
        opt=groups["opt"],
        control=groups["control"],
        kept=kept,
        trust=info["trust"],
        privacy=info["privacy"],
        in_flight=tuple(InFlight(*order) for order in info["in_flight"]),
        bases={int(version): theta for version, theta in groups["bases"].items()},
        roster=groups["roster"],
        downlink=groups["downlink"],
    )
    return Loaded(state, memory, info["extra"], groups["attached"])


def latest(directory: Path) -> Path | None:
    """The newest checkpoint that is whole, or None. One that cannot be read is passed over, with a logged warning."""
    for _, path in sorted(_rounds(directory).items(), reverse=True):
        try:
            tensors.read(path)
        except InputError as error:
            _log.warning("%s; the checkpoint before it is used", error)
        else:
            return path
    return None


def prune(directory: Path, keep: int = 2) -> None:
    """Delete all but the newest `keep` checkpoints, and what a killed process left half-written."""
    for _, path in sorted(_rounds(directory).items(), reverse=True)[keep:]:
        path.unlink(missing_ok=True)
    for path in directory.glob(f"*{files.TEMPORARY}"):
        path.unlink(missing_ok=True)


def _rounds(directory: Path) -> dict[int, Path]:
    if not directory.is_dir():
        return {}
    return {int(found[1]): path for path in directory.iterdir() if (found := _NAME.fullmatch(path.name))}
