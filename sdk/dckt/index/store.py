"""The truth of an index: one SQLite file, in WAL mode, every commit on the disk before it is acknowledged.

Shape letters: N vectors, D width. Each unique vector of a medium is stored once under a label that is never used again;
an item names its vector by that label. SQLite notices damage to its own structure; checksums of every row notice damage
to its content. A log of commits and removals lets a reader take in what changed without reading everything again.
"""

# ruff: noqa: S608 - statements are put together from our own text and question marks; every value is bound.
from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from dckt.errors import IndexCorruptError, IndexFolderError, ItemError
from dckt.index import schema
from dckt.index.filters import Filter
from dckt.index.items import shown
from dckt.index.results import Item
from dckt.index.schema import INDEX_VERSION as INDEX_VERSION
from dckt.index.schema import ITEMS as ITEMS
from dckt.index.schema import KINDS as KINDS
from dckt.index.schema import Checksums, added, connect, corrupt, errors_of
from dckt.index.schema import Head as Head
from dckt.index.schema import IndexMeta as IndexMeta
from dckt.index.vectors import Float32Array

# An index up to this size is read and checked whole on opening, which takes about a tenth of a second; up to the other,
# SQLite's structure is. A larger one is checked by verify(), and every row wherever it is read.
CHECKED_BYTES = 8 * 2**20
_INTEGRITY_CHECK_BYTES = 256 * 2**20
_PAGE = 2000
# Digests are in no order, so a batch changes pages all over their index. The writer keeps those pages in memory, and
# folds its log, in pages of 4 KiB, into the file when most of them have changed more than once.
_CACHE_KIB = 16 * 1024
_LOG_PAGES = 4000
_LAST_LABEL = 2**62
T = TypeVar("T")
# An item's id and its metadata as JSON.
Entry: TypeAlias = tuple[str, bytes]


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What the store holds of one medium.

    Attributes:
        labels: (N,) int64, ascending.
        matrix: (N, D) float32.
        postings: for every vector the items that share it, ids ascending.
        total: of the checksums of the items.
    """

    labels: NDArray[np.int64]
    matrix: Float32Array
    postings: list[list[Entry]]
    total: int


@dataclass(kw_only=True)
class Change:
    """What one or several commits did to one medium, in the order to repeat it.

    Attributes:
        removed: (label, id) of items that are gone or replaced; one that is not there is gone already.
        added: (label, id, metadata as JSON) of items that are new or replaced.
        vectors: by label, ascending, each vector that was not there before.
        more: by how much it changes the total of the items' checksums.
        items: how many there are after it.
        total: of their checksums.
    """

    removed: list[tuple[int, str]] = field(default_factory=list)
    added: list[tuple[int, str, str]] = field(default_factory=list)
    vectors: dict[int, Float32Array] = field(default_factory=dict)
    more: int = 0
    items: int = 0
    total: int = 0


@dataclass(frozen=True)
class Tuned:
    """What was asked of the graph of a medium, and what was measured for which graph."""

    target: float
    graph: str | None
    effort: int | None
    recall: float | None


class ItemStore:
    """The SQLite file. One writer at a time (the caller sees to it inside a process, SQLite between processes)."""

    def __init__(self, path: Path, meta: IndexMeta, writer: sqlite3.Connection, mode: str) -> None:
        self.path = path
        self.meta = meta
        self.immutable = mode == "immutable"
        self._mode = mode
        self._checksums = Checksums(meta.index_id)
        self._writer = writer
        writer.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
        writer.execute(f"PRAGMA wal_autocheckpoint = {_LOG_PAGES}")
        self._watch = connect(path, mode=mode)
        self._watching = threading.Lock()
        self._signature = self._files() if self.immutable else None
        # Connections that nobody reads with now. Each borrower has one alone, so readers do not wait for each other.
        self._idle: list[sqlite3.Connection] = []
        self._closed = False

    @staticmethod
    def create(path: Path, meta: IndexMeta) -> None:
        """Makes the file, with no items in it."""
        schema.create(path, meta)

    @classmethod
    def open(cls, path: Path) -> ItemStore:
        """Opens the file after checking its structure; one of an older format is brought to the present one.

        Raises:
            IndexFolderError: there is no such file, or it cannot be read.
            IndexVersionError: written in a newer format.
            IndexCorruptError: damaged, or no index.
        """
        try:
            there = path.is_file()
        except OSError as error:
            raise IndexFolderError(f"{path}: cannot be read ({error})") from error
        if not there:
            raise IndexFolderError(
                f"{path.parent}: is no index, for it holds no {path.name}; make one with: "
                f"dckt index BUNDLE {path.parent} --images FOLDER --texts FILE"
            )
        with errors_of(path):
            mode, writer = _connect(path)
            try:
                size = path.stat().st_size
                _, meta = schema.read_meta(path, writer)
                if size <= _INTEGRITY_CHECK_BYTES:
                    verdict = writer.execute("PRAGMA integrity_check(1)").fetchone()[0]
                    if verdict != "ok":
                        raise sqlite3.DatabaseError(verdict)
                _upgrade(path, writer, mode)
                store = cls(path, meta, writer, mode)
            except BaseException:
                writer.close()
                raise
        try:
            if size <= CHECKED_BYTES:
                store.verify()
        except BaseException:
            store.close()
            raise
        return store

    def close(self) -> None:
        """Closes the file. SQLite folds its log into it."""
        self._closed = True
        with self._watching:
            self._watch.close()
        while self._idle:
            self._idle.pop().close()
        self._writer.close()

    # --- watching ---

    def version(self) -> int:
        """Another number after every commit, by anyone. Costs some microseconds.

        What is read after it was asked for is at least as new as it.
        """
        if self._signature is not None:
            if self._files() != self._signature:
                raise IndexFolderError(
                    f"{self.path}: was opened where it cannot be written, and was changed since; open it again"
                )
            return 0
        with self._watching:
            try:
                return int(self._watch.execute("PRAGMA data_version").fetchone()[0])
            except sqlite3.Error:
                with errors_of(self.path):
                    raise

    def head(self) -> Head:
        """The last commit."""
        with self._snapshot() as connection:
            return self._state(connection)[0]

    # --- reading ---

    def load(self, medium: str) -> tuple[Head, Contents]:
        """Reads and checks all vectors and items of a medium, of one moment.

        Raises:
            IndexCorruptError: a row is damaged.
        """
        with self._snapshot() as connection:
            head, media = self._state(connection)
            return head, self._load_medium(connection, medium, media.get(medium, (0, 0)))

    def holds(self, head: Head) -> bool:
        """Whether the log knows a commit."""
        with self._reading() as connection:
            row = connection.execute("SELECT token FROM commits WHERE sequence = ?", (head.sequence,)).fetchone()
            return row is not None and row[0] == head.token

    def replay(self, medium: str, since: Head, known: int) -> tuple[Head, Change] | None:
        """What changed in a medium since a commit.

        Args:
            medium: whose items.
            since: the commit that the caller has.
            known: the highest label that the caller has.

        Returns:
            The last commit and the change; None when the log does not reach back that far, or tells another history.
        """
        with self._snapshot() as connection:
            row = connection.execute("SELECT token FROM commits WHERE sequence = ?", (since.sequence,)).fetchone()
            if row is None or row[0] != since.token:
                return None
            head, media = self._state(connection)
            change = Change()
            change.items, change.total = media.get(medium, (0, 0))
            last = self._last_label(connection, known)
            for row in connection.execute(
                f"SELECT {_REMOVAL} FROM removals WHERE medium = ? AND sequence > ?", (medium, since.sequence)
            ):
                self._check_removal(row, last)
                change.removed.append((row[3], row[2]))
                if row[4] <= since.sequence:  # else it came and went
                    change.more -= row[5]
            for row in connection.execute(
                f"SELECT {_ITEM} FROM items WHERE medium = ? AND sequence > ?", (medium, since.sequence)
            ):
                self._check_item(row, medium)
                change.added.append((row[2], row[1], row[3]))
                change.more += row[5]
            fresh = sorted({label for label, _, _ in change.added if label > known})
            for part in _parts(fresh):
                for label, vector in self._vectors(connection, medium, part):
                    change.vectors[label] = vector
            if len(change.vectors) != len(fresh):
                raise self._corrupt(f"{len(fresh) - len(change.vectors)} vectors of {medium} items are missing")
            return head, change

    def media(self) -> dict[str, int]:
        """How many items of each medium."""
        with self._snapshot() as connection:
            return {medium: items for medium, (items, _) in self._state(connection)[1].items()}

    def metadata(self, medium: str, item: str) -> dict[str, Any] | None:
        """Of one item, or None."""
        with self._reading() as connection:
            row = connection.execute(
                f"SELECT {_ITEM} FROM items WHERE medium = ? AND id = ?", (medium, item)
            ).fetchone()
            if row is None:
                return None
            self._check_item(row, medium)
        return self.parsed(row[3], medium, item)

    def parsed(self, metadata: str, medium: str, item: str) -> dict[str, Any]:
        """Metadata from JSON.

        Raises:
            IndexCorruptError: it is none.
        """
        try:
            value: dict[str, Any] = json.loads(metadata)
        except ValueError as error:
            raise self._corrupt(f"the metadata of the {medium} item {item!r} was altered") from error
        return value

    def vector(self, medium: str, item: str) -> Float32Array | None:
        """The vector of one item (D,), or None."""
        with self._snapshot() as connection:
            row = connection.execute("SELECT label FROM items WHERE medium = ? AND id = ?", (medium, item)).fetchone()
            if row is None:
                return None
            found = list(self._vectors(connection, medium, [row[0]]))
            if not found:
                raise self._corrupt(f"the vector of the {medium} item {item!r} is missing")
            return found[0][1]

    def seconds(self, medium: str, ids: Iterable[str]) -> dict[str, Float32Array]:
        """The second vector (D2,) by id, of those of the ids that there are."""
        found = {}
        with self._reading() as connection:
            for part in _parts(ids):
                for row in connection.execute(
                    f"SELECT {_SECOND} WHERE items.medium = ? AND items.id IN ({_marks(part)})", (medium, *part)
                ):
                    self._check_second(row)
                    found[row[1]] = np.frombuffer(row[3], dtype=np.float32)
        return found

    def contents(self, medium: str, ids: Iterable[str]) -> dict[str, str]:
        """What was stored as content by id, of those of the ids that there are and have one."""
        found = {}
        with self._reading() as connection:
            for part in _parts(ids):
                for row in connection.execute(
                    f"SELECT {_ITEM} FROM items WHERE medium = ? AND id IN ({_marks(part)}) AND content IS NOT NULL",
                    (medium, *part),
                ):
                    self._check_item(row, medium)
                    found[row[1]] = row[6]
        return found

    def existing(self, medium: str, ids: Iterable[str]) -> set[str]:
        """Those of the ids that there are."""
        with self._reading() as connection:
            return {item for part in _parts(ids) for item in _labels_of(connection, medium, part)}

    def ids(self, medium: str) -> list[str]:
        """Every id of a medium, ascending."""
        with self._reading() as connection:
            rows = connection.execute("SELECT id FROM items WHERE medium = ? ORDER BY id", (medium,))
            return [row[0] for row in rows]

    def items(self, medium: str | None, where: Filter | None) -> Iterator[Item]:
        """Items by medium and id, ascending; read in pages, so no page knows of changes behind it."""
        sql, parameters = _condition(medium, where)
        last = ("", "")
        while True:
            with self._reading() as connection:
                rows = connection.execute(
                    f"SELECT {_ITEM} FROM items WHERE (medium, id) > (?, ?) AND {sql} "
                    f"ORDER BY medium, id LIMIT {_PAGE}",
                    (*last, *parameters),
                ).fetchall()
            for row in rows:
                self._check_item(row, row[0])
                yield Item(row[1], row[0], self.parsed(row[3], row[0], row[1]))
            if len(rows) < _PAGE:
                return
            last = rows[-1][:2]

    def count(self, medium: str | None, where: Filter | None) -> int:
        """How many items pass."""
        sql, parameters = _condition(medium, where)
        with self._reading() as connection:
            return int(connection.execute(f"SELECT count(*) FROM items WHERE {sql}", parameters).fetchone()[0])

    def allowed(self, medium: str, where: Filter) -> tuple[Head, list[tuple[int, str]]]:
        """(label, id) of every item of a medium that passes, and the commit as of which."""
        sql, parameters = _condition(medium, where)
        with self._snapshot() as connection:
            rows = connection.execute(f"SELECT label, id FROM items WHERE {sql}", parameters).fetchall()
            return self._state(connection)[0], rows

    def tuned(self) -> dict[str, Tuned]:
        """By medium, what was asked of graphs."""
        with self._reading() as connection:
            return {row[0]: Tuned(*row[1:]) for row in connection.execute("SELECT * FROM tuning")}

    def verify(self) -> None:
        """Reads and checks every row.

        Raises:
            IndexCorruptError: one is damaged.
        """
        with self._snapshot() as connection:
            self._verify(connection)

    def check_structure(self) -> None:
        """SQLite's own check.

        Raises:
            IndexCorruptError: the file's structure is damaged.
        """
        with self._reading() as connection:
            verdict = connection.execute("PRAGMA integrity_check(1)").fetchone()[0]
            if verdict != "ok":
                raise self._corrupt(verdict)

    # --- writing ---

    @contextmanager
    def transaction(self) -> Iterator[Head]:
        """All of what is written inside, or, unless :meth:`commit` was called, nothing. Gives the last commit."""
        with errors_of(self.path):
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                yield self._state(self._writer)[0]
            finally:
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")

    def commit(self) -> None:
        """Ends the transaction; when this returns, it is on the disk."""
        self._writer.execute("COMMIT")

    def add(
        self,
        medium: str,
        ids: Sequence[str],
        vectors: Float32Array,
        metadata: Sequence[str],
        *,
        seconds: Float32Array | None = None,
        contents: Sequence[str | None] | None = None,
        upsert: bool,
    ) -> tuple[Head, Change]:
        """Stores items, inside a transaction.

        Args:
            medium: of all of them.
            ids: N different ones.
            vectors: (N, D) of length 1.
            metadata: N JSON texts.
            seconds: (N, D2), where the index keeps second vectors.
            contents: N texts to keep, or None.
            upsert: replace those that are there already.

        Raises:
            ItemError: ids are there already; all of them are named.
        """
        before = self._rows_of(medium, ids)
        if before and not upsert:
            raise ItemError(
                f"{len(before)} of {len(ids)} {medium} ids are in the index already: {shown(sorted(before))}; "
                "choose others, leave them out, or replace them with upsert"
            )
        head, change = self._next(), Change()
        labels = self._label_vectors(change, medium, vectors)
        rows = [
            (
                medium, item, label, text, head.sequence,
                self._checksums.item(medium, item, label, text, head.sequence, content), content,
            )
            for item, label, text, content in zip(ids, labels, metadata, contents or [None] * len(ids), strict=True)
        ]  # fmt: skip
        self._writer.executemany("INSERT OR REPLACE INTO items VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
        if seconds is not None:
            blobs = [row.tobytes() for row in seconds]
            self._writer.executemany(
                "INSERT OR REPLACE INTO seconds VALUES (?, ?, ?, ?)",
                [
                    (medium, item, blob, self._checksums.second(medium, item, head.sequence, blob))
                    for item, blob in zip(ids, blobs, strict=True)
                ],
            )
        change.added = list(zip(labels, ids, metadata, strict=True))
        change.more = sum(row[5] for row in rows)
        self._remove(change, medium, head, before)
        self._seal(change, medium, head, len(ids) - len(before))
        return head, change

    def delete(self, medium: str, ids: Sequence[str]) -> tuple[Head, Change]:
        """Deletes those of the ids that there are, inside a transaction."""
        before = self._rows_of(medium, ids)
        head, change = self._next(), Change()
        gone = [(medium, item) for item in before]
        self._writer.executemany("DELETE FROM items WHERE medium = ? AND id = ?", gone)
        if self.meta.second:
            self._writer.executemany("DELETE FROM seconds WHERE medium = ? AND id = ?", gone)
        self._remove(change, medium, head, before)
        self._seal(change, medium, head, -len(before))
        return head, change

    def remember(self, medium: str, tuned: Tuned) -> None:
        """Stores what was asked of a graph, and measured."""
        with self.transaction():
            self._writer.execute(
                "INSERT OR REPLACE INTO tuning VALUES (?, ?, ?, ?, ?)",
                (medium, tuned.target, tuned.graph, tuned.effort, tuned.recall),
            )
            self.commit()

    def trim(self, sequence: int) -> None:
        """Forgets the log before a commit. A reader that is further behind reads everything again."""
        with self.transaction():
            self._writer.execute("DELETE FROM commits WHERE sequence < ?", (sequence,))
            self._writer.execute("DELETE FROM removals WHERE sequence <= ?", (sequence,))
            self._writer.execute("DELETE FROM media WHERE items = 0")
            self.commit()

    def vacuum(self) -> None:
        """Gives unused space back to the disk. Readers go on."""
        with errors_of(self.path):
            self._writer.execute("VACUUM")
            self._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    # --- inside a transaction ---

    def _next(self) -> Head:
        return Head(self._state(self._writer)[0].sequence + 1, schema.new_token())

    def _seal(self, change: Change, medium: str, head: Head, more: int) -> None:
        """Stores how many items there are now, the total of their checksums, and the commit."""
        items, total = self._state(self._writer)[1].get(medium, (0, 0))
        change.items, change.total = items + more, added(total, change.more)
        self._writer.execute("INSERT OR REPLACE INTO media VALUES (?, ?, ?)", (medium, change.items, change.total))
        checksum = self._checksums.commit(head, self._media(self._writer))
        self._writer.execute("INSERT INTO commits VALUES (?, ?, ?)", (head.sequence, head.token, checksum))

    def _rows_of(self, medium: str, ids: Sequence[str]) -> dict[str, tuple[Any, ...]]:
        """The rows of those of the ids that there are, by id."""
        rows = {}
        for part in _parts(ids):
            for row in self._writer.execute(
                f"SELECT {_ITEM} FROM items WHERE medium = ? AND id IN ({_marks(part)})", (medium, *part)
            ):
                self._check_item(row, medium)
                rows[row[1]] = row
        return rows

    def _label_vectors(self, change: Change, medium: str, vectors: Float32Array) -> list[int]:
        """The label of every row; vectors that are new are stored and put into the change."""
        blobs = [row.tobytes() for row in vectors]
        digests = [self._checksums.digest(blob) for blob in blobs]
        rows = dict(zip(digests, range(len(digests)), strict=True))
        labels = self._labels_by_digest(medium, rows)
        fresh = [(key, row) for key, row in rows.items() if key not in labels]
        # As SQLite would number them; so they need not be asked for afterwards.
        highest = self._writer.execute("SELECT max(label) FROM vectors").fetchone()[0] or 0
        first = max(highest, self._last_label(self._writer)) + 1
        if first > _LAST_LABEL:
            raise self._corrupt("it has no labels left")
        self._writer.executemany(
            "INSERT INTO vectors VALUES (?, ?, ?, ?)",
            [(label, medium, key, blobs[row]) for label, (key, row) in enumerate(fresh, first)],
        )
        for label, (key, row) in enumerate(fresh, first):
            change.vectors[label] = vectors[row]
            labels[key] = label
        return [labels[key] for key in digests]

    def _labels_by_digest(self, medium: str, digests: Iterable[bytes]) -> dict[bytes, int]:
        labels: dict[bytes, int] = {}
        for part in _parts(digests):
            labels.update(
                self._writer.execute(
                    f"SELECT digest, label FROM vectors WHERE medium = ? AND digest IN ({_marks(part)})",
                    (medium, *part),
                )
            )
        return labels

    def _remove(self, change: Change, medium: str, head: Head, before: Mapping[str, tuple[Any, ...]]) -> None:
        """Logs which items left which vectors, and drops the vectors that none uses any more."""
        change.removed = [(row[2], item) for item, row in before.items()]
        change.more -= sum(row[5] for row in before.values())
        removals = [(medium, head.sequence, item, row[2], row[4], row[5]) for item, row in before.items()]
        self._writer.executemany(
            f"INSERT INTO removals ({_REMOVAL}) VALUES (?, ?, ?, ?, ?, ?, ?)",
            [(*removal, self._checksums.removal(*removal)) for removal in removals],
        )
        self._writer.executemany(
            "DELETE FROM vectors WHERE label = :label AND NOT EXISTS (SELECT 1 FROM items WHERE label = :label)",
            [{"label": label} for label in {row[2] for row in before.values()}],
        )

    # --- connections ---

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with errors_of(self.path):
            if self._closed:
                raise sqlite3.ProgrammingError("closed")
            try:
                connection = self._idle.pop()
            except IndexError:
                connection = connect(self.path, mode=self._mode)
            try:
                yield connection
            finally:
                if self._closed:
                    connection.close()
                else:
                    self._idle.append(connection)

    @contextmanager
    def _snapshot(self) -> Iterator[sqlite3.Connection]:
        """A connection that sees one moment only."""
        with self._reading() as connection:
            connection.execute("BEGIN")
            try:
                yield connection
            finally:
                with suppress(sqlite3.Error):
                    connection.execute("ROLLBACK")

    def _files(self) -> tuple[int, ...]:
        about = self.path.stat()
        try:
            log = self.path.with_name(f"{self.path.name}-wal").stat().st_size
        except FileNotFoundError:
            log = 0
        return about.st_mtime_ns, about.st_size, about.st_ino, log

    # --- rows ---

    def _state(self, connection: sqlite3.Connection) -> tuple[Head, dict[str, tuple[int, int]]]:
        """The last commit, and what it says of each medium: how many items, and the total of their checksums."""
        row = connection.execute(
            "SELECT sequence, token, checksum FROM commits ORDER BY sequence DESC LIMIT 1"
        ).fetchone()
        if row is None:
            raise self._corrupt("its log holds no commit")
        head = Head(*row[:2])
        media = self._media(connection)
        if row[2] != self._checksums.commit(head, media):
            raise self._corrupt("its last commit says something else of its media")
        return head, {medium: (items, total) for medium, items, total in media}

    def _media(self, connection: sqlite3.Connection) -> list[tuple[str, int, int]]:
        return connection.execute("SELECT medium, items, total FROM media ORDER BY medium").fetchall()

    def _last_label(self, connection: sqlite3.Connection, known: int = 0) -> int:
        """The last label that was given, which is at least a known one."""
        row = connection.execute("SELECT seq FROM sqlite_sequence WHERE name = 'vectors'").fetchone()
        last = row[0] if row and isinstance(row[0], int) else 0
        if known > last:
            raise self._corrupt(f"it would give the label {known} for a second time")
        return last

    def _vectors(
        self, connection: sqlite3.Connection, medium: str, labels: Sequence[int]
    ) -> Iterator[tuple[int, Float32Array]]:
        for label, key, vector in connection.execute(
            f"SELECT label, digest, vector FROM vectors WHERE medium = ? AND label IN ({_marks(labels)}) "
            "ORDER BY label",
            (medium, *labels),
        ):
            self._check_vector(label, key, vector)
            yield label, np.frombuffer(vector, dtype=np.float32)

    def _load_medium(self, connection: sqlite3.Connection, medium: str, said: tuple[int, int]) -> Contents:
        labels: list[int] = []
        blobs: list[bytes] = []
        for label, key, vector in connection.execute(
            "SELECT label, digest, vector FROM vectors WHERE medium = ? ORDER BY label", (medium,)
        ):
            self._check_vector(label, key, vector)
            labels.append(label)
            blobs.append(vector)
        places = dict(zip(labels, range(len(labels)), strict=True))
        postings: list[list[Entry]] = [[] for _ in labels]
        before = ""
        loaded = total = 0
        for row in connection.execute(f"SELECT {_ITEM} FROM items WHERE medium = ? ORDER BY id", (medium,)):
            self._check_item(row, medium)
            item, label = row[1:3]
            # In a damaged tree a scan can meet rows out of order, which a look-up by id would then miss.
            if label not in places or item <= before:
                raise self._corrupt(f"the {medium} item {item!r} was altered")
            postings[places[label]].append((item, row[3].encode()))
            before = item
            loaded += 1
            total = added(total, row[5])
        self._check_total(medium, (loaded, total), said)
        matrix = np.frombuffer(b"".join(blobs), dtype=np.float32)
        return Contents(
            labels=np.array(labels, dtype=np.int64),
            matrix=matrix.reshape(len(labels), self.meta.dimension),
            postings=postings,
            total=total,
        )

    def _verify(self, connection: sqlite3.Connection) -> None:
        _, media = self._state(connection)
        for label, key, vector in connection.execute("SELECT label, digest, vector FROM vectors"):
            self._check_vector(label, key, vector)
        before = ("", "")
        counted: dict[str, tuple[int, int]] = {}
        for row in connection.execute(f"SELECT {_ITEM} FROM items ORDER BY medium, id"):
            self._check_item(row, row[0])
            if row[:2] <= before:
                raise self._corrupt(f"the {row[0]} item {row[1]!r} was altered")
            before = row[:2]
            count, total = counted.get(row[0], (0, 0))
            counted[row[0]] = count + 1, added(total, row[5])
        for medium in media.keys() | counted.keys():
            self._check_total(medium, counted.get(medium, (0, 0)), media.get(medium, (0, 0)))
        for item, medium in connection.execute(
            "SELECT id, medium FROM items WHERE NOT EXISTS "
            "(SELECT 1 FROM vectors WHERE vectors.label = items.label AND vectors.medium = items.medium)"
        ):
            raise self._corrupt(f"the {medium} item {item!r} has no vector")
        last = self._last_label(connection)
        for row in connection.execute(f"SELECT {_REMOVAL} FROM removals"):
            self._check_removal(row, last)
        if self.meta.second is None:
            return
        for row in connection.execute(f"SELECT {_SECOND}"):
            self._check_second(row)
        number = connection.execute("SELECT count(*) FROM seconds").fetchone()[0]
        items = sum(count for count, _ in counted.values())
        if number != items:
            raise self._corrupt(f"{number} items have a second vector, of {items}")

    def _check_vector(self, label: int, key: bytes, vector: object) -> None:
        width = 4 * self.meta.dimension
        if not isinstance(vector, bytes) or len(vector) != width or self._checksums.digest(vector) != key:
            raise self._corrupt(f"the vector with label {label} was altered")

    def _check_item(self, row: tuple[Any, ...], medium: str) -> None:
        if (
            row[0] != medium
            or not isinstance(row[1], str)
            or row[5] != self._checksums.item(row[0], row[1], row[2], row[3], row[4], row[6])
        ):
            raise self._corrupt(f"the {medium} item {row[1]!r} was altered")

    def _check_removal(self, row: tuple[Any, ...], last_label: int) -> None:
        if row[6] != self._checksums.removal(*row[:6]) or row[3] > last_label:
            raise self._corrupt(f"what the log says of the {row[0]} item {row[2]!r} was altered")

    def _check_second(self, row: tuple[Any, ...]) -> None:
        medium, item, sequence, vector, checksum = row
        width = 4 * (self.meta.second_dimension or 0)
        sound = isinstance(vector, bytes) and len(vector) == width and isinstance(item, str)
        if not sound or checksum != self._checksums.second(medium, item, sequence, vector):
            raise self._corrupt(f"the second vector of the {medium} item {item!r} was altered, or is missing")

    def _check_total(self, medium: str, found: tuple[int, int], said: tuple[int, int]) -> None:
        if found != said:
            raise self._corrupt(
                f"it holds {found[0]} {medium} items with the total {found[1]}, and says {said[0]} with {said[1]}"
            )

    def _corrupt(self, what: str) -> IndexCorruptError:
        return corrupt(self.path, what)


_ITEM = "medium, id, label, metadata, sequence, checksum, content"
_REMOVAL = "medium, sequence, id, label, item_sequence, item_checksum, checksum"
_SECOND = (
    "items.medium, items.id, items.sequence, seconds.vector, seconds.checksum FROM items "
    "LEFT JOIN seconds ON seconds.medium = items.medium AND seconds.id = items.id"
)


def _connect(path: Path) -> tuple[str, sqlite3.Connection]:
    """A connection, and how it had to be made: a folder that cannot be written is read as it is."""
    try:
        connection = connect(path)
        # Only a read shows whether the log beside the file can be used.
        connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except sqlite3.OperationalError as error:
        if schema.error_code(error) not in schema.UNWRITABLE:
            raise
        log = path.with_name(f"{path.name}-wal")
        if log.exists() and log.stat().st_size:
            # What the log holds would be missed, so this is no way to read.
            raise
    else:
        return "rw", connection
    return "immutable", connect(path, mode="immutable")


def _upgrade(path: Path, connection: sqlite3.Connection, mode: str) -> None:
    if schema.read_meta(path, connection)[0] == schema.INDEX_VERSION:
        return
    if mode == "immutable":
        raise IndexFolderError(
            f"{path.parent}: is of an older format and cannot be written; copy it to where it can, and open it there"
        )
    connection.execute("BEGIN IMMEDIATE")
    try:
        # Another process may have done it meanwhile.
        if schema.read_meta(path, connection)[0] != schema.INDEX_VERSION:
            schema.upgrade(path, connection)
            connection.execute("COMMIT")
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")


def _condition(medium: str | None, where: Filter | None) -> tuple[str, tuple[Any, ...]]:
    sql, parameters = (where.sql, where.parameters) if where else ("1", ())
    return (sql, parameters) if medium is None else (f"medium = ? AND {sql}", (medium, *parameters))


def _labels_of(connection: sqlite3.Connection, medium: str, ids: Sequence[str]) -> dict[str, int]:
    return dict(
        connection.execute(
            f"SELECT id, label FROM items WHERE medium = ? AND id IN ({_marks(ids)})",
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
