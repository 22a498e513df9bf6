"""What travels between the rooms. float32 unless said; n clients are rows, P columns are the layout's shared ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple, Protocol

from torch import Tensor

from fedkeel.core.errors import InputError
from fedkeel.core.keys import Key
from fedkeel.kernels import combine, distance

Stage = Literal["train", "transport", "decode", "check", "screen", "weigh", "sum", "late", "quarantine"]
LOST: tuple[Stage, ...] = ("train", "transport", "sum", "late")
"""Stages at which an update is lost, not refused: nobody is accused."""


class Refusal(NamedTuple):
    """Why an update was not used: data, never an exception. `score` is the rule's figure, if it has one."""

    stage: Stage
    rule: str
    reason: str
    score: float | None = None


@dataclass(frozen=True, slots=True)
class Claims:
    """What a client says of its own work. None of it is trusted before the checks.

    `labels` are the shares of the classes among its examples, as far as it tells them.
    """

    client: str
    task: int
    base_version: int
    layout_digest: str
    num_examples: int
    steps: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    labels: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Update:
    """An update at the door: the claims, and once its payload is decoded the delta (P,) and what was measured of it.

    `norm` is the L2 norm of all columns, buffers included: what no rule looks at is where an attack would go;
    `variance` that of their values.
    `payload_digest` is the SHA-256 of the payload as sent. Checks with the trait "header" see no delta yet.
    """

    claims: Claims
    payload_digest: bytes
    bytes_up: int
    delta: Tensor | None = None
    norm: float = 0.0
    variance: float = 0.0
    finite: bool = True


@dataclass(frozen=True, slots=True)
class Door:
    """What the server knows when an update knocks: what checks compare the claims with.

    `outstanding` maps clients to the task they were given; `answered` holds the tasks that already have an answer;
    `last_payload` the digest of each client's latest admitted payload, hex.
    """

    layout_digest: str
    version: int
    max_staleness: int
    outstanding: Mapping[str, int]
    answered: Set[int]
    last_payload: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Codec:
    """Rows of one layout to payloads and back.

    `encode(U (n, P), keys) -> n payloads`, the randomness of row i from key i alone; `decode(payload, out (P,))` fills
    `out` or raises `DecodeError`; `max_bytes(P)` bounds a payload. `error(row (P,)) -> (P,)` bounds |decoded - row|
    per column of a finite row, whatever the key. A row that is not finite comes out not finite.
    What a codec may claim, and is held to: `lossless`, every bit of a row comes back; `unbiased`, over keys a row
    comes back in the mean; `exact`, every payload has `max_bytes(P)` bytes.
    """

    encode: Callable[[Tensor, Sequence[Key]], list[bytes | memoryview]]
    decode: Callable[[memoryview, Tensor], None]
    max_bytes: Callable[[int], int]
    error: Callable[[Tensor], Tensor]
    lossless: bool = False
    unbiased: bool = False
    exact: bool = False


@dataclass(frozen=True, slots=True)
class Mechanism:
    """Where Gaussian noise enters a round, and how much of it.

    Updates are scaled down to `norm` (L2, over the parameter columns), `noise` is its standard deviation in units of
    that norm; None: as much as the job's budget asks for. `place`: on the client's own update ("client"), on the sum of
    the round's ("server"), or on the sum of a batch's gradients, which are scaled down instead ("step"). `bands`: the
    noise of so many rounds in a row cancels in part. `quantile`: the norm moves, by `rate`, to where it scales down all
    but that share of the updates.
    """

    place: Literal["client", "server", "step"]
    norm: float
    noise: float | None
    bands: int = 1
    quantile: float | None = None
    rate: float = 0.2


@dataclass(frozen=True, slots=True)
class ExampleNoise:
    """What a step of DP-SGD does to its examples' gradients (Abadi et al. 2016, algorithm 1).

    Each gradient is scaled down to `norm` (L2, over all trainable columns), Gaussian noise of standard deviation
    noise * norm is added to each column of their sum, and that is divided by the expected number of examples. They are
    drawn by Poisson's sampling. `reproducible`: what is drawn comes from the task's key, so that nothing is private.
    """

    norm: float
    noise: float
    reproducible: bool = False


class View(NamedTuple):
    """What a scheduler sees of the buffer that is open: counts of clients, and the clock in seconds.

    `cohort` is the job's, `started` how many were given work since the buffer was opened. `in_flight` counts those who
    work, `earlier` those of them who began before it was opened. `received` updates lie in it, `lost` clients' tasks
    have ended without one since. `began` is when the first of those started was given its work. `more`: other news of
    this very moment is still to come, so nothing may be given up for being late.
    """

    cohort: int
    started: int
    in_flight: int
    earlier: int
    received: int
    lost: int
    began: float
    now: float
    more: bool = False


