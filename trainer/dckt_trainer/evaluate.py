"""Representations of pairs, and MAP in both directions."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from dckt.metrics import CrossMediaMAP, cross_media_map
from dckt_trainer.network import DomainNetwork
from dckt_trainer.pairs import PairSet

CHUNK = 1024


def represent(network: DomainNetwork, pairs: PairSet, device: torch.device) -> dict[str, NDArray[np.float32]]:
    """Class probabilities (N, C) float32 of each medium, the network in evaluation mode."""
    network.eval()
    with torch.inference_mode():
        return {
            medium: torch.cat(
                [network.represent(medium, part.to(device))[0].float().cpu() for part in torch.split(rows, CHUNK)]
            ).numpy()
            for medium, rows in pairs.features.items()
        }


def evaluate(network: DomainNetwork, pairs: PairSet, device: torch.device) -> CrossMediaMAP:
    """MAP by cosine of class probabilities in both directions, over the whole ranking."""
    return score(represent(network, pairs, device), pairs)


def score(vectors: Mapping[str, NDArray[np.float32]], pairs: PairSet, *, cut: int | None = None) -> CrossMediaMAP:
    """MAP of representations that are there already, over the whole ranking or its first ``cut``."""
    return cross_media_map(vectors["image"], vectors["text"], pairs.labels.numpy(), cut=cut)
