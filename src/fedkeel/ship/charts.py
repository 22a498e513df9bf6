"""Charts as inline SVG: drawn by matplotlib, coloured by the page, so that they follow light and dark and print.

Every colour is a sentinel that becomes a CSS variable; pictures carry their figure in the alpha channel, so that they
stand on any ground. Text stays text and takes the page's fonts.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fedkeel.ship.ledger import Row
from fedkeel.ship.summary import CELLS, Grid, Point
from fedkeel.ship.words import duration, figure_of, number, short, size

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# What a drawing says for a colour -> what the page says. The sentinels occur nowhere else.
INK, MUTED, LINE = "#010101", "#010102", "#010103"
SERIES = tuple(f"#0101c{i}" for i in range(1, 7))
HONEST, HOSTILE = SERIES[0], SERIES[1]
_CSS = {INK: "var(--ink)", MUTED: "var(--muted)", LINE: "var(--line)"}
_CSS |= {colour: f"var(--c{i})" for i, colour in enumerate(SERIES, 1)}
# The same two hues in pictures, where no variable reaches: between the light and the dark page's.
_HONEST_RGB, _HOSTILE_RGB = (0.20, 0.53, 0.82), (0.88, 0.40, 0.12)
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (7, 2, 1.5, 2)), (0, (3, 1)), (0, (9, 3)))
_WIDTH = 374.0  # points; as wide as a column of the page, so that text keeps its size


@dataclass(frozen=True)
class Chart:
    """A drawing with its words: `legend` pairs a name with a CSS colour and a mark (line, dash pattern, dot, area)."""

    title: str
    svg: str
    legend: tuple[tuple[str, str, str], ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Curve:
    """A curve and, where its points have one, its interval as a band."""

    label: str
    points: Sequence[Point]
    index: int = 0


@contextmanager
def style() -> Iterator[None]:
    """Draw as the page wants it, whatever the user's own matplotlib settings are."""
    import matplotlib

    ours: dict[str, Any] = {
        "svg.fonttype": "none", "svg.hashsalt": "fedkeel", "svg.image_inline": True, "image.composite_image": False,
        "text.usetex": False, "text.parse_math": False, "font.family": ["DejaVu Sans"], "font.size": 9.5,
        "axes.edgecolor": LINE, "axes.labelcolor": MUTED, "text.color": INK, "xtick.color": LINE, "ytick.color": LINE,
        "xtick.labelcolor": MUTED, "ytick.labelcolor": MUTED, "axes.spines.top": False, "axes.spines.right": False,
        "axes.spines.left": False, "ytick.major.size": 0, "grid.color": LINE, "grid.linewidth": 0.7,
        "axes.grid.axis": "y", "axes.axisbelow": True, "lines.linewidth": 1.7, "figure.dpi": 72, "savefig.dpi": 72,
        "axes.facecolor": "none", "figure.facecolor": "none", "savefig.facecolor": "none", "axes.grid": True,
    }  # fmt: skip
    plain: Any = {k: v for k, v in matplotlib.rcParamsDefault.items() if not k.startswith(("backend", "toolbar"))}
    with matplotlib.rc_context(plain | ours):
        yield


