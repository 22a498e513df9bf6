"""Small registered functions: one decorator line makes a rule known to config, CLI and the law tests.

A rule's positional arguments are the contract of its kind; its keyword-only parameters are its config schema;
the first line of its docstring is its CLI help. In text (job files, `--set`, `--vary`, reports) a rule is written
as a call: `trimmed_mean(trim=2)`.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from pydantic import TypeAdapter, ValidationError

from fedkeel.core.errors import FedkeelError, InputError, nearest

KINDS: dict[str, tuple[str, str]] = {
    # kind: (contract, module that holds the built-in rules)
    "selector": ("(candidates, count, round, key) -> positions", "fedkeel.rules.select"),
    "correction": ("(g, theta, theta0, c_i, c) -> g", "fedkeel.rules.local"),
    "objective": ("(local) -> (losses to descend, losses (B,) to report)", "fedkeel.rules.objective"),
    "optimiser": ("(theta, g, slots, t, lr) -> None, in place", "fedkeel.rules.optimiser"),
    "stopping": ("(num_examples, batch_size, losses) -> steps wanted in all", "fedkeel.rules.stop"),
    "interval": ("(factor, cosine, before, loss) -> factor of the steps", "fedkeel.rules.interval"),
    "rate": ("(round, rounds) -> factor of the learning rate", "fedkeel.rules.rate"),
    "row_transform": ("(U, keys, memory) -> (U, memory)", "fedkeel.rules.rows"),
    "codec": ("(layout) -> Codec", "fedkeel.rules.codec"),
    "check": ("(update, door) -> reason or None", "fedkeel.rules.check"),
    "screen": ("(cohort, state) -> {row: (reason, score)}", "fedkeel.rules.screen"),
    "weigher": ("(cohort, state) -> (n,)", "fedkeel.rules.weigh"),
    "mixer": ("(U, w, key) -> (U, w); with trait by_steps (U, w, key, tau, params)", "fedkeel.rules.mix"),
    "reducer": ("(U, w) -> (P,)", "fedkeel.rules.reduce"),
    "contribution": ("(cohort, w, state) -> (n,)", "fedkeel.rules.contribution"),
    "server_optimiser": ("(theta, d, s, share) -> (theta, s)", "fedkeel.rules.server_opt"),
    "mechanism": ("() -> Mechanism", "fedkeel.rules.mechanism"),
    "attack": ("(U, bad, keys) -> rows (f, P), with trait rows; or on claims, data", "fedkeel.rules.attack"),
    "scheduler": ("(view) -> decision", "fedkeel.rules.schedule"),
    "availability": ("(names, key) -> Availability", "fedkeel.world.availability"),
    "source": ("(key) -> Pool", "fedkeel.world.sources"),
    "partition": ("(pool, clients, key) -> Split", "fedkeel.world.partitions"),
    "model": ("(inputs, classes) -> nn.Module", "fedkeel.world.models"),
    "gate": ("(evidence) -> Finding", "fedkeel.gate.rules"),
    "loss": ("(output, target) -> (B,)", "fedkeel.train.losses"),
}


class RegistrationError(FedkeelError):
    """A rule cannot be registered as it is written."""


@dataclass(frozen=True, slots=True)
class Definition:
    """What is registered: the function, its parameters' types and defaults, and what it needs.

    `needs(**parameters) -> int` is the least number of rows (for a partition: examples per client) the rule is
    defined for; `leaves(rows, **parameters) -> int` is how many of so many rows it leaves with a weight above 0.
    `init` makes the first state of a stateful rule. `traits` name the laws the rule claims beyond those
    of its kind. `hooks` are the other functions that a kind may ask for; they take the rule's parameters as well.
    """

    kind: str
    name: str
    function: Callable[..., Any]
    parameters: Mapping[str, inspect.Parameter]
    types: Mapping[str, Any]
    needs: Callable[..., int] | None
    leaves: Callable[..., int] | None
    init: Callable[..., Any] | None
    traits: frozenset[str]
    hooks: Mapping[str, Callable[..., Any]] = field(default_factory=dict)

    @property
    def doc(self) -> str:
        return inspect.cleandoc(self.function.__doc__ or "")

    @property
    def summary(self) -> str:
        return self.doc.partition("\n")[0]

    @property
    def signature(self) -> str:
        """As a user writes it: `krum(f, m=1)`."""
        shown = [p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in self.parameters.values()]
        return f"{self.name}({', '.join(shown)})" if shown else self.name


@dataclass(frozen=True, slots=True)
class Rule:
    """A registered function with its parameters bound; calling it applies the contract of its kind."""

    definition: Definition
    parameters: Mapping[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        return self.definition.kind

    @property
    def name(self) -> str:
        return self.definition.name

    @property
    def needs(self) -> int:
        """The least number of rows this rule is defined for, with these parameters."""
        return 1 if self.definition.needs is None else self.definition.needs(**self.parameters)

    def leaves(self, rows: int) -> int:
        """How many of so many rows are left for the rules that come after it, with these parameters."""
        return rows if self.definition.leaves is None else self.definition.leaves(rows, **self.parameters)

    def init(self, *args: Any) -> Any:
        """The first state of a stateful rule; an empty state for a stateless one."""
        return {} if self.definition.init is None else self.definition.init(*args, **self.parameters)

    def reads(self, trait: str) -> bool:
        """Whether a correction is called with what the trait names; with a shift it is not, as the shift tells it."""
        return trait in self.definition.traits and "shift" not in self.definition.hooks

    def hook(self, name: str) -> Callable[..., Any] | None:
        """One of the rule's other functions, its parameters bound; None where it has none of that name."""
        found = self.definition.hooks.get(name)
        return None if found is None else partial(found, **self.parameters)

    def __call__(self, *args: Any) -> Any:
        return self.definition.function(*args, **self.parameters)

    def __repr__(self) -> str:
        if not self.parameters:
            return self.name
        return f"{self.name}({', '.join(f'{k}={v!r}' for k, v in self.parameters.items())})"

    def __hash__(self) -> int:
        return hash((self.kind, repr(self)))


