"""The layers of a domain's network, made for steps of many small batches.

Shape letters: B rows of a batch, G batches of a step, D width. A step averages the gradients of G forward passes, each
with its own statistics. Here those passes are folded: their rows stand side by side, (B, G, D), a weight is read once
for all of them, and normalisation keeps the batches apart. The mathematics are those of G passes one after the other.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from dckt_trainer import parallel

MovingAverage = Literal["torch", "caffe"]
PIECE = 32  # rows of a matrix that stay in the processor's cache
SHARE = 0.1  # of new statistics in the moving average; the same in PyTorch and in Caffe


class Linear(nn.Linear):
    """A fully connected layer with He's initialisation (fan in) and zero bias.

    The gradient of the weight is written where it stays, ``weight.grad``: at the paper's size a fresh one would be
    411 MB, and fetching that memory costs as much as the matrix product. In ``low`` precision the product reads a copy
    of the weight in that type, made anew in every pass.

    Attributes:
        low: type of the matrix products while training; None is the weight's own.
        stale: what stands in ``weight.grad`` is of an earlier step, and the next gradient takes its place.
    """

    low: torch.dtype | None = None
    stale: bool = False

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        nn.init.kaiming_normal_(self.weight, mode="fan_in", nonlinearity="relu")
        nn.init.zeros_(self.bias)
        self._copy: Tensor | None = None

    def forward(self, rows: Tensor) -> Tensor:
        """(..., inputs) to (..., outputs)."""
        if not (self.training and torch.is_grad_enabled()):
            return functional.linear(rows, self.weight, self.bias)
        weight = self.weight.detach()
        if self.low is not None and self.low != weight.dtype:
            if self._copy is None or self._copy.dtype != self.low or self._copy.device != weight.device:
                self._copy = torch.empty_like(weight, dtype=self.low)
            weight = self._copy.copy_(weight)
        product: Tensor = _Product.apply(rows, self.weight, weight, self)
        return product + self.bias

    def forget_copy(self) -> None:
        """Frees the copy of the weight, and the memory that all layers share."""
        self._copy = None
        _scratch.clear()

    def take_gradient(self, gradient: Tensor, rows: Tensor) -> None:
        """Adds ``gradient.T @ rows``, of (N, outputs) and (N, inputs), to the weight's gradient, or puts it there."""
        if self.weight.grad is None:
            self.weight.grad, self.stale = torch.empty_like(self.weight), True
        whole = self.weight.grad
        if gradient.dtype == whole.dtype:
            torch.addmm(whole, gradient.T, rows, beta=0 if self.stale else 1, out=whole)
        else:
            low = torch.mm(_turned(gradient), rows, out=_space(whole, gradient.dtype))
            # In pieces, because what is added is widened first, and that of a whole weight would be fresh memory.
            for piece, part in zip(torch.split(whole, PIECE), torch.split(low, PIECE), strict=True):
                piece.copy_(part) if self.stale else piece.add_(part)
        self.stale = False


class _Product(torch.autograd.Function):
    """``rows @ weight.T``; the layer takes the gradient of its weight itself."""

    @staticmethod
    def forward(context: Any, rows: Tensor, parameter: Tensor, weight: Tensor, layer: Linear) -> Tensor:
        low = rows.to(weight.dtype)
        context.save_for_backward(low, weight)
        context.layer = layer
        return (low @ weight.T).to(parameter.dtype)

    @staticmethod
    def backward(context: Any, *gradients: Any) -> Any:
        rows, weight = context.saved_tensors
        gradient = gradients[0].to(weight.dtype)
        if context.needs_input_grad[1]:
            context.layer.take_gradient(gradient.flatten(0, -2), rows.flatten(0, -2))
        into_rows = (gradient @ weight).to(gradients[0].dtype) if context.needs_input_grad[0] else None
        return into_rows, None, None, None


