"""fedkeel's server as the strategy of a Flower app: as FedAvg where all is well, and where it is not, with reasons."""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import apps
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MessageType, MetricRecord, RecordDict
from flwr.app.exception import AppExitException
from flwr.serverapp.strategy import FedAvg
from hypothesis import given, settings
from hypothesis import strategies as st

import fedkeel
from fedkeel.deploy import FedKeel

pytestmark = pytest.mark.filterwarnings("default")  # Flower's own dependencies warn


def floats(arrays: ArrayRecord) -> dict[str, np.ndarray]:
    return {name: array.numpy() for name, array in arrays.items() if array.numpy().dtype.kind == "f"}


def test_it_is_fedavg_to_rounding() -> None:
    clients = {node: apps.honest(node, 10 * node) for node in (1, 2, 3, 7)}
    ours = FedKeel().start(apps.Loop(clients), apps.record(apps.model()), num_rounds=3)
    theirs = FedAvg().start(apps.Loop(clients), apps.record(apps.model()), num_rounds=3)
    for name, value in floats(theirs.arrays).items():
        if not name.endswith("tracked"):
            np.testing.assert_allclose(floats(ours.arrays)[name], value, rtol=1e-5, atol=1e-6)
    for round in (1, 2, 3):
        assert ours.train_metrics_clientapp[round] == pytest.approx(dict(theirs.train_metrics_clientapp[round]))
        assert ours.evaluate_metrics_clientapp[round] == pytest.approx(dict(theirs.evaluate_metrics_clientapp[round]))
    assert {n: a.dtype for n, a in ours.arrays.items()} == {n: str(v.dtype) for n, v in apps.model().items()}


def lies(seed: int = 5) -> dict[str, apps.Client]:
    """Replies that no honest client gives, by name."""

    def changed(**arrays: np.ndarray | None) -> apps.Client:
        def client(message: Message, context: Context) -> Message:
            made = apps.moved(message, seed)
            for name, value in arrays.items():
                made.pop(name) if value is None else made.update({name: value})
            return apps.reply(message, made, loss=1.0, num_examples=10)

        return client

    def saying(**metrics: Any) -> apps.Client:
        return lambda message, context: apps.reply(message, apps.moved(message, seed), **metrics)

    def content(made: Callable[[Message], RecordDict]) -> apps.Client:
        return lambda message, context: Message(made(message), reply_to=message)

    def bytes_of(array: Array) -> apps.Client:
        def client(message: Message, context: Context) -> Message:
            said = apps.reply(message, apps.moved(message, seed), loss=1.0, num_examples=10)
            said.content["arrays"]["fc.bias"] = array
            return said

        return client

    def foreign(message: Message, context: Context) -> Message:
        said = apps.honest(seed)(message, context)
        said.metadata.__dict__["_src_node_id"] = 77
        return said

    def stranger(message: Message, context: Context) -> Message:
        said = apps.honest(seed)(message, context)
        said.metadata.__dict__["_reply_to_message_id"] = "none of yours"
        return said

    def error(message: Message, context: Context) -> Message:
        said = Message(Error(2, "CUDA out of\nmemory"), reply_to=message)
        said.metadata.__dict__["_src_node_id"] = 1  # Flower itself, where a node is gone
        return said

    nan = np.full((30, 20), np.nan, np.float32)
    infinite = np.zeros(30, np.float32)
    infinite[3] = np.inf
    bomb = BytesIO()
    np.lib.format.write_array_header_1_0(bomb, {"descr": "<f4", "fortran_order": False, "shape": (10**12,)})
    envelope = {"fedkeel.update": ArrayRecord({"envelope": Array("uint8", (4,), "fedkeel.envelope", b"FKU1")})}
    return {
        "shape": changed(**{"fc.bias": np.zeros(31, np.float32)}),
        "dtype": changed(**{"fc.bias": np.zeros(30, np.float64)}),
        "missing": changed(**{"fc.bias": None}),
        "extra array": changed(backdoor=np.zeros(3, np.float32)),
        "nan": changed(**{"fc.weight": nan}),
        "infinite": changed(**{"fc.bias": infinite}),
        "no count": saying(loss=1.0),
        "absurd count": saying(loss=1.0, num_examples=10**9),
        "negative count": saying(loss=1.0, num_examples=-5),
        "count is nan": saying(loss=1.0, num_examples=float("nan")),
        "count is a list": saying(loss=1.0, num_examples=[10, 10]),
        "flood of metrics": saying(num_examples=10, **{f"m{i}": 1.0 for i in range(40)}),
        "nothing": content(lambda message: RecordDict()),
        "no metrics": content(lambda message: RecordDict({"arrays": apps.record(apps.moved(message, seed))})),
        "two models": content(
            lambda m: RecordDict({"a": apps.record(apps.moved(m, 1)), "b": apps.record(apps.moved(m, 2))})
        ),
        "no numpy": bytes_of(Array("float32", (30,), "numpy.ndarray", b"garbage")),
        "pickle": bytes_of(Array("float32", (30,), "pickle", b"garbage")),
        "bomb": bytes_of(Array("float32", (30,), "numpy.ndarray", bomb.getvalue())),
        "envelope": content(lambda message: RecordDict(envelope)),
        "error": error,
        "silent": lambda message, context: None,
        "foreign": foreign,
        "stranger": stranger,
    }


