"""What the page is told, as plain values of bounded size: an overview, and a page of the table of clients."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fedkeel.core.errors import InputError, nearest
from fedkeel.dashboard import health
from fedkeel.dashboard.bins import Bins, Point, Span
from fedkeel.dashboard.feed import Feed
from fedkeel.dashboard.tally import CLASS, CURVES, Client, Refusal, Tally
from fedkeel.ship import words

NAME, REASON = 80, 200  # characters shown of what others wrote
RULES, CLASSES = 30, 24  # the most lines of their tables
SHARES = 30  # the most points of the curves of participation
PAGE = 100  # the most clients told at once
_BARS = 20  # of a histogram
_FIRST = {"accuracy": 0, "loss": 1}

Json = dict[str, Any]
_ORDERS: Mapping[str, Callable[[Client], Any]] = {
    "name": lambda c: c.key,
    "device": lambda c: c.device,
    "state": lambda c: c.state,
    "round": lambda c: c.round,
    "used": lambda c: c.used,
    "refused": lambda c: c.refused,
    "lost": lambda c: c.lost,
    "trust": lambda c: -math.inf if c.trust is None else c.trust,
    "staleness": lambda c: -1 if c.staleness is None else c.staleness,
    "version": lambda c: -1 if c.version is None else c.version,
    "bytes": lambda c: c.up + c.down,
}


def overview(feed: Feed) -> Json:
    """All of the page but the table of clients."""
    tally = feed.tally
    judged = [client for client in tally.clients.values() if client.round]
    return {
        "revision": feed.revision,
        "status": status(feed),
        "problem": words.short(feed.problem, 400),
        "behind": feed.behind,
        "run": {key: feed.facts.get(key) for key in ("job", "rounds", "seed", "backend", "fedkeel", "plan")},
        "now": _now(tally),
        "total": _sums(tally.total) | {"clients": len(tally.clients), "seen": len(judged)},
        "recent": _sums(health.recent(tally)),
        "concerns": [concern._asdict() for concern in health.concerns(tally, feed.headline)],
        "metrics": _metrics(tally, feed.headline),
        "by_class": _by_class(tally),
        "spans": _spans(tally.spans),
        "shares": _shares(tally.spans),
        "classes": _classes(tally),
        "truth": any(client.hostile is not None for client in judged),
        "rules": _rules(tally),
        "refusals": [_refusal(tally, line) for line in reversed(tally.newest.values())],
        "trust": _histogram([c.trust for c in judged if c.trust is not None and math.isfinite(c.trust)]),
        "versions": _versions(tally, judged),
        "parts": {part: _brief(value) for part, value in sorted(tally.parts.items(), key=lambda item: -item[1])[:10]},
    }


def status(feed: Feed) -> str:
    """unreadable, waiting (no ledger yet), empty (no round yet), reading (not caught up), ended or running."""
    tally = feed.tally
    if feed.problem:
        return "unreadable"
    if not feed.there:
        return "waiting"
    if feed.behind:
        return "reading"
    if tally.last is None:
        return "empty"
    planned = feed.facts.get("rounds")
    return "ended" if tally.ended or (isinstance(planned, int) and tally.round >= planned) else "running"


def clients(
    feed: Feed, search: str = "", sort: str = "refused", descending: bool = True, offset: int = 0, limit: int = 25
) -> Json:
    """Some lines of the table of clients: those whose name or class holds `search`, in the order of a column."""
    if sort not in _ORDERS:
        raise InputError(f"sort='{words.short(sort, 40)}' is no column: {nearest(sort, _ORDERS)}")
    if not 1 <= limit <= PAGE:
        raise InputError(f"limit={limit} is out of range: write 1 to {PAGE}")
    if offset < 0:
        raise InputError(f"offset={offset} is out of range: write 0 or more")
    wanted = search.casefold()
    found = [c for c in feed.tally.clients.values() if not wanted or wanted in f"{c.name}\n{c.device}".casefold()]
    found.sort(key=lambda c: c.key)
    found.sort(key=_ORDERS[sort], reverse=descending)
    rows = [_client(client) for client in found[offset : offset + limit]]
    return {"revision": feed.revision, "total": len(found), "offset": offset, "clients": rows}


def _client(client: Client) -> Json:
    return {
        "name": words.short(client.name, NAME),
        "device": words.short(client.device, NAME),
        "state": client.state,
        "round": client.round,
        "wall": client.wall,
        "used": client.used,
        "unused": client.unused,
        "refused": client.refused,
        "lost": client.lost,
        "trust": _brief(client.trust),
        "staleness": client.staleness,
        "version": client.version,
        "bytes": client.up + client.down,
        "reason": words.short(client.reason, REASON),
        "reason_round": client.reason_round,
        "hostile": client.hostile,
    }


def _now(tally: Tally) -> Json:
    last = tally.last
    return {
        "round": tally.round,
        "version": last.version if last else None,
        "time": _brief(last.time) if last else None,
        "wall": last.wall if last else None,
        "skipped": words.short(last.skipped, REASON) if last and last.skipped is not None else None,
        "pace": _brief(health.pace(tally)),
        "quiet_after": _brief(health.quiet_after(tally)),
    }


def _sums(span: Span) -> Json:
    names = ("rounds", "skipped", "used", "unused", "refused", "lost", "up", "down", "oldest")
    sums: Json = {name: getattr(span, name) for name in names}
    sums["staleness"] = _brief(span.stale / span.aged) if span.aged else None
    sums["epsilon"] = _brief(span.epsilon)
    return sums


def _metrics(tally: Tally, headline: str) -> Json:
    """Name -> curve, accuracy and loss first."""
    names = {name for scope, name in tally.curves.keys() | tally.open.keys() if scope == headline}
    order = sorted(names, key=lambda name: (_FIRST.get(name, 2), name))[:CURVES]
    return {words.short(name, NAME): _curve(tally, headline, name) for name in order}


def _by_class(tally: Tally) -> Json:
    """Class of devices -> curve of its own clients' accuracy, or of their loss where there is none."""
    keys = sorted(key for key in tally.curves.keys() | tally.open.keys() if key[0].startswith(CLASS))
    name = "accuracy" if any(key[1] == "accuracy" for key in keys) else "loss"
    scopes = [key[0] for key in keys if key[1] == name][:CURVES]
    found = {words.short(scope.removeprefix(CLASS), NAME): _curve(tally, scope, name) for scope in scopes}
    return {"metric": name, "classes": found}


