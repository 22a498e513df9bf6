"""The command line: what it prints, what it leaves behind, and its exit codes."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from fedkeel import cli
from fedkeel.config import Job

SMALL = ["rounds=3", "data.clients=6", "model.build=logistic", "train.backend=loop"]


@pytest.fixture
def fedkeel(monkeypatch, tmp_path, capsys):
    """Run the CLI in this process, in an empty directory: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fedkeel", *arguments])
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return call


def sets(*more: str) -> list[str]:
    return [part for setting in (*SMALL, *more) for part in ("--set", setting)]


def test_new_run_resume_report(fedkeel, tmp_path):
    assert fedkeel("new", "clinic")[0] == 0
    assert Job(**tomllib.loads(Path("clinic.toml").read_text())).name == "clinic"
    code, out, err = fedkeel("run", "clinic.toml", *sets())
    assert code == 0, err
    assert "accuracy" in out
    assert "round 3/3" in err
    run = tmp_path / "runs" / "clinic"
    for part in ("job.toml", "ledger.sqlite", "model/model.safetensors", "model/card.json", "report.html"):
        assert (run / part).is_file(), part
    assert f"{Path('runs') / 'clinic' / 'report.html'}" in out
    code, out, _ = fedkeel("resume", "runs/clinic", "--json")
    assert code == 0
    assert json.loads(out)["final"]["accuracy"]["value"] > 0.2
    assert fedkeel("run", "clinic.toml", *sets(), "--json")[0] == 0
    assert (tmp_path / "runs" / "clinic-2").is_dir()
    code, out, _ = fedkeel("report", "runs/clinic", "runs/clinic-2", "--out", "both.html")
    assert code == 0
    assert "clinic-2" in Path("both.html").read_text()


def test_new_custom_runs_as_it_is(fedkeel):
    assert fedkeel("new", "mine", "--custom")[0] == 0
    code, out, err = fedkeel("run", "mine.toml", "--set", "rounds=2", "--set", "train.backend=loop", "--json")
    assert code == 0, err
    run = Path(json.loads(out)["run"])
    assert (run / "plugins" / "mine_custom.py").read_text() == Path("mine_custom.py").read_text()
    assert fedkeel("new", "mine")[0] == 2


def test_every_line_of_a_new_job_file_says_what_it_is_for(fedkeel):
    fedkeel("new", "clinic")
    text = Path("clinic.toml").read_text()
    keys = [line for line in text.splitlines() if "=" in line and not line.startswith("# ")]
    assert len(keys) > 25
    assert [line for line in keys if "#" not in line and not line.startswith("name")] == []
    values = tomllib.loads(text)
    assert {**Job().model_dump(mode="json", exclude_none=True), "name": "clinic"} == values


def test_compare_gives_a_table_a_csv_and_a_report_and_can_be_called_again(fedkeel):
    fedkeel("new", "job")
    arguments = ("compare", "job.toml", *sets(), "--vary", "aggregate.reduce=mean,trimmed_mean(trim=1)", "--seeds", "2")
    code, out, err = fedkeel(*arguments, "--out", "cmp")
    assert code == 0, err
    assert "trimmed_mean(trim=1)" in out
    rows = list(csv.DictReader(Path("cmp/comparison.csv").read_text().splitlines()))
    assert [row["variant"] for row in rows] == ["mean", "trimmed_mean(trim=1)", "local-only", "centralised"]
    assert [row["aggregate.reduce"] for row in rows] == ["mean", "trimmed_mean(trim=1)", "", ""]
    for row in rows:
        values = [float(v) for v in row["values"].split()]
        assert len(values) == int(row["seeds"]) == 2
        assert float(row["low"]) < float(row["mean"]) < float(row["high"])
        assert float(row["mean"]) == pytest.approx(sum(values) / 2, abs=1e-5)
    assert "<html" in Path("cmp/report.html").read_text()
    before = {p: p.stat().st_mtime_ns for p in Path("cmp").rglob("model.safetensors")}
    code, out, err = fedkeel(*arguments, "--out", "cmp", "--json")
    assert code == 0, err
    assert len(json.loads(out)["variants"]) == 4
    assert before == {p: p.stat().st_mtime_ns for p in Path("cmp").rglob("model.safetensors")}
    assert fedkeel(*arguments, "--out", "cmp", "--set", "train.lr=0.2")[0] == 2


