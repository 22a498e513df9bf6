"""Data that stays at its nodes, and figures of clients' own models, over real processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from deployed import deployed

import fedkeel

pytestmark = pytest.mark.filterwarnings("default")  # Flower's own dependencies warn

HOSPITAL = """
import torch
from sklearn.datasets import load_digits

def load(client):
    found = load_digits()
    mine = torch.arange(int(client[-1]), 1500, 2)
    return found.images[mine][:, None].astype("uint8"), found.target[mine]

def broken(client):
    raise KeyError("no such ward")

def test():
    found = load_digits()
    return found.images[1500:][:, None].astype("uint8"), found.target[1500:]
"""


def _settings(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_personal_models_and_codecs_both_ways_are_as_in_the_simulation(tmp_path: Path) -> None:
    job = fedkeel.Job(
        name="own",
        rounds=3,
        data={"clients": 3, "holdout": 0.2},
        model={"build": "mlp(hidden=[16])", "private": ["head"]},
        train={"stopping": "steps(steps=5)"},
        client={"codec": "int8", "error_feedback": True},
        server={"codec": "int8", "zstd": 3},
        record={"groups": {"first": "client-0"}},
    )
    with deployed(tmp_path / "d", job) as net:
        serving = net.server()
        net.node("client-0", "client-1", "client-2")
        net.wait(lambda: serving.poll() is not None)
        assert serving.returncode == 0
    done = fedkeel.Run(net.local.run)
    simulated = fedkeel.run(net.local.server.job, tmp_path / "simulated", with_report=False)
    assert torch.equal(done.state.theta, simulated.state.theta)
    assert done.metrics == simulated.metrics
    both = [[(row["bytes_up"], row["bytes_down"]) for row in run.rounds] for run in (done, simulated)]
    assert both[0] == both[1]
    assert both[0][1][1] < both[0][0][1] / 3  # from the second round on, coded steps
    assert {row["scope"] for row in done.metrics} >= {"global", "clients", "group/first", "client/client-2"}


def test_each_host_names_the_function_that_loads_its_data(tmp_path: Path) -> None:
    job = fedkeel.Job(name="own", rounds=4, data={"clients": 3, "holdout": 0.1}, train={"stopping": "steps(steps=20)"})
    with deployed(tmp_path / "d", job) as net:
        (net.folder / "hospital.py").write_text(HOSPITAL)
        for client in ("client-0", "client-1"):
            _settings(net.folder / "nodes" / client / "node.toml", 'data = "job"', 'data = "../../hospital.py:load"')
        _settings(net.folder / "nodes" / "client-2" / "node.toml", 'data = "job"', 'data = "../../hospital.py:broken"')
        _settings(net.folder / "server" / "server.toml", 'data = "job"', 'data = "../hospital.py:test"')
        serving = net.server()
        net.node("client-0", "client-1", "client-2")
        net.wait(lambda: serving.poll() is not None)
        assert serving.returncode == 0
    done = fedkeel.Run(net.local.run)
    used = {(row["client"], row["num_examples"]) for row in done.updates if row["stage"] is None}
    assert used == {("client-0", 675), ("client-1", 675)}
    told = [row for row in done.updates if row["client"] == "client-2"]
    assert len(told) == 4
    assert all(row["stage"] == "train" and "no such ward" in row["reason"] for row in told)
    final = done.final()
    assert final is not None
    assert final["examples"] == 297
    assert final["value"] > 0.5
    assert done.final(scope="clients")["examples"] == 150


@pytest.mark.parametrize(
    ("code", "reference", "words"),
    [
        ("def load(client): return [[1.0]], [0]", "mine.py:load", "shape"),
        ("def load(client): raise KeyError('no table')", "mine.py:load", "KeyError"),
        ("load = 3", "mine.py:load", "no function"),
        ("", "mine.py:load", "can not be loaded"),
        ("def load(client): return 1", "mine.py:load", r"must return \(x, y\)"),
        ("", "load", "can not be loaded"),
    ],
)
def test_a_loader_that_does_not_fit_is_named(tmp_path: Path, code: str, reference: str, words: str) -> None:
    from fedkeel.deploy import init, loaders
    from fedkeel.deploy.folder import NodeFolder

    init.write(fedkeel.Job(name="own", data={"clients": 2}), tmp_path / "d")
    folder = tmp_path / "d" / "nodes" / "client-0"
    name = f"mine_{abs(hash((code, reference)))}"
    (folder / f"{name}.py").write_text(code)
    reference = reference.replace("mine", name)
    _settings(folder / "node.toml", 'data = "job"', f'data = "{reference}"')
    with pytest.raises(fedkeel.InputError, match=words):
        loaders.at_node(NodeFolder(folder))
