"""What a path tells of a model: a run, a release, a card, a state dict, safetensors, ONNX, a module's own factory."""

from __future__ import annotations

import importlib.util
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fedkeel.core.errors import InputError
from fedkeel.release.contract import Contract
from fedkeel.release.registry import Registry, parse
from fedkeel.ship import card, tensors

_PICKLED = {".pt", ".pth", ".bin", ".ckpt"}
_WRAPPED = ("state_dict", "model_state_dict", "model")
KINDS = (
    "a run or model directory, a release (DIR/NAME@production), card.json, .safetensors, .pt, .pth, .bin, .ckpt, "
    ".onnx, or module.py:factory"
)


def describe(reference: str) -> Contract:
    """What is told of a model by `reference`, a path or 'path.py:factory'. Raises `InputError`.

    A card beside the file is believed only together with the tensors that it is the card of.
    """
    file, colon, factory = reference.rpartition(":")
    if colon and file.endswith(".py"):
        return of_module(_built(Path(file), factory, reference), reference)
    path = Path(reference)
    try:
        if (released := parse(reference)) is not None:
            return _of_release(*released, reference)
        if path.is_dir():
            return _of_directory(path, reference)
        if not path.is_file():
            raise InputError(f"'{reference}' is no file and no directory: name {KINDS}")
        return _of_file(path, reference)
    except OSError as error:
        raise InputError(f"'{reference}' cannot be read ({error.strerror or error}): choose another file") from None


def of_module(module: nn.Module, source: str) -> Contract:
    """What a module tells: its tensors. Its weights are fresh, so not compared."""
    return Contract(source, parameters=card.described(module.state_dict()), counters=True)


def _of_release(place: Path, name: str | None, which: str, reference: str) -> Contract:
    with Registry(place) as registry, TemporaryDirectory(prefix="fedkeel-") as folder:
        made, _ = card.read(registry.checkout(registry.find(name, which), Path(folder) / "release"))
    return Contract.of(made, reference)


def _of_directory(path: Path, reference: str) -> Contract:
    for place in (path, path / "model"):
        if (place / "card.json").is_file():
            made, _ = card.read(place)
            return Contract.of(made, reference)
    raise InputError(f"'{reference}' holds no card.json and no model/: name the directory of a finished run")


def _of_file(path: Path, reference: str) -> Contract:
    if path.name.endswith(".json"):
        return Contract.of(card.read_card(path), reference)
    if path.suffix == ".safetensors":
        return _of_tensors(_safetensors(path, reference), reference)
    if path.suffix == ".onnx":
        from fedkeel.release.onnx import of_onnx

        return of_onnx(path, reference)
    if path.suffix in _PICKLED:
        return _of_tensors(_state_dict(path, reference), reference)
    raise InputError(f"'{reference}' is no model that fedkeel reads: name {KINDS}")


def _of_tensors(named: Mapping[str, Tensor], reference: str) -> Contract:
    weights, travelling = tensors.fingerprint(named), {name: t for name, t in named.items() if t.dtype != torch.int64}
    bare = weights if len(travelling) == len(named) else tensors.fingerprint(travelling)
    return Contract(reference, parameters=card.described(named), weights=weights, counters=True, weights_without=bare)


def _safetensors(path: Path, reference: str) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, ValueError, RuntimeError, OverflowError) as error:
        raise InputError(f"'{reference}' is no whole safetensors file ({error}): restore it") from None


def _state_dict(path: Path, reference: str) -> dict[str, Tensor]:
    """A state dict, bare or under a usual key; tensors only: nothing in the file is run."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > 2 * path.stat().st_size:
                raise InputError(f"'{reference}' unpacks to far more than it is: save it with torch.save, unpacked")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises nearly anything for a file that is none
        what = "it holds more than tensors" if "weights_only" in str(error) else " ".join(str(error).split())[:120]
        raise InputError(
            f"'{reference}' is not read ({what}): save the state dict alone, torch.save(module.state_dict(), path)"
        ) from None
    if isinstance(found, Mapping):
        found = next((found[key] for key in _WRAPPED if isinstance(found.get(key), Mapping)), found)
    if not isinstance(found, Mapping) or not found:
        raise InputError(f"'{reference}' holds {type(found).__name__}, no state dict: save module.state_dict()")
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise InputError(
                f"'{reference}' holds {type(value).__name__} at {str(name)[:60]!r}: save module.state_dict() alone"
            )
    return dict(found)


def _built(path: Path, factory: str, reference: str) -> nn.Module:
    make = _named(path, factory, reference)
    try:
        module = make()
    except Exception as error:  # a user's function
        said = " ".join(str(error).split())[:200]
        raise InputError(
            f"'{reference}' failed ({type(error).__name__}: {said}): it is called without arguments"
        ) from error
    if not isinstance(module, nn.Module):
        raise InputError(f"'{reference}' returned {type(module).__name__}: return a torch.nn.Module")
    return module


def _named(path: Path, factory: str, reference: str) -> Callable[[], object]:
    if not path.is_file():
        raise InputError(f"'{reference}': there is no file {path}: name a Python file and its function")
    spec = importlib.util.spec_from_file_location(f"fedkeel_factory_{path.stem}", path)
    assert spec is not None  # a file of this ending has both
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent.resolve()))  # it may import its neighbours
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # a user's file
        said = " ".join(str(error).split())[:200]
        raise InputError(f"'{path}' cannot be imported ({type(error).__name__}: {said}): mend the file") from error
    finally:
        sys.path.pop(0)
    make = getattr(module, factory, None)
    if not callable(make):
        raise InputError(f"'{reference}': {path.name} has no function '{factory}': name one that returns the module")
    return make  # type: ignore[no-any-return]
