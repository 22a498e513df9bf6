"""One exception tree. A refusal of an update is data, not an exception (architecture, idea 3)."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class FedkeelError(Exception):
    """Base of every exception that fedkeel raises on purpose."""


class InputError(FedkeelError):
    """What the user wrote is wrong: one sentence with the field, the value and the remedy. The CLI exits with 2."""


class DecodeError(FedkeelError):
    """These bytes are no update envelope, or not one that this federation may open."""


class CohortError(FedkeelError):
    """Too few admitted rows for a rule. The round is skipped and the model kept."""


class RunError(FedkeelError):
    """A run that started could not go on. The CLI exits with 1."""


class InterruptedRunError(FedkeelError, KeyboardInterrupt):
    """The user stopped a run; the message says how to go on. The CLI exits with 130."""


def nearest(name: str, known: Iterable[str]) -> str:
    """The remedy for an unknown name: the nearest known one, or all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"did you mean '{close[0]}'?"
    return f"known: {', '.join(names)}" if names else "none is registered; a plugin could"


@contextmanager
def needs_extra(extra: str, what: str) -> Iterator[None]:
    """Imports inside need `pip install "fedkeel[extra]"`: raises `InputError` saying so for `what`."""
    try:
        yield
    except ImportError as error:
        raise InputError(f'{what} needs {error.name}: pip install "fedkeel[{extra}]"') from None
