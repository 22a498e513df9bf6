"""Every class of difference between two versions is found and classed, and nothing else is held against a model."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedkeel.release.compare import compare
from fedkeel.release.contract import Contract
from fedkeel.release.difference import Level
from fedkeel.ship.card import Feature, Inputs, Lineage, ModelCard, Outputs, Parameter

AGE = Feature(name="age", unit="a", low=0.0, high=120.0)
DOSE = Feature(name="dose", unit="mg", low=0.0)
SMOKER = Feature(name="smoker", default=0.0)
TABLE = Inputs(shape=(3,), dtype="float32", normalisation="none", features=(AGE, DOSE, SMOKER))


def parameters(features: int = 3, labels: int = 2) -> tuple[Parameter, ...]:
    return (
        Parameter(name="fc1.weight", shape=(16, features), dtype="float32"),
        Parameter(name="fc1.bias", shape=(16,), dtype="float32"),
        Parameter(name="head.weight", shape=(labels, 16), dtype="float32"),
        Parameter(name="head.bias", shape=(labels,), dtype="float32"),
    )


def made(**changes: Any) -> Contract:
    """A table's classifier as the contract of its card, changed."""
    fields: dict[str, Any] = {
        "version": "1.2.0",
        "parameters": parameters(),
        "layout_digest": "a" * 64,
        "inputs": (TABLE,),
        "outputs": (Outputs(shape=(2,), dtype="float32"),),
        "labels": ("ill", "well"),
        "preprocessing": "b" * 64,
        "network": "mlp(hidden=(16,))",
        "lineage": Lineage(job="j", rounds=3, recipe="mean", fingerprint="c" * 64),
    }
    return Contract.of(ModelCard(**fields | changes), "made")


def features(*items: Feature) -> dict[str, Any]:
    """Another table, with the first layer that goes with it."""
    table = TABLE.model_copy(update={"features": items, "shape": (len(items),)})
    return {"inputs": (table,), "parameters": parameters(features=len(items)), "layout_digest": "d" * 64}


def feature(**changes: Any) -> dict[str, Any]:
    """The dose, changed, in its place."""
    return {"inputs": (TABLE.model_copy(update={"features": (AGE, DOSE.model_copy(update=changes), SMOKER)}),)}


def inputs(**changes: Any) -> dict[str, Any]:
    return {"inputs": (TABLE.model_copy(update=changes),)}


def tensor(at: int, **changes: Any) -> dict[str, Any]:
    changed = list(parameters())
    changed[at] = changed[at].model_copy(update=changes)
    return {"parameters": tuple(changed), "layout_digest": "d" * 64}


def labelled(*labels: str) -> dict[str, Any]:
    """Other labels, with the head that goes with them."""
    n = len(labels)
    return {
        "labels": labels,
        "outputs": (Outputs(shape=(n,), dtype="float32"),),
        "parameters": parameters(labels=n),
        "layout_digest": "d" * 64,
    }


