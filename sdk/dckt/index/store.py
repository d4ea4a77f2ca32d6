"""The truth of an index: one SQLite file, in WAL mode, every commit on the disk before it is acknowledged.

Shape letters: N vectors, D width. Each unique vector of a medium is stored once under a label that is never used again;
an item names its vector by that label. SQLite notices damage to its own structure; checksums of the vectors and of the
items notice damage to their content.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
import uuid
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from dckt.errors import IndexCorruptError, IndexFolderError, IndexVersionError, ItemError
from dckt.index.items import shown
from dckt.index.vectors import Float32Array

INDEX_VERSION = 1
FORMAT = "dckt-index"
ITEMS = "items.sqlite"
KINDS = ("auto", "exact", "hnsw")

# A damaged structure is looked for on opening as long as that takes well under a second; every row is read and checked
# in any case.
_INTEGRITY_CHECK_BYTES = 256 * 2**20
_BUSY_SECONDS = 30.0
_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE vectors (
    label INTEGER PRIMARY KEY AUTOINCREMENT,
    medium TEXT NOT NULL,
    digest BLOB NOT NULL,
    vector BLOB NOT NULL,
    UNIQUE (medium, digest)
);
CREATE TABLE items (
    medium TEXT NOT NULL,
    id TEXT NOT NULL,
    label INTEGER NOT NULL REFERENCES vectors (label),
    metadata TEXT NOT NULL,
    sequence INTEGER NOT NULL,
    checksum INTEGER NOT NULL,
    PRIMARY KEY (medium, id)
) WITHOUT ROWID;
CREATE INDEX items_by_label ON items (label);
"""
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class IndexMeta:
    """What an index says about itself; fixed when it is created.

    Attributes:
        index_id: random, different for every index.
        model_id: of the model that made the vectors.
        representation: which output of that model they are.
        dimension: their width D.
        kind: how it searches: ``auto``, ``exact`` or ``hnsw``.
        created: when, ISO 8601 with time zone.
    """

    index_id: str
    model_id: str
    representation: str
    dimension: int
    kind: str
    created: str

    @classmethod
    def new(cls, *, model_id: str, representation: str, dimension: int, kind: str) -> IndexMeta:
        """Of an index that is created now."""
        return cls(
            index_id=uuid.uuid4().hex,
            model_id=model_id,
            representation=representation,
            dimension=dimension,
            kind=kind,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What the store holds of one medium.

    Attributes:
        labels: (N,) int64, ascending.
        matrix: (N, D) float32.
        postings: for every vector the ids of the items that share it, ascending.
    """

    labels: NDArray[np.int64]
    matrix: Float32Array
    postings: list[list[str]]


@dataclass(kw_only=True)
class Change:
    """What a commit did to one medium, in the order to repeat it.

    Attributes:
        sequence: the index's sequence number after it.
        removed: (label, id) of items that are gone or replaced.
        added: (label, id) of items that are new or replaced.
        vectors: by label, ascending, each vector that was not there before.
    """

    sequence: int
    removed: list[tuple[int, str]] = field(default_factory=list)
    added: list[tuple[int, str]] = field(default_factory=list)
    vectors: dict[int, Float32Array] = field(default_factory=dict)


class ItemStore:
    """The SQLite file. One writer at a time (the caller sees to it inside a process, SQLite between processes)."""

    def __init__(self, path: Path, meta: IndexMeta, writer: sqlite3.Connection, reader: sqlite3.Connection) -> None:
        self.path = path
        self.meta = meta
        self._writer = writer
        self._reader = reader
        self._reading = threading.Lock()

    @staticmethod
    def create(path: Path, meta: IndexMeta) -> None:
        """Makes the file, with no items in it."""
        with _errors_of(path):
            connection = _connect(path)
            try:
                connection.executescript(f"BEGIN; {_SCHEMA}")
                values = {"format": FORMAT, "version": INDEX_VERSION, "sequence": 0, **vars(meta)}
                connection.executemany(
                    "INSERT INTO meta VALUES (?, ?)", [(key, str(value)) for key, value in values.items()]
                )
                connection.execute("COMMIT")
            finally:
                connection.close()

    @classmethod
    def open(cls, path: Path) -> ItemStore:
        """Opens the file after checking its structure.

        Raises:
            IndexFolderError: there is no such file, or it cannot be read.
            IndexVersionError: written in a newer format.
            IndexCorruptError: damaged, or no index.
        """
        if not path.is_file():
            raise IndexFolderError(
                f"{path.parent}: is no index, for it holds no {path.name}; make one with: "
                f"dckt index BUNDLE {path.parent} --images FOLDER --texts FILE"
            )
        with _errors_of(path):
            writer = _connect(path)
            try:
                meta = _read_meta(path, writer)
                if path.stat().st_size <= _INTEGRITY_CHECK_BYTES:
                    verdict = writer.execute("PRAGMA integrity_check(1)").fetchone()[0]
                    if verdict != "ok":
                        raise sqlite3.DatabaseError(verdict)
                reader = _connect(path)
            except BaseException:
                writer.close()
                raise
        return cls(path, meta, writer, reader)

    def close(self) -> None:
        """Closes the file. SQLite folds its log into it."""
        with self._reading:
            self._reader.close()
        self._writer.close()

    # --- reading ---

    def sequence(self) -> int:
        """The number of commits that changed the items so far."""
        with _errors_of(self.path), self._reading:
            return _sequence(self._reader)

    def load(self) -> tuple[int, dict[str, Contents]]:
        """Reads and checks everything but the metadata's meaning.

        Returns:
            The sequence number and what each medium holds, both of the same moment.

        Raises:
            IndexCorruptError: a row is damaged.
        """
        with _errors_of(self.path), self._reading:
            self._reader.execute("BEGIN")
            try:
                names = self._reader.execute("SELECT DISTINCT medium FROM vectors ORDER BY medium").fetchall()
                media = {medium: self._load_medium(medium) for (medium,) in names}
                stored = self._reader.execute("SELECT count(*) FROM items").fetchone()[0]
                loaded = sum(len(ids) for contents in media.values() for ids in contents.postings)
                if stored != loaded:
                    raise self._corrupt(f"{stored - loaded} items have no vector")
                return _sequence(self._reader), media
            finally:
                self._reader.execute("ROLLBACK")

    def metadata(self, medium: str, ids: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Metadata by id, of those of the ids that there are."""
        found = {}
        with _errors_of(self.path), self._reading:
            for part in _parts(ids):
                rows = self._reader.execute(
                    f"SELECT id, metadata FROM items WHERE medium = ? AND id IN ({_marks(part)})",  # noqa: S608
                    (medium, *part),
                )
                for item, metadata in rows:
                    try:
                        found[item] = json.loads(metadata)
                    except ValueError as error:
                        raise self._corrupt(f"the metadata of the {medium} item {item!r} was altered") from error
        return found

    def vector(self, medium: str, item: str) -> Float32Array | None:
        """The vector of one item (D,), or None."""
        with _errors_of(self.path), self._reading:
            row = self._reader.execute(
                "SELECT vector FROM vectors JOIN items USING (label) WHERE items.medium = ? AND id = ?", (medium, item)
            ).fetchone()
        return None if row is None else np.frombuffer(row[0], dtype=np.float32)

    def existing(self, medium: str, ids: Iterable[str]) -> set[str]:
        """Those of the ids that there are."""
        with _errors_of(self.path), self._reading:
            return {item for part in _parts(ids) for item in _labels_of(self._reader, medium, part)}

    def ids(self, medium: str) -> list[str]:
        """Every id of a medium, ascending."""
        with _errors_of(self.path), self._reading:
            rows = self._reader.execute("SELECT id FROM items WHERE medium = ? ORDER BY id", (medium,))
            return [row[0] for row in rows]

    # --- writing ---

    @contextmanager
    def transaction(self) -> Iterator[int]:
        """All of what is written inside, or, unless :meth:`commit` was called, nothing. Gives the sequence number."""
        with _errors_of(self.path):
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                yield _sequence(self._writer)
            finally:
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")

    def commit(self) -> None:
        """Ends the transaction; when this returns, it is on the disk."""
        self._writer.execute("COMMIT")

    def add(
        self, medium: str, ids: Sequence[str], vectors: Float32Array, metadata: Sequence[str], *, upsert: bool
    ) -> Change:
        """Stores items, inside a transaction.

        Args:
            medium: of all of them.
            ids: N different ones.
            vectors: (N, D) of length 1.
            metadata: N JSON texts.
            upsert: replace those that are there already.

        Raises:
            ItemError: ids are there already; all of them are named.
        """
        change = self._next_change()
        before = {item: label for part in _parts(ids) for item, label in _labels_of(self._writer, medium, part).items()}
        if before and not upsert:
            raise ItemError(
                f"{len(before)} of {len(ids)} {medium} ids are in the index already: {shown(sorted(before))}; "
                "choose others, leave them out, or replace them with upsert"
            )
        labels = self._label_vectors(change, medium, vectors)
        self._writer.executemany(
            "INSERT OR REPLACE INTO items VALUES (?, ?, ?, ?, ?, ?)",
            [
                (medium, *row, _checksum(medium, *row))
                for row in zip(ids, labels, metadata, [change.sequence] * len(ids), strict=True)
            ],
        )
        change.removed = [(label, item) for item, label in before.items()]
        change.added = list(zip(labels, ids, strict=True))
        self._drop_unused(before.values())
        return change

    def delete(self, medium: str, ids: Sequence[str]) -> Change:
        """Deletes those of the ids that there are, inside a transaction."""
        change = self._next_change()
        before = {item: label for part in _parts(ids) for item, label in _labels_of(self._writer, medium, part).items()}
        self._writer.executemany("DELETE FROM items WHERE medium = ? AND id = ?", [(medium, item) for item in before])
        change.removed = [(label, item) for item, label in before.items()]
        self._drop_unused(before.values())
        return change

    def _next_change(self) -> Change:
        sequence = _sequence(self._writer) + 1
        self._writer.execute("UPDATE meta SET value = ? WHERE key = 'sequence'", (str(sequence),))
        return Change(sequence=sequence)

    def _label_vectors(self, change: Change, medium: str, vectors: Float32Array) -> list[int]:
        """The label of every row; vectors that are new are stored and put into the change."""
        digests = [_digest(row.tobytes()) for row in vectors]
        rows = dict(zip(digests, range(len(digests)), strict=True))
        labels = self._labels_by_digest(medium, rows)
        fresh = {digest: row for digest, row in rows.items() if digest not in labels}
        self._writer.executemany(
            "INSERT INTO vectors (medium, digest, vector) VALUES (?, ?, ?)",
            [(medium, digest, vectors[row].tobytes()) for digest, row in fresh.items()],
        )
        added = self._labels_by_digest(medium, fresh)
        for digest, label in sorted(added.items(), key=lambda pair: pair[1]):
            change.vectors[label] = vectors[fresh[digest]]
        labels.update(added)
        return [labels[digest] for digest in digests]

    def _labels_by_digest(self, medium: str, digests: Iterable[bytes]) -> dict[bytes, int]:
        labels: dict[bytes, int] = {}
        for part in _parts(digests):
            labels.update(
                self._writer.execute(
                    f"SELECT digest, label FROM vectors WHERE medium = ? AND digest IN ({_marks(part)})",  # noqa: S608
                    (medium, *part),
                )
            )
        return labels

    def _drop_unused(self, labels: Iterable[int]) -> None:
        self._writer.executemany(
            "DELETE FROM vectors WHERE label = :label AND NOT EXISTS (SELECT 1 FROM items WHERE label = :label)",
            [{"label": label} for label in set(labels)],
        )

    def _load_medium(self, medium: str) -> Contents:
        rows = self._reader.execute(
            "SELECT label, digest, vector FROM vectors WHERE medium = ? ORDER BY label", (medium,)
        ).fetchall()
        width = 4 * self.meta.dimension
        for label, digest, vector in rows:
            if not isinstance(vector, bytes) or len(vector) != width or _digest(vector) != digest:
                raise self._corrupt(f"the vector with label {label} was altered")
        places = {row[0]: place for place, row in enumerate(rows)}
        postings: list[list[str]] = [[] for _ in rows]
        before = ""
        for stored, item, label, metadata, sequence, checksum in self._reader.execute(
            "SELECT medium, id, label, metadata, sequence, checksum FROM items WHERE medium = ? ORDER BY id", (medium,)
        ):
            # In a damaged tree a scan can meet rows out of order, which a look-up by id would then miss.
            sound = stored == medium and label in places and isinstance(item, str) and item > before
            if not sound or checksum != _checksum(medium, item, label, metadata, sequence):
                raise self._corrupt(f"the {medium} item {item!r} was altered")
            postings[places[label]].append(item)
            before = item
        matrix = np.frombuffer(b"".join(row[2] for row in rows), dtype=np.float32)
        return Contents(
            labels=np.array(list(places), dtype=np.int64),
            matrix=matrix.reshape(len(rows), self.meta.dimension),
            postings=postings,
        )

    def _corrupt(self, what: str) -> IndexCorruptError:
        return _corrupt(self.path, what)


def _connect(path: Path) -> sqlite3.Connection:
    # Connections are handed between threads; ItemStore and its caller see to it that only one uses each at a time.
    connection = sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    try:
        connection.execute("PRAGMA trusted_schema = OFF")
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
    except BaseException:
        connection.close()
        raise
    return connection


def _read_meta(path: Path, connection: sqlite3.Connection) -> IndexMeta:
    values: dict[str, str] = dict(connection.execute("SELECT key, value FROM meta"))
    if values.get("format") != FORMAT:
        raise _corrupt(path, f"its format is {values.get('format')!r}, expected {FORMAT!r}")
    try:
        version = int(values["version"])
        if version > INDEX_VERSION:
            raise IndexVersionError(
                f"{path.parent}: was written in index format {version}, this dckt reads up to {INDEX_VERSION}; "
                "update dckt"
            )
        meta = IndexMeta(
            **{key: values[key] for key in ("index_id", "model_id", "representation", "kind", "created")},
            dimension=int(values["dimension"]),
        )
        int(values["sequence"])
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, IndexVersionError):
            raise
        raise _corrupt(path, f"its description is not whole ({error!r})") from error
    if version != INDEX_VERSION or meta.kind not in KINDS or meta.dimension < 1:
        raise _corrupt(path, "its description holds values that no index has")
    return meta


