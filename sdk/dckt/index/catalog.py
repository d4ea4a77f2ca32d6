"""An index folder: items.sqlite is the truth, the segments beside it are caches.

Shape letters: N items, Q queries, D width. Scores are cosine similarities: higher is better, ties go by id ascending,
then by medium. The best 5 are the beginning of the best 10, for any k.
"""

from __future__ import annotations

import json
import logging
import math
import re
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from functools import partial
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Self

from numpy.typing import ArrayLike

from dckt.errors import (
    ConfigError,
    IndexFolderError,
    ItemError,
    ModelMismatchError,
    UnknownItemError,
)
from dckt.files import atomic_folder
from dckt.index.builder import Builder
from dckt.index.exact import Found, exact_limit
from dckt.index.filters import Filter, parse_filter
from dckt.index.hnsw import RECALL_TARGET
from dckt.index.items import check_contents, check_ids, dump_metadata, is_id, listed, shown
from dckt.index.locks import ReadersWriterLock
from dckt.index.results import Hit, Hits, IndexInfo, Item, MediumInfo, Tuning
from dckt.index.segment import (
    SegmentError,
    candidates,
    read_manifest,
    read_segment,
    remove_abandoned,
    remove_others,
    write_segment,
)
from dckt.index.shelf import Answer, Shelf
from dckt.index.store import CHECKED_BYTES, INDEX_VERSION, ITEMS, KINDS, Change, Head, IndexMeta, ItemStore, Tuned
from dckt.index.vectors import Float32Array, normalised, unit_queries

log = logging.getLogger(__name__)

_MEDIUM = re.compile(r"[a-z][a-z0-9_]{0,31}")
# A segment is written anew when this share of the rows is not in it, so all that is ever written is at most three times
# what there is in the end; and on closing, when opening would otherwise replay more than this share.
_STALE_SHARE = 0.5
_STALE_ON_CLOSE = 0.05
# compact() builds a graph anew when this share of it is unused.
_COMPACT_SHARE = 0.05
# Filters whose answers SQLite gave are kept, so many.
_FILTERS = 16
# What json.loads calls, without what it does around it: half of the time for a small mapping.
_scan: Callable[[str, int], tuple[Any, int]] = vars(json.JSONDecoder())["scan_once"]


