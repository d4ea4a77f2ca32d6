"""How a long work tells how far it is: a protocol, a silent form for programs, and a bar with ETA for people."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Advance = Callable[[int], None]


class Reporter(Protocol):
    """What a training tells its caller while it works."""

    def task(self, name: str, total: int) -> AbstractContextManager[Advance]:
        """Opens a piece of work of ``total`` units; the function it yields is told of units done."""
        ...

    def say(self, text: str) -> None:
        """A line that stays."""
        ...


class Silent:
    """Tells nothing."""

    @contextmanager
    def task(self, name: str, total: int) -> Iterator[Advance]:
        """Yields a function that does nothing."""
        del name, total
        yield lambda count: None

    def say(self, text: str) -> None:
        """Does nothing."""
        del text


class Bars:
    """A bar with ETA for each piece of work, on standard error, so that results can be piped."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)

    @contextmanager
    def task(self, name: str, total: int) -> Iterator[Advance]:
        """Shows a bar until the block ends, then one line with the time it took."""
        columns = (
            TextColumn("{task.description:<34}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console) as progress:
            task = progress.add_task(name, total=total)

            def advance(count: int) -> None:
                progress.advance(task, count)

            yield advance

    def say(self, text: str) -> None:
        """Prints the line."""
        self.console.print(text, highlight=False, markup=False)


@contextmanager
def counted(reporter: Reporter, name: str) -> Iterator[Callable[[int, int], None]]:
    """A task for work that says (done, total): it opens with the first word of the total."""
    with ExitStack() as stack:
        advance: Advance | None = None
        before = 0

        def progress(done: int, total: int) -> None:
            nonlocal advance, before
            if advance is None:
                advance = stack.enter_context(reporter.task(name, total))
            advance(done - before)
            before = done

        yield progress
