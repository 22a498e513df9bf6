"""The server's half of privacy: what is promised, what a round costs, and the noise on the sum of its updates."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fedkeel.core.errors import InputError
from fedkeel.core.keys import Key
from fedkeel.core.noise import Noise, cut, rounded, unit_of
from fedkeel.core.types import Claims, Mechanism
from fedkeel.kernels import distance
from fedkeel.round import accountant
from fedkeel.round.accountant import Event, Fixed, Method, Poisson, Uses

LEAST_NORM, MOST_NORM = 1e-9, 1e9
"""Between which an adaptive norm moves, as those that a job may write."""
NORM = "privacy/norm"
"""Under what name clients are sent the norm that holds in this round."""
WITHIN = "within_norm"
"""The metric by which a client tells 1 where its update was within that norm, else 0."""
KEPT = "privacy"
"""Under what name a server's state keeps what its mechanism keeps."""
_NOISE = "noise/"
_SHAVED = 1 - 2.0**-20  # of a norm: its computation is right to float32


@dataclass(frozen=True)
class Beside:
    """What clients tell beside their updates where the server is not trusted, with noise of its own.

    In each round the figures `names`, each cut to [0, bound], with Gaussian noise of the multiplier `noise`: together
    they may move by bound * sqrt(len(names)). And once the shares of their labels, whose noise spends an epsilon of
    `labels`.
    """

    names: tuple[str, ...] = ()
    bound: float = 1.0
    noise: float = 1.0
    labels: float = 0.0

    @property
    def deviation(self) -> float:
        """Of the noise on each figure."""
        return self.noise * self.bound * math.sqrt(len(self.names))


