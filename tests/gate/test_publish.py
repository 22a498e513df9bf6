"""The gate from end to end: real runs, a registry, and what is told of each verdict."""

from __future__ import annotations

import hashlib
import hmac
import http.server
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import fedkeel
from fedkeel import plugins
from fedkeel.core.errors import InputError, RunError
from fedkeel.edge.export import Limits, export
from fedkeel.gate import policy, tell
from fedkeel.gate.publish import publish
from fedkeel.gate.serving import drift
from fedkeel.gate.verdict import Verdict
from fedkeel.release.registry import Registry
from fedkeel.ship import card, tensors
from fedkeel.world.federation import Federation

WARDS = Path(__file__).parents[1] / "release" / "wards.py"
plugins.load([str(WARDS)])


def job(*settings: str, rounds: int = 12) -> fedkeel.Job:
    base = ["data.clients=4", "data.partition=iid", "model.build=mlp(hidden=(16,))", "train.lr=0.3"]
    return fedkeel.Job(name="ward", rounds=rounds).with_settings([*base, *settings])


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fedkeel.run(job(), tmp_path_factory.mktemp("good") / "run", with_report=False).path


@pytest.fixture(scope="module")
def better(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = job("model.version=1.0.1", "seed=0", rounds=20)
    return fedkeel.run(made, tmp_path_factory.mktemp("better") / "run", with_report=False).path


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with Registry(tmp_path / "registry", create=True) as made:
        policy.write(made)
        yield made


def asked(registry: Registry, *rules: str, tell: str = "", plugins: str = "[]") -> None:
    """Let every stage ask these rules."""
    stages = "".join(f"[{stage}]\nrules = {json.dumps(rules)}\n" for stage in ("candidate", "staging", "production"))
    (registry.path / policy.FILE).write_text(f"plugins = {plugins}\n[tell]\n{tell}\n{stages}")


def copied(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "copy"))


def reasons(verdict: Verdict) -> str:
    assert not verdict.passed
    return "; ".join(verdict.reasons)


def test_a_good_run_goes_all_the_way(good: Path, better: Path, registry: Registry, tmp_path: Path):
    run = copied(good, tmp_path)
    for stage in ("candidate", "staging", "production"):
        verdict = publish(run, stage, registry)
        assert verdict.passed, verdict.reasons
    release = registry.find("ward", "production")
    assert sorted(release.files) == ["card.json", "job.toml", "model.safetensors"]
    assert {one.id for one in registry.stages("ward").values()} == {release.id}
    out = registry.checkout(release, tmp_path / "out")
    assert (out / "model.safetensors").read_bytes() == (run / "model" / "model.safetensors").read_bytes()
    with fedkeel.Run(run).dir.ledger(readonly=True) as ledger:
        told = ledger.meta["verdicts"]
    assert [one["stage"] for one in told] == ["candidate", "staging", "production"]
    assert all(one["passed"] for one in told)
    assert registry.history("ward")[-1].verdict == told[-1]
    second = publish(copied(better, tmp_path / "b"), "production", registry)
    assert second.passed, second.reasons
    found = dict(second.findings)
    assert found["version"].text == "1.0.0 -> 1.0.1: patch"
    assert found["configuration"].text == "changed: rounds: 12 -> 20"
    assert found["not_worse(margin=0.01)"].figures["difference"] > 0
    assert second.against == release.id
    assert registry.rollback("ward", "production").id == release.id


def test_a_worse_model_is_blocked_and_nothing_moves(good: Path, registry: Registry, tmp_path: Path):
    assert publish(copied(good, tmp_path), "production", registry).passed
    worse = fedkeel.run(job("model.version=1.0.1", rounds=2), tmp_path / "worse", with_report=False).path
    verdict = publish(worse, "production", registry)
    assert "not_worse(margin=0.01): -0." in reasons(verdict)
    assert "no_label_worse(margin=0.1): label '" in reasons(verdict)
    assert registry.find("ward", "production").version == "1.0.0"
    assert [move.kind for move in registry.history("ward")] == ["published", "blocked"]
    assert [one.version for one in registry.releases("ward")] == ["1.0.0"]


def change(run: Path, **fields: object) -> None:
    made, named = card.read(run / "model")
    card.write(run / "model", made.model_copy(update=fields), named)


