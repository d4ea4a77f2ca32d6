"""Acceptance tests 3 and 4: the selection law of the paper (eq. 13)."""

import numpy as np
import pytest

from dckt_trainer.selection import domain_consistency, select, selection_probability

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
    assert selection_probability(consistency, number, 0.2) == pytest.approx(LAW[number], abs=6e-4)


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
    chances = selection_probability(consistency, number, 0.2, law="released")
    assert chances == pytest.approx(RELEASED[number, highest], abs=6e-4)


def test_the_released_law_counts_to_twenty_and_stays_above_zero():
    consistency = np.array([0.0, 2.0])
    twenty, later = (selection_probability(consistency, number, 0.2, law="released") for number in (20, 90))
    assert np.array_equal(twenty, later)
    assert selection_probability(consistency, 1, 0.2, law="released")[0] == 0  # a gap of 2 would give less
    wide = np.array([0.2] * 50 + [1.5] * 50)
    kept = {law: len(select(law, wide, 1, 0.2, np.random.default_rng(0))) for law in ("paper", "released")}
    assert kept["released"] != kept["paper"]


@pytest.mark.parametrize("number", [1, 3, 50])
def test_law_is_monotone_bounded_and_alpha_at_the_largest(number):
    consistency = np.sort(np.random.default_rng(0).random(50) * 2)
    chances = selection_probability(consistency, number, 0.35)
    assert (np.diff(chances) >= 0).all()
    assert chances.min() >= 0
    assert chances[-1] == 0.35


def test_late_rounds_tend_to_alpha():
    chances = selection_probability(np.array([0.1, 0.5, 1.0]), 10**6, 0.2)
    assert chances == pytest.approx(0.2, abs=1e-5)


def test_mean_count_over_seeds_is_the_sum_of_probabilities():
    consistency = np.random.default_rng(1).random(200)
    counts = [len(select("paper", consistency, 3, 0.2, np.random.default_rng(seed))) for seed in range(1000)]
    chances = selection_probability(consistency, 3, 0.2)
    spread = np.sqrt((chances * (1 - chances)).sum() / len(counts))
    assert abs(np.mean(counts) - chances.sum()) < 4 * spread


def test_random_takes_as_many_whichever_they_are():
    consistency = np.concatenate([np.zeros(300), np.ones(300)])
    expected = selection_probability(consistency, 1, 0.2).sum()
    drawn = [select("random", consistency, 1, 0.2, np.random.default_rng(seed)) for seed in range(400)]
    assert np.mean([len(kept) for kept in drawn]) == pytest.approx(expected, rel=0.03)
    assert np.mean([(kept < 300).mean() for kept in drawn]) == pytest.approx(0.5, abs=0.02)
    scored = [select("paper", consistency, 1, 0.2, np.random.default_rng(seed)) for seed in range(20)]
    assert all((kept >= 300).all() for kept in scored)  # at round 1 the least consistent have no chance


def test_all_takes_all():
    assert select("all", np.zeros(5), 1, 0.2, np.random.default_rng(0)).tolist() == [0, 1, 2, 3, 4]


def test_never_fewer_than_a_batch_needs():
    kept = select("paper", np.array([0.1, 0.9, 0.2, 0.8]), 1, 1e-9, np.random.default_rng(0))
    assert kept.tolist() == [1, 3]


def test_no_consistency_at_all_gives_every_pair_alpha():
    assert selection_probability(np.zeros(4), 1, 0.2).tolist() == [0.2] * 4


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
