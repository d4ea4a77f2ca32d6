"""From a query's vectors to hits: thresholds, and a second stage.

Shape letters: Q queries, D width of a representation.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from dckt.calibration import Calibration
from dckt.errors import ConfigError
from dckt.index import Hit, Index
from dckt.model import Vectors

CALIBRATED = "calibrated"

Found = tuple[list[Sequence[Hit]], dict[str, float]]
"""Hits of each query, maybe made when they are first read, and the seconds of ``search`` and ``reorder``."""


@dataclass(frozen=True)
class SearchResult(Sequence[Hit]):
    """The hits of one query, best first: a sequence of :class:`Hit`.

    Attributes:
        hits: score descending, ties by id ascending, then by medium.
        query_medium: ``image``, ``text``, or another of the model's.
        timings: seconds by stage, in their order: ``decode`` (a picture), ``tokenize`` (a text) or ``check`` (features
            of another medium), ``encode``, with the wait for other callers if they share it, ``search``, and
            ``reorder``, as they apply. Of the whole batch, for a batch and for callers that share one.
    """

    hits: tuple[Hit, ...]
    query_medium: str
    timings: Mapping[str, float] = field(compare=False)

    @overload
    def __getitem__(self, place: int) -> Hit: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[Hit, ...]: ...
    def __getitem__(self, place: int | slice) -> Hit | tuple[Hit, ...]:
        """A hit by rank, 0 is the best; a slice gives a tuple."""
        return self.hits[place]

    def __len__(self) -> int:
        return len(self.hits)

    def by_medium(self) -> dict[str, tuple[Hit, ...]]:
        """The hits of each medium, best first."""
        media = sorted({hit.medium for hit in self.hits})
        return {medium: tuple(hit for hit in self.hits if hit.medium == medium) for medium in media}


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked of an index, whatever the query.

    Attributes:
        k: how many hits.
        media: which to find.
        where: which items to find; None: all.
        floors: the least similarity: one for all media, one for each, or None.
        reorder: how many candidates the second representation reorders; 0: none.
    """

    k: int
    media: Sequence[str]
    where: Mapping[str, Any] | None
    floors: float | Mapping[str, float] | None
    reorder: int

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ConfigError(f"k is {self.k}; expected at least 1")
        if self.reorder and self.reorder < self.k:
            raise ConfigError(f"reorder is {self.reorder}, k is {self.k}; expected 0, or at least k candidates")

    def shares(self, other: Question) -> bool:
        """Whether both can be looked up at once. Filters are compared by identity: 1 equals True, and finds others."""
        return self is other or (self.where is None and self == other)

    def wider(self) -> Question:
        """The same for one hit more, such as the query itself."""
        return replace(self, k=self.k + 1)


def floors(
    min_score: float | str | None, calibration: Calibration | None, query_medium: str, media: Sequence[str]
) -> float | Mapping[str, float] | None:
    """The least similarity for each medium that is to be found.

    Raises:
        ConfigError: a text other than ``calibrated``, or the bundle has no threshold for a direction.
    """
    if not isinstance(min_score, str):
        return min_score
    if min_score != CALIBRATED:
        raise ConfigError(f"min_score is {min_score!r}; expected a number, {CALIBRATED!r} or None")
    if calibration is None:
        raise ConfigError("the bundle is not calibrated; run dckt calibrate BUNDLE --pairs CORPUS")
    return {medium: calibration.threshold(query_medium, medium) for medium in media}


def find(index: Index, vectors: Vectors, question: Question) -> Found:
    """Looks up queries that ask the same.

    Args:
        index: where to look.
        vectors: (Q, D) by representation: the index's own first, and for ``reorder`` the second, which the index keeps.
        question: what is asked.

    Raises:
        ItemError: a query without a direction.
        ConfigError: a filter with a mistake, or a least similarity that is none.
    """
    began = time.perf_counter()
    main, *also = vectors.values()
    found = _candidates(index, main, question)
    searched = time.perf_counter()
    timings = {"search": searched - began}
    if question.reorder:
        found = [_reordered(index, query, hits)[: question.k] for query, hits in zip(also[0], found, strict=True)]
        timings["reorder"] = time.perf_counter() - searched
    return found, timings


def find_shared(index: Index, vectors: Vectors, questions: Sequence[Question]) -> list[Callable[[], Found]]:
    """For concurrent callers, with a query and a question each: what each of them calls for its own answer.

    Those who ask the same are looked up at once, here. Others look up by themselves, so that nobody waits for a filter
    of somebody else's, or fails of it.
    """
    answers: dict[int, Callable[[], Found]] = {}
    for place, question in enumerate(questions):
        if place in answers:
            continue
        same = [other for other in range(place, len(questions)) if question.shares(questions[other])]
        part = {name: of[same] for name, of in vectors.items()}
        if len(same) == 1:
            answers[place] = partial(find, index, part, question)
            continue
        found, timings = find(index, part, question)
        answers |= {other: partial(_one, hits, timings) for other, hits in zip(same, found, strict=True)}
    return [answers[place] for place in range(len(questions))]


def _one(hits: Sequence[Hit], timings: dict[str, float]) -> Found:
    return [hits], timings


def _candidates(index: Index, queries: NDArray[np.float32], question: Question) -> list[Sequence[Hit]]:
    count = max(question.k, question.reorder)
    if not isinstance(question.floors, Mapping):
        return index.search(queries, count, media=question.media, where=question.where, min_score=question.floors)
    # A medium at a time, for what one threshold drops must not take the place of what another keeps.
    apart = [
        index.search(queries, count, media=[medium], where=question.where, min_score=floor)
        for medium, floor in question.floors.items()
    ]
    return [best_first([hit for hits in of for hit in hits])[:count] for of in zip(*apart, strict=True)]


def _reordered(index: Index, query: NDArray[np.float32], hits: Sequence[Hit]) -> list[Hit]:
    """Candidates by the second representation, whose similarity becomes their score."""
    kept = {
        medium: index.second(medium, [hit.id for hit in hits if hit.medium == medium])
        for medium in {hit.medium for hit in hits}
    }
    there = [hit for hit in hits if hit.id in kept[hit.medium]]  # another may have been deleted just now
    if not there:
        return []
    scores = _cosines(np.stack([kept[hit.medium][hit.id] for hit in there]), query)
    return best_first([Hit(hit.id, score, hit.medium, hit.metadata) for hit, score in zip(there, scores, strict=True)])


def _cosines(rows: NDArray[np.float32], query: NDArray[np.float32]) -> list[float]:
    """Cosines with rows of length 1; 0 for a query without a direction."""
    asked = query.astype(np.float64)
    asked /= np.linalg.norm(asked) or 1
    # Not by BLAS, which may score equal rows one bit apart, and then they would not tie.
    cosines: list[float] = np.einsum("nd,d->n", rows, asked).clip(-1, 1).tolist()
    return cosines


def best_first(hits: Sequence[Hit]) -> list[Hit]:
    """Hits in the order of every answer: similarity descending, then id, then medium."""
    return sorted(hits, key=lambda hit: (-hit.score, hit.id, hit.medium))
