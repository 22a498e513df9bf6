"""Small federations, and what becomes of them."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import torch

from fedkeel import Job, Pool
from fedkeel.core.keys import Key
from fedkeel.core.types import ClientMemory, ServerState
from fedkeel.sim.simulator import Simulator
from fedkeel.world.federation import Federation, Held
from fedkeel.world.pool import clients


def federation(*settings, pool=None):
    job = Job(name="audited").with_settings(["data.clients=4", "data.partition=iid", "train.workers=1", *settings])
    if pool is None:
        return Federation.of(job)
    split = job.rule("data.partition", "partition")(pool, job.data.clients, Key.root(0))
    data, holdout = clients(pool, split, Key.root(1), holdout=job.data.holdout)
    return Federation.made(job, Held(pool, split.names, data, holdout))


def flat_pool(columns=12, n=400, classes=3):
    x = torch.rand(n, columns, generator=Key.root(8).torch())
    y = torch.arange(n) % classes
    return Pool.from_arrays(x, y)


def with_random_labels(fed):
    """What a model knows of such labels it has from the examples themselves."""

    def drawn(y, key):
        return torch.randint(fed.pool.classes, y.shape, generator=key.torch())

    pool = replace(fed.pool, test_y=drawn(fed.pool.test_y, Key.root(3)))
    return replace(fed, data=replace(fed.data, y=drawn(fed.data.y, Key.root(4))), pool=pool)


class Nothing:
    def round(self, report): ...

    def metrics(self, round, version, figures): ...

    def checkpoint(self, state, memory, extra, attached): ...


def final(fed):
    with contextlib.closing(fed.trainer()) as trainer:
        return Simulator(fed, trainer, ServerState(fed.theta()), ClientMemory(), Nothing()).run()
