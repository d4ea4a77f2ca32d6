"""What one medium held at one commit, as files that are mapped and never changed: ``segment.MEDIUM.SEQUENCE.ID/``.

A cache and nothing else, so that opening need not read SQLite row by row. The manifest holds the checksums of all files
and its own; when anything does not match, the segment counts as absent. hnswlib never sees a byte that was not
verified. A segment belongs to one commit of one history, by number and token, and what came later is replayed from the
log; a segment of another copy of the index is noticed by that.

Shape letters: N rows (unique vectors, some of them without items), D width, M items in the order of their rows.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeAlias

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from dckt.files import atomic_folder
from dckt.index.hnsw import HnswGraph
from dckt.index.manifest import (
    FILES,
    GRAPH,
    MANIFEST,
    VECTORS,
    GraphReport,
    Manifest,
    SegmentError,
    checksum_of,
    description,
    manifest_of,
    read_manifest,
)
from dckt.index.schema import Head
from dckt.index.vectors import Float32Array

_PIECE = 32 * 2**20
_BUFFER = 2**20
_ABANDONED_SECONDS = 3600
# The name of a file, the SHA-256 of a piece of it, which is worked out, and the one that it must have.
Check: TypeAlias = tuple[str, Future[str], str]


class Source(Protocol):
    """What a segment is written from."""

    @property
    def labels(self) -> NDArray[np.int64]:
        """(N,) ascending."""

    def vectors(self) -> Iterator[Float32Array]:
        """Parts that make (N, D)."""

    def entries(self) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], bytes, NDArray[np.int64], bytes]]:
        """Runs of rows: items of each row, then sizes of ids and the ids, sizes of metadata and the metadata."""


class Segment:
    """The files of a segment, mapped.

    Attributes:
        head: the commit that it belongs to.
        total: of the checksums of its items, in SQLite.
        labels: (N,) int64, ascending.
        vectors: (N, D) float32.
        graph: over all rows, or None.
        report: on the graph, or on one that was refused, or None.
    """

    def __init__(
        self, path: Path, manifest: Manifest, dimension: int, graph: HnswGraph | None, checks: Iterable[Check] = ()
    ) -> None:
        self.path = path
        self._checks = tuple(checks)
        self.head = manifest.head
        self.total = manifest.total
        self.graph = graph
        self.report = manifest.report
        self.labels: NDArray[np.int64] = _array(path / "labels.npy")
        self.vectors: Float32Array = _vectors(path / VECTORS, manifest.rows, dimension)
        self.items: NDArray[np.int64] = _array(path / "items.npy")
        self.id_ends: NDArray[np.int64] = _array(path / "ids.npy")
        self.metadata_ends: NDArray[np.int64] = _array(path / "metadata.npy")
        self.ids = _bytes(path / "ids.bin")
        self.metadata = _bytes(path / "metadata.bin")
        rows = manifest.rows
        if (
            self.labels.shape != (rows,)
            or self.items.shape != (rows + 1,)
            or not len(self.id_ends) == len(self.metadata_ends) == self.items[-1] + 1
        ):
            raise SegmentError("its files do not fit together")
        # One number of a memoryview is read three times faster than one of an array.
        self._items = self.items.data
        self._id_ends = self.id_ends.data
        self._metadata_ends = self.metadata_ends.data
        self._one_each = bool((self.items == np.arange(rows + 1)).all())

    def verify(self) -> None:
        """Waits until the vectors are verified too, which may not be used before.

        Raises:
            SegmentError: they are damaged.
        """
        _wait_for(self._checks)
        self._checks = ()

    def entries(self, row: int, limit: int) -> list[tuple[str, bytes]]:
        """The first items of a row, at most so many: id, and metadata as JSON."""
        start, end = self._items[row], self._items[row + 1]
        ids, id_ends, metadata, ends = self.ids, self._id_ends, self.metadata, self._metadata_ends
        if end - start == 1:
            text = metadata[ends[start] : ends[end]]
            return [(ids[id_ends[start] : id_ends[end]].decode(), text)]
        return [
            (ids[id_ends[place] : id_ends[place + 1]].decode(), metadata[ends[place] : ends[place + 1]])
            for place in range(start, min(end, start + limit))
        ]

    def only_entries(self, rows: list[int], values: list[float]) -> list[tuple[float, str, bytes]]:
        """The items of rows (M,) that have one each, with a value (M,) before each."""
        ids, metadata, id_ends, ends = self.ids, self.metadata, self._id_ends, self._metadata_ends
        if not self._one_each:
            items = self._items
            rows = [items[row] for row in rows]
        return [
            (value, ids[id_ends[place] : id_ends[place + 1]].decode(), metadata[ends[place] : ends[place + 1]])
            for value, place in zip(values, rows, strict=True)
        ]

    def best_entries(self, rows: NDArray[np.int64], values: Float32Array, k: int) -> list[tuple[float, str, bytes]]:
        """The k items with the lowest values of rows (M,) that have one each, ties by id; with their values."""
        found = self.only_entries(rows.tolist(), values.tolist())
        found.sort()
        del found[k:]
        return found


def write_segment(
    folder: Path,
    *,
    index_id: str,
    medium: str,
    dimension: int,
    head: Head,
    total: int,
    source: Source,
    graph: HnswGraph | None,
    report: GraphReport | None,
) -> tuple[Path, Segment]:
    """Writes a segment, whole or not at all. It is mapped before others can see it, and so before they can remove it.

    Args:
        folder: of the index.
        index_id: of the index.
        medium: whose vectors these are.
        dimension: their width.
        head: the commit that the source shows.
        total: of the checksums of the items, as of then.
        source: the rows and items.
        graph: over all of the rows, or None.
        report: on the graph.

    Raises:
        OSError: the disk refuses.
    """
    path = folder / f"segment.{medium}.{head.sequence}.{secrets.token_hex(4)}"
    with atomic_folder(path) as building:
        rows, items = _write_source(building, source, dimension)
        names = list(FILES)
        if graph is not None:
            graph.save(building / GRAPH)
            names.insert(0, GRAPH)
        content = {
            **description(index_id=index_id, medium=medium, dimension=dimension),
            **asdict(head),
            "rows": rows,
            "items": items,
            "total": total,
            "report": asdict(report) if report else None,
            "files": _hashed(building, names),
        }
        (building / MANIFEST).write_text(json.dumps({**content, "checksum": checksum_of(content)}, indent=1))
        segment = Segment(building, manifest_of(content), dimension, graph)
    return path, segment


def candidates(folder: Path, medium: str) -> list[Path]:
    """The segments of a medium, the newest first."""
    return sorted(folder.glob(f"segment.{medium}.*.*"), key=lambda path: (_sequence(path), path.name), reverse=True)


def read_segment(path: Path, *, index_id: str, medium: str, dimension: int) -> Segment:
    """Maps a segment after verifying every byte of it, but for the vectors: see :meth:`Segment.verify`.

    Raises:
        SegmentError: it is damaged, of another version, or of another index.
    """
    manifest = read_manifest(path, index_id=index_id, medium=medium, dimension=dimension)
    # The graph first, for it takes long to load; the others are verified meanwhile, and the vectors in the background.
    names = sorted(manifest.files, key=lambda name: (name == VECTORS, name != GRAPH))
    graph = None
    pool = ThreadPoolExecutor(2)
    try:
        checks = {name: _start_checks(pool, path / name, *manifest.files[name]) for name in names}
        for name in names[:-1]:
            _wait_for(checks[name])
            if name == GRAPH:
                graph = HnswGraph.load(path / GRAPH, dimension=dimension, count=manifest.rows)
        segment = Segment(path, manifest, dimension, graph, checks[VECTORS])
    except BaseException as error:
        pool.shutdown(cancel_futures=True)
        if isinstance(error, OSError | ValueError):
            raise SegmentError(f"it cannot be read ({error})") from error
        raise
    pool.shutdown(wait=False)
    return segment


def remove_abandoned(folder: Path) -> None:
    """Deletes what a killed process left half written, once it is old enough to be nobody's work."""
    for path in folder.glob(".*.partial"):
        with suppress(OSError):
            if path.stat().st_mtime < time.time() - _ABANDONED_SECONDS:
                shutil.rmtree(path)