def _curve(tally: Tally, scope: str, name: str) -> Json:
    points = tally.points(scope, name)
    return {
        "round": [p.round for p in points],
        "time": [_brief(p.time) for p in points],
        "value": [_brief(p.value) for p in points],
        "low": [_brief(_end(p, p.low)) for p in points],
        "high": [_brief(_end(p, p.high)) for p in points],
    }


def _end(point: Point, end: float | None) -> float | None:
    """An interval's end, where there is an interval."""
    return None if point.low == point.high else end


def _spans(bins: Bins[Span]) -> Json:
    """The rounds' curves: means per round of each bin, at its last round."""
    spans = bins.items
    names = ("used", "unused", "refused", "lost", "up", "down", "seconds", "skipped")
    of: Json = {name: [_brief(getattr(s, name) / s.rounds) for s in spans] for name in names}
    return of | {
        "width": bins.width,
        "round": [s.round for s in spans],
        "time": [_brief(s.time) for s in spans],
        "staleness": [_brief(s.stale / s.aged) if s.aged else None for s in spans],
        "oldest": [s.oldest if s.aged else None for s in spans],
        "epsilon": [_brief(s.epsilon) for s in spans] if any(s.epsilon is not None for s in spans) else [],
    }


def _shares(bins: Bins[Span]) -> Json:
    """Each class's part of the updates used, over few points: in single rounds chance alone would be seen."""
    every, spans = bins.items, []
    step = math.ceil(len(every) / SHARES) or 1
    for first in range(0, len(every), step):
        together = Span()
        for span in every[first : first + step]:
            together.merge(span)
        spans.append(together)
    used: dict[str, int] = {}
    for span in spans:
        for device, number in span.classes.items():
            used[device] = used.get(device, 0) + number
    shown = sorted(sorted(used, key=lambda device: (-used[device], device))[:CURVES]) if len(used) > 1 else []
    return {
        "round": [s.round for s in spans],
        "time": [_brief(s.time) for s in spans],
        "classes": {
            words.short(device, NAME): [_brief(s.classes.get(device, 0) / s.used) if s.used else None for s in spans]
            for device in shown
        },
    }