@dataclass(frozen=True)
class Privacy:
    """What a plan promises: the mechanism, with its noise known, and how its spending is counted.

    `sampling` is how those who take part are drawn, as far as that may be counted on; `uses` the most rounds that a
    client is planned to take part in, where that is what is counted, `limit` what the job bounds them by. `epsilon` is
    the budget, None: what is spent is told, and no more. `cohort` updates a round are planned, of `population` clients.
    `secret` is None for noise from the operating system's generator; with a key of the run's nothing is private.
    `steps` is what a round costs an example of a client that takes part in it, where steps add the noise, with each of
    the clients for which that may be most; `beside` what clients tell beside their updates. `masked`: a client that is
    not there may cost others their place in a sum, so that neighbours differ in what it sends, not in whether it is
    there.
    """

    mechanism: Mechanism
    sampling: Literal["poisson", "fixed", "uses", "steps"]
    rounds: int
    uses: int
    cohort: int
    population: int
    delta: float
    epsilon: float | None = None
    method: Method = "pld"
    secret: Key | None = None
    limit: int | None = None
    steps: tuple[Poisson, ...] = ()
    beside: Beside = Beside()
    masked: bool = False

    @property
    def noise(self) -> float:
        """The noise multiplier."""
        assert self.mechanism.noise is not None
        return self.mechanism.noise

    @property
    def central(self) -> bool:
        """Whether the noise is the server's, on sums."""
        return self.mechanism.place == "server"

    def event(self, among: int | None = None, chosen: int | None = None) -> Event:
        """What a round costs, of so many clients chosen among so many who were there; by default as planned."""
        if self.sampling == "poisson":
            return Poisson(self.cohort / self.population, self.noise)
        if self.steps:
            return self.steps[0]._replace(noise=self.noise)
        if self.sampling == "fixed":
            return Fixed(among or self.population, chosen or self.cohort, self.noise)
        return Uses(self.noise if self.central else self.noise / 2)

    def planned(self) -> float:
        """Epsilon of the whole run, if every round is as planned."""
        return self.after(self.uses) if self.by_client else self.spent({self.event(): self.rounds})

    @property
    def of_a_round(self) -> float:
        """Epsilon of a single round as planned."""
        return self.after(1) if self.by_client else self.spent({self.event(): 1})

    def after(self, uses: int) -> float:
        """Epsilon of a client that took part in so many rounds: of the one for which it is most."""
        return max(self.spent(self._of_uses(event, uses)) for event in self._events())

    def _events(self) -> list[Event]:
        """What a round costs, with each of the clients for which that may be most."""
        return [event._replace(noise=self.noise) for event in self.steps] or [self.event()]

    def _of_uses(self, event: Event, count: int) -> dict[Event, int]:
        found = {event: count}
        if self.beside.names:
            told = Uses(self.beside.noise)
            found[told] = found.get(told, 0) + count
        return found

    def check_population(self, clients: int) -> None:
        """Raise `InputError` where there are fewer clients than the rate of sampling was reckoned with."""
        if self.sampling == "poisson" and clients < self.population:
            raise InputError(
                f"data.clients = {self.population} is what privacy reckons with, and there are {clients}, who would be "
                "drawn more often: set it to that"
            )

    @property
    def by_client(self) -> bool:
        """Whether each client's rounds are what is counted, not the rounds of all."""
        return self.sampling in ("uses", "steps")

    def solved(self) -> Privacy:
        """With as little noise as the budget allows. Raises `InputError` where no noise is enough."""
        return replace(self, mechanism=replace(self.mechanism, noise=_solved(self)))

    @cached_property
    def most_uses(self) -> int | None:
        """How many rounds a client may take part in; None where nothing bounds it, or rounds of all are counted."""
        if not self.by_client or self.epsilon is None:
            return self.limit
        return accountant.most(self.after, self.epsilon, self.limit or self.rounds)

    def spent(self, events: Mapping[Event, int]) -> float:
        """Epsilon of what has happened; that of labels is pure, and adds to any other."""
        return accountant.epsilon(events, self.delta, self.method) + (self.beside.labels if any(events.values()) else 0)

    def in_words(self) -> dict[str, str]:
        """What is promised to whom, and how it is counted, for reports and model cards."""
        hidden = {
            "server": "each client, from all who see the models; the server sees the updates",
            "client": "what each client learned, from the server as well",
            "step": "each example, from the server as well",
        }
        by_one = "in whether one client's updates are zero" if self.masked else "by one client"
        of_one = "in whether one client takes part" if self.central else "in one client's updates"
        if self.masked:
            of_one = by_one
        counted = {
            "poisson": f"Poisson sampling, each client at a rate of {self.cohort / self.population:.4g}; neighbours "
            f"differ {by_one}",
            "fixed": f"{self.cohort} of {self.population} clients drawn without replacement; neighbours differ in one "
            "client's data",
            "uses": f"each client's rounds, at most {self.most_uses or self.rounds} of {self.rounds}; neighbours "
            f"differ {of_one}",
            "steps": "Poisson sampling of the examples of a client, the one for which most is spent, in at most "
            f"{self.most_uses or self.rounds} of {self.rounds} rounds; neighbours differ by one example",
        }
        by = {"pld": "privacy loss distributions", "rdp": "Renyi divergences"}[self.method]
        exact = "the exact bound for Gaussian noise"
        how = {"poisson": by, "steps": by, "fixed": "Renyi divergences", "uses": exact}[self.sampling]
        told = []
        if self.beside.names:
            told = [f"{', '.join(self.beside.names)}, cut to {self.beside.bound:g}, noise {self.beside.deviation:.3g}"]
        if self.beside.labels:
            told.append(f"once the shares of labels, epsilon {self.beside.labels:.3g}")
        budget = "none" if self.epsilon is None else f"epsilon {self.epsilon:g}"
        seed = "the run's seed: whoever knows it can take it away, and nothing is private"
        return {
            "hides": hidden[self.mechanism.place],
            "by": repr(self),
            "counts on": counted[self.sampling],
            "counted by": f"{how}, at delta {self.delta:g}",
            "budget": budget,
            **({"counted as well": "; ".join(told)} if told else {}),
            "noise from": "the operating system's generator" if self.secret is None else seed,
        }

    def __repr__(self) -> str:
        mechanism = self.mechanism
        norm = f"{mechanism.norm:g} at first" if mechanism.quantile is not None else f"{mechanism.norm:g}"
        where = {"server": "the sum", "client": "each update", "step": "each step's sum"}[mechanism.place]
        bands = f", correlated over {mechanism.bands} rounds" if mechanism.bands > 1 else ""
        return f"Gaussian noise of {self.noise:.4g} norms on {where}, norm {norm}{bands}"


