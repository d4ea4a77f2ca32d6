"""One medium's unique vectors in memory, and how they are searched.

Shape letters: N unique vectors, D width, Q queries. Class-probability vectors collapse into copies, and every graph
library breaks on copies, so a vector is kept once with the list of the items that share it. Rows are in the order of
their labels. The first ``covered`` of them are in the graph, when there is one; the tail behind them is searched
exactly, so that adding an item never has to touch the graph.
"""

from __future__ import annotations

import time
from bisect import bisect_left, insort
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from dckt.index.exact import exact_limit, products, ranked, shortlist, similarities
from dckt.index.hnsw import RECALL_TARGET, HnswGraph
from dckt.index.snapshot import GraphReport, SnapshotError
from dckt.index.store import Change, Contents
from dckt.index.vectors import Float32Array, float32_error

# Of the rows, and of a graph's vectors, at most this share is kept when no item uses them any more.
UNUSED_LIMIT = 0.25
# How many vectors of a graph are compared with the rows when it is read; that of another copy would differ.
_SPOT_CHECKS = 256
# Queries that are multiplied with the matrix at once: bounds the product at this many numbers.
_PRODUCT_NUMBERS = 2**24


class Shelf:
    """The unique vectors of one medium. The caller sees to it that nothing changes during a search.

    Attributes:
        graph: over the first :attr:`covered` rows, or None.
        covered: how many rows the graph was built from.
        report: what was measured when a graph was last built, accepted or not.
    """

    def __init__(self, dimension: int, kind: str, contents: Contents | None = None) -> None:
        self.dimension = dimension
        self._kind = kind
        self._labels = contents.labels if contents else np.zeros(0, dtype=np.int64)
        self._matrix = contents.matrix if contents else np.zeros((0, dimension), dtype=np.float32)
        self._postings = contents.postings if contents else []
        self._rows = len(self._postings)
        self._unused: set[int] = set()
        self.items = sum(map(len, self._postings))
        self.graph: HnswGraph | None = None
        self.covered = 0
        self.report: GraphReport | None = None

    def __len__(self) -> int:
        """How many unique vectors are in use."""
        return self._rows - len(self._unused)

    @property
    def labels(self) -> NDArray[np.int64]:
        """(N,) ascending, unused ones included."""
        return self._labels[: self._rows]

    @property
    def matrix(self) -> Float32Array:
        """(N, D), a row for every label."""
        return self._matrix[: self._rows]

    # --- changing ---

    def apply(self, change: Change) -> None:
        """Repeats what a commit did."""
        self._append(change.vectors)
        for label, item in change.removed:
            row = self._row(label)
            ids = self._postings[row]
            del ids[bisect_left(ids, item)]
            if not ids:
                self._unused.add(row)
        for label, item in change.added:
            row = self._row(label)
            insort(self._postings[row], item)
            self._unused.discard(row)
        self.items += len(change.added) - len(change.removed)

    def compact(self) -> None:
        """Lets go of unused rows when there are many of them."""
        if len(self._unused) <= UNUSED_LIMIT * self._rows:
            return
        kept = np.array([row for row in range(self._rows) if row not in self._unused], dtype=np.int64)
        self.covered = int(np.searchsorted(kept, self.covered))
        self._labels, self._matrix = self._labels[kept], self._matrix[kept]
        self._postings = [self._postings[row] for row in kept.tolist()]
        self._rows = len(kept)
        self._unused = set()

    def wants_graph(self) -> bool:
        """Whether the vectors outside the graph, or the unused ones inside it, have become too many."""
        if self._kind == "exact" or not len(self):
            return False
        report = self.report
        if report and not report.accepted:
            # A graph that was measured and refused is tried again when the collection has doubled.
            return len(self) >= 2 * report.count
        if self.graph is None:
            return self._kind == "hnsw" or len(self) > exact_limit(self.dimension)
        tail = self._rows - self.covered
        limit = exact_limit(self.dimension)
        if self._kind == "hnsw":
            limit = min(limit, len(self.graph) // 4)
        return tail > limit or self.unused_share() > UNUSED_LIMIT

    def in_graph(self) -> int:
        """How many unique vectors that are in use the graph covers."""
        return self.covered - sum(row < self.covered for row in self._unused)

    def unused_share(self) -> float:
        """The share of the graph's vectors that no item uses any more."""
        return 1 - self.in_graph() / len(self.graph) if self.graph else 0.0

    # --- the graph ---

    def build_graph(self, threads: int | None) -> tuple[HnswGraph | None, GraphReport]:
        """A graph over every row: the present one, grown, or, where that falls short, a new one.

        Searches may go on meanwhile; the shelf itself is not changed.

        Args:
            threads: how many build; see :meth:`HnswGraph.add`.

        Returns:
            What was measured, and the graph, or None when it is not good enough to be used.
        """
        started = time.perf_counter()
        graph, recall = None, 0.0
        if self.graph is not None and self.unused_share() <= UNUSED_LIMIT:
            graph = self.graph
            graph.add(self.labels[self.covered :], self.matrix[self.covered :], threads=threads)
            recall = graph.tune(self.labels, self.matrix)
        if graph is None or recall < RECALL_TARGET:
            graph = HnswGraph(self.dimension)
            graph.add(self.labels, self.matrix, threads=threads)
            recall = graph.tune(self.labels, self.matrix)
        report = GraphReport(
            count=self._rows,
            ef=graph.ef,
            recall=recall,
            accepted=recall >= RECALL_TARGET,
            seconds=time.perf_counter() - started,
        )
        return graph if report.accepted else None, report

    def covered_by(self, graph: HnswGraph) -> int:
        """How many of the rows a graph covers that was read from the disk.

        Raises:
            SnapshotError: it is not a graph of these vectors.
        """
        covered = int(np.searchsorted(self.labels, graph.labels[-1], side="right")) if len(graph) else 0
        expected = self.labels[:covered]
        if not np.isin(expected, graph.labels).all():
            raise SnapshotError("it lacks vectors that it should hold")
        rows = np.linspace(0, covered - 1, min(covered, _SPOT_CHECKS)).astype(np.int64)
        if covered and not np.array_equal(graph.vectors(expected[rows]), self.matrix[rows]):
            raise SnapshotError("it holds other vectors")
        return covered

    # --- searching ---

    def search(self, queries: Float32Array, k: int) -> list[list[tuple[float, str]]]:
        """The best k items of every query: (score, id), score descending, ties by id ascending.

        Args:
            queries: (Q, D) float32 of length 1.
            k: at least 1; more than there are gives all.
        """
        k = min(k, self.items)
        if not k:
            return [[] for _ in queries]
        step = max(1, _PRODUCT_NUMBERS // self._rows)
        parts = (queries[start : start + step] for start in range(0, len(queries), step))
        return [hits for part in parts for hits in self._search_part(part, k)]

    def _search_part(self, queries: Float32Array, k: int) -> Iterator[list[tuple[float, str]]]:
        pages = self.graph.nearest(queries) if self.graph else None
        if pages is None:
            for query, scores in zip(queries, products(self.matrix, queries), strict=True):
                yield self._search_exactly(query, scores, k)
            return
        tails = products(self.matrix[self.covered :], queries)
        for query, page, tail in zip(queries, pages, tails, strict=True):
            hits = self._search_page(query, page, tail, k)
            if hits is None:
                hits = self._search_exactly(query, products(self.matrix, query[None])[0], k)
            yield hits

    def _search_exactly(self, query: Float32Array, scores: Float32Array, k: int) -> list[tuple[float, str]]:
        """Answers from the float32 products (N,) of a query with every row."""
        rows = self._best_rows(scores, k)
        return ranked(rows, similarities(self.matrix[rows], query), self._postings, k)

    def _search_page(
        self, query: Float32Array, page: NDArray[np.int64], tail: Float32Array, k: int
    ) -> list[tuple[float, str]] | None:
        """Answers from the graph's page and the products with the tail; None when it takes more to be sure."""
        places = np.searchsorted(self.labels, page)
        places[places == self._rows] = 0
        rows = places[(self.labels[places] == page) & (places < self.covered)]
        scores = similarities(self.matrix[rows], query)
        floor = -2.0
        if len(page) < len(self.graph or ()):
            # What the graph left out may tie with the worst of its page; above that the page is complete.
            floor = float(scores.min(initial=2.0)) + float32_error(self.dimension)
        if len(tail):
            best = self._best_rows(tail, k, first=self.covered)
            rows = np.concatenate([rows, best])
            scores = np.concatenate([scores, similarities(self.matrix[best], query)])
        certain = scores > floor
        hits = ranked(rows[certain], scores[certain], self._postings, k)
        return hits if len(hits) == k else None

    def _best_rows(self, scores: Float32Array, k: int, first: int = 0) -> NDArray[np.int64]:
        """Rows from ``first`` on that hold the best k items; every row in use holds at least one."""
        unused = [row - first for row in self._unused if row >= first]
        scores[unused] = -2
        return first + shortlist(scores, min(k, len(scores) - len(unused)), self.dimension)

    # --- rows ---

    def _row(self, label: int) -> int:
        return int(np.searchsorted(self.labels, label))

    def _append(self, vectors: dict[int, Float32Array]) -> None:
        if not vectors:
            return
        needed = self._rows + len(vectors)
        if needed > len(self._labels) or not self._matrix.flags.writeable:
            room = max(needed, 3 * self._rows // 2)
            labels = np.zeros(room, dtype=np.int64)
            matrix = np.zeros((room, self.dimension), dtype=np.float32)
            labels[: self._rows], matrix[: self._rows] = self.labels, self.matrix
            self._labels, self._matrix = labels, matrix
        self._labels[self._rows : needed] = list(vectors)
        self._matrix[self._rows : needed] = np.stack(list(vectors.values()))
        self._postings.extend([] for _ in vectors)
        self._rows = needed
