"""Maximum mean discrepancy between two batches of activations.

Shape letters: n source rows, m target rows, D width. The squared MMD of distributions S and T under a kernel k is
``E k(s, s') + E k(t, t') - 2 E k(s, t)`` (eq. 1 of the paper). The kernel is a sum of K Gaussians,
``k(a, b) = sum_j exp(-gamma_j |a - b|^2)`` with ``gamma_j = gamma * factor^(j - K // 2)``.

Every estimate here is unbiased for the two batches, so it can be below zero when they hardly differ. Gamma follows the
batches and is a constant in the backward pass. All is computed in float32 or wider, whatever the input.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dckt_trainer.config import MmdConfig


def mmd(source: Tensor, target: Tensor, config: MmdConfig, generator: torch.Generator | None = None) -> Tensor:
    """Squared MMD of two batches, a scalar through which both domains get a gradient.

    Args:
        source: (n, D) float, n >= 2.
        target: (m, D) float, m >= 2.
        config: estimator, kernels and bandwidth.
        generator: where ``quadruple`` and ``linear`` draw from; ``quadratic`` draws nothing.

    Raises:
        ValueError: a batch has fewer than two rows, or the widths differ.
    """
    if source.ndim != 2 or target.ndim != 2 or source.shape[1] != target.shape[1]:
        raise ValueError(f"MMD takes (n, D) and (m, D); got {tuple(source.shape)} and {tuple(target.shape)}")
    if min(len(source), len(target)) < 2:
        raise ValueError(f"MMD needs two rows of each domain; got {len(source)} and {len(target)}")
    if source.dtype in (torch.float16, torch.bfloat16):
        source, target = source.float(), target.float()
    distances = _squared_distances(torch.cat([source, target]))
    kernel = _kernel(distances, bandwidth(distances, config.bandwidth), config)
    n, m = len(source), len(target)
    if config.estimator == "quadratic":
        return _quadratic(kernel, n, m)
    first_s, second_s, first_t, second_t = (
        _neighbours(n, m, generator) if config.estimator == "linear" else _quadruples(n, m, generator)
    )
    return (
        kernel[first_s, second_s]
        + kernel[n + first_t, n + second_t]
        - kernel[first_s, n + second_t]
        - kernel[second_s, n + first_t]
    ).mean()


def bandwidth(distances: Tensor, rule: str) -> Tensor:
    """Gamma of the middle kernel: one over the mean or median squared distance of distinct rows.

    Args:
        distances: (N, N) squared distances of all rows, the diagonal zero.
        rule: ``mean`` or ``median``.
    """
    with torch.no_grad():
        count = len(distances)
        if rule == "mean":
            typical = distances.sum() / (count * count - count)
        else:
            off_diagonal = ~torch.eye(count, dtype=torch.bool, device=distances.device)
            typical = distances[off_diagonal].median()
        # Rows that are all equal have no scale; any gamma then gives kernel values of one.
        return 1 / typical.clamp_min(torch.finfo(distances.dtype).tiny ** 0.5)


def _squared_distances(rows: Tensor) -> Tensor:
    """(N, N) squared distances by one matrix product; an (N, N, D) tensor would cost 11 times the whole step."""
    norms = (rows * rows).sum(1)
    distances = norms[:, None] + norms[None, :] - 2 * rows @ rows.T
    # The diagonal is zero but for rounding, and must be it: the kernel there is one.
    off_diagonal = 1 - torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
    return distances.clamp_min(0) * off_diagonal


def _kernel(distances: Tensor, gamma: Tensor, config: MmdConfig) -> Tensor:
    middle = config.kernels // 2
    terms = [torch.exp(-gamma * config.factor ** (place - middle) * distances) for place in range(config.kernels)]
    return torch.stack(terms).sum(0)


def _quadratic(kernel: Tensor, n: int, m: int) -> Tensor:
    within_s, within_t, across = kernel[:n, :n], kernel[n:, n:], kernel[:n, n:]
    return (
        (within_s.sum() - within_s.diagonal().sum()) / (n * (n - 1))
        + (within_t.sum() - within_t.diagonal().sum()) / (m * (m - 1))
        - 2 * across.mean()
    )


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