REASONS = {
    "shape": "array 'fc.bias' has shape (31,), the model's has (30,)",
    "dtype": "array 'fc.bias' is float64, the model's is float32",
    "missing": "its arrays lack 'fc.bias'",
    "extra array": "its arrays hold 'backdoor', which the model does not",
    "nan": "it has columns that are NaN or infinite",
    "infinite": "it has columns that are NaN or infinite",
    "no count": "its metrics lack 'num-examples'",
    "absurd count": "it claims 1000000000 examples, allowed are 1 to 1000000",
    "negative count": "its 'num-examples' is -5, which is no count",
    "count is nan": "its 'num-examples' is nan, which is no count",
    "count is a list": "its 'num-examples' is [10, 10], which is no count",
    "flood of metrics": "the envelope's field 'metrics'",
    "nothing": "it holds 0 records of metrics, not one",
    "no metrics": "it holds 0 records of metrics, not one",
    "two models": "it holds 0 records of metrics, not one",
    "no numpy": "array 'fc.bias' is no numpy file (ValueError)",
    "pickle": "array 'fc.bias' is coded as 'pickle'",
    "bomb": "array 'fc.bias' has shape (1000000000000,), the model's has (30,)",
    "envelope": "4 bytes are shorter than an envelope",
    "error": "CUDA out of memory",
    "silent": "no answer came in time",
    "foreign": "no answer came in time",
    "stranger": "no answer came in time",
}


def one_round(strategy: FedAvg, grid: apps.Loop) -> tuple[ArrayRecord | None, MetricRecord | None]:
    messages = strategy.configure_train(1, apps.record(apps.model()), ConfigRecord(), grid)
    return strategy.aggregate_train(1, grid.send_and_receive(messages))


GOOD: dict[int, apps.Client] = {node: apps.honest(node, 10 * node) for node in (1, 2, 3)}


def test_what_no_honest_client_sends_is_refused_with_a_reason_and_changes_nothing(tmp_path: Path) -> None:
    alone, alone_said = one_round(FedKeel(), apps.Loop(GOOD))
    among = {100 + place: lie for place, lie in enumerate(lies().values())}
    strategy = FedKeel(run=tmp_path / "run")
    found, said = one_round(strategy, apps.Loop(GOOD | among))
    strategy.close()
    assert found is not None
    assert alone is not None
    assert {n: a.data for n, a in found.items()} == {n: a.data for n, a in alone.items()}
    assert said == alone_said
    rows = fedkeel.Run(tmp_path / "run").updates
    reasons = {row["client"]: row["reason"] for row in rows}
    assert {row["client"] for row in rows if row["weight"] > 0} == {"1", "2", "3"}
    for node, name in zip(among, lies(), strict=True):
        assert REASONS[name] in reasons[str(node)], name
    assert reasons["77"].startswith("node 77 answered in the place of node 1")
    assert fedkeel.Run(tmp_path / "run").report().is_file()