def remove_others(folder: Path, medium: str, kept: Path, is_wanted: Callable[[Path], bool]) -> None:
    """Deletes the segments of a medium that a new one makes needless.

    Other processes keep the files that they have mapped; on the disk the names go. Several may do this at once.

    Args:
        folder: of the index.
        medium: whose segments.
        kept: the new one.
        is_wanted: whether one with a higher number is of this history, and so a newer one, of another process.
    """
    for path in candidates(folder, medium):
        if path != kept and (_sequence(path) <= _sequence(kept) or not is_wanted(path)):
            shutil.rmtree(path, ignore_errors=True)
    for old in (folder / f"graph.{medium}.hnsw", folder / f"graph.{medium}.json"):  # of format 1
        with suppress(OSError):
            old.unlink(missing_ok=True)


def _sequence(path: Path) -> int:
    try:
        return int(path.name.split(".")[2])
    except (IndexError, ValueError):
        return -1


def _write_source(building: Path, source: Source, dimension: int) -> tuple[int, int]:
    labels = source.labels
    np.save(building / "labels.npy", labels)
    with (building / VECTORS).open("wb") as file:
        _header(file, (len(labels), dimension), np.dtype(np.float32))
        for part in source.vectors():
            file.write(np.ascontiguousarray(part).data)
    counts, id_sizes, metadata_sizes = [], [], []
    with (building / "ids.bin").open("wb") as ids, (building / "metadata.bin").open("wb") as metadata:
        for items, ids_of, id_text, metadata_of, metadata_text in source.entries():
            counts.append(items)
            id_sizes.append(ids_of)
            metadata_sizes.append(metadata_of)
            ids.write(id_text)
            metadata.write(metadata_text)
    for name, sizes in (("items.npy", counts), ("ids.npy", id_sizes), ("metadata.npy", metadata_sizes)):
        ends = np.concatenate([np.zeros(1, dtype=np.int64), *sizes])
        np.cumsum(ends, out=ends)
        np.save(building / name, ends)
    return len(labels), sum(map(len, id_sizes))