def _classes(tally: Tally) -> list[Json]:
    """One line a class of devices, the largest first."""
    found: dict[str, Json] = {}
    names = ("used", "unused", "refused", "lost", "weight", "stale", "aged")
    for client in tally.clients.values():
        line = found.setdefault(client.device, dict.fromkeys(("clients", "seen", "bytes", *names), 0))
        line["clients"] += 1
        line["seen"] += client.round > 0
        line["bytes"] += client.up + client.down
        for name in names:
            line[name] += getattr(client, name)
    used = sum(line["used"] for line in found.values())
    weight = sum(line["weight"] for line in found.values())
    order = sorted(found, key=lambda device: (-found[device]["clients"], device))[:CLASSES]
    lines = []
    for device in order:
        line = found[device]
        line["population"] = _brief(line["clients"] / len(tally.clients))
        line["share"] = _brief(line["used"] / used) if used else None
        line["weight"] = _brief(line["weight"] / weight) if weight else None
        stale, aged = line.pop("stale"), line.pop("aged")
        line["staleness"] = _brief(stale / aged) if aged else None
        lines.append({"device": words.short(device, NAME), **line})
    return lines


def _rules(tally: Tally) -> list[Json]:
    order = sorted(tally.rules.items(), key=lambda item: (-item[1].updates, item[0]))[:RULES]
    return [
        {
            "stage": stage,
            "rule": words.short(rule, NAME),
            "outcome": found.outcome,
            "updates": found.updates,
            "clients": len(found.clients),
            "round": found.round,
            "reason": words.short(found.reason, REASON),
        }
        for (stage, rule), found in order
    ]


def _refusal(tally: Tally, line: Refusal) -> Json:
    """A client's newest refusal, and how many it has had."""
    shown = {key: words.short(text, REASON) for key, text in line._asdict().items() if isinstance(text, str)}
    return shown | {"round": line.round, "times": tally.clients[line.client].refused}


def _histogram(values: Sequence[float]) -> Json:
    """How many values lie between each two of the edges."""
    if not values:
        return {"edges": [], "counts": []}
    low, high = min(0.0, *values), max(values)
    step = (high - low) / _BARS or 1.0
    counts = [0] * _BARS
    for value in values:
        counts[min(int((value - low) / step), _BARS - 1)] += 1
    return {"edges": [_brief(low + i * step) for i in range(_BARS + 1)], "counts": counts}


def _versions(tally: Tally, judged: Sequence[Client]) -> Json:
    """How many clients' newest judged work began from a model so many behind the newest; `open`: the last, or more."""
    newest = tally.last.version if tally.last else 0
    found: dict[int, int] = {}
    for client in judged:
        if client.version is not None:
            found[newest - client.version] = found.get(newest - client.version, 0) + 1
    behind = sorted(found)
    more = sum(found[age] for age in behind[_BARS:])
    behind = behind[:_BARS]
    counts = [found[age] for age in behind]
    if more:
        counts[-1] += more
    return {"behind": behind, "clients": counts, "open": more > 0}


def _brief(value: float | None) -> float | None:
    """Six digits, enough to draw: shorter on the way. None for what is no number."""
    if value is None or not math.isfinite(value):
        return None
    return value if isinstance(value, int) else float(f"{value:.6g}")