def test_a_card_that_lies_is_blocked(good: Path, registry: Registry, tmp_path: Path):
    honest = card.read(good / "model")[0]
    inputs = honest.inputs[0].model_copy(update={"normalisation": "another"})
    lies = {
        "labels": (honest.labels[::-1], "labels in another order"),
        "inputs": ((inputs,), "normalisation"),
        "metrics": ({"global": {"accuracy": 0.999}}, "metrics.global"),
        "network": ("mlp(hidden=(17,))", "network"),
        "lineage": (honest.lineage.model_copy(update={"rounds": 99}), "lineage.rounds is 99 on it and 12 in the run"),
    }
    for number, (field, (value, said)) in enumerate(lies.items()):
        run = copied(good, tmp_path / str(number))
        change(run, **{field: value})
        verdict = publish(run, "candidate", registry)
        assert "metadata: the card does not fit its run" in reasons(verdict)
        assert said in reasons(verdict)
    assert registry.releases("ward") == []


def test_other_weights_with_a_card_that_fits_them_are_blocked(good: Path, registry: Registry, tmp_path: Path):
    run = copied(good, tmp_path)
    made, named = card.read(run / "model")
    name = next(iter(named))
    named[name] = named[name] + 0.5
    lineage = made.lineage.model_copy(update={"fingerprint": tensors.fingerprint(named)})
    card.write(run / "model", made.model_copy(update={"lineage": lineage}), named)
    assert "fingerprint: the model file has weights" in reasons(publish(run, "candidate", registry))
    assert "figures: accuracy" in reasons(publish(run, "production", registry))


def test_a_changed_byte_in_the_model_is_blocked(good: Path, registry: Registry, tmp_path: Path):
    run = copied(good, tmp_path)
    path = run / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    verdict = publish(run, "candidate", registry)
    assert "cannot be read (its digest does not match its content)" in reasons(verdict)
    assert registry.history("ward")[-1].kind == "blocked"


def test_a_job_changed_afterwards_is_blocked(good: Path, registry: Registry, tmp_path: Path):
    run = copied(good, tmp_path)
    text = (run / "job.toml").read_text()
    (run / "job.toml").write_text(text.replace("lr = 0.3", "lr = 0.2"))
    assert "configuration: job.toml was changed since the run was begun" in reasons(publish(run, "staging", registry))


def test_protections_that_were_dropped_are_blocked(good: Path, registry: Registry, tmp_path: Path):
    asked(registry, "configuration")
    guarded = fedkeel.run(job("aggregate.reduce=trimmed_mean(trim=1)"), tmp_path / "a", with_report=False).path
    assert publish(guarded, "production", registry).passed
    run = fedkeel.run(job("model.version=1.0.1", "train.lr=0.2"), tmp_path / "b", with_report=False).path
    text = reasons(publish(run, "production", registry))
    assert "changed and fixed: aggregate.reduce: 'trimmed_mean(trim=1)' -> 'mean'" in text
    asked(registry, 'configuration(fixed=("data.*",))')
    verdict = publish(run, "production", registry)
    assert verdict.passed
    assert "train.lr: 0.3 -> 0.2" in verdict.findings[0][1].text


def test_an_experiment_is_blocked(registry: Registry, tmp_path: Path):
    asked(registry, "configuration")
    attacked = job("attack.rule=sign_flip", "attack.clients=1", rounds=1)
    run = fedkeel.run(attacked, tmp_path / "a", with_report=False).path
    assert "configuration: attack.clients = 1 is for experiments" in reasons(publish(run, "production", registry))
    noise = ["privacy.mechanism=central(norm=1.0)", "privacy.epsilon=4", "aggregate.weigh=equal"]
    made_again = job(*noise, "privacy.insecure_reproducible_noise=true", rounds=1)
    run = fedkeel.run(made_again, tmp_path / "b", with_report=False).path
    assert "insecure_reproducible_noise = true is for exp" in reasons(publish(run, "production", registry))


