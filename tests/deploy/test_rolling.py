"""A federation that is brought from one version of its model to the next while its clients stay: nobody is lost."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from deployed import Deployed, deployed

import fedkeel
from fedkeel.ship import card

pytestmark = pytest.mark.filterwarnings("default")  # Flower's own dependencies warn
WARDS = Path(__file__).parents[1] / "release" / "wards.py"
CLIENTS = ["client-0", "client-1", "client-2"]


def job(*settings: str, rounds: int = 100_000) -> fedkeel.Job:
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
            "schedule.rule=semi_sync(deadline=5.0)",
            *settings,
        ]
    )


def bring(folder: Path, changed: fedkeel.Job) -> None:
    """Write a new job into a host's folder, as an operator would."""
    kept = changed.model_copy(update={"plugins": (f"plugins/{WARDS.name}",)})
    (folder / "job.toml").write_text(kept.to_toml())


def all_took_part(net: Deployed, after: int) -> int:
    """The first round after another in which every client's update was used; 0: none yet."""
    if not (net.local.run / "ledger.sqlite").is_file():
        return 0
    used: dict[int, set[str]] = {}
    for row in fedkeel.Run(net.local.run).updates:
        if row["weight"] and row["round"] > after:
            used.setdefault(row["round"], set()).add(row["client"])
    return min((round for round, clients in used.items() if clients == set(CLIENTS)), default=0)


def test_a_running_federation_goes_from_1_2_to_1_3_and_loses_no_client(tmp_path: Path) -> None:
    newer = job(
        "model.version=1.3.0",
        "data.source=patients(columns=5, labels=3)",
        f"model.start={tmp_path / 'before'}",
    )
    with deployed(tmp_path / "d", job()) as net:
        serving = net.server()
        nodes = {client: net.node(client) for client in CLIENTS}
        net.wait(lambda: all_took_part(net, 0) > 0)
        serving.terminate()
        serving.wait()
        shutil.move(net.local.run, tmp_path / "before")
        bring(net.folder / "server", newer)
        serving = net.server()  # its clients are at 1.2 still
        net.wait(lambda: all_took_part(net, 0) > 0)
        for wave in CLIENTS[:1], CLIENTS[1:]:
            for client in wave:
                nodes[client].terminate()
                nodes[client].wait()
                bring(net.folder / "nodes" / client, newer)
                nodes[client] = net.node(client)
            since = net.round
            net.wait(lambda since=since: all_took_part(net, since) > 0)  # type: ignore[misc]
        serving.terminate()
        serving.wait()
    run = fedkeel.Run(net.local.run)
    refused = [row["reason"] for row in run.updates if row["reason"]]
    assert not [reason for reason in refused if "version" in reason or "1.3.0" in reason]
    with run.dir.ledger(readonly=True) as ledger:
        made, parent = card.ModelCard.from_json(ledger.meta["card"]), ledger.meta["parent"]
    assert (made.version, len(made.labels), len(made.inputs[0].features)) == ("1.3.0", 3, 5)
    assert len(parent) == 64


def test_a_client_whose_labels_mean_something_else_is_refused_with_the_difference(tmp_path: Path) -> None:
    with deployed(tmp_path / "d", job(rounds=2)) as net:
        bring(net.folder / "nodes" / "client-1", job("data.source=patients(dose='g')", "model.version=1.2.1", rounds=2))
        serving = net.server()
        net.node(*CLIENTS)
        net.wait(lambda: serving.poll() is not None)
    reasons = {row["client"]: row["reason"] for row in fedkeel.Run(net.local.run).updates}
    assert "the server's model is 1.2.0, this client's 1.2.1" in reasons["client-1"]
    assert "unit of feature 'dose' was g and is mg" in reasons["client-1"]
    assert reasons["client-0"] is None
