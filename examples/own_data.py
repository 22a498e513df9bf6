"""Your own data: one (x, y) pair of arrays, or one torch Dataset, per client. They stay who they are."""

import numpy as np

import fedkeel


@fedkeel.rule("source")
def wards(key: fedkeel.Key, *, hospitals: int = 6) -> fedkeel.Pool:
    """Blood values from hospitals whose instruments differ; here drawn, in your case read from files."""
    draws = key.numpy()
    weights = draws.normal(size=12)
    patients = {}
    for number in range(hospitals):
        count = int(draws.integers(80, 300))
        truth = draws.normal(size=(count, 12))
        calibration = draws.normal(1.0, 0.1, size=12)
        patients[f"hospital-{number}"] = ((truth * calibration).astype(np.float32), (truth @ weights > 0).astype(int))
    return fedkeel.Pool.from_clients(patients, key=key, labels=["healthy", "ill"])


if __name__ == "__main__":
    job = fedkeel.Job(
        name="own-data",
        rounds=10,
        data={"source": "wards", "clients": 6, "partition": "natural"},
        model={"build": "logistic"},
    )
    run = fedkeel.run(job)
    print(f"accuracy {run.final()['value']:.3f}, report: {run.path / 'report.html'}")
