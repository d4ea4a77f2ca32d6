"""From scores to precision: ranks by one sort of integers, and ties in closed form.

Shape letters: Q queries, N items, H relevant items of all queries together ("hits"), G ties.

A score and its item's relevance are packed into one integer, its *key*, which rises as the score falls. Sorting
keys is some ten times faster than argsort and leaves all that precision needs: the places of the odd keys. For
scores within (-2, 2), all cosines among them, a key is an exact int32, which sorts faster than an int64. In a
sorted row the irrelevant items of a tie come first, so what is read off directly is the **lowest** value that the
order within ties can give.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Float64Array = NDArray[np.float64]
Float32Array = NDArray[np.float32]
IntArray = NDArray[np.int64]
Keys = NDArray[np.int32] | NDArray[np.int64]
BoolArray = NDArray[np.bool_]


def average_precision_bounds(scores: Float32Array, relevant: BoolArray) -> Float64Array:
    """AP over the full list, (Q, 3) float64: expected over a random order within ties, lowest, highest.

    Args:
        scores: (Q, N), not NaN, at least one item; **overwritten**, the fastest memory to work in.
        relevant: (Q, N).
    """
    keys = _sorted_keys(scores, relevant)
    hits = _hits(keys)
    lowest = hits.mean_precision()
    bounds = np.repeat(lowest[:, None], 3, axis=1)
    ties = _mixed_ties(keys, hits)
    if ties.row.size:
        least, expected, most = _sums(ties, _harmonic(keys.shape[1]))
        bounds[:, 0] += ties.mean(expected - least, hits)
        bounds[:, 2] += ties.mean(most - least, hits)
    return bounds


def average_precision_within(scores: Float32Array, relevant: BoolArray, cut: int) -> Float64Array:
    """AP over the first ``cut`` ranks, divided by the relevant items found there, (Q, 3) float64.

    The columns are three orders within ties: the items' own, irrelevant ones first, relevant ones first.

    Args:
        scores: (Q, N), not NaN, at least one item; overwritten.
        relevant: (Q, N).
        cut: how many ranks, at least 1.
    """
    bits = _falling_bits(scores).astype(np.int64)
    columns = []
    for tie_break in (np.arange(bits.shape[1]), relevant, ~relevant):
        keys = bits << 32 | tie_break.astype(np.int64) << 1 | relevant
        keys.sort(axis=1)
        hits = _hits(keys[:, :cut])
        columns.append(hits.mean_precision())
    return np.stack(columns, axis=1)


def interpolated_precision(scores: Float32Array, relevant: BoolArray, points: int) -> Float64Array:
    """Highest precision from each of ``points`` levels of recall on, (Q, points) float64; 0 without a relevant item.

    Irrelevant items of a tie come first. Within a tie precision then only rises, so its highest value from a level on
    is one after a whole tie: the order within ties has no say.

    Args:
        scores: (Q, N), not NaN, at least one item; overwritten.
        relevant: (Q, N).
        points: levels, evenly from 0 to 1; at least 2.
    """
    hits = _hits(_sorted_keys(scores, relevant))
    curves = np.zeros((len(scores), points))
    for row in np.flatnonzero(hits.total):
        own = hits.precision[hits.first[row] : hits.first[row + 1]]
        best = np.maximum.accumulate(own[::-1])[::-1]
        # In integers: a level is reached with the first hit that brings recall to it, and rounding must not delay that.
        reached = -(-np.arange(points) * own.size // (points - 1))
        curves[row] = best[np.maximum(reached, 1) - 1]
    return curves


# --- keys -----------------------------------------------------------------------------------------------------


def _falling_bits(scores: Float32Array) -> NDArray[np.int32]:
    """Integers in the reverse order of the scores, in the scores' own memory. |score| < 2 gives -2^30 to 2^30 - 1."""
    bits = scores.view(np.int32)
    if bits.min() >= 0:  # no score is negative, as with probabilities: one step instead of four
        return np.invert(bits, out=bits)
    bits = np.subtract(np.float32(0), scores, out=scores).view(np.int32)  # this way round -0.0 and 0.0 become one
    flip = bits >> 31  # the bits of negative floats fall as the float rises
    flip &= 0x7FFFFFFF
    bits ^= flip
    return bits


def _sorted_keys(scores: Float32Array, relevant: BoolArray) -> Keys:
    """Each row's keys in rising order: twice the falling bits, plus 1 if relevant."""
    bits = _falling_bits(scores)
    narrow = bits.min() >= -(1 << 30) and bits.max() < (1 << 30) - 1  # leaves room for a largest key plus 1
    keys: Keys = bits if narrow else bits.astype(np.int64)
    keys <<= 1
    keys |= relevant
    keys.sort(axis=1)
    return keys


