"""The training loop: acceptance tests 10 and 12, schedules, and the guard against numbers that are not finite."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from dckt.errors import TrainingError
from dckt_trainer.config import LossConfig, MmdConfig, OptimizerConfig
from dckt_trainer.losses import Term, joint_terms, pretraining_terms
from dckt_trainer.network import DomainNetwork
from dckt_trainer.optimize import Domain, inv_rate, optimize, sgd
from dckt_trainer.pairs import PairSet, PairStream

CPU = torch.device("cpu")
MEDIA = ("image", "text")


def pair_set(rows=24, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    features = {m: torch.randn(rows, size, generator=generator) for m, size in (("image", 6), ("text", 5))}
    return PairSet(features, torch.arange(rows) % classes, tuple(map(str, range(rows))))


def stream(pairs, batch, seed=0):
    return PairStream(pairs, np.arange(len(pairs)), batch, seed, "test", CPU)


def network(seed=0, *, norm=True):
    torch.manual_seed(seed)
    net = DomainNetwork({"image": 6, "text": 5}, 8, 3)
    if not norm:
        for module in net.modules():
            if hasattr(module, "norm"):
                module.norm = nn.Identity()
    return net


def run(net, pairs, *, batch, accumulate, passes, seed=0):
    terms = pretraining_terms("target", MEDIA, LossConfig())
    domains = {"target": Domain(net, stream(pairs, batch, seed))}
    return optimize(
        domains,
        terms,
        sgd([net], OptimizerConfig()),
        passes=passes,
        accumulate=accumulate,
        rate=lambda s: 0.05,
        stage="test",
    )


def weights(net):
    return torch.cat([value.flatten().float() for value in net.state_dict().values()])


def test_accumulating_small_batches_equals_one_large_without_normalisation():
    small, large = network(norm=False).double(), network(norm=False).double()
    pairs = pair_set()
    pairs = PairSet({m: rows.double() for m, rows in pairs.features.items()}, pairs.labels, pairs.ids)
    run(small, pairs, batch=6, accumulate=4, passes=12)
    run(large, pairs, batch=24, accumulate=1, passes=3)
    torch.testing.assert_close(weights(small), weights(large), atol=1e-9, rtol=0)


def test_a_last_group_of_fewer_passes_makes_a_mean_step():
    net = network()
    log = run(net, pair_set(), batch=6, accumulate=4, passes=6)
    assert log.steps == 2
    # One pass of a batch in a group of four is one plain step, not a quarter of it.
    short, plain = network(), network()
    run(short, pair_set(), batch=6, accumulate=4, passes=1)
    run(plain, pair_set(), batch=6, accumulate=1, passes=1)
    assert torch.equal(weights(short), weights(plain))


def test_loss_falls_and_the_log_adds_up():
    net, pairs = network(), pair_set()
    first = run(net, pairs, batch=12, accumulate=1, passes=4)
    for _ in range(10):
        last = run(net, pairs, batch=12, accumulate=1, passes=4)
    assert last.total < 0.6 * first.total
    assert last.total == pytest.approx(sum(last.weighted.values()))
    assert last.weighted["pair/target.fc6.image-text"] == pytest.approx(1e-4 * last.terms["pair/target.fc6.image-text"])


def joint(source_seed, losses, target=None):
    torch.manual_seed(9)
    target = network(1)
    domains = {
        "source": Domain(network(0), stream(pair_set(40, seed=source_seed), 8)),
        "target": Domain(target, stream(pair_set(seed=5), 8)),
    }
    terms = joint_terms(MEDIA, losses, MmdConfig())
    optimizer = sgd([domain.network for domain in domains.values()], OptimizerConfig())
    optimize(domains, terms, optimizer, passes=5, accumulate=1, rate=lambda step: 0.01, stage="test")
    return weights(target)


def test_without_mmd_the_target_does_not_feel_the_source():
    off = LossConfig(mmd_fc6=0, mmd_fc7=0, mmd_fc8=0, mmd_fc9=0)
    assert torch.equal(joint(1, off), joint(2, off))  # bit by bit
    assert not torch.equal(joint(1, LossConfig()), joint(2, LossConfig()))
    alone = network(1)
    terms = pretraining_terms("target", MEDIA, LossConfig())
    domains = {"target": Domain(alone, stream(pair_set(seed=5), 8))}
    optimize(
        domains, terms, sgd([alone], OptimizerConfig()), passes=5, accumulate=1, rate=lambda step: 0.01, stage="test"
    )
    torch.testing.assert_close(weights(alone), joint(1, off), atol=1e-6, rtol=1e-5)


def test_inv_schedule_literal():
    config = OptimizerConfig()
    assert inv_rate(config, 0) == 0.01
    assert inv_rate(config, 500) == pytest.approx(0.00964, abs=5e-6)


def test_rates_are_applied_with_the_biases_factor():
    net = network()
    optimizer = sgd([net], OptimizerConfig(bias_lr_factor=3.0))
    domains = {"target": Domain(net, stream(pair_set(), 8))}
    optimize(
        domains,
        pretraining_terms("target", MEDIA, LossConfig()),
        optimizer,
        passes=2,
        accumulate=1,
        rate=lambda step: 0.1 / (1 + step),
        first_step=4,
        stage="test",
    )
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.1 / 6, 0.3 / 6])


def test_a_term_that_is_not_finite_is_named():
    net = network()
    domains = {"target": Domain(net, stream(pair_set(), 8))}
    good = pretraining_terms("target", MEDIA, LossConfig())
    bad = Term("pair/broken", 1.0, lambda batches: batches["target"].activations.fc8.sum() / 0)
    with pytest.raises(TrainingError, match=r"round 3, step 7: pair/broken is not finite.*optimizer\.lr"):
        optimize(
            domains,
            [*good, bad],
            sgd([net], OptimizerConfig()),
            passes=2,
            accumulate=1,
            rate=lambda step: 0.1,
            first_step=7,
            stage="round 3",
        )


def test_weights_that_are_not_finite_after_the_last_step_are_noticed():
    net = network()
    domains = {"target": Domain(net, stream(pair_set(), 8))}
    terms = pretraining_terms("target", MEDIA, LossConfig())
    with pytest.raises(TrainingError, match="weights of the target are not finite, first pathways"):
        optimize(
            domains,
            terms,
            sgd([net], OptimizerConfig()),
            passes=1,
            accumulate=1,
            rate=lambda step: math.inf,
            stage="test",
        )


def test_streams_leave_no_pair_out_and_fill_every_batch():
    pairs = pair_set(rows=10)
    drawn = stream(pairs, 4)
    seen = torch.cat([drawn.draw().features["image"][:, 0] for _ in range(5)])  # two passes of ten
    counts = [(seen == row).all(1).sum().item() for row in pairs.features["image"]]
    assert counts == [2] * 10
    tiny = PairStream(pairs, np.array([3, 7]), 6, 0, "tiny", CPU).draw()
    assert len(tiny.labels) == len(tiny.features["text"]) == 6
    assert sorted(set(tiny.places.flatten().tolist())) == [3, 7]


def test_batches_drawn_at_once_are_those_drawn_one_by_one_and_a_stream_can_start_anywhere():
    pairs = pair_set(rows=10)
    one_by_one, at_once, later = stream(pairs, 4), stream(pairs, 4), stream(pairs, 4)
    later.drawn = 3
    singles = [one_by_one.draw() for _ in range(7)]
    together = at_once.draw(7)
    rest = later.draw(4)
    for name in ("labels", "places"):
        every = torch.cat([getattr(draw, name) for draw in singles], 1)
        assert torch.equal(getattr(together, name), every)
        assert torch.equal(getattr(rest, name), every[:, 3:])
    image = torch.cat([draw.features["image"] for draw in singles], 1)
    assert torch.equal(together.features["image"], image)
    assert torch.equal(image[2, 5], pairs.features["image"][together.places[2, 5]])


def test_a_fixed_order_repeats_and_a_shuffled_one_does_not():
    pairs = pair_set(rows=12)
    for fixed in (True, False):
        places = PairStream(pairs, np.arange(12), 12, 0, "test", CPU, fixed=fixed).draw(3).places
        assert torch.equal(places[:, 0], places[:, 1]) == fixed
        assert places[:, 0].tolist() != list(range(12))  # corpora are sorted by class more often than not
        assert sorted(places[:, 2].tolist()) == list(range(12))


def test_what_is_not_finite_is_traced_to_its_layer_and_pairs():
    pairs = pair_set()
    pairs.features["text"][[4, 9]] = torch.nan
    domains = {"target": Domain(network(), stream(pairs, 12))}
    terms = pretraining_terms("target", MEDIA, LossConfig())
    with pytest.raises(
        TrainingError, match=r"step 0: semantic/target.image, .*first in text features of the target"
    ) as caught:
        optimize(
            domains,
            terms,
            sgd([network()], OptimizerConfig()),
            passes=2,
            accumulate=2,
            rate=lambda s: 0.1,
            stage="test",
        )
    assert set(str(caught.value).partition("pairs ")[2].partition(";")[0].split(", ")) == {"4", "9"}


def test_a_layer_that_overflows_is_named():
    net = network()
    with torch.no_grad():
        net.fc9.linear.weight.fill_(torch.inf)
    domains = {"target": Domain(net, stream(pair_set(), 6))}
    terms = pretraining_terms("target", MEDIA, LossConfig())
    with pytest.raises(TrainingError, match=r"first in common.fc9 of the target, pairs .* and 1 more"):
        optimize(
            domains, terms, sgd([net], OptimizerConfig()), passes=1, accumulate=1, rate=lambda s: 0.1, stage="test"
        )


def test_progress_is_told_of_passes_and_of_the_loss():
    told = []
    net = network()
    log = optimize(
        {"target": Domain(net, stream(pair_set(), 6))},
        pretraining_terms("target", MEDIA, LossConfig()),
        sgd([net], OptimizerConfig()),
        passes=5,
        accumulate=2,
        rate=lambda step: 0.1,
        stage="test",
        advance=lambda count, figures=None: told.append((count, figures)),
    )
    assert [count for count, _ in told] == [2, 2, 1]
    assert sum(count * figures["loss"] for count, figures in told) / 5 == pytest.approx(log.total)
    assert all(figures["loss"] == pytest.approx(figures["semantic"] + figures["pair"]) for _, figures in told)
