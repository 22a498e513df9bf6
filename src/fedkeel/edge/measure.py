"""What an exported model answers, how fast, and in how much memory, beside eager PyTorch in the same run."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fedkeel.core.errors import InputError
from fedkeel.edge.graph import INPUT, missing
from fedkeel.train.evaluate import evaluating

_BLOCK, _WARM = 20, 10


class Latency(NamedTuple):
    """Milliseconds of one call, by the median and the 99th of 100, over so many calls."""

    p50: float
    p99: float
    calls: int


class Parity(NamedTuple):
    """Two models on the same examples. Of classes: the share of equal predictions and both accuracies; else None."""

    examples: int
    most: float
    mean: float
    agreement: float | None
    accuracy: float | None
    reference: float | None

    @property
    def lost(self) -> float | None:
        """Accuracy that the exported model is behind, as a share."""
        return None if self.accuracy is None or self.reference is None else self.reference - self.accuracy


class Session:
    """An ONNX model that runs on the CPU."""

    def __init__(self, path: Path, threads: int = 1) -> None:
        """Raises `InputError` for what ONNX Runtime does not load."""
        try:
            import onnxruntime as ort
        except ImportError:
            raise missing() from None
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3
        try:
            self._session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its exceptions have no common class
            said = " ".join(str(error).split())[:160]
            raise InputError(f"'{path}' is not loaded by ONNX Runtime ({said}): export it again") from None
        self._input = self._session.get_inputs()[0].name

    def __call__(self, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """(n, ...) -> outputs (n, ...)."""
        found: np.ndarray[Any, Any] = self._session.run(None, {self._input: x})[0]
        return found

    def answers(self, x: Tensor, batch: int = 100) -> Tensor:
        """Outputs for many examples."""
        return torch.cat([torch.from_numpy(self(x[at : at + batch].numpy())) for at in range(0, len(x), batch)])


def eager(module: nn.Module, x: Tensor, batch: int = 100) -> Tensor:
    """The module's own outputs for many examples."""
    with torch.inference_mode(), evaluating(module):
        return torch.cat([module(x[at : at + batch]).clone() for at in range(0, len(x), batch)])


def parity(ours: Tensor, theirs: Tensor, y: Tensor, classes: bool) -> Parity:
    """Exported outputs against the reference's, both (n, ...)."""
    gap = (ours.double() - theirs.double()).abs()
    if not classes:
        return Parity(len(y), float(gap.max()), float(gap.mean()), None, None, None)
    mine, was = ours.argmax(-1), theirs.argmax(-1)
    same, right, were = ((a == b).double().mean() for a, b in ((mine, was), (mine, y), (was, y)))
    return Parity(len(y), float(gap.max()), float(gap.mean()), float(same), float(right), float(were))


def latencies(
    module: nn.Module, sessions: Mapping[str, Session], x: Tensor, *, threads: int, seconds: float
) -> dict[str, Latency]:
    """Calls with one example after the other: the module in eager mode under 'eager', and the sessions.

    They take turns in short blocks, so that what else the machine does falls on all alike. `seconds` is for each.
    """
    examples = [x[at : at + 1] for at in range(min(len(x), 64))]
    arrays = [example.numpy() for example in examples]
    took: dict[str, list[float]] = {"eager": [], **{name: [] for name in sessions}}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode(), evaluating(module):
            calls: dict[str, Callable[[int], object]] = {"eager": lambda at: module(examples[at])}
            calls |= {name: lambda at, run=run: run(arrays[at]) for name, run in sessions.items()}  # type: ignore[misc]
            for call in calls.values():
                for at in range(_WARM):
                    call(at % len(examples))
            until = time.perf_counter() + seconds * len(calls)
            while time.perf_counter() < until or len(took["eager"]) < 2 * _BLOCK:
                for name, call in calls.items():
                    for at in range(_BLOCK):
                        began = time.perf_counter()
                        call(at % len(examples))
                        took[name].append(time.perf_counter() - began)
    finally:
        torch.set_num_threads(before)
    return {name: _latency(values) for name, values in took.items()}


def _latency(seconds: list[float]) -> Latency:
    p50, p99 = np.percentile(seconds, (50, 99)) * 1e3
    return Latency(float(p50), float(p99), len(seconds))


_EXPORTED = """
import sys
import numpy as np
import onnxruntime as ort
options = ort.SessionOptions()
options.intra_op_num_threads = options.inter_op_num_threads = 1
session = ort.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
"""
_EAGER = """
import sys
import numpy as np
import torch
torch.set_num_threads(1)
module = torch.load(sys.argv[1], weights_only=False).eval()
"""
_RUN = """
x = np.load(sys.argv[2])
for _ in range(10):
    {call}
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def peak_memory(source: Path | nn.Module, x: Tensor) -> int | None:
    """Bytes that a fresh process needs at most to load a model and run one example, its runtime included.

    None where that cannot be told: the system has no /proc, or a module of a plugin cannot be sent to a process.
    """
    with TemporaryDirectory(prefix="fedkeel-") as folder:
        np.save(Path(folder) / "x.npy", x[:1].numpy())
        if isinstance(source, nn.Module):
            path, call = Path(folder) / "module.pt", "with torch.inference_mode(): module(torch.from_numpy(x))"
            code = _EAGER + _RUN.format(call=call)
            try:
                torch.save(source, path)
            except Exception:  # pickle's, of many kinds
                return None
        else:
            path = source
            code = _EXPORTED + _RUN.format(call=f"session.run(None, {{{INPUT!r}: x}})")
        command = [sys.executable, "-c", code, str(path), str(Path(folder) / "x.npy")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    return int(done.stdout) * 1024 if done.returncode == 0 else None