EXTRA = Feature(name="weight", unit="kg", default=70.0)
OTHER = Inputs(shape=(8,), dtype="float32", name="image")
OUT = Outputs(shape=(2,), dtype="float32")
MAJOR, MINOR, PATCH = Level.MAJOR, Level.MINOR, Level.PATCH
MUTATIONS: list[tuple[str, Level, dict[str, Any]]] = [
    ("labels_reordered", MAJOR, {"labels": ("well", "ill")}),
    ("labels_renamed", MAJOR, {"labels": ("ill", "healthy")}),
    ("labels_removed", MAJOR, labelled("ill")),
    ("labels_inserted", MAJOR, labelled("ill", "unsure", "well")),
    ("labels_gone", MAJOR, {"labels": ()}),
    ("labels_appended", MINOR, labelled("ill", "well", "unsure")),
    ("labels_repeated", MAJOR, labelled("ill", "ill", "well")),
    ("normalisation", MAJOR, inputs(normalisation="x / 255")),
    ("preprocessing", MAJOR, {"preprocessing": "e" * 64}),
    ("network", MAJOR, {"network": "mlp(hidden=(16,), activation='gelu')"}),
    ("input_dtype", MAJOR, inputs(dtype="float64")),
    ("input_unit", MAJOR, inputs(unit="mV")),
    ("input_shape", MAJOR, inputs(shape=(1, 3), features=(AGE, DOSE, SMOKER))),
    ("input_shape_freed", MINOR, inputs(shape=(None,))),
    ("input_renamed", MAJOR, inputs(name="x")),
    ("input_added", MAJOR, {"inputs": (TABLE, OTHER)}),
    ("input_removed", MAJOR, {"inputs": (OTHER,)}),
    ("input_range_narrowed", MAJOR, inputs(low=0.0)),
    ("features_gone", MAJOR, inputs(features=())),
    ("feature_required", MAJOR, features(AGE, DOSE, SMOKER, EXTRA.model_copy(update={"default": None}))),
    ("feature_added", MINOR, features(AGE, DOSE, SMOKER, EXTRA)),
    ("feature_removed", MINOR, features(AGE, SMOKER)),
    ("features_exchanged", MAJOR, features(AGE, SMOKER, EXTRA)),
    ("features_reordered", MAJOR, features(DOSE, AGE, SMOKER)),
    ("feature_renamed", MAJOR, feature(name="amount")),
    ("feature_unit", MAJOR, feature(unit="g")),
    ("feature_dtype", MAJOR, feature(dtype="int64")),
    ("feature_range_narrowed", MAJOR, feature(high=50.0)),
    ("feature_range_widened", MINOR, feature(low=-1.0)),
    ("default_added", MINOR, feature(default=1.0)),
    ("default_removed", MAJOR, inputs(features=(AGE, DOSE, SMOKER.model_copy(update={"default": None})))),
    ("default_changed", MINOR, inputs(features=(AGE, DOSE, SMOKER.model_copy(update={"default": 1.0})))),
    ("output_dtype", MAJOR, {"outputs": (Outputs(shape=(2,), dtype="float16"),)}),
    ("output_shape", MAJOR, {"outputs": (Outputs(shape=(3,), dtype="float32"),)}),
    ("output_renamed", MAJOR, {"outputs": (Outputs(shape=(2,), dtype="float32", name="logits"),)}),
    ("output_added", MINOR, {"outputs": (OUT, Outputs(shape=(16,), dtype="float32", name="features"))}),
    ("output_removed", MAJOR, {"outputs": (Outputs(shape=(16,), dtype="float32", name="features"),)}),
    ("parameter_shape", MAJOR, tensor(1, shape=(17,))),
    ("parameter_dtype", MAJOR, tensor(1, dtype="bfloat16")),
    ("parameter_renamed", MAJOR, tensor(0, name="dense.weight")),
    ("parameter_removed", MAJOR, {"parameters": parameters()[:3], "layout_digest": "d" * 64}),
    ("parameter_added", MAJOR, {"parameters": (*parameters(), Parameter(name="s", shape=(), dtype="float32"))}),
    ("layout", MAJOR, {"parameters": tuple(reversed(parameters())), "layout_digest": "d" * 64}),
    ("weights", PATCH, {"lineage": Lineage(job="j", rounds=3, recipe="mean", fingerprint="f" * 64)}),
    ("metadata", PATCH, {"metrics": {"global": {"accuracy": 0.9}}}),
]
KNOWN_BESIDE = {  # what goes with a difference by its nature
    "labels_appended": {"output_widened", "parameter_widened"},
    "labels_removed": {"output_shape", "parameter_shape"},
    "labels_inserted": {"output_shape", "parameter_shape"},
    "labels_repeated": {"output_shape", "parameter_shape"},
    "feature_added": {"input_widened", "parameter_widened"},
    "feature_removed": {"input_widened", "parameter_widened"},
    "feature_required": {"input_widened", "parameter_widened"},
    "features_exchanged": {"feature_removed", "feature_added", "layout"},
    "features_reordered": {"layout"},
    "input_removed": {"input_added"},
    "output_removed": {"output_added"},
}


@pytest.mark.parametrize(("kind", "level", "changes"), MUTATIONS, ids=[kind for kind, _, _ in MUTATIONS])
def test_each_class_of_mutation_is_found_and_classed(kind: str, level: Level, changes: dict[str, Any]):
    found = compare(made(), made(**changes))
    assert found.level == level
    assert {one.kind for one in found.differences} - KNOWN_BESIDE.get(kind, set()) == {kind}
    assert next(one.level for one in found.differences if one.kind == kind) == level
    assert all(one.text for one in found.differences)


def test_there_are_more_than_thirty_classes():
    assert len({kind for kind, _, _ in MUTATIONS}) >= 40


@pytest.mark.parametrize(
    ("kind", "level", "old", "new"),
    [
        ("needs_more", MAJOR, {"opset ai.onnx": 17}, {"opset ai.onnx": 21}),
        ("needs_less", PATCH, {"opset ai.onnx": 21}, {"opset ai.onnx": 17}),
        ("needs_new", MAJOR, {"opset ai.onnx": 17}, {"opset ai.onnx": 17, "opset com.microsoft": 1}),
        ("needs_less", PATCH, {"opset ai.onnx": 17, "opset com.microsoft": 1}, {"opset ai.onnx": 17}),
    ],
)
def test_what_a_runtime_needs(kind: str, level: Level, old: dict[str, int], new: dict[str, int]):
    found = compare(Contract("a", needs=old), Contract("b", needs=new))
    assert [(one.kind, one.level) for one in found.differences] == [(kind, level)]


def test_a_model_is_identical_to_itself():
    assert compare(made(), made()).level == Level.IDENTICAL


def test_widened_tensors_hide_no_other_order():
    wide = labelled("ill", "well", "unsure")
    found = compare(made(), made(**wide | {"parameters": wide["parameters"][::-1]}))
    assert found.differences[0].kind == "layout"


def test_what_one_does_not_tell_is_not_held_against_it():
    bare = Contract("file", parameters=tuple(reversed(parameters())), weights="c" * 64)
    found = compare(made(), bare)
    assert found.level == Level.IDENTICAL
    assert set(found.untold) == {"inputs", "outputs", "labels", "preprocessing", "network"}
    assert compare(bare, made()).level == Level.IDENTICAL