def curves(
    title: str, lines: Sequence[Curve], key: str, *, percent: bool, note: str = "", over: str = "round"
) -> Chart:
    """Figures over rounds, or over time or bytes ("seconds", "bytes"), each with its band."""
    figure, axes = _figure(196)
    unit, axis = _unit(lines, over)
    for line in lines:
        colour = SERIES[line.index % len(SERIES)]
        kept = [p for p in line.points if p.value is not None and np.isfinite(p.value)]
        x = [p.round / unit for p in kept]
        banded = [p for p in kept if p.low is not None and p.high is not None]
        if banded:
            low, high = [p.low for p in banded], [p.high for p in banded]
            axes.fill_between([p.round / unit for p in banded], low, high, color=colour, alpha=0.16, linewidth=0)  # type: ignore[arg-type]
        values = [p.value for p in kept]
        style = DASHES[line.index % len(DASHES)]
        axes.plot(x, values, color=colour, linestyle=style, marker="o" if len(x) == 1 else "", markersize=4)  # type: ignore[arg-type]
    _rounds(axes, axis)
    if over == "bytes":
        axes.xaxis.set_major_formatter(lambda v, _: size(v))
    if percent:
        _percent(axes)
    said = "; ".join(f"{short(c.label, 60)}: {_ends(c.points, percent, over)}" for c in lines)
    legend = tuple((c.label, *mark(c.index)) for c in lines) if len(lines) > 1 else ()
    return Chart(title, _svg(figure, key, f"{title}. {said}."), legend, note)


def finals(title: str, rows: Sequence[tuple[str, Point]], key: str, *, percent: bool, note: str = "") -> Chart:
    """One bar a run, with its interval: who ends where."""
    figure, axes = _figure(22 + 37 * len(rows), left=1, right=44, bottom=6)
    top = max((max(p.value or 0.0, p.high or 0.0) for _, p in rows), default=1.0) or 1.0
    for i, (label, point) in enumerate(rows):
        colour, value = SERIES[i % len(SERIES)], point.value
        axes.text(0, i - 0.36, short(label, 62), va="center", color=INK)
        if value is None:
            axes.text(0, i + 0.1, "no number", va="center", color=MUTED)
            continue
        axes.barh(i + 0.1, value, height=0.42, color=colour, alpha=0.9, linewidth=0)
        if point.low is not None and point.high is not None:
            axes.plot([point.low, point.high], [i + 0.1] * 2, color=INK, linewidth=1.3, solid_capstyle="butt")
            for end in (point.low, point.high):
                axes.plot([end] * 2, [i + 0.01, i + 0.19], color=INK, linewidth=1.3)
        reach = max(value, point.high or 0.0)
        axes.text(reach + top * 0.015, i + 0.1, number(value, percent), va="center", color=INK, weight="bold")
    axes.set(xlim=(0, top), ylim=(len(rows) - 0.55, -0.62), xticks=[], yticks=[])
    axes.spines["bottom"].set_visible(False)
    said = "; ".join(f"{short(label, 60)}: {figure_of(point, percent)}" for label, point in rows)
    return Chart(title, _svg(figure, key, f"{title}. {said}."), (), note)


_SORTS = {
    "honest_admitted": ("honest, admitted", HONEST, 0.75, "o"),
    "honest_refused": ("honest, refused", HONEST, 0.3, "x"),
    "hostile_admitted": ("hostile, admitted", HOSTILE, 0.95, "o"),
    "hostile_refused": ("hostile, refused", HOSTILE, 0.35, "x"),
}


def _sort(sort: str, truth: bool) -> tuple[str, str, float, str]:
    label, colour, alpha, marker = _SORTS[sort]
    return (label if truth else label.partition(", ")[2], colour, alpha, marker)


def verdicts(title: str, rows: Sequence[Row], key: str, *, truth: bool) -> Chart:
    """Updates per round, stacked: who was let in, who was not."""
    figure, axes = _figure(196)
    x = np.array([row["round"] for row in rows], dtype=float)
    base = np.zeros(len(rows))
    legend = []
    for sort in _SORTS:
        layer = np.array([row[sort] for row in rows])
        if layer.any():
            label, colour, alpha, _ = _sort(sort, truth)
            _step(axes, x, base, base + layer, colour, alpha)
            legend.append((label, _CSS[colour], f"area:{alpha}"))
            base = base + layer
    axes.set_ylim(bottom=0)
    _rounds(axes)
    return Chart(title, _svg(figure, key, f"{title}, stacked by verdict."), tuple(legend))


