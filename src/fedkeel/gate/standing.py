"""What the standing model answers to a new run's test set, by the code that it was released with."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fedkeel import plugins
from fedkeel.config import Job, load
from fedkeel.core.errors import FedkeelError, InputError
from fedkeel.core.keys import Key
from fedkeel.core.layout import Layout
from fedkeel.ship import card as cards
from fedkeel.ship.card import Feature, ModelCard
from fedkeel.train import outputs
from fedkeel.train.contract import Prepare
from fedkeel.world import bridge
from fedkeel.world.models import build_model
from fedkeel.world.pool import Pool

_FACTS, _ANSWERS = "test.pt", "answers.pt"


def answers(release: Path, pool: Pool, preprocessing: str) -> Tensor:
    """The outputs of a released model (its directory, checked) for a pool's test set.

    The columns are put in the model's places by name, and examples of labels that it has not are left out, as
    `known` tells. Where `preprocessing`, the digest on the new card, is another, raw data are prepared as the old one's
    source does. A release with plugins is asked in a process of its own: a plugin of before registers the names of now.
    """
    job = load(release / "job.toml")
    if not job.plugins:
        made, named = cards.read(release)
        return _answers(job, made, named, pool, pool.prepare if made.preprocessing == preprocessing else None)
    features = [feature.model_dump() for feature in pool.features]
    facts = {"x": pool.test_x, "y": pool.test_y, "classes": pool.classes, "features": features}
    torch.save(facts, release.parent / _FACTS)
    command = [sys.executable, "-m", "fedkeel.gate.standing", str(release)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["it was killed"])[-1][:300]
        raise InputError(f"the standing model cannot be asked: {said}")
    found: Tensor = torch.load(release.parent / _ANSWERS, weights_only=True)
    return found


def known(y: Tensor, card: ModelCard) -> Tensor:
    """Which examples have a label of the model (n,)."""
    return bridge.known(y, len(card.labels))


def _answers(job: Job, made: ModelCard, named: Mapping[str, Tensor], pool: Pool, prepare: Prepare | None) -> Tensor:
    if prepare is None:
        prepare = job.rule("data.source", "source")(Key.root(job.seed).fold("source")).prepare
    features, classes = made.inputs[0].features, len(made.labels) or pool.classes
    columns = bridge.columns(pool.features, features)
    x, y = bridge.examples(pool.test_x, pool.test_y, columns, classes)
    fitted = Pool(x, y, x, y, classes, prepare, labels=made.labels, features=features)
    module = build_model(job.rule("model.build", "model"), fitted, Key.root(job.seed).fold("model"))
    layout = Layout.of(module, job.model.private)
    if layout.digest != made.layout_digest:
        raise InputError(
            f"the code of {made.version} builds another model than it was released with: restore its plugins"
        )
    module.load_state_dict(dict(named), strict=False)
    vector = layout.flatten(module)[layout.shared]
    return torch.cat([output.clone() for _, output in outputs(module, layout, vector, x, prepare)])


def main(release: Path) -> None:
    """In the process of its own."""
    job = load(release / "job.toml")
    plugins.load(job.plugins)
    made, named = cards.read(release)
    facts = torch.load(release.parent / _FACTS, weights_only=True)
    features = tuple(Feature(**feature) for feature in facts["features"])
    x, y = facts["x"], facts["y"]
    pool = Pool(x, y, x, y, facts["classes"], features=features)
    torch.save(_answers(job, made, named, pool, None), release.parent / _ANSWERS)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except FedkeelError as error:
        sys.exit(str(error))