class Decision(NamedTuple):
    """What a scheduler wants: close the buffer, or start so many clients; skip the round, and why.

    `wake` is when it wants to be asked again if nothing happens before; beside `start` it is their deadline.
    """

    start: int = 0
    close: bool = False
    wake: float | None = None
    skip: str | None = None


class InFlight(NamedTuple):
    """A task that was given out and may still be answered. `since`: when, in seconds; `round`: in which, from 1."""

    client: str
    task: int
    round: int
    version: int
    since: float
    bytes_down: int = 0


class Judged(NamedTuple):
    """Mean loss and accuracy of k models, (k,) float64 each; accuracy is NaN where there are no classes."""

    loss: Tensor
    accuracy: Tensor


class Referee(Protocol):
    """The server's own examples, and what it can find out with them. Models and updates are (P,)."""

    def judge(self, models: Iterable[Tensor]) -> Judged:
        """Loss and accuracy of each model."""

    def gradient(self, theta: Tensor) -> Tensor:
        """The gradient of the mean loss, (P,); zero for buffers."""

    def update(self, theta: Tensor, key: Key) -> Tensor:
        """What a client with these examples would send, (P,): the job's own local work."""


Tensors = Mapping[str, Tensor]


class Local(NamedTuple):
    """What an objective is made of: a batch, and the models at hand, each as name -> tensor.

    `run(model, x)` is the module's output with these tensors, `features(model, x)` the output and what its last layer
    with parameters is given; `loss(output, y)` is the job's loss, (B,). `model` is the model being trained; `own` the
    client's copy of it and `extra` its further numbers, for the traits that ask for them; `start` the parameters that
    the client began the round with. `trained` names the parameters among them; the rest are buffers.
    """

    run: Callable[[Tensors, Tensor], Tensor]
    features: Callable[[Tensors, Tensor], tuple[Tensor, Tensor]]
    loss: Callable[[Tensor, Tensor], Tensor]
    x: Tensor
    y: Tensor
    trained: tuple[str, ...]
    model: Tensors
    own: Tensors
    extra: Tensors
    start: Tensors


@dataclass(frozen=True, slots=True)
class Closed:
    """What a round that was applied tells the corrections about it.

    direction (P,): the aggregate. share: of all clients, those whose updates made it. loss: the median of the training
    losses that they claim, NaN if none does. `per_step()` (P,): the aggregate of -delta / (tau * lr), tau the plain SGD
    steps that a client's are worth: the mean step that the clients went, as a gradient; zero for buffers.
    """

    direction: Tensor
    share: float
    loss: float
    per_step: Callable[[], Tensor]


@dataclass(frozen=True)
class Cohort:
    """Admitted rows only, in the order in which the clients were selected.

    U (n, P); num_examples, staleness, steps (n,) float64; norm (n,) float64, L2 of all columns. `params` are the
    columns of U that are parameters (the rest are buffers), `layers` those of each tensor. `key` is the round's own:
    what a rule draws comes from it. `referee` is there for rules with the trait "server_data"; `reduce` is what the
    plan's mixers and reducer make of a cohort and weights (n,); `worth` says how many plain SGD steps so many local
    steps (n,) come to. `gap` (P,) of a row is how far the server's model has gone since that row's client began; None
    where no rule looks back. `device` is the class of each row's device, `population` how many clients there are of
    each class; empty where nothing is known of devices.
    """

    U: Tensor
    client: tuple[str, ...]
    num_examples: Tensor
    staleness: Tensor
    steps: Tensor
    norm: Tensor
    params: slice
    layers: tuple[slice, ...]
    metrics: tuple[Mapping[str, float], ...]
    labels: tuple[tuple[float, ...], ...]
    key: Key
    referee: Referee | None = None
    reduce: Callable[[Cohort, Tensor], Tensor] | None = None
    worth: Callable[[Tensor], Tensor] | None = None
    gap: tuple[Tensor, ...] | None = None
    device: tuple[str, ...] = ()
    population: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.U.shape[0]

    @property
    def own_examples(self) -> Referee:
        """The referee. Raises `InputError` where there is none: a plan is checked for that before it runs."""
        if self.referee is None:
            raise InputError(
                "a rule judges with the server's own examples, but it has none: set server.examples, as 200"
            )
        return self.referee

    def reduced(self, w: Tensor) -> Tensor:
        """What the round would come to (P,) with these weights; their weighted mean where no plan is known.

        Raises `CohortError` where they leave the plan's rules too few rows.
        """
        if self.reduce is not None:
            return self.reduce(self, w)
        return combine.weighted_sum(self.U, w / w.sum())

    @cached_property
    def tau(self) -> Tensor:
        """How many plain SGD steps each row's local steps are worth, (n,) float64: |a_i|_1 of FedNova."""
        return self.steps if self.worth is None else self.worth(self.steps)

    @cached_property
    def sq_distances(self) -> Tensor:
        """Squared distances between rows, (n, n) float64: one Gram matrix for every distance rule. Buffers count."""
        return distance.sq_distances(self.U)


