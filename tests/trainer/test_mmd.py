"""Acceptance test 5: MMD against naive loops written from the formula."""

import math

import pytest
import torch

from dckt_trainer.config import MmdConfig
from dckt_trainer.mmd import bandwidth, mmd


def naive_kernel(a, b, gamma, kernels, factor):
    distance = sum((x - y) ** 2 for x, y in zip(a, b, strict=True))
    return sum(math.exp(-gamma * factor ** (j - kernels // 2) * distance) for j in range(kernels))


def naive_gamma(rows):
    total = sum(sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) for a in rows for b in rows)
    return (len(rows) ** 2 - len(rows)) / total


def naive_quadratic(source, target, kernels, factor):
    s, t = source.tolist(), target.tolist()
    gamma = naive_gamma(s + t)

    def k(a, b):
        return naive_kernel(a, b, gamma, kernels, factor)

    n, m = len(s), len(t)
    within_s = sum(k(s[i], s[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    within_t = sum(k(t[i], t[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return within_s + within_t - 2 * sum(k(a, b) for a in s for b in t) / (n * m)


def naive_linear(source, target, kernels, factor):
    draws = torch.Generator().manual_seed(11)  # the shuffles that the test's call makes
    s, t = (batch[torch.randperm(len(batch), generator=draws)].tolist() for batch in (source, target))
    gamma = naive_gamma(s + t)

    def k(a, b):
        return naive_kernel(a, b, gamma, kernels, factor)

    values = [
        k(s[i], s[i + 1]) + k(t[i], t[i + 1]) - k(s[i], t[i + 1]) - k(s[i + 1], t[i])
        for i in range(0, min(len(s), len(t)) // 2 * 2, 2)
    ]
    return sum(values) / len(values)


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(3)
    return (
        torch.randn(7, 4, generator=generator, dtype=torch.float64),
        torch.randn(6, 4, generator=generator, dtype=torch.float64) + 0.7,
    )


@pytest.mark.parametrize(("kernels", "factor"), [(1, 2.0), (5, 2.0), (4, 3.0)])
@pytest.mark.parametrize(("estimator", "naive"), [("quadratic", naive_quadratic), ("linear", naive_linear)])
def test_equals_the_naive_loop(batches, estimator, naive, kernels, factor):
    config = MmdConfig(estimator=estimator, kernels=kernels, factor=factor)
    generator = torch.Generator().manual_seed(11)
    assert float(mmd(*batches, config, generator)) == pytest.approx(naive(*batches, kernels, factor), abs=1e-12)


def test_mean_of_quadruple_draws_is_the_quadratic_value(batches):
    exact = float(mmd(*batches, MmdConfig(estimator="quadratic", kernels=1)))
    config, generator = MmdConfig(estimator="quadruple", kernels=1), torch.Generator().manual_seed(0)
    draws = torch.tensor([float(mmd(*batches, config, generator)) for _ in range(4000)])
    assert abs(float(draws.mean()) - exact) < 4 * float(draws.std()) / math.sqrt(len(draws))
    assert float(draws.std()) > 0.01  # it does draw


@pytest.mark.parametrize("estimator", ["quadratic", "linear", "quadruple"])
def test_is_zero_in_expectation_for_equal_distributions(estimator):
    generator = torch.Generator().manual_seed(1)
    config = MmdConfig(estimator=estimator)

    def normal(rows):
        return torch.randn(rows, 8, generator=generator)

    values = torch.tensor([float(mmd(normal(16), normal(16), config, generator)) for _ in range(600)])
    assert abs(float(values.mean())) < 4 * float(values.std()) / math.sqrt(len(values))
    shifted = mmd(normal(64), normal(64) + 3, config, generator)
    assert float(shifted) > 10 * abs(float(values.mean()))


@pytest.mark.parametrize("estimator", ["quadratic", "linear", "quadruple"])
def test_gradient_reaches_both_domains_and_gamma_is_a_constant(batches, estimator):
    source, target = (batch.clone().requires_grad_() for batch in batches)
    config = MmdConfig(estimator=estimator, kernels=1)
    mmd(source, target, config, torch.Generator().manual_seed(5)).backward()
    assert source.grad.abs().sum() > 0
    assert target.grad.abs().sum() > 0
    # With gamma held, a finite difference agrees; were gamma differentiated, it would not.
    union = torch.cat([source, target]).detach()
    gamma = 1 / ((torch.cdist(union, union) ** 2).sum() / (13 * 12))
    assert bandwidth(torch.cdist(union, union) ** 2, "mean") == pytest.approx(float(gamma))
    if estimator == "quadratic":

        def held(s, t):
            return (
                ((torch.exp(-gamma * torch.cdist(s, s) ** 2).sum() - 7) / 42)
                + ((torch.exp(-gamma * torch.cdist(t, t) ** 2).sum() - 6) / 30)
                - 2 * torch.exp(-gamma * torch.cdist(s, t) ** 2).mean()
            )

        step = torch.zeros_like(source.detach())
        step[2, 1] = 1e-6
        with torch.no_grad():
            slope = (held(source + step, target) - held(source - step, target)) / 2e-6
        assert float(source.grad[2, 1]) == pytest.approx(float(slope), abs=1e-6)


def test_median_bandwidth_is_the_median_of_distinct_rows():
    rows = torch.tensor([[0.0], [1.0], [3.0]])
    distances = (rows - rows.T) ** 2  # 1, 4, 9 twice each
    assert float(bandwidth(distances, "median")) == pytest.approx(1 / 4)
    assert float(bandwidth(distances, "mean")) == pytest.approx(3 / 14)


def test_rows_that_are_all_equal_give_zero_and_a_finite_gradient():
    source, target = torch.ones(4, 3, requires_grad=True), torch.ones(4, 3)
    value = mmd(source, target, MmdConfig())
    value.backward()
    assert value.item() == 0
    assert torch.isfinite(source.grad).all()


def test_half_precision_is_computed_in_float32(batches):
    low = mmd(*(batch.bfloat16() for batch in batches), MmdConfig())
    assert low.dtype == torch.float32
    assert float(low) == pytest.approx(float(mmd(*batches, MmdConfig())), abs=0.02)


@pytest.mark.parametrize(("source", "target"), [((1, 3), (4, 3)), ((4, 3), (1, 3)), ((4, 3), (4, 2)), ((4,), (4,))])
def test_refuses_what_has_no_mmd(source, target):
    with pytest.raises(ValueError, match="MMD"):
        mmd(torch.zeros(source), torch.zeros(target), MmdConfig())
