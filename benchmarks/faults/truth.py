"""What an index must answer, worked out the slow way.

Shape letters: N items, Q queries, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from dckt.index import Hit, Index

Vector: TypeAlias = NDArray[np.float32]
Key: TypeAlias = tuple[str, str]  # medium, id
TOLERANCE = 2e-6  # of a cosine similarity: both sides store float32


@dataclass(frozen=True)
class Stored:
    """One item: its vector (D,) as it was given, and its metadata."""

    vector: Vector
    metadata: Mapping[str, Any]


class Truth:
    """The items that an index is to hold. A change makes a new one."""

    def __init__(self, items: Mapping[Key, Stored]) -> None:
        self.items = dict(items)

    def __len__(self) -> int:
        return len(self.items)

    def with_items(self, medium: str, items: Mapping[str, Stored]) -> Truth:
        """After an add or an upsert."""
        return Truth({**self.items, **{(medium, item): stored for item, stored in items.items()}})

    def without(self, medium: str, ids: Iterable[str]) -> Truth:
        """After a delete."""
        gone = {(medium, item) for item in ids}
        return Truth({key: stored for key, stored in self.items.items() if key not in gone})

    @cached_property
    def keys(self) -> list[Key]:
        """In the order of ties: by id, then by medium."""
        return sorted(self.items, key=lambda key: (key[1], key[0]))

    @cached_property
    def matrix(self) -> NDArray[np.float64]:
        """(N, D), of length 1, in the order of :attr:`keys`."""
        rows = np.array([self.items[key].vector for key in self.keys], dtype=np.float64)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True) if len(rows) else rows

    def ids(self, medium: str) -> list[str]:
        """Ascending."""
        return sorted(item for name, item in self.items if name == medium)

    @cached_property
    def media(self) -> list[str]:
        """Those that there are items of."""
        return sorted({medium for medium, _ in self.items})


Allowed: TypeAlias = Callable[[str, Mapping[str, Any]], bool]


def difference(index: Index, truth: Truth, queries: Vector, *, thorough: bool = True) -> str | None:
    """Where an index departs from the truth, in one line; None where it does not.

    Compares media, counts and ids, and the ten best of queries (Q, D) for all media and for each. If it is to be
    thorough, also the metadata and vector of every item, the best hit alone, and the ranking of everything. Where a
    medium is searched through a graph, its ten best may lack some, and nothing else may be wrong with them.
    """
    if index.media != truth.media:
        return f"media are {index.media}, expected {truth.media}"
    if index.count() != len(truth):
        return f"holds {index.count()} items, expected {len(truth)}"
    for medium in truth.media:
        if (found := list(index.ids(medium))) != truth.ids(medium):
            return f"{medium} ids differ in {sorted(set(found) ^ set(truth.ids(medium)))[:5]}"
    graphs = {medium for medium, about in index.info().media.items() if about.search != "exact"}
    asked: list[tuple[int, list[str] | None]] = [(10, None), *((10, [medium]) for medium in truth.media)]
    if thorough:
        asked += [(1, None), (10**6, None)]
        for row, (medium, item) in enumerate(truth.keys):
            if (metadata := index.get(item, medium).metadata) != truth.items[medium, item].metadata:
                return f"metadata of {medium} {item!r} is {metadata}"
            if np.abs(index.vector(item, medium) - truth.matrix[row]).max() > TOLERANCE:
                return f"vector of {medium} {item!r} is another one"
    for k, media in asked:
        allowed = partial(_of_media, media)
        answers = index.search(queries, k, media=media)
        for query, hits in zip(queries, answers, strict=True):
            sure = k >= len(truth) or not graphs & set(media or truth.media)
            if wrong := wrong_hits(hits, truth, query, k, allowed, exact=sure):
                return f"k = {k}, media = {media}: {wrong}"
    return None


def _of_media(media: Sequence[str] | None, medium: str, _: Mapping[str, Any]) -> bool:
    return media is None or medium in media


def wrong_hits(
    hits: Sequence[Hit], truth: Truth, query: Vector, k: int, allowed: Allowed, *, exact: bool = True
) -> str | None:
    """What is wrong with the answer to one query (D,), compared with scoring every item; None if nothing is.

    Args:
        hits: the answer.
        truth: what there is.
        query: (D,).
        k: how many were asked for.
        allowed: whether an item of a medium with metadata may be found.
        exact: whether better ones may not be missing; otherwise up to half of the best may be.
    """
    rows = [row for row, key in enumerate(truth.keys) if allowed(key[0], truth.items[key].metadata)]
    if len(hits) != min(k, len(rows)):
        return f"{len(hits)} hits, expected {min(k, len(rows))}"
    if not hits:
        return None
    wide = query.astype(np.float64)
    scores = truth.matrix[rows] @ (wide / np.linalg.norm(wide))
    best = np.argsort(-scores.astype(np.float32), kind="stable")[: len(hits)]
    place_of = {truth.keys[row]: place for place, row in enumerate(rows)}
    if len({(hit.medium, hit.id) for hit in hits}) < len(hits):
        return "an item occurs twice"
    better = 0
    before = (-2.0, "", "")
    for rank, (hit, expected) in enumerate(zip(hits, best.tolist(), strict=True)):
        place = place_of.get((hit.medium, hit.id))
        if place is None:
            return f"hit {rank} is {hit.medium} {hit.id!r}, which is not to be found"
        if abs(hit.score - scores[place]) > TOLERANCE:
            return f"{hit.medium} {hit.id!r} scores {hit.score}, expected {scores[place]}"
        if hit.metadata != truth.items[hit.medium, hit.id].metadata:
            return f"metadata of {hit.medium} {hit.id!r} is {hit.metadata}"
        if (-hit.score, hit.id, hit.medium) < before:
            return f"hit {rank} comes before hit {rank - 1}"
        before = (-hit.score, hit.id, hit.medium)
        better += scores[place] >= scores[best[-1]] - TOLERANCE
        if not exact:
            continue
        if abs(hit.score - scores[expected]) > TOLERANCE:
            return f"hit {rank} scores {hit.score}, the best one left {scores[expected]}"
        if place != expected and np.array_equal(truth.matrix[rows[place]], truth.matrix[rows[expected]]):
            return f"hit {rank} is {hit.id!r}, which ties with {truth.keys[rows[expected]][1]!r} and comes behind it"
    return None if 2 * better >= len(hits) else f"only {better} of the best {len(hits)} were found"
