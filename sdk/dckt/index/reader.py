"""Reading the truth of an index, of which every look is at one moment.

Shape letters: N vectors, D width. A log of commits and removals lets a reader take in what changed without reading
everything again.
"""

# ruff: noqa: S608 - statements are put together from our own text and question marks; every value is bound.
from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from dckt.errors import IndexFolderError
from dckt.index.filters import Filter
from dckt.index.records import Change, Contents, Tuned
from dckt.index.results import Item
from dckt.index.schema import Head, IndexMeta, connect, errors_of
from dckt.index.tables import ITEM, REMOVAL, SECOND, Tables, marks, parts
from dckt.index.vectors import Float32Array

_PAGE = 2000


class ItemReader(Tables):
    """The SQLite file, for reading from many threads."""

    def __init__(self, path: Path, meta: IndexMeta, mode: str) -> None:
        super().__init__(path, meta)
        self.immutable = mode == "immutable"
        self._mode = mode
        self._watch = connect(path, mode=mode)
        self._looking = self._watch.cursor()
        self._watching = threading.Lock()
        self._signature = self._files() if self.immutable else None
        # Connections that nobody reads with now. Each borrower has one alone, so readers do not wait for each other.
        self._idle: list[sqlite3.Connection] = []
        self._closed = False

    def close(self) -> None:
        """Closes the file."""
        self._closed = True
        with self._watching:
            self._watch.close()
        while self._idle:
            self._idle.pop().close()

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
                return int(self._looking.execute("PRAGMA data_version").fetchone()[0])
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
                f"SELECT {REMOVAL} FROM removals WHERE medium = ? AND sequence > ?", (medium, since.sequence)
            ):
                self._check_removal(row, last)
                change.removed.append((row[3], row[2]))
                if row[4] <= since.sequence:  # else it came and went
                    change.more -= row[5]
            for row in connection.execute(
                f"SELECT {ITEM} FROM items WHERE medium = ? AND sequence > ?", (medium, since.sequence)
            ):
                self._check_item(row, medium)
                change.added.append((row[2], row[1], row[3]))
                change.more += row[5]
            fresh = sorted({label for label, _, _ in change.added if label > known})
            for part in parts(fresh):
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
            row = connection.execute(f"SELECT {ITEM} FROM items WHERE medium = ? AND id = ?", (medium, item)).fetchone()
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
            for part in parts(ids):
                for row in connection.execute(
                    f"SELECT {SECOND} WHERE items.medium = ? AND items.id IN ({marks(part)})", (medium, *part)
                ):
                    self._check_second(row)
                    found[row[1]] = np.frombuffer(row[3], dtype=np.float32)
        return found

    def contents(self, medium: str, ids: Iterable[str]) -> dict[str, str]:
        """What was stored as content by id, of those of the ids that there are and have one."""
        found = {}
        with self._reading() as connection:
            for part in parts(ids):
                for row in connection.execute(
                    f"SELECT {ITEM} FROM items WHERE medium = ? AND id IN ({marks(part)}) AND content IS NOT NULL",
                    (medium, *part),
                ):
                    self._check_item(row, medium)
                    found[row[1]] = row[6]
        return found

    def existing(self, medium: str, ids: Iterable[str]) -> set[str]:
        """Those of the ids that there are."""
        with self._reading() as connection:
            return {item for part in parts(ids) for item in _labels_of(connection, medium, part)}

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
                    f"SELECT {ITEM} FROM items WHERE (medium, id) > (?, ?) AND {sql} ORDER BY medium, id LIMIT {_PAGE}",
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


def _condition(medium: str | None, where: Filter | None) -> tuple[str, tuple[Any, ...]]:
    sql, parameters = (where.sql, where.parameters) if where else ("1", ())
    return (sql, parameters) if medium is None else (f"medium = ? AND {sql}", (medium, *parameters))


def _labels_of(connection: sqlite3.Connection, medium: str, ids: Sequence[str]) -> dict[str, int]:
    return dict(
        connection.execute(
            f"SELECT id, label FROM items WHERE medium = ? AND id IN ({marks(ids)})",
            (medium, *ids),
        )
    )
