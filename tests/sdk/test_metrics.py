from __future__ import annotations

from itertools import pairwise, permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

from dckt import metrics
from dckt.errors import ConfigError, ItemError
from dckt.metrics import (
    average_precision,
    bootstrap_interval,
    cross_media_map,
    mean_average_precision,
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


def test_untied_against_sklearn() -> None:
    generator = np.random.default_rng(0)
    scores = np.stack([generator.permutation(3000) for _ in range(5)]).astype(np.float32) - 1500
    relevant = generator.random(scores.shape) < 0.1
    result = average_precision(scores, relevant)
    expected = [average_precision_score(hit, score) for hit, score in zip(relevant, scores, strict=True)]
    np.testing.assert_allclose(result.expected, expected, atol=1e-9, rtol=0)
    np.testing.assert_allclose(result.lowest, expected, atol=1e-9, rtol=0)
    np.testing.assert_allclose(result.highest, expected, atol=1e-9, rtol=0)


def test_large_ties_against_the_sum_over_places() -> None:
    """The closed forms stay exact deep in a long list."""
    generator = np.random.default_rng(1)
    scores = np.sort(generator.integers(20_000, size=60_000)).astype(np.float32)[::-1].copy()
    relevant = generator.random(scores.size) < 0.3
    expected = lowest = highest = 0.0
    start = hits = 0
    for end in [*(np.flatnonzero(np.diff(scores)) + 1), scores.size]:
        n, r = end - start, int(relevant[start:end].sum())
        i = np.arange(1, n + 1)
        expected += (r / n * (hits + 1 + (i - 1) * (r - 1) / max(n - 1, 1)) / (start + i)).sum()
        t = np.arange(1, r + 1)
        lowest += ((hits + t) / (end - r + t)).sum()
        highest += ((hits + t) / (start + t)).sum()
        start, hits = end, hits + r
    result = average_precision([scores], [relevant])
    got = [float(value[0]) for value in (result.expected, result.lowest, result.highest)]
    assert got == pytest.approx([expected / hits, lowest / hits, highest / hits], abs=1e-11)
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


@pytest.mark.parametrize("cut", [None, 5])
def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch, cut: int | None) -> None:
    generator = np.random.default_rng(3)
    labels = generator.integers(3, size=30)
    image, text = generator.standard_normal((30, 4)).round(), generator.standard_normal((30, 4)).round()
    whole = mean_average_precision(image, labels, text, labels, cut=cut)
    monkeypatch.setattr(metrics, "_PRODUCT", 70)
    monkeypatch.setattr(metrics, "_SORT", 31)
    in_parts = mean_average_precision(image, labels, text, labels, cut=cut)
    np.testing.assert_allclose(in_parts.per_query, whole.per_query, atol=1e-12)
    assert (in_parts.lowest, in_parts.highest) == pytest.approx((whole.lowest, whole.highest))


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


def test_nan_names_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_SORT", 1)
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
    with pytest.raises(ConfigError, match="share"):
        bootstrap_interval([1.0], share=1.0)
    with pytest.raises(ConfigError, match="samples 0"):
        bootstrap_interval([1.0], samples=0)
    with pytest.raises(ItemError, match="at least one query"):
        bootstrap_interval([])