def test_a_version_that_is_taken_is_blocked(good: Path, better: Path, registry: Registry, tmp_path: Path):
    asked(registry, "fingerprint", "version")
    assert publish(copied(good, tmp_path), "candidate", registry).passed
    other = fedkeel.run(job("seed=5", rounds=2), tmp_path / "other", with_report=False).path
    assert "declare 1.0.1 or later" in reasons(publish(other, "candidate", registry))
    verdict = publish(other, "production", registry)  # nothing stands there
    assert "registry: 'ward' 1.0.0 is released already, with other weights: raise model.version" in reasons(verdict)
    assert "production" not in registry.stages("ward")


def test_refused_updates_block(registry: Registry, tmp_path: Path):
    attacked = job("attack.rule=nan", "attack.clients=2", rounds=2)
    run = fedkeel.run(attacked, tmp_path / "run", with_report=False).path
    asked(registry, "refused(most=0.3)")
    assert "4 of 8 updates refused (50.0%), at most 30%" in reasons(publish(run, "production", registry))


def test_a_backdoor_blocks(good: Path, registry: Registry, tmp_path: Path):
    attacked = job("attack.rule=backdoor(target=3, share=0.5)", "attack.clients=1", "aggregate.weigh=equal")
    run = fedkeel.run(attacked, tmp_path / "run", with_report=False).path
    asked(registry, "backdoor")
    text = reasons(publish(run, "production", registry))
    assert "a bright mark (bottom right) turns" in text
    assert "of other examples to '3', at most 50%" in text
    assert publish(copied(good, tmp_path), "production", registry).passed


def test_privacy_is_spent_within_the_budget(registry: Registry, tmp_path: Path):
    pytest.importorskip("dp_accounting")
    promised = ["privacy.mechanism=central(norm=1.0)", "privacy.epsilon=4", "aggregate.weigh=equal"]
    run = fedkeel.run(job(*promised, rounds=3), tmp_path / "run", with_report=False).path
    asked(registry, "budget(epsilon=8)", "metadata")
    verdict = publish(run, "candidate", registry)
    assert verdict.passed, verdict.reasons
    assert verdict.findings[0][1].text.startswith("epsilon 4")
    asked(registry, "budget(epsilon=2)")
    assert "spent at delta 1e-05, at most 2" in reasons(publish(run, "production", registry))
    made, named = card.read(run / "model")
    assert made.privacy is not None
    less = made.privacy.model_copy(update={"epsilon": 1.0})
    card.write(run / "model", made.model_copy(update={"privacy": less}), named)
    asked(registry, "budget")
    assert not publish(run, "production", registry).passed
    asked(registry, "metadata")
    assert "privacy.epsilon is 1.0 on it" in reasons(publish(run, "production", registry))


def test_a_promise_is_asked_of_those_who_make_none(good: Path, registry: Registry, tmp_path: Path):
    asked(registry, "budget(epsilon=8)")
    text = reasons(publish(copied(good, tmp_path), "production", registry))
    assert "no privacy is promised, asked is epsilon 8" in text


def test_groups_and_the_worst_clients_are_asked(registry: Registry, tmp_path: Path):
    measured = job("data.holdout=0.3", 'record.groups={first = "client-[01]", rest = "client-[23]"}')
    run = fedkeel.run(measured, tmp_path / "run", with_report=False).path
    asked(registry, "groups(least=0.1)", "worst_decile(least=0.1)", "accuracy(least=0.1)")
    assert publish(run, "staging", registry).passed
    asked(registry, "groups(least=1)", "worst_decile(least=1)", "accuracy(least=0.999)")
    text = reasons(publish(run, "production", registry))
    assert "worst group " in text
    assert "worst tenth of the clients: 0." in text
    assert "accuracy(least=0.999): accuracy 0." in text


def test_without_the_figures_nothing_passes(good: Path, registry: Registry, tmp_path: Path):
    asked(registry, "groups(least=0.1)", "worst_decile(least=0.1)")
    text = reasons(publish(copied(good, tmp_path), "staging", registry))
    assert "there is no figure by group: name record.groups and data.holdout in the job" in text
    assert "the run has no figure 'worst_decile' of 'clients'" in text