class Index:
    """Vectors of items of several media, with ids and metadata, on the disk. Safe to use from many threads.

    An item is known by its id and its medium, so a pair can give one id to its picture and its text. What was added
    when :meth:`add` returns survives a kill and a power cut. Many processes may open one index: every search sees what
    any of them wrote before; two that write take turns.

    Searching is exact up to some thousands of unique vectors of a medium and goes through an HNSW graph above. The
    graph's recall is measured after it is built; a graph that misses its target is not used. Every k up to 10 asks the
    graph the same, and larger ones ask for more by steps; a k above some hundreds, and a query whose answer hangs on
    ties that the graph cannot see whole, is answered exactly. What a graph misses (less than 1 % of neighbours, unless
    :meth:`tune` was told otherwise) is the only way in which answers for two k can differ.

    Use :meth:`create` or :meth:`open`.
    """

    # Locks are taken in this order: one change at a time; SQLite's; what is in memory is brought up to date by one
    # thread at a time; and searches are kept out while it is changed.
    def __init__(self, path: Path, store: ItemStore, *, threads: int | None) -> None:
        self.path = path
        self._store = store
        self._threads = threads
        self._changing = threading.RLock()
        self._builder = Builder()
        self._updating = threading.RLock()
        self._state = ReadersWriterLock()
        self._dirty = False
        self._filtering = threading.Lock()
        self._filtered: dict[tuple[str, str, Head], dict[int, set[str]]] = {}
        # What the store's version was when what is in memory was as new as it.
        self._seen = store.version()
        self._head, self._shelves = self._load()
        self._unproven = True

    @classmethod
    def create(
        cls,
        path: str | Path,
        *,
        model_id: str,
        representation: str,
        dimension: int,
        kind: str = "auto",
        second: tuple[str, int] | None = None,
        threads: int | None = None,
    ) -> Self:
        """Makes an index with no items, whole or not at all.

        Args:
            path: the folder to make; an empty one may be there.
            model_id: of the model that makes the vectors.
            representation: which output of that model they are.
            dimension: their width D.
            kind: ``exact`` never builds a graph, ``hnsw`` always does, ``auto`` does when exact search would take more
                than about half a millisecond.
            second: name and width D2 of a second representation that is kept for every item, for reordering.
            threads: see :meth:`open`.

        Raises:
            ConfigError: ``kind``, ``dimension`` or ``second`` is none that there is.
            IndexFolderError: the folder exists and is not empty, or cannot be written.
        """
        path = Path(path)
        if kind not in KINDS:
            raise ConfigError(f"kind is {kind!r}; expected one of {', '.join(KINDS)}")
        if dimension < 1:
            raise ConfigError(f"dimension is {dimension}; expected at least 1")
        if second is not None and (not second[0] or second[1] < 1):
            raise ConfigError(f"second is {second!r}; expected a name and a width of at least 1")
        _check_threads(threads)
        meta = IndexMeta.new(
            model_id=model_id, representation=representation, dimension=dimension, kind=kind, second=second
        )
        with _folder_errors(path):
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
            with atomic_folder(path) as folder:
                ItemStore.create(folder / ITEMS, meta)
        return cls.open(path, threads=threads)

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        model_id: str | None = None,
        representation: str | None = None,
        threads: int | None = None,
    ) -> Self:
        """Opens an index. A segment or graph that is missing or damaged is built again.

        A small index is checked whole; of a large one every byte of its segments is checked, and the items where they
        are read; :meth:`verify` checks everything. The vectors of segments are checked in the background, and the first
        search or change waits for that. An index of format 1 becomes one of format 2. A folder that cannot
        be written is opened for searching only.

        Args:
            path: the folder.
            model_id: refuse an index of another model; None accepts any.
            representation: refuse an index of another output of the model; None accepts any.
            threads: how many build a graph, and search it for many queries at once; 1 makes a graph the same byte for
                byte in every run, None uses every core.

        Raises:
            IndexFolderError: there is no index, or it cannot be read.
            IndexVersionError: written in a newer format.
            IndexCorruptError: its items are damaged.
            ModelMismatchError: its vectors were made by another model.
        """
        path = Path(path)
        _check_threads(threads)
        store = ItemStore.open(path / ITEMS)
        try:
            _check_model(path, store.meta, model_id, representation)
            index = cls(path, store, threads=threads)
            with index._changing:
                index._settle()
        except BaseException:
            store.close()
            raise
        return index

    def close(self) -> None:
        """Closes the files. Nothing is lost without it, but opening again may take longer."""
        with self._changing:
            try:
                if self._dirty:
                    self._dirty = False
                    self._prove()
                    self._builder.run(self._save)
                else:
                    self._builder.wait()
            finally:
                self._builder.close()
                with self._state.exclusive():
                    self._store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- changing ---

    def add(
        self,
        medium: str,
        ids: Sequence[str],
        vectors: ArrayLike,
        *,
        metadata: Sequence[Mapping[str, Any]] | None = None,
        second: ArrayLike | None = None,
        contents: Sequence[str | None] | None = None,
        upsert: bool = False,
    ) -> None:
        """Stores items: all of them, or none. When it returns, they are on the disk.

        Args:
            medium: of all of them, such as ``image``.
            ids: N different texts.
            vectors: (N, D) of any floating dtype; scaled to length 1.
            metadata: N mappings that JSON can hold; None stores empty ones.
            second: (N, D2) of any floating dtype, scaled to length 1; for an index that keeps second vectors.
            contents: N texts, such as a hash of what each vector was made from, which :meth:`contents` gives back.
            upsert: replace items that are there already, instead of refusing them.

        Raises:
            ItemError: an id is there already, given twice or no text; a vector has the wrong width, is not finite or
                all zero; metadata is not JSON. Each such item is named. Or second vectors came where none are kept, or
                the other way round.
            IndexFolderError: the disk is full, or another process keeps writing.
        """
        _check_medium(medium)
        ids = listed(ids)
        check_ids(ids)
        rows = normalised(vectors, dimension=self.dimension, names=ids)
        texts = dump_metadata(ids, metadata)
        seconds = self._seconds(ids, second)
        if contents is not None:
            check_contents(ids, contents)
        if not ids:
            return
        with self._changing:
            with self._store.transaction() as head:
                self._catch_up(head)
                self._commit(
                    medium,
                    self._store.add(medium, ids, rows, texts, seconds=seconds, contents=contents, upsert=upsert),
                )
            self._settle_after_commit()

    def delete(self, medium: str, ids: Sequence[str]) -> None:
        """Deletes items: all of them, or none.

        Raises:
            UnknownItemError: an id is not there; each is named.
        """
        ids = listed(ids)
        with self._changing:
            with self._store.transaction() as head:
                self._catch_up(head)
                unknown = sorted(set(ids) - self._store.existing(medium, ids))
                if unknown:
                    raise UnknownItemError(f"the index holds no {medium} with the id {shown(unknown)}")
                if ids:
                    self._commit(medium, self._store.delete(medium, ids))
            self._settle_after_commit()

    def refresh(self) -> bool:
        """Takes in what other processes wrote since the last look, and waits until the graphs hold it and all else.

        A search looks too; this is for doing the work before a search has to. Tells whether there was anything.
        """
        changed = self._look()
        with self._changing:
            self._settle()
        return changed

    def compact(self) -> None:
        """Drops what nothing uses, builds the graphs that need it, writes segments, and gives back disk space.

        Searches go on, in this process and in others; other writers wait.

        Raises:
            IndexFolderError: the disk is full, or the folder cannot be written.
        """
        with self._changing:
            self._look()
            self._prove()
            self._builder.run(self._rewrite)
            segments = [shelf.segment.head.sequence for shelf in list(self._shelves.values()) if shelf.segment]
            self._store.trim(min([self._head.sequence, *segments]))
            self._store.vacuum()
            remove_abandoned(self.path)

    def tune(self, recall: float = RECALL_TARGET, *, queries: ArrayLike | None = None) -> dict[str, Tuning]:
        """Measures every graph against exact search, and stores the lowest effort that reaches a recall.

        The recall stays the target of graphs that are built later. A graph that cannot reach it is not used.

        Args:
            recall: recall@10, above 0 and at most 1.
            queries: (Q, D) of any floating dtype, such as the application asks; None takes a sample of the vectors,
                disturbed.

        Returns:
            What was found, by medium.

        Raises:
            ConfigError: the recall is outside of what there is, or there are no queries.
            ItemError: a query has the wrong width, is not finite or all zero.
        """
        if not _is_number(recall) or not 0 < recall <= 1:
            raise ConfigError(f"recall is {recall}; expected a number above 0 and at most 1")
        rows = None if queries is None else unit_queries(queries, dimension=self.dimension)
        if rows is not None and not len(rows):
            raise ConfigError("there are no queries to tune with; give some, or None")
        found = {}
        with self._changing:
            self._look()
            for shelf in list(self._shelves.values()):
                shelf.target = recall
                if shelf.graph is None:
                    shelf.report = None  # refused under another target, perhaps
            self._settle(grow=True)
            for medium in self.media:
                found[medium] = self._tune(medium, recall, rows)
        return found

    # --- reading ---

    def search(
        self,
        queries: ArrayLike,
        k: int = 10,
        *,
        media: Sequence[str] | None = None,
        where: Mapping[str, Any] | None = None,
        min_score: float | None = None,
        metadata: bool = True,
    ) -> list[Sequence[Hit]]:
        """The best k items for every query.

        Args:
            queries: (Q, D) of any floating dtype; scaled to length 1.
            k: at least 1; more than there are gives all.
            media: only items of these; None means of every medium.
            where: only items whose metadata pass this filter; see :mod:`dckt.index.filters`. As many hits as without,
                if so many items pass.
            min_score: only hits with this score or a higher one.
            metadata: fetch it. Without it every hit's is empty, and a search is faster.

        Returns:
            A sequence for each query. Of many queries, it may be made when it is looked at, and never changes.

        Raises:
            ConfigError: k is no integer or less than 1, media are no list, min_score is no number, or the filter is
                none.
            ItemError: a query has the wrong width, is not finite or all zero.
            IndexFolderError: the index was closed, or cannot be read any more.
        """
        _check_search(k, media, min_score)
        condition = None if where is None else parse_filter(where)
        rows = unit_queries(queries, dimension=self.dimension)
        if self._unproven:
            self._prove()
        if self._store.version() != self._seen:
            self._look_and_grow()
        with self._state.shared():
            wanted = [name for name in self._media() if media is None or name in media]
            found = [(name, self._found(name, rows, k, condition)) for name in wanted]
        hits = [_hits(name, lists, min_score, metadata) for name, lists in found]
        if len(hits) == 1:
            return hits[0]
        return [
            sorted((hit for lists in hits for hit in lists[place]), key=lambda hit: (-hit.score, hit.id, hit.medium))[
                :k
            ]
            for place in range(len(rows))
        ]

    def get(self, item: str, medium: str) -> Hit:
        """One item as a hit with itself, score 1.

        Raises:
            UnknownItemError: it is not there.
        """
        metadata = self._store.metadata(medium, item) if is_id(item) else None
        if metadata is None:
            raise UnknownItemError(f"the index holds no {medium} with the id {item!r}")
        return Hit(item, 1.0, medium, metadata)

    def vector(self, item: str, medium: str) -> Float32Array:
        """The vector of an item, (D,) float32 of length 1.

        Raises:
            UnknownItemError: it is not there.
        """
        vector = self._store.vector(medium, item) if is_id(item) else None
        if vector is None:
            raise UnknownItemError(f"the index holds no {medium} with the id {item!r}")
        return vector

    def second(self, medium: str, ids: Sequence[str]) -> dict[str, Float32Array]:
        """The second vectors, (D2,) float32 of length 1, by id, of those of the ids that there are.

        Raises:
            ConfigError: the index keeps none.
        """
        if self.meta.second is None:
            raise ConfigError("the index keeps no second vectors; make one that does with second=(name, width)")
        return self._store.seconds(medium, listed(ids))

    def contents(self, medium: str, ids: Sequence[str]) -> dict[str, str]:
        """What :meth:`add` was given as contents, by id, of those of the ids that there are and have one."""
        return self._store.contents(medium, listed(ids))

    def existing(self, medium: str, ids: Sequence[str]) -> set[str]:
        """Those of the ids that there are."""
        return self._store.existing(medium, listed(ids))

    def ids(self, medium: str) -> Iterator[str]:
        """Every id of a medium, ascending, as of now."""
        return iter(self._store.ids(medium))

    def items(self, medium: str | None = None, where: Mapping[str, Any] | None = None) -> Iterator[Item]:
        """Items by medium and id, ascending, read bit by bit: a change meanwhile may show in the items behind it.

        Args:
            medium: None means of all.
            where: only those whose metadata pass; see :mod:`dckt.index.filters`.

        Raises:
            ConfigError: the filter is none.
        """
        return self._store.items(medium, parse_filter(where))

    def count(self, medium: str | None = None, where: Mapping[str, Any] | None = None) -> int:
        """How many items of a medium, or of all; with a filter, of those that pass it.

        Raises:
            ConfigError: the filter is none.
        """
        condition = parse_filter(where)
        if condition is not None:
            return self._store.count(medium, condition)
        if self._store.version() != self._seen:
            self._look()
        with self._state.shared():
            return sum(shelf.items for name, shelf in self._shelves.items() if medium in {None, name})

    def __len__(self) -> int:
        return self.count()

    @property
    def media(self) -> list[str]:
        """The media that there are items of, in alphabetical order."""
        if self._store.version() != self._seen:
            self._look()
        with self._state.shared():
            return self._media()

    @property
    def meta(self) -> IndexMeta:
        """What the index says about itself."""
        return self._store.meta

    @property
    def dimension(self) -> int:
        """The width D of its vectors."""
        return self._store.meta.dimension

    def info(self) -> IndexInfo:
        """The state of the index."""
        if self._store.version() != self._seen:
            self._look()
        with self._state.shared():
            media = {name: _medium_info(self._shelves[name]) for name in self._media()}
        meta = self.meta
        return IndexInfo(
            path=str(self.path),
            format_version=INDEX_VERSION,
            model_id=meta.model_id,
            representation=meta.representation,
            dimension=meta.dimension,
            kind=meta.kind,
            created=meta.created,
            sequence=self._head.sequence,
            bytes=_size(self.path),
            media=media,
            second=meta.second,
        )

    def verify(self) -> None:
        """Reads and checks every row and the structure of SQLite's file. Takes about as long as reading the file.

        Raises:
            IndexCorruptError: something is damaged.
        """
        self._store.check_structure()
        self._store.verify()

    # --- searching ---

    def _media(self) -> list[str]:
        return sorted(name for name, shelf in self._shelves.items() if shelf.items)

    def _found(self, medium: str, rows: Float32Array, k: int, condition: Filter | None) -> list[Answer]:
        shelf = self._shelves[medium]
        if condition is None:
            return shelf.search(rows, k, threads=self._threads)
        return [self._filtered_search(medium, shelf, row, k, condition) for row in rows]

    def _filtered_search(self, medium: str, shelf: Shelf, row: Float32Array, k: int, condition: Filter) -> list[Found]:
        key = (medium, condition.key, shelf.head)
        allowed = self._filtered.get(key)
        if allowed is None:
            found = shelf.search_matching(row, k, condition.matches, _parsed)
            if found is not None:
                return found
            head, pairs = self._store.allowed(medium, condition)
            # SQLite may be ahead of what is in memory, whose vectors and metadata belong together.
            same = head == shelf.head
            allowed = shelf.allowed_rows(pairs) if same else shelf.matching_rows(condition.matches, _parsed)
            with self._filtering:
                while len(self._filtered) >= _FILTERS:
                    del self._filtered[next(iter(self._filtered))]
                self._filtered[key] = allowed
        return shelf.search_allowed(row, k, allowed)

    # --- state ---

    def _load(self) -> tuple[Head, dict[str, Shelf]]:
        head = self._store.head()
        shelves = {medium: self._open_shelf(medium, prove=False) for medium in self._store.media()}
        self._apply_tuning(shelves)
        return head, shelves

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

    def _warn(self, segment: Path, reason: SegmentError) -> None:
        if segment.exists():
            log.warning("%s: %s cannot be used, for %s; it is built again", self.path, segment.name, reason)

    def _open_shelf(self, medium: str, *, prove: bool = True) -> Shelf:
        meta = self.meta
        names = {"index_id": meta.index_id, "medium": medium, "dimension": meta.dimension}
        tried: set[Path] = set()
        # Another process may replace them meanwhile, so each look at the folder is a new one.
        while path := next((path for path in candidates(self.path, medium) if path not in tried), None):
            tried.add(path)
            try:
                if not self._store.holds(read_manifest(path, **names).head):  # type: ignore[arg-type]
                    raise SegmentError("it belongs to another history of the index, or to one that was forgotten")
                segment = read_segment(path, **names)  # type: ignore[arg-type]
                if prove:
                    segment.verify()
                shelf = Shelf(meta.dimension, meta.kind, segment.head, segment)
                replayed = self._store.replay(medium, segment.head, shelf.last_label)
                if replayed is None or not shelf.apply(replayed[1], replayed[0]):
                    raise SegmentError("what came after it does not fit to it")
            except SegmentError as reason:
                self._warn(path, reason)
                continue
            return shelf
        head, contents = self._store.load(medium)
        return Shelf.of(contents, meta.dimension, meta.kind, head)

    def _apply_tuning(self, shelves: Mapping[str, Shelf]) -> None:
        stored = self._store.tuned()
        new = [(shelf, stored[name]) for name, shelf in shelves.items() if stored.get(name, shelf.tuned) != shelf.tuned]
        if new:
            with self._state.exclusive():
                for shelf, tuned in new:
                    shelf.apply_tuning(tuned)

    def _look(self) -> bool:
        """Takes in what was committed since; tells whether there was anything."""
        # Who comes while another thread replays waits for it: nobody may search what was there before.
        with self._updating:
            version = self._store.version()
            if version == self._seen:
                return False
            changed = self._catch_up(self._store.head())
            self._seen = version
            return changed

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

    def _catch_up(self, head: Head) -> bool:
        """Replays the log; reads everything again where the log does not reach, or tells another history."""
        with self._updating:
            if head == self._head:
                self._apply_tuning(self._shelves)
                return False
            shelves = dict(self._shelves)
            media = self._store.media()
            for medium in shelves.keys() - media.keys():  # was emptied, and forgotten by compact()
                shelves[medium] = Shelf(self.dimension, self.meta.kind, head)
            for medium in media:
                shelf = shelves.get(medium)
                replayed = None if shelf is None else self._store.replay(medium, shelf.head, shelf.last_label)
                fits = False
                if shelf is not None and replayed is not None:
                    with self._state.exclusive():
                        fits = shelf.apply(replayed[1], replayed[0])
                if not fits:
                    shelves[medium] = self._open_shelf(medium)
            self._apply_tuning(shelves)
            with self._state.exclusive():
                self._head, self._shelves = head, shelves
                self._filtered = {}
            return True

    def _commit(self, medium: str, done: tuple[Head, Change]) -> None:
        """Commits, and repeats the change in memory; where that fails the next look reads the medium again."""
        head, change = done
        with self._updating, self._state.exclusive():
            self._store.commit()
            self._dirty = True
            self._filtered = {}
            shelf = self._shelves.pop(medium, None)
            if shelf is None:
                shelf = Shelf(self.dimension, self.meta.kind, head)
            if not shelf.apply(change, head):
                return
            self._shelves[medium] = shelf
            # Of the others nothing changed in this commit.
            for other in self._shelves.values():
                other.head = head
            self._head = head

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
        # A graph that grew by half of what it should cannot be used.
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
        shelf = Shelf.of(contents, self.dimension, self.meta.kind, head)
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
        with self._updating:
            # A graph covers all rows of its segment; rows that came meanwhile stay in the log.
            if shelf.graph is not None and shelf.rows > shelf.covered:
                with self._refused_if_it_fails(shelf):
                    shelf.grow_graph(self._exclusive, self._threads)
            if not shelf.items:
                return
            source = shelf.source(drop_unused=shelf.graph is None)
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
        effort, recall, count = shelf.measured(graph, target, queries, threads=self._threads)
        tuned = Tuned(target, report.graph, effort, recall)
        self._store.remember(medium, tuned)
        with self._state.exclusive():
            shelf.apply_tuning(tuned)
        used = shelf.graph is not None
        return Tuning(
            target=target,
            search="hnsw" if used else "exact",
            ef=effort if used else None,
            recall_at_10=recall if used else 1.0,
            queries=count,
        )

    def _seconds(self, ids: Sequence[str], second: ArrayLike | None) -> Float32Array | None:
        width = self.meta.second_dimension
        if (second is None) != (width is None):
            raise ItemError(
                "the index keeps no second vectors, and some were given"
                if width is None
                else f"the index keeps second vectors ({self.meta.second!r}, {width} wide), and none were given"
            )
        return None if second is None or width is None else normalised(second, dimension=width, names=ids)


