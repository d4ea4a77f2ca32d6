"""Maximum mean discrepancy between batches of activations.

Shape letters: n source rows, m target rows, G batches, D width. The squared MMD of distributions S and T under a
kernel k is ``E k(s, s') + E k(t, t') - 2 E k(s, t)`` (eq. 1 of the paper). The kernel is a sum of K Gaussians,
``k(a, b) = sum_j exp(-gamma_j |a - b|^2)`` with ``gamma_j = gamma * factor^(j - K // 2)``.

Every estimate here is unbiased for the batches, so it can be below zero when they hardly differ. Gamma follows each
batch and is a constant in the backward pass. All is computed in float32 or wider, whatever the input.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dckt_trainer.config import MmdConfig


def mmd(source: Tensor, target: Tensor, config: MmdConfig, generator: torch.Generator | None = None) -> Tensor:
    """Mean squared MMD of G pairs of batches, a scalar through which both domains get a gradient.

    Args:
        source: (n, G, D) float, n >= 2; or (n, D), one batch.
        target: (m, G, D) float, m >= 2; or (m, D).
        config: estimator, kernels and bandwidth.
        generator: where ``quadruple`` and ``linear`` draw from; ``quadratic`` draws nothing.

    Raises:
        ValueError: a batch has fewer than two rows, or the shapes do not fit.
    """
    if source.ndim == target.ndim == 2:
        source, target = source[:, None], target[:, None]
    if source.ndim != 3 or target.ndim != 3 or source.shape[1:] != target.shape[1:]:
        raise ValueError(f"MMD takes (n, G, D) and (m, G, D); got {tuple(source.shape)} and {tuple(target.shape)}")
    if min(len(source), len(target)) < 2:
        raise ValueError(f"MMD needs two rows of each domain; got {len(source)} and {len(target)}")
    n, m, groups = len(source), len(target), source.shape[1]
    rows = torch.cat([source, target]).transpose(0, 1)  # (G, n + m, D)
    if rows.dtype in (torch.float16, torch.bfloat16):
        rows = rows.float()
    distances: Tensor = _SquaredDistances.apply(rows)
    gamma = _gamma(distances, config)
    if config.estimator == "quadratic":
        return _quadratic(_kernel(distances, gamma, config), n, m).mean()
    draw = _neighbours if config.estimator == "linear" else _quadruples
    drawn = [draw(n, m, generator) for _ in range(groups)]
    first_s, second_s, first_t, second_t = (torch.stack(places).to(rows.device) for places in zip(*drawn, strict=True))
    group = torch.arange(groups, device=rows.device)[:, None]

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return _kernel(distances[group, a, b], gamma[..., 0], config)

    return (
        kernel(first_s, second_s)
        + kernel(n + first_t, n + second_t)
        - kernel(first_s, n + second_t)
        - kernel(second_s, n + first_t)
    ).mean()


def bandwidth(distances: Tensor, rule: str) -> Tensor:
    """Gamma of the middle kernel: one over the mean or median squared distance of distinct rows.

    Args:
        distances: (..., N, N) squared distances of all rows, the diagonal zero.
        rule: ``mean`` or ``median``.

    Returns:
        (..., 1, 1).
    """
    with torch.no_grad():
        count = distances.shape[-1]
        if rule == "mean":
            typical = distances.sum((-2, -1)) / (count * count - count)
        else:
            off_diagonal = ~torch.eye(count, dtype=torch.bool, device=distances.device)
            typical = distances[..., off_diagonal].median(-1).values
        # Rows that are all equal have no scale; any gamma then gives kernel values of one.
        return (1 / typical.clamp_min(torch.finfo(distances.dtype).tiny ** 0.5))[..., None, None]


def _gamma(distances: Tensor, config: MmdConfig) -> Tensor:
    if config.bandwidth == "fixed":
        return distances.new_full((len(distances), 1, 1), config.gamma)
    return bandwidth(distances, config.bandwidth)


class _SquaredDistances(torch.autograd.Function):
    """(G, N, D) rows to (G, N, N) squared distances, by matrix products.

    A tensor (G, N, N, D) of differences would make a training step many times as long. Written out because the
    gradient needs one product, where automatic differentiation makes two: with W = dL + dL^T it is
    ``2 * (rowsum(W) * x - W x)``.
    """

    @staticmethod
    def forward(context: Any, rows: Tensor) -> Tensor:
        rows = rows.contiguous()
        context.save_for_backward(rows)
        products = torch.bmm(rows, rows.mT)
        norms = products.diagonal(dim1=-2, dim2=-1).clone()  # so the distance of a row to itself is exactly zero
        return products.mul_(-2).add_(norms[:, :, None]).add_(norms[:, None, :]).clamp_min_(0)

    @staticmethod
    def backward(context: Any, *gradients: Any) -> Any:
        (rows,) = context.saved_tensors
        both = gradients[0] + gradients[0].mT
        both.diagonal(dim1=-2, dim2=-1).zero_()
        return torch.baddbmm(rows * both.sum(-1, keepdim=True), both, rows, alpha=-1).mul_(2)


def _kernel(distances: Tensor, gamma: Tensor, config: MmdConfig) -> Tensor:
    middle = config.kernels // 2
    return sum(
        (torch.exp(-gamma * config.factor ** (place - middle) * distances) for place in range(config.kernels)),
        start=distances.new_zeros(()),
    )


def _quadratic(kernel: Tensor, n: int, m: int) -> Tensor:
    """(G, n + m, n + m) to (G,)."""
    within_s, within_t, across = kernel[:, :n, :n], kernel[:, n:, n:], kernel[:, :n, n:]

    def off_diagonal_mean(block: Tensor, count: int) -> Tensor:
        everything = block.sum((-2, -1)) - block.diagonal(dim1=-2, dim2=-1).sum(-1)
        return everything / (count * (count - 1))

    return off_diagonal_mean(within_s, n) + off_diagonal_mean(within_t, m) - 2 * across.mean((-2, -1))


def _neighbours(n: int, m: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Neighbours in a shuffled batch, as in DAN's linear-time estimate; an odd last row has no partner.

    Shuffled, because at fc8 and fc9 the media are stacked, and neighbours as they stand would be of one medium.
    """
    used = min(n, m) // 2 * 2
    source, target = (torch.randperm(size, generator=generator)[:used].view(-1, 2) for size in (n, m))
    return source[:, 0], source[:, 1], target[:, 0], target[:, 1]


def _quadruples(n: int, m: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """max(n, m) uniform draws of two distinct source rows and two distinct target rows."""
    draws = max(n, m)

    def distinct(size: int) -> tuple[Tensor, Tensor]:
        first = torch.randint(size, (draws,), generator=generator)
        shift = torch.randint(1, size, (draws,), generator=generator)
        return first, (first + shift) % size

    return *distinct(n), *distinct(m)
