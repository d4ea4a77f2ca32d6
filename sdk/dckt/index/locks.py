"""A readers-writer lock: searches run side by side, a change runs alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class ReadersWriterLock:
    """Many readers or one writer. A waiting writer goes before new readers, so that searches cannot starve it.

    Neither side may be taken again by a thread that holds either.
    """

    def __init__(self) -> None:
        # Readers take the lock itself: through the condition it would cost them twice as much.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._readers = 0
        self._writers_waiting = 0
        self._writing = False
        self._shared = _Shared(self)

    def shared(self) -> _Shared:
        """For reading."""
        return self._shared

    def enter_shared(self) -> None:
        """Begins to read; see :meth:`shared`."""
        with self._lock:
            while self._writing or self._writers_waiting:
                self._changed.wait()
            self._readers += 1

    def leave_shared(self) -> None:
        """Ends it."""
        with self._lock:
            self._readers -= 1
            if not self._readers and self._writers_waiting:
                self._changed.notify_all()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """For changing."""
        with self._changed:
            self._writers_waiting += 1
            try:
                while self._writing or self._readers:
                    self._changed.wait()
                self._writing = True
            finally:
                self._writers_waiting -= 1
        try:
            yield
        finally:
            with self._changed:
                self._writing = False
                self._changed.notify_all()


class _Shared:
    """The reading side in a ``with`` statement; a generator would cost a search a microsecond more."""

    def __init__(self, lock: ReadersWriterLock) -> None:
        self._lock = lock

    def __enter__(self) -> None:
        self._lock.enter_shared()

    def __exit__(self, *_: object) -> None:
        self._lock.leave_shared()
