"""`fedkeel release`: exit codes, one sentence for what is wrong, JSON for programs."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

from fedkeel import cli
from fedkeel.release.registry import Registry

JOB = ["--set", "data.clients=4", "--set", "rounds=2", "--set", "data.partition=iid", "--set", "model.build=logistic"]
RULES = "".join(f'[{stage}]\nrules = ["fingerprint", "version"]\n' for stage in ("candidate", "staging", "production"))


def fedkeel(*arguments: str, at: Path) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of the command line."""
    before = Path.cwd()
    with pytest.MonkeyPatch.context() as here, redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        here.setattr(sys, "argv", ["fedkeel", *arguments])
        here.chdir(at)
        try:
            cli.main()
            code = 0
        except SystemExit as ended:
            code = int(ended.code or 0)
    assert Path.cwd() == before
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    (folder / "ward.toml").write_text('name = "ward"\n')
    for name, version, seed in (("a", "1.0.0", 0), ("b", "1.1.0", 1)):
        made = fedkeel(
            *("run", "ward.toml", "--out", name, "--set", f"model.version={version}", "--set", f"seed={seed}", *JOB),
            at=folder,
        )
        assert made[0] == 0, made[2]
    assert fedkeel("release", "init", "reg", at=folder)[0] == 0
    (folder / "reg" / "gate.toml").write_text(RULES)
    return folder


def test_a_release_through_its_life(place: Path):
    at = ("--registry", "reg")
    code, told, _ = fedkeel("release", "publish", "a", "--to", "production", *at, "--json", at=place)
    verdict = json.loads(told)
    assert (code, verdict["passed"], verdict["version"]) == (0, True, "1.0.0")
    code, told, _ = fedkeel("model", "check", "b", "--against", "reg/ward@production", "--json", at=place)
    assert (code, json.loads(told)["old"]["version"]) == (0, "1.0.0")
    assert fedkeel("model", "diff", "reg", "a", at=place)[1].startswith("identical: reg 1.0.0")
    assert fedkeel("release", "publish", "b", "--to", "production", *at, at=place)[0] == 0
    rows = json.loads(fedkeel("release", "list", *at, "--json", at=place)[1])
    assert [(row["version"], row["stages"]) for row in rows] == [("1.0.0", []), ("1.1.0", ["production"])]
    assert fedkeel("release", "get", "reg", "--out", "served", at=place)[0] == 0
    assert fedkeel("release", "verify", "served", "--expect", "reg/ward@production", at=place)[0] == 0
    assert fedkeel("release", "verify", "served", "--expect", rows[1]["fingerprint"], at=place)[0] == 0
    assert "1.0.0" in fedkeel("release", "rollback", *at, at=place)[1]
    code, told, _ = fedkeel("release", "verify", "served", "--expect", "reg", at=place)
    assert (code, told.startswith("not what was released: 'served' has weights")) == (1, True)
    assert fedkeel("release", "watch", "served", "a", "--expect", "reg", "--every", "0.1", at=place)[0] == 1
    assert fedkeel("release", "watch", "a", "--expect", "reg", "--once", at=place)[0] == 0
    moves = json.loads(fedkeel("release", "history", *at, "--json", at=place)[1])
    assert [move["kind"] for move in moves] == ["published", "published", "rolled back"]
    assert "1.1.0" in fedkeel("release", "history", "ward", *at, at=place)[1]
    assert "1 release dropped" in fedkeel("release", "gc", *at, "--keep", "0", at=place)[1]
    assert "collected" in fedkeel("release", "list", *at, at=place)[1]


def test_a_blocked_one_ends_with_1(place: Path):
    assert fedkeel("release", "init", "strict", at=place)[0] == 0
    (place / "strict" / "gate.toml").write_text(RULES.replace('"version"', '"accuracy(least=1)"'))
    code, told, _ = fedkeel("release", "publish", "a", "--to", "staging", "--registry", "strict", at=place)
    assert code == 1
    assert "  blocked  accuracy(least=1): accuracy 0." in told
    assert told.endswith("blocked from staging: ward 1.0.0\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["publish", "a", "--to", "live", "--registry", "reg"], "stage 'live' is unknown"),
        (["publish", "none", "--to", "staging", "--registry", "reg"], "run directory 'none' does not exist"),
        (["publish", "a", "--to", "staging"], "'registry' is no registry: make one with fedkeel release init"),
        (["list", "--registry", "a"], "'a' is no registry"),
        (["history", "wart", "--registry", "reg"], "has no model 'wart'"),
        (["get", "a", "--out", "x"], "'a' is no release: write DIR/NAME@production"),
        (["get", "reg@9.9.9", "--out", "x"], "has nothing at '9.9.9'"),
        (["verify", "a", "--expect", "abc"], "is no fingerprint of 64 hex digits and no release"),
        (["watch", "a", "--expect", "nowhere"], "'nowhere' is no release"),
        (["rollback", "--stage", "staging", "--registry", "reg"], "there is nothing to roll back to"),
        (["init", "ward.toml"], "cannot be opened"),
    ],
)
def test_what_is_wrong_is_one_sentence(place: Path, arguments: list[str], said: str):
    with Registry(place / "reg") as registry:
        empty = not registry.names
    if empty:
        fedkeel("release", "publish", "a", "--to", "candidate", "--registry", "reg", at=place)
    code, _, error = fedkeel("release", *arguments, at=place)
    assert (code, error.count("\n")) == (2, 1), error
    assert said in error
