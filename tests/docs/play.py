"""Run the fenced blocks of one Markdown page in order, in the current directory, as its reader would.

`python -W error play.py PAGE.md`. Python blocks share one namespace; bash blocks run by themselves; a `text` block is
what the block before it prints (`...` stands for anything); `toml` blocks are jobs, or a registry's
`gate.toml`; of a `yaml` block, a workflow, the steps are run. A block with `title="FILE"` is
that file, and is written, not run. A fence without a language is a drawing.
"""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

EXEMPT = ("git clone ", "cd fedkeel", "make ", "pip install ")
"""Lines of bash blocks that are not run: what a reader does once, on the way to an installed fedkeel."""

_FENCE = re.compile(r"^```(\w*) ?(.*)\n((?:.*\n)*?)^```$", re.MULTILINE)
_GENERATED = re.compile(r"<!-- generated: \w+ -->.*?<!-- /generated -->", re.DOTALL)


class UntrueError(Exception):
    """A page says what is not so, or what nobody can check."""


@dataclass(frozen=True)
class Block:
    language: str
    title: str | None
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page; what `docs/generate.py` writes is not among them."""
    text = _GENERATED.sub(lambda found: "\n" * found[0].count("\n"), page.read_text(encoding="utf-8"))
    found = []
    for fence in _FENCE.finditer(text):
        language, info, body = fence.groups()
        title = re.fullmatch(r'title="([\w.-]+)"', info)
        if language not in ("", "python", "bash", "toml", "text", "yaml") or (info and not title):
            raise UntrueError(f"{page.name}: a fence opens with '{language} {info}': nobody would check it")
        found.append(Block(language, title[1] if title else None, body, text.count("\n", 0, fence.start()) + 2))
    if len(found) * 2 != len(re.findall("```", text)):
        raise UntrueError(f"{page.name}: a fence is indented, or not closed: nobody would check it")
    return found


def commands(block: Block) -> str:
    """A bash block without its exempt lines."""
    return "\n".join(line for line in block.text.splitlines() if not line.startswith(EXEMPT))


def play(page: Path) -> None:
    """Run every block. Raises, with the page's line in the traceback, at the first that does not do what it says."""
    space: dict[str, Any] = {"__name__": "__main__"}
    printed: str | None = None
    for block in blocks(page):
        where = f"{page.name}, line {block.line}"
        if block.title:
            Path(block.title).write_text(block.text, encoding="utf-8")
        if block.language == "text":
            if printed is None:
                raise UntrueError(f"{where}: this is the output of nothing that is run")
            compare(block.text, printed, where)
            printed = None
        elif block.language == "toml":
            (check_gate if block.title == "gate.toml" else check_job)(block.text, where)
        elif block.language == "yaml":
            for job in yaml.safe_load(block.text)["jobs"].values():
                for step in job["steps"]:
                    if "run" in step:
                        script = commands(Block("bash", None, step["run"], block.line))
                        subprocess.run(["bash", "-euo", "pipefail", "-c", script], check=True)
        elif block.title:
            compile(block.text, block.title, "exec")
        elif block.language == "python":
            stream = io.StringIO()
            program = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
            with contextlib.redirect_stdout(stream):
                exec(program, space)
            printed = stream.getvalue()
        elif block.language == "bash" and (script := commands(block).strip()):
            run = ["bash", "-euo", "pipefail", "-c", script]
            done = subprocess.run(run, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
            if done.returncode:
                raise UntrueError(f"{where}: exit code {done.returncode}\n{done.stdout}")
            printed = done.stdout


def compare(shown: str, printed: str, where: str) -> None:
    """What a page shows must be in what was printed, line ends aside."""
    wanted = r"\s*\n".join(re.escape(line.rstrip()) for line in shown.strip().splitlines())
    if not re.search(wanted.replace(re.escape("..."), ".*?"), printed, re.DOTALL):
        raise UntrueError(f"{where}: the page shows\n{shown}\nbut this was printed\n{printed}")


def check_job(text: str, where: str) -> None:
    """A job whose rules exist; those of plugins are met when the job is run."""
    from fedkeel import Job
    from fedkeel.world.federation import build_plan, build_work

    job = Job(**tomllib.loads(text))
    if not job.plugins:
        build_plan(job)
        build_work(job)
        for key, kind in (("data.source", "source"), ("data.partition", "partition"), ("model.build", "model")):
            job.rule(key, kind)


def check_gate(text: str, where: str) -> None:
    """What a registry asks; its rules are met when something is published."""
    from fedkeel.gate.policy import Policy

    Policy.model_validate(tomllib.loads(text))


if __name__ == "__main__":
    sys.path[0] = ""  # as for a reader who types python
    play(Path(sys.argv[1]))
