"""How a long work tells how far it is: a protocol, a silent form for programs, and a form for people.

People with a terminal see a bar with ETA, and the figures of the training beside it; a log file gets plain lines.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Protocol

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

NAME_WIDTH = 28  # leaves a bar of some length in 80 columns
LINE_EVERY = 60.0  # seconds between two lines about the same work, where there is no terminal


class Advance(Protocol):
    """What a piece of work calls when some of its units are done."""

    def __call__(self, count: int, figures: Mapping[str, float] | None = None) -> None:
        """Tells of ``count`` more units, and of figures as they are now, such as the loss; None leaves those shown."""
        ...


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
        yield lambda count, figures=None: None

    def say(self, text: str) -> None:
        """Does nothing."""
        del text


class Bars:
    """Progress for people, on standard error, so that results can be piped.

    On a terminal each piece of work is a bar with ETA, its figures below. Elsewhere, as in the log of a batch job, it
    is one line at its end, and before that one every :data:`LINE_EVERY` seconds, without control characters.

    Args:
        console: where to write.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)

    def task(self, name: str, total: int) -> AbstractContextManager[Advance]:
        """Shows how far the work is until the block ends; the last state stays."""
        return self._bar(name, total) if self.console.is_terminal else self._lines(name, total)

    def say(self, text: str) -> None:
        """Prints the line."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=not self.console.is_terminal)

    @contextmanager
    def _bar(self, name: str, total: int) -> Iterator[Advance]:
        columns = (
            TextColumn(
                "{task.description}",
                markup=False,
                table_column=Column(width=NAME_WIDTH, no_wrap=True, overflow="ellipsis"),
            ),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with _BarAndFigures(*columns, console=self.console) as progress:
            task = progress.add_task(name, total=total, figures="")

            def advance(count: int, figures: Mapping[str, float] | None = None) -> None:
                if figures is None:
                    progress.advance(task, count)
                else:
                    progress.update(task, advance=count, figures=_words(figures))

            yield advance

    @contextmanager
    def _lines(self, name: str, total: int) -> Iterator[Advance]:
        start = told = time.monotonic()
        done, latest = 0, ""

        def line(now: float) -> None:
            parts = [f"{name}: {done} of {total}, {_clock(now - start)}"]
            if 0 < done < total:
                parts.append(f"about {_clock((now - start) / done * (total - done))} left")
            self.say(", ".join([*parts, *([latest] if latest else [])]))

        def advance(count: int, figures: Mapping[str, float] | None = None) -> None:
            nonlocal done, latest, told
            done += count
            latest = latest if figures is None else _words(figures)
            now = time.monotonic()
            if now - told >= LINE_EVERY and done < total:
                told = now
                line(now)

        try:
            yield advance
        finally:
            line(time.monotonic())


class _BarAndFigures(Progress):
    """Figures stand below their bar: beside it there is no room for both in 80 columns."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        for task in self.tasks:
            if task.fields["figures"]:
                yield Text(f"  {task.fields['figures']}", style="dim", no_wrap=True, overflow="ellipsis")


def _words(figures: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in figures.items())


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


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
