"""Data that stays where it is: what a host says its examples are, made what the federation trains or tests on."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from fedkeel.config import Job
from fedkeel.core.errors import InputError
from fedkeel.core.keys import Key
from fedkeel.deploy.folder import JOB, NodeFolder, ServerFolder
from fedkeel.ship.card import ModelCard
from fedkeel.train.contract import ClientData
from fedkeel.world.bridge import bridged
from fedkeel.world.federation import Federation, Held
from fedkeel.world.pool import Pool, Split, clients


def at_node(folder: NodeFolder, offered: ModelCard | None = None) -> Federation:
    """The federation as a node has it: its own examples alone. `offered`: the server's model, where it is another."""
    settings, job = folder.settings, folder.job
    if settings.data == JOB:
        held = Federation.held(job)
        whole = Federation.made(job, held) if offered is None else bridged(job, held, offered)
        return whole.only(settings.client)
    known = _pool(job)
    x, y = _examples(settings.data, folder.path, settings.client, known)
    mine = replace(known, x=x, y=y, test_x=x, test_y=y, group=None, group_names=())
    split = Split((torch.arange(len(x)),), (settings.client,))
    key = Key.root(job.seed).fold("clients")
    data, holdout = clients(mine, split, key, holdout=job.data.holdout)
    job = job.model_copy(update={"record": job.record.model_copy(update={"groups": {}})})  # the server's business
    held = Held(mine, (settings.client,), data, holdout)
    return Federation.made(job, held) if offered is None else bridged(job, held, offered)


def at_server(folder: ServerFolder) -> Federation:
    """The federation as its server has it: test examples, and nobody's training examples where those are the nodes'."""
    settings, job = folder.settings, folder.job
    names = tuple(settings.nodes)
    if settings.data == JOB:
        federation = Federation.of(job)
        if set(federation.names) != set(names):
            strange = sorted(set(federation.names) ^ set(names))[0]
            raise InputError(
                f"client '{strange}' is in one of job.toml and server.toml alone: run `fedkeel deploy init`"
            )
    else:
        if job.server.examples:
            raise InputError(
                f"server.examples = {job.server.examples} takes them from the job's own data, and server.toml names "
                f"'{settings.data}': leave out one of the two"
            )
        known = _pool(job)
        x, y = _examples(settings.data, folder.path, None, known)
        pool = replace(known, x=x, y=y, test_x=x, test_y=y, group=None, group_names=())
        nothing = ClientData(x[:0], y[:0], torch.zeros(len(names) + 1, dtype=torch.int64), known.prepare)
        federation = Federation.made(job, Held(pool, names, nothing, nothing if job.data.holdout else None))
    register = federation.devices.register
    register.classify([settings.nodes[name].device for name in register.names])
    return federation


def _pool(job: Job) -> Pool:
    """The job's own data: for its shape, its classes, and how it becomes the model's input."""
    pool: Pool = job.rule("data.source", "source")(Key.root(job.seed).fold("source"))
    return pool


def _examples(reference: str, folder: Path, client: str | None, known: Pool) -> tuple[torch.Tensor, torch.Tensor]:
    """What the loader gives: examples and labels as the job's source has them. Raises `InputError` with its name."""
    load = _function(reference, folder)
    try:
        found = load() if client is None else load(client)
        x, y = found
        pool = Pool.from_arrays(x, y, x, y, prepare=known.prepare)
    except InputError as error:
        raise InputError(f"data = '{reference}': {error}") from None
    except Exception as error:  # a user's function
        said = " ".join(str(error).split())[:200]
        raise InputError(
            f"data = '{reference}' failed ({type(error).__name__}: {said}): it must return (x, y)"
        ) from error
    if pool.x.shape[1:] != known.x.shape[1:]:
        shapes = f"{tuple(pool.x.shape[1:])}, the federation's {tuple(known.x.shape[1:])}"
        raise InputError(f"data = '{reference}' gives examples of shape {shapes}: give the same")
    if pool.classes > known.classes or bool(pool.classes) != bool(known.classes):
        raise InputError(f"data = '{reference}' has {pool.classes} classes, the federation {known.classes}: relabel it")
    return pool.x, pool.y


def _file(path: Path) -> ModuleType:
    """A file as a module of its own: nodes that share a process may each have a `data.py`."""
    spec = importlib.util.spec_from_file_location(f"fedkeel_data_{abs(hash(path)):x}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))  # it may import its neighbours
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module


def _function(reference: str, folder: Path) -> Callable[..., Any]:
    """`module:function`, or `file.py:function` with a path relative to the folder."""
    place, _, name = reference.rpartition(":")
    try:
        own = place.endswith(".py")
        module = _file((folder / place).resolve()) if own else importlib.import_module(place)
        found = getattr(module, name)
    except Exception as error:  # a user's module
        said = " ".join(str(error).split())[:200]
        raise InputError(
            f"data = '{reference}' can not be loaded ({type(error).__name__}: {said}): write 'job', 'module:function' "
            "or 'file.py:function'"
        ) from error
    if not callable(found):
        raise InputError(f"data = '{reference}' is no function: name one that returns (x, y)")
    function: Callable[..., Any] = found
    return function
