"""Average precision and MAP: exact, fast, and honest about ties.

Shape letters: Q queries, N items, D width. The definition of methods in cross-media retrieval: AP of a query
is the mean, over the relevant items, of the precision at each one's rank; MAP is the mean over queries.

Vectors of class probabilities tie often, and the order within ties alone can move MAP by several tenths. So
AP is its **expectation** over a random order within each tie, beside the lowest and the highest value that
any order gives. Scores tie when they are equal as float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dckt.errors import ConfigError, ItemError

Float64Array = NDArray[np.float64]
Float32Array = NDArray[np.float32]
BoolArray = NDArray[np.bool_]

# Scores handled at once: a matrix product wants many queries, a sort working memory that stays in the cache.
_PRODUCT, _SORT = 1 << 23, 1 << 17


@dataclass(frozen=True)
class APResult:
    """Average precision of each query, all (Q,) float64.

    Attributes:
        expected: over a random order within ties.
        lowest: with the irrelevant items of each tie first.
        highest: with the relevant items of each tie first.
    """

    expected: Float64Array
    lowest: Float64Array
    highest: Float64Array


@dataclass(frozen=True)
class MAPResult:
    """Mean average precision of one direction.

    Attributes:
        map: mean of the expected AP.
        lowest: mean of the lowest AP, the worst that the order within ties can do.
        highest: mean of the highest AP.
        queries: how many queries the means are over.
        without_relevant: how many of them have no relevant item; each counts as 0.
        definition: what was computed, in words, to be printed beside the figures.
        per_query: expected AP of each query, (Q,) float64.
    """

    map: float
    lowest: float
    highest: float
    queries: int
    without_relevant: int
    definition: str
    per_query: Float64Array = field(repr=False, compare=False)


@dataclass(frozen=True)
class CrossMediaMAP:
    """MAP of both directions.

    Attributes:
        image_to_text: every image as a query for the texts.
        text_to_image: every text as a query for the images.
    """

    image_to_text: MAPResult
    text_to_image: MAPResult

    @property
    def average(self) -> float:
        """The plain mean of both directions."""
        return (self.image_to_text.map + self.text_to_image.map) / 2


def average_precision(scores: ArrayLike, relevant: ArrayLike, *, cut: int | None = None) -> APResult:
    """Average precision of each row of scores, higher scores first.

    >>> result = average_precision([[6, 5, 4, 3, 2, 1]], [[True, False, True, False, False, True]])
    >>> result.expected.round(4).tolist()
    [0.7222]

    Args:
        scores: (Q, N), converted to float32; not NaN.
        relevant: (Q, N) bool.
        cut: look at the first ``cut`` ranks only. As is the custom in this field, the sum is then divided by
            the number of relevant items **found** there, and AP is 0 if there is none. With a cut,
            ``expected`` takes ties in the order of the items, and ``lowest`` and ``highest`` put the
            irrelevant or the relevant ones of a tie first; because finding more may lower this AP, they are
            those orders' values and not bounds.

    Returns:
        AP in 0..1; a query without a relevant item has 0.

    Raises:
        ItemError: the shapes differ, or a score is NaN.
        ConfigError: ``cut`` is below 1.
    """
    scores, relevant = np.asarray(scores), np.asarray(relevant)
    if scores.ndim != 2 or relevant.shape != scores.shape or relevant.dtype != np.bool_:
        raise ItemError(
            f"scores {scores.shape} and relevant {relevant.dtype} {relevant.shape}; "
            "expected two arrays (queries, items), the second of bool"
        )
    _check_cut(cut)
    return _ap(scores.astype(np.float32, copy=False), relevant, cut)


def mean_average_precision(
    queries: ArrayLike,
    query_labels: ArrayLike,
    items: ArrayLike,
    item_labels: ArrayLike,
    *,
    cut: int | None = None,
    exclude_self: bool = False,
) -> MAPResult:
    """MAP of ranking items by cosine similarity, where an item of the query's label is relevant.

    Items with equal vectors tie exactly, because each different vector is compared once. A vector of zeros
    has similarity 0 to everything.

    Args:
        queries: (Q, D) floats.
        query_labels: (Q,) integers or strings.
        items: (N, D) floats.
        item_labels: (N,) of the same kind.
        cut: see :func:`average_precision`.
        exclude_self: queries and items are the same things in the same order, and none is an answer to
            itself.

    Raises:
        ItemError: shapes that do not fit, no query, no item, or numbers that are not finite.
        ConfigError: ``cut`` is below 1.
    """
    _check_cut(cut)
    query_rows, query_codes, item_rows, item_codes = _checked(queries, query_labels, items, item_labels)
    if exclude_self and len(query_rows) != len(item_rows):
        raise ItemError(
            f"exclude_self with {len(query_rows)} queries and {len(item_rows)} items; they must be the same things"
        )
    unique, place = _unique_rows(item_rows)
    parts = []
    for rows in _chunks(len(query_rows), len(item_rows), _PRODUCT):
        scores = query_rows[rows] @ unique.T
        if len(unique) < len(item_rows):  # else both are in the same order
            scores = scores[:, place]
        relevant = query_codes[rows, None] == item_codes
        if exclude_self:
            own = np.arange(len(query_rows))[rows]
            # Behind everything else, and irrelevant: without effect.
            scores[np.arange(len(own)), own] = -np.inf
            relevant[np.arange(len(own)), own] = False
        parts.append(_ap(scores, relevant, cut))
    result = _joined(parts)
    answers = np.bincount(item_codes, minlength=query_codes.max() + 1)[query_codes] - exclude_self
    return MAPResult(
        map=float(result.expected.mean()),
        lowest=float(result.lowest.mean()),
        highest=float(result.highest.mean()),
        queries=len(query_rows),
        without_relevant=int((answers == 0).sum()),
        definition=_definition(cut, exclude_self),
        per_query=result.expected,
    )


def cross_media_map(image: ArrayLike, text: ArrayLike, labels: ArrayLike, *, cut: int | None = None) -> CrossMediaMAP:
    """MAP of images searching texts and of texts searching images.

    Args:
        image: (N, D) vectors of the images.
        text: (N, D) vectors of the texts; row i belongs to the same pair as row i of ``image``.
        labels: (N,) label of each pair.
        cut: see :func:`average_precision`.

    Raises:
        ItemError: see :func:`mean_average_precision`.
        ConfigError: ``cut`` is below 1.
    """
    return CrossMediaMAP(
        image_to_text=mean_average_precision(image, labels, text, labels, cut=cut),
        text_to_image=mean_average_precision(text, labels, image, labels, cut=cut),
    )


def bootstrap_interval(
    per_query: ArrayLike, *, share: float = 0.95, samples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean over queries.

    Args:
        per_query: (Q,) AP of each query.
        share: how much of the bootstrap distribution lies inside.
        samples: how many times the queries are drawn anew.
        seed: of the draws.

    Raises:
        ItemError: there is no query.
        ConfigError: ``share`` is not between 0 and 1, or there is no sample.
    """
    values = np.asarray(per_query, dtype=np.float64)
    if values.ndim != 1 or not values.size:
        raise ItemError(f"per_query has shape {values.shape}; expected one number for each of at least one query")
    if not 0 < share < 1 or samples < 1:
        raise ConfigError(f"share is {share} and samples {samples}; expected 0 < share < 1 and at least 1 sample")
    generator = np.random.default_rng(seed)
    means = [values[generator.integers(values.size, size=values.size)].mean() for _ in range(samples)]
    low, high = np.quantile(means, [(1 - share) / 2, (1 + share) / 2])
    return float(low), float(high)


