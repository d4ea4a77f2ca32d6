"""One medium's unique vectors in memory, with the items that share each.

Shape letters: N rows (unique vectors), D width. Class-probability vectors collapse into copies, and every graph library
breaks on copies, so a vector is kept once with the items that share it. Rows are in the order of their labels. The
first of them are those of a segment, which is mapped and never changes; what came later, and the items of rows that
changed since, are in memory.
"""

from __future__ import annotations

from typing import Self

import numpy as np
from numpy.typing import NDArray

from dckt.index.exact import Entries
from dckt.index.records import Change, Contents, Entry
from dckt.index.schema import Head, added
from dckt.index.segment import Segment
from dckt.index.vectors import Float32Array

EVERYTHING = 2**62


class Rows:
    """Unique vectors and their items. The caller sees to it that nothing changes during a search.

    Attributes:
        head: the commit that it shows.
        segment: what its first rows are mapped from, or None.
        items: how many.
        total: of their checksums in SQLite.
    """

    def __init__(self, dimension: int, head: Head, segment: Segment | None = None) -> None:
        self.dimension = dimension
        self.head = head
        self.segment = segment
        self._mapped = len(segment.labels) if segment else 0
        self._rows = self._mapped
        self._tail_labels = np.zeros(0, dtype=np.int64)
        self._tail = np.zeros((0, dimension), dtype=np.float32)
        self._counts = np.diff(segment.items).astype(np.int32) if segment else np.zeros(0, dtype=np.int32)
        self._entries: dict[int, list[Entry]] = {}
        self.items = int(self._counts.sum())
        self.total = segment.total if segment else 0
        self._unused = int((self._counts == 0).sum())

    def fill(self, contents: Contents) -> Self:
        """Takes in what the store holds, where nothing is yet."""
        self._tail_labels, self._tail = contents.labels, contents.matrix
        self._rows = len(contents.labels)
        self._entries = dict(enumerate(contents.postings))
        self._counts = np.array([len(entries) for entries in contents.postings], dtype=np.int32)
        self.items, self.total = int(self._counts.sum()), contents.total
        self._unused = int((self._counts == 0).sum())
        return self

    def __len__(self) -> int:
        """How many unique vectors are in use."""
        return self._rows - self._unused

    @property
    def rows(self) -> int:
        """How many rows, unused ones included."""
        return self._rows

    @property
    def mapped(self) -> int:
        """How many of the rows are those of the segment."""
        return self._mapped

    @property
    def last_label(self) -> int:
        """The highest label of a row, or 0."""
        if self._rows > self._mapped:
            return int(self._tail_labels[self._rows - self._mapped - 1])
        return int(self.segment.labels[-1]) if self.segment else 0

    def labels(self) -> NDArray[np.int64]:
        """(N,) ascending, unused ones included."""
        tail = self._tail_labels[: self._rows - self._mapped]
        return np.concatenate([self.segment.labels, tail]) if self.segment else tail.copy()

    def used(self) -> NDArray[np.bool_]:
        """(N,) whether a row has items."""
        return self._counts[: self._rows] > 0

    def parts(self, first: int = 0, end: int | None = None) -> list[Float32Array]:
        """The rows from ``first`` on, up to ``end``, one array after the other, not copied."""
        end = self._rows if end is None else end
        tail = self._tail[max(0, first - self._mapped) : max(0, end - self._mapped)]
        if self.segment is None or first >= self._mapped:
            return [tail]
        mapped = self.segment.vectors[first:end]
        return [mapped, tail] if len(tail) else [mapped]

    def entries(self, row: int, limit: int) -> list[Entry]:
        """The first items of a row, at most so many, ids ascending."""
        known = self._entries.get(row)
        if known is not None:
            return known[:limit] if len(known) > limit else known
        assert self.segment is not None  # noqa: S101 - every other row is in the dictionary
        return self.segment.entries(row, limit)

    def gathered(self, rows: NDArray[np.int64]) -> Float32Array:
        """The vectors of some rows, (M, D)."""
        if self.segment is None:
            return self._tail.take(rows, axis=0)
        if self._rows == self._mapped:
            return self.segment.vectors.take(rows, axis=0)
        vectors = np.empty((len(rows), self.dimension), dtype=np.float32)
        mapped = rows < self._mapped
        vectors[mapped] = self.segment.vectors[rows[mapped]]
        vectors[~mapped] = self._tail[rows[~mapped] - self._mapped]
        return vectors

    def _all_single(self) -> bool:
        """Whether every row is in the segment as it was, with one item."""
        return not self._entries and self.items == self._rows and not self._unused

    def _entries_now(self) -> Entries:
        """What gives the items of a row, without a detour where none of them changed."""
        return self.entries if self._entries or self.segment is None else self.segment.entries

    # --- changing ---

    def apply(self, change: Change, head: Head) -> bool:
        """Repeats what commits did; tells whether what came of it is what the store holds."""
        fresh = self._append(change.vectors)
        touched: dict[int, dict[str, bytes]] = {}

        def entries_of(label: int) -> dict[str, bytes] | None:
            row = fresh.get(label)
            if row is None:
                row = self._row(label)
            if row is None:
                return None
            if row not in touched:
                touched[row] = dict(self.entries(row, EVERYTHING))
            return touched[row]

        for label, item in change.removed:
            # A vector that came and went between two looks is not known, and need not be.
            if (entries := entries_of(label)) is not None:
                entries.pop(item, None)
        firsts = 0
        for label, item, metadata in change.added:
            row = fresh.get(label)
            if row is not None and not self._entries[row] and row not in touched:
                # The first item of a new row, and of most rows the only one.
                self._entries[row] = [(item, metadata.encode())]
                self._counts[row] = 1
                firsts += 1
                continue
            if (entries := entries_of(label)) is None:
                return False
            entries[item] = metadata.encode()
        self.items += firsts
        self._unused -= firsts
        for row, entries in touched.items():
            # A new list each time: who reads the old one meanwhile is not disturbed.
            self._entries[row] = sorted(entries.items())
            before, after = int(self._counts[row]), len(entries)
            self._counts[row] = after
            self.items += after - before
            self._unused += (after == 0) - (before == 0)
        self.head = head
        self.total = added(self.total, change.more)
        return (self.items, self.total) == (change.items, change.total)

    def changed(self) -> dict[int, list[Entry]]:
        """By row, the items of those that differ from the segment."""
        return dict(self._entries)

    def changed_share(self) -> float:
        """The share of the rows that is in memory because it differs from the segment."""
        return len(self._entries) / max(1, self._rows)

    def _append(self, vectors: dict[int, Float32Array]) -> dict[int, int]:
        """Makes a row for each new vector; gives the rows by label."""
        if not vectors:
            return {}
        old, new = self._rows - self._mapped, len(vectors)
        if old + new > len(self._tail_labels) or not self._tail.flags.writeable:
            room = max(old + new, 3 * old // 2)
            labels = np.zeros(room, dtype=np.int64)
            matrix = np.zeros((room, self.dimension), dtype=np.float32)
            labels[:old], matrix[:old] = self._tail_labels[:old], self._tail[:old]
            self._tail_labels, self._tail = labels, matrix
        if self._rows + new > len(self._counts):
            counts = np.zeros(max(self._rows + new, 3 * self._rows // 2), dtype=np.int32)
            counts[: self._rows] = self._counts[: self._rows]
            self._counts = counts
        self._tail_labels[old : old + new] = list(vectors)
        self._tail[old : old + new] = np.concatenate(list(vectors.values())).reshape(new, -1)
        fresh = {label: self._rows + place for place, label in enumerate(vectors)}
        self._counts[self._rows : self._rows + new] = 0
        self._entries.update((row, []) for row in fresh.values())
        self._unused += new
        self._rows += new
        return fresh

    def _row(self, label: int) -> int | None:
        for first, labels in (
            (0, self.segment.labels if self.segment else self._tail_labels[:0]),
            (self._mapped, self._tail_labels[: self._rows - self._mapped]),
        ):
            place = int(np.searchsorted(labels, label))
            if place < len(labels) and labels[place] == label:
                return first + place
        return None
