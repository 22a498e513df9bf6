"""Operations of the compiled kernels, as `op` in kernels/c/native.c, and how several of them become one."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fedkeel.kernels import native

NAMES = (
    *("product_nt", "product_nn", "product_tn", "relu", "threshold_backward", "tanh", "tanh_backward", "sigmoid"),
    *("sigmoid_backward", "log_softmax", "log_softmax_backward", "nll", "nll_backward", "add", "multiply", "scale"),
    *("scale_by", "tick", "adam"),
    *("gather_bytes", "gather_floats", "gather_labels"),
    *("to_last", "to_rows", "conv", "conv_data", "conv_weight", "pool", "pool_backward"),
    *("conv_each", "norm_rows", "norm_last", "factors", "scale_rows", "weigh_last"),
)
"""In the order of native.c's codes."""
ZERO, ROW, OUT, BLEND = range(4)  # what a product starts from, as there
BASES = FIXED, ROWS, LOSSES, X, Y = range(5)  # of addresses: memory of the step; its rows, losses, examples, labels

Place = tuple[int, int, int]
"""(base, address, elements from row to row)."""
NOWHERE: Place = (FIXED, 0, 0)


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation: native.c says what each does with its operands."""

    name: str
    m: int
    n: int
    k: int
    start: int
    alpha: float
    keep: float
    beta: float
    a: Place
    b: Place
    c: Place
    d: Place
    out: Place

    @property
    def operands(self) -> tuple[Place, ...]:
        return self.a, self.b, self.c, self.d

    @property
    def is_product(self) -> bool:
        """Whether it is a matrix product whose result lies in one piece."""
        return self.name.startswith("product") and (self.m == 1 or self.out[2] == self.n)


def table(operations: Sequence[Operation]) -> NDArray[np.void]:
    """Operations as the kernels read them."""
    rows = []
    for one in operations:
        name, m, n, k, start, alpha, keep, beta, *places = astuple(one)
        rows.append((NAMES.index(name), m, n, k, start, alpha, keep, beta, 0.0, *places))
    return np.array(rows, native.OPERATION)


def merged(operations: Sequence[Operation]) -> list[Operation]:
    """The same in fewer passes over memory: what is done to a vector beside a product becomes part of the product."""
    return _into_products(_into_velocities(list(operations)))


def _into_products(operations: list[Operation]) -> list[Operation]:
    """theta += s * theta and theta += t * c, in any order, before theta += alpha * a b."""
    found: list[Operation] = []
    for one in operations:
        keep, beta, other = 1.0, 0.0, one.out
        while one.is_product and one.start == OUT and found and _adds_to(found[-1], one):
            last = found[-1]
            if last.b[:2] == one.out[:2]:
                keep *= 1 + last.alpha
            elif other is one.out:
                beta, other = keep * last.alpha, last.b
            else:
                break
            found.pop()
        if keep != 1 or beta:
            one = replace(one, start=BLEND, keep=keep, beta=beta, c=(*other[:2], one.n))
        found.append(one)
    return found


def _adds_to(one: Operation, product: Operation) -> bool:
    """Whether it adds to all of what the product then adds to."""
    return one.name == "add" and one.out[:2] == one.a[:2] == product.out[:2] and one.n == product.m * product.n


def _into_velocities(operations: list[Operation]) -> list[Operation]:
    """v = momentum * v + g where g is a product, perhaps with t * c added to it, that nothing else reads."""
    gone: set[int] = set()
    made = {one.out[:2]: at for at, one in enumerate(operations)}
    for at, (scale, add) in enumerate(itertools.pairwise(operations)):
        v = scale.out
        if scale.name != "scale" or add.name != "add" or {scale.a[:2], add.a[:2], add.out[:2]} != {v[:2]}:
            continue
        source, beta, other = made.get(add.b[:2], -1), 0.0, v
        if source in gone or _readers(operations, add.b) != 1:
            continue
        between = operations[source]
        if between.name == "add" and between.out[:2] != between.a[:2] and _readers(operations, between.a) == 1:
            beta, other, gone_too = between.alpha, between.b, {source}
            source = made.get(between.a[:2], -1)
        else:
            gone_too = set()
        product = operations[source]
        if source < 0 or not product.is_product or product.start != ZERO or add.n != product.m * product.n:
            continue
        meanwhile = operations[source:at]
        if add.alpha != 1 or any(one.out[:2] in (other[:2], v[:2]) for one in meanwhile) or _readers(meanwhile, v):
            continue
        operations[source] = replace(
            product, start=BLEND, keep=scale.alpha, beta=beta, c=(*other[:2], product.n), out=(*v[:2], product.n)
        )
        gone |= {at, at + 1} | gone_too
    return [one for at, one in enumerate(operations) if at not in gone]


def _readers(operations: Sequence[Operation], place: Place) -> int:
    """How many operations read what lies there."""
    return sum(any(given[:2] == place[:2] for given in one.operands) for one in operations)
