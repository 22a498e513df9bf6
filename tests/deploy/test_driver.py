"""The driver by a clock of its own, over nodes that are none: who is given work, and who is asked again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

import fedkeel
from fedkeel.core.types import ServerState
from fedkeel.deploy.driver import Arrived, Driver, Echo, Told, Way
from fedkeel.deploy.summing import Seat
from fedkeel.round.coordinator import Train
from fedkeel.ship.rundir import RunDir
from fedkeel.world.clients import Base
from fedkeel.world.federation import Federation
from fedkeel.world.record import Record, described


class Nodes:
    """Each answers after a second that it can not train; figures are told, but for those that `lose` says."""

    def __init__(self, here: Callable[[float], Sequence[str]], lose: Callable[[str, int, int], bool]) -> None:
        self.now, self.here, self.lose = 0.0, here, lose
        self.probes, self.mute = 0, False
        self.given: list[tuple[float, str]] = []
        self.asked: dict[tuple[str, int], int] = {}
        self._coming: list[tuple[float, Arrived | Told | Echo]] = []

    def seats(self) -> Mapping[str, Seat]:
        return {client: Seat(int(client[-1]), "then") for client in self.here(self.now)}

    def send(self, given: Sequence[Train], base: Base, seats: Mapping[str, Seat], way: Way) -> None:
        self.given += [(self.now, order.client) for order in given]
        self._coming += [(self.now + 1, Arrived(o.client, o.task, None, "no luck", "train")) for o in given]

    def ask(self, clients: Sequence[str], round: int, version: int, base: Base, seats: Mapping[str, Seat]) -> None:
        for client in clients:
            times = self.asked[client, round] = self.asked.get((client, round), 0) + 1
            if not self.lose(client, round, times):
                self._coming.append((self.now + 1, Told(client, round, ({"loss": 1.0, "accuracy": 0.5}, 10))))

    def probe(self, client: str, number: int, seat: Seat) -> None:
        self.probes += 1
        if not self.mute:
            self._coming.append((self.now + 0.5, Echo(client, number)))

    def forget(self, client: str, task: int) -> None:
        pass

    def replies(self) -> Iterator[Arrived | Told | Echo]:
        ready = [one for at, one in self._coming if at <= self.now]
        self._coming = [(at, one) for at, one in self._coming if at > self.now]
        yield from ready

    def sleep(self, seconds: float) -> None:
        self.now += max(seconds, 0.01)


def driven(folder: Path, nodes: Nodes, rounds: int) -> fedkeel.Run:
    job = fedkeel.Job(name="net", rounds=rounds, data={"clients": 3, "holdout": 0.2})
    federation = Federation.of(job)
    directory = RunDir.create(folder, job.to_toml(), {})
    with directory.ledger() as ledger:
        ledger.write_meta(described(federation, "none", job.to_toml()))
        record = Record(directory, ledger, federation, None)
        state = ServerState(federation.theta())
        times = {"patience": 120.0, "gather": 60.0, "probe": 5.0}
        Driver(federation, nodes, record, state, **times, clock=lambda: nodes.now, sleep=nodes.sleep).run()
    return fedkeel.Run(directory.path)


def test_a_node_that_comes_after_a_long_wait_for_all_is_given_work_within_seconds(tmp_path: Path) -> None:
    nodes = Nodes(lambda now: ("client-0", "client-1", "client-2")[: 3 if now > 65 else 2], lambda *_: False)
    driven(tmp_path / "run", nodes, 20)
    first = {client: min(at for at, given in nodes.given if given == client) for _, client in nodes.given}
    assert 60 <= first["client-0"] < 61
    assert 65 < first["client-2"] < 70


def test_figures_that_were_lost_are_asked_for_again_and_no_others(tmp_path: Path) -> None:
    lost = {("client-1", 2): 1, ("client-2", 3): 2}  # so many times
    names = ("client-0", "client-1", "client-2")
    nodes = Nodes(lambda now: names, lambda client, round, times: times <= lost.get((client, round), 0))
    run = driven(tmp_path / "run", nodes, 4)
    assert nodes.asked == {(client, round): 1 + lost.get((client, round), 0) for client in names for round in range(5)}
    told = {(row["scope"], row["round"]) for row in run.metrics if row["scope"].startswith("client/")}
    assert told == {(f"client/{client}", round) for client in names for round in range(5)}
    assert nodes.now < 60  # nobody waited until patience was over
    assert torch.isfinite(run.state.theta).all()


def test_who_never_tells_its_figures_holds_up_few_rounds_and_few_models(tmp_path: Path) -> None:
    names = ("client-0", "client-1", "client-2")
    nodes = Nodes(lambda now: names, lambda client, round, times: client == "client-2")
    nodes.mute = True
    run = driven(tmp_path / "run", nodes, 150)
    told = {(row["scope"], row["round"]) for row in run.metrics if row["scope"].startswith("client/")}
    assert told == {(f"client/{client}", round) for client in names[:2] for round in range(151)}
    assert sum(times for (client, _), times in nodes.asked.items() if client == "client-2") <= 4
    assert nodes.probes <= 12
    assert nodes.now < 300
