"""The report: one page that needs nothing else, says what the record says, and is looked at in a real browser."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from urllib.parse import quote

import pytest
from made_up import record

from fedkeel.core.errors import InputError
from fedkeel.core.types import ClientRow, Refusal, RoundReport
from fedkeel.ship import report
from fedkeel.ship.rundir import RunDir

VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}


class Page(HTMLParser):
    """A page read strictly: every element that opens closes, in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text, self.open, self.tags = text, [], Counter()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.attributes: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.attributes.append((tag, dict(attrs)))
        for name, value in attrs:
            assert value is not None
            if name == "id":
                self.ids.append(value)
            if name in ("href", "src", "action", "data"):
                self.links.append(value)
            self.links += re.findall(r"url\(([^)]*)\)", value)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def prose(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[tuple[str, Path]]:
    root = tmp_path_factory.mktemp("runs")
    return [
        ("plain mean, no attack", record(root / "a", hostile=0, defended=False).path),
        ("plain mean, under attack", record(root / "b", defended=False).path),
        ("checks + trimmed mean, under attack", record(root / "c").path),
    ]


@pytest.fixture(scope="module")
def pages(runs, tmp_path_factory) -> dict[str, Path]:
    """A page of one run, of three, of a comparison, and of a run whose clients chose their names."""
    root = tmp_path_factory.mktemp("pages")
    evil = record(root / "evil", clients=12, hostile=3, rounds=4, names=EVIL)
    rows = [
        {"label": f"aggregate.reduce={name}", "seeds": 5, "mean": mean, "low": mean - 0.01, "high": mean + 0.02,
         "curves": [(r, mean * (1 - 0.9**r), mean * (1 - 0.9**r) - 0.01, mean) for r in range(40)]}
        for name, mean in (("mean", 0.41), ("median", 0.915), ("trimmed_mean(trim=2)", 0.931))
    ]  # fmt: skip
    return {
        "one": report.write(root / "one.html", [runs[2][1]]),
        "three": report.write(root / "three.html", runs),
        "evil": report.write(root / "evil.html", [(EVIL, evil.path), ("b", evil.path)], title=EVIL[:70]),
        "comparison": report.write_comparison(root / "comparison.html", rows, settings='name = "x"'),
    }


EVIL = "</svg><script src='//evil.example/x.js'>alert({})</script>\"'&amp;$x^2$\u202e\x00" + "w" * 200


@pytest.mark.parametrize("name", ["one", "three", "evil", "comparison"])
class TestEveryPage:
    def test_it_is_well_formed_and_stands_alone(self, pages, name):
        page = Page(pages[name].read_text())
        assert not {"script", "link", "iframe", "object", "embed", "form", "base"} & set(page.tags)
        assert not re.search(r"https?:|@import", page.text)
        assert all(link.startswith(("#", "data:image/png;base64,")) for link in page.links)
        assert not [key for _, attributes in page.attributes for key in attributes if key.startswith("on")]

    def test_its_ids_are_unique_and_its_references_lead_somewhere(self, pages, name):
        page = Page(pages[name].read_text())
        assert len(page.ids) == len(set(page.ids))
        assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)

    def test_its_charts_take_the_pages_colours_and_fonts(self, pages, name):
        text = pages[name].read_text()
        drawings = re.findall(r'<svg class="chart".*?</svg>', text, re.S)
        assert drawings
        for drawing in drawings:
            assert set(re.findall(r"(?:fill|stroke): ([^;\"]+)", drawing)) <= {
                "none", "var(--ink)", "var(--muted)", "var(--line)", *(f"var(--c{i})" for i in range(1, 7)),
            }  # fmt: skip
            assert "<text" in drawing
            assert len(drawing) < 60_000

    def test_it_is_told_to_those_who_do_not_see_it(self, pages, name):
        page = Page(pages[name].read_text())
        for tag, attributes in page.attributes:
            if tag == "svg":
                assert attributes.get("aria-hidden") == "true" or len(attributes["aria-label"] or "") > 20
            if tag == "th":
                assert attributes["scope"] in ("col", "row")
        assert page.tags["caption"] == page.tags["table"] > 0
        assert page.tags["h1"] == page.tags["main"] == page.tags["title"] == 1
        levels = [int(tag[1]) for tag, _ in page.attributes if re.fullmatch("h[1-6]", tag)]
        assert all(after - before <= 1 for before, after in pairwise(levels))