FIGURES = st.one_of(
    st.integers(-(10**30), 10**30),
    st.floats(),
    st.lists(st.floats(), max_size=3),
)
METRICS = st.dictionaries(
    st.sampled_from(["num-examples", "loss", "num-steps", ""]) | st.text(max_size=5), FIGURES, max_size=5
)
ARRAYS = st.builds(
    Array,
    dtype=st.sampled_from(["float32", "float64", "int64", "object", "?"]),
    shape=st.lists(st.integers(-1, 2**70), max_size=3).map(tuple),
    stype=st.sampled_from(["numpy.ndarray", "fedkeel.envelope", ""]),
    data=st.binary(max_size=200) | st.binary(max_size=60).map(lambda tail: b"\x93NUMPY\x01\x00" + tail),
)
CONTENTS = st.fixed_dictionaries(
    {},
    optional={
        "arrays": st.dictionaries(st.sampled_from([*apps.model(), "x"]), ARRAYS, max_size=6).map(ArrayRecord),
        "metrics": METRICS.map(MetricRecord),
        "fedkeel.update": ARRAYS.map(lambda array: ArrayRecord({"envelope": array})),
        "fedkeel.failure": st.text(max_size=20).map(lambda why: ConfigRecord({"why": why})),
    },
)


@settings(max_examples=150, deadline=None)
@given(CONTENTS)
def test_no_content_ends_a_round_or_changes_what_the_others_come_to(content: dict[str, Any]) -> None:
    alone, _ = one_round(FedKeel(), apps.Loop(GOOD))
    strategy = FedKeel()
    hostile = {9: lambda message, context: Message(RecordDict(dict(content)), reply_to=message)}
    grid = apps.Loop(GOOD | hostile)
    found, _ = one_round(strategy, grid)
    assert found is not None
    assert alone is not None
    assert strategy.report is not None
    assert "9" in strategy.report.refused
    assert {n: a.data for n, a in found.items()} == {n: a.data for n, a in alone.items()}
    measured = strategy.aggregate_evaluate(
        1, grid.send_and_receive(strategy.configure_evaluate(1, found, ConfigRecord(), grid))
    )
    assert measured is not None
    assert measured["accuracy"] == pytest.approx((0.51 * 10 + 0.52 * 20 + 0.53 * 30) / 60)


STOCK_ENDS = ["shape", "missing", "extra array", "no count", "count is a list", "nothing", "no metrics", "two models"]


@pytest.mark.parametrize("name", STOCK_ENDS)
def test_flowers_own_strategy_ends_the_run_on_such_a_reply(name: str) -> None:
    with pytest.raises((AppExitException, ValueError, KeyError)):
        one_round(FedAvg(), apps.Loop(GOOD | {9: lies()[name]}))


def test_flowers_own_strategy_is_poisoned_by_such_a_reply() -> None:
    found, _ = one_round(FedAvg(), apps.Loop(GOOD | {9: lies()["nan"]}))
    assert found is not None
    assert np.isnan(found["fc.weight"].numpy()).all()
    found, _ = one_round(FedAvg(), apps.Loop(GOOD | {9: lies()["absurd count"]}))
    theirs = apps.moved(Message(RecordDict({"arrays": apps.record(apps.model())}), 9, "train"), 5)
    assert found is not None
    np.testing.assert_allclose(found["fc.bias"].numpy(), theirs["fc.bias"], atol=1e-6)  # one client is the model


