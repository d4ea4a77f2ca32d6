"""The truth of an index: one SQLite file, in WAL mode, every commit on the disk before it is acknowledged.

Shape letters: N vectors, D width. Each unique vector of a medium is stored once under a label that is never used again;
an item names its vector by that label.
"""

# ruff: noqa: S608 - statements are put together from our own text and question marks; every value is bound.
from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dckt.errors import IndexFolderError, ItemError
from dckt.index import schema
from dckt.index.items import shown
from dckt.index.reader import ItemReader
from dckt.index.records import Change, Tuned
from dckt.index.schema import INDEX_VERSION as INDEX_VERSION
from dckt.index.schema import ITEMS as ITEMS
from dckt.index.schema import Head, IndexMeta, added, connect, errors_of
from dckt.index.tables import ITEM, REMOVAL, marks, parts
from dckt.index.vectors import Float32Array

# An index up to this size is read and checked whole on opening, which takes about a tenth of a second; up to the other,
# SQLite's structure is. A larger one is checked by verify(), and every row wherever it is read.
CHECKED_BYTES = 8 * 2**20
_INTEGRITY_CHECK_BYTES = 256 * 2**20
# Digests are in no order, so a batch changes pages all over their index. The writer keeps those pages in memory, and
# folds its log, in pages of 4 KiB, into the file when most of them have changed more than once.
_CACHE_KIB = 16 * 1024
_LOG_PAGES = 4000
_LAST_LABEL = 2**62


class ItemStore(ItemReader):
    """The SQLite file. One writer at a time (the caller sees to it inside a process, SQLite between processes)."""

    def __init__(self, path: Path, meta: IndexMeta, writer: sqlite3.Connection, mode: str) -> None:
        self._writer = writer
        writer.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
        writer.execute(f"PRAGMA wal_autocheckpoint = {_LOG_PAGES}")
        super().__init__(path, meta, mode)
        self.logged = 0  # rows that this process put into the log since it was last shortened

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
        super().close()
        self._writer.close()

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

    def log_start(self, kept: int) -> int:
        """The last commit behind which so many commits lie, or so many removals of a medium; 0 where there is none."""
        # In the order of the tables' keys: what SQLite has to sort it keeps in the memory of whichever thread asks.
        newest = "ORDER BY sequence DESC LIMIT 1 OFFSET ?"
        with self._snapshot() as connection:
            found = [connection.execute(f"SELECT sequence FROM commits {newest}", (kept,)).fetchone()]
            for medium, _, _ in self._media(connection):
                asked = f"SELECT sequence FROM removals WHERE medium = ? {newest}"
                found.append(connection.execute(asked, (medium, kept)).fetchone())
        return max((row[0] for row in found if row), default=0)

    def trim(self, sequence: int) -> None:
        """Forgets the log before a commit. A reader that is further behind reads everything again."""
        self.logged = 0
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
        self.logged += 1 + len(change.removed)

    def _rows_of(self, medium: str, ids: Sequence[str]) -> dict[str, tuple[Any, ...]]:
        """The rows of those of the ids that there are, by id."""
        rows = {}
        for part in parts(ids):
            for row in self._writer.execute(
                f"SELECT {ITEM} FROM items WHERE medium = ? AND id IN ({marks(part)})", (medium, *part)
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
        for part in parts(digests):
            labels.update(
                self._writer.execute(
                    f"SELECT digest, label FROM vectors WHERE medium = ? AND digest IN ({marks(part)})",
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
            f"INSERT INTO removals ({REMOVAL}) VALUES (?, ?, ?, ?, ?, ?, ?)",
            [(*removal, self._checksums.removal(*removal)) for removal in removals],
        )
        self._writer.executemany(
            "DELETE FROM vectors WHERE label = :label AND NOT EXISTS (SELECT 1 FROM items WHERE label = :label)",
            [{"label": label} for label in {row[2] for row in before.values()}],
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
