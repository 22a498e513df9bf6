"""Figures and verdicts in words that a reader wants."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fedkeel.ship.summary import Counts, Point, Run


def number(value: float | None, percent: bool = False) -> str:
    """`93.9%`, or four significant digits."""
    if value is None or not math.isfinite(value):
        return "no number"
    return f"{100 * value:.1f}%" if percent else f"{value:.4g}"


def figure_of(point: Point, percent: bool) -> str:
    """`93.9% (92.6 to 95.1%)`."""
    return number(point.value, percent) + (f" ({interval(point, percent)})" if interval(point, percent) else "")


def interval(point: Point, percent: bool) -> str:
    """`92.6 to 95.1%`, or nothing where there is none."""
    if point.low is None or point.high is None:
        return ""
    return f"{number(point.low, percent).rstrip('%')} to {number(point.high, percent)}"


def size(value: float) -> str:
    """Bytes for people, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def count(number: float, noun: str) -> str:
    """`1 client`, `1,200 clients`."""
    return f"{number:,.0f} {noun}{'' if number == 1 else 's'}"


def of(part: int, whole: int) -> str:
    return f"{part:,} of {whole:,}"


def duration(seconds: float) -> str:
    """`0.82 s`, `41 s`, `3 min 20 s`, `2 h 5 min`, `6 d 4 h`."""
    if seconds < 59.5:
        return f"{seconds:.2g} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 1440:
        return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"


def short(text: str, most: int) -> str:
    """A name that others chose, as it may be shown: no longer than `most`, nothing in it that cannot be seen."""
    seen = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[: most + 1])
    return seen if len(seen) <= most else seen[: most - 1] + "…"


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def name(metric: str) -> str:
    return short(metric.replace("_", " "), 40)


def difference(point: Point, base: Point, percent: bool) -> str:
    """`−82.3 points`: how far a figure lies from another."""
    if point.value is None or base.value is None:
        return ""
    gap = (point.value - base.value) * (100 if percent else 1)
    text = f"{gap:+.1f} points".replace("-0.0 ", "+0.0 ") if percent else f"{gap:+.4g}"
    return text.replace("-", "\N{MINUS SIGN}")


def statement(pairs: Sequence[tuple[str, Point]], metric: str, percent: bool) -> str:
    """Who ends highest and who lowest."""
    known = [(label, point.value) for label, point in pairs if point.value is not None]
    if len(known) < 2:
        return f"{count(len(pairs), 'run')} side by side"
    high, low = max(known, key=lambda p: p[1]), min(known, key=lambda p: p[1])
    ends = f"“{short(high[0], 90)}” ends at {number(high[1], percent)} {metric}"
    return f"{ends}, “{short(low[0], 90)}” at {number(low[1], percent)}"


def is_share(name: str) -> bool:
    """Accuracies are shares of 1 and read as per cent."""
    return name.endswith("accuracy")


def ending(run: Run) -> str:
    """Where the run's model stands: `accuracy 93.9% (92.6 to 95.1%) after 30 rounds`."""
    rounds = count(run.rounds, "round")
    if run.main is None or run.final is None:
        return f"no evaluation after {rounds}"
    return f"{name(run.main)} {figure_of(run.final, is_share(run.main))} after {rounds}"


def verdict(counts: Counts) -> str:
    """Who was refused, in one or two sentences."""
    judged = counts.honest + counts.hostile
    if not judged:
        return "No update was judged."
    if not counts.hostile:
        known = "No client was hostile: " if counts.truth else ""
        if not counts.refused:
            return capital(f"{known}all {count(judged, 'update')} were admitted.")
        return f"{known}{counts.refused:,} of {count(judged, 'update')} were refused."
    who = count(counts.hostile_clients, "hostile client")
    fate = f"{counts.hostile_refused:,} refused, {counts.hostile_admitted:,} admitted"
    if not counts.hostile_refused:
        fate = "every one was admitted"
    elif not counts.hostile_admitted:
        fate = "every one was refused"
    said = f"{who} sent {count(counts.hostile, 'update')}: {fate}."
    if counts.honest_refused:
        too = " too" if counts.hostile_refused else ""
        said += f" {counts.honest_refused:,} of {count(counts.honest, 'honest update')} were refused{too}."
    return said
