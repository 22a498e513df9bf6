"""Kill a real run at any moment; resumed, it ends at the same weights as one that was never broken, bit for bit."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import fedkeel
from fedkeel.kernels import native
from fedkeel.ship import card

compiled = pytest.mark.skipif(isinstance(native.library(), str), reason=str(native.library()))
BACKENDS = ("loop", "traced", "rows", *(() if isinstance(native.library(), str) else ("native",)))
JOB = {
    "name": "broken",
    "rounds": 12,
    "data": {"clients": 12, "partition": "dirichlet(alpha=1.0)", "holdout": 0.2},
    "model": {"build": "mlp(hidden=(16,))", "private": ("*.bias",)},
    "select": {"cohort": 5},
    "server": {"optimiser": "momentum(lr=1.0, beta=0.5)"},
    "client": {"transforms": ("clip(norm=2.0)",)},
    "attack": {"rule": "gaussian(std=0.1)", "clients": 2},
    "record": {"checkpoint_every": 2},
}
KEPT = {
    **{name: value for name, value in JOB.items() if name != "server"},
    "model": {"build": "mlp(hidden=(16,))"},
    "data": {"clients": 12, "partition": "dirichlet(alpha=1.0)", "holdout": 0.2},
    "server": {"examples": 40},
    "client": {"labels": True},
    "aggregate": {"screens": ("norm_mad", "forecast"), "weigh": ("learned", "foolsgold"), "mix": ("norm_cap",)},
    "quarantine": {"limit": 1.5},
    "attack": {"rule": "gaussian", "clients": 4},
}
"""A job with everything that a server keeps of its clients."""
PROGRAM = """
import sys, fedkeel
job = fedkeel.load(sys.argv[1])
seen = []
def watch(progress):
    print(progress.round, flush=True)
    if progress.round == int(sys.argv[3]):
        import time; time.sleep(float(sys.argv[4]))