def _sequence(connection: sqlite3.Connection) -> int:
    return int(connection.execute("SELECT value FROM meta WHERE key = 'sequence'").fetchone()[0])


def _labels_of(connection: sqlite3.Connection, medium: str, ids: Sequence[str]) -> dict[str, int]:
    return dict(
        connection.execute(
            f"SELECT id, label FROM items WHERE medium = ? AND id IN ({_marks(ids)})",  # noqa: S608
            (medium, *ids),
        )
    )


def _parts(values: Iterable[T]) -> Iterator[list[T]]:
    """In parts of at most 500, because SQLite limits the parameters of a statement."""
    rest = iter(values)
    while part := list(islice(rest, 500)):
        yield part


def _marks(values: Sequence[object]) -> str:
    return ",".join("?" * len(values))


def _digest(vector: bytes) -> bytes:
    return hashlib.sha256(vector).digest()


def _checksum(medium: str, item: str, label: int, metadata: str, sequence: int) -> int:
    return zlib.crc32(f"{medium}\0{item}\0{label}\0{metadata}\0{sequence}".encode())


def _corrupt(path: Path, what: object) -> IndexCorruptError:
    return IndexCorruptError(
        f"{path}: the index is damaged ({what}); restore it from a copy, or make it anew with: "
        f"dckt index BUNDLE {path.parent} --force ..."
    )


_DISK = {
    sqlite3.SQLITE_BUSY: "another process is writing to it; try again when that is done",
    sqlite3.SQLITE_LOCKED: "another process is writing to it; try again when that is done",
    sqlite3.SQLITE_FULL: "the disk is full; nothing of this call was stored",
    sqlite3.SQLITE_READONLY: "the folder or the file may not be written; an index needs that even for a search",
    sqlite3.SQLITE_CANTOPEN: "it cannot be opened; may its folder be written?",
    sqlite3.SQLITE_IOERR: "the disk reports an error; nothing of this call was stored",
    sqlite3.SQLITE_PERM: "it may not be opened",
}


@contextmanager
def _errors_of(path: Path) -> Iterator[None]:
    """Turns SQLite's errors into ours."""
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in _DISK:
            raise IndexFolderError(f"{path}: {_DISK[code]} ({error})") from error
        if isinstance(error, sqlite3.ProgrammingError):
            raise IndexFolderError(f"{path.parent}: the index was closed; open it again") from error
        raise _corrupt(path, error) from error
    except UnicodeDecodeError as error:
        raise _corrupt(path, error) from error
