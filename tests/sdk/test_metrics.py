from __future__ import annotations

import os
import threading
from itertools import groupby, pairwise, permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sklearn_metrics

from dckt import metrics
from dckt.errors import ConfigError, ItemError
from dckt.metrics import (
    average_precision,
    bootstrap_interval,
    cross_media_map,
    map_per_label,
    mean_average_precision,
    precision_recall_curve,
)


def naive_ap(relevant: list[bool], cut: int | None = None) -> float:
    """AP of one ranked list, by its definition; with a cut, divided by what was found."""
    hits, total = 0, 0.0
    for rank, hit in enumerate(relevant[:cut], start=1):
        if hit:
            hits += 1
            total += hits / rank
    return total / hits if hits else 0.0


def orders(scores: list[float], relevant: list[bool]) -> list[float]:
    """AP of every order of the items that sorts the scores."""
    return [
        naive_ap([relevant[place] for place in order])
        for order in permutations(range(len(scores)))
        if all(scores[a] >= scores[b] for a, b in pairwise(order))
    ]


def bounds_by_places(scores: np.ndarray, relevant: np.ndarray) -> tuple[float, float, float]:
    """Expected, lowest and highest AP of one query: a loop over its ties, and over the places of each."""
    rounded = scores.astype(np.float32)
    order = np.argsort(-rounded, kind="stable")
    expected = lowest = highest = 0.0
    before = hits = 0
    for _, group in groupby(order, key=lambda place: rounded[place]):
        tie = list(group)
        n, r = len(tie), int(relevant[tie].sum())
        for i in range(1, n + 1):
            expected += r / n * (hits + 1 + (i - 1) * (r - 1) / max(n - 1, 1)) / (before + i)
        for t in range(1, r + 1):
            lowest += (hits + t) / (before + n - r + t)
            highest += (hits + t) / (before + t)
        before, hits = before + n, hits + r
    return expected / max(hits, 1), lowest / max(hits, 1), highest / max(hits, 1)


def ap(scores: list[float], relevant: list[bool], cut: int | None = None) -> tuple[float, float, float]:
    result = average_precision([scores], np.array([relevant], dtype=bool), cut=cut)
    return float(result.expected[0]), float(result.lowest[0]), float(result.highest[0])


# --- literals -----------------------------------------------------------------------------------------------------


def test_ranks_1_3_6() -> None:
    relevant = [True, False, True, False, False, True]
    assert ap([6, 5, 4, 3, 2, 1], relevant) == pytest.approx([(1 + 2 / 3 + 3 / 6) / 3] * 3)
    assert ap([6, 5, 4, 3, 2, 1], relevant)[0] == pytest.approx(0.7222, abs=5e-5)


def test_cut_divides_by_what_was_found() -> None:
    relevant = [True, False, True, False, False, True]
    assert ap([6, 5, 4, 3, 2, 1], relevant, cut=2) == (1.0, 1.0, 1.0)
    assert ap([6, 5, 4, 3, 2, 1], relevant, cut=3)[0] == pytest.approx((1 + 2 / 3) / 2)
    assert ap([6, 5, 4, 3, 2, 1], relevant, cut=100) == pytest.approx(ap([6, 5, 4, 3, 2, 1], relevant))


def test_nothing_relevant_is_0() -> None:
    assert ap([3, 2, 1], [False] * 3) == (0, 0, 0)
    assert ap([3, 2, 1], [False, False, True], cut=2) == (0, 0, 0)


def test_higher_scores_come_first_whatever_their_sign() -> None:
    assert ap([-3, 2, -1, 0.5], [False, True, False, False])[0] == 1
    assert ap([-3, 2, -1, 0.5], [True, False, False, False])[0] == 1 / 4
    assert ap([np.inf, 1, -np.inf], [False, False, True])[0] == pytest.approx(1 / 3)
    assert ap([1e-45, 0, -1e-45], [False, True, False])[0] == 1 / 2


def test_one_tie_of_two() -> None:
    # The relevant item is first or second with equal chance.
    assert ap([1, 1], [True, False]) == pytest.approx((0.75, 0.5, 1.0))
    assert ap([0.0, -0.0], [False, True]) == pytest.approx((0.75, 0.5, 1.0)), "0 and -0 tie"