@dataclass(frozen=True, slots=True)
class ServerState:
    """Everything a federation needs to go on: the model theta (P,) and the state of every stateful rule.

    `version` counts models (it moves when a round is applied), `round` counts closed rounds (skipped ones included),
    `next_task` numbers the work given out.
    `opt` holds vectors of the parameter columns, `control` what corrections have sent to the clients: vectors (P,) or
    dials; `kept` what stateful screens and weighers keep (rule as written -> name,
    mostly a client's -> vector); `trust` and `privacy` JSON values. `in_flight` is the work that is out, `bases` the
    models that it began from, by version, where a rule looks back at them; `roster` what is known of the clients,
    `downlink` the model that clients have, where that is coded.
    """

    theta: Tensor
    version: int = 0
    round: int = 0
    next_task: int = 0
    opt: Mapping[str, Tensor] = field(default_factory=dict)
    control: Mapping[str, Tensor] = field(default_factory=dict)
    kept: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    trust: Mapping[str, Any] = field(default_factory=dict)
    privacy: Mapping[str, Any] = field(default_factory=dict)
    in_flight: tuple[InFlight, ...] = ()
    bases: Mapping[int, Tensor] = field(default_factory=dict)
    roster: Mapping[str, Tensor] = field(default_factory=dict)
    downlink: Mapping[str, Tensor] = field(default_factory=dict)

    def replace(self, **changes: Any) -> ServerState:
        return replace(self, **changes)


@dataclass(frozen=True, slots=True)
class ClientRow:
    """One client's line of a round report. `weight` is its share of the sum of weights, 0 when it was not used.

    `norm` (L2) and `variance` are of all columns of its update, `cosine` is with the aggregate; `trust` as its weigher
    keeps it, 1 being the mean; `contribution` is the drop of the server's loss that it was worth. `seconds` is how long
    its task took, from work given to answer, by the federation's clock; `bytes_down` what it was sent for it.
    """

    client: str
    refusal: Refusal | None
    weight: float = 0.0
    norm: float | None = None
    cosine: float | None = None
    variance: float | None = None
    trust: float | None = None
    contribution: float | None = None
    num_examples: int | None = None
    steps: int | None = None
    staleness: int | None = None
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RoundReport:
    """What one round did; one row set of the ledger. Rounds count from 1.

    `skipped` says why the model was kept, if it was.
    `time` is the federation's clock (virtual in the simulator) at close, in seconds; `seconds` the wall time by part.
    `bytes_down` is what was sent since the round before closed, to whomever. `epsilon` is the privacy spent by all
    rounds so far, `charge` what this one cost: events by their text, and each client's rounds.
    """

    round: int
    version: int
    time: float
    clients: tuple[ClientRow, ...]
    skipped: str | None = None
    update_norm: float = 0.0
    bytes_down: int = 0
    epsilon: float | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    charge: Mapping[str, Mapping[str, int]] | None = None

    @property
    def refused(self) -> dict[str, Refusal]:
        return {c.client: c.refusal for c in self.clients if c.refusal is not None}

    @property
    def bytes_up(self) -> int:
        return sum(c.bytes_up for c in self.clients)


class ClientMemory:
    """What each client keeps between rounds: name -> vector. It never travels; a checkpoint holds it in simulation."""

    def __init__(self) -> None:
        self._held: dict[str, dict[str, Tensor]] = {}

    def of(self, client: str) -> Mapping[str, Tensor]:
        return self._held.get(client, {})

    def keep(self, client: str, values: Mapping[str, Tensor]) -> None:
        """Replace what a client remembers under these names."""
        if values:
            self._held.setdefault(client, {}).update({k: v.detach().clone() for k, v in values.items()})

    def rename(self, client: str, name: str, to: str) -> None:
        """Remember under another name what there is."""
        self._held[client][to] = self._held[client].pop(name)

    def forget(self, client: str, names: Iterable[str]) -> None:
        """Let go of what a client remembers under these names, if anything."""
        for name in names:
            self._held.get(client, {}).pop(name, None)

    def items(self) -> Iterator[tuple[str, str, Tensor]]:
        """(client, name, vector), in a fixed order."""
        for client in sorted(self._held):
            for name in sorted(self._held[client]):
                yield client, name, self._held[client][name]

    def __len__(self) -> int:
        return len(self._held)
