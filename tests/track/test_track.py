"""Runs in TensorBoard and MLflow, written by the command and read back by their own libraries."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sqlite3
import subprocess
import sys
import time

import pytest
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.event_file_writer import EventFileWriter

import fedkeel
from fedkeel import cli
from fedkeel.core.errors import InputError, RunError
from fedkeel.core.types import ClientRow, Refusal, RoundReport
from fedkeel.ship.ledger import Ledger
from fedkeel.track import follow, points
from fedkeel.track.mlflow import MLflow
from fedkeel.track.tensorboard import TensorBoard

HOSTILE = "../<b>\0\n" + "x" * 400
ROWS = (
    ClientRow("a", None, weight=0.5, staleness=1, bytes_up=100),
    ClientRow("b", None, weight=0.5, staleness=4, bytes_up=100),
    ClientRow(HOSTILE, Refusal("screen", "cosine", "below 0"), staleness=1),
    ClientRow("c", Refusal("transport", "gone", "no answer")),
    ClientRow("d", Refusal("late", "end", "the run is over")),
)


@pytest.fixture(autouse=True)
def _settings(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")


@pytest.fixture(scope="session")
def empty(tmp_path_factory):
    """A database with MLflow's tables; they take seconds to make."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path.read_bytes()


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def ledger(run):
    run.mkdir()
    (run / "job.toml").touch()
    with Ledger(run / "ledger.sqlite") as ledger:
        settings = 'name = "watched"\n[train]\nlr = 0.5\n[groups]\n"a b/c\\u0000" = "x"\n'
        ledger.write_meta({"job": "watched", "rounds": 9, "seed": 3, "plan": [["reduce", "mean()"]], "fedkeel": "0.1"})
        ledger.write_meta({"settings": settings})
        yield ledger


@pytest.fixture
def uri(tmp_path, empty):
    (tmp_path / "mlflow.db").write_bytes(empty)
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


def write(ledger, round, *, scopes=("global",), value=None, **fields):
    fields = {"bytes_down": 40, "seconds": {"train": 0.25}, "update_norm": 1.5, **fields}
    ledger.write_round(RoundReport(round, round, 2.0 * round, ROWS, **fields))
    for scope in scopes:
        accuracy = round / 10 if value is None else value
        ledger.write_metrics(round, round, {"accuracy": (accuracy, accuracy - 0.1, accuracy + 0.1)}, scope=scope)


def over(run):
    (run / "model").mkdir()
    (run / "model" / "card.json").write_text("{}")
    (run / "report.html").write_text("<p>report</p>")


def board(folder, run, clients=False):
    target = TensorBoard(folder, run)
    try:
        follow.once(run / "ledger.sqlite", [target], clients)
    finally:
        target.close()


