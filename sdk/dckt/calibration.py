"""From which similarity on a hit fits, and what a second stage is worth: both told by labelled pairs.

Shape letters: N pairs, D width of a representation, Q queries.

An item fits a query when both have one label. Every query counts the same, whatever the size of its label. A
*direction* is the medium of the query and that of the items, such as ``image_to_text``; inside one medium an item is
no answer to itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import permutations
from typing import Any, Self, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dckt.errors import ConfigError, ItemError
from dckt.metrics import average_precision, instance_recall
from dckt.ranking import Float32Array

BEST_F1 = "best_f1"
PRECISIONS = (0.8, 0.9, 0.95)
CANDIDATES = 20  # few beside some hundred pairs, or the second stage would choose alone
CUTS = (1, 5, 10)
_LEVELS = 501  # of recall, among which a threshold is chosen
_ROWS = 256  # queries at a time

Read = TypeVar("Read")


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """A similarity, and what came of keeping the hits with at least that much.

    Attributes:
        similarity: cosine, -1 to 1.
        precision: share of the hits that fit, the mean over the queries with a hit.
        recall: share of what fits that is among the hits, the mean over queries.
        f1: of precision and recall, the mean over queries.
        answered: share of the queries with a hit.
        mistaken: share of the queries that something reaches which does not fit: how often an application would miss
            that nothing fits, if nothing did.
    """

    similarity: float
    precision: float
    recall: float
    f1: float
    answered: float
    mistaken: float


@dataclass(frozen=True, kw_only=True)
class Quality:
    """How a way of ranking finds, image to text or text to image.

    Attributes:
        map: mean average precision; what has the query's label is relevant.
        recall: share of the queries whose own partner is among the first k, by k as text.
    """

    map: float
    recall: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What labelled pairs tell about a model. Stored in the bundle.

    Attributes:
        representation: that the similarities are of.
        pairs: where the pairs come from, and ``count``; anything that JSON holds.
        thresholds: by direction, then by name: ``best_f1``, and ``precision_0.8`` and so on, the lowest similarity with
            that precision. One that no similarity reaches is left out, and so is a direction without items that fit
            or without others.
        ranking: by representation, and by both joined with ``" then "``, which is the first's candidates reordered by
            the second; then by direction.
        candidates: how many were reordered.
    """

    representation: str
    pairs: Mapping[str, Any]
    thresholds: Mapping[str, Mapping[str, Threshold]]
    ranking: Mapping[str, Mapping[str, Quality]]
    candidates: int

    def threshold(self, query_medium: str, medium: str) -> float:
        """The similarity with the best F1 in a direction.

        Raises:
            ConfigError: there is none for the direction.
        """
        direction = f"{query_medium}_to_{medium}"
        try:
            return self.thresholds[direction][BEST_F1].similarity
        except KeyError as error:
            there = ", ".join(self.thresholds) or "none"
            raise ConfigError(
                f"the bundle is not calibrated for {direction} (it is for: {there}); run dckt calibrate BUNDLE --pairs "
                "CORPUS with pairs of several labels, or give min_score as a number"
            ) from error

    def as_json(self) -> dict[str, Any]:
        """As mappings that JSON can hold."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """What :meth:`as_json` gave.

        Raises:
            ConfigError: a field is missing, unknown or of another kind.
        """
        try:
            _same_fields(cls, content)
            for name, kind in (("representation", str), ("pairs", dict), ("candidates", int)):
                if type(content[name]) is not kind:
                    raise TypeError(f"{name} is {content[name]!r}, expected {kind.__name__}")
            return cls(
                representation=content["representation"],
                pairs=content["pairs"],
                thresholds=_by_direction(content["thresholds"], _threshold),
                ranking=_by_direction(content["ranking"], _quality),
                candidates=content["candidates"],
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"the calibration is not what dckt writes ({error})") from error


def calibrate(
    vectors: Mapping[str, Mapping[str, ArrayLike]],
    labels: Sequence[str],
    *,
    representation: str,
    pairs: Mapping[str, Any],
    candidates: int = CANDIDATES,
) -> Calibration:
    """Chooses thresholds, and measures every representation alone and as a second stage.

    Args:
        vectors: by representation, then by medium, such as ``image`` and ``text``: (N, D) floats; row i of each medium
            belongs to pair i, and ties in a ranking go by row.
        labels: N labels.
        representation: the one that an index searches by, a key of ``vectors``.
        pairs: where the pairs come from; ``count`` is added.
        candidates: how many are reordered by a second representation.

    Raises:
        ItemError: shapes that do not fit, no pair, or numbers that are not finite.
        ConfigError: there is no such representation, or ``candidates`` is below 1.
    """
    if representation not in vectors or candidates < 1:
        raise ConfigError(
            f"representation is {representation!r} and candidates {candidates}; expected one of "
            f"{', '.join(vectors)}, and at least 1"
        )
    units = {
        name: {medium: _units(rows, labels, f"{medium} {name}") for medium, rows in of.items()}
        for name, of in vectors.items()
    }
    codes = np.unique(np.asarray(labels), return_inverse=True)[1]
    first = units[representation]
    found = {
        f"{asked}_to_{medium}": thresholds(first[asked], codes, first[medium], codes, exclude_self=asked == medium)
        for asked in first
        for medium in first
    }
    ranking = {name: _both_ways(of, codes) for name, of in units.items()}
    for name, of in units.items():
        if name != representation:
            ranking[f"{representation} then {name}"] = _both_ways(first, codes, of, candidates)
    return Calibration(
        representation=representation,
        pairs={**pairs, "count": len(codes)},
        thresholds={direction: of for direction, of in found.items() if of},
        ranking=ranking,
        candidates=min(candidates, len(codes)),
    )


def thresholds(
    queries: Float32Array,
    query_labels: NDArray[Any],
    items: Float32Array,
    item_labels: NDArray[Any],
    *,
    exclude_self: bool = False,
) -> dict[str, Threshold]:
    """The similarity with the best mean F1, and the lowest with a mean precision of each of :data:`PRECISIONS`.

    Similarities are chosen among those that even levels of recall need, less what rounding may take from them.

    Args:
        queries: (Q, D) of length 1.
        query_labels: (Q,).
        items: (N, D) of length 1.
        item_labels: (N,).
        exclude_self: queries and items are the same in the same order, and none is an answer to itself.

    Returns:
        By name; empty where nothing fits, or everything does.
    """
    fitting = [scores[fits] for scores, fits in _scored(queries, query_labels, items, item_labels, exclude_self)]
    fit = np.concatenate(fitting)
    if not 0 < len(fit) < len(queries) * (len(items) - exclude_self):
        return {}
    # Two float32 products of the same two vectors differ by up to so much; the best hits must not fall out by that.
    levels = np.unique(np.quantile(fit.astype(np.float64), np.linspace(0, 1, _LEVELS)))
    levels -= (items.shape[1] + 2) * 2.0**-23
    sums = np.zeros((5, len(levels)))
    for scores, fits in _scored(queries, query_labels, items, item_labels, exclude_self):
        for row, good in zip(scores, fits, strict=True):
            sums += _of_query(row, good, levels)
    precision, recall, f1, answered, mistaken = sums
    count = len(queries)
    figures = {
        "similarity": levels,
        "precision": precision / np.maximum(answered, 1),
        "recall": recall / count,
        "f1": f1 / count,
        "answered": answered / count,
        "mistaken": mistaken / count,
    }

    def at(place: int) -> Threshold:
        return Threshold(**{name: float(values[place]) for name, values in figures.items()})

    chosen = {BEST_F1: at(int(figures["f1"].argmax()))}
    for wanted in PRECISIONS:
        enough = np.flatnonzero(figures["precision"] >= wanted)
        if enough.size:
            chosen[f"precision_{wanted:g}"] = at(int(enough[0]))
    return chosen


def reordered(first: ArrayLike, second: ArrayLike, candidates: int) -> Float32Array:
    """Scores that rank as a second stage does: the best candidates by one score, ordered by another, before the rest.

    Args:
        first: (Q, N) cosines that choose the candidates; ties go by column.
        second: (Q, N) cosines that order them.
        candidates: how many.
    """
    first, second = np.asarray(first, np.float32), np.asarray(second, np.float32)
    best = np.argsort(-first, axis=1, kind="stable")[:, :candidates]
    scores = first - 4  # behind every cosine
    np.put_along_axis(scores, best, np.take_along_axis(second, best, axis=1), axis=1)
    return np.asarray(scores, np.float32)


def _of_query(scores: Float32Array, fits: NDArray[np.bool_], levels: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Precision (0 without a hit), recall, F1, whether there is a hit, and one that does not fit: (5, levels)."""
    good, bad = np.sort(scores[fits]), np.sort(scores[~fits])
    right, wrong = len(good) - np.searchsorted(good, levels), len(bad) - np.searchsorted(bad, levels)
    hits, relevant = right + wrong, max(len(good), 1)
    return np.stack([right / np.maximum(hits, 1), right / relevant, 2 * right / (hits + relevant), hits > 0, wrong > 0])


