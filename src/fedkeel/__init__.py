"""fedkeel: federated learning whose model updates can be trusted.

`run(Job(...))` runs a federation, `rule(kind)` registers your own function as a rule of any kind, `Pool` takes your own
data. Everything is imported on first use, so that `import fedkeel` is cheap.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fedkeel.api import Run as Run
    from fedkeel.api import reduce_files as reduce_files
    from fedkeel.api import report as report
    from fedkeel.api import resume as resume
    from fedkeel.api import run as run
    from fedkeel.comparison import Comparison as Comparison
    from fedkeel.comparison import Variant as Variant
    from fedkeel.comparison import compare as compare
    from fedkeel.config import Job as Job
    from fedkeel.config import load as load
    from fedkeel.core.errors import CohortError as CohortError
    from fedkeel.core.errors import DecodeError as DecodeError
    from fedkeel.core.errors import FedkeelError as FedkeelError
    from fedkeel.core.errors import InputError as InputError
    from fedkeel.core.errors import InterruptedRunError as InterruptedRunError
    from fedkeel.core.errors import RunError as RunError
    from fedkeel.core.keys import Key as Key
    from fedkeel.core.layout import Layout as Layout
    from fedkeel.core.registry import RegistrationError as RegistrationError
    from fedkeel.core.registry import Rule as Rule
    from fedkeel.core.registry import build as build
    from fedkeel.core.registry import names as names
    from fedkeel.core.registry import parse as parse
    from fedkeel.core.registry import rule as rule
    from fedkeel.core.roster import Candidates as Candidates
    from fedkeel.core.types import Codec as Codec
    from fedkeel.core.types import Cohort as Cohort
    from fedkeel.core.types import Decision as Decision
    from fedkeel.core.types import Local as Local
    from fedkeel.core.types import Refusal as Refusal
    from fedkeel.core.types import ServerState as ServerState
    from fedkeel.core.types import Update as Update
    from fedkeel.core.types import View as View
    from fedkeel.gate.evidence import Evidence as Evidence
    from fedkeel.gate.evidence import Finding as Finding
    from fedkeel.gate.signing import load_model as load_model
    from fedkeel.probing import Cell as Cell
    from fedkeel.probing import Probe as Probe
    from fedkeel.probing import probe as probe
    from fedkeel.ship.card import Feature as Feature
    from fedkeel.world.pool import Pool as Pool
    from fedkeel.world.pool import Split as Split
    from fedkeel.world.record import Progress as Progress

_HOMES = {
    "fedkeel.api": ("Run", "reduce_files", "report", "resume", "run"),
    "fedkeel.comparison": ("Comparison", "Variant", "compare"),
    "fedkeel.config": ("Job", "load"),
    "fedkeel.core.errors": (
        "CohortError",
        "DecodeError",
        "FedkeelError",
        "InputError",
        "InterruptedRunError",
        "RunError",
    ),
    "fedkeel.core.keys": ("Key",),
    "fedkeel.core.layout": ("Layout",),
    "fedkeel.core.registry": ("RegistrationError", "Rule", "build", "names", "parse", "rule"),
    "fedkeel.core.roster": ("Candidates",),
    "fedkeel.core.types": ("Codec", "Cohort", "Decision", "Local", "Refusal", "ServerState", "Update", "View"),
    "fedkeel.probing": ("Cell", "Probe", "probe"),
    "fedkeel.gate.evidence": ("Evidence", "Finding"),
    "fedkeel.gate.signing": ("load_model",),
    "fedkeel.ship.card": ("Feature",),
    "fedkeel.world.pool": ("Pool", "Split"),
    "fedkeel.world.record": ("Progress",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "__version__",
    *sorted(_HOME),
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fedkeel' has no attribute '{name}'")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)
