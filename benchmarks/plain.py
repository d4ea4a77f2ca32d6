"""The training step as one writes it first: PyTorch's own layers, one batch after the other.

What dckt's folded step must equal (tests/trainer/test_folding.py) and what it is timed against (training.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

MEDIA = ("image", "text")

Distance = Callable[[Tensor], Tensor]
Layers = dict[str, Tensor]


class PlainNetwork(nn.Module):
    """The network of one domain from PyTorch's own layers, with the names of ours, so that states can be exchanged."""

    def __init__(self, inputs: Mapping[str, int], width: int, classes: int) -> None:
        super().__init__()

        def layer(size: int) -> nn.ModuleDict:
            return nn.ModuleDict({"linear": nn.Linear(size, width), "norm": nn.BatchNorm1d(width, affine=False)})

        self.pathways = nn.ModuleDict()
        for medium, size in inputs.items():
            norm = nn.BatchNorm1d(size) if medium == "text" else nn.Identity()
            self.pathways[medium] = nn.ModuleDict({"norm": norm, "fc6": layer(size), "fc7": layer(width)})
        self.fc8, self.fc9, self.fc10 = layer(width), layer(width), nn.Linear(width, classes)

    def forward(self, features: Mapping[str, Tensor]) -> tuple[Layers, Layers, Tensor, Tensor, tuple[Tensor, ...]]:
        """Activations fc6, fc7 by medium, fc8, fc9 stacked, logits by medium."""

        def through(layer: nn.Module, rows: Tensor) -> Tensor:
            assert isinstance(layer, nn.ModuleDict)
            return functional.relu(layer["norm"](layer["linear"](rows)))

        fc6, fc7 = {}, {}
        for medium in MEDIA:
            path = self.pathways[medium]
            assert isinstance(path, nn.ModuleDict)
            fc6[medium] = through(path["fc6"], path["norm"](features[medium]))
            fc7[medium] = through(path["fc7"], fc6[medium])
        fc8 = through(self.fc8, torch.cat([fc7[medium] for medium in MEDIA]))
        fc9 = through(self.fc9, fc8)
        return fc6, fc7, fc8, fc9, self.fc10(fc9).chunk(2)


def by_subtraction(rows: Tensor) -> Tensor:
    """(N, D) to (N, N) squared distances through an (N, N, D) tensor, as widely copied MMD code has it."""
    return (rows[:, None] - rows[None]).square().sum(-1)


def by_product(rows: Tensor) -> Tensor:
    """The same through one matrix product."""
    norms = rows.square().sum(1)
    return (norms[:, None] + norms[None] - 2 * rows @ rows.T).clamp_min(0)


def plain_mmd(source: Tensor, target: Tensor, distance: Distance, kernels: int = 5, factor: float = 2.0) -> Tensor:
    """The unbiased quadratic estimate."""
    rows = torch.cat([source, target])
    distances = distance(rows)
    n, m = len(source), len(target)
    gamma = ((n + m) ** 2 - (n + m)) / distances.detach().sum()
    kernel = torch.zeros_like(distances)
    for j in range(kernels):
        kernel = kernel + torch.exp(-gamma * factor ** (j - kernels // 2) * distances)
    s, t, st = kernel[:n, :n], kernel[n:, n:], kernel[:n, n:]
    return (s.sum() - s.trace()) / (n * (n - 1)) + (t.sum() - t.trace()) / (m * (m - 1)) - 2 * st.mean()


def plain_joint_loss(
    networks: Mapping[str, nn.Module],
    batches: Mapping[str, tuple[Mapping[str, Tensor], Tensor]],
    distance: Distance = by_product,
) -> Tensor:
    """The total loss of the joint stage for one batch of each domain, with the released weights."""
    outs = {name: networks[name](features) for name, (features, _) in batches.items()}
    total = torch.zeros(())
    for name, weight in (("source", 0.2), ("target", 1.0)):
        fc6, fc7, _, _, logits = outs[name]
        labels = batches[name][1]
        for rows in logits:
            total = total + weight * functional.cross_entropy(rows, labels)
        for layer in (fc6, fc7):
            total = total + 1e-4 * (layer["image"] - layer["text"]).square().sum() / (2 * len(labels))
    (s6, s7, s8, s9, _), (t6, t7, t8, t9, _) = outs["source"], outs["target"]
    for medium in MEDIA:
        total = total + plain_mmd(s6[medium], t6[medium], distance) + plain_mmd(s7[medium], t7[medium], distance)
    return total + plain_mmd(s8, t8, distance) + 2.0 * plain_mmd(s9, t9, distance)