def _header(file: BinaryIO, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    npy.write_array_header_1_0(file, {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": shape})


def _array(path: Path) -> NDArray[Any]:
    return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))


def _vectors(path: Path, rows: int, dimension: int) -> Float32Array:
    """Maps the end of the file; its header is not looked at, for it is not verified yet."""
    header = path.stat().st_size - 4 * rows * dimension
    if header < 0:
        raise SegmentError("its files do not fit together")
    return np.asarray(np.memmap(path, np.float32, "r", header, (rows, dimension)))


def _bytes(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _hashed(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    with ThreadPoolExecutor(2) as pool:
        started = {name: ((folder / name).stat().st_size, _pieces(pool, folder / name)) for name in names}
        return {
            name: {"bytes": size, "sha256": [piece.result() for piece in pieces]}
            for name, (size, pieces) in started.items()
        }


def _wait_for(checks: Iterable[Check]) -> None:
    for name, found, expected in checks:
        try:
            right = found.result() == expected
        except OSError as error:
            raise SegmentError(f"{name} cannot be read ({error})") from error
        if not right:
            raise SegmentError(f"{name} is not the one that was written")


def _start_checks(pool: ThreadPoolExecutor, path: Path, written: int, expected: Sequence[str]) -> Sequence[Check]:
    try:
        size = path.stat().st_size
        pieces = _pieces(pool, path)
    except OSError as error:
        raise SegmentError(f"it cannot be read ({error})") from error
    if size != written or len(pieces) != len(expected):
        raise SegmentError(f"{path.name} is not the one that was written: it has {size:,} bytes")
    return [(path.name, piece, right) for piece, right in zip(pieces, expected, strict=True)]


def _pieces(pool: ThreadPoolExecutor, path: Path) -> list[Future[str]]:
    return [pool.submit(_sha256, path, start) for start in range(0, max(1, path.stat().st_size), _PIECE)]


def _sha256(path: Path, start: int) -> str:
    """Of a piece of a file, read and not mapped: mapped pages would count as memory of the process."""
    found = hashlib.sha256()
    buffer = memoryview(bytearray(_BUFFER))
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        rest = _PIECE
        while rest and (size := file.readinto(buffer[: min(rest, _BUFFER)])):
            found.update(buffer[:size])
            rest -= size
    return found.hexdigest()
