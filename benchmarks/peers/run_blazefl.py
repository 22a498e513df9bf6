#!/usr/bin/env python3
"""blazefl on the benchmark's job: the FedAvg server and client trainers of its contrib package, one mode per trainer.

Its thread pool is meant for free-threaded Python 3.14; in the environment that setup.sh makes, the GIL is on.
"""

import sys
import tempfile
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import blazefl.contrib.fedavg
import torch
import torch._dynamo  # torch.optim's first use imports this: a second's work that every forked pool would do anew
from blazefl.contrib import (
    FedAvgBaseClientTrainer,
    FedAvgBaseServerHandler,
    FedAvgProcessPoolClientTrainer,
    FedAvgThreadPoolClientTrainer,
)
from common import BATCH_SIZE, LEARNING_RATE, Data, Rounds, load, parse_job, torch_accuracy, torch_images, torch_model
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

blazefl.contrib.fedavg.tqdm = lambda clients, **_: clients  # no progress bars

# mode: torch threads in each worker
MODES = {"single-threads-1": 1, "single-threads-2": 2, "process-pool-2": 1, "thread-pool-2": 1}


@cache
def template(name: str, seed: int) -> torch.nn.Module:
    return torch_model(name, seed)


@dataclass(frozen=True)
class Selector:
    """blazefl's ModelSelector; the trainers ask it for a model per client, and copying is cheaper than initialising."""

    seed: int

    def select_model(self, name: str) -> torch.nn.Module:
        return deepcopy(template(name, self.seed))


class Federation:
    """blazefl's PartitionedDataset over tensors that worker processes share."""

    def __init__(self, data: Data) -> None:
        self.x, self.y = torch_images(data.x), torch.from_numpy(data.y)
        self.offsets: list[int] = data.offsets.tolist()

    def get_dataset(self, type_: str, cid: int) -> TensorDataset:
        own = slice(self.offsets[cid], self.offsets[cid + 1])
        return TensorDataset(self.x[own], self.y[own])

    def set_dataset(self, type_: str, cid: int, dataset: TensorDataset) -> None:
        """The process pool hands back the data set it was given: there is nothing to keep."""

    def get_dataloader(self, type_: str, cid: int, batch_size: int, generator: torch.Generator) -> DataLoader:
        dataset = self.get_dataset(type_, cid)
        # With the batches as the "samples", each is one index operation instead of one per example and a collation.
        batches = BatchSampler(RandomSampler(dataset, generator=generator), batch_size, drop_last=False)
        return DataLoader(dataset, sampler=batches, batch_size=None)


class Server(FedAvgBaseServerHandler):
    """blazefl's FedAvg server with the fixed cohorts."""

    cohorts: list[list[int]]

    def sample_clients(self) -> list[int]:
        return self.cohorts[self.round]


def main() -> None:
    job = parse_job("blazefl", list(MODES))
    rounds = Rounds()
    torch.set_num_threads(MODES[job.mode])
    data = load(job)
    federation, selector = Federation(data), Selector(job.seed)
    common = {"model_selector": selector, "model_name": job.model, "dataset": federation, "device": "cpu"}
    common |= {"num_clients": data.clients, "batch_size": BATCH_SIZE, "seed": job.seed}
    ratio = data.cohorts.shape[1] / data.clients
    server = Server(**common, global_round=job.total_rounds, sample_ratio=ratio)
    server.cohorts = data.cohorts.tolist()
    common |= {"epochs": 1, "lr": LEARNING_RATE}
    with tempfile.TemporaryDirectory() as state_dir:
        if job.mode == "process-pool-2":
            trainer = FedAvgProcessPoolClientTrainer(**common, num_parallels=2, state_dir=Path(state_dir))
        elif job.mode == "thread-pool-2":
            trainer = FedAvgThreadPoolClientTrainer(**common, num_parallels=2)
        else:
            trainer = FedAvgBaseClientTrainer(**common)
        rounds.tick()
        while not server.is_stopped():
            clients = server.sample_clients()
            trainer.local_process(server.downlink_package(), clients)
            for upload in trainer.uplink_package():
                server.load(upload)
            rounds.tick()
        rounds.stop()
    settings = {
        "torch_threads": torch.get_num_threads(),
        "gil": getattr(sys, "_is_gil_enabled", lambda: True)(),
        "python": sys.version.split()[0],
        "process_start_method": torch.multiprocessing.get_start_method() if job.mode == "process-pool-2" else None,
        "shuffled": True,
        "fixed_cohorts": True,
    }
    rounds.report(job, "blazefl", "blazefl", torch_accuracy(server.model, data), settings)


if __name__ == "__main__":
    main()
