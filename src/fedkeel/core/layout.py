"""Layout: which tensor of a module lies in which columns of the flat vector."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn

from fedkeel.core.errors import InputError, nearest

Kind = Literal["param", "buffer", "private"]
PERSONAL = "personal/"
"""What the names of tensors begin with that a client has of its own, beside the module's."""
_TYPE = "type:"


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor: `param` is optimised and travels, `buffer` (float) travels, `private` stays on the client."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    kind: Kind
    trainable: bool

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Layout:
    """Columns of a model. The full vector (W,) is laid out as

        [private, trainable | param | buffer | private, buffers]
         `------- trainable -------'
                             `---- shared ----'

    so that what is optimised and what travels are each one slice. An update has the P shared columns, none where every
    tensor is private. Integer buffers and parameters with `requires_grad = False` are no columns: a frozen base under
    LoRA adapters costs nothing.
    """

    entries: tuple[Entry, ...]
    first: Mapping[str, Tensor] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(
        cls,
        module: nn.Module,
        private: Sequence[str] = (),
        personal: Mapping[str, tuple[Tensor, bool]] | None = None,
    ) -> Layout:
        """The layout of a module; `private` are name patterns (`head.*`) of tensors that stay on the client.

        `type:BatchNorm*` matches what modules of such types hold.
        `personal` are tensors that each client has beside the module's: name -> first value, whether it is trained.
        They are private, under the prefix `personal/`, and `first` holds the values.

        Raises `InputError` for a pattern that matches nothing, a complex tensor, or a module with nothing to train.
        """
        found: list[Entry] = []
        seen: set[str] = set()
        persistent = module.state_dict(keep_vars=True).keys()
        tensors: list[tuple[str, Tensor, bool]] = [
            (n, p, True) for n, p in module.named_parameters() if p.requires_grad
        ]
        tensors += [(n, b, False) for n, b in module.named_buffers() if n in persistent and not _integral(b)]
        for name, tensor, trainable in tensors:
            if tensor.is_complex():
                raise InputError(f"tensor '{name}' is {tensor.dtype}: fedkeel federates real tensors; split it in two")
            owner = _TYPE + type(module.get_submodule(name.rpartition(".")[0])).__name__
            matches = [
                p
                for p in private
                if fnmatch.fnmatchcase(owner if p.startswith(_TYPE) else name, p) or name.startswith(p + ".")
            ]
            seen.update(matches)
            kind: Kind = "private" if matches else "param" if trainable else "buffer"
            dtype = str(tensor.dtype).removeprefix("torch.")
            found.append(Entry(name, tuple(tensor.shape), dtype, kind, trainable))
        for pattern in private:
            if pattern not in seen:
                known = [e.name for e in found]
                raise InputError(f"model.private '{pattern}' matches no tensor of the model: {nearest(pattern, known)}")
        for name, (tensor, trained) in (personal or {}).items():
            dtype = str(tensor.dtype).removeprefix("torch.")
            found.append(Entry(PERSONAL + name, tuple(tensor.shape), dtype, "private", trained))
        order = {("private", True): 0, ("param", True): 1, ("buffer", False): 2, ("private", False): 3}
        first = {PERSONAL + name: tensor.detach().clone() for name, (tensor, _) in (personal or {}).items()}
        layout = cls(tuple(sorted(found, key=lambda e: order[e.kind, e.trainable])), first)
        if layout.trainable.stop == 0 or (layout.params.stop == 0 and layout.columns):
            raise InputError("the model shares no trainable parameter: nothing can be federated")
        return layout

    @cached_property
    def offsets(self) -> dict[str, slice]:
        """Name -> columns of the full vector."""
        result, start = {}, 0
        for entry in self.entries:
            result[entry.name] = slice(start, start + entry.size)
            start += entry.size
        return result

    @cached_property
    def width(self) -> int:
        """W: every column, private ones included."""
        return sum(e.size for e in self.entries)

    @cached_property
    def columns(self) -> int:
        """P: the columns of an update."""
        return sum(e.size for e in self.entries if e.kind != "private")

    @cached_property
    def trainable(self) -> slice:
        """Columns of the full vector that the local optimiser moves."""
        return slice(0, sum(e.size for e in self.entries if e.trainable))

    @cached_property
    def shared(self) -> slice:
        """Columns of the full vector that travel."""
        start = sum(e.size for e in self.entries if e.kind == "private" and e.trainable)
        return slice(start, start + self.columns)

    @cached_property
    def params(self) -> slice:
        """Columns of an update that are parameters; the rest are buffers: averaged, never clipped or optimised."""
        return slice(0, sum(e.size for e in self.entries if e.kind == "param"))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON of the entries."""
        rows = [[e.name, list(e.shape), e.dtype, e.kind, e.trainable] for e in self.entries]
        return hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode()).hexdigest()

    def flatten(self, module: nn.Module) -> Tensor:
        """The module's full vector (W,), float32, a copy; personal tensors at their first value."""
        state = dict(module.named_parameters()) | dict(module.named_buffers()) | dict(self.first)
        return torch.cat([state[e.name].detach().reshape(-1).to(torch.float32) for e in self.entries])

    def views(self, vector: Tensor) -> dict[str, Tensor]:
        """Name -> tensor of its shape, sharing the memory of `vector`: (W,) gives all, (P,) the shared ones."""
        full = vector.shape[-1] == self.width
        if not full and vector.shape[-1] != self.columns:
            raise ValueError(f"a vector of {vector.shape[-1]} columns fits neither W={self.width} nor P={self.columns}")
        shift = 0 if full else self.shared.start
        return {
            e.name: vector[..., s.start - shift : s.stop - shift].view((*vector.shape[:-1], *e.shape))
            for e in self.entries
            if full or e.kind != "private"
            for s in (self.offsets[e.name],)
        }

    def private(self, full: Tensor) -> Tensor:
        """The private columns (W - P,) of a full vector (W,): trainable ones, then buffers."""
        return torch.cat([full[: self.shared.start], full[self.shared.stop :]])

    def joined(self, theta: Tensor, private: Tensor) -> Tensor:
        """The full vector (W,) of shared (P,) and private (W - P,) columns."""
        first = self.shared.start
        return torch.cat([private[:first], theta, private[first:]])

    def load_(self, module: nn.Module, vector: Tensor) -> None:
        """Copy a vector, (W,) or (P,), into the module's own tensors."""
        state = dict(module.named_parameters()) | dict(module.named_buffers())
        with torch.no_grad():
            for name, value in self.views(vector).items():
                if name not in self.first:
                    state[name].copy_(value)

    def slices(self, pattern: str) -> list[slice]:
        """Columns of an update (P,) whose names match the pattern, one slice per tensor."""
        shift = self.shared.start
        return [
            slice(s.start - shift, s.stop - shift)
            for e in self.entries
            if e.kind != "private" and (fnmatch.fnmatchcase(e.name, pattern) or e.name.startswith(pattern + "."))
            for s in (self.offsets[e.name],)
        ]


def _integral(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex())
