"""How one medium is searched: through its graph and beside it, exactly, or by a filter.

Shape letters: N rows (unique vectors), D width, Q queries, E rows that the graph gives for each.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dckt.index.exact import Found, lowest, products, ranked, ranked_rows, shortlist, similarities
from dckt.index.filters import Match
from dckt.index.graph import GraphedRows
from dckt.index.hnsw import NEIGHBOURS
from dckt.index.records import Entry
from dckt.index.rows import EVERYTHING
from dckt.index.scan import EXPANDED_NUMBERS, PRODUCT_NUMBERS, Answer, Ranking
from dckt.index.vectors import Float32Array, float32_error

# A search that would have to try harder than this goes the exact way.
MAX_EFFORT = 4096
# The work of exact search that takes as long as one step of effort in a graph, about a microsecond.
_BY_ROW, _BY_COLUMN = 3300, 13_000
# A page that may be all one tie counts as one of this many times the effort.
_FLAT = 8
# Queries that are looked up in the graph at once, and up to how many of them are put together one by one.
_PART = 512
_FEW = 4
# Up to so many strays are ranked with every page.
_FEW_STRAYS = 32
# Items whose metadata a filter reads before SQLite is asked.
_FILTER_READS = 4000


class Shelf(GraphedRows):
    """The unique vectors of one medium, and how they are searched."""

    def search(self, queries: Float32Array, k: int, *, threads: int | None = None) -> list[Answer]:
        """The best k items of every query, or what gives them at any later time.

        Their order is score descending, ties by id ascending.

        Args:
            queries: (Q, D) float32 of length 1, C-contiguous.
            k: at least 1; more than there are gives all.
            threads: how many search the graph for many queries; None takes every core.
        """
        k = min(k, self.items)
        if not k:
            return [[] for _ in queries]
        effort = self._effort(k)
        if not effort:
            return self.search_exactly(queries, k)
        return self._search_graph(queries, k, effort, threads or -1)

    def _effort(self, k: int) -> int:
        """Of a search in the graph, or 0 where it does not pay. Steps are doubled, so that most k share one."""
        if self.graph is None:
            return 0
        effort, reach = self.present_effort(), NEIGHBOURS
        while reach < k:
            effort, reach = 2 * effort, 2 * reach
        return effort if effort <= min(MAX_EFFORT, self.covered // 2) else 0

    def _search_graph(self, queries: Float32Array, k: int, effort: int, threads: int) -> list[Answer]:
        assert self.graph is not None  # noqa: S101
        if len(queries) <= _PART:
            return self._expand(queries, self.graph.nearest(queries, effort, threads=threads), k, effort)
        # While one part is looked up in the graph, which needs no GIL, the items of the part before are put together.
        graph = self.graph
        parts = [queries[start : start + _PART] for start in range(0, len(queries), _PART)]
        if threads == 1:
            pages = (graph.nearest(part, effort) for part in parts)
            return [
                found for part, page in zip(parts, pages, strict=True) for found in self._expand(part, page, k, effort)
            ]
        with ThreadPoolExecutor(1) as pool:
            waiting = [pool.submit(graph.nearest, part, effort, threads=threads) for part in parts]
            return [
                found
                for part, page in zip(parts, waiting, strict=True)
                for found in self._expand(part, page.result(), k, effort)
            ]

    def _expand(
        self, queries: Float32Array, pages: tuple[NDArray[np.int64], Float32Array] | None, k: int, effort: int
    ) -> list[Answer]:
        """The items behind the pages that the graph gave."""
        if pages is None:
            return self.search_exactly(queries, k)
        if len(queries) > _FEW and self._rows == self.covered and not self._unused:
            return self._expand_many(queries, *pages, k, effort)
        beside = self._beside(queries)
        segment = self.segment if self._all_single() else None
        found: list[Answer] = []
        for place, query in enumerate(queries):
            rows = self._page_rows(pages[0][place], pages[1][place], k)
            if rows is None:
                found.append(self._settled(query, pages[0][place], pages[1][place], k, effort))
                continue
            if beside is not None:
                rows = self._with_best(rows, *beside, place, k)
            elif len(self._strays):
                rows = np.concatenate([rows[self._findable[rows]], self._strays])
            scores = similarities(self.gathered(rows), query)
            if segment is not None:
                found.append(partial(segment.best_entries, rows, -scores, k))
            elif self.segment is not None and not self._entries:
                found.append(partial(ranked, rows, scores, self.segment.entries, k))
            else:
                found.append(ranked(rows, scores, self.entries, k))
        return found

    def _beside(self, queries: Float32Array) -> tuple[NDArray[np.int64], Float32Array] | None:
        """The rows that a search in the graph cannot find, (B,), with their products (Q, B).

        None where there is no choice to make among them: no rows behind the graph, and next to no strays.
        """
        if self._rows == self.covered and len(self._strays) <= _FEW_STRAYS:
            return None
        rows = np.concatenate([self._strays, np.arange(self.covered, self._rows)])
        parts = [products(part, queries) for part in self.parts(self.covered)]
        if len(self._strays):
            parts.insert(0, products(self.gathered(self._strays), queries))
        return rows, np.concatenate(parts, axis=1)

    def _with_best(
        self, page: NDArray[np.int64], beside: NDArray[np.int64], scores: Float32Array, place: int, k: int
    ) -> NDArray[np.int64]:
        """Rows of a page, and those of the rows beside the graph that hold the best k items of these, each once."""
        if len(self._strays):
            page = page[self._findable[page]]
        return np.concatenate([page, beside[self._best_places(scores[place], k, self._counts[beside])]])

    def _settled(
        self, query: Float32Array, rows: NDArray[np.int64], distances: Float32Array, k: int, effort: int
    ) -> Answer:
        """The best k items for a query (D,) whose page (E,) may have cut a tie."""
        found = self._search_band(query, rows[rows < self.covered] if self._rows > self.covered else rows, k)
        if found is None:
            flat = self._is_flat(distances[0], distances[-1])
            return self._try_harder(query[None], k, _FLAT * effort if flat else effort)[0]
        return found

    def _expand_many(
        self, queries: Float32Array, rows: NDArray[np.int64], distances: Float32Array, k: int, effort: int
    ) -> list[Answer]:
        """As :meth:`_expand`, for many queries at once, where every row is in the graph and in use."""
        if k > rows.shape[1]:
            return self._try_harder(queries, k, effort)
        limits = distances[:, k - 1] + self._error
        sure = limits < distances[:, -1] - self._error
        ends = (distances <= limits[:, None]).sum(axis=1)
        width = int(ends[sure].max(initial=0))
        found: list[Answer] = [[]] * len(queries)
        left = np.array(self._search_bands((~sure).nonzero()[0], queries, rows, k, found), dtype=np.int64)
        flat = self._is_flat(distances[left, 0], distances[left, -1])
        for unsure, tried in ((left[~flat], effort), (left[flat], _FLAT * effort)):
            if len(unsure):
                for place, answer in zip(unsure.tolist(), self._try_harder(queries[unsure], k, tried), strict=True):
                    found[place] = answer
        step = max(1, EXPANDED_NUMBERS // max(1, width * self.dimension))
        places = sure.nonzero()[0]
        for start in range(0, len(places), step):
            part = places[start : start + step]
            self._rank_many(part, queries[part], rows[part, :width], ends[part], k, found)
        return found

    def _rank_many(
        self,
        places: NDArray[np.int64],
        queries: Float32Array,
        rows: NDArray[np.int64],
        ends: NDArray[np.int64],
        k: int,
        found: list[Answer],
    ) -> None:
        """Puts the best items of queries into ``found``: (P, W) rows each, of which the first ``ends`` count."""
        values = self._values(rows, queries)
        values[np.arange(rows.shape[1]) >= ends[:, None]] = 3
        if len(self._strays):
            # Each counts once, also where the graph found it after all.
            values[~self._findable[rows]] = 3
            values = np.concatenate([values, self._values(self._strays[None], queries)], axis=1)
            rows = np.concatenate([rows, np.broadcast_to(self._strays, (len(rows), len(self._strays)))], axis=1)
            ends = (values < 2).sum(axis=1)
        order = lowest(values, rows.shape[1])
        rows = np.take_along_axis(rows, order, axis=1)
        values = np.take_along_axis(values, order, axis=1)
        segment = self.segment
        if segment is None or self._entries or (not self._all_single() and (self._counts[rows] != 1).any()):
            for place, end, own, ranks in zip(
                places.tolist(), ends.tolist(), rows.tolist(), values.tolist(), strict=True
            ):
                found[place] = ranked_rows(own[:end], ranks[:end], self.entries, k)
            return
        # Every row has one item. Where none of the best ties, their order is known before their ids are.
        ties = (values[:, 1 : k + 1] == values[:, : min(k, rows.shape[1] - 1)]).any(axis=1)
        best = Ranking(segment, rows[:, :k].copy(), values[:, :k].copy())
        for number, place in enumerate(places.tolist()):
            found[place] = partial(best.entries, number)
        for number in ties.nonzero()[0].tolist():
            end = int(ends[number])
            own, ranks = rows[number, :end].copy(), values[number, :end].copy()
            found[places[number]] = partial(segment.best_entries, own, ranks, k)

    def _is_flat(self, nearest: NDArray[np.float32], last: NDArray[np.float32]) -> Any:
        """Whether all of a page may be one tie, so that many more are needed to see the end of it."""
        return nearest + self._error >= last - self._error

    def _try_harder(self, queries: Float32Array, k: int, effort: int) -> list[Answer]:
        wider = self._wider(effort)
        return self._search_graph(queries, k, wider, 1) if wider else self.search_exactly(queries, k)

    def _wider(self, effort: int) -> int:
        """The next effort to try, or 0 where exact search is faster."""
        exact = self._rows * (self.dimension + 45) // (_BY_COLUMN if self._by_column() else _BY_ROW)
        return 4 * effort if 4 * effort <= min(MAX_EFFORT, self.covered // 2, exact) else 0

    def _page_rows(self, rows: NDArray[np.int64], distances: Float32Array, k: int) -> NDArray[np.int64] | None:
        """The rows of a page that hold the best k items of the graph; None when the page is too short to say.

        What the graph left out may tie with the last of its page, so the best k must all be nearer than that.
        """
        last = distances.item(-1) - self._margin
        if self._rows > self.covered:
            # While the graph grows it holds rows of the tail too.
            known = rows < self.covered
            rows, distances = rows[known], distances[known]
        count = len(rows)
        if k <= count and not self._unused:
            limit = distances.item(k - 1) + self._margin
            if limit < last:
                return rows[: distances.searchsorted(limit, "right")]
        # Where rows have no items it takes more of them, where they have several, fewer.
        enough = int(self._counts[rows].cumsum().searchsorted(k))
        if enough >= count:
            return None
        limit = distances.item(enough) + self._margin
        if limit >= last:
            return None
        return rows[: distances.searchsorted(limit, "right")]

    # --- searching with a filter ---

    def search_matching(
        self, query: Float32Array, k: int, matches: Match, parse: Callable[[bytes], dict[str, object]]
    ) -> list[Found] | None:
        """The best k items whose metadata pass; None when they are so rare that SQLite should say which they are.

        Args:
            query: (D,).
            k: at least 1.
            matches: the filter.
            parse: reads metadata.
        """
        reads = 0
        tested: dict[tuple[int, str], bool] = {}

        def passing(row: int, limit: int) -> list[Entry]:
            nonlocal reads
            kept = []
            for entry in self.entries(row, EVERYTHING):
                key = (row, entry[0])
                if key not in tested:
                    reads += 1
                    if reads > _FILTER_READS:
                        raise _TooManyError
                    tested[key] = matches(parse(entry[1]))
                if tested[key]:
                    kept.append(entry)
                    if len(kept) == limit:
                        break
            return kept

        wanted = 4 * k
        try:
            while True:
                rows, floor = self._nearest_rows(query, wanted)
                scores = similarities(self.gathered(rows), query)
                certain = scores > floor
                found = ranked(rows[certain], scores[certain], passing, k)
                if len(found) == k or floor < -1:
                    return found
                if wanted > _FILTER_READS:
                    return None
                wanted *= 4
        except _TooManyError:
            return None

    def search_allowed(self, query: Float32Array, k: int, allowed: dict[int, set[str]]) -> list[Found]:
        """The best k of some items, exactly.

        Args:
            query: (D,).
            k: at least 1.
            allowed: by row, the ids.
        """
        rows = np.array(sorted(allowed), dtype=np.int64)
        if not len(rows):
            return []
        step = max(1, PRODUCT_NUMBERS // self.dimension)
        scores = np.concatenate(
            [products(self.gathered(rows[start : start + step]), query[None])[0] for start in range(0, len(rows), step)]
        )
        counts = np.array([len(allowed[row]) for row in rows.tolist()], dtype=np.int32)
        best = rows[shortlist(scores, min(k, int(counts.sum())), float32_error(self.dimension), counts)]

        def entries(row: int, limit: int) -> list[Entry]:
            ids = allowed[row]
            return [entry for entry in self.entries(row, EVERYTHING) if entry[0] in ids][:limit]

        return ranked(best, similarities(self.gathered(best), query), entries, k)

    def matching_rows(self, matches: Match, parse: Callable[[bytes], dict[str, object]]) -> dict[int, set[str]]:
        """Ids by row of the items whose metadata pass; reads them all."""
        found = {}
        for row in np.flatnonzero(self.used()).tolist():
            ids = {item for item, metadata in self.entries(row, EVERYTHING) if matches(parse(metadata))}
            if ids:
                found[row] = ids
        return found

    def allowed_rows(self, pairs: list[tuple[int, str]]) -> dict[int, set[str]]:
        """Ids by row, from labels and ids; what is not known here is left out."""
        by_label = defaultdict(set)
        for label, item in pairs:
            by_label[label].add(item)
        labels = self.labels()
        rows = np.searchsorted(labels, np.array(list(by_label), dtype=np.int64))
        return {
            row: ids
            for row, (label, ids) in zip(rows.tolist(), by_label.items(), strict=True)
            if row < len(labels) and labels[row] == label
        }

    def _nearest_rows(self, query: Float32Array, count: int) -> tuple[NDArray[np.int64], float]:
        """At least about ``count`` rows near a query, and the score above which none is missing (-2: none at all)."""
        one = query[None]
        effort = max(self._effort(NEIGHBOURS), count)
        if self.graph is not None and effort <= min(MAX_EFFORT, self.covered // 2):
            page = self.graph.nearest(one, effort)
            if page is not None:
                rows, distances = page[0][0], page[1][0]
                rows = rows[rows < self.covered]
                if len(self._strays):
                    rows = np.concatenate([rows[self._findable[rows]], self._strays])
                rows = np.concatenate([rows, np.arange(self.covered, self._rows)])
                return rows[self._counts[rows] > 0], float(1 - distances[-1] + self._error)
        scores, error = self._products(one)
        values = scores[0]
        values[self._counts[: self._rows] == 0] = -2
        if count >= len(self):
            return np.flatnonzero(self.used()), -2.0
        place = len(values) - count
        floor = float(np.partition(values, place)[place])
        return (values >= floor).nonzero()[0], floor + error


class _TooManyError(Exception):
    pass
