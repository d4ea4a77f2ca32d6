"""What a segment is written from.

Shape letters: N rows (unique vectors), D width.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from dckt.index.records import Entry
from dckt.index.rows import Rows
from dckt.index.vectors import Float32Array


class RowSource:
    """Rows as they were when it was made; they may change meanwhile.

    Args:
        rows: which.
        drop_unused: leave out those without items.
    """

    def __init__(self, rows: Rows, *, drop_unused: bool) -> None:
        self._segment = rows.segment
        self._mapped = rows.mapped
        self._changed = rows.changed()
        self._parts = rows.parts()
        self._labels = rows.labels()
        self._kept = rows.used() if drop_unused else np.ones(rows.rows, dtype=np.bool_)

    @property
    def labels(self) -> NDArray[np.int64]:
        """(N,) ascending."""
        return self._labels[self._kept]

    def vectors(self) -> Iterator[Float32Array]:
        """Parts that make (N, D)."""
        start = 0
        for part in self._parts:
            for first in range(0, len(part), 8192):
                block = part[first : first + 8192]
                kept = self._kept[start : start + len(block)]
                yield block if kept.all() else block[kept]
                start += len(block)

    def entries(self) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], bytes, NDArray[np.int64], bytes]]:
        """Runs of rows; those that did not change since the segment are copied as they are."""
        row = 0
        special = sorted({*self._changed, *np.flatnonzero(~self._kept).tolist()})
        block: list[list[Entry]] = []
        for changed in special:
            if changed > row:
                if block:
                    yield _packed(block)
                    block = []
                yield from self._copied(row, changed)
            if self._kept[changed]:
                block.append(self._changed.get(changed, []))
            row = changed + 1
            if len(block) >= 8192:
                yield _packed(block)
                block = []
        if block:
            yield _packed(block)
        yield from self._copied(row, self._mapped)

    def _copied(
        self, first: int, end: int
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], bytes, NDArray[np.int64], bytes]]:
        segment = self._segment
        for start in range(first, end if segment else first, 65536):
            assert segment is not None  # noqa: S101
            stop = min(end, start + 65536)
            items = segment.items[start : stop + 1]
            ids = segment.id_ends[items[0] : items[-1] + 1]
            metadata = segment.metadata_ends[items[0] : items[-1] + 1]
            yield (
                np.diff(items),
                np.diff(ids),
                segment.ids[int(ids[0]) : int(ids[-1])],
                np.diff(metadata),
                segment.metadata[int(metadata[0]) : int(metadata[-1])],
            )


def _packed(
    rows: list[list[Entry]],
) -> tuple[NDArray[np.int64], NDArray[np.int64], bytes, NDArray[np.int64], bytes]:
    ids = [item.encode() for entries in rows for item, _ in entries]
    metadata = [text for entries in rows for _, text in entries]
    return (
        np.array([len(entries) for entries in rows], dtype=np.int64),
        np.array([len(item) for item in ids], dtype=np.int64),
        b"".join(ids),
        np.array([len(text) for text in metadata], dtype=np.int64),
        b"".join(metadata),
    )