def _scored(
    queries: Float32Array,
    query_labels: NDArray[Any],
    items: Float32Array,
    item_labels: NDArray[Any],
    exclude_self: bool,
) -> Iterator[tuple[Float32Array, NDArray[np.bool_]]]:
    """Scores and what fits, (q, N) each, of a few queries at a time; (q, N - 1) without the queries themselves."""
    for start in range(0, len(queries), _ROWS):
        rows = slice(start, start + _ROWS)
        scores = queries[rows] @ items.T
        fits = query_labels[rows, None] == item_labels
        if exclude_self:
            others = np.arange(len(items)) != np.arange(start, start + len(scores))[:, None]
            shape = len(scores), len(items) - 1
            scores, fits = scores[others].reshape(shape), fits[others].reshape(shape)
        yield scores, fits


def _both_ways(
    first: Mapping[str, Float32Array],
    codes: NDArray[np.intp],
    second: Mapping[str, Float32Array] | None = None,
    candidates: int = 0,
) -> dict[str, Quality]:
    found = {}
    relevant = codes[:, None] == codes
    for asked, medium in permutations(first, 2):
        scores = first[asked] @ first[medium].T
        if second is not None:
            scores = reordered(scores, second[asked] @ second[medium].T, candidates)
        found[f"{asked}_to_{medium}"] = Quality(
            map=float(average_precision(scores, relevant).expected.mean()),
            recall={str(k): share for k, share in instance_recall(scores, cuts=CUTS).items()},
        )
    return found


