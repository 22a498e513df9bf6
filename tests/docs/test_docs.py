"""The documentation is true: its blocks run, its generated parts are what the code says, its links lead somewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import play
import pytest

from fedkeel import demo

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINKED = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("page", [p for p in PAGES if any(block.language for block in play.blocks(p))], ids=name)
def test_the_blocks_of_a_page_do_what_it_says(page, tmp_path):
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    done = subprocess.run(
        [sys.executable, "-W", "error", play.__file__, str(page)],
        cwd=tmp_path,
        env={**os.environ, "PATH": path, "PYTHONWARNINGS": "error"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_a_file_that_a_page_writes_is_used_on_it(page):
    found = play.blocks(page)
    for at, block in enumerate(found):
        if block.title:
            stem = block.title.partition(".")[0]
            later = [b.text for b in found if b is not block and (b.language == "toml" or b in found[at:])]
            assert any(re.search(rf"\b{stem}\b", text) for text in later), f"line {block.line}: {block.title}"


def test_exempt_lines_are_no_way_around_the_test():
    block = play.Block("bash", None, "make demo\nfedkeel rules\npip install -e .\n", 1)
    assert play.commands(block) == "fedkeel rules"


def test_shown_output_is_compared():
    play.compare("accuracy 0.9... after\nreport: ...html", "x\naccuracy 0.93 after   \nreport: a/b.html\n", "here")
    with pytest.raises(play.UntrueError, match="but this was printed"):
        play.compare("accuracy 0.9... after", "accuracy 0.8 after", "here")


def test_the_generated_parts_are_up_to_date():
    tool = ROOT / "docs" / "generate.py"
    done = subprocess.run([sys.executable, str(tool), "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"run python docs/generate.py\n{done.stdout}{done.stderr}"
    assert "FieldInfo" not in (ROOT / "docs" / "reference" / "rules.md").read_text()


def test_the_demo_is_shown_as_it_is_now():
    text = (ROOT / "README.md").read_text()
    shown = text.partition("<!-- generated: demo -->")[2].partition("<!-- /generated -->")[0]
    for label in demo.VARIANTS:
        assert re.search(rf"^{re.escape(label)} +accuracy 0\.\d+", shown, re.MULTILINE), label
    assert (ROOT / "docs" / "images" / "report.png").stat().st_size < 300_000


def prose(page: Path) -> str:
    """A page without its code."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`", lambda found: re.sub(r"[\[\]()]", "", found[0]), text)


def anchors(page: Path) -> set[str]:
    """What GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.replace("\\", "")).lower().replace(" ", "-") for heading in headings}


def links(page: Path) -> list[tuple[str, str]]:
    """(path or nothing, anchor or nothing) of a page's links into the repository."""
    found = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    return [link.partition("#")[::2] for link in found if not re.match(r"https?:|mailto:", link)]


@pytest.mark.parametrize("page", LINKED, ids=name)
def test_links_lead_somewhere(page):
    for path, anchor in links(page):
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{path} does not exist"
        assert target.is_relative_to(ROOT), f"{path} is outside the repository"
        if anchor:
            assert anchor in anchors(target), f"{name(target)} has no heading #{anchor}"


def test_every_page_can_be_reached_from_the_readme():
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page not in reached:
            reached.add(page)
            targets = [(page.parent / path).resolve() for path, _ in links(page) if path.endswith(".md")]
            waiting += [t for t in targets if t.is_relative_to(ROOT)]
    missing = {name(p) for p in PAGES} - {name(p) for p in reached}
    assert not missing