def test_rules_lists_what_exists(fedkeel):
    code, out, _ = fedkeel("rules", "--json")
    assert code == 0
    kinds = {row["kind"]: row["rules"] for row in json.loads(out)}
    assert {"mean", "median", "trimmed_mean", "geometric_median"} <= set(kinds["reducer"])
    code, out, _ = fedkeel("rules", "reducer")
    assert "trimmed_mean(trim)" in out
    code, out, _ = fedkeel("rules", "weigher", "krum")
    assert "Blanchard" in out
    assert "required" in out
    code, out, _ = fedkeel("rules", "weigher", "krum", "--json")
    assert json.loads(out)["parameters"][0]["name"] == "f"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--set", "train.learning_rate=1"], "key 'train.learning_rate' is unknown: did you mean 'train.lr'?"),
        (["--set", "train.lr=fast"], "train.lr = 'fast' is not valid"),
        (["--set", "train.lr"], "is no setting: write section.key=value"),
        (["--set", "rounds=0"], "rounds = 0 is not valid"),
        (["--set", "aggregate.reduce=meen"], "aggregate.reduce: reducer 'meen' is unknown: did you mean 'mean'?"),
        (["--set", "aggregate.reduce=trimmed_mean"], "needs parameter 'trim'"),
        (["--set", "aggregate.reduce=trimmed_mean(trim=3)"], "needs at least 7 rows, but select.cohort is 6"),
        (["--set", "aggregate.weigh=krum(f=2)"], "needs at least 7 rows, but select.cohort is 6"),
        (
            ["--set", "aggregate.weigh=krum(f=1)", "--set", "aggregate.reduce=trimmed_mean(trim=1)"],
            "needs at least 3 rows, but weigher 'krum(f=1)' leaves 1 of 6",
        ),
        (["--set", "attack.clients=7", "--set", "attack.rule=nan"], "more than data.clients = 6"),
        (["--set", "attack.clients=2"], "attack.rule is missing"),
        (["--set", "select.cohort=9"], "more than data.clients = 6"),
        (["--set", "model.private=tail", "--set", "data.holdout=0.2"], "model.private 'tail' matches no tensor"),
        (["--set", "model.private=*bias"], "set data.holdout"),
        (["--set", "data.clients=5000", "--set", "data.partition=iid"], "clients"),
        (["--set", "data.source=fashion_mnist(path='/nowhere')"], "/nowhere"),
        (["--set", "train.backend=fast"], "did you mean"),
        (["--set", "model.version=1.0"], "semantic version"),
        (["--plugin", "missing.py"], "missing.py"),
        (["--out", "job.toml"], "is a file"),
    ],
)
def test_wrong_input_is_one_sentence_and_leaves_nothing(fedkeel, arguments, said):
    fedkeel("new", "job")
    code, out, err = fedkeel("run", "job.toml", *sets(), *arguments)
    assert code == 2, (out, err)
    assert said in err
    assert len(err.strip().splitlines()) == 1
    assert "Traceback" not in err
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rounds = ", "is not valid TOML"),
        ("[trian]\nlr = 1.0", "key 'trian' is unknown: did you mean 'train'?"),
        ("rounds = true", "rounds = True is not valid"),
        ("train = 3", "train = 3 is not valid"),
        ("\x00", "is not valid TOML"),
    ],
)
def test_a_wrong_job_file_is_one_sentence(fedkeel, text, said):
    Path("job.toml").write_text(text)
    code, _, err = fedkeel("run", "job.toml")
    assert code == 2
    assert said in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ("run", "none.toml"),
        ("resume", "nowhere"),
        ("report", "nowhere"),
        ("rules", "reducr"),
        ("rules", "reducer", "meen"),
        ("new", "a/b"),
        ("compare", "none.toml", "--vary", "x=1"),
    ],
)
def test_what_is_not_there_exits_with_two(fedkeel, arguments):
    code, _, err = fedkeel(*arguments)
    assert code == 2
    assert err.startswith("error: ")


def test_help_comes_without_torch_and_usage_errors_exit_with_two():
    program = "import sys; from fedkeel import cli; sys.argv = ['fedkeel', '--help']\n"
    program += "try:\n cli.main()\nexcept SystemExit: pass\n"
    check = (
        program + "assert 'torch' not in sys.modules and 'numpy' not in sys.modules and 'pydantic' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "resume" in done.stdout
    for arguments, words in (
        (["run"], "Missing argument"),
        (["frobnicate"], "No such command 'frobnicate'"),
        (["compare", "job.toml"], "Missing option '--vary'"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "fedkeel", *arguments], capture_output=True, text=True, check=False
        )
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert words in done.stderr
        assert done.stderr.count("\n") == 1


def test_probe_gives_a_verdict_for_every_attack_and_defence_and_can_be_called_again(fedkeel):
    fedkeel("new", "job")
    arguments = ("probe", "job.toml", *sets(), "--hostile", "1", "--attack", "gaussian", "--attack", "nan")
    code, out, err = fedkeel(*arguments, "--out", "probe")
    assert code == 0, err
    assert "plain mean" in out
    assert "best worst case" in out
    rows = list(csv.DictReader(Path("probe/probe.csv").read_text().splitlines()))
    assert {row["attack"] for row in rows} == {"no attack", "gaussian", "nan"}
    found = {(row["attack"], row["defence"]): row["verdict"] for row in rows}
    assert found["no attack", "plain mean"] == "holds"
    assert found["gaussian", "plain mean"] == "breaks"
    assert found["gaussian", "geometric median"] in ("holds", "bends")
    page = Path("probe/report.html").read_text()
    assert "Best against 2 attacks" in page
    assert "bulyan(f=1)' needs at least 7 rows, but select.cohort is 6" in page.replace("&#39;", "'")
    before = {p: p.stat().st_mtime_ns for p in Path("probe").rglob("model.safetensors")}
    code, out, err = fedkeel(*arguments, "--out", "probe", "--json")
    assert code == 0, err
    assert len(json.loads(out)["cells"]) == len(rows)
    assert before == {p: p.stat().st_mtime_ns for p in Path("probe").rglob("model.safetensors")}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--hostile", "0"), "hostile = 0: write 1 to"),
        (("--hostile", "99"), "hostile = 99: write 1 to"),
        (("--hostile", "1", "--attack", "sign_flop"), "did you mean 'sign_flip'"),
        (("--hostile", "1", "--seeds", "0"), "seeds = 0: at least one is needed"),
    ],
)
def test_a_probe_that_can_not_be_made_is_a_sentence(fedkeel, arguments, words):
    fedkeel("new", "job")
    code, _, err = fedkeel("probe", "job.toml", *sets(), *arguments)
    assert code == 2
    assert words in err
    assert not Path("runs").exists()
