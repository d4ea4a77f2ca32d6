"""Average precision, MAP and precision by recall: exact, fast, and honest about ties.

Shape letters: Q queries, N items, D width. The definition of methods in cross-media retrieval: AP of a query
is the mean, over the relevant items, of the precision at each one's rank; MAP is the mean over queries.

Vectors of class probabilities tie often, and the order within ties alone can move MAP by several tenths. So
AP is its **expectation** over a random order within each tie, beside the lowest and the highest value that
any order gives. Scores tie when they are equal as float32.

Work is spread over the cores, or over as many as ``OMP_NUM_THREADS`` says.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from threadpoolctl import ThreadpoolController

from dckt.errors import ConfigError, ItemError
from dckt.ranking import (
    BoolArray,
    Float32Array,
    Float64Array,
    average_precision_bounds,
    average_precision_within,
    interpolated_precision,
)

# Scores handled at once, of a product and of a sort: both want working memory that stays in the cache.
_PRODUCT, _SORT = 1 << 20, 1 << 18
_FEWEST_QUERIES = 64  # of a matrix product, which reads all items
_FEWEST_PARTS = 2  # of the products, or of the sorts, that are worth threads

# Saturated class probabilities have products far below 1e-38, and subnormal numbers slow a processor down up to a
# hundredfold. So both factors of a product carry this power of two, which changes no other bit of it.
_SCALE = 2.0**60


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
class LabelMAP:
    """Mean average precision of the queries of one label.

    Attributes:
        map: mean of their AP.
        queries: how many they are.
    """

    map: float
    queries: int


@dataclass(frozen=True)
class PrecisionRecallCurve:
    """Mean interpolated precision by recall.

    Attributes:
        recall: (P,) float64, evenly from 0 to 1.
        precision: (P,) float64, the mean over queries at each level of recall.
    """

    recall: Float64Array
    precision: Float64Array


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
    scores = scores.astype(np.float32, copy=False)
    bad = np.isnan(scores).any(axis=1)
    if bad.any():
        raise ItemError(f"scores hold NaN in rows {np.flatnonzero(bad)[:10].tolist()}")
    if not scores.size:
        return APResult(*np.zeros((3, len(scores))))
    chunks = _chunks(len(scores), scores.shape[1], _SORT)
    bounds = _spread(
        lambda some, hits: _bounds(some.copy(), hits, cut),
        [scores[rows] for rows in chunks],
        [relevant[rows] for rows in chunks],
    )
    return APResult(*np.concatenate(bounds).T)


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
    comparison = _checked(queries, query_labels, items, item_labels)
    asked, found = comparison.query_codes, comparison.item_codes
    if exclude_self and len(asked) != len(found):
        raise ItemError(f"exclude_self with {len(asked)} queries and {len(found)} items; they must be the same things")
    expected, lowest, highest = _measured(
        comparison, lambda scores, relevant: _bounds(scores, relevant, cut), exclude_self=exclude_self
    ).T
    answers = np.bincount(found, minlength=asked.max() + 1)[asked] - exclude_self
    return MAPResult(
        map=float(expected.mean()),
        lowest=float(lowest.mean()),
        highest=float(highest.mean()),
        queries=len(asked),
        without_relevant=int((answers == 0).sum()),
        definition=_definition(cut, exclude_self),
        per_query=expected,
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


def precision_recall_curve(
    queries: ArrayLike, query_labels: ArrayLike, items: ArrayLike, item_labels: ArrayLike, *, points: int = 11
) -> PrecisionRecallCurve:
    """Interpolated precision at even levels of recall, the mean over queries, ranked and judged as for MAP.

    A query's precision and recall are taken after each different score, so that a tie counts as a whole and the order
    within it has no say. Interpolated precision at a level is the highest precision at that recall or a higher one. A
    query without a relevant item counts as 0.

    >>> curve = precision_recall_curve([[1, 0]], ["a"], [[1, 0], [1, 1], [0, 1]], ["a", "b", "a"], points=3)
    >>> curve.recall.tolist(), curve.precision.round(4).tolist()
    ([0.0, 0.5, 1.0], [1.0, 1.0, 0.6667])

    Args:
        queries: see :func:`mean_average_precision`, also for the next three.
        query_labels: of the queries.
        items: what is ranked.
        item_labels: of the items.
        points: how many levels of recall, from 0 to 1.

    Raises:
        ItemError: see :func:`mean_average_precision`.
        ConfigError: ``points`` is below 2.
    """
    if points < 2:
        raise ConfigError(f"points is {points}; expected at least 2, for the levels 0 and 1")
    curves = _measured(
        _checked(queries, query_labels, items, item_labels),
        lambda scores, relevant: interpolated_precision(scores, relevant, points),
    )
    return PrecisionRecallCurve(recall=np.linspace(0, 1, points), precision=curves.mean(axis=0))


def instance_recall(scores: ArrayLike, *, cuts: Sequence[int] = (1, 5, 10)) -> dict[int, float]:
    """Share of the queries whose own partner is among the first k, higher scores first; a tie counts by expectation.

    >>> instance_recall([[3, 1, 2], [5, 5, 1], [9, 8, 7]], cuts=(1, 2))
    {1: 0.5, 2: 0.6666666666666666}

    Args:
        scores: (Q, Q), not NaN; column i is the partner of row i.
        cuts: each k.

    Raises:
        ItemError: the scores are not square, there are none, or one is NaN.
        ConfigError: a cut is below 1.
    """
    table = np.asarray(scores)
    if table.ndim != 2 or table.shape[0] != table.shape[1] or not table.size or np.isnan(table).any():
        raise ItemError(f"scores are {table.shape}; expected a square without NaN: a partner for each query")
    for cut in cuts:
        _check_cut(cut)
    own = table.diagonal()[:, None]
    ahead, tied = (table > own).sum(axis=1), (table == own).sum(axis=1)
    return {cut: float(np.clip((cut - ahead) / tied, 0, 1).mean()) for cut in cuts}


def map_per_label(per_query: ArrayLike, labels: ArrayLike) -> dict[Any, LabelMAP]:
    """MAP of each label's queries, the labels in rising order.

    Args:
        per_query: (Q,) AP of each query.
        labels: (Q,) label of each query, integers or strings; the keys of what is returned.

    Raises:
        ItemError: not one label for each query.
    """
    values, names = np.asarray(per_query, dtype=np.float64), np.asarray(labels)
    if values.ndim != 1 or names.shape != values.shape:
        raise ItemError(f"labels {names.shape} for per_query {values.shape}; expected one label for each query")
    different, codes = np.unique(names, return_inverse=True)
    counts = np.bincount(codes, minlength=different.size)
    means = np.bincount(codes, weights=values, minlength=different.size) / counts
    return {
        label: LabelMAP(map=mean, queries=count)
        for label, mean, count in zip(different.tolist(), means.tolist(), counts.tolist(), strict=True)
    }


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


# --- over all queries -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Comparison:
    """What is compared with what: rows of length :data:`_SCALE` or 0, and labels as numbers."""

    queries: Float32Array
    query_codes: NDArray[np.intp]
    items: Float32Array
    item_codes: NDArray[np.intp]


def _measured(
    comparison: _Comparison, measure: Callable[[Float32Array, BoolArray], Float64Array], *, exclude_self: bool = False
) -> Float64Array:
    """What ``measure`` says of each query, (Q, ...), given the cosines and the relevance (q, N) of a few at a time.

    It may overwrite the cosines.
    """
    items, item_codes = comparison.items, comparison.item_codes
    first = _first_of_equals(items)
    copies = np.flatnonzero(first != np.arange(len(items)))
    queries, codes = comparison.queries, comparison.query_codes
    asked = again = np.arange(len(queries))
    if not exclude_self:  # then queries with one vector and one label have one result
        vector_and_label = _first_of_equals(queries) * (codes.max() + 1) + codes
        _, asked, again = np.unique(vector_and_label, return_index=True, return_inverse=True)
        queries, codes = queries[asked], codes[asked]

    small = np.min_scalar_type(int(max(codes.max(), item_codes.max())))  # compared for every score: bytes are faster
    codes, item_codes = codes.astype(small), item_codes.astype(small)

    def measured(scores: Float32Array, rows: slice) -> Float64Array:
        scores *= np.float32(_SCALE**-2)
        if copies.size:
            scores[:, copies] = scores[:, first[copies]]  # BLAS may score equal rows one bit apart
        relevant = codes[rows, None] == item_codes
        if exclude_self:
            own = np.arange(len(scores)), asked[rows]
            scores[own] = -1.5  # behind everything else, and irrelevant: without effect
            relevant[own] = False
        return measure(scores, relevant)

    def part(rows: slice) -> Float64Array:
        product = queries[rows] @ items.T
        inner = _chunks(len(product), len(items), _SORT)
        start = rows.start
        return np.concatenate([measured(product[some], slice(start + some.start, start + some.stop)) for some in inner])

    # Every thread has a product of its own: BLAS's threads stay awake for a while, on cores that the sorts need.
    with _limiting, _blas().limit(limits=1, user_api="blas"):
        parts = _spread(part, _chunks(len(queries), len(items), max(_PRODUCT, _FEWEST_QUERIES * len(items))))
    return np.concatenate(parts)[again]


def _bounds(scores: Float32Array, relevant: BoolArray, cut: int | None) -> Float64Array:
    if cut is None:
        return average_precision_bounds(scores, relevant)
    return average_precision_within(scores, relevant, cut)


def _chunks(queries: int, items: int, size: int) -> Sequence[slice]:
    """Slices of the queries, each of at most ``size`` scores, or one query."""
    step = max(1, size // items)
    return [slice(start, min(start + step, queries)) for start in range(0, queries, step)]


def _spread(function: Callable[..., Float64Array], *arguments: Sequence[Any]) -> list[Float64Array]:
    """``list(map(function, *arguments))``, on several threads: NumPy lets go of the interpreter in its loops."""
    workers = _threads()
    if workers == 1 or len(arguments[0]) < _FEWEST_PARTS:
        return list(map(function, *arguments))
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(function, *arguments))


def _threads() -> int:
    """The cores that this process may use, or fewer if ``OMP_NUM_THREADS`` says so."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return min(cores, int(wanted)) if wanted.isdecimal() and int(wanted) else cores


