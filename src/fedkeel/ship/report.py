"""The report: one self-contained page of one run, or of several side by side. It reads the record and nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedkeel.core.errors import InputError
from fedkeel.ship import charts, files, summary, words
from fedkeel.ship.summary import Point, Run

if TYPE_CHECKING:
    from fedkeel.probing import Cell, Probe

Source = Path | str | tuple[str, Path | str]


def write(path: Path | str, runs: Sequence[Source], title: str | None = None) -> Path:
    """Write the report of run directories, each a path or (label, path), and return its path.

    The first of several runs is what the others are measured against. Raises `InputError` for a directory that holds
    no run or no whole ledger, `RunError` where the page cannot be written.
    """
    if not runs:
        raise InputError("a report needs at least one run: name a run directory")
    pairs = [source if isinstance(source, tuple) else (None, source) for source in runs]
    found = [summary.load(directory, label) for label, directory in pairs]
    keys = (f"g{number}" for number in count())
    with charts.style():
        views = [_view(run, i, found[0], keys) for i, run in enumerate(found)]
        comparison = _comparison(found, keys) if len(found) > 1 else []
    statement = _statement(found)
    single = f"{words.capital(words.ending(found[0]))}. {views[0]['verdict']}"
    heading = words.short(title or (found[0].label if len(found) == 1 else statement), 300)
    lede = single if len(found) == 1 else _lede(found, statement, heading)
    version = found[0].meta.get("fedkeel")
    page = {
        "title": heading,
        "lede": lede,
        "eyebrow": f"Report by fedkeel {version}" if version else "Report by fedkeel",
        "runs": views,
        "comparison": comparison,
        "main": words.capital(words.name(found[0].main or "result")),
    }
    return _render("report.html.j2", Path(path), page)


def _known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def write_comparison(
    path: Path | str,
    rows: Sequence[Mapping[str, Any]],
    *,
    metric: str = "accuracy",
    settings: str = "",
    title: str | None = None,
    note: str = "Bars and bands: the interval of the mean over seeds.",
) -> Path:
    """Write the report of `fedkeel compare`: means over seeds, the first row what the others are measured against.

    A row holds label, seeds (a number), mean, low, high and curves: (round, mean, low, high) in order. A mean that is
    NaN says that a seed diverged.
    """
    if not rows:
        raise InputError("a comparison needs at least one row: name what to vary")
    percent = words.is_share(metric)
    points = [Point(0, row["mean"], row["low"], row["high"]) for row in rows]
    pairs = [(str(row["label"]), point) for row, point in zip(rows, points, strict=True)]
    lines = [
        charts.Curve(label, [Point(*p) for p in row["curves"] if math.isfinite(p[1])], i)
        for i, (row, (label, _)) in enumerate(zip(rows, pairs, strict=True))
    ]
    named = words.name(metric)
    ended = [pair for pair in pairs if _known(pair[1].value)] or [(pairs[0][0], Point(0, 0.0, 0.0, 0.0))]
    with charts.style():
        drawn = [
            charts.finals(f"Final {named}, mean over seeds", ended, "g0", percent=percent, note=note),
            charts.curves(f"{words.capital(named)} over rounds", lines, "g1", percent=percent),
        ]
    views = [
        {
            "label": label,
            "seeds": row["seeds"],
            "mark": charts.mark(i),
            "figure": words.number(point.value, percent) if _known(point.value) else "diverged",
            "interval": words.interval(point, percent) if _known(point.value) else "",
            "against": words.difference(point, points[0], percent)
            if i and _known(point.value) and _known(points[0].value)
            else "",
        }
        for i, (row, (label, point)) in enumerate(zip(rows, pairs, strict=True))
    ]
    statement = words.statement(ended, named, percent)
    page = {
        "title": title or statement,
        "lede": statement + "."
        if title
        else f"{words.count(len(rows), 'variant')} compared, each over {rows[0]['seeds']} seeds.",
        "eyebrow": "Comparison by fedkeel",
        "comparison": drawn,
        "rows": views,
        "note": note,
        "main": named,
        "settings": settings,
    }
    return _render("comparison.html.j2", Path(path), page)


def write_probe(path: Path | str, found: Probe, *, seeds: int, tolerance: float, settings: str) -> Path:
    """Write the report of `fedkeel probe`: a grid of attacks and defences, each cell with its verdict."""

    def cell(of: Cell) -> dict[str, str]:
        figure = f"{100 * of.mean:.1f}" if math.isfinite(of.mean) else "diverged"
        spread = f", {100 * of.low:.1f} to {100 * of.high:.1f}" if seeds > 1 and math.isfinite(of.mean) else ""
        spread += "" if of.backdoor is None else f", mark believed {100 * of.backdoor:.0f}%"
        return {"figure": figure, "verdict": of.verdict, "interval": spread}

    names = list(found.defences)
    best, plain = found.worst(found.best), found.worst("plain mean")
    against = f"{100 * plain.mean:.1f}%" if math.isfinite(plain.mean) else "nothing"
    page = {
        "title": f"Best against {words.count(len(found.attacks) - 1, 'attack')}: {found.best}",
        "lede": f"The worst that happens to it is {100 * best.mean:.1f}% accuracy, under {best.attack}. The "
        f"plain mean reaches {100 * found.clean:.1f}% without an attack, and falls to {against} under {plain.attack}. "
        f"Hostile: {words.count(found.hostile, 'client')}.",
        "note": f"Means over {words.count(seeds, 'seed')}. Holds: at most {100 * tolerance:g} points below the plain "
        f"mean's clean run; bends: at most 10; breaks: more. A backdoor's mark may be believed in 5% of examples by a "
        "defence that holds, in 20% by one that bends.",
        "defences": names,
        "rows": [{"attack": a, "cells": [cell(found.cell(a, d)) for d in names]} for a in found.attacks],
        "worst": [cell(found.worst(d)) for d in names],
        "recipes": list(found.defences.items()),
        "left_out": list(found.left_out.items()),
        "settings": settings,
    }
    return _render("probe.html.j2", Path(path), page)


def _render(template: str, path: Path, page: Mapping[str, Any]) -> Path:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "shown": words.short,
        "number": words.number,
        "size": words.size,
        "duration": words.duration,
        "figure": lambda point, name: words.figure_of(point, words.is_share(name)),
    }
    files.write_text(path, environment.get_template(template).render(page))
    return path


def _statement(runs: Sequence[Run]) -> str:
    """The point of several runs: among those under attack, if there are two, who ends best and who worst."""
    alike = [run for run in runs if run.final and run.main == runs[0].main]
    attacked = [run for run in alike if run.counts.hostile_clients]
    pairs = [(run.label, run.final) for run in (attacked if len(attacked) > 1 else alike) if run.final]
    metric = runs[0].main or ""
    return words.statement(pairs, words.name(metric), words.is_share(metric))


def _lede(runs: Sequence[Run], statement: str, heading: str) -> str:
    """What the heading does not say yet."""
    said = [] if statement == heading else [f"{statement}."]
    calm, attacked = ([run for run in runs if bool(run.counts.hostile_clients) == side] for side in (False, True))
    if calm and attacked:
        said += [f"“{words.short(run.label, 90)}”: {words.ending(run)}." for run in calm[:1]]
    if attacked:
        best = max(attacked, key=lambda run: run.counts.recall or 0.0)
        said.append(f"“{words.short(best.label, 90)}”: {words.verdict(best.counts)}")
    return " ".join(said) or f"{words.count(len(runs), 'run')} side by side."


def _comparison(runs: Sequence[Run], keys: Iterator[str]) -> list[charts.Chart]:
    name = runs[0].main
    alike = [(i, run) for i, run in enumerate(runs) if name and run.main == name]
    if name is None or not alike:
        return []
    percent, named = words.is_share(name), words.name(name)
    finals = [(run.label, run.final) for _, run in alike if run.final]
    lines = [charts.Curve(run.label, run.series[name], i) for i, run in alike]
    note = _band(runs[0])
    drawn = [
        charts.finals(f"Final {named}", finals, next(keys), percent=percent, note=note),
        charts.curves(f"{words.capital(named)} over rounds", lines, next(keys), percent=percent),
    ]
    for what, word, told in (
        ("seconds", "time", any(run.pace.uneven for _, run in alike)),
        ("bytes", "traffic", len({(run.bytes_up + run.bytes_down) // max(run.rounds, 1) for _, run in alike}) > 1),
    ):
        if told:
            lines = [charts.Curve(run.label, _over(run, what), i) for i, run in alike]
            title = f"{words.capital(named)} over {word}"
            drawn.append(charts.curves(title, lines, next(keys), percent=percent, over=what))
    return drawn


def _band(run: Run) -> str:
    """What bars and bands mean, if anything has them."""
    has = any(p.low is not None for points in run.series.values() for p in points)
    over = "test examples" if run.meta.get("headline", "global") == "global" else "clients"
    return f"Bars and bands: 95% interval over the {over}." if has else ""


def _view(run: Run, index: int, first: Run, keys: Iterator[str]) -> dict[str, Any]:
    """All that the page says of one run."""
    percent = words.is_share(run.main or "")
    final = run.final or Point(0, None)
    counts, time = run.counts, words.duration(sum(run.parts.values())) if run.parts else "unknown"
    base = {field.name: getattr(run, field.name) for field in fields(run)}
    return base | {
        "mark": charts.mark(index),
        "figure": words.number(final.value, percent),
        "interval": words.interval(final, percent),
        "against": words.difference(final, first.final, percent)
        if index and first.final and first.main == run.main
        else "",
        "under": _under(run, index, first, percent),
        "ending": words.ending(run),
        "verdict": words.verdict(counts),
        "hostile_refused": words.of(counts.hostile_refused, counts.hostile) if counts.truth else "unknown",
        "honest_refused": words.of(counts.honest_refused, counts.honest),
        "time": time,
        "cards": list(_cards(run, time, percent)),
        "quality": _quality(run, index, keys),
        "served": _served(run, keys),
        "devices": _devices(run, keys, percent),
        "admission": _admission(run, keys),
        "data": _data(run, keys),
        "cost": _cost(run, keys, time),
        "hidden": _hidden(run, keys),
        "privacy": [(name, value) for name, value in run.meta.get("privacy", {}).items() if isinstance(value, str)],
        "plan": run.meta.get("plan", ()),
        "facts": [(key, str(value)) for key, value in run.meta.items() if isinstance(value, str | int | float)],
    }


def _under(run: Run, index: int, first: Run, percent: bool) -> str:
    """What stands under a run's figure."""
    if run.main is None or run.final is None:
        return "never evaluated"
    said = (
        f"{words.name(run.main)}, {words.interval(run.final, percent)}"
        if words.interval(run.final, percent)
        else words.name(run.main)
    )
    if index and first.final and first.main == run.main:
        said += f"; {words.difference(run.final, first.final, percent)} against the first run"
    return said


