"""Figures of the model that clients measure on what they hold back: asked for, asked for again, written down. No IO."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from fedkeel.deploy.summing import Asked, Seat
from fedkeel.world.clients import Base
from fedkeel.world.evaluation import Figures, Measured, of_shared, over_clients
from fedkeel.world.federation import Federation

_log = logging.getLogger("fedkeel")
MOST_OWED, MOST_SURVEYS = 2, 4
"""Rounds of which a client may owe its figures before it is asked for no more; rounds whose figures are waited for."""


@dataclass(slots=True)
class Survey:
    """Figures of a model version that are being gathered from clients."""

    round: int
    version: int
    base: Base
    until: float
    waiting: dict[str, Asked] = field(default_factory=dict)
    measured: Measured = field(default_factory=dict)


Ask = Callable[[Survey, Sequence[str]], Mapping[str, Asked]]
"""Sends the question to clients that are there; what each was asked, where."""
Write = Callable[[int, int, Sequence[Figures]], None]
"""Writes a round's and version's figures down."""


class Surveys:
    """Those that are open, by round."""

    def __init__(self, federation: Federation, ask: Ask, write: Write, patience: float) -> None:
        """`patience`: seconds after which who has not answered is not waited for."""
        self._federation, self._ask, self._write, self._patience = federation, ask, write, patience
        self._open: dict[int, Survey] = {}

    def __len__(self) -> int:
        return len(self._open)

    @property
    def waiting(self) -> Counter[str]:
        """Of how many rounds each client owes its figures."""
        return Counter(client for survey in self._open.values() for client in survey.waiting)

    def begin(self, round: int, version: int, base: Base, seats: Mapping[str, Seat], now: float) -> None:
        """Ask all who are there, but those who owe figures of too many rounds."""
        owing = self.waiting
        survey = self._open[round] = Survey(round, version, base, now + self._patience)
        self._send(survey, sorted(client for client in seats if owing[client] < MOST_OWED))
        for late in list(self._open.values())[:-MOST_SURVEYS]:  # each holds a model
            late.waiting.clear()
            self._settle(late)
        self._settle(survey)

    def _send(self, survey: Survey, clients: Sequence[str]) -> None:
        if clients:
            survey.waiting |= self._ask(survey, clients)

    def look(self, seats: Mapping[str, Seat], now: float) -> None:
        """Who is gone is not waited for; who was started anew is asked anew."""
        for survey in list(self._open.values()):
            here = seats if now < survey.until else {}
            survey.waiting = {client: asked for client, asked in survey.waiting.items() if client in here}
            self._send(survey, [client for client, asked in survey.waiting.items() if asked.seat != here[client]])
            self._settle(survey)

    def echo(self, client: str, number: int, seats: Mapping[str, Seat]) -> None:
        """A client is done with all that it was asked before a number: what it has not answered is asked once more."""
        for survey in self._open.values():
            if client in survey.waiting and survey.waiting[client].number < number and client in seats:
                self._send(survey, [client])

    def told(self, client: str, round: int, figures: tuple[dict[str, float], int] | None, why: str) -> None:
        """A client's figures have come, or why there are none."""
        survey = self._open.get(round)
        if survey is None or client not in survey.waiting:
            return
        del survey.waiting[client]
        if figures is None:
            _log.warning("no figures of %s after round %d: %s", client, round, why)
        else:
            survey.measured[client] = figures
        self._settle(survey)

    def _settle(self, survey: Survey) -> None:
        """Write the figures down, once all have told theirs or will not."""
        if survey.waiting or survey.round not in self._open:
            return
        del self._open[survey.round]
        measured = {name: survey.measured[name] for name in self._federation.members if name in survey.measured}
        found = over_clients(self._federation, measured) if measured else []
        figures = [*of_shared(self._federation, survey.base.theta, found), *found]
        self._write(survey.round, survey.version, figures)