_limiting = Lock()  # two that limit BLAS at once would each restore what the other found


@cache
def _blas() -> ThreadpoolController:
    return ThreadpoolController()


# --- input ----------------------------------------------------------------------------------------------------


def _checked(queries: ArrayLike, query_labels: ArrayLike, items: ArrayLike, item_labels: ArrayLike) -> _Comparison:
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
    return _Comparison(query_rows, codes[: len(query_rows)], item_rows, codes[len(query_rows) :])


def _unit_rows(vectors: ArrayLike, what: str) -> Float32Array:
    rows = np.asarray(vectors)
    if rows.ndim != 2 or 0 in rows.shape or rows.dtype.kind not in "fiu":
        raise ItemError(f"{what} are {rows.dtype} {rows.shape}; expected numbers (at least one row, width)")
    if not np.isfinite(rows).all():
        bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))[:10].tolist()
        raise ItemError(f"{what} hold numbers that are not finite, in rows {bad}")
    wide = rows.astype(np.float64)
    norms = np.linalg.norm(wide, axis=1, keepdims=True)
    return (wide / np.where(norms > 0, norms, 1) * _SCALE).astype(np.float32)


def _first_of_equals(rows: Float32Array) -> NDArray[np.intp]:
    """For each row the place of the first one that is equal to it."""
    plain = np.ascontiguousarray(rows + np.float32(0))  # makes -0.0 0.0
    as_bytes = plain.view(np.dtype((np.void, plain.dtype.itemsize * plain.shape[1]))).ravel()
    _, first, place = np.unique(as_bytes, return_index=True, return_inverse=True)
    return np.asarray(first[place])


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
