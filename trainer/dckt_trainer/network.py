"""The network of one domain (Figure 2 of the paper).

Shape letters: B pairs a batch, G batches folded into one pass, D width, C classes, M media. Source and target have
networks of one shape and share no parameter.

    image features -> fc6 -> fc7 --+                     each of fc6 to fc9 is followed by
                                   +--> fc8 -> fc9 -> fc10     batch normalisation (no affine)
    text vector    -> fc6 -> fc7 --+                     and ReLU

Any other medium has such a pathway, too. fc8 to fc10 are shared by the media. While training, the rows of all media are
stacked on the batch axis before fc8, so its statistics, and the MMD there, are those of the mixture; a lone medium is
later normalised with the same statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from dckt_trainer.layers import BatchNorm, Layer, Linear, MovingAverage


@dataclass(frozen=True)
class Activations:
    """What a forward pass leaves for the losses.

    Attributes:
        fc6: for each medium (B, G, D), after normalisation and ReLU.
        fc7: likewise.
        fc8: (M * B, G, D), media stacked in the network's order.
        fc9: likewise.
        logits: for each medium (B, G, C), before the softmax.
    """

    fc6: Mapping[str, Tensor]
    fc7: Mapping[str, Tensor]
    fc8: Tensor
    fc9: Tensor
    logits: Mapping[str, Tensor]

    def named(self) -> Iterator[tuple[str, Tensor]]:
        """Every activation with its name, in the order in which they are computed."""
        for layer, values in (("fc6", self.fc6), ("fc7", self.fc7)):
            yield from ((f"{medium}.{layer}", value) for medium, value in values.items())
        yield from (("common.fc8", self.fc8), ("common.fc9", self.fc9))
        yield from ((f"{medium}.fc10", value) for medium, value in self.logits.items())

    def map(self, change: Callable[[Tensor], Tensor]) -> Activations:
        """The same with every activation changed; media are taken apart for it and stacked again."""
        media = list(self.fc6)

        def stacked(rows: Tensor) -> Tensor:
            return torch.cat([change(part) for part in rows.chunk(len(media))])

        def each(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {medium: change(value) for medium, value in values.items()}

        return Activations(each(self.fc6), each(self.fc7), stacked(self.fc8), stacked(self.fc9), each(self.logits))


class Pathway(nn.Module):
    """fc6 and fc7 of one medium.

    Args:
        inputs: width of the medium's features.
        width: D.
        normalise: whether the features are batch-normalised, with affine, before fc6.
        average: see :class:`BatchNorm`.
    """

    def __init__(self, inputs: int, width: int, *, normalise: bool, average: MovingAverage = "torch") -> None:
        super().__init__()
        self.norm = BatchNorm(inputs, affine=True, average=average) if normalise else nn.Identity()
        self.fc6 = Layer(inputs, width, average)
        self.fc7 = Layer(width, width, average)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, G, inputs) to the activations of fc6 and fc7, each (B, G, D)."""
        fc6 = self.fc6(self.norm(features))
        return fc6, self.fc7(fc6)


class DomainNetwork(nn.Module):
    """Pathways by medium, and the shared layers behind them.

    Args:
        inputs: width of each medium's features; the order of the mapping is the order in which rows are stacked.
        width: D.
        classes: C.
        average: see :class:`BatchNorm`.

    Attributes:
        outputs: names of what :meth:`represent` gives.
        retrieves_by: the one by which items are compared.
        fronts: by medium, a network that makes the features out of what the pairs hold, and learns with this one: the
            Word CNN from token ids (..., L), where it is trained end to end. Empty where features are made once.
    """

    outputs = ("probability", "fc9")
    retrieves_by = "probability"

    def __init__(self, inputs: Mapping[str, int], width: int, classes: int, average: MovingAverage = "torch") -> None:
        super().__init__()
        self.inputs, self.width, self.classes, self.average = dict(inputs), width, classes, average
        self.pathways = nn.ModuleDict(
            {
                # A trunk's features have one scale. Of others nobody knows, so each number gets the same.
                medium: Pathway(size, width, normalise=medium != "image", average=average)
                for medium, size in inputs.items()
            }
        )
        self.fc8 = Layer(width, width, average)
        self.fc9 = Layer(width, width, average)
        self.fc10 = Linear(width, classes)
        self.fronts = nn.ModuleDict()

    def forward(self, features: Mapping[str, Tensor]) -> Activations:
        """Pairs to activations: the media of ``features``, each (B, G, inputs), are stacked before fc8."""
        media = [medium for medium in self.inputs if medium in features]
        paths = {medium: self.pathways[medium](self._front(medium, features[medium])) for medium in media}
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

    @property
    def dimensions(self) -> dict[str, int]:
        """The width of each output."""
        return {"probability": self.classes, "fc9": self.width}

    def represent(self, medium: str, features: Tensor) -> tuple[Tensor, Tensor]:
        """One medium's common representations: class probabilities (B, C) and fc9 (B, D)."""
        fc9 = self.fc9(self.fc8(self.pathways[medium](self._front(medium, features))[1]))
        return functional.softmax(self.fc10(fc9), dim=1), fc9

    def _front(self, medium: str, rows: Tensor) -> Tensor:
        if medium not in self.fronts:
            return rows
        made: Tensor = self.fronts[medium](rows.flatten(0, -2))
        return made.view(*rows.shape[:-1], -1)

    def freeze_fronts(self, frozen: bool) -> None:
        """Whether the fronts stay as they are for now: an optimiser passes over a parameter that has no gradient."""
        for module in self.fronts.modules():
            if isinstance(module, nn.Embedding):  # word vectors never learn
                continue
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(not frozen)
                parameter.grad = None if frozen else torch.zeros_like(parameter)

    def forget_gradients(self) -> None:
        """Begins a step. Those of weights are large; they are overwritten and not set to zero first."""
        for module in self.modules():
            for parameter in module.parameters(recurse=False):
                if isinstance(module, Linear) and parameter is module.weight:
                    module.stale = True
                elif parameter.grad is not None:
                    parameter.grad.zero_()

    def settle_gradients(self) -> None:
        """Ends the backward passes of a step: a weight that none of them reached has a gradient of zero."""
        for module in self.modules():
            if isinstance(module, Linear) and module.stale and module.weight.grad is not None:
                module.weight.grad.zero_()
                module.stale = False

    def forget_copies(self) -> None:
        """Frees what training in low precision keeps beside the weights."""
        for module in self.modules():
            if isinstance(module, Linear):
                module.forget_copy()

    def use_precision(self, low: torch.dtype | None) -> None:
        """Sets the type of the matrix products while training; None is that of the weights."""
        for module in self.modules():
            if isinstance(module, Linear):
                module.low = low


def copy_of(network: DomainNetwork, classes: int) -> DomainNetwork:
    """A network for another label space that starts from this one's weights, all but fc10."""
    twin = DomainNetwork(network.inputs, network.width, classes, network.average)
    state = {name: value for name, value in network.state_dict().items() if not name.startswith("fc10.")}
    twin.load_state_dict(state, strict=False)
    return twin
