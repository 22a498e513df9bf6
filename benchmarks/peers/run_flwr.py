#!/usr/bin/env python3
"""Flower on the benchmark's job: its FedAvg strategy and message API on its own simulation engine over Ray.

Modes: two clients at a time with one torch thread each, or one client at a time with one or two threads.
"""

import logging
import os
import time
from collections.abc import Iterable
from functools import cache

os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}  # read on import

import torch
from common import (
    BATCH_SIZE,
    LEARNING_RATE,
    Data,
    Job,
    Rounds,
    load,
    parse_job,
    torch_accuracy,
    torch_images,
    torch_model,
)
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from torch.nn.functional import cross_entropy

# mode: (clients at a time, torch threads for each)
MODES = {"clients-2-threads-1": (2, 1), "clients-1-threads-1": (1, 1), "clients-1-threads-2": (1, 2)}


@cache
def worker_state(job: Job) -> tuple[Data, torch.nn.Module, torch.Generator]:
    """Return what one of Ray's worker processes keeps from client to client; the model is overwritten by each."""
    torch.set_num_threads(MODES[job.mode][1])
    return load(job), torch_model(job.model, job.seed), torch.Generator().manual_seed(job.seed)


def make_client_app(job: Job) -> ClientApp:
    app = ClientApp()

    @app.query()
    def query(message: Message, context: Context) -> Message:
        client = int(context.node_config["partition-id"])
        return Message(RecordDict({"metrics": MetricRecord({"client": client})}), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        data, model, generator = worker_state(job)
        own = data.of(int(context.node_config["partition-id"]))
        x, y = torch_images(data.x[own]), torch.from_numpy(data.y[own])
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
        for batch in torch.randperm(len(y), generator=generator).split(BATCH_SIZE):
            optimizer.zero_grad()
            cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
        content = {"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord({"num-examples": len(y)})}
        return Message(RecordDict(content), reply_to=message)

    return app


class FixedCohorts(FedAvg):
    """FedAvg that sends each round to the clients the job names, and takes the time as a round ends."""

    def __init__(self, data: Data, nodes: dict[int, int], rounds: Rounds) -> None:
        super().__init__(fraction_evaluate=0.0)
        self._data, self._nodes, self._rounds = data, nodes, rounds

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        config["server-round"] = server_round
        nodes = [self._nodes[int(client)] for client in self._data.cohorts[server_round - 1]]
        record = RecordDict({self.arrayrecord_key: arrays, self.configrecord_key: config})
        return self._construct_messages(record, nodes, MessageType.TRAIN)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        result = super().aggregate_train(server_round, replies)
        self._rounds.tick()
        return result


def main() -> None:
    job = parse_job("flwr", list(MODES))
    rounds = Rounds()
    clients_at_a_time, threads = MODES[job.mode]
    logging.getLogger("flwr").setLevel(logging.ERROR)
    data = load(job)
    model = torch_model(job.model, job.seed)
    server_app = ServerApp()

    @server_app.main()
    def serve(grid: Grid, context: Context) -> None:
        while len(ids := list(grid.get_node_ids())) < data.clients:
            time.sleep(0.05)
        asked = [Message(RecordDict(), dst_node_id=node, message_type=MessageType.QUERY) for node in ids]
        replies = grid.send_and_receive(asked)
        nodes = {int(r.content["metrics"]["client"]): r.metadata.src_node_id for r in replies}
        rounds.tick()
        strategy = FixedCohorts(data, nodes, rounds)
        result = strategy.start(grid, ArrayRecord(model.state_dict()), num_rounds=job.total_rounds)
        rounds.stop()
        model.load_state_dict(result.arrays.to_torch_state_dict())

    backend = {
        "init_args": {"num_cpus": 2, "include_dashboard": False, "log_to_driver": False, "logging_level": "error"},
        "client_resources": {"num_cpus": 2 // clients_at_a_time, "num_gpus": 0.0},
    }
    run_simulation(server_app, make_client_app(job), num_supernodes=data.clients, backend_config=backend)
    settings = {
        "clients_at_a_time": clients_at_a_time,
        "torch_threads": threads,
        "shuffled": True,
        "fixed_cohorts": True,
    }
    rounds.report(job, "flwr", "flwr", torch_accuracy(model, data), settings)


if __name__ == "__main__":
    # From the module rather than from __main__, whose functions Ray would send by value, caches left behind.
    from run_flwr import main as imported_main

    imported_main()
