"""`fedkeel audit`: its files, its exit codes, and that what is done is not done again."""

from __future__ import annotations

import json
import re
import sqlite3
import sys

import pytest

from fedkeel import Job, api, cli
from fedkeel.audit import study
from fedkeel.core.errors import InterruptedRunError

FEW = ("--sizes", "1", "--iterations", "5", "--shadows", "2", "--trials", "20", "--canaries", "60")
PARTS = ("inversion", "membership", "canaries")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    job = Job(name="small").with_settings(["rounds=2", "data.clients=4", "model.build=logistic", "train.backend=loop"])
    return api.run(job, tmp_path_factory.mktemp("audit") / "run", with_report=False).path


@pytest.fixture
def fedkeel(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["fedkeel", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        shown = capsys.readouterr()
        return int(stop.value.code or 0), shown.out, shown.err

    return call


@pytest.fixture
def accounted(run):
    """Have the run account for an epsilon, and forget it afterwards."""

    def say(epsilon):
        with sqlite3.connect(run / "ledger.sqlite") as ledger:
            ledger.execute("UPDATE rounds SET epsilon = ?", (epsilon,))
        ledger.close()

    yield say
    say(None)


def times(folder):
    return {part: (folder / f"{part}.json").stat().st_mtime_ns for part in PARTS}


def test_an_audit_leaves_its_figures_and_a_page(run, fedkeel):
    code, out, err = fedkeel("audit", run, *FEW)
    assert code == 0, err
    assert "accounts for no ε" in out
    for part in PARTS:
        assert f"{part}: done" in err
    found = json.loads((run / "audit" / "audit.json").read_text())
    assert found["accounted"] is None
    assert set(found["lower_bounds"]) == {"one canary, many trials", "many canaries, one round"}
    assert [case["model"] for case in found["inversion"]["cases"]] == ["first", "final"]
    assert set(found["membership"]["attacks"]) == {"loss threshold", "LiRA"}
    assert len(found["canaries"]["trials"]["inside"]) == 20
    page = (run / "audit" / "audit.html").read_text()
    assert page.count("data:image/png;base64,") == 2 * 5
    assert page.count('<svg class="chart"') == 3
    assert "://" not in re.sub(r'(?:xmlns|xmlns:xlink)="[^"]*"', "", page)
    assert not re.search(r'(?:src|href)="(?!data:|#)', page)
    assert "<script" not in page


def test_what_is_done_is_kept_and_only_what_changes_is_done_again(run, fedkeel, tmp_path):
    out = tmp_path / "audit"
    assert fedkeel("audit", run, *FEW, "--out", out)[0] == 0
    before, figures = times(out), json.loads((out / "audit.json").read_text())
    code, shown, _ = fedkeel("audit", run, *FEW, "--out", out, "--json")
    assert code == 0
    assert times(out) == before
    assert json.loads(shown)["canaries"] == figures["canaries"]
    fedkeel("audit", run, *FEW, "--trials", "25", "--out", out)
    after = times(out)
    assert [part for part in PARTS if after[part] != before[part]] == ["canaries"]
    (out / "membership.json").write_text("{")  # cut short
    assert fedkeel("audit", run, *FEW, "--out", out)[0] == 0
    again = json.loads((out / "audit.json").read_text())
    for part in PARTS:
        assert again[part] == figures[part]  # the seed's
    fedkeel("audit", run, *FEW, "--seed", "1", "--part", "canaries", "--out", out)
    other = json.loads((out / "audit.json").read_text())
    assert other["canaries"]["trials"] != figures["canaries"]["trials"]
    assert "membership" not in other


def test_an_interrupted_audit_goes_on_with_the_shadows_it_has(run, tmp_path):
    settings = study.Settings(shadows=3, trials=20, canaries=60)

    def stop(part, done, total):
        if (part, done) == ("membership", 2):
            raise KeyboardInterrupt

    with pytest.raises(InterruptedRunError, match="same arguments"):
        study.audit(run, out=tmp_path, parts=["membership"], settings=settings, watch=stop)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "shadows").iterdir()}
    assert len(kept) == 2
    study.audit(run, out=tmp_path, parts=["membership"], settings=settings)
    assert len(list((tmp_path / "shadows").iterdir())) == 3
    assert kept == {path: path.stat().st_mtime_ns for path in kept}


