"""The rows of an index's SQLite file: how they are read, and how damage to them is noticed.

Shape letters: N vectors, D width. SQLite notices damage to its own structure; checksums of every row notice damage to
its content.
"""

# ruff: noqa: S608 - statements are put together from our own text and question marks; every value is bound.
from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from dckt.errors import IndexCorruptError
from dckt.index.records import Contents, Entry
from dckt.index.schema import Checksums, Head, IndexMeta, added, corrupt
from dckt.index.vectors import Float32Array

T = TypeVar("T")

ITEM = "medium, id, label, metadata, sequence, checksum, content"
REMOVAL = "medium, sequence, id, label, item_sequence, item_checksum, checksum"
SECOND = (
    "items.medium, items.id, items.sequence, seconds.vector, seconds.checksum FROM items "
    "LEFT JOIN seconds ON seconds.medium = items.medium AND seconds.id = items.id"
)


class Tables:
    """Reads and checks rows through a connection of the caller's."""

    def __init__(self, path: Path, meta: IndexMeta) -> None:
        self.path = path
        self.meta = meta
        self._checksums = Checksums(meta.index_id)

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
            f"SELECT label, digest, vector FROM vectors WHERE medium = ? AND label IN ({marks(labels)}) ORDER BY label",
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
        for row in connection.execute(f"SELECT {ITEM} FROM items WHERE medium = ? ORDER BY id", (medium,)):
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
        for row in connection.execute(f"SELECT {ITEM} FROM items ORDER BY medium, id"):
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
        for row in connection.execute(f"SELECT {REMOVAL} FROM removals"):
            self._check_removal(row, last)
        if self.meta.second is None:
            return
        for row in connection.execute(f"SELECT {SECOND}"):
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


def parts(values: Iterable[T]) -> Iterator[list[T]]:
    """In parts of at most 500, because SQLite limits the parameters of a statement."""
    rest = iter(values)
    while part := list(islice(rest, 500)):
        yield part


def marks(values: Sequence[object]) -> str:
    """A question mark for each value."""
    return ",".join("?" * len(values))