# --- ranking --------------------------------------------------------------------------------------------------


def _ap(scores: Float32Array, relevant: BoolArray, cut: int | None) -> APResult:
    bad = np.isnan(scores).any(axis=1)
    if bad.any():
        raise ItemError(f"scores hold NaN in rows {np.flatnonzero(bad)[:10].tolist()}")
    if scores.shape[1] == 0:
        return APResult(*np.zeros((3, len(scores))))
    chunks = _chunks(len(scores), scores.shape[1], _SORT)
    return _joined([_chunk_ap(scores[rows], relevant[rows], cut) for rows in chunks])


def _chunk_ap(scores: Float32Array, relevant: BoolArray, cut: int | None) -> APResult:
    if cut is None:
        return _ap_of_groups(_sorted_keys(scores, relevant, np.zeros((1, 1), np.bool_)))
    order = np.arange(scores.shape[1])[None]
    expected, lowest, highest = (
        _ap_within(_sorted_keys(scores, relevant, tie_break), cut) for tie_break in (order, relevant, ~relevant)
    )
    return APResult(expected, lowest, highest)


def _sorted_keys(scores: Float32Array, relevant: BoolArray, tie_break: NDArray[Any]) -> NDArray[np.int64]:
    """Score, tie-break and relevance packed into one integer: sorting it is several times faster than argsort.

    Bits 32 to 63 fall as the score rises, bits 1 to 31 are the tie-break, bit 0 is the relevance.
    """
    bits = (np.float32(0) - scores).view(np.int32)  # this way round -0.0 and 0.0 become one
    bits ^= (bits >> 31) & 0x7FFFFFFF  # the order of floats, as integers
    keys = bits.astype(np.int64)
    keys <<= 32
    keys |= tie_break.astype(np.int64) << 1
    keys |= relevant
    keys.sort(axis=1)
    return keys


