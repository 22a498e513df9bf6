"""What the record says of devices and of time: who took part, how late, and what was reached when."""

from __future__ import annotations

from dataclasses import dataclass

from fedkeel.ship.ledger import Ledger, Row

_CLASS = "class/"


@dataclass(frozen=True)
class Pace:
    """`classes`: one row a class of devices. `over_time`: (seconds, bytes so far, value, low, high) of the main metric.

    `by_class`: class -> (seconds, value) of its clients. `seconds`: the federation's clock at the end. `late`: whether
    an update was of an older model than the one it was added to.
    """

    classes: list[Row]
    over_time: list[Row]
    by_class: dict[str, list[tuple[float, float]]]
    seconds: float
    late: bool

    @property
    def uneven(self) -> bool:
        """Whether time tells something that rounds do not."""
        return len(self.classes) > 1 or self.late


def load(ledger: Ledger, scope: str, metric: str | None) -> Pace:
    """Read it; the main metric is that of a scope."""
    end = ledger.query("SELECT max(time) AS t FROM rounds")[0]["t"] or 0.0
    oldest = ledger.query("SELECT max(staleness) AS s FROM updates WHERE stage IS NULL")[0]["s"] or 0
    over_time = ledger.query(
        "WITH r AS (SELECT round, time, total(bytes_up + bytes_down) OVER (ORDER BY round) AS bytes FROM rounds) "
        "SELECT coalesce(r.time, 0) AS seconds, coalesce(r.bytes, 0) AS bytes, m.value, m.low, m.high FROM metrics m "
        "LEFT JOIN r ON r.round = m.round WHERE m.scope = ? AND m.name = ? ORDER BY m.round",
        scope,
        metric,
    )
    by_class: dict[str, list[tuple[float, float]]] = {}
    rows = ledger.query(
        "SELECT m.scope, coalesce(r.time, 0) AS seconds, m.value FROM metrics m "
        "LEFT JOIN rounds r ON r.round = m.round WHERE substr(m.scope, 1, 6) = ? AND m.name = ? "
        "ORDER BY m.scope, m.round",
        _CLASS,
        metric,
    )
    for row in rows:
        by_class.setdefault(row["scope"].removeprefix(_CLASS), []).append((row["seconds"], row["value"]))
    return Pace(_classes(ledger, by_class), over_time, by_class, end, bool(oldest))


def _classes(ledger: Ledger, by_class: dict[str, list[tuple[float, float]]]) -> list[Row]:
    """Of each class its part of the clients, of the work and of the weight; the figure of its clients at the end."""
    rows = ledger.query(
        "SELECT c.device, c.clients, t.given, t.used, t.lost, t.weight, t.seconds, t.staleness, t.up, t.down FROM "
        "(SELECT device, count(*) AS clients FROM clients GROUP BY device) c LEFT JOIN "
        "(SELECT device, sum(seconds IS NOT NULL) AS given, sum(stage IS NULL) AS used, total(weight) AS weight, "
        "sum(seconds IS NOT NULL AND stage IN ('transport', 'train', 'late')) AS lost, "
        "total(bytes_up) AS up, total(bytes_down) AS down, "
        "avg(CASE WHEN stage IS NULL THEN seconds END) AS seconds, "
        "avg(CASE WHEN stage IS NULL THEN staleness END) AS staleness "
        "FROM updates JOIN clients USING (client) GROUP BY device) t USING (device) "
        "ORDER BY c.device"
    )
    clients, given, weight = (sum(row[name] or 0 for row in rows) for name in ("clients", "given", "weight"))
    for row in rows:
        row["population"] = row["clients"] / clients
        row["share"] = (row["given"] or 0) / given if given else 0.0
        row["bias"] = row["share"] / row["population"]
        row["weight"] = (row["weight"] or 0.0) / weight if weight else 0.0
        points = by_class.get(row["device"])
        row["value"] = points[-1][1] if points else None
    return rows
