"""A domain's encoders, whole: from pixels and from token ids to the common representation. What is exported.

Shape letters: B batch, S side, L tokens, V width of a vector, C classes, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dckt_trainer.network import DomainNetwork
from dckt_trainer.trunk import Trunk
from dckt_trainer.word_cnn import WordCNN

OUTPUTS = ("probability", "fc9")


class ImageEncoder(nn.Module):
    """Pixels (B, S, S, 3) uint8 to class probabilities (B, C) and fc9 (B, D), float32."""

    def __init__(self, trunk: Trunk, network: DomainNetwork) -> None:
        super().__init__()
        self.trunk, self.network = trunk, network
        self.eval()

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """The common representations of pictures."""
        return self.network.represent("image", self.trunk(pixels))


class TextEncoder(nn.Module):
    """Token ids (B, L) int64, padded with 0, to class probabilities (B, C) and fc9 (B, D), float32."""

    def __init__(self, cnn: WordCNN, network: DomainNetwork) -> None:
        super().__init__()
        self.cnn, self.network = cnn, network
        self.eval()

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The common representations of texts."""
        return self.network.represent("text", self.cnn(tokens))


class VectorEncoder(nn.Module):
    """Vectors (B, V) float32 of any other medium to class probabilities (B, C) and fc9 (B, D), float32."""

    def __init__(self, medium: str, network: DomainNetwork) -> None:
        super().__init__()
        self.medium, self.network = medium, network
        self.eval()

    def forward(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """The common representations of vectors."""
        return self.network.represent(self.medium, vectors)


def encode(encoder: nn.Module, batch: Tensor) -> dict[str, Tensor]:
    """Runs an encoder without gradients; the outputs by name, on the CPU."""
    with torch.inference_mode():
        return dict(zip(OUTPUTS, (out.float().cpu() for out in encoder(batch)), strict=True))
