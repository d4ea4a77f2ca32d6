"""Exact search: checks on the way in, scores, shortlists and the order of hits, against naive loops and literals."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dckt.errors import ItemError
from dckt.index.exact import Bands, Columns, exact_limit, lowest, products, ranked, shortlist, similarities
from dckt.index.vectors import float32_error, normalised, unit_queries, unit_rows


def unit(rows: int, width: int, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).normal(size=(rows, width))
    return normalised(values, dimension=width, names=["row"] * rows)


class TestNormalised:
    def test_literals(self):
        rows = normalised([[3.0, 4.0], [0.0, -2.0]], dimension=2, names=["a", "b"])
        assert rows.dtype == np.float32
        np.testing.assert_array_equal(rows, np.array([[0.6, 0.8], [0, -1]], np.float32))

    @pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
    def test_every_floating_dtype_is_taken(self, dtype):
        rows = normalised(np.array([[3, 4]], dtype), dimension=2, names=["a"])
        np.testing.assert_allclose(rows, [[0.6, 0.8]], rtol=1e-6)

    @pytest.mark.parametrize("scale", [1e-300, 1e300])
    def test_tiny_and_huge_rows_keep_their_direction(self, scale):
        rows = normalised(np.array([[3.0, 4.0]]) * scale, dimension=2, names=["a"])
        np.testing.assert_allclose(rows, [[0.6, 0.8]], rtol=1e-6)

    def test_not_contiguous_and_more_rows_than_a_chunk(self):
        values = np.random.default_rng(0).normal(size=(3, 20_000)).T[::2]
        rows = normalised(values, dimension=3, names=["row"] * 10_000)
        np.testing.assert_allclose(rows, values / np.linalg.norm(values, axis=1, keepdims=True), atol=1e-6)
        assert rows.flags.c_contiguous

    def test_equal_vectors_have_equal_bytes_whatever_the_sign_of_zero(self):
        rows = normalised([[0.0, 1.0], [-0.0, 1.0]], dimension=2, names=["a", "b"])
        assert rows[0].tobytes() == rows[1].tobytes()

    @pytest.mark.parametrize(
        ("vectors", "said"),
        [
            (np.ones((2, 3), np.float32), r"shape \(2, 3\); expected \(N, 4\)"),
            (np.ones(4, np.float32), r"shape \(4,\)"),
            (np.ones((2, 4), np.int64), "dtype int64"),
            (np.ones((2, 4), np.complex128), "dtype complex128"),
            (np.array([["a", "b", "c", "d"]]), "dtype"),
        ],
    )
    def test_a_wrong_array_is_refused(self, vectors, said):
        with pytest.raises(ItemError, match=said):
            normalised(vectors, dimension=4, names=["x"] * len(vectors))

    @pytest.mark.parametrize(
        ("bad", "said"),
        [(np.nan, "not finite"), (np.inf, "not finite"), (-np.inf, "not finite"), (0.0, "no direction")],
    )
    def test_a_bad_row_is_named(self, bad, said):
        vectors = np.ones((3, 2))
        vectors[1] = bad
        with pytest.raises(ItemError, match=rf"1 of 3 .*second \(row 1\).*{said}"):
            normalised(vectors, dimension=2, names=["first", "second", "third"])

    def test_faults_of_rows_leave_the_others_usable(self):
        rows, faults = unit_rows([[3.0, 4.0], [0.0, 0.0], [np.nan, 1.0]], dimension=2)
        assert set(faults) == {1, 2}
        np.testing.assert_allclose(rows[0], [0.6, 0.8], rtol=1e-6)

    def test_names_are_counted(self):
        with pytest.raises(ItemError, match="2 vectors came with 1 names"):
            normalised(np.ones((2, 2)), dimension=2, names=["a"])

    def test_no_rows(self):
        assert normalised(np.zeros((0, 5)), dimension=5, names=[]).shape == (0, 5)


class TestScores:
    def test_literals(self):
        matrix = np.array([[1, 0], [0.6, 0.8], [-1, 0]], np.float32)
        np.testing.assert_array_equal(
            similarities(matrix, np.array([1, 0], np.float32)), np.array([1, 0.6, -1], np.float32)
        )

    def test_a_score_does_not_depend_on_what_it_is_computed_with(self):
        matrix, query = unit(9000, 200), unit(1, 200, seed=1)[0]
        together = similarities(matrix, query)
        alone = [similarities(matrix[row : row + 1], query)[0] for row in range(0, 9000, 97)]
        np.testing.assert_array_equal(together[::97], alone)

    def test_permuted_coordinates_tie_exactly(self):
        query = np.full(200, 1 / np.sqrt(200), np.float32)
        vector = unit(1, 200)[0]
        shuffled = np.random.default_rng(1).permutation(vector)
        scores = similarities(np.stack([vector, shuffled]), query)
        assert scores[0] == scores[1]

    @pytest.mark.parametrize("count", [0, 1, 2, 7])
    def test_products_of_one_and_of_many_queries(self, count):
        matrix, queries = unit(50, 20), unit(count, 20, seed=1)
        naive = [
            [sum(float(a) * float(b) for a, b in zip(row, query, strict=True)) for row in matrix] for query in queries
        ]
        found = products(matrix, queries)
        assert (found.shape, found.dtype) == ((count, 50), np.float32)
        np.testing.assert_allclose(found, np.array(naive).reshape(count, 50), atol=1e-6)

    @pytest.mark.parametrize("width", [2, 10, 200, 4096])
    def test_float32_products_stay_within_their_bound(self, width):
        matrix, queries = np.abs(unit(200, width)), np.abs(unit(50, width, seed=1))
        true = matrix.astype(np.float64) @ queries.T.astype(np.float64)
        batched = (matrix @ queries.T).astype(np.float64)
        naive = np.array([[np.add.accumulate(row * query)[-1] for query in queries[:3]] for row in matrix], np.float64)
        single = products(matrix, queries[:1]).T.astype(np.float64)
        assert np.abs(batched - true).max() <= float32_error(width) / 2
        assert np.abs(single - true[:, :1]).max() <= float32_error(width) / 2
        assert np.abs(naive - true[:, :3]).max() <= float32_error(width) / 2


class TestColumns:
    @settings(max_examples=100, deadline=None)
    @given(st.integers(1, 40), st.integers(0, 2**32 - 1), st.floats(0, 1))
    def test_products_are_as_near_as_they_say(self, width, seed, zeros):
        generator = np.random.default_rng(seed)
        matrix = unit(30, width, seed=seed)
        query = generator.normal(size=(1, width)) * 10.0 ** generator.uniform(-12, 0, (1, width))
        query[0, generator.random(width) < zeros] = 0
        query[0, generator.integers(width)] = 1
        query = unit_queries(query, dimension=width)[0]
        found, error = Columns(matrix).products(query)
        true = matrix.astype(np.float64) @ query.astype(np.float64)
        assert np.abs(found - true).max() <= error + float32_error(width) / 2

    def test_few_numbers_and_many(self):
        matrix = unit(50, 8)
        assert Columns(matrix).products(np.eye(8, dtype=np.float32)[3])[0] == pytest.approx(matrix[:, 3], abs=1e-6)
        assert Columns(matrix).products(matrix[7])[1] == 0.0


class TestBands:
    @settings(max_examples=200, deadline=None)
    @given(st.integers(2, 12), st.integers(0, 2**32 - 1), st.sampled_from([0.0, 1e-7, 1e-4, 0.01, 1.0]), st.data())
    def test_every_row_that_is_near_enough_is_in_the_band(self, width, seed, spread, data):
        generator = np.random.default_rng(seed)
        corner = np.eye(width)[generator.integers(width)] * generator.choice([-1, 1])
        moved = corner + spread * generator.normal(size=(80, width))
        matrix = normalised(moved, dimension=width, names=["row"] * 80)
        query = normalised(corner[None] + spread * generator.normal(size=(1, width)), dimension=width, names=["q"])[0]
        scores = similarities(matrix, query)
        floor = float(scores[data.draw(st.integers(0, 79))])
        bands = Bands(matrix)
        axis, first, end = bands.band(query, floor)
        assert set(np.flatnonzero(scores >= floor).tolist()) <= set(bands.rows(axis, first, end).tolist())

    def test_a_corner_of_many_sees_only_what_is_there(self):
        matrix = np.concatenate([np.repeat(np.eye(3, dtype=np.float32), 50, axis=0), unit(1000, 3)])
        bands = Bands(matrix)
        query = np.eye(3, dtype=np.float32)[1]
        assert (
            set(range(50, 100))
            <= set(bands.rows(*bands.band(query, 1.0)).tolist())
            <= {*range(50, 100)} | {150 + row for row in np.flatnonzero(matrix[150:, 1] > 0.999).tolist()}
        )
        assert set(bands.beside(query, 20).tolist()) <= set(np.flatnonzero(matrix[:, 1] > 0.9).tolist())


class TestLowest:
    @settings(max_examples=200, deadline=None)
    @given(
        arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 30)), elements=st.floats(-1, 1, width=32)),
        st.integers(1, 40),
    )
    def test_is_a_stable_sort(self, values, k):
        values += np.float32(0)
        np.testing.assert_array_equal(lowest(values, k), values.argsort(axis=1, kind="stable")[:, :k])


class TestUnitQueries:
    @pytest.mark.parametrize("count", [0, 1, 2, 9])
    @pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
    def test_as_normalised(self, count, dtype):
        values = np.random.default_rng(0).normal(size=(count, 5)).astype(dtype)
        rows = unit_queries(values, dimension=5)
        np.testing.assert_allclose(rows, normalised(values, dimension=5, names=["q"] * count), rtol=2e-7)
        assert rows.dtype == np.float32
        assert rows.flags.c_contiguous

    @pytest.mark.parametrize("scale", [1e-300, 1e-120, 1e120, 1e300])
    def test_tiny_and_huge(self, scale):
        np.testing.assert_allclose(unit_queries(np.array([[3.0, 4.0]]) * scale, dimension=2), [[0.6, 0.8]], rtol=1e-6)

    def test_one_alone_and_among_others(self):
        values = np.random.default_rng(0).normal(size=(200, 48))
        together = unit_queries(values, dimension=48)
        np.testing.assert_array_equal(together, np.concatenate([unit_queries(v[None], dimension=48) for v in values]))


class TestShortlist:
    @settings(max_examples=300, deadline=None)
    @given(
        arrays(np.float32, st.integers(1, 40), elements=st.sampled_from([-1, -0.5, 0, 0.25, 0.25 + 2**-20, 1])),
        st.integers(1, 90),
        st.data(),
    )
    def test_holds_the_best_k_items_and_all_ties_of_the_last(self, scores, k, data):
        counts = data.draw(arrays(np.int32, len(scores), elements=st.integers(1, 3)))
        rows = set(shortlist(scores.copy(), k, 0.0, counts).tolist())
        order = np.argsort(-scores, kind="stable")
        last = min(int(counts[order].cumsum().searchsorted(k)), len(order) - 1)
        assert {row for row, value in enumerate(scores) if value >= scores[order[last]]} <= rows

    def test_leaves_out_what_cannot_belong(self):
        ones = np.ones(3, np.int32)
        assert shortlist(np.array([0.1, 0.9, 0.5], np.float32), 1, 1e-6, ones).tolist() == [1]
        assert shortlist(np.array([0.1, 0.9, 0.5], np.float32), 2, 1e-6, 2 * ones).tolist() == [1]
        assert shortlist(np.array([0.1, 0.9, -2.0], np.float32), 3, 1e-6, np.array([1, 1, 0])).tolist() == [0, 1]

    def test_of_none(self):
        assert shortlist(np.zeros(0, np.float32), 3, 0.0, np.zeros(0, np.int32)).tolist() == []
        assert shortlist(np.zeros(4, np.float32), 0, 0.0, np.ones(4, np.int32)).tolist() == []


class TestRanked:
    @staticmethod
    def entries(postings):
        return lambda row, limit: [(item, b"{}") for item in postings[row][:limit]]

    def test_order_is_score_then_id_across_vectors(self):
        postings = [["b", "d"], ["a", "c"], ["e"]]
        hits = ranked(np.arange(3), np.array([0.5, 0.5, 0.9], np.float32), self.entries(postings), 4)
        assert hits == [(pytest.approx(-0.9), "e", b"{}"), *((-0.5, item, b"{}") for item in "abc")]

    @settings(max_examples=100, deadline=None)
    @given(st.data())
    def test_every_k_is_a_prefix_of_the_naive_order(self, data):
        scores = data.draw(arrays(np.float32, st.integers(1, 8), elements=st.sampled_from([0, 0.5, 1])))
        ids = data.draw(st.lists(st.text(min_size=1, max_size=3), unique=True, min_size=len(scores), max_size=30))
        postings = [sorted(ids[row :: len(scores)]) for row in range(len(scores))]
        naive = sorted((-float(scores[row]), item) for row, shared in enumerate(postings) for item in shared)
        k = data.draw(st.integers(1, len(ids)))
        hits = ranked(np.arange(len(scores)), scores, self.entries(postings), k)
        assert [hit[:2] for hit in hits] == naive[:k]

    @pytest.mark.parametrize("k", [1, 3, 20, 90])
    def test_many_ties_are_thinned_by_id_and_nothing_is_lost(self, k):
        generator = np.random.default_rng(0)
        postings = [sorted(generator.choice(10**6, 1 + row % 3, replace=False).astype(str)) for row in range(500)]
        scores = generator.choice(np.array([0.5, 0.25, 0.125], np.float32), 500, p=[0.02, 0.9, 0.08])
        firsts = sorted(range(500), key=lambda row: postings[row][0])
        ranks = np.argsort(firsts)
        read = []

        def entries(row, limit):
            read.append(row)
            return [(item, b"{}") for item in postings[row][:limit]]

        naive = sorted((-float(scores[row]), item) for row, shared in enumerate(postings) for item in shared)
        hits = ranked(np.arange(500), scores, entries, k, lambda: ranks)
        assert [hit[:2] for hit in hits] == naive[:k]
        assert len(read) <= 2 * k + 20


def test_wider_vectors_are_searched_exactly_up_to_fewer():
    assert [exact_limit(width) for width in (10, 200, 512, 4096)] == [29_090, 6_530, 2_872, 386]
