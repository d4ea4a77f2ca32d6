"""Pairs as tensors, and the streams that batches are drawn from.

Shape letters: N pairs, F features of a medium, B pairs a batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class PairSet:
    """Labelled pairs of one domain, ready for its network.

    Attributes:
        features: for each medium (N, F) float32, on the CPU, maybe memory-mapped.
        labels: (N,) int64 class numbers.
        ids: N ids.
    """

    features: Mapping[str, Tensor]
    labels: Tensor
    ids: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass
class PairStream:
    """Endless batches: pass after pass over some pairs, each pass in a new order, none left out.

    When fewer pairs are left of a pass than a batch takes, the batch goes on with the next pass; so every batch has the
    same size, however few pairs there are.

    Attributes:
        pairs: what is drawn from.
        places: which of the pairs.
        batch: B.
        generator: decides the orders.
        device: where the batches go.
    """

    pairs: PairSet
    places: NDArray[np.int64]
    batch: int
    generator: torch.Generator
    device: torch.device

    def __post_init__(self) -> None:
        self._queue = torch.empty(0, dtype=torch.int64)

    def draw(self) -> tuple[dict[str, Tensor], Tensor]:
        """The next batch: for each medium (B, F), and labels (B,)."""
        while len(self._queue) < self.batch:
            order = torch.randperm(len(self.places), generator=self.generator)
            self._queue = torch.cat([self._queue, torch.from_numpy(self.places)[order]])
        chosen, self._queue = self._queue[: self.batch], self._queue[self.batch :]
        features = {medium: rows[chosen].to(self.device) for medium, rows in self.pairs.features.items()}
        return features, self.pairs.labels[chosen].to(self.device)
