"""An index folder: items.sqlite is the truth, the graphs beside it are caches.

Shape letters: N items, Q queries, D width. Scores are cosine similarities: higher is better, ties go by id ascending,
then by medium. The best 5 are the beginning of the best 10, for any k.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike

from dckt.errors import ConfigError, IndexFolderError, ModelMismatchError, UnknownItemError
from dckt.files import atomic_folder
from dckt.index.hnsw import HnswGraph
from dckt.index.items import check_ids, dump_metadata, shown
from dckt.index.locks import ReadersWriterLock
from dckt.index.results import Hit, IndexInfo, MediumInfo
from dckt.index.shelf import Shelf
from dckt.index.snapshot import GraphReport, SnapshotError, read_snapshot, write_snapshot
from dckt.index.store import INDEX_VERSION, ITEMS, KINDS, Change, IndexMeta, ItemStore
from dckt.index.vectors import Float32Array, normalised

log = logging.getLogger(__name__)

_MEDIUM = re.compile(r"[a-z][a-z0-9_]{0,31}")


class Index:
    """Vectors of items of several media, with ids and metadata, on the disk. Safe to use from many threads.

    An item is known by its id and its medium, so a pair can give one id to its picture and its text. What was added
    when :meth:`add` returns survives a kill and a power cut. Two processes may open one index: each sees what the other
    wrote when it next writes itself, or calls :meth:`refresh`.

    Searching is exact up to some thousands of unique vectors of a medium and goes through an HNSW graph above. The
    graph's recall is measured after it is built; a graph that misses its target is not used. A graph answers for k up
    to about a hundred; a larger k, and a query whose answer hangs on ties that the graph cannot see whole, is answered
    exactly. What a graph misses (less than 1 % of neighbours) is the only way in which answers for two k can differ.

    Use :meth:`create` or :meth:`open`.
    """

    def __init__(self, path: Path, store: ItemStore, *, threads: int | None) -> None:
        self.path = path
        self._store = store
        self._threads = threads
        self._changing = threading.RLock()
        self._state = ReadersWriterLock()
        self._sequence, self._shelves = self._load()

    @classmethod
    def create(
        cls,
        path: str | Path,
        *,
        model_id: str,
        representation: str,
        dimension: int,
        kind: str = "auto",
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
            threads: see :meth:`open`.

        Raises:
            ConfigError: ``kind`` or ``dimension`` is none that there is.
            IndexFolderError: the folder exists and is not empty, or cannot be written.
        """
        path = Path(path)
        if kind not in KINDS:
            raise ConfigError(f"kind is {kind!r}; expected one of {', '.join(KINDS)}")
        if dimension < 1:
            raise ConfigError(f"dimension is {dimension}; expected at least 1")
        _check_threads(threads)
        meta = IndexMeta.new(model_id=model_id, representation=representation, dimension=dimension, kind=kind)
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
        """Opens an index after checking all of it. A graph that is missing or damaged is built again.

        Args:
            path: the folder.
            model_id: refuse an index of another model; None accepts any.
            representation: refuse an index of another output of the model; None accepts any.
            threads: how many build a graph; 1 makes it the same byte for byte in every run, None uses every core.

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
        """Closes the files. Nothing is lost without it."""
        with self._changing, self._state.exclusive():
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
        upsert: bool = False,
    ) -> None:
        """Stores items: all of them, or none. When it returns, they are on the disk.

        Args:
            medium: of all of them, such as ``image``.
            ids: N different texts.
            vectors: (N, D) of any floating dtype; scaled to length 1.
            metadata: N mappings that JSON can hold; None stores empty ones.
            upsert: replace items that are there already, instead of refusing them.

        Raises:
            ItemError: an id is there already, given twice or no text; a vector has the wrong width, is not finite or
                all zero; metadata is not JSON. Each such item is named.
            IndexFolderError: the disk is full, or another process keeps writing.
        """
        if not _MEDIUM.fullmatch(medium):
            raise ConfigError(f"medium is {medium!r}; expected lower-case letters, digits and _, at most 32")
        ids = list(ids)
        check_ids(ids)
        rows = normalised(vectors, dimension=self.dimension, names=ids)
        texts = dump_metadata(ids, metadata)
        if not ids:
            return
        with self._changing:
            with self._store.transaction() as sequence:
                self._catch_up(sequence)
                self._commit(medium, self._store.add(medium, ids, rows, texts, upsert=upsert))
            self._settle()

    def delete(self, medium: str, ids: Sequence[str]) -> None:
        """Deletes items: all of them, or none.

        Raises:
            UnknownItemError: an id is not there; each is named.
        """
        ids = list(ids)
        with self._changing:
            with self._store.transaction() as sequence:
                self._catch_up(sequence)
                unknown = sorted(set(ids) - self._store.existing(medium, ids))
                if unknown:
                    raise UnknownItemError(f"the index holds no {medium} with the id {shown(unknown)}")
                if ids:
                    self._commit(medium, self._store.delete(medium, ids))
            self._settle()

    def refresh(self) -> bool:
        """Takes in what other processes wrote since; tells whether there was anything."""
        with self._changing:
            if not self._catch_up(self._store.sequence()):
                return False
            self._settle()
            return True

    # --- reading ---

    def search(
        self, queries: ArrayLike, k: int = 10, *, media: Sequence[str] | None = None, metadata: bool = True
    ) -> list[list[Hit]]:
        """The best k items for every query.

        Args:
            queries: (Q, D) of any floating dtype; scaled to length 1.
            k: at least 1; more than there are gives all.
            media: only items of these; None means of every medium.
            metadata: fetch it. Without it every hit's is empty, and a search is faster.

        Raises:
            ConfigError: k is less than 1.
            ItemError: a query has the wrong width, is not finite or all zero.
        """
        if k < 1:
            raise ConfigError(f"k is {k}; expected at least 1")
        array = np.asarray(queries)
        rows = normalised(array, dimension=self.dimension, names=[f"query {place}" for place in range(len(array))])
        with self._state.shared():
            wanted = [name for name in self._media() if media is None or name in media]
            found = {name: self._shelves[name].search(rows, k) for name in wanted}
            best = [
                sorted((-score, item, name) for name in wanted for score, item in found[name][place])[:k]
                for place in range(len(rows))
            ]
            stored = {
                name: self._store.metadata(name, list({hit[1] for hits in best for hit in hits if hit[2] == name}))
                for name in wanted
                if metadata
            }
        return [
            [
                Hit(item, -score, name, dict(stored[name][item]) if metadata else {})
                for score, item, name in hits
                # An item that another process deleted meanwhile has no metadata any more.
                if not metadata or item in stored[name]
            ]
            for hits in best
        ]

    def get(self, item: str, medium: str) -> Hit:
        """One item as a hit with itself, score 1.

        Raises:
            UnknownItemError: it is not there.
        """
        with self._state.shared():
            found = self._store.metadata(medium, [item])
        if item not in found:
            raise UnknownItemError(f"the index holds no {medium} with the id {item!r}")
        return Hit(item, 1.0, medium, found[item])

    def vector(self, item: str, medium: str) -> Float32Array:
        """The vector of an item, (D,) float32 of length 1.

        Raises:
            UnknownItemError: it is not there.
        """
        vector = self._store.vector(medium, item)
        if vector is None:
            raise UnknownItemError(f"the index holds no {medium} with the id {item!r}")
        return vector

    def existing(self, medium: str, ids: Sequence[str]) -> set[str]:
        """Those of the ids that there are."""
        return self._store.existing(medium, ids)

    def ids(self, medium: str) -> Iterator[str]:
        """Every id of a medium, ascending, as of now."""
        return iter(self._store.ids(medium))

    def count(self, medium: str | None = None) -> int:
        """How many items of a medium, or of all."""
        with self._state.shared():
            return sum(shelf.items for name, shelf in self._shelves.items() if medium in {None, name})

    def __len__(self) -> int:
        return self.count()

    @property
    def media(self) -> list[str]:
        """The media that there are items of, in alphabetical order."""
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
            sequence=self._sequence,
            bytes=sum(file.stat().st_size for file in self.path.iterdir() if file.is_file()),
            media=media,
        )

    # --- state ---

    def _media(self) -> list[str]:
        return sorted(name for name, shelf in self._shelves.items() if shelf.items)

    def _load(self) -> tuple[int, dict[str, Shelf]]:
        sequence, media = self._store.load()
        shelves = {name: Shelf(self.dimension, self.meta.kind, contents) for name, contents in media.items()}
        if self.meta.kind != "exact":
            for name, shelf in shelves.items():
                self._attach_graph(name, shelf)
        return sequence, shelves

    def _attach_graph(self, medium: str, shelf: Shelf) -> None:
        try:
            snapshot = read_snapshot(self.path, index_id=self.meta.index_id, medium=medium, dimension=self.dimension)
            if snapshot is None:
                return
            report, graph = snapshot
            if graph is not None:
                shelf.covered = shelf.covered_by(graph)
        except SnapshotError as reason:
            log.warning("%s: the %s graph cannot be used, for %s; it is built again", self.path, medium, reason)
            return
        shelf.graph, shelf.report = graph, report

    def _catch_up(self, sequence: int) -> bool:
        """Reads everything again when another process has written."""
        if sequence == self._sequence:
            return False
        loaded = self._load()
        with self._state.exclusive():
            self._sequence, self._shelves = loaded
        return True

    def _commit(self, medium: str, change: Change) -> None:
        with self._state.exclusive():
            self._store.commit()
            shelf = self._shelves.setdefault(medium, Shelf(self.dimension, self.meta.kind))
            shelf.apply(change)
            shelf.compact()
            self._sequence = change.sequence

    def _settle(self) -> None:
        """Builds the graphs that are wanted. Searches go on meanwhile, exactly where there is no graph yet."""
        for medium, shelf in self._shelves.items():
            if shelf.wants_graph():
                graph, report = shelf.build_graph(self._threads)
                with self._state.exclusive():
                    shelf.graph, shelf.report = graph, report
                    shelf.covered = len(shelf.labels) if graph else 0
                self._write_snapshot(medium, graph, report)

    def _write_snapshot(self, medium: str, graph: HnswGraph | None, report: GraphReport) -> None:
        try:
            # Between processes only one writes at a time.
            with self._store.transaction():
                write_snapshot(
                    self.path,
                    index_id=self.meta.index_id,
                    medium=medium,
                    dimension=self.dimension,
                    report=report,
                    graph=graph,
                )
        except (OSError, IndexFolderError) as error:
            log.warning("%s: the %s graph was not saved and will be built again (%s)", self.path, medium, error)


def _medium_info(shelf: Shelf) -> MediumInfo:
    return MediumInfo(
        items=shelf.items,
        unique_vectors=len(shelf),
        search="hnsw" if shelf.graph else "exact",
        in_graph=shelf.in_graph(),
        ef=shelf.graph.ef if shelf.graph else None,
        recall_at_10=shelf.report.recall if shelf.report else None,
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
