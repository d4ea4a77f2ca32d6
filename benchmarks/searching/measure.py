"""Recall and ratios: what is right, how long a call takes, and how two contenders compare.

Shape letters: N items, Q queries, D width.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from searching.data import Rows

# Two float32 products of the same unit vectors differ by about this much. An item this near to the k-th is as good.
TOLERANCE = 1e-6
_CHUNK = 64


@dataclass(frozen=True)
class Truth:
    """What exact search knows of a set.

    Attributes:
        items: (N, D).
        queries: (Q, D).
        k: how many neighbours count.
        floors: (Q,) float64, the similarity of the k-th best item.
    """

    items: Rows
    queries: Rows
    k: int
    floors: NDArray[np.float64]

    @classmethod
    def of(cls, items: Rows, queries: Rows, ks: Sequence[int]) -> dict[int, Truth]:
        """By k, from one pass over all products in float64."""
        wide = items.astype(np.float64).T
        places = [len(items) - min(k, len(items)) for k in ks]
        floors = np.concatenate(
            [
                np.partition(queries[start : start + _CHUNK].astype(np.float64) @ wide, places, axis=1)[:, places]
                for start in range(0, len(queries), _CHUNK)
            ]
        )
        return {k: cls(items, queries, k, floors[:, column]) for column, k in enumerate(ks)}

    def recall(self, answers: Sequence[Sequence[int]], *, tolerance: float = TOLERANCE) -> float:
        """The share of the k neighbours that were found, ties counted as what they are: equally good.

        Args:
            answers: rows of the items that each of the Q queries was given, of which the first k count. One that is
                missing, given twice or no item is not found.
            tolerance: how far below the k-th similarity an item is still as good.
        """
        if len(answers) != len(self.queries):
            raise ValueError(f"{len(answers)} answers for {len(self.queries)} queries")
        found = 0
        for query, floor, answer in zip(self.queries, self.floors, answers, strict=True):
            rows = np.unique(np.asarray(answer, dtype=np.int64)[: self.k])
            rows = rows[(rows >= 0) & (rows < len(self.items))]
            scores = self.items[rows].astype(np.float64) @ query.astype(np.float64)
            found += int((scores >= floor - tolerance).sum())
        return found / (len(self.queries) * min(self.k, len(self.items)))


@dataclass(frozen=True)
class Spread:
    """A median and what half of the turns lay between."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of one value or more."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)

    def show(self, pattern: str = "{:.2f}") -> str:
        """As text: median (low–high)."""
        return f"{pattern.format(self.median)} ({pattern.format(self.low)}–{pattern.format(self.high)})"


@dataclass(frozen=True)
class Times:
    """Seconds of single calls.

    Attributes:
        turns: (T, B) float64: B calls in each of T turns.
    """

    turns: NDArray[np.float64]

    @property
    def median(self) -> float:
        """Of all calls of all turns."""
        return float(np.median(self.turns))

    @property
    def p99(self) -> float:
        """What 99 of 100 calls stay below."""
        return float(np.percentile(self.turns, 99))

    def times(self, base: Times) -> Spread:
        """How many times as long as another takes, turn by turn."""
        return Spread.of((self._medians / base._medians).tolist())

    def over(self, base: Times) -> Spread:
        """How many seconds longer than another, turn by turn."""
        return Spread.of((self._medians - base._medians).tolist())

    @property
    def _medians(self) -> NDArray[np.float64]:
        return np.median(self.turns, axis=1)


@dataclass(frozen=True)
class Timed(Times):
    """The same calls by the clock, and by the work of the processor, which neighbours on a busy machine do not touch.

    Attributes:
        cpu: CPU seconds of the process.
    """

    cpu: Times


def take_turns(
    contenders: Mapping[str, Callable[[int], object]], calls: int, *, turns: int, block: int
) -> dict[str, Timed]:
    """Times contenders one after the other, again and again, so that what else the machine does falls on all.

    Args:
        contenders: by name, each a function of the number of a call, below ``calls``.
        calls: how many different calls there are.
        turns: how often each has its turn; one more warms up.
        block: calls in a turn. The first of a turn finds the caches as the one before left them; it is made twice, and
            only the second counts.
    """
    measured: dict[str, list[list[tuple[float, float]]]] = {name: [] for name in contenders}
    for turn in range(turns + 1):
        numbers = [number % calls for number in range(turn * block, (turn + 1) * block)]
        for name, call in contenders.items():
            call(numbers[0])
            own = [_timed(call, number) for number in numbers]
            if turn:
                measured[name].append(own)
    found = {}
    for name, own_turns in measured.items():
        both = np.array(own_turns)
        found[name] = Timed(both[:, :, 0], Times(both[:, :, 1]))
    return found


def _timed(call: Callable[[int], object], number: int) -> tuple[float, float]:
    work = time.process_time()
    start = time.perf_counter()
    call(number)
    taken = time.perf_counter() - start
    return taken, time.process_time() - work


def storm(call: Callable[[int], object], callers: int, calls: int) -> tuple[float, NDArray[np.float64]]:
    """Threads that start together and each call again and again: seconds in all, and of each call.

    Raises:
        Exception: the first that a call raised.
    """
    barrier = threading.Barrier(callers + 1)
    seconds = np.zeros((callers, calls))
    errors: list[Exception] = []

    def run(caller: int) -> None:
        barrier.wait()
        try:
            for number in range(calls):
                start = time.perf_counter()
                call(caller * calls + number)
                seconds[caller, number] = time.perf_counter() - start
        except Exception as error:  # noqa: BLE001 - raised below, in the thread that waits
            errors.append(error)

    threads = [threading.Thread(target=run, args=(caller,)) for caller in range(callers)]
    for thread in threads:
        thread.start()
    start = time.perf_counter()
    barrier.wait()
    for thread in threads:
        thread.join()
    taken = time.perf_counter() - start
    if errors:
        raise errors[0]
    return taken, seconds.ravel()


def smallest_effort(recall: Callable[[int], float], efforts: Sequence[int], target: float) -> tuple[int, float]:
    """The smallest effort that reaches a recall; if none does, the smallest that comes within 0.001 of the best.

    Args:
        recall: of an effort.
        efforts: ascending.
        target: the recall to reach.

    Returns:
        The effort and its recall.
    """
    reached: dict[int, float] = {}
    for effort in efforts:
        reached[effort] = recall(effort)
        if reached[effort] >= target:
            return effort, reached[effort]
    best = max(reached.values())
    return next((effort, own) for effort, own in reached.items() if own >= best - 0.001)