def test_versions_with_other_columns_and_labels_are_compared_on_the_same_examples(registry: Registry, tmp_path: Path):
    def ward(*settings: str) -> fedkeel.Job:
        base = ["data.source=patients(columns=3, labels=2)", "model.version=1.2.0", "data.clients=4"]
        made = fedkeel.Job(name="ward", rounds=8, plugins=(str(WARDS),))
        return made.with_settings([*base, "data.partition=iid", "model.build=mlp(hidden=(6,))", *settings])

    first = fedkeel.run(ward(), tmp_path / "first", with_report=False).path
    asked(registry, "metadata", "backdoor", "configuration", "calibration(most=1)")
    standing = publish(first, "production", registry)
    assert standing.passed, standing.reasons
    grown = ward("data.source=patients(columns=5, labels=3)", "model.version=1.3.0", f"model.start={first}")
    second = fedkeel.run(grown, tmp_path / "second", with_report=False).path
    asked(registry, "metadata", "fingerprint", "version", "not_worse(margin=1)", "compatible")
    verdict = publish(second, "production", registry)
    assert verdict.passed, verdict.reasons
    found = dict(verdict.findings)
    assert found["version"].text == "1.2.0 -> 1.3.0: minor"
    count = int(found["not_worse(margin=1)"].text.rpartition("(")[2].split()[0])
    test_y = Federation.of(fedkeel.Run(second).job).pool.test_y
    assert 0 < count == int((test_y < 2).sum()) < len(test_y)  # the old model has two labels
    assert sorted(registry.find("ward", "production").files)[-1] == "plugins/wards.py"
    asked(registry, 'compatible(at_most="patch")')
    third = fedkeel.run(
        ward("data.source=patients(columns=5, labels=4)", "model.version=1.4.0"), tmp_path / "third", with_report=False
    ).path
    assert "minor: " in reasons(publish(third, "production", registry))


def test_an_export_is_judged_and_released_with_its_model(good: Path, registry: Registry, tmp_path: Path):
    run = copied(good, tmp_path)
    asked(registry, "exported", "fingerprint")
    assert "is no report of an export: fedkeel export RUN --target onnx-int8" in reasons(
        publish(run, "candidate", registry)
    )
    export(run, "onnx-int8", seconds=0.05, limits=Limits(0.05, 0.05))
    asked(registry, "exported(lost=0.05, changed=0.05)", "fingerprint")
    verdict = publish(run, "production", registry)
    assert verdict.passed, verdict.reasons
    assert "of predictions agree" in verdict.findings[0][1].text
    served = registry.checkout(registry.find("ward", "production"), tmp_path / "served")
    model = served / "exports" / "onnx-int8" / "model.onnx"
    assert drift(str(model), f"{registry.path}/ward") is None
    whole = model.read_bytes()
    model.chmod(0o644)
    model.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert drift(str(model), f"{registry.path}/ward") is not None
    asked(registry, "exported(lost=0.05, changed=0.05, lower=1.0)")
    assert "lower latency; asked 5, 95%, 100%" in reasons(publish(run, "staging", registry))
    exports = run / "exports" / "onnx-int8"
    asked(registry, "exported(lost=0.05, changed=0.05)")
    (exports / "model.onnx").write_bytes(whole + b"\x00")
    assert "model.onnx is not that of its export.json" in reasons(publish(run, "staging", registry))
    (exports / "model.onnx").write_bytes(whole)
    change(run, version="1.0.1")
    assert "it was exported from another model" in reasons(publish(run, "staging", registry))


NETWORK = """
import torch
import fedkeel

@fedkeel.rule("model")
def own_network(inputs, classes):
    "A net whose code changes and whose name does not."
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 24), {activation}, torch.nn.Linear(24, classes))
"""