def test_ties_end_with_their_query() -> None:
    result = average_precision([[1, 1], [1, 1], [1, 0]], [[True, False], [False, True], [False, True]])
    assert result.expected.tolist() == [0.75, 0.75, 0.5]
    assert result.lowest.tolist() == [0.5, 0.5, 0.5]
    assert result.highest.tolist() == [1, 1, 0.5]


def test_all_tied_is_the_expectation_of_a_random_order() -> None:
    n, r = 50, 7
    harmonic = sum(1 / i for i in range(1, n + 1))
    expected = (r - 1) / (n - 1) + harmonic / n * (1 - (r - 1) / (n - 1))
    assert ap([0.3] * n, [i < r for i in range(n)])[0] == pytest.approx(expected, abs=1e-12)


def test_scores_tie_when_equal_as_float32() -> None:
    close = [0.1, np.float64(np.float32(0.1)) + 1e-12]
    assert ap(close, [True, False])[0] == 0.75
    assert ap([0.1, float(np.nextafter(np.float32(0.1), np.float32(1)))], [True, False])[0] == 0.5


def test_cut_takes_ties_in_item_order_and_gives_both_other_orders() -> None:
    scores, relevant = [1, 1, 1, 1], [False, True, False, True]
    assert ap(scores, relevant, cut=2) == pytest.approx((0.5, 0.0, 1.0))
    assert ap(scores, relevant, cut=4) == pytest.approx((0.5, (1 / 3 + 2 / 4) / 2, 1.0))


# --- against slower ways ------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([-1.0, 0.0, 0.5]), st.booleans()), min_size=1, max_size=7))
def test_ties_against_every_permutation(items: list[tuple[float, bool]]) -> None:
    scores, relevant = [score for score, _ in items], [hit for _, hit in items]
    every = orders(scores, relevant)
    assert ap(scores, relevant) == pytest.approx((np.mean(every), min(every), max(every)), abs=1e-12)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 50))
def test_cut_against_the_naive_loop(seed: int, items: int, cut: int) -> None:
    generator = np.random.default_rng(seed)
    scores, relevant = generator.integers(5, size=(3, items)) / 4, generator.random((3, items)) < 0.4
    result = average_precision(scores, relevant, cut=cut)
    for row in range(3):
        order = np.argsort(-scores[row], kind="stable")
        assert result.expected[row] == pytest.approx(naive_ap(list(relevant[row][order]), cut), abs=1e-12)


SCORES = {
    "untied": lambda generator, shape: generator.standard_normal(shape) / 8,
    "tied": lambda generator, shape: generator.integers(-3, 4, size=shape) / 4,
    "nearly all tied": lambda generator, shape: (generator.random(shape) < 0.02) * 0.5,
    "zeros of both signs": lambda generator, shape: generator.choice([0.0, -0.0, 1.0, -1.0], size=shape),
    "subnormal": lambda generator, shape: generator.integers(-3, 4, size=shape) * 1e-45,
    "around 2": lambda generator, shape: 2 + generator.integers(-2, 3, size=shape) * 1e-7,
    "around -2": lambda generator, shape: -2 + generator.integers(-2, 3, size=shape) * 1e-7,
    "large": lambda generator, shape: generator.standard_normal(shape).round(1) * 1e30,
    "infinite": lambda generator, shape: generator.choice([-np.inf, -1.0, 0.0, np.inf], size=shape),
}


@pytest.mark.parametrize("kind", SCORES)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), items=st.integers(1, 80), share=st.sampled_from([0.0, 0.1, 0.5, 1.0]))
def test_bounds_against_a_loop_over_places(kind: str, seed: int, items: int, share: float) -> None:
    generator = np.random.default_rng(seed)
    scores = SCORES[kind](generator, (5, items)).astype(np.float32)
    relevant = generator.random(scores.shape) < share
    result = average_precision(scores, relevant)
    truth = [bounds_by_places(*row) for row in zip(scores, relevant, strict=True)]
    np.testing.assert_allclose(np.stack([result.expected, result.lowest, result.highest], axis=1), truth, atol=1e-12)


@pytest.mark.parametrize("cut", [None, 7])
def test_scores_of_any_size_take_the_same_path_or_the_same_values(cut: int | None) -> None:
    """Scores outside (-2, 2) have wider keys. A power of two keeps order and ties, so nothing else may change."""
    generator = np.random.default_rng(7)
    scores = (generator.standard_normal((20, 300)) / 8).round(2).astype(np.float32)
    relevant = generator.random(scores.shape) < 0.2
    small = average_precision(scores, relevant, cut=cut)
    large = average_precision(scores * np.float32(1024), relevant, cut=cut)
    for name in ("expected", "lowest", "highest"):
        np.testing.assert_array_equal(getattr(small, name), getattr(large, name))