def test_an_epsilon_that_canaries_refute_is_exit_code_1(run, fedkeel, accounted):
    accounted(0.1)
    code, out, _ = fedkeel("audit", run, *FEW, "--part", "canaries")
    assert code == 1
    assert "does not hold" in out
    page = (run / "audit" / "audit.html").read_text()
    assert 'class="broken"' in page
    assert "ε ≤ 0.10" in page
    code, out, _ = fedkeel("audit", run, *FEW, "--part", "canaries", "--json")
    assert code == 1
    assert json.loads(out)["passed"] is False
    accounted(50.0)
    code, out, _ = fedkeel("audit", run, *FEW, "--part", "canaries")
    assert code == 0
    assert "Nothing refutes" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--part", "inverson"), "did you mean 'inversion'"),
        (("--sizes", "one"), "--sizes 'one'"),
        (("--sizes", "0"), "numbers of examples"),
        (("--shadows", "1"), "2 or more"),
        (("--trials", "3"), "20 or more"),
        (("--delta", "1"), "delta = 1"),
    ],
)
def test_what_can_not_be_meant_is_a_sentence(run, fedkeel, arguments, words):
    code, _, err = fedkeel("audit", run, *arguments)
    assert code == 2
    assert words in err
    assert err.count("\n") == 1


def test_only_a_finished_run_is_audited(run, fedkeel, tmp_path):
    assert fedkeel("audit", tmp_path / "nowhere")[0] == 2
    card = run / "model" / "card.json"
    card.rename(card.with_suffix(".away"))
    code, _, err = fedkeel("audit", run)
    card.with_suffix(".away").rename(card)
    assert code == 2
    assert "not finished" in err


def test_parts_that_do_not_fit_a_job_are_left_out_with_the_reason(tmp_path, fedkeel):
    job = Job(name="own").with_settings(
        ["rounds=1", "data.clients=4", "data.holdout=0.2", "model.build=mlp(hidden=(8,))", "model.private=head"]
    )
    path = api.run(job, tmp_path / "run", with_report=False).path
    code, _, err = fedkeel("audit", path, *FEW)
    assert code == 0, err
    found = json.loads((path / "audit" / "audit.json").read_text())
    assert "layers of their own" in found["inversion"]["left_out"]
    assert "layers of their own" in found["membership"]["left_out"]
    assert found["canaries"]["clients"] == 4
    assert "What was left out" in (path / "audit" / "audit.html").read_text()


def test_the_sentence_on_epsilon():
    low = {"one": 1.0, "other": 3.0}
    assert study.judgement(2.0, low, 1e-5)[0] is False
    assert study.judgement(3.5, low, 1e-5)[0] is True
    assert study.judgement(None, low, 1e-5)[0] is True
    assert "Gaussian" not in study.judgement(2.0, low, 1e-5)[1]
    assert "Gaussian" in study.judgement(2.0, low | {study.GAUSSIAN: 4.0}, 1e-5)[1]
    assert study.judgement(0.1, {}, 1e-5) == (True, "Canaries were left out, so that nothing is said of ε.")


def test_gaussian_noise_is_supposed_only_of_runs_that_account_for_an_epsilon():
    bound = {"confidence": 0.99, "epsilon": 1.0, "gaussian": 9.0}
    found = {"canaries": {"trials": {"bounds": [bound]}, "one_run": {"bounds": [bound | {"gaussian": 1.0}]}}}
    assert set(study.lower_bounds(found, gaussian=False).values()) == {1.0}
    assert max(study.lower_bounds(found, gaussian=True).values()) == 9.0
    assert study.lower_bounds({"canaries": {"left_out": "why"}}, gaussian=True) == {}
