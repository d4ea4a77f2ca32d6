"""Exact search: one matrix product over the unique vectors of one medium.

Shape letters: N vectors, D width. A float32 product picks a shortlist that provably holds the best k; the shortlist is
then scored in float64 and rounded to float32, so a pair of vectors has one score, whatever the batch size, the k, or
the route (exact or graph) by which it was found.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from dckt.index.vectors import Float32Array, float32_error

# One query over N unique vectors takes about 0.3 ns for each of its N x D numbers and 14 ns for each row, so 0.3 ns for
# each of N x (D + 45) (measured on one busy core at D = 10, 20, 200, 512 and 4096); by column, where that is possible,
# as long or, for few dimensions and for saturated vectors, a quarter of it and less. At this much work that is at most
# half a millisecond: 29,090 vectors at D = 10, 6,530 at D = 200, 2,872 at D = 512. Encoding a query takes ten to a
# hundred times as long, so up to here a graph, at 0.1 to 0.2 ms, has nothing to offer but its build and its misses.
EXACT_WORK = 1_600_000
# A second copy of the vectors, by column, is kept up to this many numbers (32 MiB).
COLUMN_NUMBERS = 2**23
# The orders of the rows along the axes, eight bytes for each number, are kept for up to this many numbers (32 MiB).
BAND_NUMBERS = 2**22
_CHUNK = 8192
_BLAS_WORK = 200_000
_ZERO = np.float32(0)

# An item as it is found: its score with the sign turned (so that sorting puts the best first), its id, and its metadata
# as JSON.
Found: TypeAlias = tuple[float, str, bytes]
# The first items, at most so many, that share a row's vector: id and metadata, ids ascending.
Entries: TypeAlias = Callable[[int, int], Sequence[tuple[str, bytes]]]
IdRanks: TypeAlias = Callable[[], NDArray[np.int64]]
# More rows than this that tie are thinned by the order of their ids, which takes a while to make the first time.
_MANY_TIES = 64


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


class Columns:
    """Rows (N, D) by column: numbers of a query that are 0, or next to it, cost nothing.

    Class probabilities are mostly next to 0, so such a query reads a few of the columns in place of all.
    """

    def __init__(self, matrix: Float32Array) -> None:
        self._columns = np.ascontiguousarray(matrix.T)

    def __len__(self) -> int:
        return int(self._columns.shape[1])

    def products(self, query: Float32Array) -> tuple[Float32Array, float]:
        """Inner products with a unit query (D,) in float32, (N,), and how far what was left out may move them."""
        width = len(self._columns)
        error = float32_error(width)
        # All that is left out is at most as long as the error, and so is its product with a unit vector.
        used = (np.abs(query) > error / width**0.5).nonzero()[0]
        if 2 * len(used) > width:
            return np.asarray(np.einsum("d,dn->n", query, self._columns)), 0.0
        few, columns = query[used], self._columns[used]
        if columns.size <= _BLAS_WORK:
            return few @ columns, error
        return np.asarray(np.einsum("d,dn->n", few, columns)), error


class Bands:
    """Rows (N, D) in their order along each axis: all that are as near to a query as some known row lie in one band.

    Vectors whose product is the cosine of an angle are apart by that angle, and so the angles that they make with any
    axis differ by no more. Queries next to an axis, as those whose class is sure, have thin bands.

    Args:
        matrix: (N, D) float32 of length 1, which never changes.
    """

    def __init__(self, matrix: Float32Array) -> None:
        self._matrix = matrix
        self._axes: dict[int, tuple[NDArray[np.int32], Float32Array]] = {}

    def __len__(self) -> int:
        return len(self._matrix)

    def beside(self, query: Float32Array, count: int) -> NDArray[np.int64]:
        """Up to 2 x ``count`` rows that are beside a unit query (D,) along its main axis."""
        axis = int(np.abs(query).argmax())
        order, numbers = self._axis(axis)
        place = int(numbers.searchsorted(query[axis]))
        return order[max(0, place - count) : place + count].astype(np.int64)

    def rows(self, axis: int, first: int, end: int) -> NDArray[np.int64]:
        """The rows from one place on to another in the order of an axis."""
        return self._axis(axis)[0][first:end].astype(np.int64)

    def band(self, query: Float32Array, floor: float) -> tuple[int, int, int]:
        """An axis, and between which two places in its order every row with a similarity of ``floor`` or more is.

        Args:
            query: (D,) of length 1.
            floor: a similarity, as :func:`similarities` rounds it.
        """
        axis = int(np.abs(query).argmax())
        numbers = self._axis(axis)[1]
        # Lengths differ from 1, and a similarity from its true value, by half of _CLOSE at most.
        number = float(query[axis])
        angle = math.acos(_cosine(floor - 2 * _CLOSE))
        lowest = math.cos(min(math.pi, math.acos(_cosine(number - _CLOSE)) + angle)) - 2 * _CLOSE
        highest = math.cos(max(0.0, math.acos(_cosine(number + _CLOSE)) - angle)) + 2 * _CLOSE
        first = int(numbers.searchsorted(np.float32(lowest)))
        end = int(numbers.searchsorted(np.float32(highest), "right"))
        return axis, first, end

    def _axis(self, axis: int) -> tuple[NDArray[np.int32], Float32Array]:
        found = self._axes.get(axis)
        if found is None:
            numbers = self._matrix[:, axis]
            order = numbers.argsort().astype(np.int32)
            found = self._axes[axis] = order, numbers[order]
        return found


_CLOSE = 2.0**-23


def _cosine(value: float) -> float:
    return min(1.0, max(-1.0, value))


def similarities(matrix: Float32Array, query: Float32Array) -> Float32Array:
    """Cosine similarity of one unit query (D,) with unit rows (N, D): computed in float64, rounded to float32 (N,)."""
    wide = query.astype(np.float64)
    if len(matrix) <= _CHUNK:
        scores: Float32Array = np.vecdot(matrix, wide).astype(np.float32)  # widens the matrix by itself
    else:
        scores = np.empty(len(matrix), dtype=np.float32)
        for start in range(0, len(matrix), _CHUNK):
            scores[start : start + _CHUNK] = np.vecdot(matrix[start : start + _CHUNK], wide)
    scores += _ZERO  # -0.0 becomes 0.0
    return scores


def lowest(values: Float32Array, k: int) -> NDArray[np.int64]:
    """The places of the k lowest of each row's values (Q, N), lowest first, ties by place: (Q, min(k, N))."""
    # Numbers as integers in the same order, and behind each its place, so that sorting is stable without being slow.
    bits = values.view(np.int32)
    keys = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).astype(np.int64) << 32
    keys |= np.arange(values.shape[1])
    if k < values.shape[1]:
        keys = np.partition(keys, k - 1, axis=1)[:, :k]
    keys.sort(axis=1)
    return keys & 0xFFFFFFFF


