"""What is in memory of an index, and how it follows what is written, here and by other processes."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from pathlib import Path

from dckt.index.exact import Found
from dckt.index.filters import Filter
from dckt.index.hits import parsed
from dckt.index.locks import ReadersWriterLock
from dckt.index.manifest import SegmentError, read_manifest
from dckt.index.records import Change
from dckt.index.scan import Answer
from dckt.index.schema import Head, IndexMeta
from dckt.index.segment import candidates, read_segment
from dckt.index.shelf import Shelf
from dckt.index.store import ItemStore
from dckt.index.vectors import Float32Array

log = logging.getLogger(__name__)

# Filters whose answers SQLite gave are kept, so many.
_FILTERS = 16


class IndexState:
    """The store, and a shelf for each medium that is as new as some commit of it."""

    # Locks are taken in this order: one change at a time; SQLite's; what is in memory is brought up to date by one
    # thread at a time; and searches are kept out while it is changed.
    def __init__(self, path: Path, store: ItemStore, *, threads: int | None) -> None:
        self.path = path
        self._store = store
        self._threads = threads
        self._changing = threading.RLock()
        self._updating = threading.RLock()
        self._state = ReadersWriterLock()
        self._dirty = False
        self._filtering = threading.Lock()
        self._filtered: dict[tuple[str, str, Head], dict[int, set[str]]] = {}
        # What the store's version was when what is in memory was as new as it.
        self._seen = store.version()
        self._head, self._shelves = self._load()

    @property
    def meta(self) -> IndexMeta:
        """What the index says about itself."""
        return self._store.meta

    @property
    def dimension(self) -> int:
        """The width D of its vectors."""
        return self._store.meta.dimension

    def _load(self) -> tuple[Head, dict[str, Shelf]]:
        head = self._store.head()
        shelves = {medium: self._open_shelf(medium, prove=False) for medium in self._store.media()}
        self._apply_tuning(shelves)
        return head, shelves

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
        return Shelf(meta.dimension, meta.kind, head).fill(contents)

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
            found = shelf.search_matching(row, k, condition.matches, parsed)
            if found is not None:
                return found
            head, pairs = self._store.allowed(medium, condition)
            # SQLite may be ahead of what is in memory, whose vectors and metadata belong together.
            same = head == shelf.head
            allowed = shelf.allowed_rows(pairs) if same else shelf.matching_rows(condition.matches, parsed)
            with self._filtering:
                while len(self._filtered) >= _FILTERS:
                    del self._filtered[next(iter(self._filtered))]
                self._filtered[key] = allowed
        return shelf.search_allowed(row, k, allowed)
