"""A federation that is brought from one version of its model to the next while its clients stay: nobody is lost."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from deployed import Deployed, claims, deployed

import fedkeel
from fedkeel.ship import card

pytestmark = pytest.mark.filterwarnings("default")  # Flower's own dependencies warn
WARDS = Path(__file__).parents[1] / "release" / "wards.py"
CLIENTS = ["client-0", "client-1", "client-2"]


def job(rounds: int, *settings: str) -> fedkeel.Job:
    return fedkeel.Job(name="wards", rounds=rounds, plugins=(str(WARDS),)).with_settings(
        [
            "data.source=patients",
            "data.clients=3",
            "data.partition=iid",
            "model.build=mlp(hidden=(6,))",
            "model.version=1.2.0",
            "train.stopping=steps(steps=5)",
            "record.checkpoint_every=1",
            "client.codec=int8",
            "client.error_feedback=true",
            *settings,
        ]
    )


def bring(folder: Path, changed: fedkeel.Job) -> None:
    """Write a new job into a host's folder, as an operator would."""
    kept = changed.model_copy(update={"plugins": (f"plugins/{WARDS.name}",)})
    (folder / "job.toml").write_text(kept.to_toml())


def used(net: Deployed) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for row in claims(fedkeel.Run(net.local.run).updates):
        if row["weight"] and row["weight"] > 0:
            found.setdefault(row["round"], []).append(row["client"])
    return {round: sorted(clients) for round, clients in found.items()}


def test_a_running_federation_goes_from_1_2_to_1_3_and_loses_no_client(tmp_path: Path) -> None:
    newer = job(
        40,
        "model.version=1.3.0",
        "data.source=patients(columns=5, labels=3)",
        f"model.start={tmp_path / 'before'}",
    )
    with deployed(tmp_path / "d", job(100_000)) as net:
        serving = net.server()
        nodes = {client: net.node(client) for client in CLIENTS}
        net.wait(lambda: net.round >= 2)
        serving.terminate()
        serving.wait()
        shutil.move(net.local.run, tmp_path / "before")
        bring(net.folder / "server", newer)
        serving = net.server()  # its clients are at 1.2 still
        for upgraded, client in enumerate(CLIENTS):
            net.wait(lambda least=3 + 6 * upgraded: net.round >= least)  # type: ignore[misc]
            nodes[client].terminate()
            nodes[client].wait()
            bring(net.folder / "nodes" / client, newer)
            nodes[client] = net.node(client)
        net.wait(lambda: serving.poll() is not None)
        assert serving.returncode == 0
    rounds = used(net)
    assert set(rounds) == set(range(1, 41))
    # A node that is down while it is brought over misses what it misses; else all take part, of whichever version.
    assert rounds[1] == rounds[40] == CLIENTS
    assert sum(clients == CLIENTS for clients in rounds.values()) >= 30
    refused = [row["reason"] for row in fedkeel.Run(net.local.run).updates if row["reason"]]
    assert not [reason for reason in refused if "version" in reason or "1.3.0" in reason]
    made, _ = card.read(net.local.run / "model")
    assert (made.version, len(made.labels), len(made.inputs[0].features)) == ("1.3.0", 3, 5)
    assert made.lineage.parent is not None


def test_a_client_whose_labels_mean_something_else_is_refused_with_the_difference(tmp_path: Path) -> None:
    with deployed(tmp_path / "d", job(2)) as net:
        bring(net.folder / "nodes" / "client-1", job(2, "data.source=patients(dose='g')", "model.version=1.2.1"))
        serving = net.server()
        net.node(*CLIENTS)
        net.wait(lambda: serving.poll() is not None)
    reasons = {row["client"]: row["reason"] for row in fedkeel.Run(net.local.run).updates}
    assert "the server's model is 1.2.0, this client's 1.2.1" in reasons["client-1"]
    assert "unit of feature 'dose' was g and is mg" in reasons["client-1"]
    assert reasons["client-0"] is None
