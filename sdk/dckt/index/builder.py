"""The thread in which an index builds its graphs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import suppress


class Builder:
    """Does one piece of work after the other, in one thread of its own, which starts with the first.

    The allocator keeps memory apart by thread, and what one gave back is not used by another: graphs that were built by
    whichever thread made a change took more memory with every thread.

    Whoever calls has to see to it that only one thread does at a time; only :meth:`wait` is for all.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="dckt-index")
        self._last: Future[None] | None = None
        self._cancelled = threading.Event()

    @property
    def busy(self) -> bool:
        """Whether there is work that is not done."""
        last = self._last
        return last is not None and not last.done()

    def start(self, work: Callable[[], None]) -> None:
        """Begins a piece of work, after the one before was done; raises what that one raised."""
        self.wait()
        self._cancelled.clear()
        # While the interpreter ends no thread begins anything. Graphs and segments stay as they are then, which loses
        # nothing.
        with suppress(RuntimeError):
            self._last = self._pool.submit(work)

    def run(self, work: Callable[[], None]) -> None:
        """Does a piece of work, and raises what it raises."""
        self.start(work)
        self.wait()

    def wait(self) -> None:
        """Until the work is done, and raises what it raised: once.

        Whoever is interrupted while waiting cancels the work.
        """
        last = self._last
        if last is None:
            return
        try:
            last.result()
        except CancelledError:
            pass  # whoever cancelled it knows
        except BaseException:
            self._cancelled.set()
            raise
        finally:
            if last.done():
                self._last = None

    def check(self) -> None:
        """For the work, now and then.

        Raises:
            CancelledError: nobody waits for it any more.
        """
        if self._cancelled.is_set():
            raise CancelledError

    def close(self) -> None:
        """Ends the thread, after its work."""
        self._pool.shutdown()
