"""The audit of the real mechanisms: no lower bound above what is accounted for, and a broken mechanism is found."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy import stats

import fedkeel
from fedkeel.audit import canaries, mechanism, study
from fedkeel.core.keys import Key
from fedkeel.core.types import ServerState
from fedkeel.round import privacy
from fedkeel.ship.audited import statements
from fedkeel.world.federation import Federation

DELTA = 1e-5


def federation(text: str, rule: str = "round_robin", cohort: int = 4) -> Federation:
    return Federation.of(
        fedkeel.Job(
            data={"clients": 8, "partition": "iid"},
            model={"build": "logistic"},
            train={"batch_size": 40},
            select={"cohort": cohort, "rule": rule},
            aggregate={"weigh": ("equal",)},
            privacy={"mechanism": text},
        )
    )


def found(of: Federation, seed: int, trials: int) -> canaries.Trials:
    state = ServerState(of.theta())
    clients, rows = mechanism.honest(of, state, Key(1))
    norm = mechanism.clip_norm(of, state, rows[:2])
    release = mechanism.Round(of, state, Key(seed).fold("round"), clients[:2])
    return canaries.in_trials(release, rows[:2], norm=norm, delta=DELTA, key=Key(seed), trials=trials)


def bound(of: canaries.Trials, confidence: float) -> float:
    return next(b.gaussian for b in of.bounds if b.confidence == confidence)


@pytest.mark.parametrize(
    ("text", "rule"),
    [("central(norm=0.5, noise=1.5)", "round_robin"), ("central(norm=0.5, noise=1.0)", "poisson"),
     ("ftrl(norm=0.5, noise=1.5, bands=2)", "uniform"), ("local(norm=0.5, noise=3.0)", "round_robin")],
)  # fmt: skip
def test_lower_bounds_exceed_what_is_accounted_for_no_oftener_than_they_may(text: str, rule: str) -> None:
    of = federation(text, rule)
    promise = of.plan.privacy
    assert promise is not None
    accounted = promise.of_a_round
    runs = [found(of, seed, 60) for seed in range(12)]
    over = sum(bound(run, 0.95) > accounted for run in runs)
    assert stats.binomtest(over, len(runs), 0.05, alternative="greater").pvalue > 1e-3, f"{over} of {len(runs)}"


def test_the_bound_comes_near_what_is_accounted_for() -> None:
    of = federation("central(norm=0.5, noise=1.0)")
    promise = of.plan.privacy
    assert promise is not None
    assert bound(found(of, 3, 800), 0.95) > 0.5 * promise.of_a_round


def _half(monkeypatch: pytest.MonkeyPatch) -> None:
    real = privacy.Noise.normals
    monkeypatch.setattr(privacy.Noise, "normals", lambda self, count: real(self, count) * 0.4)


def _known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(privacy, "Noise", lambda key: _Zero())


def _unclipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(privacy, "_SHAVED", 1e9)
    monkeypatch.setattr("fedkeel.round.protect._SHAVED", 1e9)


class _Zero:
    def normals(self, count: int) -> torch.Tensor:
        return torch.zeros(count, dtype=torch.float64)


@pytest.mark.parametrize("fault", [_half, _known, _unclipped])
def test_a_mechanism_that_is_broken_is_found(fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    of = federation("central(norm=0.5, noise=3.0)")
    promise = of.plan.privacy
    assert promise is not None
    accounted = promise.of_a_round
    fault(monkeypatch)
    state = ServerState(of.theta())
    clients, rows = mechanism.honest(of, state, Key(1))
    norm = 20.0 if fault is _unclipped else mechanism.clip_norm(of, state, rows[:2])
    release = mechanism.Round(of, state, Key(9).fold("round"), clients[:2])
    run = canaries.in_trials(release, rows[:2], norm=norm, delta=DELTA, key=Key(9), trials=600)
    assert bound(run, 0.99) > accounted


def test_the_audit_of_a_private_run_says_both(tmp_path: Any) -> None:
    job = federation("central(norm=0.5, noise=1.0)").job.model_copy(update={"rounds": 3})
    run = fedkeel.run(job, tmp_path / "run", with_report=False)
    audited = study.audit(run.path, parts=["canaries"], settings=study.Settings(trials=100, canaries=50))
    assert audited.passed
    assert audited.found["of_a_round"] < audited.found["accounted"] == run.rounds[-1]["epsilon"]
    assert "Nothing refutes the accounted" in audited.verdict
    hidden = federation("examples(norm=1.0, noise=2.0)").job.model_copy(update={"rounds": 1})
    run = fedkeel.run(hidden, tmp_path / "hidden", with_report=False)
    audited = study.audit(run.path, parts=["canaries"], settings=study.Settings(trials=20, canaries=20))
    assert audited.found["canaries"] == {"left_out": "the run hides examples, and canaries are clients"}


def test_an_audit_of_sums_under_masks_says_what_masks_keep(tmp_path):
    job = fedkeel.Job(
        name="masked",
        rounds=2,
        data={"clients": 12},
        aggregate={"weigh": ["equal"], "reduce": "median"},
        secagg={"size": 4},
    )
    run = fedkeel.run(job, tmp_path / "run", with_report=False)
    settings = study.Settings(sizes=(1,), iterations=20, trials=40, canaries=40)
    told = study.audit(run.path, parts=["inversion", "canaries"], settings=settings)
    found = told.found
    treatments = [t["name"] for case in found["inversion"]["cases"] for t in case["treatments"]]
    assert "as it is, which masks keep from the server" in treatments
    assert "as the job sends it" not in treatments
    assert any("Masks keep that update from the server" in line for line in statements(found))
    assert "at least ε" in told.verdict
