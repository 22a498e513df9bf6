"""What of a model others depend on: as much of it as a card, a file or a module tells."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fedkeel.ship.card import Inputs, ModelCard, Outputs, Parameter


@dataclass(frozen=True, slots=True)
class Contract:
    """A model as others see it; None: not told by `source`, and then not compared.

    `parameters`: what federated updates are made of, in no order that counts. `layout`: a digest that tells their
    order as well. `network`: the computation in words, or a digest of it where `sealed`: nobody sends updates to such
    a model (ONNX), and what is inside it may change. `needs`: what a runtime must have at least, as ONNX's opset.
    `weights`: their fingerprint. `counters`: int64 buffers, as BatchNorm's count of batches, are among the parameters;
    a card leaves them out, so the weights' fingerprint without them is told as well. `card`: the digest of the card,
    which covers what is told of the model besides.
    """

    source: str
    version: str | None = None
    parameters: tuple[Parameter, ...] | None = None
    layout: str | None = None
    inputs: tuple[Inputs, ...] | None = None
    outputs: tuple[Outputs, ...] | None = None
    labels: tuple[str, ...] | None = None
    preprocessing: str | None = None
    network: str | None = None
    sealed: bool = False
    needs: Mapping[str, int] | None = None
    weights: str | None = None
    counters: bool = False
    weights_without: str | None = None
    card: str | None = None

    @classmethod
    def of(cls, card: ModelCard, source: str) -> Contract:
        """What a card tells."""
        return cls(
            source,
            version=card.version,
            parameters=card.parameters,
            layout=card.layout_digest,
            inputs=card.inputs,
            outputs=card.outputs or None,
            labels=card.labels,
            preprocessing=card.preprocessing,
            network=card.network,
            weights=card.lineage.fingerprint,
            card=card.digest,
        )
