"""A registry mirrored into a real MLflow server, over HTTP."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

import fedkeel
from fedkeel.core.errors import InputError, RunError
from fedkeel.gate import policy
from fedkeel.gate.mirror import mirror
from fedkeel.gate.publish import publish
from fedkeel.release.registry import Registry

pytestmark = pytest.mark.filterwarnings("default")  # MLflow's own dependencies warn


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("mlflow")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    settings = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/m.db", "--artifacts-destination", str(folder / "files")]
    environment = {**os.environ, **settings}
    environment.pop("PYTHONWARNINGS", None)
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, env=environment, start_new_session=True)
    address, until = f"http://127.0.0.1:{port}", time.monotonic() + 120
    try:
        while True:
            try:
                with urllib.request.urlopen(f"{address}/health", timeout=5):
                    break
            except OSError:
                assert process.poll() is None, (folder / "log").read_text()[-3000:]
                assert time.monotonic() < until, (folder / "log").read_text()[-3000:]
                time.sleep(0.3)
        yield address
    finally:
        os.killpg(process.pid, 9)
        process.wait()


def test_mlflow_says_what_the_registry_says(server: str, tmp_path: Path):
    from mlflow.tracking import MlflowClient

    settings = ["data.clients=4", "data.partition=iid", "model.build=logistic"]
    runs = {
        version: fedkeel.run(
            fedkeel.Job(name="ward", rounds=rounds).with_settings([*settings, f"model.version={version}"]),
            tmp_path / version,
            with_report=False,
        ).path
        for version, rounds in (("1.0.0", 1), ("1.0.1", 3))
    }
    client = MlflowClient(server)
    with Registry(tmp_path / "registry", create=True) as registry:
        policy.write(registry)
        text = (registry.path / policy.FILE).read_text()
        (registry.path / policy.FILE).write_text(text.replace('"calibration(most=0.15)"', '"calibration(most=1)"'))
        assert publish(runs["1.0.0"], "production", registry).passed
        assert mirror(registry, "ward", server) == [("1.0.0", "1", "production")]
        assert publish(runs["1.0.1"], "candidate", registry).passed
        assert publish(runs["1.0.1"], "production", registry).passed
        told = [("1.0.0", "1", ""), ("1.0.1", "2", "candidate, production")]
        assert mirror(registry, "ward", server) == told
        assert mirror(registry, "ward", server) == told  # however often
        assert client.get_model_version_by_alias("ward", "production").version in (2, "2")
        registry.rollback("ward", "production")
        mirror(registry, "ward", server)
        standing = client.get_model_version_by_alias("ward", "production")
        release = registry.find("ward", "production")
        assert standing.tags["fedkeel.version"] == "1.0.0"
        assert standing.tags["fedkeel.fingerprint"] == release.fingerprint
        assert "fedkeel.calibration.calibration_error" in standing.tags
        found = Path(client.download_artifacts(standing.run_id, "release", str(tmp_path)))
        for file in ("card.json", "model.safetensors"):
            assert (found / file).read_bytes() == (runs["1.0.0"] / "model" / file).read_bytes()
        assert (found / "job.toml").read_bytes() == (runs["1.0.0"] / "job.toml").read_bytes()
        assert (found / "verdicts.json").is_file()
        assert len(client.search_model_versions("name = 'ward'")) == 2


def test_a_server_that_is_not_there_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with Registry(tmp_path / "registry", create=True) as registry:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        with pytest.raises(RunError, match=r"--mlflow failed"):
            mirror(registry, "ward", f"http://127.0.0.1:{port}")
        with pytest.raises(InputError, match="unknown scheme 'ftp'"):
            mirror(registry, "ward", "ftp://x")