def test_the_callers_scores_stay() -> None:
    scores, relevant = np.array([[0.5, -0.5, 0.0]], dtype=np.float32), np.array([[True, False, True]])
    average_precision(scores, relevant)
    average_precision(scores, relevant, cut=2)
    assert scores.tolist() == [[0.5, -0.5, 0.0]]
    assert relevant.tolist() == [[True, False, True]]


def test_untied_against_sklearn() -> None:
    generator = np.random.default_rng(0)
    scores = np.stack([generator.permutation(3000) for _ in range(5)]).astype(np.float32) - 1500
    relevant = generator.random(scores.shape) < 0.1
    result = average_precision(scores, relevant)
    expected = [
        sklearn_metrics.average_precision_score(hit, score) for hit, score in zip(relevant, scores, strict=True)
    ]
    np.testing.assert_allclose(result.expected, expected, atol=1e-9, rtol=0)
    np.testing.assert_allclose(result.lowest, expected, atol=1e-9, rtol=0)
    np.testing.assert_allclose(result.highest, expected, atol=1e-9, rtol=0)


def test_large_ties_against_the_sum_over_places() -> None:
    """The closed forms stay exact deep in a long list."""
    generator = np.random.default_rng(1)
    scores = np.sort(generator.integers(20_000, size=60_000)).astype(np.float32)[::-1].copy()
    relevant = generator.random(scores.size) < 0.3
    result = average_precision([scores], [relevant])
    got = [float(value[0]) for value in (result.expected, result.lowest, result.highest)]
    assert got == pytest.approx(bounds_by_places(scores, relevant), abs=1e-11)
    assert got[1] < got[0] < got[2]


def test_random_vectors_approach_the_class_share() -> None:
    generator = np.random.default_rng(2)
    classes, n = 4, 400
    labels = np.arange(n) % classes
    maps = [
        mean_average_precision(
            generator.standard_normal((n, 16)), labels, generator.standard_normal((n, 16)), labels
        ).map
        for _ in range(5)
    ]
    r = n // classes
    harmonic = sum(1 / i for i in range(1, n + 1))
    chance = (r - 1) / (n - 1) + harmonic / n * (1 - (r - 1) / (n - 1))
    assert chance == pytest.approx(1 / classes, abs=0.02)
    assert np.mean(maps) == pytest.approx(chance, abs=0.005)