def scatter(
    title: str,
    dots: Mapping[str, Sequence[tuple[int, float]]],
    key: str,
    *,
    truth: bool,
    logarithmic: bool = False,
    note: str = "",
) -> Chart:
    """A figure of each update: a dot for one admitted, a cross for one refused."""
    from matplotlib.ticker import LogLocator

    figure, axes = _figure(196)
    legend = []
    for sort, values in dots.items():
        label, colour, _, marker = _sort(sort, truth)
        x, y = zip(*values, strict=True)
        axes.plot(x, y, marker, color=colour, markersize=3 if marker == "o" else 4.5, markeredgewidth=1.1, alpha=0.75)
        legend.append((label, _CSS[colour], "dot" if marker == "o" else "cross"))
    if logarithmic:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 500 * low else (1.0,), numticks=9))
    axes.yaxis.set_major_formatter(lambda v, _: f"{v:g}")
    axes.minorticks_off()
    _rounds(axes)
    said = f"{title}, on a logarithmic scale." if logarithmic else f"{title}."
    return Chart(title, _svg(figure, key, said), tuple(legend), note)


def people(title: str, rows: Sequence[tuple[str, float, float | None]], key: str, *, percent: bool) -> Chart:
    """Each client's figure by its own model, the worst first, and by the shared one where that is another."""
    figure, axes = _figure(196)
    own, shared = [value for _, value, _ in rows], [other for *_, other in rows]
    places = range(1, len(rows) + 1)
    legend = [("its own model", _CSS[SERIES[0]], "dot")]
    if any(other is not None for other in shared):
        for x, a, b in zip(places, own, shared, strict=True):
            if b is not None:
                axes.plot([x, x], [a, b], color=MUTED, linewidth=0.8, alpha=0.6)
        axes.plot(places, shared, "x", color=SERIES[1], markersize=4.5, markeredgewidth=1.2)  # type: ignore[arg-type]
        legend.append(("the shared model", _CSS[SERIES[1]], "cross"))
    axes.plot(places, own, "o", color=SERIES[0], markersize=4)
    _rounds(axes, "clients, the worst served first")
    if percent:
        _percent(axes)
    said = f"{title}: from {number(own[0], percent)} for {short(rows[0][0], 40)} to {number(own[-1], percent)}."
    return Chart(title, _svg(figure, key, said), tuple(legend))


def grid(title: str, cells: Grid, key: str, *, truth: bool, note: str = "") -> Chart:
    """Clients down, rounds across: blue is weight in the model's update, orange is refused."""
    figure, axes = _figure(196, left=60)
    weight, refused = np.array(cells.weight), np.array(cells.refused)
    top = np.nanmax(weight, initial=0.0) or 1.0
    picture = np.zeros((*weight.shape, 4))
    used = weight > 0
    picture[used, :3] = _HONEST_RGB
    picture[used, 3] = 0.12 + 0.88 * np.sqrt(weight[used] / top)
    out = refused >= 0.5
    picture[out] = (*_HOSTILE_RGB, 0.9)
    _image(axes, picture, (cells.first - 0.5, cells.last + 0.5))
    rows = len(weight)
    if truth and 0 < cells.hostile < rows:
        axes.axhline(cells.hostile - 0.5, color=INK, linewidth=1)
        axes.set_yticks([(cells.hostile - 1) / 2, (cells.hostile + rows - 1) / 2], ["hostile", "honest"])
    else:
        axes.set_yticks([(rows - 1) / 2], [f"{cells.clients} clients"])
    _rounds(axes)
    legend = [("used; stronger: more weight", "rgb(51 135 209)", "area:0.9")]
    if out.any():
        legend.append(("refused", "rgb(224 102 31)", "area:0.9"))
    return Chart(title, _svg(figure, key, f"{title}: clients down, rounds across."), tuple(legend), note)