def _cards(run: Run, time: str, percent: bool) -> Iterable[dict[str, str]]:
    """The key figures at the head of a run."""
    counts = run.counts
    if run.main and run.final:
        interval = words.interval(run.final, percent)
        name = f"Final {words.name(run.main)}"
        yield {"name": name, "figure": words.number(run.final.value, percent), "under": interval or "no interval"}
    if counts.hostile:
        share, precision = words.number(counts.recall, True), counts.precision
        under = f"{words.of(counts.hostile_refused, counts.hostile)} updates (recall)"
        yield {"name": "Hostile updates refused", "figure": share, "under": under}
        if precision is not None:
            right = f"{words.of(counts.hostile_refused, counts.refused)} refusals (precision)"
            yield {"name": "Refusals that were right", "figure": words.number(precision, True), "under": right}
    else:
        under = f"of {words.count(counts.honest, 'update')} judged"
        yield {"name": "Updates refused", "figure": f"{counts.refused:,}", "under": under}
    skipped = sum(row["rounds"] for row in run.skipped)
    under = f"{words.count(counts.clients, 'client')}" + (f", {skipped} rounds skipped" if skipped else "")
    yield {"name": "Rounds", "figure": f"{run.rounds:,}", "under": under}
    total = words.size(run.bytes_up + run.bytes_down)
    yield {
        "name": "Traffic",
        "figure": total,
        "under": f"{words.size(run.bytes_up)} up, {words.size(run.bytes_down)} down",
    }
    if run.pace.uneven:
        under = "by the federation's clock"
        yield {"name": "Virtual time", "figure": words.duration(run.pace.seconds), "under": under}
    if run.parts:
        longest = max(run.parts, key=lambda part: run.parts[part])
        yield {"name": "Time", "figure": time, "under": f"most of it: {words.short(longest, 30)}"}
    if run.epsilon is not None:
        under = f"at δ = {run.meta['privacy']['delta']:g}" if "privacy" in run.meta else "over all rounds"
        under = "insecure: the noise is of the seed" if run.meta.get("insecure") else under
        yield {"name": "Privacy spent", "figure": f"ε = {words.number(run.epsilon)}", "under": under}