def vectors_with_copies(seed: int, rows: int) -> np.ndarray:
    """Vectors of which several are equal, some are zero, and zeros have both signs."""
    generator = np.random.default_rng(seed)
    different = generator.standard_normal((max(1, rows // 3), 6))
    different[generator.random(different.shape) < 0.2] = 0
    different[0] = 0
    chosen = different[generator.integers(len(different), size=rows)]
    return np.where((chosen == 0) & (generator.random(chosen.shape) < 0.5), -0.0, chosen)


@pytest.mark.parametrize("cut", [None, 5])
@pytest.mark.parametrize("exclude_self", [False, True])
def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch, cut: int | None, exclude_self: bool) -> None:
    labels = np.random.default_rng(3).integers(3, size=30)
    image, text = vectors_with_copies(1, 30), vectors_with_copies(2, 30)
    whole = mean_average_precision(image, labels, text, labels, cut=cut, exclude_self=exclude_self)
    monkeypatch.setattr(metrics, "_PRODUCT", 130)
    monkeypatch.setattr(metrics, "_FEWEST_QUERIES", 1)
    monkeypatch.setattr(metrics, "_SORT", 31)
    in_parts = mean_average_precision(image, labels, text, labels, cut=cut, exclude_self=exclude_self)
    np.testing.assert_allclose(in_parts.per_query, whole.per_query, atol=1e-12)
    assert (in_parts.lowest, in_parts.highest) == pytest.approx((whole.lowest, whole.highest))


@pytest.mark.parametrize("cut", [None, 5])
def test_threads_change_no_bit(monkeypatch: pytest.MonkeyPatch, cut: int | None) -> None:
    labels = np.random.default_rng(4).integers(5, size=200)
    image, text = vectors_with_copies(3, 200), vectors_with_copies(4, 200)
    used = set()
    bounds = metrics._bounds

    def spy(*arguments: object) -> np.ndarray:
        used.add(threading.current_thread())
        return bounds(*arguments)

    monkeypatch.setattr(metrics, "_bounds", spy)
    monkeypatch.setattr(metrics, "_PRODUCT", 10_000)
    monkeypatch.setattr(metrics, "_FEWEST_QUERIES", 1)
    monkeypatch.setattr(metrics, "_SORT", 1000)
    results = {}
    for threads in (1, 4):
        used.clear()
        monkeypatch.setattr(metrics, "_threads", lambda threads=threads: threads)
        of_vectors = mean_average_precision(image, labels, text, labels, cut=cut)
        of_scores = average_precision(image @ text.T, labels[:, None] == labels, cut=cut)
        assert (threading.main_thread() in used) == (threads == 1)
        results[threads] = [
            of_vectors.per_query, of_vectors.lowest, of_vectors.highest,
            of_scores.expected, of_scores.lowest, of_scores.highest,
        ]  # fmt: skip
    for one, four in zip(results[1], results[4], strict=True):
        np.testing.assert_array_equal(one, four)


def test_little_work_starts_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_threads", lambda: 4)
    monkeypatch.setattr(metrics, "ThreadPoolExecutor", None)
    assert mean_average_precision(np.eye(9), range(9), np.eye(9), range(9)).map == 1


def test_threads_are_the_cores_unless_fewer_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 5}, raising=False)
    for wanted, threads in [("", 3), ("2", 2), ("64", 3), ("0", 3), ("no", 3)]:
        monkeypatch.setenv("OMP_NUM_THREADS", wanted)
        assert metrics._threads() == threads
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert metrics._threads() == 3


# --- MAP over vectors ---------------------------------------------------------------------------------------------


def test_map_against_a_naive_loop_over_cosines() -> None:
    generator = np.random.default_rng(4)
    queries, items = generator.standard_normal((7, 5)), generator.standard_normal((11, 5)) * 9
    query_labels, item_labels = generator.integers(3, size=7), generator.integers(3, size=11)
    expected = []
    for query, label in zip(queries, query_labels, strict=True):
        cosine = [query @ item / np.linalg.norm(query) / np.linalg.norm(item) for item in items]
        expected.append(naive_ap([bool(item_labels[place] == label) for place in np.argsort(cosine)[::-1]]))
    result = mean_average_precision(queries, query_labels, items, item_labels)
    np.testing.assert_allclose(result.per_query, expected, atol=1e-12)
    assert result.map == pytest.approx(np.mean(expected))
    assert result.lowest == pytest.approx(result.map)
    assert result.highest == pytest.approx(result.map)
    assert result.queries == 7


@pytest.mark.parametrize("queries", [1, 2, 5])
@pytest.mark.parametrize("width", [3, 20, 129, 200, 512])
def test_equal_vectors_always_tie(width: int, queries: int) -> None:
    """BLAS scores copies of one vector a bit apart, by their place in the product; MAP must not see that."""
    generator = np.random.default_rng(width)
    copies = np.repeat(generator.standard_normal((1, width)), 1003, axis=0)
    item_labels, query_labels = generator.integers(2, size=1003), np.arange(queries) % 2
    result = mean_average_precision(generator.standard_normal((queries, width)), query_labels, copies, item_labels)
    tied = average_precision(np.zeros((queries, 1003)), query_labels[:, None] == item_labels)
    np.testing.assert_array_equal(result.per_query, tied.expected)
    assert (result.lowest, result.highest) == (tied.lowest.mean(), tied.highest.mean())


