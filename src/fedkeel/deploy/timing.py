"""Times that Flower 1.41 has no options for, set in our own processes alone, by names of their modules.

A SuperNode rests three seconds between looks: on loopback a round of 4.5 s comes down to 1.3 s. A SuperLink refuses a
node whose clock is more than five seconds ahead. A name that a later Flower has no more is an `ImportError`.
"""

from __future__ import annotations

import time
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

BACKOFF = 0.05
"""Seconds until a part of a message that is not there yet is asked for again; doubled each time, up to Flower's ten."""


def supernode(poll: float) -> None:
    """A SuperNode looks for messages and replies every `poll` seconds at most."""
    from flwr.supernode import start_client_internal as module

    _replace(module, "time", SimpleNamespace(sleep=lambda seconds: time.sleep(min(seconds, poll))))
    _replace(module, "pull_objects", partial(vars(module)["pull_objects"], initial_backoff=BACKOFF))


def superlink() -> None:
    """Clocks of nodes may be ahead of the SuperLink's by as much as Flower lets them be behind: five minutes."""
    from flwr.superlink.routers.fleet import node_auth as module

    _replace(module, "SYSTEM_TIME_TOLERANCE", vars(module)["TIMESTAMP_TOLERANCE"])


def _replace(module: ModuleType, name: str, value: Any) -> None:
    if name not in vars(module):
        raise ImportError(f"{module.__name__} has no '{name}': this Flower is not 1.41")
    vars(module)[name] = value
