"""The way down: clients are sent the model in full, or coded steps to it from the model that they have."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedkeel.core.keys import Key
from fedkeel.core.layout import Layout
from fedkeel.core.registry import Rule
from fedkeel.core.types import Codec
from fedkeel.round import wire


class Downlink:
    """What clients train from, and what it costs to bring it to them.

    With a codec the server publishes, at each new version, the coded way from the model that it published before to its
    own: what is lost goes into the next step (error feedback), and all who have a version have the same one, bit for
    bit. Who has an older one is sent all steps since then, or the whole model where that is less.
    """

    def __init__(self, rule: Rule | None, zstd: int, layout: Layout, theta: Tensor, kept: Mapping[str, Tensor]) -> None:
        """`kept` is what `state` gave; without a codec there is nothing to keep."""
        self._codec: Codec | None = None if rule is None else wire.built(rule, layout)[1]
        self._zstd = zstd
        self._full = 4 * layout.columns
        self._coded = kept.get("theta", theta) if self._codec else None
        # Of the steps to the versions from 1 on.
        self._sizes: list[int] = kept["sizes"].tolist() if "sizes" in kept else []
        self._steps: dict[int, bytes] = {}

    def theta(self, state: Tensor) -> Tensor:
        """The model (P,) that clients are given while the server's is `state`."""
        return state if self._coded is None else self._coded

    def publish(self, theta: Tensor, key: Key) -> None:
        """The server has a new version."""
        if self._codec is None or self._coded is None:
            return
        step = theta - self._coded
        (payload,) = self._codec.encode(step[None], [key])
        packed = wire.packed(payload, self._zstd)
        self._sizes.append(len(packed))
        self._keep(packed)
        self._codec.decode(memoryview(payload), step)
        self._coded = self._coded + step

    def _keep(self, packed: bytes) -> None:
        """The steps that somebody may still be sent: as many as are less than the whole model."""
        version = len(self._sizes)
        self._steps[version] = packed
        first = min(self._steps)
        while sum(self._sizes[first - 1 :]) >= self._full and first <= version:
            del self._steps[first]
            first += 1

    def steps(self, have: int, version: int) -> list[bytes] | None:
        """The coded steps from one version to another, in order; None: send the whole model."""
        wanted = range(have + 1, version + 1)
        if self._codec is None or have < 0 or self.bytes(have, version) >= self._full:
            return None
        if not all(number in self._steps for number in wanted):
            return None
        return [self._steps[number] for number in wanted]

    def bytes(self, have: int, version: int) -> int:
        """What a client is sent that has a version (-1: none), to have this one."""
        if self._codec is None or have < 0:
            return self._full
        return min(self._full, sum(self._sizes[have:version]))

    def state(self) -> dict[str, Tensor]:
        """What to keep."""
        if self._coded is None:
            return {}
        return {"theta": self._coded, "sizes": torch.tensor(self._sizes, dtype=torch.int64)}
