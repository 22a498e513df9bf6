"""The same federation on a real network: Flower carries the messages, the coordinator decides. Needs fedkeel[deploy].

Only this room imports flwr, at the version that `pyproject.toml` pins. `FedKeel` is the other direction: our server as
the strategy of a Flower app.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedkeel.deploy.strategy import FedKeel

__all__ = ["FedKeel"]


def __getattr__(name: str) -> object:
    """The strategy, imported when it is asked for: a host that has no Flower app needs none of it."""
    if name != "FedKeel":
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    from fedkeel.deploy.strategy import FedKeel

    return FedKeel