def holdings(
    title: str, histogram: Sequence[Sequence[int]], labels: Sequence[str], key: str, *, note: str = ""
) -> Chart:
    """Clients across, classes down: the deeper, the more examples (square root, the eye's own scale for areas)."""
    counts = np.array(histogram, dtype=float)
    classes = labels if len(labels) == counts.shape[1] else [str(i) for i in range(counts.shape[1])]
    figure, axes = _figure(min(196, 40 + 15 * len(classes)), left=44)
    wide = -(-len(counts) // CELLS)
    binned = np.stack([counts[i : i + wide].sum(0) for i in range(0, len(counts), wide)])
    picture = np.zeros((*binned.T.shape, 4))
    picture[..., :3] = _HONEST_RGB
    picture[..., 3] = np.sqrt(binned.T / (binned.max() or 1.0))
    _image(axes, picture, (0.5, len(counts) + 0.5))
    if len(classes) <= 12:
        axes.set_yticks(range(len(classes)), [short(name, 7) for name in classes])
    _rounds(axes, "client")
    return Chart(title, _svg(figure, key, f"{title}: clients across, {len(classes)} classes down."), (), note)


def stacked(title: str, x: Sequence[float], parts: Mapping[str, Sequence[float]], key: str, note: str = "") -> Chart:
    """Parts of a whole over rounds; past the fifth they are one."""
    names = list(parts)
    layers = {name: np.array(parts[name], dtype=float) for name in names[:5]}
    if len(names) > 5:
        layers["the rest"] = np.sum([parts[name] for name in names[5:]], axis=0)
    figure, axes = _figure(196)
    base = np.zeros(len(x))
    for i, layer in enumerate(layers.values()):
        _step(axes, np.array(x, dtype=float), base, base + layer, SERIES[i], 0.75)
        base = base + layer
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda v, _: f"{v:g} s")
    _rounds(axes)
    legend = tuple((name, _CSS[SERIES[i]], "area:0.75") for i, name in enumerate(layers))
    return Chart(title, _svg(figure, key, f"{title}, stacked by part."), legend, note)


def traffic(title: str, rows: Sequence[Row], key: str, note: str = "") -> Chart:
    """Bytes to and from the clients, per round."""
    figure, axes = _figure(196)
    x = [row["round"] for row in rows]
    for i, side in enumerate(("up", "down")):
        axes.plot(x, [row[side] for row in rows], color=SERIES[i], linestyle=DASHES[i], drawstyle="steps-mid")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda v, _: size(v))
    _rounds(axes)
    legend = (("from clients (up)", *mark(0)), ("to clients (down)", *mark(1)))
    said = ", ".join(f"{size(sum(row[side] for row in rows) / len(rows))} {side}" for side in ("up", "down"))
    return Chart(title, _svg(figure, key, f"{title}, on average {said}."), legend, note)


def mark(index: int) -> tuple[str, str]:
    """CSS colour and dash pattern of the series at an index: its line in a legend."""
    pattern = DASHES[index % len(DASHES)]
    lengths = "" if pattern == "-" else " ".join(f"{2 * length:g}" for length in pattern[1])
    return _CSS[SERIES[index % len(SERIES)]], f"line:{lengths}"


def _ends(points: Sequence[Point], percent: bool, over: str) -> str:
    if not points:
        return "no points"
    first, last = points[0], points[-1]
    at = (lambda x: f"round {x}") if over == "round" else _UNITS[over]
    return f"{number(first.value, percent)} at {at(first.round)}, {figure_of(last, percent)} at {at(last.round)}"


_UNITS: dict[str, Callable[[float], str]] = {"seconds": duration, "bytes": size}
_CLOCK = ((86400, "days"), (3600, "hours"), (60, "minutes"), (1, "seconds"))


