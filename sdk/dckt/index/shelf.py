"""One medium's unique vectors in memory, and how they are searched.

Shape letters: N rows (unique vectors), D width, Q queries. Class-probability vectors collapse into copies, and every
graph library breaks on copies, so a vector is kept once with the items that share it. Rows are in the order of their
labels. The first of them are those of a segment, which is mapped and never changes; what came later, and the items of
rows that changed since, are in memory. The first ``covered`` rows are in the graph, when there is one; the tail behind
them is searched exactly.
"""

from __future__ import annotations

import secrets
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from dckt.index.exact import (
    BAND_NUMBERS,
    COLUMN_NUMBERS,
    Bands,
    Columns,
    Entries,
    Found,
    exact_limit,
    lowest,
    products,
    ranked,
    ranked_rows,
    shortlist,
    similarities,
)
from dckt.index.filters import Match
from dckt.index.hnsw import EFFORTS, NEIGHBOURS, RECALL_TARGET, TUNING_QUERIES, HnswGraph, disturbed, tenth_best
from dckt.index.schema import Head, added
from dckt.index.segment import GraphReport, Segment
from dckt.index.store import Change, Contents, Entry, Tuned
from dckt.index.vectors import Float32Array, float32_error

# Of the rows, at most this share is kept when no item uses them any more.
UNUSED_LIMIT = 0.25
# The work (as in EXACT_WORK) of searching the rows that are not in the graph yet: some ten microseconds.
TAIL_WORK = 40_000
# A graph that grew by this share is measured again.
MEASURED_SHARE = 0.5
# A search that would have to try harder than this goes the exact way.
MAX_EFFORT = 4096
# Queries that are multiplied with the matrix at once: bounds the product at this many numbers.
_PRODUCT_NUMBERS = 2**24
# The work of exact search that takes as long as one step of effort in a graph, about a microsecond.
_BY_ROW, _BY_COLUMN = 3300, 13_000
# A page that may be all one tie counts as one of this many times the effort.
_FLAT = 8
# Rows that are added to a graph while searches wait.
_GROWTH = 128
# Queries that are looked up in the graph at once, and up to how many of them are put together one by one.
_PART = 512
_FEW = 4
_EXPANDED_NUMBERS = 2**22
# Items whose metadata a filter reads before SQLite is asked.
_FILTER_READS = 4000
_EVERYTHING = 2**62

# The share of the rows up to which a band is searched instead of all, and how far beside a query one begins to look.
_BAND_SHARE = 8
_BAND_PROBE = 32
# Of a query's numbers the largest from which on a band is likely to be thin.
_NEXT_TO_AXIS = 0.9

Exclusive = Callable[[], AbstractContextManager[None]]
# Found items, or what gives them.
Answer: TypeAlias = list[Found] | Callable[[], list[Found]]


