"""A readers-writer lock: searches run side by side, a change runs alone."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager


class ReadersWriterLock:
    """Many readers or one writer, and nobody starves.

    A new reader waits for the writers that wait already, a writer for the readers that waited for the one before it,
    and writers take turns in the order in which they came. Neither side may be taken again by a thread that holds
    either.
    """

    def __init__(self) -> None:
        # Readers take the lock itself: through the condition it would cost them twice as much.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._readers = 0
        self._writing = False
        self._queue: deque[object] = deque()  # of writers
        self._turns = 0  # that writers had
        self._waiting = 0  # readers
        self._next = 0  # readers that go before the next writer
        self._shared = _Shared(self)

    def shared(self) -> _Shared:
        """For reading."""
        return self._shared

    def enter_shared(self) -> None:
        """Begins to read; see :meth:`shared`."""
        with self._lock:
            if self._writing or self._queue:
                self._wait_to_read()
            self._readers += 1

    def _wait_to_read(self) -> None:
        turn = self._turns
        self._waiting += 1
        try:
            while self._writing or (self._queue and self._turns == turn):
                self._changed.wait()
        except BaseException:
            self._changed.notify_all()
            raise
        finally:
            self._waiting -= 1
            self._next -= self._turns != turn

    def leave_shared(self) -> None:
        """Ends it."""
        with self._lock:
            self._readers -= 1
            if not self._readers and self._queue:
                self._changed.notify_all()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """For changing."""
        turn = object()
        with self._changed:
            self._queue.append(turn)
            try:
                while self._writing or self._readers or self._next or self._queue[0] is not turn:
                    self._changed.wait()
                self._writing = True
            except BaseException:
                self._changed.notify_all()
                raise
            finally:
                self._queue.remove(turn)
        try:
            yield
        finally:
            with self._changed:
                self._writing = False
                self._turns += 1
                self._next = self._waiting
                self._changed.notify_all()


class _Shared:
    """The reading side in a ``with`` statement; a generator would cost a search a microsecond more."""

    def __init__(self, lock: ReadersWriterLock) -> None:
        self._lock = lock

    def __enter__(self) -> None:
        self._lock.enter_shared()

    def __exit__(self, *_: object) -> None:
        self._lock.leave_shared()
