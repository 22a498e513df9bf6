"""The mod that seals updates, and the rest of what a strategy does over the rounds of a run."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import apps
import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, FedAvg
from test_dropin import floats, lies, one_round

import fedkeel
from fedkeel.core.errors import InputError
from fedkeel.deploy import FedKeel, weights
from fedkeel.deploy.grid import PatientGrid
from fedkeel.deploy.mods import MEMORY, seal
from fedkeel.round import wire

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "flower_dropin"
pytestmark = pytest.mark.filterwarnings("default")  # Flower's own dependencies warn


def sealing(client: apps.Client) -> apps.Client:
    """A client app of Flower's with our mod."""
    app = ClientApp(mods=[seal])
    app.train()(client)
    app.evaluate()(client)
    return app


def steadily(message: Message, context: Context) -> Message:
    """A client that moves the weights by the same step in every round."""
    sent = {name: array.numpy() for name, array in message.content["arrays"].items()}
    step = apps.model(1)
    made = {n: v if v.dtype.kind == "i" else np.asarray(v + step[n], "f4") for n, v in sent.items()}
    return apps.reply(message, made, num_examples=10)


def test_sealed_updates_are_smaller_and_within_the_codecs_bound() -> None:
    base = apps.record(apps.model())
    layout = weights.layout_of(base, weights.BUFFERS)
    clients = {node: apps.honest(node) for node in (1, 2, 3)}
    plain, coded, thin = (apps.Loop(clients), *(apps.Loop({n: sealing(c) for n, c in clients.items()}) for _ in "ab"))
    exact, _ = one_round(FedKeel(), plain)
    found, said = one_round(FedKeel(client={"codec": "int8"}), coded)
    one_round(FedKeel(client={"codec": "top_k(share=0.02, values='int8')", "zstd": 3}), thin)
    assert found is not None
    assert exact is not None
    assert said == pytest.approx({"loss": 2.0})
    assert thin.bytes_up * 4 < coded.bytes_up * 2 < plain.bytes_up
    names = list(base)
    codec = wire.built(FedKeel(client={"codec": "int8"}).plan.codec, layout)[1]
    row = {n: weights.row_of(apps.record(apps.moved(m, n)), layout, names) for n, m in _sent(base).items()}
    theta = weights.row_of(base, layout, names)
    bound = sum(codec.error(moved - theta) for moved in row.values()) / len(row)
    away = (weights.row_of(found, layout, names) - weights.row_of(exact, layout, names)).abs()
    assert bool((away <= bound + 1e-6).all())
    assert float(away.max()) > 0


def _sent(base: ArrayRecord) -> dict[int, Message]:
    apps.identify()
    return {node: Message(RecordDict({"arrays": base}), node, "train") for node in (1, 2, 3)}


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Steps this small are not worth a second one, least of all where others are at work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_the_example_learns_as_much_with_fewer_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE))
    client_app = importlib.import_module("digits.client_app")
    torch.manual_seed(0)
    first = ArrayRecord(importlib.import_module("digits.task").Net().state_dict())

    def upload(strategy: FedAvg, *mods: Any) -> tuple[float, float]:
        """Bytes of a reply, and the loss in the end."""
        app = ClientApp(mods=list(mods))
        app.train()(client_app.train)
        grid = apps.Loop(dict.fromkeys(range(3), app))
        for node, context in grid.contexts.items():
            context.node_config.update({"partition-id": node, "num-partitions": 3})
            context.run_config.update({"batch-size": 32, "local-epochs": 1})
        result = strategy.start(grid, first, num_rounds=6, train_config=ConfigRecord({"lr": 0.1}))
        return grid.bytes_up / 18, float(result.train_metrics_clientapp[6]["train_loss"])

    stock = upload(FedAvg(fraction_evaluate=0.0))
    ours = upload(FedKeel(fraction_evaluate=0.0))
    int8 = upload(FedKeel(fraction_evaluate=0.0, client={"codec": "int8"}), seal)
    sparse = {"codec": "top_k(share=0.05, values='int8')", "error_feedback": True}
    top = upload(FedKeel(fraction_evaluate=0.0, client=sparse), seal)
    assert ours[0] == stock[0] == pytest.approx(70_704)
    assert int8[0] == pytest.approx(17_650, rel=0.01)
    assert top[0] == pytest.approx(1_790, rel=0.02)
    assert max(stock[1], ours[1], int8[1], top[1]) < 0.15