def _quality(run: Run, index: int, keys: Iterator[str]) -> list[charts.Chart]:
    drawn = []
    for name, points in list(run.series.items())[:6]:
        title, note = f"{words.capital(words.name(name))} over rounds", _band(run) if name == run.main else ""
        line = charts.Curve(name, points, index)
        drawn.append(charts.curves(title, [line], next(keys), percent=words.is_share(name), note=note))
    return drawn


def _served(run: Run, keys: Iterator[str]) -> list[charts.Chart]:
    """What the clients have of it: their own models, and what local work does to their losses."""
    own, drawn = run.own, []
    percent = words.is_share(own.metric)
    if own.over_rounds:
        rounds = summary.thin(own.over_rounds, summary.POINTS)
        lines = [
            charts.Curve("mean over clients", [Point(r["round"], r["mean"], r["low"], r["high"]) for r in rounds], 0),
            charts.Curve("the worst tenth of them", [Point(r["round"], r["worst"]) for r in rounds], 1),
        ]
        if any(r["shared"] is not None for r in rounds):
            lines.append(charts.Curve("the shared model", [Point(r["round"], r["shared"]) for r in rounds], 2))
        note = "On each client's own examples. Band: 95% interval over the clients."
        title = f"{words.capital(own.metric)} of clients' own models"
        drawn.append(charts.curves(title, lines, next(keys), percent=percent, note=note))
    if own.last:
        shown = summary.thin(own.last, summary.POINTS)
        drawn.append(charts.people("Client by client, after the last round", shown, next(keys), percent=percent))
    if len(own.losses) > 1:
        lines = [
            charts.Curve(label, [Point(row["round"], row[name]) for row in own.losses], i)
            for i, (label, name) in enumerate(
                (("before: the shared model", "before"), ("after: the local model", "after"))
            )
        ]
        note = (
            "What clients say, on their validation examples if they have any, else on their first and last batches. A "
            "wide gap: local models fit their own data, and drift apart."
        )
        drawn.append(charts.curves("Loss before and after local work", lines, next(keys), percent=False, note=note))
    return drawn


