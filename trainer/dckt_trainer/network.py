"""The network of one domain (Figure 2 of the paper).

Shape letters: B pairs, D width, C classes, M media. Source and target have networks of one shape and share no
parameter.

    image features -> fc6 -> fc7 --+                     each of fc6 to fc9 is followed by
                                   +--> fc8 -> fc9 -> fc10     batch normalisation (no affine)
    text vector    -> fc6 -> fc7 --+                     and ReLU

fc8 to fc10 are shared by the media. While training, the rows of all media are stacked on the batch axis before fc8, so
its statistics, and the MMD there, are those of the mixture; a lone medium is later normalised with the same statistics.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

MEDIA = ("image", "text")


@dataclass(frozen=True)
class Activations:
    """What a forward pass leaves for the losses.

    Attributes:
        fc6: for each medium (B, D), after normalisation and ReLU.
        fc7: likewise.
        fc8: (M * B, D), media stacked in the network's order.
        fc9: likewise.
        logits: for each medium (B, C), before the softmax.
    """

    fc6: Mapping[str, Tensor]
    fc7: Mapping[str, Tensor]
    fc8: Tensor
    fc9: Tensor
    logits: Mapping[str, Tensor]


class Layer(nn.Module):
    """A fully connected layer, batch normalisation without affine, ReLU: (B, inputs) -> (B, outputs)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = linear(inputs, outputs)
        self.norm = nn.BatchNorm1d(outputs, affine=False)

    def forward(self, rows: Tensor) -> Tensor:
        """Applies the layer."""
        return functional.relu(self.norm(self.linear(rows)))


class Pathway(nn.Module):
    """fc6 and fc7 of one medium.

    Args:
        inputs: width of the medium's features.
        width: D.
        normalise: whether the features are batch-normalised, with affine, before fc6 (the text vectors are).
    """

    def __init__(self, inputs: int, width: int, *, normalise: bool) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(inputs) if normalise else nn.Identity()
        self.fc6 = Layer(inputs, width)
        self.fc7 = Layer(width, width)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, inputs) to the activations of fc6 and fc7, each (B, D)."""
        fc6 = self.fc6(self.norm(features))
        return fc6, self.fc7(fc6)


class DomainNetwork(nn.Module):
    """Pathways by medium, and the shared layers behind them.

    Args:
        inputs: width of each medium's features; the order of the mapping is the order in which rows are stacked.
        width: D.
        classes: C.
    """

    def __init__(self, inputs: Mapping[str, int], width: int, classes: int) -> None:
        super().__init__()
        self.inputs, self.width, self.classes = dict(inputs), width, classes
        self.pathways = nn.ModuleDict(
            {medium: Pathway(size, width, normalise=medium == "text") for medium, size in inputs.items()}
        )
        self.fc8 = Layer(width, width)
        self.fc9 = Layer(width, width)
        self.fc10 = linear(width, classes)

    def forward(self, features: Mapping[str, Tensor]) -> Activations:
        """Pairs to activations: the media of ``features``, each (B, inputs), are stacked before fc8."""
        media = [medium for medium in self.inputs if medium in features]
        paths = {medium: self.pathways[medium](features[medium]) for medium in media}
        fc8 = self.fc8(torch.cat([paths[medium][1] for medium in media]))
        fc9 = self.fc9(fc8)
        rows = [len(features[medium]) for medium in media]
        logits = dict(zip(media, self.fc10(fc9).split(rows), strict=True))
        return Activations(
            {medium: path[0] for medium, path in paths.items()},
            {medium: path[1] for medium, path in paths.items()},
            fc8,
            fc9,
            logits,
        )

    def represent(self, medium: str, features: Tensor) -> tuple[Tensor, Tensor]:
        """One medium's common representations: class probabilities (B, C) and fc9 (B, D)."""
        fc9 = self.fc9(self.fc8(self.pathways[medium](features)[1]))
        return functional.softmax(self.fc10(fc9), dim=1), fc9


def linear(inputs: int, outputs: int) -> nn.Linear:
    """A fully connected layer with He's initialisation (fan in) and zero bias."""
    layer = nn.Linear(inputs, outputs)
    nn.init.kaiming_normal_(layer.weight, mode="fan_in", nonlinearity="relu")
    nn.init.zeros_(layer.bias)
    return layer


def copy_of(network: DomainNetwork, classes: int) -> DomainNetwork:
    """A network for another label space that starts from this one's weights, all but fc10."""
    twin = DomainNetwork(network.inputs, network.width, classes)
    state = {name: value for name, value in network.state_dict().items() if not name.startswith("fc10.")}
    twin.load_state_dict(state, strict=False)
    return twin
