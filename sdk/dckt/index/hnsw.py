"""The only place that touches hnswlib. Closes what its 0.8.0 leaves open.

Shape letters: N vectors, D width, Q queries. hnswlib checks neither widths nor numbers, does not report a failed save,
loads damaged files, forgets its settings, and crashes when it grows during a search. So here every argument is checked
before the call, capacity is reserved before adding, labels are always the caller's, growing and searching exclude each
other, and a file is only handed to it after its checksum matched (:mod:`dckt.index.snapshot`). Vectors are never
removed from a graph: the caller leaves out labels that it no longer knows and builds a new graph when there are many of
them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeAlias

import hnswlib
import numpy as np
from numpy.typing import NDArray

from dckt.errors import ItemError
from dckt.index.exact import similarities
from dckt.index.locks import ReadersWriterLock
from dckt.index.vectors import Float32Array

# Vectors are of length 1, so the inner product is the cosine, and a zero vector cannot hide in a "cosine" space.
SPACE = "ip"
M = 16
EF_CONSTRUCTION = 200
# A search always asks for this many neighbours, so that the answer for a small k is the beginning of that for a larger
# one. At twice as much effort the last of them are nearly as sure as the first.
PAGE = 128
EF_LADDER = (256, 512, 1024, 2048)
RECALL_TARGET = 0.99
_CHUNK = 1024

Labels: TypeAlias = NDArray[np.int64]


class HnswGraph:
    """A graph over unit vectors, each under a label of the caller's. Safe to search from many threads while it grows.

    Args:
        dimension: the width D.
        ef: effort of a search, at least :data:`PAGE`.
        seed: of the order of insertion and of the levels.
    """

    def __init__(self, dimension: int, *, ef: int = EF_LADDER[0], seed: int = 0) -> None:
        self.dimension = dimension
        self._seed = seed
        self._lock = ReadersWriterLock()
        self._index = hnswlib.Index(space=SPACE, dim=dimension)
        self._index.init_index(max_elements=1, M=M, ef_construction=EF_CONSTRUCTION, random_seed=seed)
        self._labels: Labels = np.zeros(0, dtype=np.int64)
        self.ef = ef

    def __len__(self) -> int:
        return len(self._labels)

    @property
    def labels(self) -> Labels:
        """The labels in ascending order, (N,) int64."""
        return self._labels

    @property
    def ef(self) -> int:
        """Effort of every search. hnswlib keeps one value for all threads, so it changes only while none searches."""
        return self._ef

    @ef.setter
    def ef(self, value: int) -> None:
        if value < PAGE:
            raise ItemError(f"ef is {value}; expected at least {PAGE}, the number of neighbours of every search")
        with self._lock.exclusive():
            self._ef = value
            self._index.set_ef(value)

    def add(self, labels: Labels, vectors: Float32Array, *, threads: int | None = None) -> None:
        """Adds unit vectors, in a shuffled order: sorted by class, the graph would fall apart.

        Args:
            labels: (N,) int64, none negative, none in the graph, none twice.
            vectors: (N, D) float32 of length 1.
            threads: how many build; 1 makes the graph the same byte for byte in every run, None uses every core.

        Raises:
            ItemError: labels or vectors are not as described; nothing is added.
        """
        vectors = self._checked(vectors)
        merged = np.concatenate([self._labels, labels.astype(np.int64)])
        merged.sort()
        if labels.shape != (len(vectors),) or (len(merged) and merged[0] < 0) or np.any(np.diff(merged) == 0):
            raise ItemError(f"expected {len(vectors)} labels, none negative, each new and given once")
        with self._lock.exclusive():
            if len(merged) > self._index.get_max_elements():
                self._index.resize_index(max(len(merged), 2 * len(self._labels)))
        order = np.random.default_rng(self._seed).permutation(len(labels))
        for start in range(0, len(order), _CHUNK):
            rows = order[start : start + _CHUNK]
            with self._lock.exclusive():
                self._index.add_items(vectors[rows], labels[rows], num_threads=threads or -1)
        self._labels = merged

    def nearest(self, queries: Float32Array, *, threads: int = 1) -> Labels | None:
        """Labels of about the nearest min(PAGE, N) vectors of every query, (Q, min(PAGE, N)), nearest first.

        Returns:
            None when the graph cannot reach that many; the caller then searches exactly.

        Raises:
            ItemError: the queries are not (Q, D) float32, finite.
        """
        queries = self._checked(queries)
        with self._lock.shared():
            # Clamped under the lock to what is really in the graph: more would raise and leak.
            count = min(PAGE, int(self._index.element_count))
            if not count or not len(queries):
                return np.zeros((len(queries), count), dtype=np.int64)
            try:
                labels, _ = self._index.knn_query(queries, k=count, num_threads=threads)
            except RuntimeError:  # "Cannot return the results in a contiguous 2D array": the graph is not connected
                return None
        return np.asarray(labels).astype(np.int64)

    def vectors(self, labels: Labels) -> Float32Array:
        """The stored vectors of some labels, (N, D) float32."""
        with self._lock.shared():
            return np.asarray(self._index.get_items(labels), dtype=np.float32).reshape(-1, self.dimension)

    def tune(self, labels: Labels, matrix: Float32Array, *, queries: int = 200) -> float:
        """Raises ef until recall@10 against exact search reaches :data:`RECALL_TARGET`; returns the recall reached.

        Args:
            labels: (N,) ascending, those that count.
            matrix: (N, D) their vectors.
            queries: how many of the vectors, disturbed, are the queries.
        """
        sample = disturbed_sample(matrix, queries, self._seed)
        floors = tenth_best(matrix, sample)
        recall = 0.0
        for ef in EF_LADDER:
            self.ef = ef
            recall = self._recall(labels, matrix, sample, floors)
            if recall >= RECALL_TARGET:
                break
        return recall

    def save(self, path: Path) -> None:
        """Writes the graph and reads it back.

        Raises:
            OSError: what is on the disk is not the whole graph.
        """
        with self._lock.shared():
            self._index.save_index(str(path))
            expected = int(self._index.index_file_size())
        # hnswlib says nothing about a missing folder or a full disk.
        written = path.stat().st_size
        if written != expected:
            raise OSError(f"{path}: {written:,} of {expected:,} bytes were written; is the disk full?")
        reopened = HnswGraph.load(path, dimension=self.dimension, ef=self.ef)
        if not np.array_equal(reopened.labels, self.labels):
            raise OSError(f"{path}: the graph that was written does not hold the labels that it should")

    @classmethod
    def load(cls, path: Path, *, dimension: int, ef: int, seed: int = 0) -> HnswGraph:
        """Reads a graph whose checksum has been verified; hnswlib crashes on damaged ones.

        Raises:
            OSError: the file cannot be read as a graph.
        """
        graph = cls(dimension, seed=seed)
        graph._index = hnswlib.Index(space=SPACE, dim=dimension)
        try:
            graph._index.load_index(str(path))
        except (RuntimeError, MemoryError) as error:
            raise OSError(f"{path}: hnswlib cannot read it ({error})") from error
        graph._labels = np.sort(np.asarray(graph._index.get_ids_list(), dtype=np.int64))
        graph.ef = ef
        return graph

    def _checked(self, vectors: Float32Array) -> Float32Array:
        if vectors.dtype != np.float32 or vectors.ndim != 2 or vectors.shape[1] != self.dimension:
            raise ItemError(
                f"vectors are {vectors.dtype} of shape {vectors.shape}; expected float32 (N, {self.dimension})"
            )
        if not np.isfinite(vectors).all():
            rows = np.flatnonzero(~np.isfinite(vectors).all(axis=1))[:10].tolist()
            raise ItemError(f"vectors hold numbers that are not finite, in rows {rows}")
        return np.ascontiguousarray(vectors)

    def _recall(self, labels: Labels, matrix: Float32Array, queries: Float32Array, floors: Float32Array) -> float:
        pages = self.nearest(queries)
        if pages is None:
            return 0.0
        found = 0
        for page, query, floor in zip(pages, queries, floors, strict=True):
            rows = np.searchsorted(labels, page[np.isin(page, labels)][:10])
            # A neighbour as near as the tenth is as good as the tenth.
            found += int((similarities(matrix[rows], query) >= floor - 1e-6).sum())
        return found / (len(queries) * min(10, len(matrix)))


def disturbed_sample(matrix: Float32Array, count: int, seed: int) -> Float32Array:
    """Up to ``count`` rows, each moved by noise of length 0 to 0.5 and scaled back to length 1: (min(count, N), D)."""
    generator = np.random.default_rng(seed)
    rows = generator.permutation(len(matrix))[:count]
    noise = generator.normal(size=(len(rows), matrix.shape[1]))
    noise *= generator.uniform(0, 0.5, (len(rows), 1)) / np.linalg.norm(noise, axis=1, keepdims=True)
    moved = matrix[rows].astype(np.float64) + noise
    return np.ascontiguousarray(moved / np.linalg.norm(moved, axis=1, keepdims=True), dtype=np.float32)


def tenth_best(matrix: Float32Array, queries: Float32Array) -> Float32Array:
    """The tenth highest similarity of every query with the rows (the lowest, where there are fewer): (Q,) float32."""
    place = max(len(matrix) - 10, 0)
    floors = np.empty(len(queries), dtype=np.float32)
    for start in range(0, len(queries), 16):
        products = queries[start : start + 16] @ matrix.T
        floors[start : start + 16] = np.partition(products, place, axis=1)[:, place]
    return floors
