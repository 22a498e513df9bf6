"""Users' own rules, models and sources: Python files whose decorators register them."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from fedkeel.core.errors import FedkeelError, InputError

_loaded: set[str] = set()


def read(paths: Sequence[str]) -> dict[str, str]:
    """File name -> text of each plugin, or an `InputError` naming the one that cannot be read."""
    texts: dict[str, str] = {}
    for given in paths:
        path = Path(given)
        if path.name in texts:
            raise InputError(f"plugins name two files '{path.name}': rename one")
        try:
            texts[path.name] = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"plugin '{given}' can not be read ({error}): name a Python file") from None
    return texts


def load(paths: Sequence[str]) -> None:
    """Run each plugin file once per process; a copy with the same content (as a run keeps) is not run again."""
    for given, text in zip(paths, read(paths).values(), strict=True):
        digest = hashlib.sha256(text.encode()).hexdigest()
        if digest in _loaded:
            continue
        path = Path(given).resolve()
        name = f"fedkeel_plugin_{digest[:16]}"
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise InputError(f"plugin '{given}' is no Python file: give it the ending .py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        sys.path.insert(0, str(path.parent))  # a plugin may import its neighbours
        try:
            spec.loader.exec_module(module)
        except FedkeelError as error:
            raise InputError(f"plugin '{given}': {error}") from None
        except Exception as error:
            raise InputError(f"plugin '{given}' failed to load ({type(error).__name__}: {error}): mend it") from error
        finally:
            sys.path.remove(str(path.parent))
        _loaded.add(digest)
