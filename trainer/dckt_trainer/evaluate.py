"""Representations of pairs, and MAP in every direction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from dckt.metrics import MAPResult, mean_average_precision
from dckt_trainer.encoders import CommonSpace
from dckt_trainer.media import directions
from dckt_trainer.pairs import PairSet

CHUNK = 1024

Vectors: TypeAlias = Mapping[str, NDArray[np.float32]]
"""Of each medium (N, D)."""


@dataclass(frozen=True)
class Evaluation:
    """How pairs retrieve each other.

    Attributes:
        directions: by name, such as ``image_to_text``: every ordered pair of media.
    """

    directions: Mapping[str, MAPResult]

    @property
    def average(self) -> float:
        """The mean MAP over all directions."""
        return sum(result.map for result in self.directions.values()) / len(self.directions)

    @property
    def per_pair(self) -> NDArray[np.float64]:
        """(N,) the mean AP of each pair's items as queries."""
        first, *others = (result.per_query for result in self.directions.values())
        mean: NDArray[np.float64] = sum(others, first) / len(self.directions)
        return mean

    @property
    def lowest(self) -> float:
        """The mean MAP over all directions, ties in the unluckiest order."""
        return sum(result.lowest for result in self.directions.values()) / len(self.directions)

    @property
    def highest(self) -> float:
        """Likewise in the luckiest order."""
        return sum(result.highest for result in self.directions.values()) / len(self.directions)


@dataclass(frozen=True)
class Answers:
    """What a model says of pairs.

    Attributes:
        vectors: by which it compares them, of each medium (N, D).
        probability: of each class, (N, C); the same thing for a network.
    """

    vectors: Vectors
    probability: Vectors


def answers(network: CommonSpace, pairs: PairSet, device: torch.device) -> Answers:
    """What a model says of pairs, in evaluation mode; float32."""
    network.eval()
    found: dict[str, dict[str, NDArray[np.float32]]] = {output: {} for output in network.outputs}
    with torch.inference_mode():
        for medium, rows in pairs.features.items():
            parts = [network.represent(medium, part.to(device)) for part in torch.split(rows, CHUNK)]
            for output, tensors in zip(network.outputs, zip(*parts, strict=True), strict=True):
                found[output][medium] = torch.cat([tensor.float().cpu() for tensor in tensors]).numpy()
    return Answers(found[network.retrieves_by], found["probability"])


def represent(network: CommonSpace, pairs: PairSet, device: torch.device) -> Vectors:
    """What items of each medium are compared by, (N, D) float32, the network in evaluation mode."""
    return answers(network, pairs, device).vectors


def evaluate(network: CommonSpace, pairs: PairSet, device: torch.device) -> Evaluation:
    """MAP by cosine of what items are compared by, in every direction, over the whole ranking."""
    return score(represent(network, pairs, device), pairs)


def score(vectors: Vectors, pairs: PairSet, *, cut: int | None = None) -> Evaluation:
    """MAP of representations that are there already, over the whole ranking or its first ``cut``."""
    labels = pairs.labels.numpy()
    return Evaluation(
        {
            name: mean_average_precision(vectors[asked], labels, vectors[found], labels, cut=cut)
            for name, (asked, found) in directions(vectors).items()
        }
    )