_rules: dict[str, dict[str, Definition]] = {kind: {} for kind in KINDS}
_loaded: set[str] = set()


def rule(
    kind: str,
    name: str | None = None,
    *,
    needs: Callable[..., int] | None = None,
    leaves: Callable[..., int] | None = None,
    init: Callable[..., Any] | None = None,
    traits: tuple[str, ...] = (),
    hooks: Mapping[str, Callable[..., Any]] | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated function as a rule of `kind`, under its own name or `name`.

    Raises `RegistrationError` for an unknown kind, a name that is taken, a parameter without a type, a missing
    docstring.
    """
    if kind not in KINDS:
        raise RegistrationError(f"kind '{kind}' is unknown: {nearest(kind, KINDS)}")

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        label = name or function.__name__
        _load(kind, registering=function.__module__)
        known = _rules[kind].get(label)
        again = known is not None and (known.function.__module__, known.function.__qualname__) == (
            function.__module__,
            function.__qualname__,
        )  # a notebook cell that is run once more
        if known is not None and not (again and not function.__module__.startswith("fedkeel.")):
            raise RegistrationError(f"{kind} '{label}' is registered already: choose another name")
        signature = inspect.signature(function)
        parameters = {p.name: p for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY}
        hints = {p.name: _annotation(function, p, f"{kind} '{label}'") for p in parameters.values()}
        if not function.__doc__:
            raise RegistrationError(f"{kind} '{label}' needs a docstring: its first line is the help users read")
        if kind == "attack" and len({"rows", "claims", "data"} & set(traits)) != 1:
            raise RegistrationError(
                f"attack '{label}' must have one trait of 'rows', 'claims', 'data': what it acts on"
            )
        _rules[kind][label] = Definition(
            kind, label, function, parameters, hints, needs, leaves, init, frozenset(traits), dict(hooks or {})
        )
        return function

    return register


def _annotation(function: Callable[..., Any], parameter: inspect.Parameter, where: str) -> Any:
    """The type of a parameter; only these are evaluated, so the contract's types need not be importable."""
    hint = parameter.annotation
    if hint is parameter.empty:
        raise RegistrationError(f"{where}: parameter '{parameter.name}' needs a type annotation")
    if isinstance(hint, str):  # from __future__ import annotations
        try:
            return eval(hint, function.__globals__, inspect.getclosurevars(function).nonlocals)
        except Exception as error:
            raise RegistrationError(f"{where}: the type of parameter '{parameter.name}' is unknown: {error}") from None
    return hint


def names(kind: str) -> tuple[str, ...]:
    """The registered names of a kind, sorted."""
    if kind not in KINDS:
        raise InputError(f"kind '{kind}' is unknown: {nearest(kind, KINDS)}")
    _load(kind)
    return tuple(sorted(_rules[kind]))


def definition(kind: str, name: str) -> Definition:
    """The definition behind a name, or an `InputError` naming the nearest one."""
    known = names(kind)
    if name not in known:
        elsewhere = [other for other, rules in _rules.items() if name in rules]
        hint = f"it is a {elsewhere[0]}" if elsewhere else nearest(name, known)
        raise InputError(f"{kind} '{name}' is unknown: {hint}")
    return _rules[kind][name]


def build(kind: str, name: str, /, **parameters: Any) -> Rule:
    """The rule with its parameters bound: `build("reducer", "trimmed_mean", trim=2)(U, w)`.

    Raises `InputError` naming the parameter, its value and the remedy.
    """
    found = definition(kind, name)
    where = f"{kind} '{name}'"
    for parameter in parameters:
        if parameter not in found.parameters:
            remedy = nearest(parameter, found.parameters) if found.parameters else "it takes no parameters"
            raise InputError(f"{where} has no parameter '{parameter}': {remedy}")
    bound: dict[str, Any] = {}
    for parameter, spec in found.parameters.items():
        if parameter not in parameters:
            if spec.default is spec.empty:
                raise InputError(f"{where} needs parameter '{parameter}': write {found.signature}")
            bound[parameter] = spec.default
            continue
        value = parameters[parameter]
        if isinstance(value, list) and "tuple" in str(found.types[parameter]).lower():
            value = tuple(value)
        try:
            bound[parameter] = TypeAdapter(found.types[parameter]).validate_python(value, strict=True)
        except ValidationError as error:
            problem = error.errors()[0]["msg"]
            raise InputError(f"{where}: parameter '{parameter}' = {value!r} is not valid: {problem}") from None
    return Rule(found, bound)


def parse(kind: str, text: str) -> Rule:
    """The rule a user wrote as text: `"trimmed_mean(trim=2)"` or `"mean"`."""
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        if isinstance(tree, ast.Name):
            return build(kind, tree.id)
        if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name) and not tree.args:
            pairs = {k.arg: ast.literal_eval(k.value) for k in tree.keywords if k.arg is not None}
            if len(pairs) == len(tree.keywords):
                return build(kind, tree.func.id, **pairs)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        pass
    raise InputError(f"{kind} {text!r} cannot be read: write a name, or name(parameter=value, ...)")