def test_doubled_and_late_replies_count_once(tmp_path: Path) -> None:
    kept: list[Message] = []

    def keeps(message: Message, context: Context) -> list[Message]:
        said = apps.honest(3)(message, context)
        kept.append(said)
        return [said, apps.honest(4)(message, context), *kept[:-1]]

    strategy, first = FedKeel(run=tmp_path / "run"), FedKeel()
    grid = apps.Loop({1: apps.honest(1), 2: apps.honest(2), 3: keeps})
    arrays = apps.record(apps.model())
    for round in (1, 2, 3):
        replies = grid.send_and_receive(strategy.configure_train(round, arrays, ConfigRecord(), grid))
        arrays = strategy.aggregate_train(round, replies)[0] or arrays
    strategy.close()
    rows = [row for row in fedkeel.Run(tmp_path / "run").updates if row["client"] == "3"]
    assert [(row["round"], row["stage"], row["rule"]) for row in rows] == [
        (1, None, None),
        (1, "check", "duplicate"),
        (2, None, None),
        (2, "check", "duplicate"),
        (2, "late", "task"),
        (3, None, None),
        (3, "check", "duplicate"),
        (3, "late", "task"),
        (3, "late", "task"),
    ]
    wanted = first.start(apps.Loop({node: apps.honest(node) for node in (1, 2, 3)}), apps.record(apps.model()))
    assert {n: a.data for n, a in arrays.items()} == {n: a.data for n, a in wanted.arrays.items()}


def test_a_round_without_a_usable_reply_is_skipped_and_the_run_goes_on(tmp_path: Path) -> None:
    asked = []

    def moody(message: Message, context: Context) -> Message:
        asked.append(apps.config(message)["server-round"])
        made = lies()["nan"] if asked[-1] == 1 else apps.honest(1)
        return made(message, context)

    strategy = FedKeel(run=tmp_path / "run", fraction_evaluate=0.0)
    result = strategy.start(apps.Loop({1: moody, 2: moody}), apps.record(apps.model()), num_rounds=2)
    assert result.arrays["fc.weight"].data != apps.record(apps.model())["fc.weight"].data
    rounds = fedkeel.Run(tmp_path / "run").rounds
    assert [row["skipped"] for row in rounds] == ["no update was admitted", None]


def test_it_does_not_wait_for_ever_for_nodes(tmp_path: Path) -> None:
    strategy = FedKeel(run=tmp_path / "a", patience=0, min_available_nodes=5, fraction_evaluate=0.0)
    result = strategy.start(apps.Loop({1: apps.honest(1)}), apps.record(apps.model()), num_rounds=1)
    assert 1 in result.train_metrics_clientapp
    reduce = {"reduce": "trimmed_mean(trim=1)"}
    strategy = FedKeel(run=tmp_path / "b", patience=0, min_train_nodes=3, aggregate=reduce, fraction_evaluate=0.0)
    result = strategy.start(apps.Loop({1: apps.honest(1)}), apps.record(apps.model()), num_rounds=2)
    assert {n: a.data for n, a in result.arrays.items()} == {n: a.data for n, a in apps.record(apps.model()).items()}
    skipped = [row["skipped"] for row in fedkeel.Run(tmp_path / "b").rounds]
    assert skipped == ["1 nodes are there, the rules need 3"] * 2


def test_evaluations_are_refused_with_a_reason_as_well(tmp_path: Path) -> None:
    def measures(**metrics: Any) -> apps.Client:
        def client(message: Message, context: Context) -> Message:
            if message.metadata.message_type == MessageType.TRAIN:
                return apps.honest(1)(message, context)
            told = MetricRecord({k.replace("_", "-"): v for k, v in metrics.items()})
            return Message(RecordDict({"metrics": told}), reply_to=message)

        return client

    clients = {
        1: measures(accuracy=0.5, num_examples=10),
        2: measures(accuracy=0.6, num_examples=30, mine=3.0),
        3: measures(accuracy=0.7, num_examples=10**9),
        4: measures(accuracy=0.8),
        5: measures(accuracy=float("nan"), num_examples=10),
    }
    strategy = FedKeel(run=tmp_path / "run")
    result = strategy.start(apps.Loop(clients), apps.record(apps.model()), num_rounds=1)
    assert result.evaluate_metrics_clientapp[1] == pytest.approx({"accuracy": 0.575})
    run = fedkeel.Run(tmp_path / "run")
    refused = {row["client"]: row["reason"] for row in run.updates if row["stage"]}
    assert refused == {
        "3": "evaluation: it claims 1000000000 examples, allowed are 1 to 1000000",
        "4": "evaluation: its metrics lack 'num-examples'",
        "5": "evaluation: its 'accuracy' is nan",
    }
    final = run.final()
    assert final is not None
    assert final["value"] == pytest.approx(0.575)