def test_copies_among_other_vectors() -> None:
    generator = np.random.default_rng(6)
    different = generator.standard_normal((40, 16))
    place = generator.integers(40, size=300)
    item_labels, query_labels = generator.integers(2, size=300), np.array([0, 1, 0])
    queries = generator.standard_normal((3, 16))
    for cut in (None, 20):
        result = mean_average_precision(queries, query_labels, different[place], item_labels, cut=cut)
        cosine = queries @ different.T / np.linalg.norm(different, axis=1)
        truth = average_precision(cosine[:, place], query_labels[:, None] == item_labels, cut=cut)
        np.testing.assert_allclose(result.per_query, truth.expected, atol=1e-9)
        assert (result.lowest, result.highest) == pytest.approx((truth.lowest.mean(), truth.highest.mean()))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    queries=st.integers(1, 40),
    items=st.integers(1, 60),
    classes=st.integers(1, 50),
    cut=st.sampled_from([None, 4]),
)
def test_repeated_queries_and_items(seed: int, queries: int, items: int, classes: int, cut: int | None) -> None:
    """Equal queries are computed once: each must have what it has alone, for its own label."""
    generator = np.random.default_rng(seed)
    asked, ranked = vectors_with_copies(seed, queries), vectors_with_copies(seed + 1, items)
    asked_labels, ranked_labels = generator.integers(classes, size=queries), generator.integers(classes, size=items)
    result = mean_average_precision(asked, asked_labels, ranked, ranked_labels, cut=cut)
    lengths = [np.where(norm > 0, norm, 1) for norm in (np.linalg.norm(v, axis=1) for v in (asked, ranked))]
    # One product for each pair, so that equal pairs have equal cosines.
    cosine = (asked[:, None] * ranked).sum(axis=2) / lengths[0][:, None] / lengths[1]
    truth = [
        average_precision(row[None], (ranked_labels == label)[None], cut=cut)
        for row, label in zip(cosine, asked_labels, strict=True)
    ]
    np.testing.assert_allclose(result.per_query, [each.expected[0] for each in truth], atol=1e-12)
    assert result.lowest == pytest.approx(np.mean([each.lowest for each in truth]))
    assert result.highest == pytest.approx(np.mean([each.highest for each in truth]))


@pytest.mark.parametrize("cut", [None, 6])
def test_exclude_self_against_taking_it_away(cut: int | None) -> None:
    vectors, labels = vectors_with_copies(8, 60), np.random.default_rng(8).integers(4, size=60)
    result = mean_average_precision(vectors, labels, vectors, labels, cut=cut, exclude_self=True)
    for place, value in enumerate(result.per_query):
        others = np.arange(60) != place
        alone = mean_average_precision(vectors[[place]], labels[[place]], vectors[others], labels[others], cut=cut)
        assert value == pytest.approx(alone.map, abs=1e-12)


def test_products_below_the_smallest_normal_number_count() -> None:
    """Saturated probabilities: a hundred products of 1e-46 each are a cosine of 1e-44, which float32 can hold."""
    query, near, far = np.zeros((3, 102))
    query[0] = near[1] = far[1] = 1
    query[2:] = near[2:] = 1e-23
    assert mean_average_precision([query], [0], [far, near], [1, 0]).map == 1


def test_zero_vector_is_similar_to_nothing() -> None:
    result = mean_average_precision([[0, 0]], [0], [[1, 0], [0, 1]], [0, 1])
    assert result.map == 0.75
    result = mean_average_precision([[1, 0]], [0], [[-1, 0], [0, 0]], [1, 0])
    assert result.map == 1


def test_scale_does_not_matter() -> None:
    items = np.array([[1e-30, 0], [0, 1e30]])
    assert mean_average_precision([[1e30, 1e29]], ["a"], items, ["a", "b"]).map == 1


def test_labels_may_be_strings_of_different_lengths() -> None:
    result = mean_average_precision(np.eye(2), ["a", "long"], np.eye(2), ["long", "a"])
    assert result.map == 0.5
    assert result.without_relevant == 0


def test_query_without_relevant_item_counts_as_0() -> None:
    result = mean_average_precision(np.eye(2), [0, 9], np.eye(2), [0, 1])
    assert (result.map, result.queries, result.without_relevant) == (0.5, 2, 1)


def test_exclude_self() -> None:
    vectors, labels = np.array([[1.0, 0], [0.9, 0.1], [0, 1]]), [0, 1, 0]
    with_self = mean_average_precision(vectors, labels, vectors, labels)
    without = mean_average_precision(vectors, labels, vectors, labels, exclude_self=True)
    np.testing.assert_allclose(with_self.per_query, [(1 + 2 / 3) / 2, 1, (1 + 2 / 3) / 2])
    np.testing.assert_allclose(without.per_query, [1 / 2, 0, 1 / 2])
    assert (with_self.without_relevant, without.without_relevant) == (0, 1)
    assert "no answer to itself" in without.definition
    assert "no answer to itself" not in with_self.definition


