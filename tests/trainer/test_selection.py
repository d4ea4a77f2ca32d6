"""Acceptance tests 3 and 4: the selection law of the paper (eq. 13)."""

import numpy as np
import pytest

from dckt.errors import ConfigError, TrainingError
from dckt_trainer.config import TransferConfig
from dckt_trainer.selection import LAWS, SCORES, Selection, domain_consistency, draw, select

ROUNDS = 10


def chances_of(scores, number, alpha=0.2, law="paper"):
    return LAWS[law](np.asarray(scores, float), number, ROUNDS, alpha)


def places_of(law, scores, number, alpha, generator):
    return draw(chances_of(scores, number, alpha, law), generator)


def vectors(seed, pairs=15, classes=6):
    rng = np.random.default_rng(seed)
    return {medium: rng.dirichlet(np.ones(classes), pairs).astype(np.float32) for medium in ("image", "text")}


def selection(number=1, seed=0, **changes):
    labels = np.arange(15) % 3
    settings = TransferConfig(**changes)
    return select(settings, number, vectors(0), vectors(1), labels, np.random.default_rng(seed))


# Worked by hand from eq. 13 at alpha = .2, for AP^q of 0, .25, .5, .75 and 1 times the largest.
LAW = {
    1: (0.000, 0.039, 0.083, 0.136, 0.200),
    2: (0.083, 0.108, 0.136, 0.166, 0.200),
    5: (0.147, 0.160, 0.172, 0.186, 0.200),
    10: (0.172, 0.179, 0.186, 0.193, 0.200),
}


@pytest.mark.parametrize("number", LAW)
@pytest.mark.parametrize("highest", [0.8, 1.5])
def test_law_equals_the_worked_table_whatever_the_largest(number, highest):
    consistency = np.array([0, 0.25, 0.5, 0.75, 1]) * highest
    assert chances_of(consistency, number, 0.2) == pytest.approx(LAW[number], abs=6e-4)


# The released code's law by hand, for the same fractions of two largest AP.
RELEASED = {
    (1, 0.8): (0.082, 0.106, 0.133, 0.164, 0.200),
    (10, 0.8): (0.185, 0.188, 0.192, 0.196, 0.200),
    (1, 1.5): (0.017, 0.049, 0.088, 0.136, 0.200),
    (10, 1.5): (0.172, 0.179, 0.186, 0.193, 0.200),
}


@pytest.mark.parametrize(("number", "highest"), RELEASED)
def test_the_released_law_equals_its_worked_table(number, highest):
    consistency = np.array([0, 0.25, 0.5, 0.75, 1]) * highest
    chances = chances_of(consistency, number, law="released")
    assert chances == pytest.approx(RELEASED[number, highest], abs=6e-4)


def test_the_released_law_counts_to_twenty_and_stays_above_zero():
    consistency = np.array([0.0, 2.0])
    twenty, later = (chances_of(consistency, number, law="released") for number in (20, 90))
    assert np.array_equal(twenty, later)
    assert chances_of(consistency, 1, law="released")[0] == 0  # a gap of 2 would give less
    wide = np.array([0.2] * 50 + [1.5] * 50)
    kept = {law: len(places_of(law, wide, 1, 0.2, np.random.default_rng(0))) for law in ("paper", "released")}
    assert kept["released"] != kept["paper"]


@pytest.mark.parametrize("number", [1, 3, 50])
def test_law_is_monotone_bounded_and_alpha_at_the_largest(number):
    consistency = np.sort(np.random.default_rng(0).random(50) * 2)
    chances = chances_of(consistency, number, 0.35)
    assert (np.diff(chances) >= 0).all()
    assert chances.min() >= 0
    assert chances[-1] == 0.35


def test_late_rounds_tend_to_alpha():
    chances = chances_of(np.array([0.1, 0.5, 1.0]), 10**6, 0.2)
    assert chances == pytest.approx(0.2, abs=1e-5)


def test_mean_count_over_seeds_is_the_sum_of_probabilities():
    consistency = np.random.default_rng(1).random(200)
    counts = [len(places_of("paper", consistency, 3, 0.2, np.random.default_rng(seed))) for seed in range(1000)]
    chances = chances_of(consistency, 3, 0.2)
    spread = np.sqrt((chances * (1 - chances)).sum() / len(counts))
    assert abs(np.mean(counts) - chances.sum()) < 4 * spread


def test_random_takes_as_many_whichever_they_are():
    consistency = np.concatenate([np.zeros(300), np.ones(300)])
    expected = chances_of(consistency, 1, 0.2).sum()
    drawn = [places_of("random", consistency, 1, 0.2, np.random.default_rng(seed)) for seed in range(400)]
    assert np.mean([len(kept) for kept in drawn]) == pytest.approx(expected, rel=0.03)
    assert np.mean([(kept < 300).mean() for kept in drawn]) == pytest.approx(0.5, abs=0.02)
    scored = [places_of("paper", consistency, 1, 0.2, np.random.default_rng(seed)) for seed in range(20)]
    assert all((kept >= 300).all() for kept in scored)  # at round 1 the least consistent have no chance


