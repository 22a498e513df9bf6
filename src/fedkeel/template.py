"""The files that `fedkeel new` writes, made from the job's own schema so that they are never out of date."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fedkeel.config import Job

_TOP = {
    "name": "names the run's directory",
    "seed": "every random draw of the run comes from it (privacy noise apart)",
    "rounds": "how many rounds to run",
}


def job_file(name: str, plugins: tuple[str, ...] = (), changes: dict[str, str] | None = None) -> str:
    """A commented job file with every key, at its default unless `changes` (section.key -> value) says otherwise."""
    values = Job().with_settings(f"{k}={v}" for k, v in (changes or {}).items())
    lines = [
        f"# A fedkeel job. Run it: fedkeel run {name}.toml",
        '# A rule is written as a call: "trimmed_mean(trim=2)". What there is: fedkeel rules [KIND [NAME]]',
        "",
    ]
    sections: list[tuple[str, BaseModel]] = []
    for key, info in Job.model_fields.items():
        value = {"name": name, "plugins": plugins}.get(key, getattr(values, key))
        if isinstance(value, BaseModel):
            sections.append((key, value))
        else:
            lines.append(_line(key, value, info.description or _TOP.get(key, "")))
    for key, section in sections:
        lines += ["", f"[{key}]  # {(type(section).__doc__ or '').strip().rstrip('.')}"]
        fields: dict[str, FieldInfo] = type(section).model_fields
        lines += [_line(k, getattr(section, k), info.description or "") for k, info in fields.items()]
    return "\n".join(lines) + "\n"


def _line(key: str, value: Any, comment: str) -> str:
    text = f"# {key} =" if value is None else f"{key} = {_toml(value)}"
    return f"{text}  # {comment}" if comment else text


def _toml(value: Any) -> str:
    import tomli_w

    if isinstance(value, Mapping):
        return "{" + ", ".join(tomli_w.dumps({k: v}).strip() for k, v in value.items()) + "}"
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    return tomli_w.dumps({"v": value}).partition("= ")[2].strip()


CUSTOM = '''\
"""Your own data, model and aggregator. The job file names this file under `plugins`."""

import numpy as np
import torch
from torch import nn

import fedkeel


@fedkeel.rule("source")
def my_data(key: fedkeel.Key, *, clients: int = 8) -> fedkeel.Pool:
    """Replace this by your own: one (x, y) pair of arrays per client."""
    draws = key.numpy()
    truth = draws.normal(size=20)
    people = {}
    for person in range(clients):
        x = draws.normal(loc=draws.normal(size=20) * 0.5, size=(120, 20)).astype(np.float32)
        people[f"person-{person}"] = (x, (x @ truth > 0).astype(np.int64))
    return fedkeel.Pool.from_clients(people, key=key)


@fedkeel.rule("model")
def my_model(inputs: tuple[int, ...], classes: int, *, width: int = 32) -> nn.Module:
    """Any nn.Module: inputs is the shape of one example, classes the number of labels."""
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs[0], width), nn.ReLU(), nn.Linear(width, classes))


@fedkeel.rule("reducer")
def my_mean(U: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Rows (n, P) and their weights (n,) to one row (P,)."""
    return ((w / w.sum()).to(U.dtype) @ U)
'''

CUSTOM_SETTINGS = {
    "data.source": "my_data(clients=8)",
    "data.partition": "natural",
    "data.clients": "8",
    "model.build": "my_model(width=32)",
    "aggregate.reduce": "my_mean",
}