def _hits(medium: str, answers: list[Answer], min_score: float | None, metadata: bool) -> list[Sequence[Hit]]:
    return [
        _hits_of(medium, min_score, metadata, found)
        if isinstance(found, list)
        else Hits(partial(_hits_of, medium, min_score, metadata, found))
        for found in answers
    ]


def _hits_of(medium: str, min_score: float | None, metadata: bool, answer: Answer) -> list[Hit]:
    found = answer if isinstance(answer, list) else answer()
    if min_score is not None:
        found = [one for one in found if -one[0] >= min_score]
    if not metadata:
        return [Hit(item, -score, medium, {}) for score, item, _ in found]
    texts = [text for _, _, text in found]
    return [
        Hit(item, -score, medium, values) for (score, item, _), values in zip(found, _parsed_all(texts), strict=True)
    ]


def _parsed(text: bytes) -> dict[str, Any]:
    value: dict[str, Any] = _scan(text.decode(), 0)[0]
    return value


def _parsed_all(texts: list[bytes]) -> list[dict[str, Any]]:
    values: list[dict[str, Any]] = _scan((b"[%b]" % b",".join(texts)).decode(), 0)[0]
    return values


def _size(folder: Path) -> int:
    total = 0
    for file in folder.rglob("*"):
        with suppress(OSError):  # a segment that was replaced meanwhile
            total += file.stat().st_size if file.is_file() else 0
    return total


