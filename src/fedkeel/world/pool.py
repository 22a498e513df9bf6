"""A pool of examples, its split among clients, and the contiguous client data made of both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedkeel.core.errors import InputError
from fedkeel.core.keys import Key
from fedkeel.ship.card import Feature
from fedkeel.train.contract import ClientData, Prepare, Scale

_KEY = Key.root(0)


@dataclass(frozen=True, eq=False)
class Pool:
    """What a source returns: every training example once, and a test set for the global model.

    x (N, ...), test_x (M, ...) as stored; `prepare` turns a batch of them into the model's input. y (N, ...),
    test_y (M, ...): int64 labels in 0..classes-1, or float32 targets when `classes` is 0 (regression). `group` (N,)
    int64 is each example's natural client, an index of `group_names`. `labels` names the classes. `ordered` says that
    the rows stand in the order of time and neighbours may overlap (windows of one recording): a holdout then takes
    the last rows, not random ones. `features` name the columns of a table, x (N, F): what the model card tells of them,
    and what lets a client with other columns take part.

    Raises `InputError` for lengths that differ, an empty set, labels or groups out of range, non-finite floats.
    """

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: int
    prepare: Prepare = field(default_factory=Scale)
    group: Tensor | None = None
    group_names: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    ordered: bool = False
    features: tuple[Feature, ...] = ()

    def __post_init__(self) -> None:
        if self.labels and len(self.labels) != self.classes:
            raise InputError(f"data labels name {len(self.labels)} classes of {self.classes}: name each class once")
        for prefix, x, y in (("", self.x, self.y), ("test_", self.test_x, self.test_y)):
            _check_pair(prefix, x, y, self.classes)
        if self.x.shape[1:] != self.test_x.shape[1:]:
            raise InputError(
                f"data x has examples of shape {tuple(self.x.shape[1:])}, test_x of {tuple(self.test_x.shape[1:])}: "
                "give both the same shape"
            )
        if self.group is not None:
            if self.group.shape != (len(self),):
                raise InputError(f"data group has shape {tuple(self.group.shape)}: give one group per row, {len(self)}")
            _check_range("group", self.group, len(self.group_names), "group_names")
        if self.features and self.x.shape[1:] != (len({feature.name for feature in self.features}),):
            raise InputError(
                f"data x has examples of shape {tuple(self.x.shape[1:])} and {len(self.features)} features: "
                "name each column once"
            )

    def __len__(self) -> int:
        return self.x.shape[0]

    @property
    def inputs(self) -> tuple[int, ...]:
        """The shape of one model input."""
        return tuple(self.prepare(self.x[:1]).shape[1:])

    @classmethod
    def from_arrays(
        cls,
        x: Any,
        y: Any,
        test_x: Any = None,
        test_y: Any = None,
        *,
        group: Any = None,
        test_fraction: float = 0.2,
        key: Key = _KEY,
        prepare: Prepare | None = None,
        labels: Sequence[str] = (),
        features: Sequence[Feature | str] = (),
    ) -> Pool:
        """A pool of your own arrays (numpy, torch or nested lists), not copied where their type allows it.

        Integer y are labels 0..C-1, float y are targets of a regression. `group` (N,), numbers or names, is each
        row's natural client. Without a test set, a fraction of the rows becomes one: drawn by `key`, even over
        groups and labels. `prepare` defaults to float32 as it stands.
        `features` name the columns of x (N, F).
        """
        x, y = _tensor("x", x), _tensor("y", y)
        ids, names = _groups(group)
        if len(x) != len(y) or (ids is not None and len(ids) != len(x)):
            lengths = f"x {len(x)}, y {len(y)}" + ("" if ids is None else f", group {len(ids)}")
            raise InputError(f"data lengths differ ({lengths}): give one y (and one group) per row of x")
        if (test_x is None) != (test_y is None):
            raise InputError("data has one of test_x and test_y: give both, or neither and a test_fraction")
        if test_x is None:
            taken = _test_rows(y, ids, test_fraction, key)
            x, test_x, y, test_y = x[~taken], x[taken], y[~taken], y[taken]
            ids = None if ids is None else ids[~taken]
        else:
            test_x, test_y = _tensor("test_x", test_x), _tensor("test_y", test_y)
        classes = 0
        if not y.is_floating_point() and y.numel() and test_y.numel():
            classes = len(labels) or int(max(y.max(), test_y.max())) + 1
        named = tuple(Feature(name=feature) if isinstance(feature, str) else feature for feature in features)
        return cls(x, y, test_x, test_y, classes, prepare or Scale(), ids, names, tuple(labels), features=named)

    @classmethod
    def from_clients(
        cls,
        clients: Mapping[str, Any] | Sequence[Any],
        *,
        test: tuple[Any, Any] | None = None,
        test_fraction: float = 0.2,
        key: Key = _KEY,
        prepare: Prepare | None = None,
        labels: Sequence[str] = (),
        features: Sequence[Feature | str] = (),
    ) -> Pool:
        """A naturally partitioned pool: per client, named or in order, one (x, y) pair or one torch `Dataset` of pairs.

        Without `test` = (x, y), a fraction of every client's rows becomes the global test set.
        """
        named = clients if isinstance(clients, Mapping) else {str(i): c for i, c in enumerate(clients)}
        if not named:
            raise InputError("data holds no client: give at least one (x, y) pair")
        xs: list[Tensor] = []
        ys: list[Tensor] = []
        group: list[str] = []
        for name, data in named.items():
            x, y = _client_pair(str(name), data)
            if xs and (x.shape[1:] != xs[0].shape[1:] or y.shape[1:] != ys[0].shape[1:]):
                raise InputError(
                    f"client '{name}' has examples of shape {tuple(x.shape[1:])} and {tuple(y.shape[1:])}, "
                    f"the first {tuple(xs[0].shape[1:])} and {tuple(ys[0].shape[1:])}: give all the same shape"
                )
            xs.append(x)
            ys.append(y)
            group += [str(name)] * len(x)
        x, y = torch.cat(xs), torch.cat(ys)
        test_x, test_y = test or (None, None)
        return cls.from_arrays(
            x,
            y,
            test_x,
            test_y,
            group=group,
            test_fraction=test_fraction,
            key=key,
            prepare=prepare,
            labels=labels,
            features=features,
        )


def keep_back(pool: Pool, count: int, key: Key) -> tuple[Pool, Pool]:
    """The pool without `count` training examples, drawn by `key` in proportion to the labels, and a pool of those.

    Raises `InputError` when the pool has not more than so many.
    """
    if not 0 < count < len(pool):
        raise InputError(f"{count} examples are asked for, the pool has {len(pool)}: ask for fewer")
    taken = _test_rows(pool.y, None, count / len(pool), key)

    def part(rows: Tensor) -> Pool:
        group = None if pool.group is None else pool.group[rows]
        return replace(pool, x=pool.x[rows], y=pool.y[rows], group=group)

    return part(~taken), part(taken)


@dataclass(frozen=True, eq=False)
class Split:
    """What a partition returns: which rows of the pool each client holds.

    shares: one (n_i,) int64 index array per client. names: the clients' ids, `client-07` by default. noise: the
    standard deviation of Gaussian noise added to each client's model inputs; empty for none.
    """

    shares: tuple[Tensor, ...]
    names: tuple[str, ...] = ()
    noise: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not self.names:
            width = len(str(len(self.shares) - 1))
            object.__setattr__(self, "names", tuple(f"client-{i:0{width}d}" for i in range(len(self.shares))))
        if len(set(self.names)) != len(self.shares) or len(self.noise) not in (0, len(self.shares)):
            raise InputError(
                f"a split of {len(self.shares)} clients has {len(set(self.names))} different names and "
                f"{len(self.noise)} noise levels: give one of each per client"
            )


def clients(pool: Pool, split: Split, key: Key, *, holdout: float = 0.0) -> tuple[ClientData, ClientData | None]:
    """The clients' training data in contiguous tensors (one copy), and what each holds out as its own test set.

    With 0 < holdout < 1 every client keeps that fraction of its examples (rounded down, at least one) out of
    training: drawn by `key`, or its last ones in an ordered pool. Raises `InputError` for an empty client, an index
    outside the pool, an example given to two clients, or a holdout that a client is too small for.
    """
    if not 0.0 <= holdout < 1.0:
        raise InputError(f"holdout = {holdout} is no fraction: choose 0 (none) up to, not including, 1")
    _check_split(pool, split)
    if holdout == 0.0:
        return _gather(pool, split.shares, split.noise, key.fold("noise", "train")), None
    kept, held = [], []
    for client, share in enumerate(split.shares):
        count = max(1, int(len(share) * holdout))
        if count == len(share):
            raise InputError(
                f"client '{split.names[client]}' has 1 example and cannot hold one out: "
                "use fewer clients, a higher min_examples, or holdout = 0"
            )
        rows = share.sort().values
        if not pool.ordered:
            rows = rows[torch.randperm(len(rows), generator=key.fold("holdout", client).torch())]
        kept.append(rows[:-count].sort().values)
        held.append(rows[-count:].sort().values)
    train = _gather(pool, kept, split.noise, key.fold("noise", "train"))
    return train, _gather(pool, held, split.noise, key.fold("noise", "holdout"))


def set_apart(data: ClientData, fraction: float, names: Sequence[str], key: Key) -> tuple[ClientData, ClientData]:
    """The data without a fraction of every client's examples (rounded down, at least one), drawn by `key`, and those.

    Raises `InputError` for a client that has but one.
    """
    kept, held = [], []
    for client in range(len(data)):
        first, last = data.range(client)
        rows = first + torch.randperm(last - first, generator=key.fold(client).torch())
        count = max(1, int(len(rows) * fraction))
        if count >= len(rows):
            raise InputError(
                f"client '{names[client]}' has {len(rows)} examples and cannot validate on any: "
                "use fewer clients, a higher min_examples, or train.validation = 0"
            )
        kept.append(rows[:-count].sort().values)
        held.append(rows[-count:].sort().values)

    def part(rows: list[Tensor]) -> ClientData:
        index = torch.cat(rows)
        offsets = torch.tensor([0, *map(len, rows)]).cumsum(0)
        return ClientData(data.x[index], data.y[index], offsets, data.prepare)

    return part(kept), part(held)


def label_histogram(data: ClientData, classes: int) -> Tensor:
    """How many examples of each class every client holds: (clients, classes) int64, the picture of a partition."""
    owner = torch.repeat_interleave(torch.arange(len(data)), data.offsets.diff())
    cells = owner[:, None] * classes + data.y.reshape(len(data.y), -1)
    return torch.bincount(cells.flatten(), minlength=len(data) * classes).view(-1, classes)


def _gather(pool: Pool, shares: Sequence[Tensor], noise: Sequence[float], key: Key) -> ClientData:
    index = torch.cat(list(shares))
    offsets = torch.tensor([0, *(len(s) for s in shares)]).cumsum(0)
    if not any(noise):
        return ClientData(pool.x[index], pool.y[index], offsets, pool.prepare)
    sample = pool.prepare(pool.x[:1])
    if not sample.is_floating_point():
        raise InputError("noise cannot be added to symbols: choose another partition than feature_noise for this data")
    # The noise belongs to the model's input, so it is prepared here, once, and stored as float32.
    x = torch.empty((len(index), *sample.shape[1:]))
    for client, share in enumerate(shares):
        part = x[offsets[client] : offsets[client + 1]]
        key.fold(client).numpy().standard_normal(dtype=np.float32, out=part.numpy())
        part.mul_(noise[client]).add_(pool.prepare(pool.x[share]))
    return ClientData(x, pool.y[index], offsets, Scale())


def _check_split(pool: Pool, split: Split) -> None:
    for name, share in zip(split.names, split.shares, strict=True):
        if not len(share):
            raise InputError(
                f"client '{name}' has no examples: use fewer clients, a higher alpha or a higher min_examples"
            )
    index = torch.cat(split.shares) if split.shares else torch.empty(0, dtype=torch.int64)
    if not len(index):
        raise InputError("the partition made no clients: ask for at least 1")
    _check_range("partition index", index, len(pool), "the pool")
    twice = torch.bincount(index, minlength=len(pool)) > 1
    if twice.any():
        raise InputError(f"the partition gives row {int(twice.nonzero()[0])} to two clients: give each row to one")


def _check_pair(prefix: str, x: Tensor, y: Tensor, classes: int) -> None:
    if len(x) != len(y):
        raise InputError(
            f"data {prefix}x has {len(x)} rows, {prefix}y {len(y)}: give one {prefix}y per row of {prefix}x"
        )
    if not len(x):
        raise InputError(f"data {prefix}x is empty: give at least one example")
    if x.is_complex() or y.is_complex():
        raise InputError(f"data {prefix}x or {prefix}y is complex: split it into real and imaginary parts")
    for name, values in ((f"{prefix}x", x), (f"{prefix}y", y)):
        if values.is_floating_point() and not values.isfinite().all():
            row = int(values.isfinite().logical_not().nonzero()[0, 0])
            raise InputError(f"data {name} holds NaN or infinity in row {row}: drop or fill such rows first")
    if classes == 0 and not y.is_floating_point():
        raise InputError(f"data {prefix}y holds integers but classes is 0: give float targets, or count the classes")
    if classes != 0:
        if y.dtype != torch.int64:
            raise InputError(f"data {prefix}y is {y.dtype}: labels of {classes} classes must be int64")
        _check_range(f"{prefix}y", y, classes, "classes")


def _check_range(name: str, values: Tensor, stop: int, what: str) -> None:
    low, high = (int(v) for v in values.aminmax())
    if low < 0 or high >= stop:
        bad = low if low < 0 else high
        raise InputError(f"data {name} holds {bad}, outside 0..{stop - 1} ({what}): number them from 0")


def _tensor(name: str, values: Any) -> Tensor:
    """A tensor of a type that fedkeel stores: float64 becomes float32, bool uint8, integer labels int64."""
    tensor = values.detach().cpu() if isinstance(values, Tensor) else torch.from_numpy(_array(name, values))
    if tensor.dim() == 0:
        raise InputError(f"data {name} is a single number: give one row per example")
    if tensor.dtype == torch.float64:
        return tensor.to(torch.float32)
    if tensor.dtype == torch.bool:
        tensor = tensor.to(torch.uint8)
    return tensor if name.endswith("x") or tensor.is_floating_point() else tensor.to(torch.int64)


def _array(name: str, values: Any) -> NDArray[Any]:
    """An array that torch can take over as it is."""
    try:
        array = np.asarray(values)
    except (TypeError, ValueError) as error:
        raise InputError(f"data {name} is no array ({error}): give every example the same shape") from None
    if array.dtype.kind not in "biuf":
        raise InputError(f"data {name} is an array of {array.dtype}: give numbers, and labels as 0, 1, ...")
    if array.dtype.kind == "u" and array.dtype.itemsize > 1:
        return array.astype(np.int64)
    native = array.dtype.newbyteorder("=")
    if array.dtype != native or not array.flags.writeable or any(stride < 0 for stride in array.strides):
        return array.astype(native, order="C")
    return array


def _groups(group: Any) -> tuple[Tensor | None, tuple[str, ...]]:
    if group is None:
        return None, ()
    values, ids = np.unique(np.asarray(group), return_inverse=True)
    return torch.from_numpy(ids.reshape(-1).astype(np.int64)), tuple(str(v) for v in values)


def _client_pair(name: str, data: Any) -> tuple[Tensor, Tensor]:
    if not (isinstance(data, tuple | list) and len(data) == 2):
        try:
            pairs = [data[i] for i in range(len(data))]
            data = [torch.stack([torch.as_tensor(pair[part]) for pair in pairs]) for part in (0, 1)]
        except (TypeError, ValueError, IndexError, KeyError, RuntimeError) as error:
            raise InputError(
                f"client '{name}' is neither a pair (x, y) nor a Dataset of such pairs ({error}): give one of both"
            ) from None
    x, y = _tensor("x", data[0]), _tensor("y", data[1])
    if len(x) != len(y) or not len(x):
        raise InputError(f"client '{name}' has {len(x)} rows of x and {len(y)} of y: give one y per x, at least one")
    return x, y


def _test_rows(y: Tensor, group: Tensor | None, fraction: float, key: Key) -> Tensor:
    """(N,) bool: round(N * fraction) rows, within one of that fraction in every (group, label)."""
    count = len(y)
    if not 0.0 < fraction < 1.0 or not 1 <= int(count * fraction + 0.5) < count:
        raise InputError(
            f"test_fraction = {fraction} of {count} rows leaves no test or no training rows: "
            "choose one between 0 and 1, or give test_x and test_y"
        )
    order = torch.randperm(count, generator=key.fold("test").torch())
    strata = [y] if y.dim() == 1 and not y.is_floating_point() else []
    for stratum in [*strata, *([] if group is None else [group])]:
        order = order[torch.argsort(stratum[order], stable=True)]
    # Systematic sampling: every (1 / fraction)-th row of the sorted order.
    marks = torch.floor(torch.arange(count + 1, dtype=torch.float64) * fraction + 0.5)
    taken = torch.zeros(count, dtype=torch.bool)
    taken[order[marks.diff() > 0]] = True
    return taken