def test_the_standing_model_answers_by_the_code_that_it_was_released_with(tmp_path: Path):
    """A plugin of before and one of now register the same name: each model is asked with its own."""
    for version, activation in (("1.0.0", "torch.nn.ReLU()"), ("1.0.1", "torch.nn.Hardtanh(0.0, 1e-6)")):
        (tmp_path / version).mkdir()
        plugin = tmp_path / version / "net.py"
        plugin.write_text(NETWORK.format(activation=activation))
        text = job(f"model.version={version}", "model.build=own_network").to_toml()
        (tmp_path / f"{version}.toml").write_text(text.replace("plugins = []", f'plugins = ["{version}/net.py"]'))
        command = [sys.executable, "-m", "fedkeel", "run", f"{version}.toml", "--out", f"run-{version}"]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    with Registry(tmp_path / "registry", create=True) as registry:
        asked(registry, "fingerprint", "version", "configuration", "not_worse(margin=0.01)", "no_label_worse")
    code = [sys.executable, "-m", "fedkeel", "release", "publish", "--to", "production", "--registry", "registry"]
    first = subprocess.run([*code, "run-1.0.0"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stdout + first.stderr
    second = subprocess.run([*code, "run-1.0.1", "--json"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert second.returncode == 1
    found = {finding["rule"]: finding for finding in json.loads(second.stdout)["findings"]}
    told = fedkeel.Run(tmp_path / "run-1.0.0").final(), fedkeel.Run(tmp_path / "run-1.0.1").final()
    assert told[0] is not None
    assert told[1] is not None
    difference = found["not_worse(margin=0.01)"]["figures"]["difference"]
    assert difference == pytest.approx(told[1]["value"] - told[0]["value"], abs=1e-6)


RULES = """
import fedkeel

@fedkeel.rule("gate")
def never(evidence):
    "Lets nothing pass."
    return fedkeel.Finding(False, f"{evidence.card.version} is not for us", {"asked": 1.0})

@fedkeel.rule("gate")
def broken(evidence):
    "Fails."
    return 1 / 0

@fedkeel.rule("gate")
def silent(evidence):
    "Says nothing."
"""


def test_own_rules_and_rules_that_fail_block(good: Path, registry: Registry, tmp_path: Path):
    (registry.path / "own.py").write_text(RULES)
    asked(registry, "never", "broken", "silent", plugins='["own.py"]')
    text = reasons(publish(copied(good, tmp_path), "candidate", registry))
    assert "never: 1.0.0 is not for us" in text
    assert "broken: the rule failed (ZeroDivisionError: division by zero): mend it" in text
    assert "silent: the rule returned NoneType: return a fedkeel.Finding" in text


def test_a_stage_that_asks_nothing_lets_nothing_in(good: Path, registry: Registry, tmp_path: Path):
    asked(registry)
    assert not publish(copied(good, tmp_path), "candidate", registry).passed


def test_what_stands_is_not_believed_when_it_was_changed(good: Path, better: Path, registry: Registry, tmp_path: Path):
    asked(registry, "fingerprint", "version")
    assert publish(copied(good, tmp_path), "production", registry).passed
    digest = registry.find("ward", "production").files["card.json"].digest
    path = registry.path / "objects" / digest[:2] / digest
    whole = path.read_bytes()
    path.unlink()
    path.write_bytes(whole[:-2] + b" \n")
    text = reasons(publish(copied(better, tmp_path / "b"), "production", registry))
    assert "version: card.json of 'ward' 1.0.0 is not what was released" in text


@contextmanager
def receiver(*answers: int) -> Iterator[tuple[str, list[tuple[dict[str, str], bytes]]]]:
    """A server that answers so, the last one for ever; and what it was sent."""
    got: list[tuple[dict[str, str], bytes]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            got.append((dict(self.headers), body))
            self.send_response(answers[min(len(got), len(answers)) - 1])
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/hook", got
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_webhook_is_told_signed_and_told_again(
    good: Path, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(tell.SECRET, "s3cret")
    monkeypatch.setattr(tell, "_FIRST_REST", 0.01)
    with receiver(503, 429, 200) as (url, got):
        asked(registry, "fingerprint", tell=f'webhook = "{url}"')
        verdict = publish(copied(good, tmp_path), "production", registry)
    assert len(got) == 3
    headers, body = got[-1]
    signed = headers["Fedkeel-Timestamp"].encode() + b"." + body
    expected = hmac.new(b"s3cret", signed, hashlib.sha256).hexdigest()
    assert headers["Fedkeel-Signature"] == f"sha256={expected}"
    assert len({headers["Idempotency-Key"] for headers, _ in got}) == 1
    assert json.loads(body) == {"event": "verdict", **verdict.to_dict()}


def test_who_refuses_is_not_asked_again_and_the_verdict_stands(
    good: Path, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(tell.SECRET, "s3cret")
    with receiver(401) as (url, got):
        asked(registry, "fingerprint", tell=f'webhook = "{url}"')
        with pytest.raises(
            RunError, match=r"'ward' 1.0.0 is in production, and not all were told: webhook .* answered 401"
        ):
            publish(copied(good, tmp_path), "production", registry)
    assert len(got) == 1
    assert registry.find("ward", "production").version == "1.0.0"


def test_what_cannot_be_told_is_not_judged(
    good: Path, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv(tell.SECRET, raising=False)
    asked(registry, "fingerprint", tell='webhook = "http://127.0.0.1:9/"')
    with pytest.raises(InputError, match=r"set FEDKEEL_WEBHOOK_SECRET"):
        publish(copied(good, tmp_path), "production", registry)
    asked(registry, "fingerprint", tell=f'metrics = "{tmp_path / "none" / "x.prom"}"')
    with pytest.raises(InputError, match=r"there is no such directory"):
        publish(tmp_path / "copy", "production", registry)
    assert registry.history("ward") == []


def test_prometheus_reads_why(good: Path, better: Path, registry: Registry, tmp_path: Path):
    from prometheus_client.parser import text_string_to_metric_families

    file = tmp_path / "fedkeel.prom"
    asked(registry, "fingerprint", tell=f'metrics = "{file}"')
    publish(copied(good, tmp_path), "production", registry)
    asked(registry, "fingerprint", "accuracy(least=1)", tell=f'metrics = "{file}"')
    publish(copied(better, tmp_path / "b"), "production", registry)
    found = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(file.read_text())
        for sample in family.samples
    }
    where = (("model", "ward"),)
    at = ("stage", "production")
    assert found["fedkeel_release_passed", *where, at, ("version", "1.0.1")] == 0
    assert found["fedkeel_release_rule_passed", *where, ("rule", "accuracy(least=1)"), at] == 0
    assert found["fedkeel_release_rule_passed", *where, ("rule", "fingerprint"), at] == 1
    assert 0 < found["fedkeel_release_figure", ("figure", "accuracy"), *where, ("rule", "accuracy(least=1)"), at] < 1
    stands = [key for key in found if key[0] == "fedkeel_release_info"]
    assert [dict(key[1:])["version"] for key in stands] == ["1.0.0"]


def test_the_serving_side_finds_what_was_not_released(good: Path, better: Path, registry: Registry, tmp_path: Path):
    asked(registry, "fingerprint")
    print_of = publish(copied(good, tmp_path), "production", registry).fingerprint
    served = registry.checkout(registry.find("ward", "production"), tmp_path / "served")
    reference = f"{registry.path}/ward@production"
    assert drift(str(served), reference) is None
    assert drift(str(served), print_of) is None
    assert drift(str(served / "model.safetensors"), print_of) is None
    other = publish(copied(better, tmp_path / "b"), "production", registry).fingerprint
    assert f"'ward' 1.0.1 has {other[:12]}" in (drift(str(served), reference) or "")
    assert drift(str(served), f"{registry.path}/ward@1.0.0") is None
    assert "expected are" in (drift(str(served), other) or "")
    for file in ("card.json", "model.safetensors"):
        whole = (served / file).read_bytes()
        for at in range(0, len(whole), max(1, len(whole) // 40)):
            (served / file).write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            assert drift(str(served), f"{registry.path}/ward@1.0.0"), (file, at)
        (served / file).write_bytes(whole)
    with pytest.raises(InputError, match="is no fingerprint of 64 hex digits and no release"):
        drift(str(served), "abc")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = [", "is not valid TOML"),
        ("", "candidate: Field required"),
        ("[candidate]\nrules=['nope']\n[staging]\nrules=[]\n[production]\nrules=[]", "candidate.rules: .*nope"),
        ("[tell]\nwebhook='ftp://x'\n", "tell.webhook"),
        ("color = 'red'", "candidate|color"),
    ],
)
def test_a_policy_that_is_wrong_is_one_sentence(good: Path, registry: Registry, text: str, said: str):
    (registry.path / policy.FILE).write_text(text)
    with pytest.raises(InputError, match=said):
        publish(good, "candidate", registry)


def test_a_run_that_is_not_done_and_a_stage_that_is_none(good: Path, registry: Registry, tmp_path: Path):
    with pytest.raises(InputError, match=r"stage 'prod' is unknown: "):
        publish(good, "prod", registry)
    run = copied(good, tmp_path)
    shutil.rmtree(run / "model")
    with pytest.raises(InputError, match="holds no model yet: resume it"):
        publish(run, "candidate", registry)