def test_a_card_and_a_state_dict_with_counters_are_identical():
    counter = Parameter(name="bn.num_batches_tracked", shape=(), dtype="int64")
    bare = Contract("f", parameters=(*parameters(), counter), weights="x", counters=True, weights_without="c" * 64)
    assert compare(made(), bare).level == Level.IDENTICAL
    assert compare(bare, made()).level == Level.IDENTICAL


def test_a_rename_is_suggested_by_shape():
    found = compare(made(), made(**tensor(0, name="dense.weight")))
    assert "'fc1.weight' is gone and 'dense.weight' has its shape" in found.differences[0].text
    assert found.differences[0][3:5] == ("fc1.weight", "dense.weight")


Step = Callable[[random.Random], dict[str, Any]]


@given(st.randoms(use_true_random=False))
def test_what_bends_nothing_is_never_blocked(draw: random.Random):
    """Additions, widenings, new weights and other words on the card, in any mixture: at most minor."""
    more = [
        Feature(name=f"f{i}", unit=draw.choice(["", "mg"]), default=draw.uniform(-1, 1))
        for i in range(draw.randint(0, 3))
    ]
    wide = [AGE.model_copy(update={"high": draw.choice([120.0, 130.0, None])}), DOSE, SMOKER]
    labels = ("ill", "well", *(f"l{i}" for i in range(draw.randint(0, 3))))
    items = (*wide, *more)
    changes: dict[str, Any] = {
        "inputs": (TABLE.model_copy(update={"features": items, "shape": (len(items),)}),),
        "outputs": (Outputs(shape=(len(labels),), dtype="float32"),),
        "parameters": parameters(len(items), len(labels)),
        "layout_digest": "a" * 64 if (len(items), len(labels)) == (3, 2) else "d" * 64,
        "labels": labels,
        "lineage": Lineage(job="k", rounds=draw.randint(0, 9), recipe="median", fingerprint=draw.choice("xyz") * 64),
        "metrics": {"global": {"accuracy": draw.random()}},
        "version": "1.3.0",
    }
    found = compare(made(), made(**changes))
    assert found.level <= Level.MINOR
    assert found.objection is None


@given(st.lists(st.sampled_from(range(len(MUTATIONS))), min_size=1, max_size=2, unique=True))
def test_the_level_of_several_is_that_of_the_worst_of_them(picks: list[int]):
    kinds = [MUTATIONS[pick] for pick in picks]
    changes = {key: value for _, _, change in kinds for key, value in change.items()}
    found = compare(made(), made(**changes))
    assert found.level == max(one.level for one in found.differences)
    assert [one.level for one in found.differences] == sorted((one.level for one in found.differences), reverse=True)


@pytest.mark.parametrize(
    ("old", "new", "changes", "least", "fine"),
    [
        ("1.2.0", "1.2.0", {}, "1.2.0", True),
        ("1.2.0", "1.2.1", {}, "1.2.0", True),
        ("1.2.0", "1.1.9", {}, "1.2.0", False),
        ("1.2.0", "1.2.0", {"metrics": {"global": {"a": 1.0}}}, "1.2.1", False),
        ("1.2.0", "1.2.1", {"metrics": {"global": {"a": 1.0}}}, "1.2.1", True),
        ("1.2.0", "1.2.0+build.7", {"metrics": {"global": {"a": 1.0}}}, "1.2.1", False),
        ("1.2.0", "1.2.1", labelled("ill", "well", "unsure"), "1.3.0", False),
        ("1.2.0", "1.3.0", labelled("ill", "well", "unsure"), "1.3.0", True),
        ("1.2.0", "1.3.0-rc.1", labelled("ill", "well", "unsure"), "1.3.0", True),
        ("1.2.0", "1.9.0", {"labels": ("well", "ill")}, "2.0.0", False),
        ("1.2.0", "2.0.0", {"labels": ("well", "ill")}, "2.0.0", True),
        ("0.2.0", "0.2.1", {"labels": ("well", "ill")}, "0.3.0", False),
        ("0.2.0", "0.3.0", {"labels": ("well", "ill")}, "0.3.0", True),
        ("0.2.0", "0.2.1", labelled("ill", "well", "unsure"), "0.2.1", True),
        ("2.0.0-rc.1", "2.0.0-rc.2", {"labels": ("well", "ill")}, "2.0.0-rc.2", True),
        ("2.0.0-rc.1", "2.0.0-rc.1", {"labels": ("well", "ill")}, "2.0.0-rc.2", False),
    ],
)
def test_the_declared_version_must_agree(old: str, new: str, changes: dict[str, Any], least: str, fine: bool):
    found = compare(made(version=old), made(version=new, **changes))
    assert str(found.least) == least or (old != new and found.level == Level.PATCH)
    assert (found.objection is None) is fine
    if not fine:
        assert found.objection is not None
        assert f"declare {found.least}" in found.objection
