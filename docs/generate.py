#!/usr/bin/env python3
"""Write the parts of the documentation that the code itself tells, between `<!-- generated: NAME -->` marks.

python docs/generate.py            write them
python docs/generate.py --check    write nothing; exit 1 and name the pages that are out of date
python docs/generate.py --demo     also run the demo: its output in README.md, docs/images/report.png (chromium)
"""

from __future__ import annotations

import argparse
import inspect
import os
import re
import subprocess
import sys
import tempfile
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import typer.models
from pydantic import BaseModel

import fedkeel
from fedkeel import cli, testing
from fedkeel.config import Job
from fedkeel.core.registry import KINDS, Definition, definition, names, type_name
from fedkeel.deploy.folder import NodeFile, Peer, ServerFile
from fedkeel.round import wire
from fedkeel.template import _TOP

ROOT = Path(__file__).resolve().parents[1]
LINE = 100


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 when a page is out of date")
    parser.add_argument("--demo", action="store_true", help="also run the demo and take the picture of its report")
    chosen = parser.parse_args()
    stale = []
    for page, parts in PAGES.items():
        path = ROOT / page
        old = path.read_text(encoding="utf-8")
        new = old
        for name, make in parts.items():
            new = fill(new, name, make())
        if new != old:
            stale.append(page)
            if not chosen.check:
                path.write_text(new, encoding="utf-8")
    for page in stale:
        sys.stdout.write(f"{'out of date' if chosen.check else 'written'}: {page}\n")
    if chosen.demo:
        demo()
    return 1 if chosen.check and stale else 0


def fill(text: str, name: str, body: str) -> str:
    """The text with the part between the marks of `name` replaced."""
    start, end = f"<!-- generated: {name} -->", "<!-- /generated -->"
    before, found, rest = text.partition(start)
    if not found or end not in rest:
        raise SystemExit(f"a page lacks the marks '{start}' ... '{end}'")
    after = rest.partition(end)[2]
    return f"{before}{start}\n\n{body.strip(chr(10))}\n\n{end}{after}"


# -- Markdown


