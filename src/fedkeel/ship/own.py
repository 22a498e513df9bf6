"""What the record says of each client's own model, and of what local work did to the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedkeel.ship.ledger import Ledger, Row

_CLIENT, _GROUP = "client/", "group/"


@dataclass(frozen=True)
class Own:
    """Figures of the clients' own models, where they were measured, and of their losses.

    `metric` is accuracy, or loss where there are no classes. `over_rounds`: (round, mean, low, high, worst tenth,
    shared model's mean or None). `last`: (client, its own model's figure, the shared model's or None), the worst first;
    `groups`: name, figure, low, high, examples. `losses`: per bin of rounds: round, before local work, after it; means
    over the admitted updates. `drift`: client -> both.
    """

    metric: str
    over_rounds: list[Row]
    last: list[tuple[str, float, float | None]]
    groups: list[Row]
    losses: list[Row]
    drift: dict[str, tuple[float, float]]


def load(ledger: Ledger, step: int, clients: Sequence[str]) -> Own:
    """Read it; rounds in bins of `step`, the losses of these clients."""
    marks = ",".join("?" * len(clients))
    before, after = (f"avg(json_extract(metrics, '$.{name}'))" for name in ("global_loss", "local_loss"))
    told = "FROM updates WHERE stage IS NULL AND json_extract(metrics, '$.local_loss') IS NOT NULL"
    drift = ledger.query(
        f"SELECT client, {before} AS b, {after} AS a {told} AND client IN ({marks}) GROUP BY client", *clients
    )
    metric = "accuracy" if ledger.metrics("accuracy", "clients") else "loss"
    return Own(
        metric,
        ledger.query(
            "SELECT m.round, m.value AS mean, m.low, m.high, w.value AS worst, s.value AS shared FROM metrics m "
            "LEFT JOIN metrics w ON w.round = m.round AND w.scope = 'clients' AND w.name = 'worst_decile' "
            "LEFT JOIN metrics s ON s.round = m.round AND s.scope = 'clients' AND s.name = 'shared_' || m.name "
            "WHERE m.scope = 'clients' AND m.name = ? ORDER BY m.round",
            metric,
        ),
        _last(ledger, metric),
        [
            row | {"group": row["scope"].removeprefix(_GROUP)}
            for row in ledger.query(
                "SELECT scope, value, low, high, examples FROM metrics WHERE substr(scope, 1, 6) = ? "
                "AND name = ? AND round = (SELECT max(round) FROM metrics) ORDER BY value",
                _GROUP,
                metric,
            )
        ],
        ledger.query(
            f"SELECT min(round) AS round, {before} AS before, {after} AS after {told} GROUP BY (round - 1) / ?", step
        ),
        {row["client"]: (row["b"], row["a"]) for row in drift},
    )


def _last(ledger: Ledger, metric: str) -> list[tuple[str, float, float | None]]:
    rows = ledger.query(
        "SELECT o.scope, o.value, s.value AS shared FROM metrics o "
        "LEFT JOIN metrics s ON s.round = o.round AND s.scope = o.scope AND s.name = 'shared_' || o.name "
        "WHERE substr(o.scope, 1, 7) = ? AND o.name = ? AND o.round = (SELECT max(round) FROM metrics) "
        f"ORDER BY o.value {'ASC' if metric == 'accuracy' else 'DESC'}, o.scope",
        _CLIENT,
        metric,
    )
    known = [row for row in rows if row["value"] is not None]
    return [(row["scope"].removeprefix(_CLIENT), row["value"], row["shared"]) for row in known]
