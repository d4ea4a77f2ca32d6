"""One medium's rows with a graph over the first of them: when it is built, how it grows, and what was measured of it.

Shape letters: N rows (unique vectors), D width, Q queries. The first ``covered`` rows are in the graph; the tail behind
them is searched exactly, and so are strays, the few rows that the graph holds and cannot find.
"""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from dckt.index.exact import exact_limit
from dckt.index.hnsw import (
    EF_CONSTRUCTION,
    EFFORTS,
    NEIGHBOURS,
    RECALL_TARGET,
    TUNING_QUERIES,
    HnswGraph,
    distance_error,
    disturbed,
    tenth_best,
)
from dckt.index.manifest import GraphReport
from dckt.index.records import Tuned
from dckt.index.results import MediumInfo
from dckt.index.scan import ScannedRows
from dckt.index.schema import Head
from dckt.index.segment import Segment
from dckt.index.vectors import Float32Array

# Of the rows, at most this share is kept when no item uses them any more.
UNUSED_LIMIT = 0.25
# The work (as in EXACT_WORK) of searching the rows that are not in the graph yet: some ten microseconds.
TAIL_WORK = 40_000
# A graph that grew by this share is measured again. Till then the effort grows with the root of its rows: at the effort
# of 20,000 rows the recall of class probabilities, 200 wide, fell from .9926 to .9896 at 30,000 and .9870 at 40,000;
# with that it was .9930 to .9937.
MEASURED_SHARE = 1.0
# Of a graph that grew by this share it is seen again which rows it cannot find.
CHECKED_SHARE = 0.25
# Rows that are added to a graph while searches wait.
_GROWTH = 128

Exclusive = Callable[[], AbstractContextManager[None]]