def scalars(folder):
    """Name -> step -> (value, time); a step that is there twice fails."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    found = {}
    for tag in events.Tags()["scalars"]:
        found[tag] = {event.step: (event.value, event.wall_time) for event in events.Scalars(tag)}
        assert len(found[tag]) == len(events.Scalars(tag)), tag
        assert list(found[tag]) == sorted(found[tag]), tag
    return found


def send(uri, run, clients=False):
    follow.once(run / "ledger.sqlite", [MLflow(uri, "fedkeel", run)], clients)


def runs(uri):
    client = MlflowClient(uri)
    return client, client.search_runs([client.get_experiment_by_name("fedkeel").experiment_id])


def history(client, run, name):
    found = {
        metric.step: (metric.value, metric.timestamp) for metric in client.get_metric_history(run.info.run_id, name)
    }
    assert len(found) == len(client.get_metric_history(run.info.run_id, name)), name
    return found


def test_what_is_written(run, ledger, uri, tmp_path):
    ledger.write_metrics(0, 0, {"accuracy": 0.0})
    scopes = ("global", "clients", "class/phone", "group/all", "client/a", f"client/{HOSTILE}")
    for round in range(1, 4):
        write(ledger, round, scopes=scopes, epsilon=round / 2)
    ledger.write_metrics(3, 3, {"loss": math.nan})
    over(run)
    board(tmp_path / "tb", run)
    send(uri, run)
    found, rows = scalars(tmp_path / "tb"), ledger.rounds()
    client, (sent,) = runs(uri)
    wanted = {
        "global/accuracy": 0.3, "global/accuracy.low": 0.2, "global/accuracy.high": 0.4, "clients/accuracy": 0.3,
        "class/phone/accuracy": 0.3, "group/all/accuracy": 0.3, "round/version": 3, "round/skipped": 0,
        "round/time": 6, "round/update_norm": 1.5, "updates/used": 2, "updates/unused": 0, "updates/refused": 1,
        "updates/lost": 1, "refused/screen": 1, "refused/check": 0, "bytes/up": 200, "bytes/up_total": 600,
        "bytes/down_total": 120, "seconds/train": 0.25, "seconds/total": 0.25, "staleness/mean": 2,
        "staleness/max": 4, "privacy/epsilon": 1.5,
    }  # fmt: skip
    assert {name: found[name][3][0] for name in wanted} == pytest.approx(wanted)
    assert {name: sent.data.metrics[name] for name in wanted} == pytest.approx(wanted)
    assert math.isnan(found["global/loss"][3][0])
    assert math.isnan(history(client, sent, "global/loss")[3][0])
    assert not any(name.startswith("client/") for name in [*found, *sent.data.metrics])
    assert [*found["global/accuracy"]] == [0, 1, 2, 3]
    assert [time for _, time in found["bytes/up"].values()] == [row["wall"] for row in rows]
    assert [time for _, time in history(client, sent, "bytes/up").values()] == [int(1000 * r["wall"]) for r in rows]
    assert sent.data.params | {"train.lr": "0.5", "name": "watched"} == sent.data.params
    assert (
        sent.data.tags | {"fedkeel.version": "0.1", "fedkeel.seed": "3", "fedkeel.plan": "reduce: mean()"}
        == sent.data.tags
    )
    assert (sent.info.run_name, sent.info.status) == ("watched", "FINISHED")
    kept = client.list_artifacts(sent.info.run_id) + client.list_artifacts(sent.info.run_id, "model")
    assert {file.path for file in kept} == {"job.toml", "model", "model/card.json", "report.html"}


def test_hostile_names_and_single_clients(run, ledger, uri, tmp_path):
    write(ledger, 1, scopes=("client/a", "client/a/b", f"client/{HOSTILE}", "client/..", "client/\udcff", "class/"))
    ledger.write_metrics(
        1, 1, {"a.low": 0.5, "a": (0.5, 0.25, 0.75), "b/c": 1.0, "": 2.0, "ü\n": 3.0}, scope="client/a"
    )
    over(run)
    board(tmp_path / "tb", run, clients=True)
    send(uri, run, clients=True)
    names = {name for name in scalars(tmp_path / "tb") if name.startswith(("client/", "class/"))}
    assert len(names) == 3 * 6 + 7
    assert {name for name in runs(uri)[1][0].data.metrics if name.startswith(("client/", "class/"))} == names
    assert "client/a/accuracy.low" in names


def test_no_names_fall_together():
    parts = ["a", "a/b", "a_b", "xa_b", "..", "", " ", "a.low", "A", "ä", "a\0", "x" * 80, "x" * 81, points.name("a/b")]
    assert len({points.name("client", part) for part in parts}) == len(parts)
    assert max(len(points.name("client", "x" * 9999, "y" * 9999)) for _ in parts) < 240


def test_again_writes_nothing_twice_and_goes_on(run, ledger, uri, tmp_path):
    for round in range(1, 4):
        write(ledger, round)
    for _ in range(2):  # more may come of the third
        board(tmp_path / "tb", run)
        send(uri, run)
        client, (sent,) = runs(uri)
        assert [*scalars(tmp_path / "tb")["bytes/up"]] == [*history(client, sent, "bytes/up")] == [1, 2]
        assert sent.info.status == "RUNNING"
    ledger.write_metrics(2, 2, {"accuracy": 0.75}, scope="clients")  # told late
    write(ledger, 4)
    over(run)
    for _ in range(2):
        board(tmp_path / "tb", run)
        send(uri, run)
    found, (client, (sent,)) = scalars(tmp_path / "tb"), runs(uri)
    assert [*found["bytes/up"]] == [*history(client, sent, "bytes/up")] == [1, 2, 3, 4]
    assert [*found["clients/accuracy"]] == [*history(client, sent, "clients/accuracy")] == [2]
    assert sent.info.status == "FINISHED"


def test_figures_that_come_hundreds_of_rounds_late_are_there_in_the_end(run, ledger, tmp_path):
    for round in range(1, 301):
        write(ledger, round)
    board(tmp_path / "tb", run)
    ledger.write_metrics(2, 2, {"accuracy": 0.75}, scope="clients")
    board(tmp_path / "tb", run)
    assert "clients/accuracy" not in scalars(tmp_path / "tb")
    over(run)
    board(tmp_path / "tb", run)
    found = scalars(tmp_path / "tb")
    assert [*found["clients/accuracy"]] == [2]
    assert [*found["bytes/up"]] == list(range(1, 301))


def test_figures_that_come_out_of_order(run, ledger, tmp_path):
    for round in range(1, 5):
        write(ledger, round, scopes=("global", "clients") if round != 2 else ("global",))
    over(run)
    board(tmp_path / "tb", run)
    ledger.write_metrics(2, 2, {"accuracy": 0.5}, scope="clients")
    board(tmp_path / "tb", run)
    found = scalars(tmp_path / "tb")
    assert [*found["clients/accuracy"]] == [*found["bytes/up"]] == [1, 2, 3, 4]


def test_a_rewind(run, ledger, uri, tmp_path):
    for round in range(1, 6):
        write(ledger, round)
    board(tmp_path / "tb", run)
    send(uri, run)
    ledger.rewind(2)
    write(ledger, 3, value=0.875)
    over(run)
    board(tmp_path / "tb", run)
    send(uri, run)
    found, (client, sent) = scalars(tmp_path / "tb"), runs(uri)
    assert [found["global/accuracy"][round][0] for round in (1, 2, 3)] == pytest.approx([0.1, 0.2, 0.875])
    assert [*found["bytes/up"]] == [1, 2, 3]
    new, old = sorted(sent, key=lambda run: "fedkeel.replaced" in run.data.tags)
    assert (new.info.status, old.info.status) == ("FINISHED", "KILLED")
    assert [value for value, _ in history(client, new, "global/accuracy").values()] == [0.1, 0.2, 0.875]


def test_killed_in_the_middle(run, ledger, uri, tmp_path):
    for round in range(1, 601):
        write(ledger, round, scopes=("global",) if round % 50 == 0 else ())
    over(run)
    command = [sys.executable, "-m", "fedkeel", "track", run, "--tensorboard", tmp_path / "tb", "--mlflow", uri]
    with subprocess.Popen([*map(str, command)], stderr=subprocess.PIPE) as started:
        while not (sent := rows_of(uri)):
            assert started.poll() is None, started.stderr.read()
            time.sleep(0.01)
        started.send_signal(signal.SIGKILL)
    assert sent < 600 * 25
    (file,) = (tmp_path / "tb").glob("*tfevents*")
    os.truncate(file, file.stat().st_size * 3 // 4 - 5)  # half of a round, and half of a point
    board(tmp_path / "tb", run)
    send(uri, run)
    found, (client, (sent,)) = scalars(tmp_path / "tb"), runs(uri)
    for name in ("bytes/up", "staleness/max", "round/version"):
        assert [*found[name]] == [*history(client, sent, name)] == [*range(1, 601)], name
    assert len(found["global/accuracy"]) == len(history(client, sent, "global/accuracy")) == 12


def rows_of(uri):
    with contextlib.closing(sqlite3.connect(uri.removeprefix("sqlite:///"), timeout=20)) as database:
        return database.execute("SELECT count(*) FROM metrics").fetchone()[0]


def test_a_rewind_between_what_was_begun_and_what_was_sent(run, ledger, uri, monkeypatch):
    write(ledger, 1)
    write(ledger, 2)
    write(ledger, 3)
    real, calls = MlflowClient.set_tag, []

    def torn(self, run_id, key, value):
        calls.append(key)
        if key == "fedkeel.sent":
            raise KeyboardInterrupt
        real(self, run_id, key, value)

    with monkeypatch.context() as patched:
        patched.setattr(MlflowClient, "set_tag", torn)
        with pytest.raises(KeyboardInterrupt):
            send(uri, run)
    ledger.rewind(1)
    write(ledger, 2, value=0.5)
    over(run)
    send(uri, run)
    client, sent = runs(uri)
    (new,) = [run for run in sent if "fedkeel.replaced" not in run.data.tags]
    assert [value for value, _ in history(client, new, "global/accuracy").values()] == [0.1, 0.5]


def test_following_a_real_run(tmp_path, uri, capfd):
    """From before its first round to its end, then once more; the run's own record is not touched."""
    directory = tmp_path / "live"
    directory.mkdir()
    command = [sys.executable, "-W", "error", "-m", "fedkeel", "track", directory, "--follow", "--mlflow", uri]
    command += ["--tensorboard", tmp_path / "tb"]
    with subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as started:
        assert "as the run goes on" in started.stdout.readline()
        fedkeel.run(fedkeel.Job(rounds=3, data={"clients": 4}, model={"build": "logistic"}), directory)
        said, wrong = started.communicate(timeout=60)
    assert (started.returncode, said, wrong) == (0, "finished: written as far as round 3\n", "")
    found, (client, (sent,)) = scalars(tmp_path / "tb"), runs(uri)
    assert [*found["global/accuracy"]] == [*history(client, sent, "global/accuracy")] == [0, 1, 2, 3]
    assert [*found["updates/used"].values()][-1][0] == 4
    kept = client.list_artifacts(sent.info.run_id) + client.list_artifacts(sent.info.run_id, "model")
    assert {"job.toml", "report.html", "model/card.json", "model/model.safetensors"} <= {file.path for file in kept}


