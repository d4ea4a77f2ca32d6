"""Collections on which every HNSW library fails: copies and ties. Answers equal a naive search, for any k."""

from __future__ import annotations

import copy
import itertools
import pickle
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dckt.index import Index


def fill(folder: Path, vectors: np.ndarray, ids: list[str], kind: str) -> Index:
    index = Index.create(folder, model_id="m", representation="p", dimension=vectors.shape[1], kind=kind, threads=1)
    index.add("text", ids, vectors)
    return index


def naive(vectors: np.ndarray, ids: list[str], query: np.ndarray, k: int) -> list[str]:
    wide = vectors.astype(np.float64)
    wide = (wide / np.linalg.norm(wide, axis=1, keepdims=True)).astype(np.float32).astype(np.float64)
    unit = (query / np.linalg.norm(query)).astype(np.float32).astype(np.float64)
    scores = (wide @ unit).astype(np.float32)
    return [ids[row] for row in sorted(range(len(ids)), key=lambda row: (-scores[row], ids[row]))[:k]]


def one_hot_sorted() -> np.ndarray:
    return np.repeat(np.eye(10, dtype=np.float32), 200, axis=0)


def half_identical() -> np.ndarray:
    generator = np.random.default_rng(0)
    rows = generator.normal(size=(2000, 64)).astype(np.float32)
    rows[:1000] = rows[0]
    return rows


def saturated() -> np.ndarray:
    logits = 12 * np.random.default_rng(0).normal(size=(2000, 10))
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    return np.round(shares, 3)[np.argsort(shares.argmax(axis=1), kind="stable")].astype(np.float32)


def close_clusters_sorted() -> np.ndarray:
    generator = np.random.default_rng(0)
    return (np.repeat(generator.normal(size=(40, 32)), 50, axis=0) + 1e-3 * generator.normal(size=(2000, 32))).astype(
        np.float32
    )


def corners_of_a_cube() -> np.ndarray:
    """All different, and yet a query at a corner sees them in ten ties: 1, 9, 36, 84, 126 ... of them."""
    return np.array(list(itertools.product([-1, 1], repeat=9)), np.float32)


@pytest.mark.parametrize("kind", ["exact", "hnsw", "auto"])
@pytest.mark.parametrize("make", [one_hot_sorted, half_identical, saturated, corners_of_a_cube])
def test_pathological_collections_have_full_recall(tmp_path, kind, make):
    vectors = make()
    ids = [f"{row:04d}" for row in np.random.default_rng(1).permutation(len(vectors))]
    generator = np.random.default_rng(2)
    rows = generator.integers(0, len(vectors), 12)
    queries = vectors[rows] + np.where(np.arange(12) % 2, 0.05, 0)[:, None] * generator.normal(
        size=(12, vectors.shape[1])
    )
    with fill(tmp_path / "i", vectors, ids, kind) as index:
        for k in (1, 5, 10, 50, 127, 200, 201, 1000, 1999, 2000, 10_000):
            found = [[hit.id for hit in hits] for hits in index.search(queries, k, metadata=False)]
            assert found == [naive(vectors, ids, query, k) for query in queries]


def test_close_neighbours_that_do_not_tie_are_found(tmp_path):
    vectors = close_clusters_sorted()
    ids = [f"{row:04d}" for row in range(len(vectors))]
    queries = vectors[::37] + 0.02 * np.random.default_rng(3).normal(size=(55, vectors.shape[1]))
    with fill(tmp_path / "i", vectors, ids, "hnsw") as index:
        assert index.info().media["text"].search == "hnsw"
        for k in (1, 10, 45):
            shares = [
                len({hit.id for hit in hits} & set(naive(vectors, ids, query, k))) / k
                for query, hits in zip(queries, index.search(queries, k), strict=True)
            ]
            # One of the 55 queries that misses its cluster makes 2 %.
            assert np.mean(shares) >= 0.96