def test_the_same_record_is_the_same_page_whatever_matplotlib_is_set_to(runs, pages, tmp_path):
    import matplotlib

    with matplotlib.rc_context({"axes.facecolor": "red", "lines.linewidth": 9, "figure.dpi": 300}):
        before = dict(matplotlib.rcParams)
        report.write(tmp_path / "three.html", runs)
        assert dict(matplotlib.rcParams) == before
    assert (tmp_path / "three.html").read_text() == pages["three"].read_text()


def test_one_run_says_what_its_ledger_says(runs, pages):
    page = Page(pages["one"].read_text()).prose
    with RunDir(runs[2][1]).ledger(readonly=True) as ledger:
        updates, last = ledger.updates(), ledger.metrics("accuracy")[-1]
    judged = [u for u in updates if u["stage"] not in ("train", "transport", "late")]
    sent = [u for u in judged if u["hostile"]]
    refused = [u for u in sent if u["stage"]]
    assert (
        f"Accuracy {100 * last['value']:.1f}% ({100 * last['low']:.1f} to {100 * last['high']:.1f}%) after 30" in page
    )
    fate = f"{len(refused)} refused, {len(sent) - len(refused)} admitted."
    assert f"10 hostile clients sent {len(sent)} updates: {fate}" in page
    for rule in ("norm_bound", "finite", "norm_mad", "deadline"):
        of_rule = [u for u in updates if u["rule"] == rule]
        cells = f"{len(of_rule)} {sum(u['hostile'] for u in of_rule)} {len({u['client'] for u in of_rule})}"
        assert re.search(rf"(check|screen|transport) {rule} {cells} ", page)
    assert "12 of 650 columns are not finite" in page
    assert "95% interval" in page
    assert '[data] source = "digits"' in page
    assert "check finite, norm_bound(limit=3) reduce mean" in page
    assert str(runs[2][1]) in page


def test_several_runs_make_their_point_first(pages):
    page = Page(pages["three"].read_text())
    assert re.match("“checks .* mean, under attack” ends at 9.* accuracy, “plain mean, under attack” at", page.prose)
    assert "every one was admitted" in page.prose
    assert "No client was hostile" in page.prose
    assert page.tags["details"] == 3 + 2 * 3
    assert not [attributes for tag, attributes in page.attributes if tag == "details" and "open" in attributes]


def test_a_title_is_taken_as_it_is_given(runs, tmp_path):
    page = Page(report.write(tmp_path / "x.html", runs, title="Three <ways>").read_text())
    assert page.prose.startswith("Three <ways>")
    assert "“checks + trimmed mean, under attack” ends at" in page.prose


def test_names_that_clients_chose_are_text_and_short(pages):
    text = pages["evil"].read_text()
    assert "<script" not in text
    assert "\x00" not in text
    assert "w" * 150 not in text
    assert "\u202e" not in text
    assert "</svg><script src=" in Page(text).prose


def test_a_comparison_says_means_and_intervals(pages):
    page = Page(pages["comparison"].read_text()).prose
    assert "aggregate.reduce=median 5 91.5% 90.5 to 93.5% +50.5 points" in page
    assert "“aggregate.reduce=trimmed_mean(trim=2)” ends at 93.1% accuracy, “aggregate.reduce=mean” at 41.0%" in page


