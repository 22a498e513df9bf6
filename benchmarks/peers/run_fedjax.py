#!/usr/bin/env python3
"""fedjax on the benchmark's job: its federated_averaging algorithm, with a haiku model, on JAX's CPU backend.

Modes: its jit backend, or its pmap backend over two host devices with one client on each; and either of them with
XLA's own threads off, which are of no use to small matrices.
"""

import os
from functools import partial

from common import BATCH_SIZE, LEARNING_RATE, MODELS, Data, Rounds, load, parse_job

# mode: (XLA host devices, whether XLA may use several threads on each)
MODES = {"jit": (1, True), "jit-threads-1": (1, False), "pmap-2": (2, True), "pmap-2-threads-1": (2, False)}


def main() -> None:
    job = parse_job("fedjax", list(MODES))
    rounds = Rounds()
    devices, threads = MODES[job.mode]
    os.environ["JAX_PLATFORMS"] = "cpu"  # this and the flags are read when JAX starts
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    if not threads:
        os.environ["XLA_FLAGS"] += " --xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"

    import fedjax
    import haiku as hk
    import jax
    import jax.numpy as jnp
    import numpy as np

    data = load(job)
    data = Data(**vars(data) | {"x": data.x[..., None], "test_x": data.test_x[..., None]})  # haiku wants channels last

    def forward(batch: fedjax.BatchExample) -> jax.Array:
        # Haiku's own initial weights: variance scaling, uniform in neither framework's exact range.
        if job.model == "mlp":
            layers = [hk.Flatten(), hk.Linear(200), jax.nn.relu, hk.Linear(200), jax.nn.relu, hk.Linear(10)]
        elif job.model == "logistic":
            layers = [hk.Flatten(), hk.Linear(10)]
        else:
            pool = partial(hk.max_pool, window_shape=(1, 2, 2, 1), strides=(1, 2, 2, 1), padding="SAME")
            layers = [
                *(hk.Conv2D(32, 5, padding="SAME"), jax.nn.relu, pool),
                *(hk.Conv2D(64, 5, padding="SAME"), jax.nn.relu, pool),
                *(hk.Flatten(), hk.Linear(512), jax.nn.relu, hk.Linear(10)),
            ]
        return hk.Sequential(layers)(batch["x"])

    def loss(batch: fedjax.BatchExample, predicted: jax.Array) -> jax.Array:
        return fedjax.metrics.unreduced_cross_entropy_loss(batch["y"], predicted)

    sample = {"x": data.x[:BATCH_SIZE], "y": data.y[:BATCH_SIZE]}
    metrics = {"accuracy": fedjax.metrics.Accuracy()}
    model = fedjax.create_model_from_haiku(hk.transform(forward), sample, loss, metrics)
    federation = fedjax.InMemoryFederatedData(
        {i: {"x": data.x[data.of(i)], "y": data.y[data.of(i)]} for i in range(data.clients)}
    )
    with fedjax.for_each_client_backend("pmap" if devices > 1 else "jit"):
        algorithm = fedjax.algorithms.fed_avg.federated_averaging(
            grad_fn=fedjax.model_grad(model),
            client_optimizer=fedjax.optimizers.sgd(LEARNING_RATE),
            server_optimizer=fedjax.optimizers.sgd(1.0),  # adds the weighted mean of the updates: FedAvg
            client_batch_hparams=fedjax.ShuffleRepeatBatchHParams(batch_size=BATCH_SIZE, num_epochs=1, seed=job.seed),
        )
    key = jax.random.PRNGKey(job.seed)
    state = algorithm.init(model.init(key))
    if sum(leaf.size for leaf in jax.tree_util.tree_leaves(state.params)) != MODELS[job.model]:
        raise AssertionError(f"{job.model} has the wrong number of parameters")

    rounds.tick()
    for cohort in data.cohorts[: job.total_rounds]:
        key, use = jax.random.split(key)
        keys = jax.random.split(use, len(cohort))
        clients = [(int(c), federation.get_client(int(c)), k) for c, k in zip(cohort, keys, strict=True)]
        state, _ = algorithm.apply(state, clients)
        jax.block_until_ready(state.params)  # JAX only queues the work: wait for it, or the time means nothing
        rounds.tick()
    rounds.stop()
    test = fedjax.ClientDataset({"x": data.test_x, "y": data.test_y}).padded_batch(batch_size=1000)
    accuracy = float(fedjax.evaluate_model(model, state.params, test)["accuracy"])
    settings = {
        "jax": jax.__version__,
        "numpy": np.__version__,
        "devices": jax.device_count(),
        "array_type": str(jnp.result_type(float)),
        "last_batch": "filled up to the batch size with examples drawn again, as fedjax does",
        "xla_flags": os.environ["XLA_FLAGS"],
        "shuffled": "in the same way in every round",
        "fixed_cohorts": True,
    }
    rounds.report(job, "fedjax", "fedjax", accuracy, settings)


if __name__ == "__main__":
    main()