@pytest.mark.parametrize("rows", [2000, 4000])
@pytest.mark.parametrize("largest", [10, 40, 160])
def test_hits_for_a_small_k_begin_those_for_a_larger_one_with_the_same_effort(tmp_path, rows, largest):
    vectors = np.random.default_rng(0).normal(size=(rows, 24))
    queries = np.random.default_rng(1).normal(size=(20, 24))
    with fill(tmp_path / "i", vectors, [f"{row:04d}" for row in range(rows)], "hnsw") as index:
        shelf = index._shelves["text"]
        sharing = [k for k in range(1, largest + 1) if shelf._effort(k) == shelf._effort(largest)]
        assert len(sharing) >= largest / 2
        whole = index.search(queries, largest)
        for k in sharing[:: max(1, len(sharing) // 7)]:
            assert index.search(queries, k) == [hits[:k] for hits in whole]


@pytest.mark.parametrize("kind", ["exact", "hnsw"])
def test_top_5_is_the_beginning_of_top_10_across_a_tie(tmp_path, kind):
    with fill(tmp_path / "i", one_hot_sorted(), [f"{row:04d}" for row in range(2000)], kind) as index:
        query = np.eye(10)[3:4]
        expected = [f"{row:04d}" for row in [*range(600, 800), *range(600), *range(800, 2000)]]
        for k in (1, 5, 10, 199, 200, 201, 205, 2000):
            hits = index.search(query, k)[0]
            assert [hit.id for hit in hits] == expected[:k]
            assert [hit.score for hit in hits] == ([1.0] * 200 + [0.0] * 1800)[:k]


def test_a_tie_between_media_goes_by_id_and_then_by_medium(tmp_path):
    with fill(tmp_path / "i", np.ones((2, 3)), ["b", "c"], "exact") as index:
        index.add("image", ["a", "b"], np.ones((2, 3)))
        hits = index.search(np.ones((1, 3)), 10)[0]
        assert [(hit.id, hit.medium) for hit in hits] == [("a", "image"), ("b", "image"), ("b", "text"), ("c", "text")]
        assert [hit.id for hit in index.search(np.ones((1, 3)), 2)[0]] == ["a", "b"]


@pytest.mark.parametrize("kind", ["exact", "hnsw"])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_k_is_a_prefix_of_any_larger_k(kind, data):
    # Few different numbers make copies and ties likely.
    number = st.sampled_from([0.0, 1.0, 2.0])
    row = st.tuples(number, number, number).filter(any)
    rows = data.draw(st.lists(row, min_size=1, max_size=40))
    names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=3)
    ids = data.draw(st.lists(names, unique=True, min_size=len(rows), max_size=len(rows)))
    query = np.array([data.draw(row)])
    with tempfile.TemporaryDirectory() as folder, fill(Path(folder, "i"), np.array(rows), ids, kind) as index:
        everything = index.search(query, len(ids) + 5)[0]
        assert [hit.id for hit in everything] == naive(np.array(rows), ids, query[0], len(ids))
        small = data.draw(st.integers(1, len(ids)))
        assert index.search(query, small)[0] == everything[:small]


def near_corners(rows: int, width: int = 6) -> np.ndarray:
    """All different, in bunches so tight that hundreds of similarities with a query at a corner tie in float32."""
    generator = np.random.default_rng(0)
    return np.eye(width)[generator.integers(width, size=rows)] + 2e-4 * generator.random((rows, width))


@pytest.mark.parametrize("late", [0, 40])
def test_hundreds_of_near_ties_go_by_id_alone_and_in_a_batch(tmp_path, late):
    vectors = near_corners(3000)
    ids = [f"{row:04d}" for row in np.random.default_rng(1).permutation(len(vectors))]
    queries = near_corners(40)
    with fill(tmp_path / "i", vectors[late:], ids[late:], "hnsw") as index:
        assert index.info().media["text"].search == "hnsw"
        if late:
            index.add("text", ids[:late], vectors[:late])
        for k in (1, 10, 11, 60):
            expected = [naive(vectors, ids, query, k) for query in queries]
            assert [[hit.id for hit in hits] for hits in index.search(queries, k)] == expected
            assert [[hit.id for hit in index.search(query[None], k)[0]] for query in queries] == expected


def test_hits_of_a_batch_are_a_sequence_that_stays_as_it_was(tmp_path):
    vectors = np.random.default_rng(0).normal(size=(900, 48))
    with fill(tmp_path / "i", vectors, [f"{row:03d}" for row in range(900)], "hnsw") as index:
        queries = vectors[:30]
        early, late = index.search(queries, 5), index.search(queries, 5)
        for hits in early:
            list(hits)
        index.delete("text", [hits[0].id for hits in early])
        index.compact()
    assert [hits[0].id for hits in early] == [f"{row:03d}" for row in range(30)]
    assert late == early
    one, other = late[0], early[1]
    assert (len(one), one[:2], one[-1]) == (5, [*one][:2], [*one][-1])
    assert one == tuple(one)
    assert one != other
    assert one != "12345"
    assert repr(one) == repr([*one])
    for copied in (pickle.loads(pickle.dumps(one)), copy.copy(one), copy.deepcopy(one)):
        assert (type(copied), copied) == (list, one)
    with pytest.raises(TypeError, match="unhashable"):
        hash(one)


@pytest.mark.parametrize("kind", ["exact", "hnsw"])
def test_a_batch_gives_what_single_queries_give(tmp_path, kind):
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(900, 48))
    with fill(tmp_path / "i", vectors, [f"{row:03d}" for row in range(900)], kind) as index:
        queries = generator.normal(size=(30, 48))
        assert index.search(queries, 10) == [index.search(query[None], 10)[0] for query in queries]
