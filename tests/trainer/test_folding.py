"""Folded passes are the mathematics of passes one after the other: gradients, statistics, steps; in every precision."""

import copy

import numpy as np
import pytest
import torch

from dckt.errors import TrainingError
from dckt_trainer.config import ComputeConfig, LossConfig, MmdConfig, OptimizerConfig
from dckt_trainer.layers import BatchNorm, Linear
from dckt_trainer.losses import joint_terms
from dckt_trainer.network import DomainNetwork
from dckt_trainer.optimize import Domain, inv_rate, optimize, sgd
from dckt_trainer.pairs import PairSet, PairStream
from plain import PlainNetwork, by_subtraction, plain_joint_loss

CPU = torch.device("cpu")
INPUTS = {"image": 9, "text": 7}
BATCH, ACCUMULATE = 8, 5


def pair_set(seed, classes, rows=60, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    features = {m: torch.randn(rows, size, generator=generator, dtype=dtype) for m, size in INPUTS.items()}
    return PairSet(features, torch.arange(rows) % classes, tuple(map(str, range(rows))))


def setting(dtype=torch.float64, width=12):
    networks, streams, pairs = {}, {}, {}
    for place, (name, classes) in enumerate((("source", 6), ("target", 3))):
        torch.manual_seed(place)
        networks[name] = DomainNetwork(INPUTS, width, classes).to(dtype)
        pairs[name] = pair_set(place, classes, dtype=dtype)
        streams[name] = PairStream(pairs[name], np.arange(60), BATCH, 0, name, CPU)
    return networks, streams, pairs


def run(networks, streams, *, passes, compute=None, optimizer=None, rate=0.05, accumulate=ACCUMULATE):
    domains = {name: Domain(network, streams[name]) for name, network in networks.items()}
    optimizer = optimizer or sgd(list(networks.values()), OptimizerConfig())
    terms = joint_terms(tuple(INPUTS), LossConfig(), MmdConfig())
    log = optimize(
        domains,
        terms,
        optimizer,
        passes=passes,
        accumulate=accumulate,
        rate=lambda step: rate,
        compute=compute,
        stage="test",
    )
    return log, optimizer


def plain_twin(networks):
    twins = {}
    for name, network in networks.items():
        twin = PlainNetwork(INPUTS, network.width, network.classes).to(next(network.parameters()).dtype)
        twin.load_state_dict(network.state_dict())
        twins[name] = twin
    return twins


def plain_draws(streams, count):
    """The same batches, one at a time."""
    return [
        {name: (stream_draw.features, stream_draw.labels[:, 0]) for name, stream_draw in draws.items()}
        for draws in ({name: stream.draw() for name, stream in streams.items()} for _ in range(count))
    ]


def without_groups(batches):
    return {
        name: ({m: rows[:, 0] for m, rows in features.items()}, labels) for name, (features, labels) in batches.items()
    }


def test_gradients_and_statistics_equal_the_plain_loop():
    networks, streams, _ = setting()
    twins, (_, twin_streams, _) = plain_twin(networks), setting()
    for twin in twins.values():
        twin.train()
    for batches in plain_draws(twin_streams, ACCUMULATE):
        (plain_joint_loss(twins, without_groups(batches), by_subtraction) / ACCUMULATE).backward()
    run(networks, streams, passes=ACCUMULATE, rate=1e-30)  # one step that moves nothing, and leaves the gradients
    for name, network in networks.items():
        ours, theirs = dict(network.named_parameters()), dict(twins[name].named_parameters())
        assert ours.keys() == theirs.keys()
        for key, parameter in ours.items():
            torch.testing.assert_close(parameter.grad, theirs[key].grad, atol=1e-9, rtol=1e-5, msg=f"{name}.{key}")
        buffers = dict(twins[name].named_buffers())
        for key, value in network.named_buffers():
            torch.testing.assert_close(value, buffers[key], atol=1e-12, rtol=1e-9, msg=f"{name}.{key}")


def test_training_equals_the_plain_loop_with_sgd():
    networks, streams, _ = setting()
    twins, (_, twin_streams, _) = plain_twin(networks), setting()
    groups = [
        {"params": [p for t in twins.values() for p in t.parameters() if p.ndim > 1], "weight_decay": 5e-4, "lr": 0.05},
        {"params": [p for t in twins.values() for p in t.parameters() if p.ndim == 1], "weight_decay": 0.0, "lr": 0.1},
    ]
    plain = torch.optim.SGD(groups, momentum=0.9)
    for _ in range(4):
        plain.zero_grad()
        for batches in plain_draws(twin_streams, ACCUMULATE):
            (plain_joint_loss(twins, without_groups(batches), by_subtraction) / ACCUMULATE).backward()
        plain.step()
    run(networks, streams, passes=4 * ACCUMULATE)
    for name, network in networks.items():
        for key, value in twins[name].state_dict().items():
            torch.testing.assert_close(network.state_dict()[key], value, atol=1e-9, rtol=1e-6, msg=f"{name}.{key}")


@pytest.mark.parametrize("fold", [1, 2, 3])
def test_any_fold_gives_the_same(fold):
    whole, folded = setting(), setting()
    first, _ = run(whole[0], whole[1], passes=12)
    second, _ = run(folded[0], folded[1], passes=12, compute=ComputeConfig(fold=fold))
    assert second.terms == pytest.approx(first.terms, abs=1e-10)
    for name, network in whole[0].items():
        for key, value in network.state_dict().items():
            torch.testing.assert_close(folded[0][name].state_dict()[key], value, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize(("precision", "tolerance"), [("bfloat16", 0.1), ("float16", 0.025)])
def test_low_precision_is_near_and_keeps_weights_in_float32(precision, tolerance):
    exact, low = setting(torch.float32, width=64), setting(torch.float32, width=64)
    reference, _ = run(exact[0], exact[1], passes=ACCUMULATE, rate=1e-30)
    log, _ = run(low[0], low[1], passes=ACCUMULATE, rate=1e-30, compute=ComputeConfig(precision=precision))
    assert log.total == pytest.approx(reference.total, rel=tolerance)
    assert log.total != reference.total  # it is in effect
    for name, network in exact[0].items():
        for key, parameter in network.named_parameters():
            other = dict(low[0][name].named_parameters())[key]
            assert other.dtype == other.grad.dtype == torch.float32
            if parameter.ndim > 1:
                error = (other.grad - parameter.grad).norm() / parameter.grad.norm()
                assert error < 4 * tolerance, (name, key)


def test_low_precision_trains_as_well():
    losses = {}
    for precision in ("float32", "bfloat16", "float16"):
        networks, streams, _ = setting(torch.float32, width=32)
        optimizer = sgd(list(networks.values()), OptimizerConfig())
        for _ in range(6):
            log, _ = run(networks, streams, passes=10, compute=ComputeConfig(precision=precision), optimizer=optimizer)
        losses[precision] = log.total
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.15)
    assert losses["float16"] == pytest.approx(losses["float32"], rel=0.05)


def test_steps_that_overflow_in_float16_are_left_out_and_the_scale_falls(monkeypatch):
    monkeypatch.setattr("dckt_trainer.optimize.FIRST_SCALE", 2.0**20)
    networks, streams, _ = setting(torch.float32, width=16)
    optimizer = sgd(list(networks.values()), OptimizerConfig())
    compute = ComputeConfig(precision="float16")
    log, _ = run(networks, streams, passes=40, accumulate=2, compute=compute, optimizer=optimizer)
    assert 0 < log.skipped < log.steps
    assert all(torch.isfinite(p).all() for network in networks.values() for p in network.parameters())
    later, _ = run(networks, streams, passes=40, accumulate=2, compute=compute, optimizer=optimizer)
    assert later.skipped < log.skipped  # the optimiser carries the scale on
    assert later.total < log.total


def test_float16_that_never_takes_a_step_is_an_error(monkeypatch):
    monkeypatch.setattr("dckt_trainer.optimize.FIRST_SCALE", 2.0**60)
    networks, streams, _ = setting(torch.float32, width=16)
    with pytest.raises(TrainingError, match="every step overflowed in float16"):
        run(networks, streams, passes=6, accumulate=2, compute=ComputeConfig(precision="float16"))


def test_a_weights_gradient_is_written_in_place_and_added_up():
    layer = Linear(4, 3).double()
    rows = torch.randn(5, 2, 4, dtype=torch.float64, requires_grad=True)
    layer.weight.grad = torch.ones_like(layer.weight)
    kept = layer.weight.grad
    layer(rows).square().sum().backward()
    twin = copy.deepcopy(layer)
    twin.weight.grad = None
    ours = layer.weight.grad.clone()
    product = torch.nn.functional.linear(rows, twin.weight, twin.bias)
    (expected,) = torch.autograd.grad(product.square().sum(), twin.weight)
    torch.testing.assert_close(ours, expected + 1)
    assert layer.weight.grad is kept
    assert torch.autograd.gradcheck(lambda x: layer(x), (rows,))


def test_normalisation_keeps_batches_apart_and_follows_each():
    norm, plain = BatchNorm(6, affine=True), torch.nn.BatchNorm1d(6)
    with torch.no_grad():
        for module in (norm, plain):
            module.weight.copy_(torch.linspace(0.5, 1.5, 6))
            module.bias.copy_(torch.linspace(-1, 1, 6))
    rows = torch.randn(10, 4, 6) * torch.arange(1, 5)[:, None]
    folded = norm(rows)
    for group in range(4):
        torch.testing.assert_close(folded[:, group], plain(rows[:, group]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(norm.running_mean, plain.running_mean)
    torch.testing.assert_close(norm.running_var, plain.running_var)
    assert norm.num_batches_tracked == plain.num_batches_tracked == 4
    torch.testing.assert_close(norm.eval()(rows[:, 0]), plain.eval()(rows[:, 0]))


def test_caffes_moving_average_weighs_only_what_was_seen():
    norm = BatchNorm(3, average="caffe")
    rows = torch.randn(5, 7, 3)
    norm(rows)
    ages = torch.arange(6, -1, -1, dtype=torch.float32)
    weights = 0.9**ages / (0.9**ages).sum()  # Caffe's sum of fractions, divided by its scale factor
    torch.testing.assert_close(norm.running_mean, (weights[:, None] * rows.mean(0)).sum(0))
    torch.testing.assert_close(norm.running_var, (weights[:, None] * rows.var(0)).sum(0))


@pytest.mark.parametrize("form", ["torch", "caffe"])
def test_the_form_of_the_momentum(form):
    """Against both rules written out, with a rate that changes."""
    config = OptimizerConfig(form=form, weight_decay=0.0, inv_gamma=0.5)
    networks, streams, _ = setting()
    before = {name: copy.deepcopy(network.state_dict()) for name, network in networks.items()}
    optimizer = sgd(list(networks.values()), config)
    gradients, velocity = [], 0.0
    domains = {name: Domain(network, streams[name]) for name, network in networks.items()}
    terms = joint_terms(tuple(INPUTS), LossConfig(), MmdConfig())
    for step in range(3):
        optimize(
            domains,
            terms,
            optimizer,
            passes=2,
            accumulate=2,
            rate=lambda number: inv_rate(config, number),
            first_step=step,
            stage="test",
        )
        gradients.append(networks["target"].fc8.linear.weight.grad.clone())
    weight = before["target"]["fc8.linear.weight"].clone()
    for step, gradient in enumerate(gradients):
        rate = inv_rate(config, step)
        if form == "caffe":
            velocity = 0.9 * velocity + rate * gradient
            weight -= velocity
        else:
            velocity = 0.9 * velocity + gradient
            weight -= rate * velocity
    torch.testing.assert_close(networks["target"].fc8.linear.weight.detach(), weight, atol=1e-12, rtol=1e-9)


@pytest.mark.slow
def test_compiled_networks_give_the_same():
    plain, compiled = setting(torch.float32), setting(torch.float32)
    first, _ = run(plain[0], plain[1], passes=10)
    second, _ = run(compiled[0], compiled[1], passes=10, compute=ComputeConfig(compile=True))
    assert second.terms == pytest.approx(first.terms, rel=1e-4, abs=1e-5)
    for name, network in plain[0].items():
        for key, value in network.state_dict().items():
            torch.testing.assert_close(compiled[0][name].state_dict()[key], value, atol=1e-4, rtol=1e-3, msg=key)
