"""A domain's encoders, whole: from pixels and from token ids to the common representation. What is exported.

Each gives class probabilities and, beside them, what else the network's ``outputs`` names.

Shape letters: B batch, S side, L tokens, V width of a vector, C classes, D width of the second output.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor, nn

from dckt_trainer.linear import LinearModel
from dckt_trainer.network import DomainNetwork
from dckt_trainer.trunk import Trunk
from dckt_trainer.word_bag import WordBag
from dckt_trainer.word_cnn import WordCNN

CommonSpace: TypeAlias = DomainNetwork | LinearModel


class Encoder(nn.Module):
    """One medium's encoder.

    Args:
        network: what ends it.

    Attributes:
        outputs: names of the two outputs.
    """

    def __init__(self, network: CommonSpace) -> None:
        super().__init__()
        self.network, self.outputs = network, network.outputs


class ImageEncoder(Encoder):
    """Pixels (B, S, S, 3) uint8 to (B, C) and (B, D) float32."""

    def __init__(self, trunk: Trunk, network: CommonSpace) -> None:
        super().__init__(network)
        self.trunk = trunk
        self.eval()

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """The common representations of pictures."""
        return self.network.represent("image", self.trunk(pixels))


class TextEncoder(Encoder):
    """Token ids (B, L) int64, padded with 0, to (B, C) and (B, D) float32."""

    def __init__(self, reader: WordCNN | WordBag, network: CommonSpace) -> None:
        super().__init__(network)
        self.reader = reader
        self.eval()

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The common representations of texts."""
        return self.network.represent("text", self.reader(tokens))


class VectorEncoder(Encoder):
    """Vectors (B, V) float32 of any other medium to (B, C) and (B, D) float32."""

    def __init__(self, medium: str, network: CommonSpace) -> None:
        super().__init__(network)
        self.medium = medium
        self.eval()

    def forward(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """The common representations of vectors."""
        return self.network.represent(self.medium, vectors)


def encode(encoder: Encoder, batch: Tensor) -> dict[str, Tensor]:
    """Runs an encoder without gradients; the outputs by name, on the CPU."""
    with torch.inference_mode():
        return dict(zip(encoder.outputs, (out.float().cpu() for out in encoder(batch)), strict=True))
