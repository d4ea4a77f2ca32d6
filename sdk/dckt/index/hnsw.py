"""The only place that touches hnswlib. Closes what its 0.8.0 leaves open.

Shape letters: N vectors, D width, Q queries, E effort. hnswlib checks neither widths nor numbers, does not report a
failed save, loads damaged files, forgets its settings, and crashes when it grows during a search. So here every
argument is checked before the call, capacity is reserved before adding, labels are always the caller's, and a file is
only handed to it after its checksum matched (:mod:`dckt.index.segment`). The caller sees to it that nothing grows
during a search.

Its effort ``ef`` is one value for all threads, but a search never uses less than the number of neighbours that it asks
for. So ``ef`` stays at 1, and the effort of a search is how many neighbours it asks for: any effort, at any time, from
any thread.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import cache
from itertools import accumulate, repeat, takewhile
from pathlib import Path
from typing import TypeAlias

import hnswlib
import numpy as np
from numpy.typing import NDArray

from dckt.errors import ItemError
from dckt.index.graphfile import read_state
from dckt.index.vectors import Float32Array

# Vectors are of length 1, so the inner product is the cosine, and a zero vector cannot hide in a "cosine" space.
SPACE = "ip"
M = 16
EF_CONSTRUCTION = 200
# How many neighbours of a query recall is measured by.
NEIGHBOURS = 10
# Up to 2048, each a sixteenth above the one before: time grows with effort, so at most so much of it is wasted. With
# less than 16, queries unlike a saturated collection found .93 of their neighbours where vectors like it found .998.
EFFORTS = tuple(
    takewhile(lambda effort: effort <= 2048, accumulate(repeat(16), lambda effort, _: effort + max(1, effort // 16)))
)
RECALL_TARGET = 0.99
TUNING_QUERIES = 1000
# Standard errors: of 20 samples with a recall just at the target, one shows a recall that is more of them above it.
_CLEAR = 1.645
# A row that so few others link to may be lost: of 11,560 class probabilities 48 were, and none had more than 1 link.
_HARDLY = 2
# A neighbour that is this little farther than the tenth is as good as the tenth.
_AS_GOOD = 1e-5
_BLOCK = 8192

Rows: TypeAlias = NDArray[np.int64]


class HnswGraph:
    """A graph over unit vectors, each under the number of its row.

    Args:
        dimension: the width D.
        seed: of the order of insertion and of the levels.
    """

    def __init__(self, dimension: int, *, seed: int = 0) -> None:
        self.dimension = dimension
        self._error = distance_error(dimension)
        self._seed = seed
        self._index = hnswlib.Index(space=SPACE, dim=dimension)
        self._index.init_index(max_elements=1, M=M, ef_construction=EF_CONSTRUCTION, random_seed=seed)
        self._index.set_ef(1)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def reserve(self, count: int) -> None:
        """Makes room for so many vectors in all."""
        if count > self._index.get_max_elements():
            self._index.resize_index(count)

    def shuffled(self, count: int) -> Rows:
        """The order in which to add the next ``count`` rows: sorted by class, the graph would fall apart."""
        return self._count + np.random.default_rng(self._seed).permutation(count)

    def add(self, rows: Rows, vectors: Float32Array, *, threads: int | None = None) -> None:
        """Adds unit vectors.

        Args:
            rows: (N,) int64, of the rows that follow those in the graph, in any order; see :meth:`shuffled`.
            vectors: (N, D) float32 of length 1.
            threads: how many build; 1 makes the graph the same byte for byte in every run, None uses every core.

        Raises:
            ItemError: rows or vectors are not as described; nothing is added.
        """
        vectors = self.checked(vectors)
        if rows.shape != (len(vectors),) or (len(rows) and int(rows.min()) < 0) or len(np.unique(rows)) != len(rows):
            raise ItemError(f"expected {len(vectors)} rows, none negative, each given once")
        self.reserve(self._count + len(rows))
        self._index.add_items(vectors, rows, num_threads=threads or -1)
        if self._index.element_count != self._count + len(rows):
            raise ItemError("a row was in the graph already")
        self._count += len(rows)

    def nearest(self, queries: Float32Array, effort: int, *, threads: int = 1) -> tuple[Rows, Float32Array] | None:
        """About the nearest E = min(effort, N) vectors of every query, nearest first.

        Args:
            queries: (Q, D) float32, C-contiguous, finite; the caller has checked them.
            effort: how many, and how hard to look for them.
            threads: how many search.

        Returns:
            Rows (Q, E) and distances (Q, E), 1 less the inner product in float32. None when the graph cannot reach
            that many; the caller then searches exactly.
        """
        # Clamped to what is really in the graph: more would raise and leak.
        count = min(effort, self._count)
        if not count or not len(queries):
            return np.zeros((len(queries), count), dtype=np.int64), np.zeros((len(queries), count), dtype=np.float32)
        try:
            rows, distances = self._index.knn_query(queries, count, threads)
        except RuntimeError:  # "Cannot return the results in a contiguous 2D array": the graph is not connected
            return None
        return rows.view(np.int64), distances

    def hardly_linked(self) -> Rows:
        """The rows that at most two others link to, ascending. A copy of the graph is in memory meanwhile.

        Every row that is added may take the place of a link to another. Among vectors so close that their distances in
        float32 are mere rounding, as near the corners of class probabilities, some rows are left with no way to them;
        all such rows are among these.
        """
        state = self._index.__getstate__()[0]
        count, size, most = (state[key] for key in ("cur_element_count", "size_data_per_element", "max_M0"))
        elements = state["data_level0"][: count * size].reshape(count, size)
        links = elements[:, : 4 + 4 * most].view(np.uint32)
        given = np.arange(most) < (links[:, :1] & 0xFFFF)
        linked = np.bincount(links[:, 1:][given], minlength=count)
        label = state["label_offset"]
        labels = elements[:, label : label + 8].copy().view(np.int64).ravel()
        rows: Rows = np.sort(labels[linked <= _HARDLY])
        return rows

    def missed(
        self,
        rows: Rows,
        vectors: Callable[[Rows], Float32Array],
        effort: int,
        *,
        threads: int = 1,
        check: Callable[[], None] | None = None,
    ) -> tuple[Rows, NDArray[np.bool_]]:
        """Those of some rows that a search for their own vectors does not find, and whether that is the graph's fault.

        It is not when all that was found may be one tie, of which any may have been found.

        Args:
            rows: (M,) in the graph.
            vectors: gives the vectors of rows.
            effort: of the searches.
            threads: how many search.
            check: is called now and then, and may end it with an exception.
        """
        left, faults = [rows[:0]], [np.zeros(0, dtype=np.bool_)]
        waiting = [rows[start : start + _BLOCK] for start in range(0, len(rows), _BLOCK)]
        while waiting:
            if check:
                check()
            part = waiting.pop()
            page = self.nearest(vectors(part), effort, threads=threads)
            if page is None and len(part) > 1:  # a search for one of them reaches too little
                waiting += np.array_split(part, 2)
                continue
            unseen = np.ones(1, dtype=np.bool_) if page is None else (page[0] != part[:, None]).all(axis=1)
            left.append(part[unseen])
            faults.append(unseen[unseen] if page is None else page[1][unseen, -1] > 2 * self._error)
        return np.concatenate(left), np.concatenate(faults)

    def recalls(
        self, queries: Float32Array, floors: Float32Array, effort: int, used: NDArray[np.bool_], threads: int = 1
    ) -> NDArray[np.float64]:
        """Recall@10 of every query at an effort: (Q,).

        Args:
            queries: (Q, D).
            floors: (Q,) each query's tenth highest similarity; what is as near counts.
            effort: of the searches.
            used: (N,) whether a row counts.
            threads: how many search.
        """
        found = self.nearest(queries, effort, threads=threads)
        if found is None:
            return np.zeros(len(queries))
        rows, distances = found
        near = (1 - distances >= floors[:, None] - _AS_GOOD) & used[rows]
        wanted = min(NEIGHBOURS, int(used.sum()))
        shares: NDArray[np.float64] = np.minimum(near.sum(axis=1), wanted) / wanted
        return shares

    def tune(
        self,
        queries: Float32Array,
        floors: Float32Array,
        used: NDArray[np.bool_],
        target: float = RECALL_TARGET,
        known: int | None = None,
        threads: int = 1,
    ) -> tuple[int, float]:
        """The lowest effort that reaches a recall, or the highest that there is; and the recall at it.

        A sample flatters: the lowest effort that reaches the target on it misses the target on another one half of the
        time. So what it shows has to stay clear of the target by its own error: the target is the lower end of its
        one-sided interval of 95 %.

        Args:
            queries: see :meth:`recalls`.
            floors: see :meth:`recalls`.
            used: see :meth:`recalls`.
            target: recall to reach.
            known: an effort that was enough when the graph was smaller; from there on it is looked for, not below.
            threads: how many search.
        """

        @cache
        def recalls(effort: int) -> NDArray[np.float64]:
            return self.recalls(queries, floors, effort, used, threads)

        def at_least(effort: int) -> float:
            shares = recalls(effort)
            return float(shares.mean() - _CLEAR * shares.std() / len(shares) ** 0.5)

        # More effort never finds less, but for a query now and then; and no more is done than to look at all there is.
        efforts = EFFORTS[: bisect_left(EFFORTS, self._count) + 1]
        place, end = bisect_left(efforts, known or 0), len(efforts)
        if known:
            # It is enough more often than not, and little more is nearly always.
            step = 1
            while place < end and at_least(efforts[min(place + step, end) - 1]) < target:
                place, step = place + step, 2 * step
            end = min(place + step - 1, end)
        place = bisect_left(efforts, target, place, end, key=at_least)
        effort = efforts[min(place, len(efforts) - 1)]
        return effort, float(recalls(effort).mean())

    def save(self, path: Path) -> None:
        """Writes the graph.

        Raises:
            OSError: what is on the disk is not the whole graph.
        """
        self._index.save_index(str(path))
        expected = int(self._index.index_file_size())
        # hnswlib says nothing about a missing folder or a full disk.
        written = path.stat().st_size
        if written != expected:
            raise OSError(f"{path}: {written:,} of {expected:,} bytes were written; is the disk full?")

    @classmethod
    def load(cls, path: Path, *, dimension: int, count: int, seed: int = 0) -> HnswGraph:
        """Reads a graph whose checksum has been verified; hnswlib crashes on damaged ones.

        Args:
            path: the file.
            dimension: of its vectors.
            count: how many there must be.
            seed: see the class.

        Raises:
            OSError: the file cannot be read as such a graph.
        """
        graph = cls(dimension, seed=seed)
        graph._index = hnswlib.Index.__new__(hnswlib.Index)
        try:
            graph._index.__setstate__((read_state(path, space=SPACE, dimension=dimension, seed=seed),))
        except (RuntimeError, ValueError, MemoryError) as error:
            raise OSError(f"{path}: hnswlib cannot read it ({error})") from error
        graph._count = int(graph._index.element_count)
        graph._index.set_ef(1)
        if graph._count != count:
            raise OSError(f"{path}: it holds {graph._count:,} vectors, expected {count:,}")
        return graph

    def checked(self, vectors: Float32Array) -> Float32Array:
        """Vectors as hnswlib takes them.

        Raises:
            ItemError: they are not (N, D) float32, finite.
        """
        if vectors.dtype != np.float32 or vectors.ndim != 2 or vectors.shape[1] != self.dimension:
            raise ItemError(
                f"vectors are {vectors.dtype} of shape {vectors.shape}; expected float32 (N, {self.dimension})"
            )
        if not np.isfinite(vectors).all():
            rows = np.flatnonzero(~np.isfinite(vectors).all(axis=1))[:10].tolist()
            raise ItemError(f"vectors hold numbers that are not finite, in rows {rows}")
        return np.ascontiguousarray(vectors)


def distance_error(dimension: int) -> np.float32:
    """How far a distance is from the true one, at four standard deviations of its rounding, in at least four lanes.

    The bound for the worst of all orders would make near ties, of which there are many, ties.
    """
    return np.float32((1 + (dimension / 4) ** 0.5) * 2.0**-24)


def disturbed(vectors: Float32Array, seed: int) -> Float32Array:
    """Unit vectors (N, D), each moved by noise of length 0 to 0.5 and scaled back to length 1."""
    generator = np.random.default_rng(seed)
    noise = generator.normal(size=vectors.shape)
    noise *= generator.uniform(0, 0.5, (len(vectors), 1)) / np.linalg.norm(noise, axis=1, keepdims=True)
    moved = vectors.astype(np.float64) + noise
    return np.ascontiguousarray(moved / np.linalg.norm(moved, axis=1, keepdims=True), dtype=np.float32)


def tenth_best(parts: Sequence[Float32Array], used: NDArray[np.bool_], queries: Float32Array) -> Float32Array:
    """The tenth highest similarity of every query with the rows in use (the lowest, of fewer): (Q,) float32.

    Args:
        parts: the rows, (N, D) in all; one after the other, so that they need not be copied.
        used: (N,) which rows count.
        queries: (Q, D).
    """
    best = np.full((len(queries), 0), -2, dtype=np.float32)
    start = 0
    for matrix in parts:
        for first in range(0, len(matrix), _BLOCK):
            block = matrix[first : first + _BLOCK]
            products = queries @ block.T
            if not used[start : start + len(block)].all():
                products[:, ~used[start : start + len(block)]] = -2
            start += len(block)
            best = _highest(
                np.concatenate([best, products if best.shape[1] < NEIGHBOURS else _above(best, products)], 1)
            )
    best.sort(axis=1)
    place = max(0, best.shape[1] - max(1, int(used.sum())))
    return np.ascontiguousarray(best[:, min(place, best.shape[1] - 1)])


def _highest(numbers: Float32Array) -> Float32Array:
    """The ten highest of each row, or all of fewer, in any order; the others are there to be sorted out quickly."""
    if numbers.shape[1] <= NEIGHBOURS:
        return numbers
    return np.partition(numbers, numbers.shape[1] - NEIGHBOURS, axis=1)[:, -NEIGHBOURS:]


def _above(best: Float32Array, numbers: Float32Array) -> Float32Array:
    """Of each row's numbers (Q, B) those above the lowest of its best, side by side: (Q, W), filled up with -2.

    Few are, once the best of many blocks are known; to look at each number once is much quicker than to partition.
    """
    rows, columns = (numbers > best.min(axis=1, keepdims=True)).nonzero()
    counts = np.bincount(rows, minlength=len(best))
    found = np.full((len(best), int(counts.max(initial=0))), -2, dtype=np.float32)
    found[rows, np.arange(len(rows)) - (counts.cumsum() - counts)[rows]] = numbers[rows, columns]
    return found