class Shelf:
    """The unique vectors of one medium. The caller sees to it that nothing changes during a search.

    Attributes:
        head: the commit that it shows.
        segment: what its first rows are mapped from, or None.
        items: how many.
        total: of their checksums in SQLite.
        graph: over the first :attr:`covered` rows, or None.
        covered: how many rows the graph was built from.
        report: what was measured when a graph was last built, accepted or not.
        effort: of a search in the graph for up to ten neighbours.
        recall: that was measured with it, or None.
        target: recall that a graph must reach.
        tuned: what was asked for, and measured, last.
    """

    def __init__(self, dimension: int, kind: str, head: Head, segment: Segment | None = None) -> None:
        self.dimension = dimension
        self.kind = kind
        self.head = head
        self.segment = segment
        self._mapped = len(segment.labels) if segment else 0
        self._rows = self._mapped
        self._tail_labels = np.zeros(0, dtype=np.int64)
        self._tail = np.zeros((0, dimension), dtype=np.float32)
        self._counts = np.diff(segment.items).astype(np.int32) if segment else np.zeros(0, dtype=np.int32)
        self._entries: dict[int, list[Entry]] = {}
        self.items = int(self._counts.sum())
        self.total = segment.total if segment else 0
        self._unused = int((self._counts == 0).sum())
        self._columns: Columns | None = None
        self._bands: Bands | None = None
        self._ranks: NDArray[np.int64] | None = None
        # How far a distance of hnswlib's is from the true one, at four standard deviations of its rounding, in at least
        # four lanes. The bound for the worst of all orders would make near ties, of which there are many, ties.
        self._error = np.float32((1 + (dimension / 4) ** 0.5) * 2.0**-24)
        self.graph: HnswGraph | None = segment.graph if segment else None
        self.covered = len(self.graph) if self.graph else 0
        self.report: GraphReport | None = segment.report if segment else None
        self.target = RECALL_TARGET
        self.effort = self.report.effort if self.report else 0
        self.recall = self.report.recall if self.report else None
        self.tuned: Tuned | None = None

    @classmethod
    def of(cls, contents: Contents, dimension: int, kind: str, head: Head) -> Shelf:
        """With what the store holds."""
        shelf = cls(dimension, kind, head)
        shelf._tail_labels, shelf._tail = contents.labels, contents.matrix
        shelf._rows = len(contents.labels)
        shelf._entries = dict(enumerate(contents.postings))
        shelf._counts = np.array([len(entries) for entries in contents.postings], dtype=np.int32)
        shelf.items, shelf.total = int(shelf._counts.sum()), contents.total
        shelf._unused = int((shelf._counts == 0).sum())
        return shelf

    def __len__(self) -> int:
        """How many unique vectors are in use."""
        return self._rows - self._unused

    @property
    def rows(self) -> int:
        """How many rows, unused ones included."""
        return self._rows

    @property
    def mapped(self) -> int:
        """How many of the rows are those of the segment."""
        return self._mapped

    @property
    def last_label(self) -> int:
        """The highest label of a row, or 0."""
        if self._rows > self._mapped:
            return int(self._tail_labels[self._rows - self._mapped - 1])
        return int(self.segment.labels[-1]) if self.segment else 0

    def labels(self) -> NDArray[np.int64]:
        """(N,) ascending, unused ones included."""
        tail = self._tail_labels[: self._rows - self._mapped]
        return np.concatenate([self.segment.labels, tail]) if self.segment else tail.copy()

    def used(self) -> NDArray[np.bool_]:
        """(N,) whether a row has items."""
        return self._counts[: self._rows] > 0

    def parts(self, first: int = 0, end: int | None = None) -> list[Float32Array]:
        """The rows from ``first`` on, up to ``end``, one array after the other, not copied."""
        end = self._rows if end is None else end
        tail = self._tail[max(0, first - self._mapped) : max(0, end - self._mapped)]
        if self.segment is None or first >= self._mapped:
            return [tail]
        mapped = self.segment.vectors[first:end]
        return [mapped, tail] if len(tail) else [mapped]

    def entries(self, row: int, limit: int) -> list[Entry]:
        """The first items of a row, at most so many, ids ascending."""
        known = self._entries.get(row)
        if known is not None:
            return known[:limit] if len(known) > limit else known
        assert self.segment is not None  # noqa: S101 - every other row is in the dictionary
        return self.segment.entries(row, limit)

    def gathered(self, rows: NDArray[np.int64]) -> Float32Array:
        """The vectors of some rows, (M, D)."""
        if self.segment is None:
            return self._tail.take(rows, axis=0)
        if self._rows == self._mapped:
            return self.segment.vectors.take(rows, axis=0)
        vectors = np.empty((len(rows), self.dimension), dtype=np.float32)
        mapped = rows < self._mapped
        vectors[mapped] = self.segment.vectors[rows[mapped]]
        vectors[~mapped] = self._tail[rows[~mapped] - self._mapped]
        return vectors

    # --- changing ---

    def apply(self, change: Change, head: Head) -> bool:
        """Repeats what commits did; tells whether what came of it is what the store holds."""
        fresh = self._append(change.vectors)
        touched: dict[int, dict[str, bytes]] = {}

        def entries_of(label: int) -> dict[str, bytes] | None:
            row = fresh.get(label)
            if row is None:
                row = self._row(label)
            if row is None:
                return None
            if row not in touched:
                touched[row] = dict(self.entries(row, _EVERYTHING))
            return touched[row]

        for label, item in change.removed:
            # A vector that came and went between two looks is not known, and need not be.
            if (entries := entries_of(label)) is not None:
                entries.pop(item, None)
        firsts = 0
        for label, item, metadata in change.added:
            row = fresh.get(label)
            if row is not None and not self._entries[row] and row not in touched:
                # The first item of a new row, and of most rows the only one.
                self._entries[row] = [(item, metadata.encode())]
                self._counts[row] = 1
                firsts += 1
                continue
            if (entries := entries_of(label)) is None:
                return False
            entries[item] = metadata.encode()
        self.items += firsts
        self._unused -= firsts
        for row, entries in touched.items():
            # A new list each time: who reads the old one meanwhile is not disturbed.
            self._entries[row] = sorted(entries.items())
            before, after = int(self._counts[row]), len(entries)
            self._counts[row] = after
            self.items += after - before
            self._unused += (after == 0) - (before == 0)
        self.head, self._ranks = head, None
        self.total = added(self.total, change.more)
        return (self.items, self.total) == (change.items, change.total)

    def changed_share(self) -> float:
        """The share of the rows that is in memory because it differs from the segment."""
        return len(self._entries) / max(1, self._rows)

    def _append(self, vectors: dict[int, Float32Array]) -> dict[int, int]:
        """Makes a row for each new vector; gives the rows by label."""
        if not vectors:
            return {}
        old, new = self._rows - self._mapped, len(vectors)
        if old + new > len(self._tail_labels) or not self._tail.flags.writeable:
            room = max(old + new, 3 * old // 2)
            labels = np.zeros(room, dtype=np.int64)
            matrix = np.zeros((room, self.dimension), dtype=np.float32)
            labels[:old], matrix[:old] = self._tail_labels[:old], self._tail[:old]
            self._tail_labels, self._tail = labels, matrix
        if self._rows + new > len(self._counts):
            counts = np.zeros(max(self._rows + new, 3 * self._rows // 2), dtype=np.int32)
            counts[: self._rows] = self._counts[: self._rows]
            self._counts = counts
        self._tail_labels[old : old + new] = list(vectors)
        self._tail[old : old + new] = np.concatenate(list(vectors.values())).reshape(new, -1)
        fresh = {label: self._rows + place for place, label in enumerate(vectors)}
        self._counts[self._rows : self._rows + new] = 0
        self._entries.update((row, []) for row in fresh.values())
        self._unused += new
        self._rows += new
        return fresh

    def _row(self, label: int) -> int | None:
        for first, labels in (
            (0, self.segment.labels if self.segment else self._tail_labels[:0]),
            (self._mapped, self._tail_labels[: self._rows - self._mapped]),
        ):
            place = int(np.searchsorted(labels, label))
            if place < len(labels) and labels[place] == label:
                return first + place
        return None

    # --- the graph ---

    def wants_new_graph(self) -> bool:
        """Whether there should be a graph and is none, or too much of the one that is there is unused."""
        if self.kind == "exact" or not len(self):
            return False
        if self.graph is not None:
            return self.is_worn()
        if self.report and not self.report.accepted:
            # A graph that was measured and refused is tried again when the collection has doubled.
            return len(self) >= 2 * self.report.count
        return self.kind == "hnsw" or len(self) > exact_limit(self.dimension)

    def wants_growth(self) -> bool:
        """Whether the rows behind the graph have become too many."""
        if self.graph is None:
            return False
        limit = min(TAIL_WORK // (self.dimension + 45), max(1, len(self.graph) // 4))
        return self._rows - self.covered > limit

    def is_worn(self) -> bool:
        """Whether no item uses too many of the rows any more: those in the graph, or all where there is none."""
        share = self.unused_share() if self.graph is not None else self._unused / max(1, self._rows)
        return share > UNUSED_LIMIT

    def in_graph(self) -> int:
        """How many unique vectors that are in use the graph covers."""
        return int((self._counts[: self.covered] > 0).sum()) if self._unused else self.covered

    def unused_share(self) -> float:
        """The share of the graph's vectors that no item uses any more."""
        return 1 - self.in_graph() / self.covered if self.covered else 0.0

    def build_graph(
        self, threads: int | None, check: Callable[[], None] | None = None
    ) -> tuple[HnswGraph | None, GraphReport]:
        """A new graph over every row. Searches may go on meanwhile; the shelf itself is not changed.

        Args:
            threads: how many build; see :meth:`HnswGraph.add`.
            check: is called now and then, and may end it with an exception.

        Returns:
            What was measured, and the graph, or None when it is not good enough to be used.
        """
        started = time.perf_counter()
        graph = HnswGraph(self.dimension)
        rows = self._rows
        graph.reserve(rows)

        def take_in(order: NDArray[np.int64]) -> None:
            for start in range(0, len(order), 1024):
                if check:
                    check()
                part = order[start : start + 1024]
                graph.add(part, self.gathered(part), threads=threads)

        # The last rows are asked for before they are in the graph: what they find, other vectors like them will find.
        first, last = np.split(graph.shuffled(rows), [rows - min(TUNING_QUERIES, rows // 20)])
        take_in(first)
        effort, recall, _ = self.measured(graph, self.target, missing=last, threads=threads)
        take_in(last)
        report = GraphReport(
            graph=secrets.token_hex(8),
            count=rows,
            effort=effort,
            recall=recall,
            accepted=recall >= self.target,
            seconds=time.perf_counter() - started,
        )
        return graph if report.accepted else None, report

    def grow_graph(self, exclusive: Exclusive, threads: int | None) -> None:
        """Adds the rows behind the graph to it, few at a time, so that searches wait for moments only.

        Args:
            exclusive: keeps searches out.
            threads: how many build.
        """
        graph = self.graph
        if graph is None:
            return
        rows = self._rows
        order = graph.shuffled(rows - self.covered)
        if rows > self.covered:
            with exclusive():
                graph.reserve(max(rows, 5 * self.covered // 4))
        for start in range(0, len(order), _GROWTH):
            part = order[start : start + _GROWTH]
            vectors = self.gathered(part)
            with exclusive():
                graph.add(part, vectors, threads=threads)
        with exclusive():
            self.covered = rows

    def attach(self, graph: HnswGraph | None, report: GraphReport) -> None:
        """Takes a graph that was built or measured, or what was measured of one that is not good enough."""
        self.graph, self.report = graph, report
        self.covered = report.count if graph else 0
        self.effort, self.recall = report.effort, report.recall

    def refuse(self) -> None:
        """Goes on without a graph, because making one failed; it is tried again when the collection has doubled."""
        name, count = secrets.token_hex(8), len(self)
        self.attach(None, GraphReport(graph=name, count=count, effort=0, recall=0.0, accepted=False, seconds=0.0))

    def inherit(self, other: Shelf) -> None:
        """Takes over what was measured and asked for on another shelf of the same vectors."""
        self.report, self.effort, self.recall = other.report, other.effort, other.recall
        self.target, self.tuned = other.target, other.tuned

    def apply_tuning(self, tuned: Tuned) -> None:
        """Takes over what tuning stored; a graph that misses what is asked for is not used."""
        self.tuned, self.target = tuned, tuned.target
        if self.report is None or tuned.graph != self.report.graph or tuned.effort is None or tuned.recall is None:
            return
        self.effort, self.recall = tuned.effort, tuned.recall
        if tuned.recall < tuned.target:
            self.attach(None, replace(self.report, effort=tuned.effort, recall=tuned.recall, accepted=False))

    def outgrew_report(self) -> bool:
        """Whether the graph has grown much since it was measured."""
        return self.report is None or self.covered > (1 + MEASURED_SHARE) * self.report.count

    def remeasured(self, threads: int | None = 1) -> GraphReport:
        """The report of the present graph, measured anew by so many threads."""
        assert self.graph is not None  # noqa: S101
        assert self.report is not None  # noqa: S101
        effort, recall, _ = self.measured(self.graph, self.target, known=self.effort, threads=threads)
        return replace(self.report, count=self.covered, effort=effort, recall=recall, accepted=recall >= self.target)

    def measured(
        self,
        graph: HnswGraph,
        target: float,
        queries: Float32Array | None = None,
        *,
        missing: NDArray[np.int64] | None = None,
        known: int | None = None,
        threads: int | None = 1,
    ) -> tuple[int, float, int]:
        """The effort with which a graph reaches a recall, the recall, and with how many queries it was measured.

        The shelf may change meanwhile: the vectors of a row never do, and which rows count is noted first.

        Args:
            graph: over the first rows.
            target: the recall.
            queries: (Q, D); None takes a sample of the rows, disturbed.
            missing: rows that the graph lacks among the first; they are the queries then.
            known: see :meth:`HnswGraph.tune`.
            threads: how many search the graph; None takes every core.
        """
        rows = len(graph)
        if missing is not None and len(missing):
            rows += len(missing)
            queries = self.gathered(missing)
        used = self.used()[:rows]
        if missing is not None:
            used[missing] = False
        if not used.any():
            return EFFORTS[0], 1.0, 0
        if queries is None:
            queries = self._sample(graph, np.flatnonzero(used), threads)
        floors = tenth_best(self.parts(end=rows), used, queries)
        return *graph.tune(queries, floors, used, target, known, threads or -1), len(queries)

    def _sample(self, graph: HnswGraph, rows: NDArray[np.int64], threads: int | None) -> Float32Array:
        """Queries to measure with, (Q, D).

        A row is easier to find than a new vector like it, because the graph was built around it. So rows are moved as
        far as some of their 200 nearest are apart, in a direction in which they are. Their recall is then, at any
        effort, that of vectors that were held out (class probabilities, 10 and 200 wide, 100,000 rows); fewer than 200
        flatter, and rows that are disturbed in any direction are harder to find in 10 dimensions and easier in 200.
        Queries of another kind are for :meth:`dckt.index.Index.tune`.
        """
        generator = np.random.default_rng(0)
        chosen = self.gathered(rows[generator.permutation(len(rows))[:TUNING_QUERIES]])
        queries = disturbed(chosen, 0)
        effort = min(20 * NEIGHBOURS, max(2 * NEIGHBOURS, len(rows) // 100))
        pages = graph.nearest(chosen, effort, threads=threads or -1)
        if pages is not None:
            near, _ = pages
            columns = generator.integers(0, near.shape[1], (2, len(near)))
            one, other = (self.gathered(near[np.arange(len(near)), column]) for column in columns)
            moved = chosen + one - other
            lengths = np.linalg.norm(moved, axis=1, keepdims=True)
            # What cancels out is disturbed.
            queries = np.where(lengths > 0.1, moved / np.maximum(lengths, 0.1), queries)
        return queries

    # --- searching ---

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
            return self._search_exactly(queries, k)
        return self._search_graph(queries, k, effort, threads or -1)

    def _effort(self, k: int) -> int:
        """Of a search in the graph, or 0 where it does not pay. Steps are doubled, so that most k share one."""
        if self.graph is None:
            return 0
        effort, reach = self.effort, NEIGHBOURS
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
            return self._search_exactly(queries, k)
        if len(queries) > _FEW and self._rows == self.covered and not self._unused:
            return self._expand_many(queries, *pages, k, effort)
        tails = None
        if self._rows > self.covered:
            tails = np.concatenate([products(part, queries) for part in self.parts(self.covered)], axis=1)
        segment = self.segment if self._all_single() else None
        found: list[Answer] = []
        for place, query in enumerate(queries):
            rows = self._page_rows(pages[0][place], pages[1][place], k)
            if rows is None:
                found.append(self._settled(query, pages[0][place], pages[1][place], k, effort))
                continue
            if tails is not None:
                rows = np.concatenate([rows, self._best_rows(tails[place], k, first=self.covered)])
            scores = similarities(self.gathered(rows), query)
            if segment is not None:
                hits = segment.only_entries(rows.tolist(), (-scores).tolist())
                hits.sort()
                del hits[k:]
                found.append(hits)
            else:
                found.append(ranked(rows, scores, self._entries_now(), k))
        return found

    def _settled(
        self, query: Float32Array, rows: NDArray[np.int64], distances: Float32Array, k: int, effort: int
    ) -> Answer:
        """The best k items for a query (D,) whose page (E,) may have cut a tie."""
        found = self._search_band(query, rows[rows < self.covered] if self._rows > self.covered else rows, k)
        if found is None:
            flat = self._is_flat(distances[0], distances[-1])
            return self._try_harder(query[None], k, _FLAT * effort if flat else effort)[0]
        return found

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
            step = max(1, _EXPANDED_NUMBERS // (len(near) * self.dimension))
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
        vectors = self.gathered(rows.ravel()).reshape(*rows.shape, self.dimension)
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

    def _all_single(self) -> bool:
        """Whether every row is in the segment as it was, with one item."""
        return not self._entries and self.items == self._rows and not self._unused

    def _entries_now(self) -> Entries:
        """What gives the items of a row, without a detour where none of them changed."""
        return self.entries if self._entries or self.segment is None else self.segment.entries

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
        step = max(1, _EXPANDED_NUMBERS // max(1, width * self.dimension))
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
            hits = segment.only_entries(rows[number, :end].tolist(), values[number, :end].tolist())
            hits.sort()
            del hits[k:]
            found[places[number]] = hits

    def _is_flat(self, nearest: NDArray[np.float32], last: NDArray[np.float32]) -> Any:
        """Whether all of a page may be one tie, so that many more are needed to see the end of it."""
        return nearest + self._error >= last - self._error

    def _try_harder(self, queries: Float32Array, k: int, effort: int) -> list[Answer]:
        wider = self._wider(effort)
        return self._search_graph(queries, k, wider, 1) if wider else self._search_exactly(queries, k)

    def _wider(self, effort: int) -> int:
        """The next effort to try, or 0 where exact search is faster."""
        exact = self._rows * (self.dimension + 45) // (_BY_COLUMN if self._by_column() else _BY_ROW)
        return 4 * effort if 4 * effort <= min(MAX_EFFORT, self.covered // 2, exact) else 0

    def _by_column(self) -> bool:
        """Whether exact search of one query goes by column."""
        return self._rows * self.dimension <= COLUMN_NUMBERS

    def _page_rows(self, rows: NDArray[np.int64], distances: Float32Array, k: int) -> NDArray[np.int64] | None:
        """The rows of a page that hold the best k items of the graph; None when the page is too short to say.

        What the graph left out may tie with the last of its page, so the best k must all be nearer than that.
        """
        last = distances[-1] - self._error
        if self._rows > self.covered:
            # While the graph grows it holds rows of the tail too.
            known = rows < self.covered
            rows, distances = rows[known], distances[known]
        count = len(rows)
        if k <= count and not self._unused:
            limit = distances[k - 1] + self._error
            if limit < last:
                return rows[: distances.searchsorted(limit, "right")]
        # Where rows have no items it takes more of them, where they have several, fewer.
        enough = int(self._counts[rows].cumsum().searchsorted(k))
        if enough >= count:
            return None
        limit = distances[enough] + self._error
        if limit >= last:
            return None
        return rows[: distances.searchsorted(limit, "right")]

    def _search_exactly(self, queries: Float32Array, k: int) -> list[Answer]:
        bands = self._bands_now() if k <= _BAND_PROBE else None
        found: list[Answer | None] = [None] * len(queries)
        if bands is not None:
            for place in (np.abs(queries).max(axis=1) > _NEXT_TO_AXIS).nonzero()[0].tolist():
                query = queries[place]
                found[place] = self._search_band(query, bands.beside(query, _BAND_PROBE), k)
        places = [place for place, hits in enumerate(found) if hits is None]
        step = max(1, _PRODUCT_NUMBERS // self._rows)
        for start in range(0, len(places), step):
            part = places[start : start + step]
            scores, error = self._products(queries[part] if len(part) < len(queries) else queries)
            for place, values in zip(part, scores, strict=True):
                rows = self._best_rows(values, k, error=error)
                similar = similarities(self.gathered(rows), queries[place])
                found[place] = ranked(rows, similar, self._entries_now(), k, self._id_ranks)
        return [hits for hits in found if hits is not None]

    def _id_ranks(self) -> NDArray[np.int64]:
        """(N,) the place of every row in the order of the rows' first ids; those without items are last."""
        ranks = self._ranks
        if ranks is None or len(ranks) != self._rows:
            firsts = [entries[0][0] if (entries := self.entries(row, 1)) else "\U0010ffff" for row in range(self._rows)]
            ranks = np.empty(self._rows, dtype=np.int64)
            ranks[sorted(range(self._rows), key=firsts.__getitem__)] = np.arange(self._rows)
            self._ranks = ranks
        return ranks

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

    def _best_rows(
        self, scores: Float32Array, k: int, *, first: int = 0, error: float | None = None
    ) -> NDArray[np.int64]:
        """Rows from ``first`` on that hold the best k items; the scores are overwritten."""
        counts = self._counts[first : self._rows]
        if self._unused:
            scores[counts == 0] = -2
        rows = shortlist(scores, k, float32_error(self.dimension) if error is None else error, counts)
        return rows + first if first else rows

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
            for entry in self.entries(row, _EVERYTHING):
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
        step = max(1, _PRODUCT_NUMBERS // self.dimension)
        scores = np.concatenate(
            [products(self.gathered(rows[start : start + step]), query[None])[0] for start in range(0, len(rows), step)]
        )
        counts = np.array([len(allowed[row]) for row in rows.tolist()], dtype=np.int32)
        best = rows[shortlist(scores, min(k, int(counts.sum())), float32_error(self.dimension), counts)]

        def entries(row: int, limit: int) -> list[Entry]:
            ids = allowed[row]
            return [entry for entry in self.entries(row, _EVERYTHING) if entry[0] in ids][:limit]

        return ranked(best, similarities(self.gathered(best), query), entries, k)

    def matching_rows(self, matches: Match, parse: Callable[[bytes], dict[str, object]]) -> dict[int, set[str]]:
        """Ids by row of the items whose metadata pass; reads them all."""
        found = {}
        for row in np.flatnonzero(self.used()).tolist():
            ids = {item for item, metadata in self.entries(row, _EVERYTHING) if matches(parse(metadata))}
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

    # --- writing ---

    def source(self, *, drop_unused: bool) -> ShelfSource:
        """What a segment is written from, as of now."""
        return ShelfSource(self, drop_unused)


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


class _TooManyError(Exception):
    pass


class ShelfSource:
    """The rows of a shelf as they were when it was made; the shelf may change meanwhile.

    Args:
        shelf: whose.
        drop_unused: leave out rows without items.
    """

    def __init__(self, shelf: Shelf, drop_unused: bool) -> None:
        self._segment = shelf.segment
        self._mapped = shelf._mapped
        self._changed = dict(shelf._entries)
        self._parts = shelf.parts()
        self._labels = shelf.labels()
        self._kept = shelf.used() if drop_unused else np.ones(shelf.rows, dtype=np.bool_)

    @property
    def labels(self) -> NDArray[np.int64]:
        """(N,) ascending."""
        return self._labels[self._kept]

    def vectors(self) -> Iterator[Float32Array]:
        """Parts that make (N, D)."""
        start = 0
        for part in self._parts:
            for first in range(0, len(part), 8192):
                block = part[first : first + 8192]
                kept = self._kept[start : start + len(block)]
                yield block if kept.all() else block[kept]
                start += len(block)

    def entries(self) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], bytes, NDArray[np.int64], bytes]]:
        """Runs of rows; those that did not change since the segment are copied as they are."""
        row = 0
        special = sorted({*self._changed, *np.flatnonzero(~self._kept).tolist()})
        block: list[list[Entry]] = []
        for changed in special:
            if changed > row:
                if block:
                    yield _packed(block)
                    block = []
                yield from self._copied(row, changed)
            if self._kept[changed]:
                block.append(self._changed.get(changed, []))
            row = changed + 1
            if len(block) >= 8192:
                yield _packed(block)
                block = []
        if block:
            yield _packed(block)
        yield from self._copied(row, self._mapped)

    def _copied(
        self, first: int, end: int
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], bytes, NDArray[np.int64], bytes]]:
        segment = self._segment
        for start in range(first, end if segment else first, 65536):
            assert segment is not None  # noqa: S101
            stop = min(end, start + 65536)
            items = segment.items[start : stop + 1]
            ids = segment.id_ends[items[0] : items[-1] + 1]
            metadata = segment.metadata_ends[items[0] : items[-1] + 1]
            yield (
                np.diff(items),
                np.diff(ids),
                segment.ids[int(ids[0]) : int(ids[-1])],
                np.diff(metadata),
                segment.metadata[int(metadata[0]) : int(metadata[-1])],
            )


def _packed(
    rows: list[list[Entry]],
) -> tuple[NDArray[np.int64], NDArray[np.int64], bytes, NDArray[np.int64], bytes]:
    ids = [item.encode() for entries in rows for item, _ in entries]
    metadata = [text for entries in rows for _, text in entries]
    return (
        np.array([len(entries) for entries in rows], dtype=np.int64),
        np.array([len(item) for item in ids], dtype=np.int64),
        b"".join(ids),
        np.array([len(text) for text in metadata], dtype=np.int64),
        b"".join(metadata),
    )
