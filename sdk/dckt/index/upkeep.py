"""Builds graphs and writes segments when they are wanted, in the builder's thread, while searches and changes go on."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from dckt.errors import IndexFolderError
from dckt.index.builder import Builder
from dckt.index.exact import exact_limit
from dckt.index.manifest import SegmentError, read_manifest
from dckt.index.records import Tuned
from dckt.index.results import Tuning
from dckt.index.segment import remove_others, write_segment
from dckt.index.shelf import Shelf
from dckt.index.source import RowSource
from dckt.index.state import IndexState
from dckt.index.store import CHECKED_BYTES, ItemStore
from dckt.index.vectors import Float32Array

log = logging.getLogger(__name__)

# A segment is written anew when this share of the rows is not in it, so all that is ever written is at most three times
# what there is in the end; and on closing, when opening would otherwise replay more than this share.
_STALE_SHARE = 0.5
_STALE_ON_CLOSE = 0.05
# The log keeps at least so many commits and removals, and more in a larger index; whoever is further behind reads
# everything again. It is looked at whenever so many more were added.
LOG_KEPT = 20_000
LOG_LOOKED = 5_000
# compact() builds a graph anew when this share of it is unused.
_COMPACT_SHARE = 0.05


class Upkeep(IndexState):
    """An index in memory with the graphs and segments that make it fast."""

    def __init__(self, path: Path, store: ItemStore, *, threads: int | None) -> None:
        super().__init__(path, store, threads=threads)
        self._builder = Builder()
        self._unproven = True

    def _prove(self) -> None:
        """Waits until the vectors of all segments are verified; a medium whose are damaged is read again."""
        with self._updating:
            damaged = []
            for medium, shelf in list(self._shelves.items()):
                if shelf.segment is None:
                    continue
                try:
                    shelf.segment.verify()
                except SegmentError as reason:
                    self._warn(shelf.segment.path, reason)
                    damaged.append(medium)
            fresh = {medium: self._open_shelf(medium) for medium in damaged}
            if fresh:
                self._apply_tuning(fresh)
                with self._state.exclusive():
                    self._shelves = {**self._shelves, **fresh}
                    self._filtered = {}
            self._unproven = False
        # Whoever changes the index now will see to the graphs.
        if fresh and self._changing.acquire(blocking=False):
            try:
                self._settle_after_commit()
            finally:
                self._changing.release()

    def _look_and_grow(self) -> None:
        self._look()
        # A reader's graph grows when there is much behind it; a change in this process will see to it itself.
        behind = not self._builder.busy and any(
            shelf.rows - shelf.covered > exact_limit(self.dimension) or (shelf.graph is None and shelf.is_worn())
            for shelf in list(self._shelves.values())
        )
        if behind and self._changing.acquire(blocking=False):
            try:
                self._settle_after_commit(writing=False)
            finally:
                self._changing.release()

    def _forget(self, sequence: int) -> None:
        """Shortens the log to what came after a commit, and to what is needed to bring a segment up to date."""
        segments = [shelf.segment.head.sequence for shelf in list(self._shelves.values()) if shelf.segment]
        self._store.trim(min([sequence, *segments]))

    def _shorten_log(self) -> None:
        """Keeps the file from growing with every change for ever; readers are seldom so far behind."""
        if self._store.logged < LOG_LOOKED:
            return
        kept = max(LOG_KEPT, sum(shelf.items for shelf in list(self._shelves.values())))
        try:
            self._forget(min(self._store.log_start(kept), self._head.sequence - 1))
        except IndexFolderError as error:  # the change that was made is on the disk
            log.warning("%s: its log was not shortened (%s)", self.path, error)

    def _settle_after_commit(self, *, writing: bool = True) -> None:
        """Builds the graphs that are wanted; what was committed is there, whatever becomes of them.

        While the graph takes in one batch the next one is written to the disk, if the same graph in every run was not
        asked for: it depends on which rows came together.
        """
        if self._wants_settling():
            self._prove()
            begin = self._builder.run if self._threads == 1 else self._builder.start
            begin(partial(self._settle_or_log, writing))

    def _settle_or_log(self, writing: bool) -> None:
        try:
            self._settle_now(writing=writing)
        except (MemoryError, CancelledError):
            raise
        except Exception:
            log.exception("%s: no graph could be built or saved; searches go on exactly", self.path)

    def _settle(self, *, grow: bool = False) -> None:
        """Waits until the graphs are as they are wanted."""
        self._builder.wait()
        if grow or self._wants_settling():
            self._prove()
            self._builder.run(partial(self._settle_now, grow=grow))

    def _wants_settling(self) -> bool:
        return any(
            shelf.wants_new_graph() or shelf.is_worn() or shelf.wants_growth() or self._is_stale(shelf)
            for shelf in list(self._shelves.values())
        )

    # From here on, what the builder's thread does.

    def _settle_now(self, *, writing: bool = True, grow: bool = False) -> None:
        """Builds the graphs that are wanted. Searches go on meanwhile, exactly where there is no graph yet."""
        for medium, shelf in list(self._shelves.items()):
            fresh = shelf.wants_new_graph()
            if (fresh and len(shelf) < shelf.rows) or shelf.is_worn():
                shelf = self._fresh(medium)
            if fresh:
                self._build(shelf)
            else:
                if shelf.wants_growth() or (grow and shelf.graph and shelf.rows > shelf.covered):
                    self._grow(shelf)
            if writing and (fresh or self._is_stale(shelf)):
                self._write_segment(medium)

    def _save(self) -> None:
        """Writes the segments without which opening would take long."""
        for medium, shelf in list(self._shelves.items()):
            behind = shelf.rows - shelf.mapped > exact_limit(self.dimension)
            if self._is_large(shelf) and (behind or shelf.changed_share() > _STALE_ON_CLOSE):
                self._write_segment(medium)

    def _rewrite(self) -> None:
        """Drops what is unused from the graphs, and writes all segments that are not as new as can be."""
        for medium, shelf in list(self._shelves.items()):
            if shelf.unused_share() > _COMPACT_SHARE or (shelf.graph is None and len(shelf) < shelf.rows):
                self._rebuild(medium)
        self._settle_now()
        for medium, shelf in list(self._shelves.items()):
            if self._is_large(shelf) and shelf.changed_share() > 0:
                self._write_segment(medium)

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        self._builder.check()
        with self._state.exclusive():
            yield

    def _is_stale(self, shelf: Shelf) -> bool:
        return self._is_large(shelf) and shelf.changed_share() > _STALE_SHARE

    def _is_large(self, shelf: Shelf) -> bool:
        """Whether a segment makes opening faster."""
        return shelf.graph is not None or shelf.rows * (4 * self.dimension + 200) > CHECKED_BYTES

    def _build(self, shelf: Shelf) -> None:
        with self._refused_if_it_fails(shelf):
            graph, report = shelf.build_graph(self._threads, self._builder.check)
            with self._state.exclusive():
                shelf.attach(graph, report)

    def _grow(self, shelf: Shelf) -> None:
        # A graph that grew by a part of what it should cannot be used.
        with self._refused_if_it_fails(shelf):
            shelf.grow_graph(self._exclusive, self._threads)
        if shelf.outgrew_report():
            report = shelf.remeasured(self._threads)
            if report.accepted:
                with self._state.exclusive():
                    shelf.attach(shelf.graph, report)
            else:
                self._build(shelf)

    @contextmanager
    def _refused_if_it_fails(self, shelf: Shelf) -> Iterator[None]:
        try:
            yield
        except BaseException:
            with self._state.exclusive():
                shelf.refuse()
            raise

    def _fresh(self, medium: str) -> Shelf:
        """A shelf without unused rows takes the place of one that has many."""
        head, contents = self._store.load(medium)
        shelf = Shelf(self.dimension, self.meta.kind, head).fill(contents)
        shelf.inherit(self._shelves[medium])
        self._swap(medium, shelf)
        return shelf

    def _rebuild(self, medium: str) -> None:
        had_graph = self._shelves[medium].graph is not None
        shelf = self._fresh(medium)
        if had_graph and len(shelf):
            self._build(shelf)
            self._write_segment(medium)

    def _swap(self, medium: str, shelf: Shelf) -> None:
        """Puts a shelf in the place of another, after bringing it up to date."""
        with self._updating:
            replayed = self._store.replay(medium, shelf.head, shelf.last_label)
            if replayed is None or not shelf.apply(replayed[1], replayed[0]):
                shelf = self._open_shelf(medium)
            with self._state.exclusive():
                self._shelves[medium] = shelf
                self._filtered = {}  # its rows have other numbers

    def _write_segment(self, medium: str) -> None:
        shelf = self._shelves[medium]
        if shelf.graph is not None and shelf.rows > shelf.covered:
            self._grow(shelf)
        shelf.check_graph(self._exclusive, self._threads)
        with self._updating:
            # A graph covers all rows of its segment; rows that came meanwhile stay in the log.
            if shelf.graph is not None and shelf.rows > shelf.covered:
                with self._refused_if_it_fails(shelf):
                    shelf.grow_graph(self._exclusive, self._threads)
            if not shelf.items:
                return
            source = RowSource(shelf, drop_unused=shelf.graph is None)
            head, total, graph, report = shelf.head, shelf.total, shelf.graph, shelf.report
        try:
            path, segment = write_segment(
                self.path,
                index_id=self.meta.index_id,
                medium=medium,
                dimension=self.dimension,
                head=head,
                total=total,
                source=source,
                graph=graph,
                report=report,
            )
        except (OSError, SegmentError) as error:
            log.warning("%s: the %s segment was not saved and will be built again (%s)", self.path, medium, error)
            return
        remove_others(self.path, medium, path, lambda other: self._is_ours(other, medium))
        fresh = Shelf(self.dimension, self.meta.kind, head, segment)
        fresh.inherit(shelf)
        if self._shelves.get(medium) is shelf:
            self._swap(medium, fresh)

    def _is_ours(self, segment: Path, medium: str) -> bool:
        meta = self.meta
        with suppress(SegmentError):
            manifest = read_manifest(segment, index_id=meta.index_id, medium=medium, dimension=meta.dimension)
            return self._store.holds(manifest.head)
        return False

    def _tune(self, medium: str, target: float, queries: Float32Array | None) -> Tuning:
        shelf = self._shelves[medium]
        graph, report = shelf.graph, shelf.report
        if graph is None or report is None:
            self._store.remember(medium, Tuned(target, None, None, None))
            return Tuning(target=target, search="exact", ef=None, recall_at_10=1.0, queries=0)
        rows = len(graph)
        effort, recall, count = shelf.measured(graph, target, queries, threads=self._threads)
        tuned = Tuned(target, report.graph, effort, recall)
        self._store.remember(medium, tuned)
        with self._state.exclusive():
            shelf.apply_tuning(tuned, rows)
        used = shelf.graph is not None
        return Tuning(
            target=target,
            search="hnsw" if used else "exact",
            ef=effort if used else None,
            recall_at_10=recall if used else 1.0,
            queries=count,
        )