def _load(kind: str, registering: str = "") -> None:
    """Import the built-in rules of a kind, once; a user's rule may not take a built-in name by coming first."""
    module = KINDS[kind][1]
    if kind in _loaded or registering == module:
        return
    _loaded.add(kind)
    importlib.import_module(module)


def require_once(kept: Sequence[str]) -> None:
    """Refuse two rules that would keep things under one name. Raises `InputError`."""
    if twice := [name for name in kept if kept.count(name) > 1]:
        raise InputError(f"'{twice[0]}' is written twice, and the two would share what they keep: write it once")


def type_name(annotation: Any) -> str:
    """How a parameter's type reads in help: `int >= 1`, `float > 0, < 1`, `tuple[int, ...]`, `'row' | 'tensor'`."""
    if typing.get_origin(annotation) is typing.Annotated:
        base, *marks = typing.get_args(annotation)
        bounds = [
            f"{sign} {getattr(mark, attribute):g}"
            for info in marks
            for mark in getattr(info, "metadata", [info])
            for attribute, sign in (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))
            if hasattr(mark, attribute)
        ]
        return " ".join([type_name(base), ", ".join(bounds)]).strip()
    parts = typing.get_args(annotation)
    if typing.get_origin(annotation) is typing.Literal:
        return " | ".join(map(repr, parts))
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return " | ".join(map(type_name, parts))
    if annotation in (types.NoneType, ...):
        return "..." if annotation is ... else "None"
    if isinstance(annotation, type | types.GenericAlias):
        return annotation.__name__ + (f"[{', '.join(map(type_name, parts))}]" if parts else "")
    return str(annotation).replace("typing.", "")