@lru_cache(maxsize=32)  # a job's plan is built more than once
def _solved(privacy: Privacy) -> float:
    assert privacy.epsilon is not None

    left = privacy.epsilon - privacy.beside.labels

    def needed(place: int) -> float:
        def events(noise: float) -> dict[Event, int]:
            tried = replace(privacy, mechanism=replace(privacy.mechanism, noise=noise))
            if not tried.by_client:
                return {tried.event(): tried.rounds}
            return tried._of_uses(tried._events()[place], tried.uses)

        return accountant.solve(events, left, privacy.delta, privacy.method)

    return max(needed(place) for place in range(max(1, len(privacy.steps))))


class Account:
    """What a run has spent so far, and what the open round costs.

    It outlives checkpoints: rounds that are done again count again (`ship.ledger`).
    """

    def __init__(self, privacy: Privacy, known: Mapping[str, Mapping[str, int]]) -> None:
        """`known` is what `state` gave."""
        self.privacy = privacy
        self._events: dict[Event, int] = {_read(text): count for text, count in known.get("events", {}).items()}
        self._uses = dict(known.get("uses", {}))
        self.begin()

    def begin(self) -> None:
        """The next round is open."""
        self._event = self.privacy.event()
        self._clients: list[str] = []
        self.cost: dict[str, dict[str, int]] | None = None
        """Of the round that is open, once it is counted: as `state`."""

    def sampled(self, among: int, chosen: int) -> None:
        """So many clients were chosen for the open round, among so many who were free."""
        if chosen:
            self._event = self.privacy.event(among, chosen)

    def give(self, client: str) -> None:
        """A client was given work: whatever comes of it, it counts as one of the client's rounds."""
        self._clients.append(client)

    def count(self) -> None:
        """Count the open round, once, whatever will come of it."""
        if self.cost is None:
            self.cost = {"events": {}, "uses": {}}
            if self.privacy.by_client:
                self.cost["uses"] = dict.fromkeys(self._clients, 1)
            else:
                self.cost["events"] = {repr(self._event): 1}
                self._events[self._event] = self._events.get(self._event, 0) + 1
            for client in self.cost["uses"]:
                self._uses[client] = self._uses.get(client, 0) + 1

    def state(self) -> dict[str, dict[str, int]]:
        """What to keep, as JSON values: events by their text, and each client's rounds."""
        return {"events": {repr(event): count for event, count in self._events.items()}, "uses": dict(self._uses)}

    @property
    def epsilon(self) -> float:
        """What is spent."""
        if self.privacy.by_client:
            return self.privacy.after(max(self._uses.values(), default=0))
        return self.privacy.spent(self._events)

    def affords(self, among: int, chosen: int) -> bool:
        """Whether the budget allows a round of so many clients, chosen among so many who are free."""
        if self.privacy.epsilon is None or self.privacy.sampling != "fixed" or not chosen:
            return True
        return self._with(self.privacy.event(among, chosen)) <= self.privacy.epsilon

    def _with(self, event: Event) -> float:
        """What is spent once an event is counted."""
        return self.privacy.spent({**self._events, event: self._events.get(event, 0) + 1})

    def spent(self, clients: Sequence[str]) -> bool:
        """Whether the budget leaves no further round: of all, or of every one of the clients."""
        if self.privacy.epsilon is None or self.privacy.by_client:
            return len(self.used_up) >= len(clients)
        return self._with(self.privacy.event()) > self.privacy.epsilon

    @property
    def used_up(self) -> set[str]:
        """Who has taken part in as many rounds as a client may."""
        most = self.privacy.most_uses
        return set() if most is None else {client for client, uses in self._uses.items() if uses >= most}


def _read(text: str) -> Event:
    """An event from its text: `Poisson(rate=0.1, noise=1.0, steps=1)`."""
    name, _, rest = text.partition("(")
    fields = dict(part.split("=") for part in rest.removesuffix(")").split(", "))
    numbers = {
        key: int(value) if key in ("steps", "among", "chosen") else float(value) for key, value in fields.items()
    }
    kinds: dict[str, Callable[..., Event]] = {"Poisson": Poisson, "Fixed": Fixed, "Uses": Uses}
    return kinds[name](**numbers)


class Released(NamedTuple):
    """What is released of a round: the direction (P,), and what the mechanism keeps for the next."""

    direction: Tensor
    kept: Mapping[str, Tensor]


