"""Your own aggregator and your own check; the laws of their kinds tell whether they keep what they promise.

From the command line: fedkeel run JOB.toml --plugin examples/own_rules.py --set aggregate.reduce=winsorised(trim=1)
"""

import torch
from torch import Tensor

import fedkeel


@fedkeel.rule("reducer", needs=lambda trim: 2 * trim + 1, traits=("coordinatewise", "unweighted"))
def winsorised(U: Tensor, w: Tensor, *, trim: int = 1) -> Tensor:
    """Pull each column's `trim` extremes on each side to the nearest kept value, then average; weights are ignored."""
    rows = U[w > 0]
    if len(rows) < 2 * trim + 1:
        raise fedkeel.CohortError(f"winsorised(trim={trim}) needs {2 * trim + 1} rows, {len(rows)} have weight")
    ordered = rows.sort(dim=0).values
    low, high = ordered[trim], ordered[len(rows) - 1 - trim]
    return torch.minimum(torch.maximum(rows, low), high).to(torch.float64).mean(dim=0).to(U.dtype)


@fedkeel.rule("check", traits=("header",))
def quick_worker(update: fedkeel.Update, door: object, *, least: int = 2) -> str | None:
    """Refuse a client that took fewer steps than `least`."""
    steps = update.claims.steps
    return f"it took {steps} steps, expected are at least {least}" if steps < least else None


if __name__ == "__main__":
    from fedkeel import testing

    testing.check("reducer", fedkeel.build("reducer", "winsorised", trim=1))
    job = fedkeel.Job(
        name="own-rules",
        rounds=25,
        data={"source": "digits", "clients": 10, "partition": "iid"},
        attack={"rule": "sign_flip(scale=5.0)", "clients": 1},
        aggregate={"checks": ("finite", "quick_worker(least=2)"), "reduce": "winsorised(trim=1)"},
    )
    run = fedkeel.run(job)
    print(f"accuracy {run.final()['value']:.3f}, report: {run.path / 'report.html'}")