def test_exclude_self_ignores_only_itself_among_copies() -> None:
    vectors, labels = np.ones((3, 2)), [0, 0, 1]
    result = mean_average_precision(vectors, labels, vectors, labels, exclude_self=True)
    np.testing.assert_allclose(result.per_query, [0.75, 0.75, 0])


def test_both_directions() -> None:
    image, text, labels = np.array([[1.0, 0], [0, 1], [1, 1]]), np.array([[1.0, 0.1], [1, 0], [0, 1]]), [0, 1, 0]
    both = cross_media_map(image, text, labels)
    assert both.image_to_text.map == mean_average_precision(image, labels, text, labels).map
    assert both.text_to_image.map == mean_average_precision(text, labels, image, labels).map
    assert both.image_to_text.map != both.text_to_image.map
    assert both.average == (both.image_to_text.map + both.text_to_image.map) / 2
    assert cross_media_map(image, text, labels, cut=1).average != both.average


def test_definition_says_what_was_computed() -> None:
    assert "MAP@all" in mean_average_precision(np.eye(2), [0, 1], np.eye(2), [0, 1]).definition
    assert "MAP@50" in mean_average_precision(np.eye(2), [0, 1], np.eye(2), [0, 1], cut=50).definition


# --- by recall and by label ----------------------------------------------------------------------------------------


def test_precision_by_recall_of_ranks_1_3_6() -> None:
    items = np.stack([np.cos(np.arange(6) / 10), np.sin(np.arange(6) / 10)], axis=1)
    curve = precision_recall_curve([[1, 0]], [1], items, [1, 0, 1, 0, 0, 1])
    # Recall 1/3 is reached at rank 1, 2/3 at rank 3, all at rank 6.
    np.testing.assert_allclose(curve.recall, np.arange(11) / 10)
    np.testing.assert_allclose(curve.precision, [1] * 4 + [2 / 3] * 3 + [1 / 2] * 4)


def test_precision_at_a_recall_is_the_best_from_there_on() -> None:
    items = np.stack([np.cos(np.arange(5) / 10), np.sin(np.arange(5) / 10)], axis=1)
    curve = precision_recall_curve([[1, 0]], [1], items, [0, 1, 0, 1, 1], points=4)
    np.testing.assert_allclose(curve.precision, [3 / 5] * 4)  # after 1/2 and 2/4 comes 3/5


def test_precision_by_recall_takes_a_tie_as_a_whole() -> None:
    tied = np.ones((4, 2))
    for labels in ([1, 0, 0, 0], [0, 0, 0, 1]):
        np.testing.assert_allclose(precision_recall_curve([[1, 0]], [1], tied, labels).precision, [1 / 4] * 11)


@pytest.mark.parametrize("points", [2, 11, 101])
def test_precision_by_recall_against_sklearn(points: int) -> None:
    queries, items = vectors_with_copies(5, 20), vectors_with_copies(6, 90)
    generator = np.random.default_rng(9)
    query_labels, item_labels = generator.integers(6, size=20), generator.integers(5, size=90)
    query_labels[:2] = 5  # no item has it
    curve = precision_recall_curve(queries, query_labels, items, item_labels, points=points)
    expected = np.zeros((20, points))
    lengths = np.linalg.norm(items, axis=1)
    for row, (query, label) in enumerate(zip(queries, query_labels, strict=True)):
        if label < 5:
            cosine = (query * items).sum(axis=1) / np.where(lengths > 0, lengths, 1)
            precision, recall, _ = sklearn_metrics.precision_recall_curve(
                item_labels == label, cosine.astype(np.float32)
            )
            for point, level in enumerate(np.linspace(0, 1, points)):
                expected[row, point] = precision[:-1][recall[:-1] >= level - 1e-9].max()  # the last point is made up
    np.testing.assert_allclose(curve.precision, expected.mean(axis=0), atol=1e-12)
    assert (np.diff(curve.precision) <= 0).all()


def test_map_per_label() -> None:
    values = map_per_label([0.5, 1.0, 0.0, 0.25], ["dog", "cat", "dog", "ox"])
    assert list(values) == ["cat", "dog", "ox"]
    assert {label: (value.map, value.queries) for label, value in values.items()} == {
        "cat": (1.0, 1),
        "dog": (0.25, 2),
        "ox": (0.25, 1),
    }
    assert map_per_label(np.array([1.0]), np.array([7])) == {7: metrics.LabelMAP(map=1.0, queries=1)}
    assert map_per_label([], []) == {}