def test_a_full_disk_loses_nothing(run, ledger, tmp_path, monkeypatch):
    write(ledger, 1)
    over(run)
    target = TensorBoard(tmp_path / "tb", run)
    with monkeypatch.context() as patched:
        patched.setattr(EventFileWriter, "flush", lambda self: (_ for _ in ()).throw(OSError(28, "No space left")))
        with pytest.raises(RunError, match=r"could not be written \(No space left\)"):
            follow.once(run / "ledger.sqlite", [target])
    follow.once(run / "ledger.sqlite", [target])
    target.close()
    assert [*scalars(tmp_path / "tb")["bytes/up"]] == [1]


def test_a_quote_in_the_path(tmp_path, uri):
    run = tmp_path / "it's"
    run.mkdir()
    with Ledger(run / "ledger.sqlite") as ledger:
        write(ledger, 1)
    over(run)
    for _ in range(2):
        send(uri, run)
    assert len(runs(uri)[1]) == 1


def test_what_becomes_of_a_run(run, ledger, uri):
    write(ledger, 1)
    write(ledger, 2)
    dead = subprocess.Popen(["true"])
    dead.wait()
    for pid, status, rounds in ((os.getpid(), "RUNNING", 1), (dead.pid, "FAILED", 2), (os.getpid(), "RUNNING", 2)):
        (run / ".lock").write_text(f"{pid}\n")
        send(uri, run)
        client, (sent,) = runs(uri)
        assert (sent.info.status, len(history(client, sent, "bytes/up"))) == (status, rounds)
    ledger.write_meta({"rounds": 2})  # an app that writes no model has ended
    (run / ".lock").write_text(f"{dead.pid}\n")
    send(uri, run)
    assert runs(uri)[1][0].info.status == "FINISHED"


