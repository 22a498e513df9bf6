"""What Flower 1.41 has no options for, set in our own processes alone, by names of its modules.

A SuperNode rests three seconds between looks: on loopback a round of 4.5 s comes down to 1.3 s. A SuperLink refuses a
node whose clock is more than five seconds ahead, and puts whole messages into SQLite. Who sends a message holds it
twice. A name that a later Flower has no more is an `ImportError`.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.inflatable.inflatable_object import InflatableObject

BACKOFF = 0.05
"""Seconds until a part of a message that is not there yet is asked for again; doubled each time, up to Flower's ten."""


def supernode(poll: float) -> None:
    """A SuperNode looks for messages and replies every `poll` seconds at most."""
    from flwr.supernode import fleet_http_connection
    from flwr.supernode import start_client_internal as module

    _replace(module, "time", SimpleNamespace(sleep=lambda seconds: time.sleep(min(seconds, poll))))
    _replace(module, "pull_objects", partial(vars(module)["pull_objects"], initial_backoff=BACKOFF))
    _replace(fleet_http_connection, "HeartbeatSender", _Heart)


class _Heart(HeartbeatSender):
    """Its end is that of its process, which is started anew: a node that lives on without is taken for gone."""

    def _run(self) -> None:
        try:
            super()._run()
        except Exception:
            logging.getLogger("fedkeel").exception("the server does not take this node's heartbeat")
            os._exit(1)


def superlink() -> None:
    """Clocks of nodes may be ahead of the SuperLink's by as much as Flower lets them be behind: five minutes. Large
    contents are files, and who could not be served for want of room tries again.
    """
    from flwr.supercore.object_store import object_store_factory
    from flwr.superlink import main
    from flwr.superlink.routers.fleet import node_auth as module

    from fedkeel.deploy.store import FileObjectStore
    from fedkeel.deploy.superlink import lasting

    _replace(module, "SYSTEM_TIME_TOLERANCE", vars(module)["TIMESTAMP_TOLERANCE"])
    _replace(object_store_factory, "SqlObjectStore", FileObjectStore)
    _replace(main, "http_error_translator", lasting(vars(main)["http_error_translator"]))


def worker() -> None:
    """Who sends a message has one part of it in memory beside the message itself."""
    from flwr.supernode.runtime import run_clientapp as module

    _replace(module, "push_objects", _one_by_one)


def head() -> None:
    """As `worker`."""
    from flwr.superlink.grid import http_grid as module

    _replace(module, "push_objects", _one_by_one)


def _one_by_one(
    objects: dict[str, InflatableObject], push_object_fn: Callable[[str, bytes], None], *, object_ids_to_push: set[str]
) -> None:
    """Flower's own makes the bytes of all parts before most of them are sent."""
    for number in [number for number in objects if number in object_ids_to_push]:
        push_object_fn(number, objects.pop(number).deflate())


def _replace(module: ModuleType, name: str, value: Any) -> None:
    if name not in vars(module):
        raise ImportError(f"{module.__name__} has no '{name}': this Flower is not 1.41")
    vars(module)[name] = value
