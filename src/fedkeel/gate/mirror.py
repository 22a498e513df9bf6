"""A registry in MLflow's: a version for each release, with its files, and an alias for each stage.

MLflow is the mirror: it is brought to what the registry says, however often, and nothing is read back.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from fedkeel.release.registry import STAGES, Registry, Release
from fedkeel.ship.card import read_card
from fedkeel.track import mlflow

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

_RELEASE = "fedkeel.release"
_EXPERIMENT = "fedkeel releases"


def mirror(registry: Registry, name: str, uri: str) -> list[tuple[str, str, str]]:
    """Bring MLflow at `uri` to what the registry says of a model; (version here, version there, stages) of each.

    What is in MLflow already is known by the tag `fedkeel.release`; what was left half done is done anew. Raises
    `InputError` for an address that MLflow does not take, `RunError` where it fails.
    """
    client = mlflow.opened(uri)
    with mlflow.plain():
        there = _versions(client, name)
        stages = registry.stages(name)
        for release in registry.releases(name):
            if release.kept and release.id not in there:
                there[release.id] = _bring(client, registry, release, uri)
        model = client.get_registered_model(name) if there else None
        for stage in STAGES:
            wanted = there.get(stages[stage].id) if stage in stages else None
            if model is not None and wanted is None and stage in model.aliases:
                client.delete_registered_model_alias(name, stage)
            elif wanted is not None and str(model and model.aliases.get(stage)) != wanted:
                client.set_registered_model_alias(name, stage, wanted)
    return [
        (release.version, there[release.id], ", ".join(s for s in stages if stages[s].id == release.id))
        for release in registry.releases(name)
        if release.id in there
    ]


def _versions(client: MlflowClient, name: str) -> dict[str, str]:
    """Release -> its version in MLflow. The model is made where there is none."""
    quoted = name.replace("'", "''")
    if not client.search_registered_models(f"name = '{quoted}'"):
        client.create_registered_model(name, description="Released by fedkeel; its registry says what is so.")
    found: dict[str, str] = {}
    token = None
    while True:
        page = client.search_model_versions(f"name = '{quoted}'", page_token=token)
        found |= {one.tags[_RELEASE]: str(one.version) for one in page if _RELEASE in one.tags}
        token = page.token
        if not token:
            return found


def _bring(client: MlflowClient, registry: Registry, release: Release, uri: str) -> str:
    """The version in MLflow of a release, with all its files and the last verdict on it."""
    verdicts = [m.verdict for m in registry.history(release.name) if m.release == release.id and m.verdict]
    with TemporaryDirectory(prefix="fedkeel-") as folder:
        place = registry.checkout(release, Path(folder) / "release")
        tags = _tags(release, place, verdicts[-1] if verdicts else {})
        run = client.create_run(_experiment(client, uri), tags=tags, run_name=f"{release.name} {release.version}")
        (place / "verdicts.json").write_text(json.dumps(verdicts, indent=1))
        client.log_artifacts(run.info.run_id, str(place), "release")
        client.set_terminated(run.info.run_id)
    source = f"{run.info.artifact_uri}/release"
    made = client.create_model_version(release.name, source, run.info.run_id, tags=tags)
    return str(made.version)


def _tags(release: Release, place: Path, verdict: Mapping[str, Any]) -> dict[str, str]:
    card = read_card(place / "card.json")
    told = {"version": release.version, "fingerprint": release.fingerprint, "card": card.digest}
    if card.privacy is not None:
        told["epsilon"] = str(card.privacy.epsilon)
    for finding in verdict.get("findings", []):
        told |= {f"{finding['rule'].partition('(')[0]}.{key}": str(value) for key, value in finding["figures"].items()}
    return {_RELEASE: release.id} | {f"fedkeel.{key}": value for key, value in told.items()}


def _experiment(client: MlflowClient, uri: str) -> str:
    found = client.get_experiment_by_name(_EXPERIMENT)
    if found is not None:
        return str(found.experiment_id)
    return str(client.create_experiment(_EXPERIMENT, artifact_location=mlflow.artifacts(uri)))
