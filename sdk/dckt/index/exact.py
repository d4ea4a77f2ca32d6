"""Exact search: one matrix product over the unique vectors of one medium.

Shape letters: N vectors, D width. A float32 product picks a shortlist that provably holds the best k; the shortlist is
then scored in float64 and rounded to float32, so a pair of vectors has one score, whatever the batch size, the k, or
the route (exact or graph) by which it was found.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import merge
from itertools import groupby, islice

import numpy as np
from numpy.typing import NDArray

from dckt.index.vectors import Float32Array, float32_error

# One query over N unique vectors takes about 0.3 ns for each of its N x D numbers and 14 ns for each row, so 0.3 ns for
# each of N x (D + 45) (measured on one busy core at D = 10, 20, 200, 512 and 4096). At this much work that is half a
# millisecond: 29,090 vectors at D = 10, 6,530 at D = 200, 2,872 at D = 512. Encoding a query takes ten to a hundred
# times as long, so up to here a graph, at 0.1 to 0.3 ms, has nothing to offer but its build and its misses.
EXACT_WORK = 1_600_000
_CHUNK = 8192


def exact_limit(dimension: int) -> int:
    """Up to how many unique vectors ``auto`` searches exactly."""
    return EXACT_WORK // (dimension + 45)


def products(matrix: Float32Array, queries: Float32Array) -> Float32Array:
    """Inner products of queries (Q, D) with rows (N, D), in float32: (Q, N).

    A single query does not go through BLAS: that would share so little work among threads that on a busy machine it
    waits for them ten times longer than the work takes.
    """
    if len(queries) == 1:
        return np.asarray(np.einsum("nd,d->n", matrix, queries[0]))[None]
    return queries @ matrix.T


def similarities(matrix: Float32Array, query: Float32Array) -> Float32Array:
    """Cosine similarity of one unit query (D,) with unit rows (N, D): computed in float64, rounded to float32 (N,)."""
    wide = query.astype(np.float64)
    scores = np.empty(len(matrix), dtype=np.float32)
    for start in range(0, len(matrix), _CHUNK):
        scores[start : start + _CHUNK] = np.einsum("nd,d->n", matrix[start : start + _CHUNK].astype(np.float64), wide)
    return scores + np.float32(0)


def shortlist(products: Float32Array, k: int, dimension: int) -> NDArray[np.int64]:
    """Rows that hold the best k of the true scores, ties of the k-th included.

    Args:
        products: (N,) float32 products of unit vectors of width ``dimension``.
        k: how many; for 0 none is needed.
        dimension: the width D.
    """
    count = len(products)
    if k < 1:
        return np.zeros(0, dtype=np.int64)
    if k >= count:
        return np.arange(count)
    kth = np.partition(products, count - k)[count - k]
    return np.flatnonzero(products >= kth - float32_error(dimension))


def ranked(
    rows: NDArray[np.int64], scores: Float32Array, postings: Sequence[Sequence[str]], k: int
) -> list[tuple[float, str]]:
    """The best k items of some unique vectors: (score, id), score descending, ties by id ascending.

    Args:
        rows: (M,) which vectors.
        scores: (M,) their scores.
        postings: for every vector the ids of the items that share it, in ascending order.
        k: at most this many items.
    """
    order = np.argsort(-scores, kind="stable")
    hits: list[tuple[float, str]] = []
    pairs = zip(scores[order].tolist(), rows[order].tolist(), strict=True)
    for score, group in groupby(pairs, key=lambda pair: pair[0]):
        ids = merge(*(postings[row] for _, row in group))
        hits.extend((score, item) for item in islice(ids, k - len(hits)))
        if len(hits) == k:
            break
    return hits
