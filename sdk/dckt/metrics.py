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
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dckt.errors import ConfigError, ItemError

Float64Array = NDArray[np.float64]
Float32Array = NDArray[np.float32]
BoolArray = NDArray[np.bool_]

# Scores handled at once: a few tens of megabytes of working memory, and rows that stay in the cache.
_CHUNK = 1 << 20


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
    parts = [
        _ap(scores[rows].astype(np.float32), relevant[rows], cut) for rows in _chunks(len(scores), scores.shape[1])
    ]
    return _joined(parts)


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
    for rows in _chunks(len(query_rows), len(item_rows)):
        scores = (query_rows[rows] @ unique.T)[:, place]
        relevant = query_codes[rows, None] == item_codes
        if exclude_self:
            own = np.arange(len(query_rows))[rows]
            # Behind everything else, and irrelevant: without effect.
            scores[np.arange(len(own)), own] = -np.inf
            relevant[np.arange(len(own)), own] = False
        parts.append(_ap(scores, relevant, cut))
    result = _joined(parts)
    # An AP is 0 exactly if nothing relevant was ranked, or within the cut found; only the first is meant
    # here.
    found = np.isin(query_codes, item_codes)
    if exclude_self:
        found = np.bincount(item_codes)[query_codes] > 1
    return MAPResult(
        map=float(result.expected.mean()),
        lowest=float(result.lowest.mean()),
        highest=float(result.highest.mean()),
        queries=len(query_rows),
        without_relevant=int((~found).sum()),
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


# --- one chunk ----------------------------------------------------------------------------------------------


def _ap(scores: Float32Array, relevant: BoolArray, cut: int | None) -> APResult:
    if np.isnan(scores).any():
        raise ItemError(f"a score of query {int(np.isnan(scores).any(axis=1).argmax())} of its chunk is NaN")
    if scores.size == 0:
        nothing = np.zeros(len(scores))
        return APResult(nothing, nothing, nothing)
    if cut is not None:
        order = np.arange(scores.shape[1], dtype=np.uint64)[None]
        return APResult(
            *(_ap_within(_sorted_keys(scores, relevant, tie_break), cut) for tie_break in (order, relevant, ~relevant))
        )
    return _ap_of_groups(_sorted_keys(scores, relevant, np.zeros((1, 1), np.uint64)))


def _sorted_keys(scores: Float32Array, relevant: BoolArray, tie_break: NDArray[Any]) -> NDArray[np.uint64]:
    """Score, tie-break and relevance packed into one integer: sorting it is several times faster than argsort.

    Bits 32 to 63 fall as the score rises, bits 1 to 31 are the tie-break, bit 0 is the relevance.
    """
    bits = (scores + np.float32(0)).view(np.uint32)  # + 0 makes -0.0 equal to 0.0
    rising = bits ^ np.where(bits >> 31, np.uint32(0xFFFFFFFF), np.uint32(0x80000000))
    keys = (~rising).astype(np.uint64) << np.uint64(32)
    keys |= tie_break.astype(np.uint64) << np.uint64(1)
    keys |= relevant
    keys.sort(axis=1)
    return keys


def _ap_within(keys: NDArray[np.uint64], cut: int) -> Float64Array:
    hit = (keys[:, :cut] & np.uint64(1)).astype(np.int64)
    precision = hit.cumsum(axis=1) / np.arange(1, hit.shape[1] + 1)
    total: Float64Array = (precision * hit).sum(axis=1) / np.maximum(hit.sum(axis=1), 1)
    return total


def _ap_of_groups(keys: NDArray[np.uint64]) -> APResult:
    """AP over the full list from the groups of tied items that hold a relevant one.

    A group of n items, r of them relevant, with N0 items and R0 relevant ones before it: its i-th place holds
    a relevant item with probability r / n, and if it does, (i - 1)(r - 1)/(n - 1) of the places before it in
    the group do on average.
    """
    rows, width = keys.shape
    hits = (keys & np.uint64(1)).astype(np.int64)
    score = (keys >> np.uint64(32)).astype(np.uint32)
    first = np.ones(keys.shape, np.bool_)
    first[:, 1:] = score[:, 1:] != score[:, :-1]
    start = np.flatnonzero(first)
    size = np.diff(start, append=keys.size)
    found = np.add.reduceat(hits.ravel(), start)
    row = start // width
    total = hits.sum(axis=1)
    before = found.cumsum() - found - (total.cumsum() - total)[row]

    kept = found > 0
    row, n, r, n0, r0 = row[kept], size[kept], found[kept], (start % width)[kept], before[kept]

    def ap(repeats: NDArray[np.int64], terms: Float64Array) -> Float64Array:
        summed = np.bincount(np.repeat(row, repeats), weights=terms, minlength=rows)
        return summed / np.maximum(total, 1)

    def spread(repeats: NDArray[np.int64], *columns: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        within = np.arange(repeats.sum()) - np.repeat(repeats.cumsum() - repeats, repeats)
        return [within + 1, *(np.repeat(column, repeats) for column in columns)]

    t, t_n, t_r, t_n0, t_r0 = spread(r, n, r, n0, r0)
    highest = ap(r, (t_r0 + t) / (t_n0 + t))
    lowest = ap(r, (t_r0 + t) / (t_n0 + t_n - t_r + t))
    i, i_n, i_r, i_n0, i_r0 = spread(n, n, r, n0, r0)
    neighbours = (i - 1) * (i_r - 1) / np.maximum(i_n - 1, 1)
    expected = ap(n, i_r / i_n * (i_r0 + 1 + neighbours) / (i_n0 + i))
    return APResult(expected, lowest, highest)


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
    return plain[first], place


def _chunks(queries: int, items: int) -> Sequence[slice]:
    step = max(1, _CHUNK // max(1, items))
    return [slice(start, start + step) for start in range(0, queries, step)]


def _joined(parts: Sequence[APResult]) -> APResult:
    if not parts:
        return APResult(np.zeros(0), np.zeros(0), np.zeros(0))
    return APResult(
        expected=np.concatenate([part.expected for part in parts]),
        lowest=np.concatenate([part.lowest for part in parts]),
        highest=np.concatenate([part.highest for part in parts]),
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
