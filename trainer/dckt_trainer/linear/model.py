"""The model: affine maps of both media into one space, and prototypes of the classes in it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional


class LinearModel(nn.Module):
    """Both media to the common space; see the package for the formulas.

    Args:
        inputs: F of each medium.
        width: D.
        classes: C.

    Attributes:
        outputs: names of what :meth:`represent` gives.
        retrieves_by: the one by which items are compared.
    """

    outputs = ("probability", "joined")
    retrieves_by = "joined"

    def __init__(self, inputs: Mapping[str, int], width: int, classes: int) -> None:
        super().__init__()
        self.inputs, self.width, self.classes = dict(inputs), width, classes
        self.spaces = nn.ModuleDict({medium: nn.Linear(size, width) for medium, size in inputs.items()})
        self.regressions = nn.ModuleDict({medium: nn.Linear(size, classes) for medium, size in inputs.items()})
        self.prototypes = nn.Parameter(torch.zeros(classes, width))
        self.temperature = nn.Parameter(torch.ones(()))
        self.share = nn.Parameter(torch.zeros(()))  # w, of the probabilities beside the space
        self.regression_share = nn.Parameter(torch.zeros(()))  # v
        self.requires_grad_(False)

    @property
    def dimensions(self) -> dict[str, int]:
        """The width of each output."""
        return {"probability": self.classes, "joined": 2 * self.classes + self.width}

    def represent(self, medium: str, features: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, F) to class probabilities (B, C) and what items are compared by (B, 2 C + D), of length 1."""
        place = functional.normalize(self.spaces[medium](features))
        near = functional.softmax(place @ self.prototypes.T / self.temperature, dim=1)
        regressed = functional.softmax(self.regressions[medium](features), dim=1)
        w, v = self.share, self.regression_share
        parts = [
            functional.normalize(near) * ((1 - v) * w).sqrt(),
            place * ((1 - v) * (1 - w)).sqrt(),
            functional.normalize(regressed) * v.sqrt(),
        ]
        return (1 - v) * near + v * regressed, torch.cat(parts, 1)
