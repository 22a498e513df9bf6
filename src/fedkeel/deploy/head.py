"""The server's half: the coordinator over Flower's grid, with the record of a run in `server/run`."""

from __future__ import annotations

from pathlib import Path

import torch
from flwr.superlink.grid import HttpGrid

from fedkeel import plugins
from fedkeel.config import Job
from fedkeel.core.types import ServerState
from fedkeel.deploy import loaders, messages
from fedkeel.deploy.driver import Driver
from fedkeel.deploy.folder import ServerFolder
from fedkeel.deploy.network import Network
from fedkeel.round import wire
from fedkeel.round.plan import Plan
from fedkeel.ship import checkpoint
from fedkeel.ship.rundir import RunDir
from fedkeel.world.evaluation import figure_names
from fedkeel.world.federation import Federation
from fedkeel.world.record import Record, begun, check_rules, described, first, rewound

BACKEND = "on the nodes"


def preside(folder: ServerFolder, grid: HttpGrid) -> None:
    """Run the federation to its end, from its last checkpoint where there is one."""
    federation = loaders.at_server(folder)
    directory = opened(folder.run, federation.job, federation.plan)
    settings = folder.settings
    limit = wire.PREFIX.size + wire.MAX_HEADER + wire.zstd_bound(_most(federation))
    with directory.lock(), directory.ledger() as ledger:
        newest = checkpoint.latest(directory.checkpoints)
        if newest is None:
            (state, began), now = first(federation), 0.0
            ledger.write_meta(began)
        else:
            state, now = _standing(federation, newest)
        state = rewound(ledger, state)
        ledger.write_meta(described(federation, BACKEND, directory.job.read_text()))
        ledger.write_clients(federation.devices.of)
        record = Record(directory, ledger, federation, None)
        clients = {name: peer.key for name, peer in settings.nodes.items()}
        network = Network(grid, clients, messages.agreement(federation), limit, figure_names(federation))
        patience, gather, probe = settings.patience, settings.gather, settings.probe
        driver = Driver(federation, network, record, state, patience=patience, gather=gather, probe=probe, now=now)
        known = ledger.query("SELECT 1 FROM metrics WHERE round = ? LIMIT 1", state.round)
        due = state.round == federation.job.rounds or state.round % federation.job.record.evaluate_every == 0
        measured = bool(known) or not due or state.round == 0
        del state  # a model of before, in memory
        record.model(driver.run(measured=measured))
    from fedkeel.ship.report import write

    write(directory.report, [directory.path])


def _standing(federation: Federation, newest: Path) -> tuple[ServerState, float]:
    """The state to go on from, and how many seconds of the federation are over."""
    state, _, extra, _ = checkpoint.load(newest, layout_digest=federation.layout.digest)
    # The steps of before are gone, and nodes may have lost what they had: all are sent the model in full.
    return state.replace(roster={**state.roster, "version": torch.full_like(state.roster["version"], -1)}), extra[
        "time"
    ]


def _most(federation: Federation) -> int:
    if federation.plan.secure is not None:
        return federation.plan.secure.row_bytes(federation.layout.columns)
    return wire.built(federation.plan.codec, federation.layout)[1].max_bytes(federation.layout.columns)


def opened(path: Path, job: Job, plan: Plan) -> RunDir:
    """The run's directory; made where there is none. Raises `InputError` where it was begun with other rules."""
    if not (path / "job.toml").is_file():
        return begun(path, job, plugins.read(job.plugins))
    directory = RunDir(path)
    if not directory.ledger_path.is_file():  # it was killed in its first moment
        return directory
    with directory.ledger(readonly=True) as ledger:
        check_rules(directory, ledger, plan, "move it away to begin anew")
    return directory
