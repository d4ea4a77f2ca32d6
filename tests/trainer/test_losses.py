"""Acceptance tests 6 and 16.2: each loss equals a loop written from its formula; a weight of zero leaves a term out."""

import dataclasses
import math

import pytest
import torch

from dckt_trainer.config import LossConfig, MmdConfig
from dckt_trainer.losses import Batch, contrastive_loss, joint_terms, pair_loss, pretraining_terms, semantic_loss
from dckt_trainer.network import DomainNetwork

MEDIA = ("image", "text")


def batch(seed, classes=3, rows=6):
    torch.manual_seed(seed)
    network = DomainNetwork({"image": 5, "text": 4}, 8, classes)
    features = {"image": torch.randn(rows, 2, 5), "text": torch.randn(rows, 2, 4)}
    return Batch(network(features), (torch.arange(2 * rows) % classes).view(rows, 2))


def test_pair_loss_literal():
    image, text = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    assert float(pair_loss(image, text)) == pytest.approx((1 + 4 + 9 + 16) / (2 * 2))


def test_pair_loss_gradient_is_the_difference_over_the_batch():
    image, text = torch.randn(5, 3, requires_grad=True), torch.randn(5, 3)
    (0.1 * pair_loss(image, text)).backward()
    assert torch.allclose(image.grad, 0.1 / 5 * (image - text).detach())


def test_semantic_loss_equals_a_loop():
    logits, labels = torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 2, 1, 1])
    expected = -sum(
        math.log(math.exp(row[label]) / sum(map(math.exp, row)))
        for row, label in zip(logits.tolist(), labels.tolist(), strict=True)
    )
    assert float(semantic_loss(logits, labels)) == pytest.approx(expected / 4)


def test_joint_terms_are_the_papers():
    terms = {term.name: term.weight for term in joint_terms(MEDIA, LossConfig(), MmdConfig())}
    assert terms == {
        "semantic/source.image": 0.2,
        "semantic/source.text": 0.2,
        "semantic/target.image": 1.0,
        "semantic/target.text": 1.0,
        "pair/source.fc6.image-text": 1e-4,
        "pair/source.fc7.image-text": 1e-4,
        "pair/target.fc6.image-text": 1e-4,
        "pair/target.fc7.image-text": 1e-4,
        "mmd/image.fc6": 1.0,
        "mmd/image.fc7": 1.0,
        "mmd/text.fc6": 1.0,
        "mmd/text.fc7": 1.0,
        "mmd/common.fc8": 1.0,
        "mmd/common.fc9": 2.0,
    }


def test_terms_read_the_layer_that_they_name():
    from dckt_trainer.mmd import mmd

    batches = {"source": batch(0), "target": batch(1, classes=2)}
    s, t = batches["source"].activations, batches["target"].activations
    values = {term.name: term.value(batches) for term in joint_terms(MEDIA, LossConfig(), MmdConfig())}
    assert values["mmd/image.fc6"] == mmd(s.fc6["image"], t.fc6["image"], MmdConfig())
    assert values["mmd/text.fc7"] == mmd(s.fc7["text"], t.fc7["text"], MmdConfig())
    assert values["mmd/common.fc9"] == mmd(s.fc9, t.fc9, MmdConfig())
    assert values["pair/target.fc7.image-text"] == pair_loss(t.fc7["image"], t.fc7["text"])
    assert values["semantic/source.text"] == semantic_loss(s.logits["text"], batches["source"].labels)
    assert len({value.item() for value in values.values()}) == len(values)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(LossConfig)])
def test_each_weight_takes_effect_and_zero_leaves_the_term_out(field):
    names = {term.name for term in joint_terms(MEDIA, LossConfig(), MmdConfig())}
    without = {term.name for term in joint_terms(MEDIA, LossConfig(**{field: 0.0}), MmdConfig())}
    assert without < names
    changed = {t.name: t.weight for t in joint_terms(MEDIA, LossConfig(**{field: 0.7}), MmdConfig())}
    assert {changed[name] for name in names - without} == {0.7}


def test_pretraining_has_no_mmd_and_full_semantic_weight():
    terms = {term.name: term.weight for term in pretraining_terms("source", MEDIA, LossConfig())}
    assert terms == {
        "semantic/source.image": 1.0,
        "semantic/source.text": 1.0,
        "pair/source.fc6.image-text": 1e-4,
        "pair/source.fc7.image-text": 1e-4,
    }
    weights = LossConfig(pair_source=0.2, pair_target=0.3)
    for domain, weight in (("source", 0.2), ("target", 0.3)):
        found = {term.name: term.weight for term in pretraining_terms(domain, MEDIA, weights)}
        assert found[f"pair/{domain}.fc7.image-text"] == weight


def test_strangers_are_pushed_to_the_margin_and_no_farther():
    first = torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 2.0]], dtype=torch.float64, requires_grad=True)
    second = torch.tensor([[0.3, 0.4], [3.0, 4.0], [2.0, 4.0]], dtype=torch.float64)
    same = torch.tensor([0.0, 0.0, 1.0])
    loss = contrastive_loss(first, second, same, margin=1.5)
    assert loss.item() == pytest.approx(((1.5 - 0.5) ** 2 + 0 + 5.0) / (2 * 3))
    loss.backward()
    assert first.grad[1].tolist() == [0.0, 0.0]  # beyond the margin
    # away from the stranger: (d - margin) / d * (a - b) / B
    assert first.grad[0].tolist() == pytest.approx([0.6 / 3, 0.8 / 3])
    assert first.grad[2].tolist() == pytest.approx([-1 / 3, -2 / 3])  # (a - b) / B
    pairs = torch.randn(4, 3), torch.randn(4, 3)
    assert torch.allclose(contrastive_loss(*pairs, torch.ones(4)), pair_loss(*pairs))
    equal = torch.ones(2, 3, requires_grad=True)
    contrastive_loss(equal, torch.ones(2, 3), torch.zeros(2)).backward()
    assert torch.isfinite(equal.grad).all()