class Noiser:
    """Sums a round's updates, each clipped, exactly, and adds the noise.

    A row of weight w (at most 1) enters as w times the row, scaled down to the norm, cut to the grid; the sum of the
    rows is exact and does not depend on their order. What is released is that sum, with noise, over the cohort that
    was planned, whoever took part.
    """

    def __init__(self, privacy: Privacy, kept: Mapping[str, Tensor]) -> None:
        self._privacy, self._mechanism = privacy, privacy.mechanism
        self._kept = dict(kept)
        self._sum: Tensor | None = None
        self._within = 0

    @property
    def norm(self) -> float:
        """What a row may move the sum by."""
        return float(self._kept["norm"]) if "norm" in self._kept else self._mechanism.norm

    def add(self, row: Tensor, weight: float, claims: Claims) -> None:
        """Add a finite row (P,), of parameters alone."""
        length = math.sqrt(distance.sq_norm(row))
        factor = min(max(weight, 0.0), 1.0) * min(1.0, self.norm * _SHAVED / length) if length else 0.0
        whole = cut(row.to(torch.float64) * factor, unit_of(self.norm))
        self.add_sum(whole, [claims])

    def add_sum(self, whole: Tensor, claims: Sequence[Claims]) -> None:
        """Add a sum (P,), int64, of rows that their clients have weighed, scaled down and cut to the grid."""
        self._sum = whole.clone() if self._sum is None else self._sum.add_(whole)
        self._within += sum(1 if claim.metrics.get(WITHIN, 0.0) > 0.5 else -1 for claim in claims)

    def clear(self) -> None:
        """Let go of what was added: no sum of it is released."""
        self._sum, self._within = None, 0

    def release(self, columns: int, divisor: float, round: int) -> Released:
        """The sum over a divisor, noised (P,), of a round; begins the next."""
        mechanism, norm, noise = self._mechanism, self.norm, self._privacy.noise
        secret = self._privacy.secret
        source = Noise(None if secret is None else secret.fold(round))
        kept = dict(self._kept)
        if mechanism.quantile is not None:
            share, noise = self._share(divisor, noise, source)
            moved = norm * math.exp(-mechanism.rate * (share - mechanism.quantile))
            kept["norm"] = torch.tensor(min(max(moved, LEAST_NORM), MOST_NORM))
        unit = unit_of(norm)
        drawn = source.normals(columns).mul_(noise * norm)
        if mechanism.bands > 1:
            drawn, banded = self._banded(drawn)
            kept |= banded
        total = rounded(drawn, unit)
        if self._sum is not None:
            total += self._sum
        self._kept = kept
        self.clear()
        return Released((total.to(torch.float64) * (unit / divisor)).to(torch.float32), kept)

    def _share(self, divisor: float, noise: float, source: Noise) -> tuple[float, float]:
        """The noised share of updates within the norm, and the noise that is left for the updates themselves.

        Each answer counts a half up or down, so one client moves the count by a half (Andrew et al. 2021, section 2).
        """
        deviation = divisor / 20
        left = noise**-2 - (2 * deviation) ** -2
        count = self._within + rounded(source.normals(1) * (2 * deviation), 1.0).item()
        return 0.5 + count / 2 / divisor, left**-0.5

    def _banded(self, drawn: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """C^-1 z, row by row: C banded, its columns (1, 1/2, 3/8, ...), the square root of the prefix sums' matrix."""
        bands = self._mechanism.bands
        drawn.mul_(math.sqrt(math.fsum(c * c for c in banded_root(bands))))
        before = [self._kept[name] for i in range(1, bands) if (name := f"{_NOISE}{i}") in self._kept]
        for coefficient, noise in zip(banded_root(bands)[1:], before, strict=False):
            drawn.sub_(noise, alpha=coefficient)
        return drawn, {f"{_NOISE}{i}": noise for i, noise in enumerate([drawn, *before][: bands - 1], 1)}


def uncorrelated(kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a mechanism keeps, but for the noises of rounds that are over: the next round is as a first one."""
    return {name: value for name, value in kept.items() if not name.startswith(_NOISE)}


def banded_root(bands: int) -> list[float]:
    """The first `bands` coefficients of 1 / sqrt(1 - x): of the square root of the matrix of prefix sums."""
    found = [1.0]
    for i in range(1, bands):
        found.append(found[-1] * (2 * i - 1) / (2 * i))
    return found
