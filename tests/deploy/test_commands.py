"""`fedkeel deploy` from the command line: what it writes, and one sentence for what is wrong."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import fedkeel
from fedkeel.deploy import init, process
from fedkeel.deploy.folder import NodeFolder, ServerFolder
from fedkeel.deploy.local import Local

JOB = """
name = "net"
rounds = 2
[data]
clients = 4
[devices]
profile = "reference"
[attack]
rule = "sign_flip"
clients = 1
"""


def fedkeel_cli(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fedkeel", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, timeout=60)


@pytest.fixture
def job(tmp_path: Path) -> Path:
    (tmp_path / "net.toml").write_text(JOB)
    return tmp_path / "net.toml"


def test_init_writes_what_each_host_needs_and_no_more(job: Path, tmp_path: Path) -> None:
    done = fedkeel_cli("deploy", "init", "net.toml", "--out", "d", "--nodes", "3", "--host", "a.example", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "left out: [attack]" in done.stderr
    assert "left out: [devices]" in done.stderr
    folder = tmp_path / "d"
    server = ServerFolder(folder / "server")
    assert server.job.data.clients == 3
    assert server.job.attack.clients == 0
    assert sorted(peer.device for peer in server.settings.nodes.values()) == ["A", "B", "C"]
    assert server.settings.host == "0.0.0.0"
    nodes = [NodeFolder(path) for path in sorted((folder / "nodes").iterdir())]
    assert [node.settings.client for node in nodes] == list(server.settings.nodes)
    assert len({node.settings.port for node in nodes}) == 3
    secrets = {path.read_bytes() for path in folder.rglob("secret")}
    assert len(secrets) == 4
    for path in [*folder.rglob("*.key"), *folder.rglob("secret")]:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    assert not list((folder / "nodes").rglob("ca.key"))
    assert not list((folder / "server").rglob("ca.key"))
    project = tomllib.loads((folder / "flower" / "pyproject.toml").read_text())
    assert project["project"]["dependencies"] == [f"fedkeel[deploy]=={fedkeel.__version__}"]
    built = subprocess.run(
        [str(Path(sys.executable).with_name("flwr")), "build"],
        cwd=folder / "flower",
        env={**os.environ, **process.QUIET, "FLWR_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    compose = (folder / "compose.yaml").read_text()
    assert all(name in compose for name in server.settings.nodes)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("deploy", "init", "none.toml"), "does not exist"),
        (("deploy", "init", "net.toml", "--out", "full"), "holds something already"),
        (("deploy", "init", "net.toml", "--set", "data.pooled=true", "--set", "attack.clients=0"), "data.pooled"),
        (("deploy", "init", "net.toml", "--set", "model.private=['*']", "--set", "data.holdout=0.2"), "private"),
        (("deploy", "init", "net.toml", "--host", "a b"), "--host"),
        (("deploy", "init", "net.toml", "--port", "64999", "--nodes", "600", "--set", "data.partition=iid"), "--port"),
        (("deploy", "up", "full", "--local"), "server.toml"),
        (("deploy", "up", "d"), "--local"),
        (("deploy", "status", "nowhere"), "server.toml"),
        (("deploy", "logs", "d", "sever"), "server"),
        (("server", "full"), "server.toml"),
        (("client", "full"), "node.toml"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    job: Path, tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").write_text("mine")
    init.write(fedkeel.load(job), tmp_path / "d")
    (tmp_path / "d" / "logs").mkdir()
    (tmp_path / "d" / "logs" / "server.log").write_text("a\nb\n")
    done = fedkeel_cli(*arguments, cwd=tmp_path)
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "full" / "something").read_text() == "mine"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("port = 0", "port = 0 is not valid"),
        ("pots = 3", "key 'pots' is unknown: did you mean"),
        ("port = ", "can not be read"),
        ('client = "a"', "'server' is missing"),
    ],
)
def test_settings_that_are_not_valid_are_named(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "node.toml").write_text(text)
    with pytest.raises(fedkeel.InputError, match=words):
        NodeFolder(tmp_path)


def test_the_server_ends_with_the_reason_where_its_data_do_not_load(job: Path, tmp_path: Path) -> None:
    init.write(fedkeel.load(job), tmp_path / "d", port=18_300)
    settings = tmp_path / "d" / "server" / "server.toml"
    settings.write_text(settings.read_text().replace('data = "job"', 'data = "nowhere:load"'))
    done = fedkeel_cli("deploy", "up", "d", "--local", cwd=tmp_path)
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert "nowhere" in done.stderr
    assert not any(process.alive for process in Local(tmp_path / "d").processes())


def test_nodes_that_run_already_are_not_started_a_second_time_in_other_processes(job: Path, tmp_path: Path) -> None:
    init.write(fedkeel.load(job), tmp_path / "d", port=18_400)
    local = Local(tmp_path / "d")
    (tmp_path / "d" / "logs").mkdir()
    pid = local._spawn("nodes-0", ["dashboard", str(tmp_path / "d"), "--port", "0"])  # it lasts
    (tmp_path / "d" / "processes.json").write_text(json.dumps({"nodes-0": pid}))
    with pytest.raises(fedkeel.InputError, match=r"run already, .*\(nodes-0\).*`fedkeel deploy stop"):
        local.start(apart=True)
    assert [process.name for process in local.processes()] == ["nodes-0"]
    assert local.stop() == 1


def test_a_failure_is_told_in_the_words_of_this_start_not_of_an_earlier_one(job: Path, tmp_path: Path) -> None:
    init.write(fedkeel.load(job), tmp_path / "d", port=18_500)
    (tmp_path / "d" / "logs").mkdir()
    (tmp_path / "d" / "logs" / "server.log").write_text("fedkeel: an old sorrow\n")
    local = Local(tmp_path / "d")
    local._spawn("server", ["server", "nowhere"])
    local._own[0].wait()
    with pytest.raises(fedkeel.FedkeelError, match=r"the server ended: (?!an old sorrow)"):
        local.watch()
    assert local.stop() == 0