def test_map_per_label_adds_up_to_map() -> None:
    labels = np.random.default_rng(10).integers(4, size=50)
    result = mean_average_precision(vectors_with_copies(7, 50), labels, vectors_with_copies(8, 50), labels)
    values = map_per_label(result.per_query, labels).values()
    assert sum(value.map * value.queries for value in values) / 50 == pytest.approx(result.map)


# --- intervals ------------------------------------------------------------------------------------------------------


def test_bootstrap() -> None:
    values = np.random.default_rng(5).random(400)
    low, high = bootstrap_interval(values)
    assert low < values.mean() < high
    # Half width of a normal interval of the mean: 1.96 standard errors.
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / 20, rel=0.1)
    assert bootstrap_interval(values, seed=1) != (low, high)
    assert bootstrap_interval(values, samples=50) != (low, high)
    narrow = bootstrap_interval(values, share=0.5)
    assert low < narrow[0] < narrow[1] < high
    assert bootstrap_interval([0.5]) == (0.5, 0.5)


# --- refusals -----------------------------------------------------------------------------------------------------


def test_empty() -> None:
    assert average_precision(np.zeros((0, 4)), np.zeros((0, 4), bool)).expected.shape == (0,)
    assert average_precision(np.zeros((2, 0)), np.zeros((2, 0), bool)).expected.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("scores", "relevant"),
    [
        ([[1.0, np.nan]], [[True, False]]),
        ([[1.0, 2.0]], [[True]]),
        ([1.0, 2.0], [True, False]),
        ([[1.0, 2.0]], [[1, 0]]),
    ],
)
def test_bad_scores(scores: object, relevant: object) -> None:
    with pytest.raises(ItemError):
        average_precision(scores, relevant)  # type: ignore[arg-type]


def test_nan_names_its_row() -> None:
    with pytest.raises(ItemError, match=r"\[2\]"):
        average_precision([[1.0], [1.0], [np.nan]], [[True]] * 3)


@pytest.mark.parametrize(
    ("queries", "query_labels", "items", "item_labels", "message"),
    [
        (np.eye(2), [0, 1], np.eye(3), [0, 1, 2], "width 2, items 3"),
        (np.eye(2), [0], np.eye(2), [0, 1], "one label for each"),
        (np.eye(2), [0, 1], np.eye(2), ["0", "1"], "one kind"),
        (np.eye(2) * np.nan, [0, 1], np.eye(2), [0, 1], "not finite"),
        (np.eye(2), [0, 1], np.full((2, 2), np.inf), [0, 1], "not finite"),
        (np.zeros((0, 2)), [], np.eye(2), [0, 1], "at least one row"),
        (np.eye(2), [0, 1], np.zeros((0, 2)), [], "at least one row"),
        (np.ones(2), [0, 1], np.eye(2), [0, 1], "queries are"),
        (np.array([["a"]]), [0], np.eye(1), [0], "queries are"),
    ],
)
def test_bad_vectors(
    queries: np.ndarray, query_labels: list[object], items: np.ndarray, item_labels: list[object], message: str
) -> None:
    with pytest.raises(ItemError, match=message):
        mean_average_precision(queries, query_labels, items, item_labels)


def test_bad_options() -> None:
    with pytest.raises(ConfigError, match="cut is 0"):
        mean_average_precision(np.eye(2), [0, 1], np.eye(2), [0, 1], cut=0)
    with pytest.raises(ConfigError, match="cut is -1"):
        average_precision([[1.0]], [[True]], cut=-1)
    with pytest.raises(ItemError, match="exclude_self"):
        mean_average_precision(np.eye(2), [0, 1], np.eye(2)[:1], [0], exclude_self=True)
    with pytest.raises(ConfigError, match="points is 1"):
        precision_recall_curve(np.eye(2), [0, 1], np.eye(2), [0, 1], points=1)
    with pytest.raises(ItemError, match="one label for each query"):
        map_per_label([0.5, 1.0], ["cat"])
    with pytest.raises(ConfigError, match="share"):
        bootstrap_interval([1.0], share=1.0)
    with pytest.raises(ConfigError, match="samples 0"):
        bootstrap_interval([1.0], samples=0)
    with pytest.raises(ItemError, match="at least one query"):
        bootstrap_interval([])