def test_the_page_shows_what_the_example_has() -> None:
    page = (EXAMPLE.parents[1] / "docs" / "how-to" / "flower-drop-in.md").read_text()
    diff = page.partition("```\n server_app.py\n")[2].partition("```")[0].splitlines()
    texts = "".join((EXAMPLE / "digits" / name).read_text() for name in ("server_app.py", "client_app.py"))
    added = [line[1:].strip() for line in diff if line.startswith("+")]
    gone = [line[1:].strip() for line in diff if line.startswith("-")]
    assert len(gone) == 3
    assert len(added) == 4  # a line changed is one that goes and one that comes; the fourth is the mod's import
    assert all(line in texts for line in added)
    assert not any(line in texts.splitlines() for line in gone)


def test_with_error_feedback_nothing_is_lost_over_the_rounds() -> None:
    client = {"codec": "top_k(share=0.1)", "error_feedback": True}
    first, step = apps.model(), apps.model(1)
    for told, kept in ((client, True), ({**client, "error_feedback": False}, False)):
        grid = apps.Loop({1: sealing(steadily)})
        strategy = FedKeel(client=told, min_train_nodes=1, min_available_nodes=1, fraction_evaluate=0.0)
        result = strategy.start(grid, apps.record(first), num_rounds=30)
        layout = weights.layout_of(result.arrays, weights.BUFFERS)
        wanted = apps.record({n: np.asarray(v + 30 * step[n], v.dtype) for n, v in first.items()})
        missing = weights.row_of(wanted, layout, list(first)) - weights.row_of(result.arrays, layout, list(first))
        if kept:
            residual = torch.from_numpy(grid.contexts[1].state[MEMORY]["residual"].numpy())
            torch.testing.assert_close(missing, residual, rtol=1e-4, atol=1e-4)
        else:
            assert MEMORY not in grid.contexts[1].state
            # What is small is never sent.
            assert float(missing.norm()) > 20 * float(weights.row_of(apps.record(step), layout, list(first)).norm()) / 2


def test_the_mod_says_what_is_wrong_and_leaves_other_strategies_alone(tmp_path: Path) -> None:
    bad = lies()
    clients = {
        1: steadily,
        2: bad["shape"],
        3: bad["no count"],
        4: bad["nan"],
        5: bad["error"],
        6: bad["flood of metrics"],
    }
    strategy = FedKeel(run=tmp_path / "run", client={"codec": "int8"})
    grid = apps.Loop({n: sealing(c) for n, c in clients.items()} | {7: apps.honest(7)})
    assert one_round(strategy, grid)[0] is not None
    strategy.close()
    reasons = {row["client"]: row["reason"] for row in fedkeel.Run(tmp_path / "run").updates}
    assert reasons["1"] is None
    assert reasons["2"] == "array 'fc.bias' has shape (31,), the model's has (30,)"
    assert reasons["3"] == "its metrics lack 'num-examples'"
    assert reasons["4"] == "it has columns that are NaN or infinite"
    assert reasons["5"] == "CUDA out of memory"
    assert "'metrics'" in reasons["6"]
    assert reasons["7"].endswith("put fedkeel.deploy.mods.seal into its ClientApp's mods")
    with_mod, without = (apps.Loop({n: f(apps.honest(n)) for n in (1, 2)}) for f in (sealing, lambda c: c))
    assert floats(one_round(FedAvg(), with_mod)[0]).keys() == floats(one_round(FedAvg(), without)[0]).keys()


