"""Exact search of one medium's rows: all of them, or one band of them.

Shape letters: N rows (unique vectors), D width, Q queries.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from dckt.index.exact import (
    BAND_NUMBERS,
    COLUMN_NUMBERS,
    Bands,
    Columns,
    Found,
    lowest,
    products,
    ranked,
    shortlist,
    similarities,
)
from dckt.index.records import Change
from dckt.index.rows import Rows
from dckt.index.schema import Head
from dckt.index.segment import Segment
from dckt.index.vectors import Float32Array, float32_error

# Numbers that are multiplied out at once, in a product with the matrix and with rows that are chosen for each query.
PRODUCT_NUMBERS = 2**24
EXPANDED_NUMBERS = 2**22
# The share of the rows up to which a band is searched instead of all, and how far beside a query one begins to look.
_BAND_SHARE = 8
_BAND_PROBE = 32
# Of a query's numbers the largest from which on a band is likely to be thin.
_NEXT_TO_AXIS = 0.9

# Found items, or what gives them.
Answer: TypeAlias = list[Found] | Callable[[], list[Found]]


class ScannedRows(Rows):
    """Rows that are searched exactly."""

    def __init__(self, dimension: int, head: Head, segment: Segment | None = None) -> None:
        super().__init__(dimension, head, segment)
        self._columns: Columns | None = None
        self._bands: Bands | None = None
        self._ranks: NDArray[np.int64] | None = None

    def apply(self, change: Change, head: Head) -> bool:
        """Repeats what commits did; tells whether what came of it is what the store holds."""
        self._ranks = None
        return super().apply(change, head)

    def search_exactly(self, queries: Float32Array, k: int) -> list[Answer]:
        """The best k items of every query (Q, D), exactly; there are at least so many."""
        bands = self._bands_now() if k <= _BAND_PROBE else None
        found: list[Answer | None] = [None] * len(queries)
        if bands is not None:
            for place in (np.abs(queries).max(axis=1) > _NEXT_TO_AXIS).nonzero()[0].tolist():
                query = queries[place]
                found[place] = self._search_band(query, bands.beside(query, _BAND_PROBE), k)
        places = [place for place, hits in enumerate(found) if hits is None]
        step = max(1, PRODUCT_NUMBERS // self._rows)
        for start in range(0, len(places), step):
            part = places[start : start + step]
            scores, error = self._products(queries[part] if len(part) < len(queries) else queries)
            for place, values in zip(part, scores, strict=True):
                rows = self._best_places(values, k, self._counts[: self._rows], error)
                similar = similarities(self.gathered(rows), queries[place])
                found[place] = ranked(rows, similar, self._entries_now(), k, self._id_ranks)
        return [hits for hits in found if hits is not None]

    def _products(self, queries: Float32Array) -> tuple[Float32Array, float]:
        """Inner products with every row, (Q, N) float32, and how far apart two of one true score can be."""
        error = float32_error(self.dimension)
        if len(queries) == 1 and self._by_column():
            columns = self._columns
            if columns is None or 4 * len(columns) < 3 * self._rows:
                columns = self._columns = Columns(np.concatenate(self.parts()))
            scores, more = columns.products(queries[0])
            if len(columns) == self._rows:
                return scores[None], error + 2 * more
            rest = [products(part, queries)[0] for part in self.parts(len(columns))]
            return np.concatenate([scores, *rest])[None], error + 2 * more
        parts = [products(part, queries) for part in self.parts()]
        return (parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)), error

    def _best_places(
        self, scores: Float32Array, k: int, counts: NDArray[np.int32], error: float | None = None
    ) -> NDArray[np.int64]:
        """Places of rows that hold the best k items, of so many each; the scores are overwritten."""
        if self._unused:
            scores[counts == 0] = -2
        return shortlist(scores, k, float32_error(self.dimension) if error is None else error, counts)

    def _by_column(self) -> bool:
        """Whether exact search of one query goes by column."""
        return self._rows * self.dimension <= COLUMN_NUMBERS

    # --- bands ---

    def _search_band(self, query: Float32Array, known: NDArray[np.int64], k: int) -> list[Found] | None:
        """The best k items for a query (D,), exactly, from the rows of one band; None where that does not pay.

        Args:
            query: (D,).
            known: (M,) rows near the query; the nearer they are, the thinner is the band.
            k: how many.
        """
        bands = self._bands_now()
        if bands is None:
            return None
        scores = similarities(self.gathered(known), query)
        order = scores.argsort()[::-1]
        enough = int(self._counts[known[order]].cumsum().searchsorted(k))
        if enough >= len(known):
            return None
        floor = scores[order[enough]]
        axis, first, end = bands.band(query, float(floor))
        if end - first > self._rows // _BAND_SHARE:
            return None
        near = bands.rows(axis, first, end)
        if len(bands) < self._rows:
            near = np.concatenate([near, np.arange(len(bands), self._rows)])
        if self._unused:
            near = near[self._counts[near] > 0]
        scores = similarities(self.gathered(near), query)
        best = (scores >= floor).nonzero()[0]
        return ranked(near[best], scores[best], self._entries_now(), k, self._id_ranks)

    def _search_bands(
        self,
        places: NDArray[np.int64],
        queries: Float32Array,
        known: NDArray[np.int64],
        k: int,
        found: list[Answer],
    ) -> list[int]:
        """As :meth:`_search_band`, for some of many queries, into ``found``; gives the places where it does not pay."""
        bands, segment = self._bands_now(), self.segment
        left: list[int] = places.tolist()
        if bands is None or not left:
            return left
        left = []
        if segment is None or not self._all_single() or len(bands) < self._rows:
            for place in places.tolist():
                if (hits := self._search_band(queries[place], known[place], k)) is None:
                    left.append(place)
                else:
                    found[place] = hits
            return left
        # Queries next to one axis have about the same band.
        together: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
        floors = np.partition(self._values(known[places], queries[places]), k - 1, axis=1)[:, k - 1]
        for place, floor in zip(places.tolist(), (-floors).tolist(), strict=True):
            axis, first, end = bands.band(queries[place], floor)
            if end - first > self._rows // _BAND_SHARE:
                left.append(place)
            else:
                together[axis].append((first, end, place))
        for axis, parts in together.items():
            # Its rows in the order of their ids, in which ties go.
            near = bands.rows(axis, min(part[0] for part in parts), max(part[1] for part in parts))
            near = near[self._id_ranks()[near].argsort()]
            step = max(1, EXPANDED_NUMBERS // (len(near) * self.dimension))
            for start in range(0, len(parts), step):
                own = [place for _, _, place in parts[start : start + step]]
                values = self._values(near[None], queries[own])
                order = lowest(values, k)
                best = Ranking(segment, near[order], np.take_along_axis(values, order, axis=1))
                for number, place in enumerate(own):
                    found[place] = partial(best.entries, number)
        return left

    def _values(self, rows: NDArray[np.int64], queries: Float32Array) -> Float32Array:
        """Similarities of queries (Q, D) with rows (Q, M) or (1, M), the sign turned: (Q, M)."""
        vectors: NDArray[np.floating[Any]] = self.gathered(rows.ravel()).reshape(*rows.shape, self.dimension)
        if len(rows) < len(queries):  # widened once, and not for every query again
            vectors = vectors.astype(np.float64)
        values: Float32Array = -np.vecdot(vectors, queries[:, None].astype(np.float64)).astype(np.float32)
        values += np.float32(0)  # -0.0 becomes 0.0
        return values

    def _bands_now(self) -> Bands | None:
        if self._rows * self.dimension > BAND_NUMBERS:
            return None
        bands = self._bands
        if bands is None or _BAND_SHARE * (self._rows - len(bands)) > self._rows:
            parts = self.parts()
            bands = self._bands = Bands(parts[0] if len(parts) == 1 else np.concatenate(parts))
        return bands

    def _id_ranks(self) -> NDArray[np.int64]:
        """(N,) the place of every row in the order of the rows' first ids; those without items are last."""
        ranks = self._ranks
        if ranks is None or len(ranks) != self._rows:
            firsts = [entries[0][0] if (entries := self.entries(row, 1)) else "\U0010ffff" for row in range(self._rows)]
            ranks = np.empty(self._rows, dtype=np.int64)
            ranks[sorted(range(self._rows), key=firsts.__getitem__)] = np.arange(self._rows)
            self._ranks = ranks
        return ranks


class Ranking:
    """The best k rows of some queries, in their order, each with one item.

    Args:
        segment: that the rows are of.
        rows: (Q, k).
        values: (Q, k), scores with the sign turned.
    """

    def __init__(self, segment: Segment, rows: NDArray[np.int64], values: Float32Array) -> None:
        self._segment = segment
        self._rows = rows
        self._values = values

    def entries(self, place: int) -> list[Found]:
        """The items of one query."""
        return self._segment.only_entries(self._rows[place].tolist(), self._values[place].tolist())
