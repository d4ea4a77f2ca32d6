"""What an index answers: hits and items, and what it tells about itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload


@dataclass(frozen=True, init=False)
class Hit:
    """One item that was found.

    Attributes:
        id: the item's id.
        score: cosine similarity with the query, -1 to 1; higher is better.
        medium: ``image`` or ``text``.
        metadata: what was stored with the item.
    """

    id: str
    score: float
    medium: str
    metadata: Mapping[str, Any]

    # A frozen dataclass writes its fields one by one past its own lock; this way a hit is made in half of the time.
    def __init__(self, id: str, score: float, medium: str, metadata: Mapping[str, Any]) -> None:  # noqa: A002
        fields = self.__dict__
        fields["id"] = id
        fields["score"] = score
        fields["medium"] = medium
        fields["metadata"] = metadata


class Hits(Sequence[Hit]):
    """The hits of one query of many, best first, which are made when the first of them is looked at.

    Equal to any sequence of the same hits. A slice gives a list; pickled and copied it becomes one.

    Args:
        make: gives them, the same at any time and in any thread.
    """

    __slots__ = ("_made", "_make")

    def __init__(self, make: Callable[[], list[Hit]]) -> None:
        self._make: Callable[[], list[Hit]] | None = make
        self._made: list[Hit] | None = None

    @overload
    def __getitem__(self, place: int) -> Hit: ...
    @overload
    def __getitem__(self, place: slice) -> list[Hit]: ...
    def __getitem__(self, place: int | slice) -> Hit | list[Hit]:
        """A hit by rank, 0 is the best; a slice gives a list."""
        return self._hits()[place]

    def __len__(self) -> int:
        return len(self._hits())

    def __iter__(self) -> Iterator[Hit]:  # a sequence's own asks for one hit after the other, which takes longer
        return iter(self._hits())

    def __eq__(self, other: object) -> bool:
        if isinstance(other, str | bytes) or not isinstance(other, Sequence):
            return NotImplemented
        return self._hits() == list(other)

    __hash__ = None  # type: ignore[assignment]  # as a list

    def __repr__(self) -> str:
        return repr(self._hits())

    def __reduce__(self) -> tuple[type[list[Hit]], tuple[list[Hit]]]:
        return list, (self._hits(),)

    def _hits(self) -> list[Hit]:
        made, make = self._made, self._make
        if made is None:
            if make is None:  # another thread made them just now
                made = self._made
                assert made is not None  # noqa: S101
                return made
            made = self._made = make()
            self._make = None  # lets go of what they were made from
        return made


@dataclass(frozen=True)
class Item:
    """One item of an index.

    Attributes:
        id: unique within its medium.
        medium: such as ``image``.
        metadata: what was stored with it.
    """

    id: str
    medium: str
    metadata: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """What tuning found for one medium.

    Attributes:
        target: recall@10 that was asked for.
        search: ``exact`` or ``hnsw``: how the next search goes.
        ef: effort of a search in the graph, or None.
        recall_at_10: against exact search; 1.0 where search is exact.
        queries: how many it was measured with.
    """

    target: float
    search: str
    ef: int | None
    recall_at_10: float
    queries: int


@dataclass(frozen=True, kw_only=True)
class MediumInfo:
    """The state of one medium of an index.

    Attributes:
        items: how many items.
        unique_vectors: how many different vectors they have.
        search: ``exact`` or ``hnsw``: how the next search goes.
        in_graph: how many of the unique vectors the graph covers; the others are searched exactly.
        ef: effort of a search in the graph, or None.
        recall_at_10: against exact search, measured when the graph was last built or tuned, or None where none was
            built. A figure below the target with ``search`` at ``exact`` means that the graph was not good enough and
            is not used.
    """

    items: int
    unique_vectors: int
    search: str
    in_graph: int
    ef: int | None
    recall_at_10: float | None


@dataclass(frozen=True, kw_only=True)
class IndexInfo:
    """The state of an index.

    Attributes:
        path: its folder.
        format_version: of the folder.
        model_id: of the model that made the vectors.
        representation: which output of that model they are.
        dimension: their width D.
        kind: how it was asked to search: ``auto``, ``exact`` or ``hnsw``.
        created: when, ISO 8601 with time zone.
        sequence: how many commits changed it so far.
        bytes: of all of its files.
        media: by name.
        second: name of the second representation that is kept, or None.
    """

    path: str
    format_version: int
    model_id: str
    representation: str
    dimension: int
    kind: str
    created: str
    sequence: int
    bytes: int
    media: Mapping[str, MediumInfo]
    second: str | None = None
