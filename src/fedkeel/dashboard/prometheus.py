"""What Prometheus is told: the tally as metric families, made anew at every scrape."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from fedkeel.dashboard import health, view
from fedkeel.dashboard.feed import Feed
from fedkeel.dashboard.tally import Tally

if TYPE_CHECKING:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

ALERTS = Path(__file__).parent / "alerts.yml"


def exposition(feed: Feed) -> bytes:
    """The text that `/metrics` answers with."""
    from prometheus_client import CollectorRegistry, generate_latest
    from prometheus_client.registry import Collector

    class Run(Collector):
        def collect(self) -> Iterator[Metric]:
            return _families(feed)

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Run())
    return generate_latest(registry)


def _families(feed: Feed) -> Iterator[Metric]:
    from prometheus_client.core import InfoMetricFamily

    state = view.status(feed)
    yield _gauge("fedkeel_ledger_up", "1 while the run's ledger can be read", state not in ("unreadable", "waiting"))
    yield _gauge("fedkeel_ledger_behind_rounds", "Rounds in the ledger that are not read yet", feed.behind)
    if state in ("unreadable", "waiting", "reading"):
        return  # half a count would look like a fall
    labels = {"name": "job", "backend": "backend", "seed": "seed", "version": "fedkeel"}  # "job" is Prometheus' own
    facts = {label: str(feed.facts.get(key, "")) for label, key in labels.items()}
    yield InfoMetricFamily("fedkeel_run", "What run this is", facts)
    planned = feed.facts.get("rounds")
    if isinstance(planned, int):
        yield _gauge("fedkeel_rounds_planned", "Rounds that the job asks for", planned)
    yield _gauge("fedkeel_run_ended", "1 once the run is over", state == "ended")
    yield from _standing(feed.tally)
    yield from _quality(feed)
    yield from _updates(feed.tally)
    yield from _clients(feed.tally)
    yield from _verdicts(feed.facts.get("verdicts"))


def _standing(tally: Tally) -> Iterator[Metric]:
    from prometheus_client.core import SummaryMetricFamily

    yield _gauge("fedkeel_round", "The last round that closed", tally.round)
    if tally.last is not None:
        yield _gauge("fedkeel_model_version", "Version of the model after it", tally.last.version)
        yield _gauge("fedkeel_last_round_timestamp_seconds", "When it closed, since 1970", tally.last.wall)
        yield _gauge("fedkeel_federation_seconds", "The federation's own clock when it closed", tally.last.time)
    yield _counter("fedkeel_rounds", "Rounds that closed", tally.total.rounds)
    yield _counter("fedkeel_rounds_skipped", "Rounds that closed and kept the model", tally.total.skipped)
    spent = SummaryMetricFamily("fedkeel_round_seconds", "Wall time of a round, by part of its work", labels=["part"])
    for part, seconds in sorted(tally.parts.items()):
        spent.add_metric([part], count_value=tally.total.rounds, sum_value=seconds)
    yield spent


def _quality(feed: Feed) -> Iterator[Metric]:
    tally = feed.tally
    for name, meaning in (("accuracy", "Share of test examples that the model has right"), ("loss", "Its test loss")):
        point, best = tally.open.get((feed.headline, name)), tally.best.get((feed.headline, name))
        if point is not None:
            yield _gauge(f"fedkeel_{name}", meaning, float("nan") if point.value is None else point.value)
        if name == "accuracy" and point is not None:
            values = [p.value for p in (point, best) if p is not None and p.value is not None]
            yield _gauge("fedkeel_accuracy_best", "The highest accuracy so far", max(values, default=float("nan")))
    if tally.total.epsilon is not None:
        yield _gauge("fedkeel_privacy_epsilon", "Privacy spent so far", tally.total.epsilon)


def _updates(tally: Tally) -> Iterator[Metric]:
    updates = _counter("fedkeel_updates", "Updates by what became of them", None, ["outcome", "stage", "rule"])
    updates.add_metric(["used", "", ""], tally.total.used)
    updates.add_metric(["unused", "", ""], tally.total.unused)
    for (stage, rule), found in sorted(tally.rules.items()):
        updates.add_metric([found.outcome.replace(" ", "_"), stage, rule], found.updates)
    yield updates
    moved = _counter("fedkeel_bytes", "Bytes of updates and models", None, ["direction"])
    moved.add_metric(["up"], tally.total.up)
    moved.add_metric(["down"], tally.total.down)
    yield moved
    lately = health.recent(tally)
    if lately.aged:
        meaning = "Mean age of updates in the last rounds, in models"
        yield _gauge("fedkeel_staleness_models", meaning, lately.stale / lately.aged)


def _clients(tally: Tally) -> Iterator[Metric]:
    from prometheus_client.core import GaugeMetricFamily

    found: dict[tuple[str, str], int] = {}
    for client in tally.clients.values():
        found[client.device, client.state] = found.get((client.device, client.state), 0) + 1
    family = GaugeMetricFamily("fedkeel_clients", "Clients by class and by their last news", labels=["device", "state"])
    for key, number in sorted(found.items()):
        family.add_metric(list(key), number)
    yield family


def _verdicts(found: object) -> Iterator[Metric]:
    """Of the release gate, the last one of each stage."""
    from prometheus_client.core import GaugeMetricFamily

    last = {verdict["stage"]: verdict for verdict in found} if isinstance(found, list) else {}
    if last:
        meaning = "1 where the run's model passed the gate of the stage"
        passed = GaugeMetricFamily("fedkeel_release_passed", meaning, labels=["stage", "version"])
        rules = GaugeMetricFamily("fedkeel_release_rule_passed", "1 where it passed the rule", labels=["stage", "rule"])
        for stage, verdict in sorted(last.items()):
            passed.add_metric([stage, verdict["version"]], verdict["passed"])
            for rule in verdict["findings"]:
                rules.add_metric([stage, rule["rule"]], rule["passed"])
        yield passed
        yield rules


def _gauge(name: str, meaning: str, value: float) -> GaugeMetricFamily:
    from prometheus_client.core import GaugeMetricFamily

    return GaugeMetricFamily(name, meaning, value=float(value))


def _counter(name: str, meaning: str, value: float | None, labels: list[str] | None = None) -> CounterMetricFamily:
    from prometheus_client.core import CounterMetricFamily

    return CounterMetricFamily(name, meaning, value=value, labels=labels)
