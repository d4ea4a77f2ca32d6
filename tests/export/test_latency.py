"""Times come from real calls, on batches of the right size."""

import time

import numpy as np
import pytest

from dckt_export.latency import BATCHES, LEAST_RUNS, Latency, measure_latency, pairs_per_second


class Sleeper:
    """An encoder that notes its batches, and waits as long as it is told."""

    def __init__(self, *waits):
        self.batches, self.waits = [], list(waits)

    def run(self, batch):
        self.batches.append(batch)
        time.sleep(self.waits.pop(0) if self.waits else 0)


def test_every_batch_size_is_warmed_up_and_timed():
    encoder = Sleeper()
    rows = np.arange(10)[:, None]
    found = measure_latency(encoder, rows, seconds=0)
    assert {size: one.runs for size, one in found.items()} == dict.fromkeys(BATCHES, LEAST_RUNS)
    assert [len(batch) for batch in encoder.batches] == [size for size in BATCHES for _ in range(LEAST_RUNS + 1)]
    assert encoder.batches[-1][:, 0].tolist() == [*range(10), *range(10), *range(10), 0, 1]


def test_the_median_and_the_longest_of_few():
    encoder = Sleeper(9e-2, 1e-3, 6e-2, 2e-2)  # the first warms up
    (found,) = measure_latency(encoder, np.zeros((1, 1)), seconds=0, batches=[1]).values()
    assert 2e-2 <= found.p50 < found.p95
    assert found.p95 >= 6e-2


def test_more_time_gives_more_runs():
    few, many = (measure_latency(Sleeper(), np.zeros((1, 1)), seconds=s, batches=[1])[1].runs for s in (0, 10))
    assert few == LEAST_RUNS
    assert many == 200


def test_pairs_per_second_adds_the_media_at_the_largest_batch():
    def latencies(seconds):
        return {1: Latency(p50=99, p95=99, runs=3), 32: Latency(p50=seconds, p95=99, runs=3)}

    assert pairs_per_second({"image": latencies(3), "text": latencies(1)}) == pytest.approx(8)