class TestOddRuns:
    def page(self, path: Path) -> Page:
        return Page(report.write(path / "report.html", [path]).read_text())

    def test_a_run_that_has_not_begun(self, tmp_path):
        run = RunDir.create(tmp_path / "x", "")
        run.ledger().close()
        page = self.page(run.path).prose
        assert "No evaluation after 0 rounds" in page
        assert "No update was judged" in page

    def test_a_run_of_one_round_without_truth_or_evaluation(self, tmp_path):
        run = RunDir.create(tmp_path / "x", "")
        rows = (ClientRow("a", None, 1.0, 0.0), ClientRow("b", Refusal("check", "finite", "NaN"), norm=math.inf))
        with run.ledger() as ledger:
            ledger.write_round(RoundReport(1, 1, 0.0, rows, skipped="1 row is too few"))
            ledger.write_metrics(1, 1, {"loss": math.nan})
        page = self.page(run.path)
        assert "Loss no number after 1 round. 1 of 2 updates were refused." in page.prose
        assert "1 (1 row is too few, first in round 1)" in page.prose
        assert "hostile" not in page.prose
        report.write(tmp_path / "two.html", [run.path, run.path])

    def test_a_run_in_which_every_client_fell_silent(self, tmp_path):
        run = RunDir.create(tmp_path / "x", "")
        rows = tuple(ClientRow(f"c{i}", Refusal("late", "deadline", "late")) for i in range(3))
        with run.ledger() as ledger:
            ledger.write_round(RoundReport(1, 0, 0.0, rows, epsilon=0.25), set())
        page = self.page(run.path).prose
        assert "No update was judged" in page
        assert "ε = 0.25" in page

    def test_a_large_one_stays_small(self, tmp_path):
        run = record(tmp_path / "x", clients=400, rounds=700, hostile=80, picked=12)
        text = report.write(tmp_path / "x.html", [run.path]).read_text()
        assert len(text) < 500_000
        assert all(len(svg) < 60_000 for svg in re.findall(r'<svg class="chart".*?</svg>', text, re.S))
        page = Page(text)
        assert page.tags["tr"] < 100
        assert "The first 25 of 400 clients" in page.prose
        assert "40 of 700 rounds, evenly spread" in page.prose

    def test_what_cannot_be_reported_is_a_sentence(self, tmp_path):
        with pytest.raises(InputError, match="at least one run"):
            report.write(tmp_path / "x.html", [])
        with pytest.raises(InputError, match="does not exist"):
            report.write(tmp_path / "x.html", [tmp_path / "nothing"])
        with pytest.raises(InputError, match="at least one row"):
            report.write_comparison(tmp_path / "x.html", [])


# Set in two frames, wide and as narrow as a phone, every part opened: how wide is what they hold?
PROBE = """<!DOCTYPE html><title>probe</title>
<iframe width="400" height="800" srcdoc="{page}"></iframe><iframe width="1200" height="800" srcdoc="{page}"></iframe>
<script>addEventListener("load", () => {{
  const said = [...document.querySelectorAll("iframe")].map(frame => {{
    const page = frame.contentDocument;
    page.querySelectorAll("details").forEach(part => part.open = true);
    const flat = [...page.querySelectorAll("svg.chart")].filter(svg => svg.getBoundingClientRect().height < 50).length;
    return page.documentElement.scrollWidth + "/" + page.documentElement.clientWidth + "/" + flat;
  }});
  document.title = "measured " + said.join(" ");
}});</script>"""


@pytest.mark.skipif(
    shutil.which("chromium") is None, reason="no chromium on PATH: the page is not looked at in a browser"
)
@pytest.mark.parametrize("name", ["three", "evil", "comparison"])
def test_a_browser_has_nothing_to_say_and_nothing_hangs_over(pages, tmp_path, name):
    import html

    probe = tmp_path / "probe.html"
    probe.write_text(PROBE.format(page=html.escape(pages[name].read_text())))
    command = [
        "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", "--enable-logging=stderr", "--virtual-time-budget=5000",
        f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", f"file://{quote(str(probe))}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    found = re.search(r"<title>measured (\d+)/(\d+)/0 (\d+)/(\d+)/0</title>", done.stdout)
    assert found, done.stderr
    narrow, room, wide, hall = map(int, found.groups())
    assert narrow <= room <= 400
    assert wide <= hall <= 1200