def _ap_within(keys: NDArray[np.int64], cut: int) -> Float64Array:
    hit = keys[:, :cut] & 1
    precision = hit.cumsum(axis=1) / np.arange(1, hit.shape[1] + 1)
    return np.asarray((precision * hit).sum(axis=1) / np.maximum(hit.sum(axis=1), 1))


def _ap_of_groups(keys: NDArray[np.int64]) -> APResult:
    """AP over the full list, from the groups of tied items that hold a relevant one.

    Let a group have n items, r of them relevant, with n0 items and r0 relevant ones before it. Its i-th place
    holds a relevant item with probability r / n, and if it does, then c (i - 1) of the places before it in the
    group do on average, with c = (r - 1) / (n - 1). So the group adds (r / n) times the sum over i = 1..n of
    (r0 + 1 + c (i - 1)) / (n0 + i). That sum, and those of the two extreme orders, have closed forms in the
    harmonic numbers H.
    """
    rows, width = keys.shape
    flat = keys.ravel()
    hit = np.flatnonzero((flat & 1).astype(np.bool_))
    score = flat >> 32
    first = np.append(True, score[1:] != score[:-1])
    first[::width] = True
    start = np.flatnonzero(first)
    group = np.searchsorted(start, hit, side="right") - 1
    first_hit = np.flatnonzero(np.diff(group, prepend=-1))  # of each group that has one, as a place in `hit`
    group = group[first_hit]

    r = np.diff(first_hit, append=hit.size)
    n = np.append(start, flat.size)[group + 1] - start[group]
    row, n0 = np.divmod(start[group], width)
    total = np.bincount(row, weights=r, minlength=rows)
    r0 = first_hit - (total.cumsum() - total)[row]
    harmonic = _harmonic(width)

    def step(begin: NDArray[np.int64], length: NDArray[np.int64]) -> Float64Array:
        difference: Float64Array = (harmonic[begin + length] - harmonic[begin]).astype(np.float64)
        return difference

    def ap(sums: Float64Array) -> Float64Array:
        mean: Float64Array = np.bincount(row, weights=sums, minlength=rows) / np.maximum(total, 1)
        return mean

    c = (r - 1) / np.maximum(n - 1, 1)
    skipped = n0 + n - r
    return APResult(
        expected=ap(r / n * (c * n + (r0 + 1 - c - c * n0) * step(n0, n))),
        lowest=ap(r + (r0 - skipped) * step(skipped, r)),
        highest=ap(r + (r0 - n0) * step(n0, r)),
    )


