"""Gradient reversal: the building block of adversarial alignment (Ganin and Lempitsky, 2015).

What follows it learns to tell two domains or media apart; what comes before it learns to make that impossible.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


class _Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return -ctx.scale * gradients[0], None


def reverse_gradient(values: Tensor, scale: float) -> Tensor:
    """The same values, of any shape; in the backward pass the gradient is multiplied by ``-scale``."""
    reversed_values: Tensor = _Reversal.apply(values, scale)
    return reversed_values


def reversal_schedule(progress: float) -> float:
    """The scale that grows from 0 to 1 with progress in 0..1: ``2 / (1 + exp(-10 p)) - 1`` (the same authors)."""
    return 2 / (1 + math.exp(-10 * progress)) - 1
