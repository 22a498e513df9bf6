"""The ledger keeps what it was given, refuses what is no ledger, and is read while it is written."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from fedkeel.core.errors import InputError, RunError
from fedkeel.core.types import ClientRow, Refusal, RoundReport
from fedkeel.ship.ledger import Ledger
from fedkeel.ship.rundir import RunDir


def report(round: int, *clients: ClientRow, **fields: object) -> RoundReport:
    rows = clients or (ClientRow("a", None, weight=1.0, norm=2.0, bytes_up=10),)
    return RoundReport(round, round, 1.5 * round, rows, **fields)  # type: ignore[arg-type]


@pytest.fixture
def ledger(tmp_path: Path):
    with Ledger(tmp_path / "ledger.sqlite") as opened:
        yield opened


def test_a_round_comes_back_as_it_was_written(ledger):
    good = ClientRow("a", None, 0.75, 2.5, 0.9, 0.01, 1.5, -0.25, 100, 5, 0, 1000, 400, 2.5, {"loss": 0.5})
    bad = ClientRow("b", Refusal("check", "norm_bound", "norm 90 exceeds 10", 90.0), norm=90.0, bytes_up=1000)
    ledger.write_round(
        report(3, good, bad, skipped="too few", epsilon=0.5, bytes_down=7, seconds={"train": 0.25}), {"b"}
    )
    (line,) = ledger.rounds()
    assert line.pop("wall") > 1.7e9
    assert line == {
        "round": 3, "version": 3, "time": 4.5, "skipped": "too few", "update_norm": 0.0, "bytes_up": 2000,
        "bytes_down": 7, "epsilon": 0.5, "seconds": {"train": 0.25}, "charge": None,
    }  # fmt: skip
    first, second = ledger.updates(3)
    assert first == {
        "round": 3, "client": "a", "stage": None, "rule": None, "reason": None, "score": None, "weight": 0.75,
        "norm": 2.5, "cosine": 0.9, "variance": 0.01, "trust": 1.5, "contribution": -0.25,
        "num_examples": 100, "steps": 5, "staleness": 0, "bytes_up": 1000, "bytes_down": 400, "seconds": 2.5,
        "metrics": {"loss": 0.5}, "hostile": 0,
    }  # fmt: skip
    assert [second[k] for k in ("stage", "rule", "reason", "score", "hostile")] == [
        "check", "norm_bound", "norm 90 exceeds 10", 90.0, 1,
    ]  # fmt: skip


def test_the_truth_is_unknown_outside_a_simulator(ledger):
    ledger.write_round(report(1))
    assert ledger.updates()[0]["hostile"] is None


def test_metrics_by_name_and_scope(ledger):
    ledger.write_metrics(0, 0, {"accuracy": (0.5, 0.4, 0.6), "loss": 2.0}, 100)
    ledger.write_metrics(0, 0, {"accuracy": 0.1}, 10, scope="client:a")
    assert [(m["name"], m["value"], m["low"]) for m in ledger.metrics()] == [
        ("accuracy", 0.5, 0.4), ("loss", 2.0, None),
    ]  # fmt: skip
    assert [m["scope"] for m in ledger.metrics("accuracy", scope=None)] == ["client:a", "global"]


def test_meta_holds_json_values(ledger):
    ledger.write_meta({"seed": 7, "label_histogram": {"counts": [[1, 2], [3, 4]]}})
    ledger.write_meta({"seed": 8})
    assert ledger.meta == {"seed": 8, "label_histogram": {"counts": [[1, 2], [3, 4]]}}


def test_what_a_hostile_client_names_never_stops_a_round(ledger):
    row = ClientRow(
        "\ud800'); DROP TABLE rounds;--\x00", Refusal("check", "finite", "\udfff", float("nan")), norm=float("inf"),
        num_examples=2**80, steps=-(2**80), metrics={"\ud800": float("nan")},
    )  # fmt: skip
    ledger.write_round(report(1, row))
    (line,) = ledger.updates(1)
    assert line["num_examples"] == 2**63 - 1
    assert line["steps"] == -(2**63)
    assert line["norm"] == float("inf")
    assert line["score"] is None
    assert line["metrics"] == {"\ud800": None}
    assert line["client"] == "\\ud800'); DROP TABLE rounds;--\x00"
    assert len(ledger.rounds()) == 1


def test_a_transaction_stands_as_a_whole_or_not_at_all(ledger):
    def interrupted() -> None:
        with ledger.transaction():
            ledger.write_round(report(1))
            ledger.write_metrics(1, 1, {"loss": 1.0})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert ledger.rounds() == ledger.updates() == ledger.metrics() == []
    with ledger.transaction():
        ledger.write_round(report(1))
        ledger.write_metrics(1, 1, {"loss": 1.0})
    assert (len(ledger.rounds()), len(ledger.metrics())) == (1, 1)


def test_no_round_counts_twice(ledger):
    ledger.write_round(report(1))
    with pytest.raises(RunError, match="UNIQUE"):
        ledger.write_round(report(1))
    assert len(ledger.updates()) == 1


def test_rewind_forgets_what_came_after(ledger):
    for number in range(5):
        ledger.write_round(report(number))
        ledger.write_metrics(number, number, {"loss": 1.0})
    ledger.rewind(2)
    assert [r["round"] for r in ledger.rounds()] == [0, 1, 2]
    assert [u["round"] for u in ledger.updates()] == [0, 1, 2]
    assert [m["round"] for m in ledger.metrics()] == [0, 1, 2]
    ledger.write_round(report(3))
    assert len(ledger.rounds()) == 4


def test_a_reader_sees_whole_rounds_while_a_writer_writes(ledger):
    ledger.write_round(report(1))
    with Ledger(ledger.path, readonly=True) as reader:
        with ledger.transaction():
            ledger.write_round(report(2))
            assert [r["round"] for r in reader.rounds()] == [1]
        assert [r["round"] for r in reader.rounds()] == [1, 2]
        with pytest.raises(RunError, match="readonly"):
            reader.write_meta({"a": 1})


def test_a_killed_writer_leaves_its_finished_transactions(tmp_path):
    path = tmp_path / "ledger.sqlite"
    script = (
        "import os, signal, sys; from fedkeel.ship.ledger import Ledger\n"
        "ledger = Ledger(sys.argv[1]); ledger.write_meta({'a': 1})\n"
        "with ledger.transaction():\n    ledger.write_meta({'a': 2}); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", script, path], check=False).returncode == -9
    with Ledger(path, readonly=True) as reader:
        assert reader.meta == {"a": 1}


def test_a_ledger_where_nothing_may_be_written_is_read():
    directory = Path(tempfile.mkdtemp())
    with Ledger(directory / "ledger.sqlite") as ledger:
        ledger.write_meta({"a": 1})
    directory.chmod(0o555)
    user = os.geteuid()
    try:
        if user == 0:
            os.seteuid(65534)  # root may write anywhere
        with Ledger(ledger.path, readonly=True) as reader:
            assert reader.meta == {"a": 1}
    finally:
        os.seteuid(user)
        shutil.rmtree(directory)


def foreign_database(path: Path) -> None:
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE rounds(x)")
    db.close()


def newer_schema(path: Path) -> None:
    Ledger(path).close()
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()


@pytest.mark.parametrize("readonly", [True, False])
@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda path: path.write_bytes(b"no database " * 1000), "is no ledger"),
        (lambda path: path.mkdir(), "is no ledger|does not exist"),
        (foreign_database, "no ledger of a run"),
        (newer_schema, "schema 99"),
    ],
)
def test_what_is_no_ledger_is_refused_and_left_alone(tmp_path, make, sentence, readonly):
    path = tmp_path / "ledger.sqlite"
    make(path)
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(InputError, match=sentence):
        Ledger(path, readonly=readonly)
    assert before is None or path.read_bytes() == before


def test_a_missing_ledger_is_not_made_by_a_reader(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        Ledger(tmp_path / "ledger.sqlite", readonly=True)
    assert not list(tmp_path.iterdir())


def test_a_corrupt_ledger_is_refused_in_a_sentence(ledger):
    with ledger.transaction():
        for number in range(2000):
            ledger.write_round(report(number))
    ledger.close()
    content = bytearray(ledger.path.read_bytes())
    content[4096 * 3 :] = b"\xff" * (len(content) - 4096 * 3)
    ledger.path.write_bytes(content)
    with Ledger(ledger.path, readonly=True) as reader, pytest.raises(InputError, match="malformed"):
        reader.updates()


class TestRunDir:
    def test_a_run_is_made_once(self, tmp_path):
        run = RunDir.create(tmp_path / "runs" / "x", 'name = "x"\n')
        assert run.job.read_text() == 'name = "x"\n'
        assert run.checkpoints.is_dir()
        assert RunDir(run.path).path == run.path
        with pytest.raises(InputError, match="holds a run already"):
            RunDir.create(run.path, "")

    def test_an_empty_directory_will_do_and_another_will_not(self, tmp_path):
        (tmp_path / "empty").mkdir()
        RunDir.create(tmp_path / "empty", "")
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "thesis.tex").touch()
        with pytest.raises(InputError, match=r"other files \('thesis.tex'\)"):
            RunDir.create(tmp_path / "full", "")
        with pytest.raises(InputError, match="is a file"):
            RunDir.create(tmp_path / "full" / "thesis.tex", "")
        with pytest.raises(InputError, match="cannot be made"):
            RunDir.create(tmp_path / "full" / "thesis.tex" / "x", "")

    def test_a_run_killed_while_it_was_made_does_not_block_its_name(self, tmp_path):
        path = tmp_path / "x"
        (path / "checkpoints").mkdir(parents=True)
        (path / ".lock").touch()
        (path / "job.toml.part").touch()
        assert RunDir.create(path, "a = 1\n").job.read_text() == "a = 1\n"

    def test_what_is_no_run_is_not_opened(self, tmp_path):
        with pytest.raises(InputError, match="holds no run"):
            RunDir(tmp_path)
        with pytest.raises(InputError, match="does not exist"):
            RunDir(tmp_path / "nothing")

    def test_two_processes_never_share_a_run(self, tmp_path):
        run = RunDir.create(tmp_path / "x", "")
        hold = (
            "import sys; from fedkeel.ship.rundir import RunDir\n"
            "with RunDir(sys.argv[1]).lock():\n    print('held', flush=True); sys.stdin.read()\n"
        )
        with subprocess.Popen(
            [sys.executable, "-c", hold, run.path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as other:
            assert other.stdout.readline() == b"held\n"
            with pytest.raises(RunError, match=f"in use by process {other.pid}"), run.lock():
                pass
            other.kill()
        with run.lock():
            pass
        with run.lock():
            pass