@lru_cache(maxsize=2)
def _harmonic(count: int) -> NDArray[np.longdouble]:
    """Harmonic numbers H(0) to H(count), in the widest float there is, because close ones are subtracted."""
    return np.append(0, (1 / np.arange(1, count + 1, dtype=np.longdouble)).cumsum())


# --- input --------------------------------------------------------------------------------------------------


def _checked(
    queries: ArrayLike, query_labels: ArrayLike, items: ArrayLike, item_labels: ArrayLike
) -> tuple[Float32Array, NDArray[np.intp], Float32Array, NDArray[np.intp]]:
    query_rows, item_rows = _unit_rows(queries, "queries"), _unit_rows(items, "items")
    if query_rows.shape[1] != item_rows.shape[1]:
        raise ItemError(f"queries have width {query_rows.shape[1]}, items {item_rows.shape[1]}; expected one width")
    query_names, item_names = np.asarray(query_labels), np.asarray(item_labels)
    if query_names.shape != query_rows.shape[:1] or item_names.shape != item_rows.shape[:1]:
        raise ItemError(
            f"labels {query_names.shape} and {item_names.shape} for {len(query_rows)} queries and {len(item_rows)} "
            "items; expected one label for each"
        )
    if query_names.dtype.kind != item_names.dtype.kind:
        raise ItemError(
            f"labels are {query_names.dtype} for queries and {item_names.dtype} for items; expected one kind"
        )
    codes = np.unique(np.concatenate([query_names, item_names]), return_inverse=True)[1]
    return query_rows, codes[: len(query_rows)], item_rows, codes[len(query_rows) :]


def _unit_rows(vectors: ArrayLike, what: str) -> Float32Array:
    rows = np.asarray(vectors)
    if rows.ndim != 2 or 0 in rows.shape or rows.dtype.kind not in "fiu":
        raise ItemError(f"{what} are {rows.dtype} {rows.shape}; expected numbers (at least one row, width)")
    if not np.isfinite(rows).all():
        bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))[:10].tolist()
        raise ItemError(f"{what} hold numbers that are not finite, in rows {bad}")
    wide = rows.astype(np.float64)
    norms = np.linalg.norm(wide, axis=1, keepdims=True)
    return (wide / np.where(norms > 0, norms, 1)).astype(np.float32)


def _unique_rows(rows: Float32Array) -> tuple[Float32Array, NDArray[np.intp]]:
    """Different rows, and for each row its place among them. BLAS may score equal rows one bit apart."""
    plain = np.ascontiguousarray(rows + np.float32(0))
    as_bytes = plain.view(np.dtype((np.void, plain.dtype.itemsize * plain.shape[1]))).ravel()
    _, first, place = np.unique(as_bytes, return_index=True, return_inverse=True)
    if first.size == len(rows):
        return plain, np.arange(len(rows))
    return plain[first], place


def _chunks(queries: int, items: int, size: int) -> Sequence[slice]:
    step = max(1, size // max(1, items))
    return [slice(start, start + step) for start in range(0, queries, step)]


def _joined(parts: Sequence[APResult]) -> APResult:
    nothing: list[Float64Array] = [np.zeros(0)]
    return APResult(
        expected=np.concatenate([part.expected for part in parts] or nothing),
        lowest=np.concatenate([part.lowest for part in parts] or nothing),
        highest=np.concatenate([part.highest for part in parts] or nothing),
    )


def _check_cut(cut: int | None) -> None:
    if cut is not None and cut < 1:
        raise ConfigError(f"cut is {cut}; expected at least 1, or None for the full list")


def _definition(cut: int | None, exclude_self: bool) -> str:
    if cut is None:
        ap = "MAP@all: AP is divided by all relevant items; ties count by their expectation"
    else:
        ap = f"MAP@{cut}: AP is divided by the relevant items found within {cut}; ties in item order"
    own = "; a query is no answer to itself" if exclude_self else ""
    return f"{ap}; cosine similarity; relevant = same label; a query without relevant items counts as 0{own}"
