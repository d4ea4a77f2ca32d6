"""Acceptance tests 8 and 9: stacked normalisation, and domains that share nothing."""

import torch

from dckt_trainer.config import OptimizerConfig
from dckt_trainer.network import DomainNetwork, copy_of
from dckt_trainer.optimize import sgd


def network(classes=4, seed=0):
    torch.manual_seed(seed)
    return DomainNetwork({"image": 6, "text": 5}, 8, classes)


def features(rows=10, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return {"image": torch.randn(rows, 1, 6, generator=generator), "text": torch.randn(rows, 1, 5, generator=generator)}


def test_shapes_and_names():
    out = network()(features())
    assert {k: tuple(v.shape) for k, v in out.fc6.items()} == {"image": (10, 1, 8), "text": (10, 1, 8)}
    assert out.fc8.shape == out.fc9.shape == (20, 1, 8)
    assert {k: tuple(v.shape) for k, v in out.logits.items()} == {"image": (10, 1, 4), "text": (10, 1, 4)}
    assert (out.fc9 >= 0).all()


def test_fc8_is_normalised_over_the_media_together():
    net = network()
    given = features()
    out = net(given)
    stacked = torch.cat([net.pathways[medium](given[medium])[1] for medium in ("image", "text")])
    before = net.fc8.linear(stacked)
    centred = (before - before.mean(0)) / (before.var(0, unbiased=False) + 1e-5).sqrt()
    assert torch.allclose(out.fc8, torch.relu(centred), atol=1e-5)
    apart = net.fc8(net.pathways["image"](given["image"])[1])
    assert not torch.allclose(out.fc8[:10], apart, atol=1e-3)


def test_a_lone_image_in_evaluation_equals_its_row_in_a_mixed_batch():
    net, given = network(), features()
    for _ in range(3):
        net(given)
    net.eval()
    with torch.no_grad():
        mixed = net(given)
        probability, fc9 = net.represent("image", given["image"][3])
    assert torch.allclose(fc9[0], mixed.fc9[3, 0], atol=1e-6)
    assert torch.allclose(probability[0], torch.softmax(mixed.logits["image"][3, 0], 0), atol=1e-6)
    with torch.no_grad():
        text_fc9 = net.represent("text", given["text"][3])[1]
    assert torch.allclose(text_fc9[0], mixed.fc9[13, 0], atol=1e-6)


def test_source_and_target_share_no_storage_even_when_one_starts_from_the_other():
    source = network()
    target = copy_of(source, 3)
    first = {tensor.data_ptr() for tensor in source.state_dict().values()}
    second = {tensor.data_ptr() for tensor in target.state_dict().values()}
    assert not first & second
    assert torch.equal(source.fc8.linear.weight, target.fc8.linear.weight)
    assert torch.equal(source.pathways["text"].norm.running_mean, target.pathways["text"].norm.running_mean)
    assert target.fc10.weight.shape == (3, 8)


def test_text_features_are_normalised_with_affine_and_image_features_are_not():
    net = network()
    assert net.pathways["text"].norm.weight.shape == (5,)
    assert isinstance(net.pathways["image"].norm, torch.nn.Identity)
    assert net.fc8.norm.weight is None


def test_layers_start_as_he_initialisation_has_it():
    torch.manual_seed(0)
    net = DomainNetwork({"image": 400, "text": 5}, 300, 4)
    weight = net.pathways["image"].fc6.linear.weight
    assert abs(float(weight.detach().var()) / (2 / 400) - 1) < 0.02
    assert not net.pathways["image"].fc6.linear.bias.any()


def test_biases_learn_faster_and_do_not_decay():
    optimizer = sgd([network()], OptimizerConfig(lr=0.1, weight_decay=0.3, bias_lr_factor=2.0))
    weights, biases = optimizer.param_groups
    assert (weights["weight_decay"], biases["weight_decay"]) == (0.3, 0.0)
    assert (weights["factor"], biases["factor"]) == (1.0, 2.0)
    assert all(p.ndim > 1 for p in weights["params"])
    assert all(p.ndim == 1 for p in biases["params"])
    assert weights["params"]
    assert biases["params"]
