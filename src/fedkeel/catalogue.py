"""What rules exist, what they take and where they come from: read from the registry, for people and programs."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedkeel.core.errors import InputError, nearest
from fedkeel.core.registry import KINDS, Definition, definition, names, type_name


def describe(kind: str | None, name: str | None) -> Any:
    """Every kind; the rules of one kind; or one rule with its parameters and docstring."""
    if kind is None:
        return [{"kind": k, "contract": contract, "rules": list(names(k))} for k, (contract, _) in KINDS.items()]
    if kind not in KINDS:
        raise InputError(f"kind '{kind}' is unknown: {nearest(kind, KINDS)}")
    if name is None:
        return [_brief(definition(kind, n)) for n in names(kind)]
    found = definition(kind, name)
    parameters = [
        {
            "name": p.name,
            "type": type_name(found.types[p.name]),
            "required": p.default is p.empty,
            "default": None if p.default is p.empty else p.default,
        }
        for p in found.parameters.values()
    ]
    return {
        **_brief(found),
        "contract": KINDS[kind][0],
        "parameters": parameters,
        "traits": sorted(found.traits),
        "doc": found.doc,
    }


def _brief(found: Definition) -> dict[str, Any]:
    return {"name": found.name, "kind": found.kind, "signature": found.signature, "summary": found.summary}


def show(console: Console, found: Any, kind: str | None, name: str | None) -> None:
    """Print what `describe` found."""
    if kind is None:
        table = Table("kind", "contract", "rules", title="kinds of rule; more: fedkeel rules KIND [NAME]")
        for row in found:
            table.add_row(row["kind"], escape(row["contract"]), ", ".join(row["rules"]) or "-")
        console.print(table)
    elif name is None and not found:
        console.print(f"no {kind} is built in yet; write one: {escape(KINDS[kind][0])} under @fedkeel.rule({kind!r})")
    elif name is None:
        table = Table("rule", "what it does", title=f"{kind} {escape(KINDS[kind][0])}")
        for row in found:
            table.add_row(escape(row["signature"]), escape(row["summary"]))
        console.print(table)
    else:
        console.print(f"[bold]{escape(found['signature'])}[/]  ({kind})\n\n{escape(found['doc'])}")
        for p in found["parameters"]:
            default = "required" if p["required"] else f"default {p['default']!r}"
            console.print(f"\n  [bold]{p['name']}[/]: {escape(p['type'])}, {escape(default)}", end="")
        console.print(f"\n  traits: {', '.join(found['traits']) or 'none'}")