def _units(vectors: ArrayLike, labels: Sequence[str], what: str) -> Float32Array:
    array = np.asarray(vectors)
    if array.ndim != 2 or not len(array) or len(array) != len(labels):
        raise ItemError(f"{what} is {array.shape} for {len(labels)} labels; expected a row for each of at least one")
    if not np.isfinite(array).all():
        raise ItemError(f"{what} holds numbers that are not finite")
    rows = array.astype(np.float64)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return (rows / np.where(norms > 0, norms, 1)).astype(np.float32)  # without a direction: similar to nothing


# --- reading ---


def _by_direction(content: Mapping[str, Any], read: Callable[[Mapping[str, Any]], Read]) -> dict[str, dict[str, Read]]:
    return {name: {key: read(value) for key, value in of.items()} for name, of in content.items()}


def _threshold(content: Mapping[str, Any]) -> Threshold:
    _same_fields(Threshold, content)
    return Threshold(**{name: _number(value) for name, value in content.items()})


def _quality(content: Mapping[str, Any]) -> Quality:
    _same_fields(Quality, content)
    return Quality(map=_number(content["map"]), recall={k: _number(share) for k, share in content["recall"].items()})


def _number(value: Any) -> float:
    if type(value) not in (int, float):
        raise TypeError(f"{value!r} is no number")
    return float(value)


def _same_fields(kind: type, content: Mapping[str, Any]) -> None:
    expected = {field.name for field in fields(kind)}
    if set(content) != expected:
        raise TypeError(f"holds {sorted(content)}, expected {sorted(expected)}")
