"""An index folder: items.sqlite is the truth, the segments beside it are caches.

Shape letters: N items, Q queries, D width. Scores are cosine similarities: higher is better, ties go by id ascending,
then by medium. The best 5 are the beginning of the best 10, for any k.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from numpy.typing import ArrayLike

from dckt.errors import ConfigError, UnknownItemError
from dckt.files import atomic_folder
from dckt.index.checks import (
    check_medium,
    check_model,
    check_search,
    check_threads,
    folder_errors,
    is_number,
    second_vectors,
)
from dckt.index.filters import parse_filter
from dckt.index.hits import hits_of_all
from dckt.index.hnsw import RECALL_TARGET
from dckt.index.items import check_contents, check_ids, dump_metadata, is_id, listed, shown
from dckt.index.results import Hit, IndexInfo, Item, Tuning
from dckt.index.schema import INDEX_VERSION, ITEMS, KINDS, IndexMeta
from dckt.index.segment import remove_abandoned
from dckt.index.store import ItemStore
from dckt.index.upkeep import Upkeep
from dckt.index.vectors import Float32Array, normalised, unit_queries


class Index(Upkeep):
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
        check_threads(threads)
        meta = IndexMeta.new(
            model_id=model_id, representation=representation, dimension=dimension, kind=kind, second=second
        )
        with folder_errors(path):
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
        check_threads(threads)
        store = ItemStore.open(path / ITEMS)
        try:
            check_model(path, store.meta, model_id, representation)
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
        check_medium(medium)
        ids = listed(ids)
        check_ids(ids)
        rows = normalised(vectors, dimension=self.dimension, names=ids)
        texts = dump_metadata(ids, metadata)
        seconds = second_vectors(self.meta, ids, second)
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
            self._shorten_log()

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
            self._shorten_log()

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
            self._forget(self._head.sequence)
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
        if not is_number(recall) or not 0 < recall <= 1:
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
        check_search(k, media, min_score)
        condition = None if where is None else parse_filter(where)
        rows = unit_queries(queries, dimension=self.dimension)
        if self._unproven:
            self._prove()
        if self._store.version() != self._seen:
            self._look_and_grow()
        with self._state.shared():
            wanted = [name for name in self._media() if media is None or name in media]
            found = [(name, self._found(name, rows, k, condition)) for name in wanted]
        hits = [hits_of_all(name, lists, min_score, metadata) for name, lists in found]
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

    def info(self) -> IndexInfo:
        """The state of the index."""
        if self._store.version() != self._seen:
            self._look()
        with self._state.shared():
            media = {name: self._shelves[name].info() for name in self._media()}
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


def _size(folder: Path) -> int:
    total = 0
    for file in folder.rglob("*"):
        with suppress(OSError):  # a segment that was replaced meanwhile
            total += file.stat().st_size if file.is_file() else 0
    return total