def _medium_info(shelf: Shelf) -> MediumInfo:
    return MediumInfo(
        items=shelf.items,
        unique_vectors=len(shelf),
        search="hnsw" if shelf.graph else "exact",
        in_graph=shelf.in_graph(),
        ef=shelf.effort if shelf.graph else None,
        recall_at_10=shelf.recall,
    )


def _check_model(path: Path, meta: IndexMeta, model_id: str | None, representation: str | None) -> None:
    ways_out = (
        "open it with the bundle that made it, or index the collection again with: "
        f"dckt index BUNDLE {path} --force ..."
    )
    if model_id not in {None, meta.model_id}:
        raise ModelMismatchError(
            f"{path}: its vectors were made by model {meta.model_id}, and it was opened with {model_id}; {ways_out}"
        )
    if representation not in {None, meta.representation}:
        raise ModelMismatchError(
            f"{path}: it holds the representation {meta.representation!r} of model {meta.model_id}, "
            f"and it was opened for {representation!r} of model {model_id}; {ways_out}"
        )


def _check_medium(medium: object) -> None:
    if not isinstance(medium, str) or not _MEDIUM.fullmatch(medium):
        raise ConfigError(f"medium is {medium!r}; expected lower-case letters, digits and _, at most 32")


def _check_search(k: object, media: object, min_score: object) -> None:
    if (type(k) is not int and (isinstance(k, bool) or not isinstance(k, Integral))) or k < 1:
        raise ConfigError(f"k is {k!r}; expected an integer, at least 1")
    if media is not None and (
        isinstance(media, str) or not isinstance(media, Collection) or not all(isinstance(name, str) for name in media)
    ):
        raise ConfigError(f"media is {media!r}; expected a list such as ['image'], or None for all")
    if min_score is not None and not _is_number(min_score):
        raise ConfigError(f"min_score is {min_score!r}; expected a finite number, or None")


def _is_number(value: object) -> bool:
    return type(value) is not bool and isinstance(value, Real) and math.isfinite(value)


def _check_threads(threads: int | None) -> None:
    if threads is not None and threads < 1:
        raise ConfigError(f"threads is {threads}; expected at least 1, or None for every core")


@contextmanager
def _folder_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except FileExistsError as error:
        raise IndexFolderError(f"{path}: exists already; open it to add to it, or choose another name") from error
    except OSError as error:
        raise IndexFolderError(f"{path}: the index cannot be written ({error})") from error
