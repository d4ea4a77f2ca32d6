"""Pairs as tensors, and the streams that batches are drawn from.

Shape letters: N pairs, F features of a medium, B pairs a batch, G batches drawn at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dckt_trainer import parallel
from dckt_trainer.seeds import torch_generator


@dataclass(frozen=True)
class PairSet:
    """Labelled pairs of one domain, ready for its network.

    Attributes:
        features: for each medium (N, F) float32, or token ids (N, L) int64 for a network with a front; on the CPU,
            maybe memory-mapped.
        labels: (N,) int64 class numbers.
        ids: N ids.
    """

    features: Mapping[str, Tensor]
    labels: Tensor
    ids: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Draw:
    """G batches, side by side, and of each only the rows that this process computes.

    Attributes:
        features: for each medium (rows, G, F).
        labels: (B, G), of all rows.
        places: (B, G) int64, where in the pair set each came from; of all rows.
    """

    features: Mapping[str, Tensor]
    labels: Tensor
    places: Tensor


@dataclass
class PairStream:
    """Endless batches: pass after pass over some pairs, each pass in a new order, none left out.

    When fewer pairs are left of a pass than a batch takes, the batch goes on with the next pass; so every batch has the
    same size, however few pairs there are. What is drawn depends on the seed, the name and the number of the draw
    alone: a stream that starts at draw n is the one that made n draws.

    Attributes:
        pairs: what is drawn from.
        places: which of the pairs.
        batch: B.
        seed: of the run.
        name: of the stream.
        device: where the batches go.
        fixed: every pass has the order of the first one.
        drawn: batches that were drawn before.
    """

    pairs: PairSet
    places: NDArray[np.int64]
    batch: int
    seed: int
    name: str
    device: torch.device
    fixed: bool = False
    drawn: int = 0

    def draw(self, batches: int = 1) -> Draw:
        """The next G batches."""
        start, count = self.drawn * self.batch, batches * self.batch
        each = len(self.places)
        orders = [self._order(number) for number in range(start // each, (start + count - 1) // each + 1)]
        chosen = torch.cat(orders)[start % each :][:count].view(batches, self.batch).T.contiguous()
        self.drawn += batches
        own = chosen[parallel.own_rows(self.batch)]
        features = {
            medium: rows[own.flatten()].view(*own.shape, -1).to(self.device)
            for medium, rows in self.pairs.features.items()
        }
        return Draw(features, self.pairs.labels[chosen].to(self.device), chosen)

    def _order(self, number: int) -> Tensor:
        generator = torch_generator(self.seed, "order", self.name, 0 if self.fixed else number)
        return torch.from_numpy(self.places)[torch.randperm(len(self.places), generator=generator)]
