"""What a registry asks of models: `gate.toml` beside its index, a list of rules for each stage."""

from __future__ import annotations

import tomllib
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedkeel import plugins
from fedkeel.core.errors import InputError
from fedkeel.core.registry import Rule, parse
from fedkeel.release.registry import Registry
from fedkeel.ship import files

FILE = "gate.toml"
DEFAULT = """\
# What a model must pass on its way into each stage. `fedkeel rules gate` lists the rules, `fedkeel rules gate NAME`
# tells of one. It belongs to this registry, not to the jobs that publish here: no run brings its own gate.

# Python files with rules of your own.
plugins = []

# The public key that releases must be signed with; `fedkeel release keys` makes a pair: signed = "release.pub"

[tell]
# A file that Prometheus' node exporter collects: metrics = "/var/lib/node_exporter/fedkeel.prom"
# Whom to tell each verdict, signed with the secret in FEDKEEL_WEBHOOK_SECRET: webhook = "https://..."

[candidate]
rules = ["metadata", "fingerprint", "version"]

[staging]
rules = ["metadata", "fingerprint", "version", "configuration", "figures", "refused(most=0.5)"]

[production]
# Worth adding, where your job measures it: accuracy(least=0.9), groups(least=0.8), worst_decile(least=0.7),
# budget(epsilon=8), compatible(at_most="minor")
rules = [
    "metadata",
    "fingerprint",
    "version",
    "configuration",
    "figures",
    "not_worse(margin=0.01)",
    "no_label_worse(margin=0.1)",
    "calibration(most=0.15)",
    "refused(most=0.3)",
    "backdoor(most=0.5)",
    "budget",
]
"""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Tell(_Part):
    """Who is told of verdicts."""

    metrics: str | None = None
    webhook: str | None = Field(None, pattern=r"^https?://[^\s]+$")


class Stage(_Part):
    """What a stage asks."""

    rules: tuple[str, ...]


class Policy(_Part):
    """The file as it is written."""

    plugins: tuple[str, ...] = ()
    signed: str | None = None
    tell: Tell = Tell()
    candidate: Stage
    staging: Stage
    production: Stage

    def asked(self, stage: str) -> dict[str, Rule]:
        """The rules of a stage, by what is written of them. Raises `InputError`."""
        return {text: _rule(stage, text) for text in getattr(self, stage).rules}


def read(registry: Registry) -> Policy:
    """The registry's policy, its plugins loaded, all of its rules known. Raises `InputError`."""
    path = registry.path / FILE
    try:
        values: dict[str, Any] = tomllib.loads(path.read_text("utf-8"))
        found = Policy.model_validate(values)
    except OSError as error:
        raise InputError(f"'{path}' cannot be read ({error.strerror}): fedkeel release init writes one") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"'{path}' is not valid TOML: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(f"'{path}': {where}: {first['msg']}: `fedkeel release init` elsewhere shows how") from None
    plugins.load([str(registry.path / plugin) for plugin in found.plugins])
    for stage in ("candidate", "staging", "production"):
        found.asked(stage)
    return found


def write(registry: Registry) -> None:
    """Write the policy to begin with, where there is none."""
    path = registry.path / FILE
    if not path.exists():
        files.write_text(path, DEFAULT)


def _rule(stage: str, text: str) -> Rule:
    try:
        return parse("gate", text)
    except InputError as error:
        raise InputError(f"{FILE}: {stage}.rules: {error}") from None
