"""Concurrent callers share one call of a function that is cheaper for many items at once.

The first caller of a batch leads it, so there is no thread of its own. While a batch runs, the next one gathers; it
starts when that has ended, when it is full, or when its leader has waited long enough, whichever comes first. So a
lone caller never waits, and under load batches grow by themselves.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from dckt.errors import ConfigError, ProviderError

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Batching:
    """How concurrent searches share calls of the model and of the index.

    Attributes:
        max_batch: queries that are encoded and looked up at once.
        max_wait: seconds that a batch waits, at most, for the end of the one that runs; then both run at once. Short
            waits pay where a device serves several batches as quickly as one.
    """

    max_batch: int = 32
    max_wait: float = 1.0

    def __post_init__(self) -> None:
        if type(self.max_batch) is not int or self.max_batch < 1:
            raise ConfigError(f"max_batch is {self.max_batch!r}; expected an integer of at least 1")
        if not 0 <= self.max_wait <= 60:
            raise ConfigError(f"max_wait is {self.max_wait!r} seconds; expected 0 to 60")


@dataclass(eq=False)
class _Batch(Generic[Item, Result]):
    """Items that go together; ``results`` stays None if they could not."""

    items: list[Item] = field(default_factory=list)
    results: Sequence[Result] | None = None
    done: threading.Event = field(default_factory=threading.Event)


class Batcher(Generic[Item, Result]):
    """Calls a function for the items of several threads at once.

    Args:
        run: gives a result for each item, in their order; may be called from several threads at once.
        batching: how many items, and how long to wait for them.
    """

    def __init__(self, run: Callable[[Sequence[Item]], Sequence[Result]], batching: Batching) -> None:
        self._run = run
        self._batching = batching
        self._changed = threading.Condition()
        self._gathering: _Batch[Item, Result] | None = None
        self._running = 0
        self._closed = False

    def __call__(self, item: Item) -> Result:
        """The result of one item.

        If the function refuses a batch, everybody calls it again with the own item alone. So an error reaches only the
        caller whose item it is about.

        Raises:
            ProviderError: closed.
            Exception: whatever the function raises for this item.
        """
        with self._changed:
            self._check_open()
            batch = self._gathering
            leads = batch is None
            if batch is None:
                batch = self._gathering = _Batch()
            place = len(batch.items)
            batch.items.append(item)
            if len(batch.items) == self._batching.max_batch:
                self._gathering = None
                self._changed.notify_all()
        if leads:
            self._lead(batch)
        else:
            batch.done.wait()
        if batch.results is None:
            with self._changed:
                self._check_open()
            return self._run([item])[0]
        return batch.results[place]

    def close(self) -> None:
        """Whoever waits for a batch to start, or comes later, gets an error. What runs goes on."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _lead(self, batch: _Batch[Item, Result]) -> None:
        """Waits until the batch may start, and runs it. However this ends, nobody goes on waiting."""
        started = False
        try:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._closed or not self._running or self._gathering is not batch, self._batching.max_wait
                )
                self._take(batch)
                if self._closed:
                    return
                self._running += 1
                started = True
            if len(batch.items) > 1:
                try:
                    batch.results = self._run(batch.items)
                except Exception:  # noqa: BLE001 - everybody meets the own error when the items are run one by one
                    return
            else:
                batch.results = self._run(batch.items)
        finally:
            with self._changed:
                self._take(batch)  # an interrupt may have come while it gathered
                if started:
                    self._running -= 1
                    self._changed.notify_all()
            batch.done.set()

    def _take(self, batch: _Batch[Item, Result]) -> None:
        """Nobody joins the batch any more."""
        if self._gathering is batch:
            self._gathering = None

    def _check_open(self) -> None:
        if self._closed:
            raise ProviderError("the model is closed; open it again")