def table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    heads = list(heads)
    cells = ["| " + " | ".join(re.sub(r"(?<!\\)\|", r"\|", cell) for cell in row) + " |" for row in rows]
    return "\n".join(["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads), *cells])


def prose(doc: str) -> str:
    """A docstring as Markdown: outside `code` and indented blocks nothing is markup; a quoted term opens an item."""
    lines = []
    for line in doc.splitlines():
        if line.startswith("    "):
            lines.append(line)
            continue
        parts = re.split(r"(`[^`]*`)", line)
        parts[::2] = [re.sub(r"([*_<>\[\]|])", r"\\\1", part) for part in parts[::2]]
        lines.append(re.sub(r'^("\w+"[:;(])', r"- \1", "".join(parts)))
    return "\n".join(lines)


def code(value: object) -> str:
    return f"`{value}`"


# -- pages


def commands() -> str:
    """Every command: usage, help, arguments and options."""
    parts = []
    found = [("", registered) for registered in cli.app.registered_commands]
    for group in cli.app.registered_groups:
        assert group.typer_instance is not None
        found += [(f"{group.name} ", registered) for registered in group.typer_instance.registered_commands]
    for group_name, registered in found:
        function = registered.callback
        assert function is not None
        hints = typing.get_type_hints(function, include_extras=True)
        called_as = group_name + function.__name__
        rows, usage = [], [f"fedkeel {called_as}"]
        for name, spec in inspect.signature(function).parameters.items():
            base, info = typing.get_args(hints[name])
            shown, called = _argument(name, base, info, spec.default)
            usage.append(called)
            rows.append((code(shown), info.help or "", _default(spec.default, base)))
        text = f"## {called_as}\n\n{prose(inspect.getdoc(function) or '')}\n\n    {' '.join(usage)}\n\n"
        parts.append(text + table(("argument or option", "meaning", "default"), rows))
    return "\n\n".join(parts)


def _argument(name: str, base: Any, info: Any, default: Any) -> tuple[str, str]:
    """How an argument or option is shown in the table, and in the usage line."""
    many = "list" in str(base)
    if isinstance(info, typer.models.ArgumentInfo):
        shown = re.sub("IES$", "Y", name.upper())
        called = f"{shown} [{shown} ...]" if many else shown
        return shown, called if default is inspect.Parameter.empty else f"[{called}]"
    given = [d for d in (info.default, *(info.param_decls or ())) if isinstance(d, str)]
    option = given[0] if given else f"--{name}"
    plain = next((part for part in typing.get_args(base) if part in (int, str)), base)
    value = info.metavar or {"bool": "", "int": "N", "str": "TEXT"}.get(getattr(plain, "__name__", ""), "PATH")
    shown = f"{option} {value}".strip()
    return shown, shown if default is inspect.Parameter.empty else f"[{shown}]{' ...' if many else ''}"


def _default(default: Any, base: Any) -> str:
    if default is inspect.Parameter.empty:
        return "required"
    return "" if default is None or base is bool else code(default)


def deployment_files() -> str:
    """The keys of server.toml and node.toml."""
    parts = []
    for name, model in (("server.toml", ServerFile), ("node.toml", NodeFile), ("server.toml, [nodes.NAME]", Peer)):
        hints = typing.get_type_hints(model, include_extras=True)
        rows = [
            (code(k), type_name(hints[k]), "required" if f.is_required() else code(f.default), f.description or "")
            for k, f in model.model_fields.items()
        ]
        parts.append(f"## {name}\n\n" + table(("key", "type", "default", "meaning"), rows))
    return "\n\n".join(parts)


def keys() -> str:
    """Every key of the job file, by section."""
    top, sections = [], []
    hints = typing.get_type_hints(Job, include_extras=True)
    for key, info in Job.model_fields.items():
        if isinstance(info.default, BaseModel):
            sections.append((key, type(info.default)))
        else:
            top.append(_key(key, hints[key], info.default, info.description or _TOP.get(key, "")))
    heads = ("key", "type", "default", "meaning")
    parts = ["## Top level\n\n" + table(heads, top)]
    for name, model in sections:
        hints = typing.get_type_hints(model, include_extras=True)
        rows = [_key(k, hints[k], f.default, f.description or "") for k, f in model.model_fields.items()]
        parts.append(f"## \\[{name}\\]\n\n{prose(inspect.getdoc(model) or '')}\n\n{table(heads, rows)}")
    return "\n\n".join(parts)


def _key(key: str, hint: Any, default: Any, meaning: str) -> tuple[str, str, str, str]:
    kind = type_name(hint).removesuffix(" | None").replace("tuple[str, ...]", "list of str")
    if default is None:
        shown = "left out"
    elif isinstance(default, tuple):
        shown = code("[" + ", ".join(f'"{v}"' for v in default) + "]")
    else:
        shown = code(f'"{default}"' if isinstance(default, str) else default)
    return code(key), kind, shown, meaning


def rules() -> str:
    """Every rule that comes with fedkeel, by kind."""
    parts = []
    for kind, (contract, module) in KINDS.items():
        found = [definition(kind, name) for name in names(kind)]
        built_in = [d for d in found if f"{d.function.__module__}.".startswith(f"{module}.")]
        text = f"## {kind}\n\nContract: `{contract}`\n\n{prose(inspect.getdoc(sys.modules[module]) or '')}"
        parts += [text, *map(_rule, built_in)] if built_in else [f"{text}\n\nNone comes with this version."]
    return "\n\n".join(parts)


def _rule(found: Definition) -> str:
    rows = [
        (code(p.name), type_name(found.types[p.name]), "required" if p.default is p.empty else code(repr(p.default)))
        for p in found.parameters.values()
    ]
    parts = [f"### {found.signature}".replace("_", "\\_"), prose(found.doc)]
    if rows:
        parts.append(table(("parameter", "type", "default"), rows))
    if found.traits:
        parts.append("Traits: " + ", ".join(map(code, sorted(found.traits))) + ".")
    return "\n\n".join(parts)


def api() -> str:
    """Every public name of `fedkeel`, then the tools of `fedkeel.testing`."""
    public = {name: getattr(fedkeel, name) for name in fedkeel.__all__ if name != "__version__"}
    errors = {n: v for n, v in public.items() if inspect.isclass(v) and issubclass(v, Exception)}
    functions = {n: v for n, v in public.items() if inspect.isfunction(v)}
    classes = {n: v for n, v in public.items() if n not in errors and n not in functions}
    parts = ["## Functions", *(_callable("fedkeel", n, v) for n, v in functions.items())]
    parts += ["## Classes", *(_class(n, v) for n, v in classes.items())]
    rows = [(code(n), code(v.__bases__[0].__name__), prose(inspect.getdoc(v) or "")) for n, v in errors.items()]
    parts += ["## Exceptions", table(("exception", "is a", "meaning"), rows)]
    tools = {n: getattr(testing, n) for n in testing.__all__ if inspect.isfunction(getattr(testing, n))}
    parts += ["## fedkeel.testing", prose(inspect.getdoc(testing) or "")]
    return "\n\n".join([*parts, *(_callable("fedkeel.testing", n, v) for n, v in tools.items())])


def laws() -> str:
    """Every law, by kind and trait."""
    rows = []
    for kind, found in sorted(testing.LAWS.items()):
        rows += [(kind, trait or "every one", law.__name__.replace("_", " ")) for trait, law in found]
    return table(("kind", "of rules with the trait", "law"), rows)


class _Text:
    """Text that stands in a signature as it is."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def _signature(label: str, function: Callable[..., Any], *, wide: bool = False) -> str:
    signature = inspect.signature(function)
    shown = []
    for p in signature.parameters.values():
        plain = p.default is p.empty or p.default is None or isinstance(p.default, str | int | float | tuple)
        note = p.annotation if p.annotation is p.empty or not isinstance(p.annotation, str) else _Text(p.annotation)
        shown.append(p.replace(annotation=note, default=p.default if plain else _Text("...")))
    back = signature.return_annotation
    arrow = f" -> {back}" if isinstance(back, str) and back != "None" else ""
    if shown and shown[0].name == "self":
        shown = shown[1:]
    inside = str(signature.replace(parameters=shown, return_annotation=inspect.Signature.empty))
    text = f"{label}{inside}{arrow}"
    if len(text) > LINE and not wide:
        star = next((i for i, p in enumerate(shown) if p.kind is p.KEYWORD_ONLY), len(shown))
        lines = [*map(str, shown[:star]), *(["*"] if star < len(shown) else []), *map(str, shown[star:])]
        text = f"{label}(\n" + "".join(f"    {line},\n" for line in lines) + f"){arrow}"
    return text


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


def _callable(home: str, name: str, function: Callable[..., Any]) -> str:
    return f"### {home}.{name}\n\n{_indented(_signature(name, function))}\n\n{prose(inspect.getdoc(function) or '')}"


def _class(name: str, kind: Any) -> str:
    parts = [f"### fedkeel.{name}"]
    if inspect.isclass(kind):
        signature = "Job(**keys)" if kind is Job else _signature(name, kind)
        parts += [_indented(signature), prose(inspect.getdoc(kind) or "")]
        if kind is Job:
            parts.append('The keys are those of the [job file](job.md): `Job(rounds=5, data={"clients": 10})`.')
        rows = [row for key, member in vars(kind).items() if (row := _member(kind, key, member))]
        if rows:
            parts.append(table(("member", "meaning"), rows))
    else:
        parts.append(_indented(f"{name} = {kind}"))
    return "\n\n".join(parts)


def _member(kind: Any, name: str, member: Any) -> tuple[str, str] | None:
    if name.startswith(("_", "model_")):
        return None
    target = getattr(member, "fget", None) or getattr(member, "func", None) or getattr(member, "__func__", member)
    if not inspect.isfunction(target):
        return None
    doc = prose(" ".join((inspect.getdoc(target) or "").split()))
    if inspect.isfunction(member) or isinstance(member, classmethod):
        return code(" ".join(_signature(name, getattr(kind, name), wide=True).split())), doc
    return code(name), doc


def limits() -> str:
    rows = [
        ("header", f"{wire.MAX_HEADER:,} bytes"),
        ("each text in the header", f"{wire.MAX_NAME} bytes of UTF-8, not empty"),
        ("`metrics`", f"{wire.MAX_METRICS} finite numbers"),
        ("`labels`", f"{wire.MAX_LABELS:,} shares from 0 to 1"),
        ("each whole number", "0 to 2^63 - 1"),
        ("payload before zstd", "the codec's bound: for `float32` exactly 4 bytes a column"),
        ("payload on the wire", "that bound b, and what zstd may add: b + b/256 + 1024 bytes"),
    ]
    return table(("what", "at most"), rows)


def envelope() -> str:
    """A real envelope of two columns, byte by byte."""
    import torch

    from fedkeel.core.keys import Key
    from fedkeel.core.layout import Entry, Layout
    from fedkeel.core.types import Claims

    claims = Claims("anna", 7, 3, "ab" * 32, num_examples=120, steps=6, metrics={"loss": 0.5})
    codec = fedkeel.build("codec", "float32")
    layout = Layout((Entry("weight", (2,), "float32", "param", True),))
    payload = codec(layout).encode(torch.tensor([[1.0, -0.25]]), [Key.root(0)])[0]
    data = wire.seal(claims, repr(codec), payload)
    header = 40 + int.from_bytes(data[4:8], "little")
    parts = (("magic", 0, 4), ("header length", 4, 8), ("SHA-256 of the header", 8, 40), ("header", 40, header))
    lines = []
    for what, start, stop in (*parts, ("payload: 1.0, -0.25", header, len(data))):
        for at in range(start, stop, 16):
            row = data[at : min(at + 16, stop)]
            printable = "".join(chr(b) if 32 <= b < 127 else "." for b in row)
            lines.append(f"{at:4d}  {row.hex(' '):<47}  {printable:<16}  {what if at == start else ''}".rstrip())
    return _indented("\n".join(lines))


# -- the demo and its picture


def demo() -> None:
    """Run the demo; put what it prints into README.md and the picture of its report into docs/images."""
    with tempfile.TemporaryDirectory() as folder:
        run = [str(Path(sys.executable).with_name("fedkeel")), "demo"]
        done = subprocess.run(run, cwd=folder, check=True, stdout=subprocess.PIPE, text=True)
        readme = ROOT / "README.md"
        shown = f"```text\n{done.stdout.strip()}\n```"
        readme.write_text(fill(readme.read_text(encoding="utf-8"), "demo", shown), encoding="utf-8")
        picture(Path(folder, "runs", "demo", "report.html"), ROOT / "docs" / "images" / "report.png")


def picture(report: Path, out: Path) -> None:
    """The report's overview without its tables and details, at 1.5 pixels a pixel."""
    from PIL import Image, ImageChops

    page = report.with_name("overview.html")
    hidden = "<style>details, main > h2, .scroll { display: none }</style></head>"
    page.write_text(report.read_text(encoding="utf-8").replace("</head>", hidden), encoding="utf-8")
    raw = page.with_suffix(".png")
    flags = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --hide-scrollbars"
    flags += " --disable-component-update --disable-sync --force-device-scale-factor=1.5 --window-size=1000,2400"
    browser = os.environ.get("CHROMIUM", "chromium")
    profile = f"--user-data-dir={report.parent / 'profile'}"
    subprocess.run(
        [browser, *flags.split(), profile, f"--screenshot={raw}", page.as_uri()], check=True, capture_output=True
    )
    shot = Image.open(raw).convert("RGB")
    paper = Image.new("RGB", shot.size, shot.getpixel((0, shot.height - 1)))
    bottom = ImageChops.difference(shot, paper).getbbox()[3]
    shot.crop((0, 0, shot.width, bottom + 36)).quantize(128, dither=Image.Dither.NONE).save(out, optimize=True)


PAGES: dict[str, dict[str, Callable[[], str]]] = {
    "docs/reference/cli.md": {"commands": commands},
    "docs/reference/deployment.md": {"files": deployment_files},
    "docs/reference/job.md": {"keys": keys},
    "docs/reference/rules.md": {"rules": rules},
    "docs/reference/api.md": {"api": api, "laws": laws},
    "docs/reference/wire.md": {"limits": limits, "envelope": envelope},
}

if __name__ == "__main__":
    sys.exit(main())