def shortlist(products: Float32Array, k: int, error: float, counts: NDArray[np.int32]) -> NDArray[np.int64]:
    """Rows that hold the best k items of the true scores, ties of the k-th included.

    Args:
        products: (N,) float32 products; -2 where a row has no items.
        k: how many items; for 0 none is needed.
        error: how far apart two products of one true score can be.
        counts: (N,) how many items share each row.
    """
    if k < 1 or not len(products):
        return np.zeros(0, dtype=np.int64)
    # Collections of copies have k items in the best rows alone, which the best product finds without any sorting.
    best = float(products.max())
    rows = (products >= best - error).nonzero()[0]
    if len(rows) >= k or int(counts[rows].sum()) >= k:
        return rows
    place = max(0, len(products) - k)
    kth = max(float(np.partition(products, place)[place]), -1.5)
    rows = (products >= kth - error).nonzero()[0]
    if len(rows) <= k:
        return rows
    # Where rows have several items, fewer rows do.
    order = np.argsort(-products[rows])
    enough = int(np.searchsorted(counts[rows[order]].cumsum(), k))
    kth = float(products[rows[order[min(enough, len(order) - 1)]]])
    return (products >= kth - error).nonzero()[0]


def ranked(
    rows: NDArray[np.int64], scores: Float32Array, entries: Entries, k: int, id_ranks: IdRanks | None = None
) -> list[Found]:
    """The best k items of some rows: score descending, ties by id ascending.

    Args:
        rows: (M,) which; each has an item.
        scores: (M,) their scores.
        entries: gives the items of a row.
        k: at most this many items.
        id_ranks: gives the place of every row in the order of their first ids; so that of many rows that tie, only
            those are read that matter.
    """
    values = -scores
    if id_ranks is not None and len(rows) > k + _MANY_TIES:
        # Often the best of many rows tie, and need not be sorted to be seen.
        tied = rows[values == values.min()]
        if len(tied) > k + _MANY_TIES:
            best = tied[id_ranks()[tied].argpartition(k - 1)[:k]]
            return ranked_rows(best.tolist(), [float(values.min())] * k, entries, k)
    order = values.argsort(kind="stable")
    values, rows = values[order], rows[order]
    if id_ranks is not None and len(rows) > k + _MANY_TIES:
        # The last of the best k items is in this tie or before it.
        first, end = values.searchsorted(values[k - 1], "left"), values.searchsorted(values[k - 1], "right")
        if end - first > k + _MANY_TIES:
            tied = rows[first:end]
            best = tied[np.argpartition(id_ranks()[tied], k - 1)[:k]]
            rows = np.concatenate([rows[:first], best])
            values = values[: len(rows)]
    return ranked_rows(rows.tolist(), values.tolist(), entries, k)


def ranked_rows(rows: list[int], values: list[float], entries: Entries, k: int) -> list[Found]:
    """As :func:`ranked`, of rows in the order of their scores with the sign turned."""
    found: list[Found] = []
    for row, value in zip(rows, values, strict=True):
        if len(found) >= k and value != found[-1][0]:
            break
        items = entries(row, k)
        if len(items) == 1:
            found.append((value, *items[0]))
        else:
            found += [(value, item, metadata) for item, metadata in items]
    # Ids are different, so metadata are never compared.
    found.sort()
    del found[k:]
    return found
