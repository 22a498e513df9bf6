"""The page in a real browser: its figures are the ledger's, it keeps up, it can be used by keyboard and on a phone."""

from __future__ import annotations

import shutil
from contextlib import ExitStack

import pytest
import records

from fedkeel.core.types import ClientRow, Refusal

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install 'fedkeel[dev]'")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="needs a chromium on the PATH"),
    pytest.mark.xdist_group("browser"),
]
HOSTILE = "<img src=x onerror=\"document.title='taken'\">"


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as running:
        found = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def watched(tmp_path):
    """A ledger of twelve rounds with a hostile name in it, and the address of its dashboard."""
    devices = {f"client-{i:02}": "phone" if i % 2 else "board" for i in range(30)} | {HOSTILE: "phone"}
    with records.begin(tmp_path / "ledger.sqlite", devices) as ledger:
        for round in range(1, 13):
            write(ledger, round)
        with records.dashboard(tmp_path) as address:
            yield ledger, address


def write(ledger, round):
    rows = [
        ClientRow(f"client-{i:02}", None, weight=0.1, trust=1 + i / 20, staleness=i % 3, bytes_up=1000, bytes_down=500)
        for i in range(10)
    ]
    reason = "<script>document.title='taken'</script>"
    rows.append(ClientRow(HOSTILE, Refusal("screen", "cosine", reason), bytes_up=1000))
    rows.append(ClientRow("client-20", Refusal("transport", "gone", "no answer")))
    records.write(ledger, round, *rows, accuracy=0.4 + round / 40)
    for name in ("phone", "board"):
        ledger.write_metrics(round, round, {"accuracy": round / 30}, scope=f"class/{name}")


@pytest.fixture
def page(browser, watched):
    """The page, which must say nothing in the console."""
    context = browser.new_context(viewport={"width": 1200, "height": 900}, reduced_motion="reduce")
    opened = context.new_page()
    said = []
    opened.on("console", lambda message: said.append(message.text))
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.on("requestfailed", lambda request: said.append(f"failed: {request.url}"))
    opened.goto(watched[1])
    opened.wait_for_selector("#client-table tbody tr")
    yield opened
    assert said == []
    context.close()


def shows(page, selector, text):
    """Wait until an element says so."""
    playwright.expect(page.locator(selector)).to_contain_text(text, timeout=20_000)


def cards(page):
    return {
        card.query_selector(".name").inner_text(): card.query_selector(".figure").inner_text()
        for card in page.query_selector_all(".card")
    }


def test_the_figures_are_the_ledger_s(page, watched):
    ledger, _ = watched
    up, down = (sum(row[name] for row in ledger.rounds()) for name in ("bytes_up", "bytes_down"))
    assert cards(page) == {
        "Accuracy": "70.0%", "Loss": "1", "Clients heard of": "12", "Refused lately": "8.3%", "Age of updates": "0.9",
        "Traffic": f"{(up + down) / 1000:.3g} kB", "Privacy spent": "none",
    }  # fmt: skip
    assert page.inner_text("#job") == "watched"
    assert "round 12 of 100 closed" in page.inner_text("#status")
    assert "none spent" in page.inner_text("#privacy")
    rules = [row.inner_text().split("\t") for row in page.query_selector_all("#rules tbody tr")]
    assert [row[:5] for row in rules] == [
        ["screen", "refused", "cosine", "12", "1"],
        ["transport", "lost", "gone", "12", "1"],
    ]
    classes = {
        row.inner_text().split("\t")[0]: row.inner_text().split("\t")
        for row in page.query_selector_all("#classes tbody tr")
    }
    assert classes["phone"][1:4] == ["16", "6", "51.6%"]
    assert page.inner_text("#found") == "1 to 25 of 31"
    page.click("#model-charts summary")
    page.wait_for_selector("#model-charts figure:first-child tbody tr")  # drawn when it opens
    rows = page.query_selector_all("#model-charts figure:first-child tbody tr")
    assert rows[0].inner_text().split("\t") == ["12", "70.0% (68.0% to 72.0%)"]
    assert len(rows) == 12


def test_it_keeps_up(page, watched):
    ledger, _ = watched
    write(ledger, 13)
    shows(page, "#status-text", "round 13 of 100")
    assert cards(page)["Accuracy"] == "72.5%"
    ledger.rewind(5)
    shows(page, "#status-text", "round 5 of 100")
    assert cards(page)["Accuracy"] == "52.5%"