def test_robust_rules_and_the_servers_optimiser_work_on_an_app() -> None:
    far = {9: lambda message, context: apps.reply(message, apps.moved(message, 9, 1e6), loss=1e9, num_examples=10)}
    clients = {node: apps.honest(node) for node in (1, 2, 3, 4)} | far
    strategy = FedKeel(
        aggregate={"reduce": "trimmed_mean(trim=1)", "weigh": ["equal"]},
        server={"optimiser": "adam(lr=0.01)"},
        min_train_nodes=3,
    )
    found, said = one_round(strategy, apps.Loop(clients))
    assert found is not None
    moved = np.abs(found["fc.weight"].numpy() - apps.model()["fc.weight"])
    assert 0 < moved.max() < 0.02
    assert said == pytest.approx({"loss": 3.0})
    # A statistic is averaged, not optimised; a counter stays as the app gave it.
    assert np.abs(found["bn.running_mean"].numpy() - apps.model()["bn.running_mean"]).max() > 0.02
    assert found["bn.num_batches_tracked"].numpy() == 3
    assert {array.dtype for name, array in found.items() if "tracked" not in name} == {"float32"}


def test_who_is_refused_again_and_again_is_left_out(tmp_path: Path) -> None:
    clients = {node: apps.honest(node) for node in (1, 2, 3)} | {9: lies()["nan"]}
    strategy = FedKeel(run=tmp_path / "run", quarantine={"limit": 1.5})
    strategy.start(apps.Loop(clients), apps.record(apps.model()), num_rounds=4)
    stages = [row["stage"] for row in fedkeel.Run(tmp_path / "run").updates if row["client"] == "9"]
    assert stages[0:2] == ["check", "check"]
    assert "quarantine" in stages[2:]


def test_a_run_goes_on_from_its_last_checkpoint(tmp_path: Path) -> None:
    clients = {node: apps.honest(node) for node in (1, 2, 3)}
    sections: dict[str, Any] = {"server": {"optimiser": "momentum"}, "fraction_evaluate": 0.0}
    whole = FedKeel(**sections).start(apps.Loop(clients), apps.record(apps.model()), num_rounds=4)
    FedKeel(run=tmp_path / "run", **sections).start(apps.Loop(clients), apps.record(apps.model()), num_rounds=2)
    again = FedKeel(run=tmp_path / "run", **sections)
    found = again.start(apps.Loop(clients), apps.record(apps.model()), num_rounds=4)
    assert {n: a.data for n, a in found.arrays.items()} == {n: a.data for n, a in whole.arrays.items()}
    assert [row["round"] for row in fedkeel.Run(tmp_path / "run").rounds] == [1, 2, 3, 4]
    with pytest.raises(InputError, match="begun with other rules"):
        FedKeel(run=tmp_path / "run").start(apps.Loop(clients), apps.record(apps.model()))