def _devices(run: Run, keys: Iterator[str], percent: bool) -> list[charts.Chart]:
    """What was reached when, by whom, where devices differ or updates come late."""
    pace = run.pace
    if not pace.uneven or run.main is None:
        return []
    named, note = words.name(run.main), _band(run)
    line = charts.Curve(named, _over(run, "seconds"), 0)
    title = f"{words.capital(named)} over time"
    drawn = [charts.curves(title, [line], next(keys), percent=percent, note=note, over="seconds")]
    if len(pace.by_class) > 1:
        lines = [
            charts.Curve(name, [Point(t, v) for t, v in summary.thin(points, summary.POINTS)], i)
            for i, (name, points) in enumerate(pace.by_class.items())
        ]
        note = "Each class: the mean over its clients, on what they hold back."
        title = f"{words.capital(named)} by class of device"
        drawn.append(charts.curves(title, lines, next(keys), percent=percent, note=note, over="seconds"))
    return drawn


def _over(run: Run, what: str) -> list[Point]:
    """The main metric over seconds or bytes."""
    rows = summary.thin(run.pace.over_time, summary.POINTS)
    return [Point(row[what], row["value"], row["low"], row["high"]) for row in rows]


def _admission(run: Run, keys: Iterator[str]) -> list[charts.Chart]:
    truth, drawn = run.counts.truth, []
    if run.verdicts:
        drawn.append(charts.verdicts("Updates per round, by verdict", run.verdicts, next(keys), truth=truth))
    if run.grid:
        note = "Blank: no update came."
        if len(run.grid.weight) < run.grid.clients:
            note += f" {words.count(run.grid.clients, 'client')}; each line is the mean of several."
        drawn.append(charts.grid("Every client in every round", run.grid, next(keys), truth=truth, note=note))
    titles = {
        "norm": "Norm of each update",
        "cosine": "Cosine of each update with the aggregate",
        "trust": "Trust in each client, 1 being the mean",
        "contribution": "What each update was worth: drop of the server's loss",
        "staleness": "Age of each update: how many models behind",
    }
    for column, title in titles.items():
        if dots := run.dots[column]:
            shown, judged = sum(map(len, dots.values())), run.counts.honest + run.counts.hostile
            note = f"A sample of {shown:,} of {judged:,} updates. " if shown + run.without_norm < judged else ""
            if run.without_norm and column == "norm":
                note += f"{words.count(run.without_norm, 'update')} with no finite norm left out."
            logarithmic = column == "norm"
            drawn.append(charts.scatter(title, dots, next(keys), truth=truth, logarithmic=logarithmic, note=note))
    return drawn


def _data(run: Run, keys: Iterator[str]) -> list[charts.Chart]:
    histogram = run.meta.get("label_histogram")
    if not histogram:
        return []
    note = f"{words.count(sum(map(sum, histogram)), 'example')}; the deeper the cell, the more examples of the class."
    labels = [str(name) for name in run.meta.get("labels", ())]
    return [charts.holdings("Examples of each class at each client", histogram, labels, next(keys), note=note)]


def _hidden(run: Run, keys: Iterator[str]) -> list[charts.Chart]:
    """What was spent of privacy, round by round."""
    if not run.spent:
        return []
    note = "An upper bound on what all rounds so far tell of one of those who are hidden."
    return [charts.curves("Privacy spent", [charts.Curve("ε", run.spent, 0)], next(keys), percent=False, note=note)]


def _cost(run: Run, keys: Iterator[str], time: str) -> list[charts.Chart]:
    drawn = []
    if run.traffic:
        note = f"In all {words.size(run.bytes_up)} up and {words.size(run.bytes_down)} down."
        drawn.append(charts.traffic("Bytes per round", run.traffic, next(keys), note))
    if run.seconds[1]:
        drawn.append(charts.stacked("Time per round, by part", *run.seconds, next(keys), f"In all {time}."))
    return drawn