def _unit(lines: Sequence[Curve], over: str) -> tuple[float, str]:
    """What an axis counts in, and its name: days, where there are two of them."""
    if over != "seconds":
        return 1, {"bytes": "bytes up and down"}.get(over, over)
    most = max((point.round for line in lines for point in line.points), default=0.0)
    seconds, name = next((unit for unit in _CLOCK if most >= 2 * unit[0]), _CLOCK[-1])
    return seconds, f"{name} by the federation's clock"


def _figure(height: float, left: float = 44, right: float = 10, bottom: float = 30) -> tuple[Figure, Axes]:
    """A figure and its axes; margins in points, so that the charts of a page line up."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH / 72, height / 72))
    box = (left / _WIDTH, bottom / height, 1 - (left + right) / _WIDTH, 1 - (bottom + 8) / height)
    return figure, figure.add_axes(box)


def _rounds(axes: Axes, name: str = "round") -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_xlabel(name, labelpad=2)
    axes.margins(x=0.015)


def _percent(axes: Axes) -> None:
    low, high = axes.get_ylim()
    axes.set_ylim(low if low > 0.5 else 0.0, min(1.0, high) if high <= 1.06 else high)
    axes.yaxis.set_major_formatter(lambda v, _: f"{100 * v:g}%")


def _step(axes: Axes, x: Any, low: Any, high: Any, colour: str, alpha: float) -> None:
    """A filled step of one path: as many bars as there are rounds would be as many paths."""
    if len(x) == 1:
        x, low, high = np.array([x[0] - 0.5, x[0] + 0.5]), np.repeat(low, 2), np.repeat(high, 2)
    axes.fill_between(x, low, high, step="mid", color=colour, alpha=alpha, linewidth=0)


def _image(axes: Axes, picture: Any, across: tuple[float, float]) -> None:
    rows = len(picture)
    extent = (*across, rows - 0.5, -0.5)
    axes.imshow((picture * 255).round().astype(np.uint8), aspect="auto", interpolation="none", extent=extent)
    axes.grid(visible=False)
    axes.set_yticks([])
    axes.spines[:].set_visible(True)


def _svg(figure: Figure, key: str, label: str) -> str:
    """The figure as an SVG element for a page: ids made unique by `key`, colours and fonts left to the page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<style.*?</style>", "", text[text.index("<svg") :], flags=re.S)
    view = re.search(r'viewBox="([^"]+)"', text)
    assert view is not None  # matplotlib writes one
    head = f'<svg class="chart" role="img" aria-label="{html.escape(short(label, 2000))}" viewBox="{view[1]}">'
    text = re.sub(r"<svg.*?>", lambda _: head, text, count=1, flags=re.S).replace("xlink:href", "href")
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', text))
    text = re.sub(r' id="([^"]+)"', lambda m: f' id="{key}-{m[1]}"' if m[1] in used else "", text)
    text = re.sub(r'(href="|url\()#', rf"\1#{key}-", text)
    text = re.sub(r'\b(d|x|y)="([^"]*)"', _rounded, text)
    text = re.sub(r' transform="rotate\(-?0 [^"]*"', "", text)
    text = re.sub(r"#01010\d|#0101c\d", lambda m: _CSS[m[0]], text)
    # Marks of one sort share one style: said once, around them.
    text = re.sub(r'(?:\s*<use [^>]*?style="[^"]*"/>)+', _shared, text)
    return re.sub(r"\n\s*", "\n", text).strip()


def _rounded(match: re.Match[str]) -> str:
    """Coordinates to a tenth of a point."""
    return match[1] + '="' + re.sub(r"(\.\d)\d+", r"\1", match[2]) + '"'


def _shared(match: re.Match[str]) -> str:
    runs: list[tuple[str, list[str]]] = []
    for mark, look in re.findall(r'(<use [^>]*?) style="([^"]*)"/>', match[0]):
        if not runs or runs[-1][0] != look:
            runs.append((look, []))
        runs[-1][1].append(mark + "/>")
    return "".join(f'\n<g style="{look}">' + "".join(marks) + "</g>" for look, marks in runs)
