"""An index folder: items.sqlite is the truth, the graphs beside it are caches.

Shape letters: N items, Q queries, D width. Scores are cosine similarities: higher is better, ties go by id ascending,
then by medium. The best 5 are the beginning of the best 10, for any k.
"""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike

from dckt.errors import ConfigError, IndexFolderError, ItemError, ModelMismatchError, UnknownItemError
from dckt.files import atomic_folder
from dckt.index.hnsw import RECALL_TARGET, HnswGraph
from dckt.index.locks import ReadersWriterLock
from dckt.index.shelf import UNUSED_LIMIT, Shelf
from dckt.index.snapshot import GraphReport, SnapshotError, read_snapshot, write_snapshot
from dckt.index.store import INDEX_VERSION, ITEMS, KINDS, Change, IndexMeta, ItemStore, shown
from dckt.index.vectors import Float32Array, normalised

log = logging.getLogger(__name__)

_MEDIUM = re.compile(r"[a-z][a-z0-9_]{0,31}")
# Vectors of which a loaded graph must hold the same as the store; a graph of an older copy of the index would not.
_SPOT_CHECKS = 256


@dataclass(frozen=True)
class Hit:
    """One item that was found.

    Attributes:
        id: the item's id.
        score: cosine similarity with the query, -1 to 1; higher is better.
        medium: ``image`` or ``text``.
        metadata: what was stored with the item.
    """

    id: str
    score: float
    medium: str
    metadata: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class MediumInfo:
    """The state of one medium of an index.

    Attributes:
        items: how many items.
        unique_vectors: how many different vectors they have.
        search: ``exact`` or ``hnsw``: how the next search goes.
        in_graph: how many of the unique vectors the graph covers; the others are searched exactly.
        ef: effort of a search in the graph, or None.
        recall_at_10: against exact search, measured when the graph was last built, or None where none was built. A
            figure below the target with ``search`` at ``exact`` means that the graph was not good enough and is not
            used.
    """

    items: int
    unique_vectors: int
    search: str
    in_graph: int
    ef: int | None
    recall_at_10: float | None


@dataclass(frozen=True, kw_only=True)
class IndexInfo:
    """The state of an index.

    Attributes:
        path: its folder.
        format_version: of the folder.
        model_id: of the model that made the vectors.
        representation: which output of that model they are.
        dimension: their width D.
        kind: how it was asked to search: ``auto``, ``exact`` or ``hnsw``.
        created: when, ISO 8601 with time zone.
        sequence: how many commits changed it so far.
        bytes: of all of its files.
        media: by name.
    """

    path: str
    format_version: int
    model_id: str
    representation: str
    dimension: int
    kind: str
    created: str
    sequence: int
    bytes: int
    media: Mapping[str, MediumInfo]


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
                shelf.covered = _covered(shelf, graph)
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
                graph, report = _build(shelf, self._threads)
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


def check_ids(ids: Sequence[str]) -> None:
    """Refuses ids that cannot be stored.

    Raises:
        ItemError: an id is no text, empty, not Unicode, or given twice; each is named.
    """
    bad = [item for item in ids if not isinstance(item, str) or not item or not _is_unicode(item)]
    if bad:
        raise ItemError(
            f"{len(bad)} ids are no texts or empty: {shown(bad)}; expected one text of Unicode for each item"
        )
    twice = sorted(item for item, times in Counter(ids).items() if times > 1)
    if twice:
        raise ItemError(f"{len(twice)} ids were given more than once: {shown(twice)}; give each item its own")


def dump_metadata(ids: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None) -> list[str]:
    """Metadata as JSON, a text for each id.

    Raises:
        ItemError: not one mapping for each id, or one that JSON cannot hold; its id is named.
    """
    if metadata is None:
        return ["{}"] * len(ids)
    if len(metadata) != len(ids):
        raise ItemError(f"{len(ids)} ids came with {len(metadata)} metadata; expected one for each")
    texts = []
    for item, value in zip(ids, metadata, strict=True):
        if not isinstance(value, Mapping):
            raise ItemError(f"the metadata of {item!r} is a {type(value).__name__}; expected a mapping")
        try:
            texts.append(json.dumps(dict(value), allow_nan=False))
        except (TypeError, ValueError, RecursionError) as error:
            raise ItemError(f"the metadata of {item!r} cannot be stored as JSON ({error})") from error
    return texts


def _build(shelf: Shelf, threads: int | None) -> tuple[HnswGraph | None, GraphReport]:
    """A graph over all of a shelf: the one that it has, grown, or, where that falls short, a new one."""
    started = time.perf_counter()
    graph, recall = None, 0.0
    if shelf.graph is not None and shelf.unused_share() <= UNUSED_LIMIT:
        graph, first = shelf.graph, shelf.covered
        graph.add(shelf.labels[first:], shelf.matrix[first:], threads=threads)
        recall = graph.tune(shelf.labels, shelf.matrix)
    if graph is None or recall < RECALL_TARGET:
        graph = HnswGraph(shelf.dimension)
        graph.add(shelf.labels, shelf.matrix, threads=threads)
        recall = graph.tune(shelf.labels, shelf.matrix)
    report = GraphReport(
        count=len(shelf.labels),
        ef=graph.ef,
        recall=recall,
        accepted=recall >= RECALL_TARGET,
        seconds=time.perf_counter() - started,
    )
    return graph if report.accepted else None, report


def _covered(shelf: Shelf, graph: HnswGraph) -> int:
    """How many of a shelf's rows a loaded graph covers."""
    covered = int(np.searchsorted(shelf.labels, graph.labels[-1], side="right")) if len(graph) else 0
    expected = shelf.labels[:covered]
    if not np.isin(expected, graph.labels).all():
        raise SnapshotError("it lacks vectors that it should hold")
    rows = np.unique(np.linspace(0, covered - 1, min(covered, _SPOT_CHECKS)).astype(np.int64))
    if covered and not np.array_equal(graph.vectors(expected[rows]), shelf.matrix[rows]):
        raise SnapshotError("it holds other vectors")
    return covered


def _medium_info(shelf: Shelf) -> MediumInfo:
    return MediumInfo(
        items=shelf.items,
        unique_vectors=len(shelf),
        search="hnsw" if shelf.graph else "exact",
        in_graph=shelf.covered,
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
            f"{path}: its vectors were made by model {meta.model_id}, and it was opened with model {model_id}; {ways_out}"
        )
    if representation not in {None, meta.representation}:
        raise ModelMismatchError(
            f"{path}: it holds the representation {meta.representation!r} of model {meta.model_id}, "
            f"and it was opened for {representation!r} of model {model_id}; {ways_out}"
        )


def _check_threads(threads: int | None) -> None:
    if threads is not None and threads < 1:
        raise ConfigError(f"threads is {threads}; expected at least 1, or None for every core")


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@contextmanager
def _folder_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except FileExistsError as error:
        raise IndexFolderError(f"{path}: exists already; open it to add to it, or choose another name") from error
    except OSError as error:
        raise IndexFolderError(f"{path}: the index cannot be written ({error})") from error