class GraphedRows(ScannedRows):
    """Rows, the first of which may be in a graph.

    Attributes:
        kind: how it was asked to search: ``auto``, ``exact`` or ``hnsw``.
        graph: over the first :attr:`covered` rows, or None.
        covered: how many rows the graph was built from.
        report: what was measured when a graph was last built, accepted or not.
        effort: of a search for up to ten neighbours in the graph as it was when it was measured.
        recall: that was measured with it, or None.
        target: recall that a graph must reach.
        tuned: what was asked for, and measured, last.
    """

    def __init__(self, dimension: int, kind: str, head: Head, segment: Segment | None = None) -> None:
        super().__init__(dimension, head, segment)
        self.kind = kind
        self.graph: HnswGraph | None = segment.graph if segment else None
        self.covered = len(self.graph) if self.graph else 0
        self.report: GraphReport | None = segment.report if segment else None
        self.target = RECALL_TARGET
        self.effort = self.report.effort if self.report else 0
        self.recall = self.report.recall if self.report else None
        self.tuned: Tuned | None = None
        self._error = distance_error(dimension)
        self._margin = float(self._error)
        self._set_strays()

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

    def present_effort(self) -> int:
        """Of a search for up to ten neighbours in the graph as it has grown."""
        if self.report is None or self.covered <= self.report.count:
            return self.effort
        return math.ceil(self.effort * math.sqrt(self.covered / self.report.count))

    def in_graph(self) -> int:
        """How many unique vectors that are in use the graph covers."""
        return int((self._counts[: self.covered] > 0).sum()) if self._unused else self.covered

    def unused_share(self) -> float:
        """The share of the graph's vectors that no item uses any more."""
        return 1 - self.in_graph() / self.covered if self.covered else 0.0

    def info(self) -> MediumInfo:
        """Its state."""
        return MediumInfo(
            items=self.items,
            unique_vectors=len(self),
            search="hnsw" if self.graph else "exact",
            in_graph=self.in_graph(),
            ef=self.present_effort() if self.graph else None,
            recall_at_10=self.recall,
        )

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
        report = self._report(graph, effort, recall, threads, check)
        return graph if report.accepted else None, replace(report, seconds=time.perf_counter() - started)

    def _report(
        self,
        graph: HnswGraph,
        effort: int,
        recall: float,
        threads: int | None,
        check: Callable[[], None] | None = None,
    ) -> GraphReport:
        """On a graph over the first rows, of which it is seen which it cannot find; too many are a recall too low."""
        strays = self._lost(graph, effort, threads, check)
        if (share := 1 - len(strays) / len(graph)) < RECALL_TARGET:
            recall = min(recall, share)
        return GraphReport(
            graph=secrets.token_hex(8),
            count=len(graph),
            effort=effort,
            recall=recall,
            accepted=(accepted := recall >= self.target),
            seconds=0.0,
            strays=strays if accepted else (),
        )

    def _lost(
        self, graph: HnswGraph, effort: int, threads: int | None, check: Callable[[], None] | None = None
    ) -> tuple[int, ...]:
        """The rows of a graph over the first rows that it cannot find, ascending.

        A row that many items share is missed by each of them, so it must be found without more effort than any.
        """

        def missed(rows: NDArray[np.int64], effort: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
            return graph.missed(rows, self.gathered, effort, threads=threads or -1, check=check)

        shared = self._counts[: len(graph)] > 1
        rows, faults = missed(np.union1d(shared.nonzero()[0], graph.hardly_linked()), effort)
        never, hidden = missed(rows, max(effort, EF_CONSTRUCTION))
        return tuple(np.union1d(rows[faults & shared[rows]], never[hidden]).tolist())

    def check_graph(self, exclusive: Exclusive, threads: int | None) -> None:
        """Sees which rows the graph cannot find, if it grew since that was seen last.

        Args:
            exclusive: keeps searches out.
            threads: how many search.
        """
        if self.graph is None or self.report is None or self._checked == len(self.graph):
            return
        strays = self._lost(self.graph, self.present_effort(), threads)
        with exclusive():
            self.report = replace(self.report, strays=strays)
            self._set_strays()

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
            self._findable = np.ones(rows if len(self._strays) else 0, dtype=np.bool_)
            self._findable[self._strays] = False
        # What is measured again is checked then.
        if rows > (1 + CHECKED_SHARE) * self._checked and not self.outgrew_report():
            self.check_graph(exclusive, threads)

    def attach(self, graph: HnswGraph | None, report: GraphReport) -> None:
        """Takes a graph that was built or measured, or what was measured of one that is not good enough."""
        self.graph, self.report = graph, report
        self.covered = report.count if graph else 0
        self.effort, self.recall = report.effort, report.recall
        self._set_strays()

    def refuse(self) -> None:
        """Goes on without a graph, because making one failed; it is tried again when the collection has doubled."""
        name, count = secrets.token_hex(8), len(self)
        self.attach(
            None, GraphReport(graph=name, count=count, effort=0, recall=0.0, accepted=False, seconds=0.0, strays=())
        )

    def inherit(self, other: GraphedRows) -> None:
        """Takes over what was measured and asked for on another shelf of the same vectors."""
        self.report, self.effort, self.recall = other.report, other.effort, other.recall
        self.target, self.tuned = other.target, other.tuned
        if self.graph is None and self.report:  # its rows had other numbers
            self.report = replace(self.report, strays=())
        self._set_strays()

    def apply_tuning(self, tuned: Tuned, rows: int | None = None) -> None:
        """Takes over what tuning stored; a graph that misses what is asked for is not used.

        Args:
            tuned: what was asked for, and measured.
            rows: of the graph, when it is just this that was measured; None, if no more is known than the report says.
        """
        self.tuned, self.target = tuned, tuned.target
        if self.report is None or tuned.graph != self.report.graph or tuned.effort is None or tuned.recall is None:
            return
        self.effort, self.recall = tuned.effort, tuned.recall
        if rows is not None:
            self.report = replace(self.report, count=rows)
        if tuned.recall < tuned.target:
            refused = replace(self.report, effort=tuned.effort, recall=tuned.recall, accepted=False, strays=())
            self.attach(None, refused)

    def outgrew_report(self) -> bool:
        """Whether the graph has grown much since it was measured."""
        return self.report is None or self.covered > (1 + MEASURED_SHARE) * self.report.count

    def remeasured(self, threads: int | None = 1) -> GraphReport:
        """The report of the present graph, measured anew by so many threads."""
        assert self.graph is not None  # noqa: S101
        assert self.report is not None  # noqa: S101
        effort, recall, _ = self.measured(self.graph, self.target, known=self.effort, threads=threads)
        report = self._report(self.graph, effort, recall, threads)
        return replace(report, graph=self.report.graph, seconds=self.report.seconds)

    def _set_strays(self) -> None:
        """Takes the strays from the report, if there is a graph that they are of."""
        strays = self.report.strays if self.graph and self.report else ()
        self._strays = np.array(strays, dtype=np.int64)
        self._checked = self.covered
        self._findable = np.ones(self.covered if strays else 0, dtype=np.bool_)
        self._findable[self._strays] = False

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