fedkeel.run(job, sys.argv[2], watch=watch, with_report=False)
"""


@contextlib.contextmanager
def running(tmp_path: Path, backend: str, at: int, pause: float) -> Iterator[subprocess.Popen[str]]:
    """A real run in `tmp_path / "run"`, in a process group of its own, that has told of round `at` and pauses there."""
    (tmp_path / "job.toml").write_text(job(backend).to_toml())
    arguments = [sys.executable, "-c", PROGRAM, str(tmp_path / "job.toml"), str(tmp_path / "run"), str(at), str(pause)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) == at:
                break
        yield process


def job(backend: str) -> fedkeel.Job:
    values, backend = (KEPT, "traced") if backend == "kept" else (JOB, backend)
    train = {"backend": backend, "batch_size": 8, "workers": 2}
    if values is JOB:
        train |= {"corrections": ("scaffold", "adaptive_fedprox(mu=0.1)"), "optimiser": "sgd(momentum=0.5)"}
    else:
        train |= {"objective": "ditto(lam=0.1)", "lr_schedule": "exponential(factor=0.9, every=3)"}
        train |= {"stopping": "early(patience=1, most=2)", "validation": 0.2}
    return fedkeel.Job(**{**values, "train": train})


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> dict[str, fedkeel.Run]:
    root = tmp_path_factory.mktemp("unbroken")
    return {b: fedkeel.run(job(b), root / b, with_report=False) for b in (*BACKENDS, "kept")}


@pytest.mark.parametrize(
    ("backend", "at", "delay"),
    [
        ("traced", 0, 0.0),
        ("traced", 1, 0.05),
        ("traced", 5, 0.02),
        ("traced", 12, 0.0),
        ("loop", 7, 0.1),
        ("rows", 4, 0.03),
        ("kept", 5, 0.02),
        pytest.param("native", 6, 0.02, marks=compiled),
    ],
)
def test_a_killed_run_resumes_bit_for_bit(unbroken, tmp_path, backend, at, delay):
    """`at`: the round after which the kill comes, `delay` seconds on: in training, in writing, in between."""
    place = tmp_path / "run"
    with running(tmp_path, backend, at, 2 * delay) as process:
        time.sleep(delay)
        os.killpg(process.pid, signal.SIGKILL)
    whole = unbroken[backend]
    resumed = fedkeel.resume(place, with_report=False)
    assert resumed.state.theta.numpy().tobytes() == whole.state.theta.numpy().tobytes()
    assert card.read(place / "model")[0].lineage.fingerprint == card.read(whole.path / "model")[0].lineage.fingerprint
    assert without_time(resumed.metrics) == without_time(whole.metrics)
    assert without_time(resumed.rounds) == without_time(whole.rounds)
    assert without_time(resumed.updates) == without_time(whole.updates)
    if backend == "kept":
        assert any(row["stage"] == "quarantine" for row in whole.updates)
        assert any(row["trust"] not in (None, 1.0) for row in whole.updates)


def without_time(rows):
    return [{k: v for k, v in row.items() if k not in ("wall", "seconds")} for row in rows]


def test_the_workers_of_a_killed_run_do_not_outlive_it(tmp_path):
    with running(tmp_path, "traced", 2, 60) as process:
        process.kill()  # the parent alone, as the out-of-memory killer would
        process.wait()
        fedkeel.resume(tmp_path / "run", with_report=False)  # at once: the workers do not hold its lock
    deadline = time.monotonic() + 20
    while group := _members(process.pid):
        assert time.monotonic() < deadline, f"still running: {group}"
        time.sleep(0.1)


def _members(group: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[2]) == group and fields[0] != "Z":
                found.append(int(entry.name))
    return found


def test_ctrl_c_says_how_to_go_on(tmp_path):
    (tmp_path / "job.toml").write_text(job("traced").to_toml())
    arguments = [sys.executable, "-m", "fedkeel", "run", "job.toml", "--out", "run", "--set", "rounds=100000"]
    with subprocess.Popen(
        arguments, stderr=subprocess.PIPE, text=True, start_new_session=True, cwd=tmp_path
    ) as process:
        assert process.stderr is not None
        first = process.stderr.readline()
        os.killpg(process.pid, signal.SIGINT)
        rest = process.stderr.read().splitlines()
        assert process.wait() == 130
    assert first.startswith("broken: round 0/100000")
    assert rest[-1] == "interrupted; go on with: fedkeel resume run"
    assert "Traceback" not in "".join(rest)
    assert not _members(process.pid)


def test_a_finished_run_is_returned_as_it_is(unbroken):
    run = unbroken["loop"]
    before = (run.path / "model" / "model.safetensors").stat().st_mtime_ns
    assert fedkeel.resume(run.path).path == run.path
    assert (run.path / "model" / "model.safetensors").stat().st_mtime_ns == before


def test_a_changed_job_or_a_lost_ledger_is_refused(tmp_path):
    place = tmp_path / "run"
    with running(tmp_path, "loop", 5, 60) as process:
        os.killpg(process.pid, signal.SIGKILL)
    text = (place / "job.toml").read_text()
    (place / "job.toml").write_text(text.replace("seed = 0", "seed = 1"))
    with pytest.raises(fedkeel.InputError, match="was changed since the run began"):
        fedkeel.resume(place)
    (place / "job.toml").write_text(text)
    for path in place.glob("ledger.sqlite*"):
        path.unlink()
    with pytest.raises(fedkeel.InputError, match="lacks rounds"):
        fedkeel.resume(place)


PLUGIN = """
import fedkeel

@fedkeel.rule("weigher")
def even_for_resume_tests(cohort, state):
    "All the same (tests)."
    return fedkeel.build("weigher", "equal")(cohort, state)
"""


def test_a_run_with_a_plugin_resumes_by_any_path(tmp_path, monkeypatch):
    """Named from where it lies, from elsewhere, or after it was moved: it is the same run."""
    (tmp_path / "even.py").write_text(PLUGIN)
    with_plugin = job("loop").model_copy(update={"plugins": (str(tmp_path / "even.py"),)})
    done = fedkeel.run(with_plugin.with_settings(["aggregate.weigh=even_for_resume_tests"]), tmp_path / "run")
    before = done.state.theta.numpy().tobytes()
    for path in (done.path / "model").iterdir():
        path.unlink()  # as if it had been killed before the model was written
    moved = done.path.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    assert fedkeel.resume("moved").state.theta.numpy().tobytes() == before
    assert fedkeel.Run(moved).done


def test_a_run_in_use_is_not_resumed_by_another_process(tmp_path):
    with running(tmp_path, "loop", 1, 60) as process:
        with pytest.raises(fedkeel.RunError, match="in use by process"):
            fedkeel.resume(tmp_path / "run")
        os.killpg(process.pid, signal.SIGKILL)