def test_names_and_reasons_are_text(page):
    first = page.query_selector("#client-table tbody tr")
    assert HOSTILE in first.inner_text()
    assert "<script>" in page.inner_text("#newest")
    assert page.evaluate("document.querySelectorAll('main img, main script').length") == 0
    assert page.title() == "12 · watched · fedkeel"


def test_by_keyboard_alone(page):
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the figures"
    reached = []
    for _ in range(60):
        page.keyboard.press("Tab")
        found = page.evaluate(
            "(() => { const e = document.activeElement; return [e.tagName, "
            "e.closest('th') ? e.textContent : e.className, getComputedStyle(e).outlineStyle] })()"
        )
        reached.append(found)
        if found[:2] == ["BUTTON", "Trust"]:
            break
    assert reached[-1][:2] == ["BUTTON", "Trust"]
    assert all(outline != "none" for tag, _, outline in reached if tag in ("BUTTON", "A", "DIV"))
    page.keyboard.press("Enter")
    page.wait_for_selector("th[aria-sort=descending] button:text('Trust')")
    shows(page, "#client-table tbody tr:first-child th", "client-09")
    page.keyboard.press("Space")
    page.wait_for_selector("th[aria-sort=ascending] button:text('Trust')")
    page.focus("#model-charts .plot")
    page.keyboard.press("Home")
    assert page.inner_text("#model-charts .readout").startswith("Round 1: 42.5% (40.5% to 44.5%)")
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#model-charts .readout").startswith("Round 2: 45.0%")


def test_clients_are_found(page):
    page.fill("#search", "client-1")
    shows(page, "#found", "1 to 10 of 10")
    page.fill("#search", "nobody")
    shows(page, "#found", "No client")
    page.fill("#search", "")
    shows(page, "#found", "1 to 25 of 31")
    page.click("#after")
    shows(page, "#found", "26 to 31 of 31")
    assert page.is_disabled("#after")


def test_over_time(page):
    page.check("input[value=time]")
    assert "federation's clock" in page.inner_text("#model-charts .plot")
    page.focus("#model-charts .plot")
    page.keyboard.press("End")
    assert page.inner_text("#model-charts .readout").startswith("At 24 s: 70.0%")


def test_on_a_phone(page):
    page.set_viewport_size({"width": 390, "height": 844})
    page.wait_for_timeout(300)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    narrow = page.evaluate("[...document.querySelectorAll('svg.chart')].map(s => s.getBoundingClientRect().right)")
    assert narrow
    assert all(right <= 390 for right in narrow)


def test_light_and_dark(page):
    ground = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(ground) == "rgb(255, 255, 255)"
    page.emulate_media(color_scheme="dark")
    assert page.evaluate(ground) == "rgb(17, 22, 28)"
    page.click("#theme")
    assert page.evaluate(ground) == "rgb(255, 255, 255)"
    page.reload()
    page.wait_for_selector("#client-table tbody tr")
    assert page.evaluate(ground) == "rgb(255, 255, 255)"


def test_before_the_first_round_and_when_the_server_is_gone(browser, tmp_path):
    opened = browser.new_page()
    with records.dashboard(tmp_path) as address:
        opened.goto(address)
        opened.wait_for_selector("#empty-title:text('There is no ledger yet')")
        with records.begin(tmp_path / "ledger.sqlite") as ledger:
            opened.wait_for_selector("#empty-title:text('No round has closed yet')")
            assert opened.is_hidden("#content")
            records.write(ledger, 1)
            opened.wait_for_selector("#content", state="visible")
            ledger._db.execute("UPDATE rounds SET wall = wall - 600")
            shows(opened, "#status", "No news for 10 min")
    shows(opened, "#status", "Out of reach")
    opened.close()


def test_the_page_of_another_machine(browser, tmp_path):
    opened = browser.new_page()
    with records.begin(tmp_path / "ledger.sqlite") as ledger, ExitStack() as stack:
        with records.dashboard(tmp_path) as there:
            records.write(ledger, 1, accuracy=0.5)
            opened.goto(stack.enter_context(records.dashboard(there)))
            opened.wait_for_selector("#client-table tbody tr")
            records.write(ledger, 2, accuracy=0.75)
            shows(opened, "#status", "round 2 of 100")
            assert cards(opened)["Accuracy"] == "75.0%"
        shows(opened, "#status", f"Out of reach {there.rstrip('/')} does not answer")
        records.write(ledger, 3, accuracy=0.875)
        with records.dashboard(tmp_path, "--port", there.rstrip("/").rpartition(":")[2]):
            shows(opened, "#status", "round 3 of 100")
            assert cards(opened)["Accuracy"] == "87.5%"
    opened.close()
