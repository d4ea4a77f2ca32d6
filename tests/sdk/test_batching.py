"""Sharing calls between threads: who waits, who gets what, and that nobody hangs. No test looks at a clock."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from dckt.batching import Batcher, Batching
from dckt.errors import ConfigError, ItemError, ProviderError

LONG = 60.0  # never waited for: something else must start the batch
PATIENCE = 30.0


class Gate:
    """A function for batches that stops until it is let go, and tells of each batch that comes."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.open = threading.Event()
        self.entered = threading.Semaphore(0)

    def __call__(self, items: Sequence[int]) -> list[int]:
        self.batches.append(list(items))
        self.entered.release()
        assert self.open.wait(PATIENCE)
        return [10 * item for item in items]


@pytest.fixture
def threads():
    with ThreadPoolExecutor(70) as pool:
        yield pool


def gathered(batcher: Batcher[Any, Any], count: int) -> None:
    """Waits until so many callers wait for the next batch."""
    until(lambda: batcher._gathering is not None and len(batcher._gathering.items) == count)


def one_runs(threads: Any, batcher: Batcher[Any, Any], gate: Gate, waiting: int) -> tuple[Any, list[Any]]:
    """A call that has entered the gate, and those of so many callers that wait behind it."""
    first = threads.submit(batcher, 0)
    assert gate.entered.acquire(timeout=PATIENCE)
    others = [threads.submit(batcher, number) for number in range(1, waiting + 1)]
    gathered(batcher, waiting)
    return first, others


def until(reached: Callable[[], bool]) -> None:
    for _ in range(int(PATIENCE / 0.001)):
        if reached():
            return
        threading.Event().wait(0.001)
    pytest.fail("never came to it")


def test_a_lone_caller_goes_at_once():
    assert Batcher(lambda items: [len(items)], Batching(max_wait=LONG))("x") == 1


def test_callers_that_come_while_one_runs_go_together(threads):
    gate = Gate()
    batcher = Batcher(gate, Batching(max_wait=LONG))
    first, others = one_runs(threads, batcher, gate, 8)
    assert gate.batches == [[0]]
    gate.open.set()
    assert first.result(PATIENCE) == 0
    assert [other.result(PATIENCE) for other in others] == [10 * number for number in range(1, 9)]
    assert sorted(map(len, gate.batches)) == [1, 8]


def test_a_full_batch_does_not_wait(threads):
    gate = Gate()
    batcher = Batcher(gate, Batching(max_batch=3, max_wait=LONG))
    calls = [threads.submit(batcher, 0)]
    assert gate.entered.acquire(timeout=PATIENCE)
    calls += [threads.submit(batcher, number) for number in range(1, 4)]
    assert gate.entered.acquire(timeout=PATIENCE)
    assert [len(batch) for batch in gate.batches] == [1, 3], "the second runs beside the first"
    gate.open.set()
    assert sorted(call.result(PATIENCE) for call in calls) == [0, 10, 20, 30]


def test_no_batch_is_larger_than_it_may_be(threads):
    sizes = []

    def run(items):
        sizes.append(len(items))
        return items

    batcher = Batcher(run, Batching(max_batch=4, max_wait=0.01))
    assert list(threads.map(batcher, range(300))) == list(range(300))
    assert sum(sizes) == 300
    assert max(sizes) <= 4


def test_the_wait_is_bounded(threads):
    """The first batch never ends by itself; the second starts all the same."""
    gate = Gate()
    batcher = Batcher(gate, Batching(max_wait=0.001))
    calls = [threads.submit(batcher, 0)]
    assert gate.entered.acquire(timeout=PATIENCE)
    calls.append(threads.submit(batcher, 1))
    assert gate.entered.acquire(timeout=PATIENCE)
    assert gate.batches == [[0], [1]]
    gate.open.set()
    assert [call.result(PATIENCE) for call in calls] == [0, 10]


def test_an_error_reaches_only_the_caller_at_fault(threads):
    gate = Gate()

    def run(items):
        gate(items)
        if "bad" in items:
            raise ItemError("it is bad")
        return items

    batcher = Batcher(run, Batching(max_wait=LONG))
    calls = {"first": threads.submit(batcher, "first")}
    assert gate.entered.acquire(timeout=PATIENCE)
    calls |= {name: threads.submit(batcher, name) for name in ("good", "bad", "other")}
    gathered(batcher, 3)
    gate.open.set()
    with pytest.raises(ItemError, match="it is bad"):
        calls.pop("bad").result(PATIENCE)
    assert {name: call.result(PATIENCE) for name, call in calls.items()} == {name: name for name in calls}
    assert sorted(map(len, gate.batches)) == [1, 1, 1, 1, 3]


def test_a_lone_error_is_not_tried_again():
    seen = []

    def run(items):
        seen.append(items)
        raise ItemError("no")

    with pytest.raises(ItemError):
        Batcher(run, Batching())("x")
    assert len(seen) == 1


def test_an_interrupted_leader_leaves_nobody_waiting(threads):
    gate = Gate()
    led = threading.Event()

    def run(items):
        gate(items)
        if len(items) > 1 and not led.is_set():
            led.set()
            raise KeyboardInterrupt
        return items

    batcher = Batcher(run, Batching(max_wait=LONG))
    first = threads.submit(batcher, 0)
    assert gate.entered.acquire(timeout=PATIENCE)
    others = [threads.submit(batcher, number) for number in (1, 2, 3)]
    gathered(batcher, 3)
    gate.open.set()
    assert first.result(PATIENCE) == 0
    ended = [other.exception(PATIENCE) for other in others]
    assert sum(isinstance(error, KeyboardInterrupt) for error in ended) == 1
    assert sorted(other.result() for other, error in zip(others, ended, strict=True) if error is None) in (
        [1, 2],
        [1, 3],
        [2, 3],
    )
    assert batcher(7) == 7, "it goes on"


def test_closing_ends_every_wait(threads):
    gate = Gate()
    batcher = Batcher(gate, Batching(max_wait=LONG))
    first, others = one_runs(threads, batcher, gate, 4)
    batcher.close()
    for other in others:
        with pytest.raises(ProviderError, match="closed"):
            other.result(PATIENCE)
    gate.open.set()
    assert first.result(PATIENCE) == 0, "what runs goes on"
    with pytest.raises(ProviderError, match="closed"):
        batcher(9)
    assert gate.batches == [[0]]


def test_everybody_gets_the_own_result_under_load(threads):
    batcher = Batcher(lambda items: [item * item for item in items], Batching(max_batch=8, max_wait=0.0005))
    assert list(threads.map(batcher, range(5000))) == [number * number for number in range(5000)]
    assert batcher._running == 0
    assert batcher._gathering is None


@pytest.mark.parametrize(
    "wrong", [{"max_batch": 0}, {"max_batch": 2.5}, {"max_wait": -1}, {"max_wait": float("nan")}, {"max_wait": 61}]
)
def test_settings_that_are_not_offered(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Batching(**wrong)
