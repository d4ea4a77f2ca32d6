"""Acceptance test 7: sign and scale of the reversed gradient, and what it does to two clusters."""

import pytest
import torch
from torch.nn import functional

from adversarial import reversal_schedule, reverse_gradient


def test_sign_and_scale():
    values = torch.tensor([1.0, -2.0], requires_grad=True)
    out = reverse_gradient(values, 0.3)
    assert torch.equal(out, values)
    (out * torch.tensor([5.0, 7.0])).sum().backward()
    assert values.grad.tolist() == pytest.approx([-1.5, -2.1])


def test_schedule():
    assert reversal_schedule(0) == 0
    assert reversal_schedule(1) == pytest.approx(0.99990920)
    assert reversal_schedule(0.1) == pytest.approx(0.46211716)


@pytest.mark.parametrize(("scale", "mixed"), [(1.0, True), (-1.0, False)])
def test_two_clusters_become_indistinguishable(scale, mixed):
    torch.manual_seed(0)
    points = torch.cat([torch.randn(100, 2) * 0.3, torch.randn(100, 2) * 0.3 + torch.tensor([2.0, 0.0])])
    domain = torch.cat([torch.zeros(100), torch.ones(100)])
    shift = torch.zeros(2, requires_grad=True)  # the encoder: moves the second cluster
    judge = torch.nn.Linear(2, 1)
    # A judge whose weights decay keeps the game from circling.
    judges = {"params": judge.parameters(), "weight_decay": 0.1}
    optimizer = torch.optim.SGD([{"params": [shift]}, judges], lr=0.05)
    for _ in range(800):
        features = points + domain[:, None] * shift
        loss = functional.binary_cross_entropy_with_logits(judge(reverse_gradient(features, scale))[:, 0], domain)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    moved = (points + domain[:, None] * shift).detach()
    gap = (moved[:100].mean(0) - moved[100:].mean(0)).norm()
    assert (gap < 0.5) == mixed
