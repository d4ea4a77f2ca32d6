"""How long an encoder takes for a batch."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dckt.runtime import Encoder

BATCHES = (1, 8, 32)
LEAST_RUNS, MOST_RUNS = 3, 200


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Seconds for one batch.

    Attributes:
        p50: the median.
        p95: 95 of 100 runs took no longer; of few runs, the longest.
        runs: how many were timed.
    """

    p50: float
    p95: float
    runs: int


def measure_latency(
    encoder: Encoder, rows: NDArray[Any], *, seconds: float, batches: Sequence[int] = BATCHES
) -> dict[int, Latency]:
    """Times an encoder on real inputs, after one run that warms it up.

    Args:
        encoder: what is timed.
        rows: (N, ...) inputs; repeated where a batch needs more.
        seconds: about how long to time each batch size; there are always at least :data:`LEAST_RUNS` runs.
        batches: sizes of batches.
    """
    latencies = {}
    for size in batches:
        batch = rows[np.arange(size) % len(rows)]
        encoder.run(batch)
        taken: list[float] = []
        while len(taken) < LEAST_RUNS or (sum(taken) < seconds and len(taken) < MOST_RUNS):
            start = time.perf_counter()
            encoder.run(batch)
            taken.append(time.perf_counter() - start)
        latencies[size] = Latency(
            p50=float(np.median(taken)), p95=float(np.percentile(taken, 95, method="higher")), runs=len(taken)
        )
    return latencies


def pairs_per_second(latencies: Mapping[str, Mapping[int, Latency]]) -> float:
    """Pairs that are encoded in a second with the largest batches, one item of each medium a pair."""
    return 1 / sum(of[max(of)].p50 / max(of) for of in latencies.values())