def test_what_the_app_measures_on_the_server_is_written_down(tmp_path: Path) -> None:
    seen = []

    def judge(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        seen.append(float(arrays["fc.bias"].numpy()[0]))
        return MetricRecord({"accuracy": 0.5 + server_round / 10, "by-class": [0.1, 0.2]})

    strategy = FedKeel(run=tmp_path / "run", fraction_evaluate=0.0)
    grid = apps.Loop({node: apps.honest(node) for node in (1, 2)})
    result = strategy.start(grid, apps.record(apps.model()), num_rounds=2, evaluate_fn=judge)
    assert len(set(seen)) == 3
    assert result.evaluate_metrics_serverapp[2]["by-class"] == [0.1, 0.2]
    table = fedkeel.Run(tmp_path / "run").metrics
    assert [(row["round"], row["scope"], row["value"]) for row in table] == [
        (0, "global", 0.5),
        (1, "global", 0.6),
        (2, "global", 0.7),
    ]
    with pytest.raises(InputError, match="a Flower app"):
        fedkeel.resume(tmp_path / "run")


def test_a_strategy_of_flowers_may_wrap_it() -> None:
    model = {name: value for name, value in apps.model().items() if value.dtype.kind == "f"}
    around = DifferentialPrivacyServerSideFixedClipping(FedKeel(), 0.1, 1.0, 2)
    grid = apps.Loop({node: apps.honest(node) for node in (1, 2)})
    result = around.start(grid, apps.record(model), num_rounds=2)
    assert sorted(result.train_metrics_clientapp) == [1, 2]


def test_rules_that_go_by_steps_need_clients_that_count_them() -> None:
    def counts(message: Message, context: Context) -> Message:
        return apps.reply(message, apps.moved(message, 1), num_examples=10, num_steps=5)

    strategy = FedKeel(aggregate={"mix": ["fednova"]})
    assert one_round(strategy, apps.Loop({1: counts, 2: counts, 3: apps.honest(3)}))[0] is not None
    assert strategy.report is not None
    assert [row.steps for row in strategy.report.clients if row.weight > 0] == [5, 5]
    assert strategy.report.refused["3"].reason == "it claims 0 steps, allowed are 1 to 1000000"


def test_half_of_the_nodes_are_asked_when_half_is_wanted() -> None:
    grid = apps.Loop({node: apps.honest(node) for node in range(10, 30)})
    strategy = FedKeel(fraction_train=0.5)
    asked = list(strategy.configure_train(1, apps.record(apps.model()), ConfigRecord({"lr": 0.1}), grid))
    assert len({message.metadata.dst_node_id for message in asked}) == 10
    assert apps.config(asked[0])["lr"] == 0.1
    assert len(asked[0].content.config_records) == 1  # Flower's own mods want one


def test_an_apps_own_aggregation_of_metrics_is_used_and_may_fail() -> None:
    def most(contents: list[RecordDict], key: str) -> MetricRecord:
        return MetricRecord({"most": max(float(c["metrics"][key]) for c in contents)})

    def fails(contents: list[RecordDict], key: str) -> MetricRecord:
        raise ZeroDivisionError

    grid = apps.Loop({1: apps.honest(1, 10), 2: apps.honest(2, 20)})
    strategy = FedKeel(train_metrics_aggr_fn=most, evaluate_metrics_aggr_fn=fails)
    result = strategy.start(grid, apps.record(apps.model()), num_rounds=1)
    assert result.train_metrics_clientapp[1] == {"most": 20.0}
    assert result.evaluate_metrics_clientapp == {}


def test_one_reply_that_flower_can_not_read_or_deliver_does_not_end_the_run(tmp_path: Path) -> None:
    class Broken(apps.Loop):
        def push_messages(self, messages: Any) -> list[str]:
            given = super().push_messages(messages)
            return ["" if m.metadata.dst_node_id == 3 else n for m, n in zip(messages, given, strict=True)]

        def pull_messages(self, message_ids: Any) -> list[Message]:
            found = super().pull_messages(message_ids)
            if any(message.metadata.src_node_id == 2 for message in found):
                raise ValueError("not an ArrayRecord")
            return found

    strategy = FedKeel(run=tmp_path / "run", fraction_evaluate=0.0)
    grid = Broken({node: apps.honest(node) for node in (1, 2, 3)})
    result = strategy.start(grid, apps.record(apps.model()), num_rounds=1)
    assert result.train_metrics_clientapp[1] == {"loss": 1.0}
    rows = {row["client"]: (row["stage"], row["reason"]) for row in fedkeel.Run(tmp_path / "run").updates}
    assert rows["2"] == ("decode", "its reply is no Flower message (ValueError: not an ArrayRecord)")
    assert rows["3"] == ("transport", "Flower did not take the message: its node has left")
    assert PatientGrid(grid).send_and_receive([]) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"aggregate": {"reduce": "trimmed_mean(trim=1)"}}, "needs at least 3 rows.*min_train_nodes"),
        ({"aggregate": {"reduce": "medain"}}, "did you mean 'median'"),
        ({"train": {"corrections": ["scaffold"]}}, "train.corrections .* needs more than a Flower app does"),
        ({"server": {"examples": 100}}, "server.examples = 100 needs more"),
        ({"job": fedkeel.Job(), "client": {"codec": "int8"}}, "give one of the two"),
        ({"aggregate": {"weigh": ["learned"]}}, "server.examples"),
    ],
)
def test_what_can_not_work_is_refused_before_anything_is_sent(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        FedKeel(**arguments)


def test_a_model_without_floats_or_with_feedback_of_nothing_is_refused() -> None:
    counter = ArrayRecord({"steps": Array(np.zeros(3, np.int64))})
    with pytest.raises(InputError, match="hold no parameter"):
        FedKeel().start(apps.Loop({}), counter)
    with pytest.raises(InputError, match="has nothing to add"):
        FedKeel(client={"error_feedback": True}).start(apps.Loop({}), apps.record(apps.model()))