# --- hits -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Hits:
    """The relevant items of ranked rows, row by row, the best first.

    Attributes:
        place: (H,) where in the flattened keys.
        rank: (H,) in its row, from 1.
        nth: (H,) how many hits its row has up to it.
        first: (Q + 1,) each row's first hit, as a place in the arrays above.
        total: (Q,) hits of each row.
        precision: (H,) at each hit's rank.
    """

    place: IntArray
    rank: IntArray
    nth: IntArray
    first: IntArray
    total: IntArray
    precision: Float64Array

    def mean_precision(self) -> Float64Array:
        """Of each row, (Q,); 0 for a row without hits."""
        means = np.zeros(self.total.size)
        found = np.flatnonzero(self.total)
        if found.size:
            means[found] = np.add.reduceat(self.precision, self.first[found]) / self.total[found]
        return means

    def rows(self, hits: IntArray) -> IntArray:
        """The rows of some hits, given as places in the arrays above and in rising order."""
        return self.first.searchsorted(hits, side="right") - 1


def _hits(keys: Keys) -> _Hits:
    rows, width = keys.shape
    place = np.flatnonzero((keys.astype(np.uint8) & 1).view(np.bool_))  # bytes: a quarter of the memory
    begins = np.arange(rows + 1) * width
    first = place.searchsorted(begins)
    total = np.diff(first)
    rank = place + np.repeat(1 - begins[:-1], total)
    nth = np.arange(1, place.size + 1) - np.repeat(first[:-1], total)
    return _Hits(place, rank, nth, first, total, precision=nth / rank)


# --- ties -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Ties:
    """Ties that hold relevant and irrelevant items, the only ones whose order matters; (G,) each.

    Attributes:
        row: whose.
        n: items.
        r: relevant items.
        n0: items before the tie.
        r0: relevant items before it.
    """

    row: IntArray
    n: IntArray
    r: IntArray
    n0: IntArray
    r0: IntArray

    def mean(self, sums: Float64Array, hits: _Hits) -> Float64Array:
        """What the ties add to the mean of each row's precisions, (Q,)."""
        means: Float64Array = np.bincount(self.row, weights=sums, minlength=hits.total.size) / np.maximum(hits.total, 1)
        return means


def _mixed_ties(keys: Keys, hits: _Hits) -> _Ties:
    flat = keys.ravel()
    # In a mixed tie the first hit follows an irrelevant item whose key is just 1 less.
    join = np.flatnonzero(flat.take(hits.place) - flat.take(hits.place - 1) == 1)
    join = join[hits.rank[join] > 1]  # the best item of a row has the row before in front of it
    key, row = flat[hits.place[join]], hits.rows(join)
    neighbours = np.stack([key - 1, key + 1], axis=1)  # the tie's irrelevant items, and what is just behind it
    span = np.empty(neighbours.shape, np.int64)
    of_row = row.searchsorted(np.arange(len(keys) + 1))
    for index in np.flatnonzero(np.diff(of_row)):
        here = slice(of_row[index], of_row[index + 1])
        span[here] = keys[index].searchsorted(neighbours[here])
    begin, end = span.T
    return _Ties(row=row, n=end - begin, r=end + 1 - hits.rank[join], n0=begin, r0=hits.nth[join] - 1)


def _sums(ties: _Ties, harmonic: NDArray[np.longdouble]) -> tuple[Float64Array, Float64Array, Float64Array]:
    """The sum of precisions at a tie's relevant items: lowest, expected, highest, (G,) each.

    Let a tie have n items, r of them relevant, with n0 items and r0 relevant ones before it. Its i-th place
    holds a relevant item with probability r / n, and if it does, then c (i - 1) of the places before it in the
    tie do on average, with c = (r - 1) / (n - 1). So the tie adds (r / n) times the sum over i = 1..n of
    (r0 + 1 + c (i - 1)) / (n0 + i). That sum, and those of the two extreme orders, have closed forms in the
    harmonic numbers H.
    """
    n, r, n0, r0 = ties.n, ties.r, ties.n0, ties.r0

    def step(begin: IntArray, length: IntArray) -> Float64Array:
        difference: Float64Array = (harmonic[begin + length] - harmonic[begin]).astype(np.float64)
        return difference

    skipped = n0 + n - r
    c = (r - 1) / (n - 1)
    lowest = r + (r0 - skipped) * step(skipped, r)
    expected = r / n * (c * n + (r0 + 1 - c - c * n0) * step(n0, n))
    highest = r + (r0 - n0) * step(n0, r)
    return lowest, expected, highest


@lru_cache(maxsize=2)
def _harmonic(count: int) -> NDArray[np.longdouble]:
    """Harmonic numbers H(0) to H(count), in the widest float there is, because close ones are subtracted."""
    return np.append(0, (1 / np.arange(1, count + 1, dtype=np.longdouble)).cumsum())
