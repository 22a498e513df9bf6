"""The registry refuses what would otherwise be silently ignored, and says what to write instead."""

from __future__ import annotations

from typing import Annotated

import pytest
import torch
from pydantic import Field

import fedkeel
from fedkeel.core.errors import InputError
from fedkeel.core.registry import KINDS, RegistrationError, build, definition, names, parse, rule, type_name


@rule("mixer", "halved_for_tests", needs=lambda keep, scale: keep)
def halved(U, w, *, keep: Annotated[int, Field(ge=1)], scale: float = 0.5):
    """Scale the first rows.

    More words.
    """
    return scale * U[:keep], w[:keep]


def test_a_built_rule_carries_its_parameters():
    built = build("mixer", "halved_for_tests", keep=2)
    rows, weights = built(torch.ones(3, 4), torch.ones(3))
    assert rows.shape == (2, 4)
    assert rows.max() == 0.5
    assert weights.shape == (2,)
    assert built.needs == 2
    assert repr(built) == "halved_for_tests(keep=2, scale=0.5)"
    assert parse("mixer", repr(built)) == built
    assert definition("mixer", "halved_for_tests").summary == "Scale the first rows."


@pytest.mark.parametrize(
    ("kind", "text", "said"),
    [
        ("mixr", "x", "kind 'mixr' is unknown: did you mean 'mixer'"),
        ("mixer", "halved_for_test", "did you mean 'halved_for_tests'"),
        ("mixer", "halved_for_tests", "needs parameter 'keep': write halved_for_tests(keep, scale=0.5)"),
        ("mixer", "halved_for_tests(keep=2, sclae=1.0)", "no parameter 'sclae': did you mean 'scale'"),
        ("mixer", "halved_for_tests(keep=0)", "parameter 'keep' = 0 is not valid"),
        ("mixer", "halved_for_tests(keep='2')", "parameter 'keep' = '2' is not valid"),
        ("mixer", "halved_for_tests(keep=True)", "parameter 'keep' = True is not valid"),
        ("mixer", "halved_for_tests(keep=2.5)", "parameter 'keep' = 2.5 is not valid"),
        ("mixer", "halved_for_tests(2)", "cannot be read"),
        ("mixer", "halved_for_tests(keep=open('x'))", "cannot be read"),
        ("mixer", "halved_for_tests(**{'keep': 2})", "cannot be read"),
        ("mixer", "__import__('os').getcwd()", "cannot be read"),
        ("mixer", "", "cannot be read"),
        ("mixer", "(" * 10_000, "cannot be read"),
        ("codec", "float32(bits=3)", "takes no parameters"),
    ],
)
def test_a_wrong_rule_is_refused_with_the_remedy(kind, text, said):
    with pytest.raises(InputError) as error:
        parse(kind, text)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_an_integer_serves_where_a_float_is_wanted():
    assert build("mixer", "halved_for_tests", keep=1, scale=2).parameters["scale"] == 2.0


def test_a_taken_name_is_refused_even_before_the_built_in_rules_were_asked_for():
    with pytest.raises(RegistrationError, match="registered already"):

        @rule("codec")
        def float32():
            """Mine."""


def test_what_cannot_be_a_rule_is_refused():
    with pytest.raises(RegistrationError, match="type annotation"):

        @rule("mixer")
        def untyped(U, w, *, keep=1):
            """Something."""

    with pytest.raises(RegistrationError, match="docstring"):

        @rule("mixer")
        def silent(U, w):
            return U, w

    with pytest.raises(RegistrationError, match="did you mean 'reducer'"):
        rule("reducr")
    assert "untyped" not in names("mixer")


def test_every_kind_can_be_listed_and_every_rule_has_one_line_of_help():
    for kind in KINDS:
        for name in names(kind):
            found = definition(kind, name)
            assert found.summary.endswith((".", ":")), (kind, name)
            assert len(found.summary) < 140, (kind, name)


def test_types_read_well():
    found = definition("mixer", "halved_for_tests")
    assert type_name(found.types["keep"]) == "int >= 1"
    assert type_name(found.types["scale"]) == "float"
    assert type_name(definition("weigher", "multi_krum").types["m"]) == "int >= 1 | None"
    assert type_name(definition("model", "mlp").types["hidden"]) == "tuple[int >= 1, ...]"
    assert type_name(definition("source", "digits").types["test_fraction"]) == "float > 0, < 1"


def test_the_public_names_are_all_there():
    assert set(fedkeel.__all__) <= set(dir(fedkeel))
    for name in fedkeel.__all__:
        assert getattr(fedkeel, name) is not None
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = fedkeel.nothing_like_it