def test_a_server_that_is_not_there_stops_nothing(run, ledger, uri, tmp_path, monkeypatch):
    write(ledger, 1)
    write(ledger, 2)
    target = MLflow(uri, "fedkeel", run)
    real = MlflowClient.log_batch
    with monkeypatch.context() as patched:
        patched.setattr(MlflowClient, "log_batch", lambda *_, **__: (_ for _ in ()).throw(MlflowException("gone\nfar")))
        with pytest.raises(RunError, match=r"--mlflow failed \(gone\)"):
            follow.once(run / "ledger.sqlite", [target])
    assert MlflowClient.log_batch is real
    over(run)
    said = []
    follow.follow(run / "ledger.sqlite", [target], False, said.append)
    client, (sent,) = runs(uri)
    assert ([*history(client, sent, "bytes/up")], said) == ([1, 2], [])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "no tracker is named: add --tensorboard FOLDER, --mlflow URI, or both"),
        (
            ["--mlflow", "mlruns"],
            "--mlflow 'mlruns' is a folder, which MLflow no longer writes: write sqlite:///mlflow.db",
        ),
        (["--mlflow", "ftp://me:secret@x"], "--mlflow has the unknown scheme 'ftp': write sqlite:///mlflow.db"),
        (["--mlflow", "sqlite:////no/such/x.db"], "lies in no folder: make '/no/such'"),
        (["--mlflow", "http://127.0.0.1:9"], "--mlflow failed ("),
        (
            ["--tensorboard", "job.toml"],
            "--tensorboard 'job.toml' can not be written (File exists): name another",
        ),
        (["--tensorboard", "other"], "--tensorboard 'other' holds events of another run"),
        (["--tensorboard", "new"], "has no ledger yet: begin it first, or add --follow"),
    ],
)
def test_wrong_input_is_one_sentence(tmp_path, monkeypatch, capsys, arguments, sentence):
    (tmp_path / "job.toml").touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "events.out.tfevents.1.host.1.0").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["fedkeel", "track", ".", *arguments])
    with pytest.raises(SystemExit) as left:
        cli.main()
    said = capsys.readouterr().err
    assert left.value.code == 2
    assert sentence in said
    assert said.count("\n") == 1
    assert "secret" not in said


@pytest.mark.parametrize("extra", ["tensorboard", "mlflow"])
def test_a_missing_extra_is_told(monkeypatch, tmp_path, extra):
    module = {"tensorboard": "tensorboard.summary.writer.event_file_writer", "mlflow": "mlflow.tracking"}[extra]
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=rf"pip install 'fedkeel\[{extra}\]'"):
        TensorBoard(tmp_path, tmp_path) if extra == "tensorboard" else MLflow("sqlite:///x.db", "fedkeel", tmp_path)


def test_two_writers_of_one_folder(run, ledger, tmp_path):
    first = TensorBoard(tmp_path / "tb", run)
    with pytest.raises(InputError, match="is being written: end the other"):
        TensorBoard(tmp_path / "tb", run)
    first.close()
    TensorBoard(tmp_path / "tb", run).close()