def _turned(matrix: Tensor) -> Tensor:
    """A transpose in memory of its own, which makes a CPU's product in low precision about twice as fast.

    Stripe by stripe: so few rows stay in the cache while they are turned.
    """
    if matrix.device.type != "cpu":
        return matrix.T
    turned = torch.empty(matrix.shape[::-1], dtype=matrix.dtype)
    for start in range(0, len(matrix), PIECE):
        turned[:, start : start + PIECE].copy_(matrix[start : start + PIECE].T)
    return turned


_scratch: dict[tuple[torch.dtype, torch.device], Tensor] = {}


def _space(like: Tensor, kind: torch.dtype) -> Tensor:
    """Memory in the shape of a weight, the same for all layers: each needs it for a moment only."""
    key = kind, like.device
    if key not in _scratch or _scratch[key].numel() < like.numel():
        _scratch[key] = torch.empty(like.numel(), dtype=kind, device=like.device)
    return _scratch[key][: like.numel()].view(like.shape)


class BatchNorm(nn.Module):
    """Batch normalisation over the rows of each of G batches; evaluation uses a moving average, as usual.

    Args:
        width: D.
        affine: whether a scale and a shift are learnt.
        average: ``torch`` starts the moving average at mean 0 and variance 1; ``caffe`` weighs only what was seen.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    eps = 1e-5

    def __init__(self, width: int, *, affine: bool = False, average: MovingAverage = "torch") -> None:
        super().__init__()
        self.average = average
        self.weight = nn.Parameter(torch.ones(width)) if affine else None
        self.bias = nn.Parameter(torch.zeros(width)) if affine else None
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.int64))

    def forward(self, rows: Tensor) -> Tensor:
        """(B, G, D) to the same while training; (..., D) to the same in evaluation."""
        if not self.training:
            if rows.ndim > 2:
                return self.forward(rows.flatten(0, -2)).view_as(rows)
            known = self.running_mean, self.running_var, self.weight, self.bias
            return functional.batch_norm(rows, *known, False, 0.0, self.eps)
        batch, groups, width = rows.shape
        if parallel.size() > 1:
            normed, mean, variance = self._over_processes(rows)
        else:
            # As (B, G * D), every batch has columns of its own, and one native kernel serves them all.
            mean, variance = rows.new_zeros(groups * width), rows.new_ones(groups * width)
            flat = rows.reshape(batch, groups * width)
            normed = functional.batch_norm(flat, mean, variance, training=True, momentum=1.0, eps=self.eps)
            normed, mean, variance = normed.view_as(rows), mean.view(groups, width), variance.view(groups, width)
        self._follow(mean, variance)
        return normed if self.weight is None or self.bias is None else normed * self.weight + self.bias

    def _over_processes(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        count = rows.shape[0] * parallel.size()
        mean = parallel.total(rows.sum(0)) / count
        centred = rows - mean
        variance = parallel.total(centred.square().sum(0)) / count
        normed = centred * torch.rsqrt(variance + self.eps)
        return normed, mean.detach(), variance.detach() * (count / (count - 1))

    def _follow(self, means: Tensor, variances: Tensor) -> None:
        """Moves the averages batch by batch, as G passes would: means and unbiased variances are (G, D)."""
        with torch.no_grad():
            for mean, variance in zip(means, variances, strict=True):
                self.num_batches_tracked += 1
                share = SHARE
                if self.average == "caffe":  # the mean of what was seen, with weights .9^age
                    share = SHARE / (1 - (1 - SHARE) ** int(self.num_batches_tracked))
                self.running_mean.lerp_(mean, share)
                self.running_var.lerp_(variance, share)


class Layer(nn.Module):
    """A fully connected layer, batch normalisation without affine, ReLU: (B, G, inputs) -> (B, G, outputs)."""

    def __init__(self, inputs: int, outputs: int, average: MovingAverage = "torch") -> None:
        super().__init__()
        self.linear = Linear(inputs, outputs)
        self.norm = BatchNorm(outputs, average=average)

    def forward(self, rows: Tensor) -> Tensor:
        """Applies the layer."""
        return functional.relu(self.norm(self.linear(rows)), inplace=True)
