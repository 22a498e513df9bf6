"""Who hears of a verdict: Prometheus, by a file that its node exporter collects, and a webhook, signed and retried."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedkeel.core.errors import InputError, RunError
from fedkeel.gate.policy import Tell
from fedkeel.gate.verdict import Verdict
from fedkeel.release.registry import Registry

SECRET = "FEDKEEL_WEBHOOK_SECRET"
_TRIES, _FIRST_REST, _SECONDS = 5, 0.5, 10.0


def check(told: Tell) -> None:
    """Raises `InputError` where a verdict could not be told: before anything is judged."""
    missing = []
    if told.webhook is not None:
        if not os.environ.get(SECRET):
            raise InputError(f"gate.toml: tell.webhook needs a secret to sign with: set {SECRET}")
        missing += _missing("httpx")
    if told.metrics is not None:
        missing += _missing("prometheus_client")
        if not Path(told.metrics).parent.is_dir():
            raise InputError(f"gate.toml: tell.metrics = '{told.metrics}': there is no such directory: make it")
    if missing:
        raise InputError(f"gate.toml: tell needs {missing[0]}: pip install 'fedkeel[dashboard]'")


def everybody(told: Tell, registry: Registry, verdict: Verdict) -> None:
    """Raises `RunError` where somebody could not be told; the verdict stands."""
    failed = []
    if told.metrics is not None:
        try:
            metrics(Path(told.metrics), registry)
        except OSError as error:
            failed.append(f"'{told.metrics}' could not be written ({error.strerror})")
    if told.webhook is not None:
        failed += webhook(told.webhook, {"event": "verdict", **verdict.to_dict()})
    if failed:
        stands = "is in" if verdict.passed else "is not let into"
        raise RunError(
            f"'{verdict.model}' {verdict.version} {stands} {verdict.stage}, and not all were told: {failed[0]}"
        )


def metrics(path: Path, registry: Registry) -> None:
    """Write the last verdict of every model and stage, and what stands there, for Prometheus."""
    from prometheus_client import CollectorRegistry, Gauge, write_to_textfile

    collected = CollectorRegistry()

    def gauge(name: str, meaning: str, *labels: str) -> Gauge:
        return Gauge(f"fedkeel_release_{name}", meaning, ["model", "stage", *labels], registry=collected)

    passed = gauge("passed", "1 where the model that was last judged for the stage passed", "version")
    rules = gauge("rule_passed", "1 where it passed the rule", "rule")
    figure = gauge("figure", "What a rule measured of it", "rule", "figure")
    judged = gauge("judged_timestamp_seconds", "When it was judged, since 1970")
    stands = gauge("info", "1 for the release that stands at the stage", "version", "fingerprint")
    for name in registry.judged:
        for stage, release in registry.stages(name).items():
            stands.labels(name, stage, release.version, release.fingerprint).set(1)
        for stage, verdict in _last(registry, name).items():
            passed.labels(name, stage, verdict["version"]).set(verdict["passed"])
            judged.labels(name, stage).set(verdict["wall"])
            for finding in verdict["findings"]:
                rules.labels(name, stage, finding["rule"]).set(finding["passed"])
                for key, value in finding["figures"].items():
                    figure.labels(name, stage, finding["rule"], key).set(float("nan") if value is None else value)
    write_to_textfile(str(path), collected)


def webhook(url: str, told: Mapping[str, Any]) -> list[str]:
    """POST a JSON text, signed: HMAC-SHA256 of 'TIMESTAMP.BODY' under the secret, in hex.

    Who receives it checks `Fedkeel-Signature`, refuses old timestamps, and drops an `Idempotency-Key` that it has seen:
    what may not have arrived is sent again. Gives why it was not taken, nothing where it was.
    """
    import httpx

    body = json.dumps(told, sort_keys=True, separators=(",", ":")).encode()
    why = ""
    for attempt in range(_TRIES):
        if attempt:
            time.sleep(_FIRST_REST * 2 ** (attempt - 1))
        headers = _headers(body)
        try:
            answer = httpx.post(url, content=body, headers=headers, timeout=_SECONDS, follow_redirects=False)
        except httpx.HTTPError as error:
            why = f"webhook '{url}' did not answer ({type(error).__name__})"
            continue
        if answer.is_success:
            return []
        why = f"webhook '{url}' answered {answer.status_code}"
        if answer.status_code < 500 and answer.status_code not in (408, 425, 429):
            break
    return [why]


def _headers(body: bytes) -> dict[str, str]:
    stamp = str(int(time.time()))
    signature = hmac.new(os.environ[SECRET].encode(), f"{stamp}.".encode() + body, hashlib.sha256).hexdigest()
    return {
        "Content-Type": "application/json",
        "Fedkeel-Timestamp": stamp,
        "Fedkeel-Signature": f"sha256={signature}",
        "Idempotency-Key": hashlib.sha256(body).hexdigest(),
    }


def _last(registry: Registry, name: str) -> dict[str, dict[str, Any]]:
    """Stage -> the last verdict."""
    return {move.stage: move.verdict for move in registry.history(name) if move.verdict is not None}


def _missing(module: str) -> list[str]:
    from importlib.util import find_spec

    return [] if find_spec(module) else [module]
