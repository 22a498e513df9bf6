"""The command line of versions: `fedkeel model diff` and `fedkeel model check`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

if TYPE_CHECKING:
    from fedkeel.release.difference import Comparison

app = typer.Typer(
    help="What two versions of a model differ in, and whether that may be released.", no_args_is_help=True
)
_out = Console(highlight=False, soft_wrap=True)

_KINDS = "a run or model directory, a release (DIR/NAME@stage), card.json, .safetensors, .pt, .onnx, module.py:factory"
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs, and nothing else, on stdout.")]
_COLOURS = {"identical": "green", "patch": "green", "minor": "yellow", "major": "red"}


@app.command()
def diff(
    old: Annotated[str, typer.Argument(help=f"The model that others work with: {_KINDS}.")],
    new: Annotated[str, typer.Argument(help="The model that is to replace it, as OLD.")],
    as_json: AsJson = False,
) -> None:
    """Tell identical, patch, minor or major, with each difference."""
    _print(_compared(old, new), as_json)


@app.command()
def check(
    new: Annotated[str, typer.Argument(help=f"The model that is to be released: {_KINDS}.")],
    against: Annotated[str, typer.Option("--against", help="The model that others work with, as NEW.")],
    at_most: Annotated[
        str | None, typer.Option("--at-most", help="Refuse more than this: identical, patch or minor.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Exit with 1 where the declared version does not agree with the differences; without versions, where they break.

    For continuous integration.
    """
    from fedkeel.core.errors import InputError
    from fedkeel.release.difference import Level

    words = [level.word for level in Level]
    if at_most is not None and at_most not in words:
        raise InputError(f"--at-most '{at_most}' is no level: choose {', '.join(words[:-1])} or {words[-1]}")
    found = _compared(against, new)
    objection = found.objection
    declared = found.old.version is not None and found.new.version is not None
    most = Level[at_most.upper()] if at_most else Level.MAJOR if declared else Level.MINOR
    if objection is None and found.level > most:
        which = "as --at-most asks" if at_most else "and no version declares more"
        objection = f"the difference is {found.level.word}, at most {most.word} is let through {which}"
    _print(found, as_json, verdict=objection or "")
    if objection:
        raise typer.Exit(1)


def _compared(old: str, new: str) -> Comparison:
    from fedkeel.release.compare import compare
    from fedkeel.release.describe import describe

    return compare(describe(old), describe(new))


def _print(found: Comparison, as_json: bool, verdict: str | None = None) -> None:
    """`verdict`: why it is refused, '' where it is not, None where nobody asked."""
    if as_json:
        told = {} if verdict is None else {"passed": not verdict, "why": verdict or None}
        _out.print_json(json.dumps(found.to_dict() | told))
        return
    level = found.level.word
    names = (f"{escape(side.source)}{f' {side.version}' if side.version else ''}" for side in (found.old, found.new))
    _out.print(f"[{_COLOURS[level]}]{level}[/]: {' -> '.join(names)}")
    for one in found.differences:
        _out.print(f"  [{_COLOURS[one.level.word]}]{one.level.word:5}[/]  {escape(one.text)}")
    if found.untold:
        _out.print(f"  not compared, as one of the two does not tell it: {', '.join(found.untold)}")
    if verdict:
        _out.print(f"[red]refused:[/] {escape(verdict)}")
    elif verdict == "":
        _out.print("[green]passed[/]")
    elif found.objection:
        _out.print(f"[yellow]note:[/] {escape(found.objection)}")