def test_all_takes_all():
    assert places_of("all", np.zeros(5), 1, 0.2, np.random.default_rng(0)).tolist() == [0, 1, 2, 3, 4]


def test_never_fewer_than_a_batch_needs():
    kept = places_of("paper", np.array([0.1, 0.9, 0.2, 0.8]), 1, 1e-9, np.random.default_rng(0))
    assert kept.tolist() == [1, 3]


def test_no_consistency_at_all_gives_every_pair_alpha():
    assert chances_of(np.zeros(4), 1, 0.2).tolist() == [0.2] * 4


def test_domain_consistency_equals_a_loop():
    rng = np.random.default_rng(4)
    image, text = (rng.dirichlet(np.ones(6), 15).astype(np.float32) for _ in range(2))
    labels = rng.integers(0, 3, 15)

    def average_precision(query, items, label):
        cosine = [float(query @ item / np.linalg.norm(query) / np.linalg.norm(item)) for item in items]
        hits, total = 0, 0.0
        for rank, place in enumerate(sorted(range(15), key=lambda i: -cosine[i]), 1):
            if labels[place] == label:
                hits += 1
                total += hits / rank
        return total / hits

    expected = [
        average_precision(image[q], text, labels[q]) + average_precision(text[q], image, labels[q]) for q in range(15)
    ]
    assert domain_consistency(image, text, labels) == pytest.approx(expected, abs=1e-6)


def test_reciprocal_rank_equals_a_loop_and_asks_no_labels():
    source = vectors(3)
    unit = {m: rows / np.linalg.norm(rows, axis=1, keepdims=True) for m, rows in source.items()}
    expected = []
    for q in range(15):
        total = 0.0
        for asked, found in (("image", "text"), ("text", "image")):
            similarity = [float(unit[asked][q] @ item) for item in unit[found]]
            total += 1 / (1 + sum(value > similarity[q] for value in similarity))
        expected.append(total)
    found = SCORES["reciprocal_rank"](source, {}, np.zeros(0, int))
    assert found == pytest.approx(expected, abs=1e-6)


def test_partners_that_tie_with_others_have_the_mean_rank():
    equal = {medium: np.ones((4, 3), np.float32) for medium in ("image", "text")}
    assert SCORES["reciprocal_rank"](equal, {}, np.zeros(4)) == pytest.approx([2 / 2.5] * 4)


def test_strata_each_give_their_expected_number_and_chances_hold():
    chances = np.random.default_rng(5).random(60) * 0.5
    strata = np.arange(60) % 4
    counts = np.zeros(60)
    for seed in range(3000):
        kept = draw(chances, np.random.default_rng(seed), strata)
        counts[kept] += 1
        for stratum in range(4):
            number, expected = (strata[kept] == stratum).sum(), chances[strata == stratum].sum()
            assert np.floor(expected - 1e-9) <= number <= np.ceil(expected + 1e-9)
    assert np.abs(counts / 3000 - chances).max() < 5 * np.sqrt(0.25 / 3000)


def test_stratified_draws_spread_over_classes():
    labels = np.arange(15) % 3
    for seed in range(30):
        kept = selection(stratified=True, law="random", alpha=1.0, number=3, seed=seed).places
        expected = chances_of(selection(number=3).scores, 3, 1.0).mean() * 5
        per_class = np.bincount(labels[kept], minlength=3)
        assert (np.abs(per_class - expected) < 1).all()


def by_first_vector(source, target, labels):
    return source["image"][:, 0] + target["text"][:, 0]


def one_number(source, target, labels):
    return 1.0


def half(scores, number, rounds, alpha):
    return (scores > np.median(scores)).astype(float)


def too_large(scores, number, rounds, alpha):
    return np.full(len(scores), 1.5)


def test_a_users_own_score_and_law(monkeypatch):
    monkeypatch.syspath_prepend(str(__import__("pathlib").Path(__file__).parent))
    name = "test_selection"
    chosen = selection(score=f"{name}:by_first_vector", law=f"{name}:half")
    expected = vectors(0)["image"][:, 0] + vectors(1)["text"][:, 0]
    assert isinstance(chosen, Selection)
    assert chosen.scores == pytest.approx(expected)
    assert chosen.places.tolist() == np.flatnonzero(expected > np.median(expected)).tolist()
    with pytest.raises(ConfigError, match=r"transfer.score is 'test_selection:missing'.*consistency"):
        selection(score=f"{name}:missing")
    with pytest.raises(ConfigError, match=r"transfer.law is 'no.such:law'"):
        selection(law="no.such:law")
    with pytest.raises(TrainingError, match=r"probabilities 1.5 to 1.5"):
        selection(law=f"{name}:too_large")
    with pytest.raises(TrainingError, match=r"shape \(\); expected 15"):
        selection(score=f"{name}:one_number")
