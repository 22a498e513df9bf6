#!/usr/bin/env python3
"""pfl (Apple's pfl-research) on the benchmark's job: FederatedAveraging on the SimulatedBackend with a PyTorch model.

Modes: one process with one or two threads, or two worker processes under torchrun, pfl's own way to use more cores.
"""

import os
import sys
import time

import numpy as np
import psutil
from common import BATCH_SIZE, LEARNING_RATE, Rounds, load, parse_job, torch_accuracy, torch_images, torch_model

# mode: (worker processes, torch threads in each)
MODES = {"processes-1-threads-1": (1, 1), "processes-1-threads-2": (1, 2), "processes-2-threads-1": (2, 1)}


class CohortSampler:
    """Hands out the fixed cohorts, client by client; over and over, since pfl samples thousands of users ahead.

    A class, not a generator or lambda, because pfl pickles it into the process that balances users over workers.
    """

    def __init__(self, cohorts: np.ndarray) -> None:
        self._clients: list[int] = cohorts.ravel().tolist()
        self._next = 0

    def __call__(self) -> int:
        client = self._clients[self._next % len(self._clients)]
        self._next += 1
        return client


def await_sampler() -> None:
    """Wait until pfl's helper process rests: it first samples 10,000 users ahead, which is no part of a round."""
    before = -1.0
    while (now := sum(sum(child.cpu_times()[:2]) for child in psutil.Process().children(recursive=True))) > before:
        before = now
        time.sleep(0.5)


def main() -> None:
    job = parse_job("pfl", list(MODES))
    processes, threads = MODES[job.mode]
    os.environ["PFL_PYTORCH_DEVICE"] = "cpu"  # else pfl looks for a GPU again for every batch
    worker = "TORCHELASTIC_RUN_ID" in os.environ
    if processes > 1 and not worker:
        # Become the launcher: it starts this script once per worker, and stands at the root of the process tree.
        os.environ["OMP_NUM_THREADS"] = str(threads)
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        os.execv(sys.executable, [sys.executable, *launcher, *sys.argv])
    leads = os.environ.get("RANK", "0") == "0"
    rounds = Rounds(os.getppid() if worker else None) if leads else None

    import torch
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.aggregate.weighting import WeightByDatapoints
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.callback.base import TrainingProcessCallback
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.data.pytorch import PyTorchTensorDataset
    from pfl.hyperparam import NNTrainHyperParams
    from pfl.metrics import Metrics
    from pfl.model.pytorch import PyTorchModel
    from torch.nn.functional import cross_entropy

    torch.set_num_threads(threads)
    np.random.seed(job.seed)  # noqa: NPY002  # pfl seeds itself from NumPy's global generator

    class Ticker(TrainingProcessCallback):
        """Takes the time after every round; pfl calls it last in the round."""

        def after_central_iteration(self, *_: object, **__: object) -> tuple[bool, Metrics]:
            if rounds is not None:
                rounds.tick()
            return False, Metrics()

    data = load(job)
    module = torch_model(job.model, job.seed)
    # pfl asks for both as attributes of the module; it evaluates in round 0 even if told not to, hence no metrics.
    module.loss = lambda x, y: cross_entropy(module(x), y)  # type: ignore[assignment]
    module.metrics = lambda x, y: {}  # type: ignore[assignment]
    model = PyTorchModel(
        module,
        local_optimizer_create=torch.optim.SGD,
        central_optimizer=torch.optim.SGD(module.parameters(), lr=1.0),  # adds the average of the updates: FedAvg
    )
    x, y = torch_images(data.x), torch.from_numpy(data.y)
    # Kept from round to round, so that each client's batches are cut only once.
    datasets = {i: PyTorchTensorDataset((x[data.of(i)], y[data.of(i)]), user_id=str(i)) for i in range(data.clients)}
    # The weights let pfl give workers equal numbers of examples rather than of clients.
    weights = {i: len(dataset) for i, dataset in datasets.items()}
    federation = FederatedDataset(datasets.__getitem__, CohortSampler(data.cohorts), user_id_to_weight=weights)
    backend = SimulatedBackend(federation, federation, postprocessors=[WeightByDatapoints()])
    params = NNAlgorithmParams(
        central_num_iterations=job.total_rounds,
        evaluation_frequency=job.total_rounds + 1,
        train_cohort_size=data.cohorts.shape[1],
        val_cohort_size=0,
    )
    train = NNTrainHyperParams(local_num_epochs=1, local_learning_rate=LEARNING_RATE, local_batch_size=BATCH_SIZE)
    await_sampler()
    if rounds is not None:
        rounds.tick()
    FederatedAveraging().run(params, backend, model, train, callbacks=[Ticker()], send_metrics_to_platform=False)
    if rounds is not None:
        rounds.stop()
        settings = {
            "processes": processes,
            "torch_threads": torch.get_num_threads(),
            "shuffled": "once, before training: pfl's Dataset caches its batches",
            "fixed_cohorts": True,
        }
        rounds.report(job, "pfl", "pfl", torch_accuracy(module, data), settings)


if __name__ == "__main__":
    main()
