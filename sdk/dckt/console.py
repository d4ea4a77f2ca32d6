"""What every command of dckt shares: how it ends, and how it prints what it was given.

Errors of ours end it without a traceback and with exit code 2, Ctrl-C with 130.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

import typer
from rich.text import Text

from dckt.errors import DcktError, MissingExtraError

if TYPE_CHECKING:
    from rich.table import Table


_SHORT = 24


def run(app: typer.Typer, *, extra: str = "") -> NoReturn:
    """Runs a command line program and exits.

    A :class:`~dckt.errors.DcktError` is printed to standard error as it is. Typer itself explains a wrong option and
    turns Ctrl-C into exit code 130. Anything else that escapes is a defect of ours and keeps its traceback.

    Args:
        app: the program.
        extra: the optional packages that it needs; a package that is missing is then said, not traced.
    """
    try:
        app()
    except DcktError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201 - this is the command line
        sys.exit(2)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if not extra or missing.startswith("dckt"):
            raise
        print(f"error: {MissingExtraError('this command', extra, missing)}", file=sys.stderr)  # noqa: T201
        sys.exit(2)
    sys.exit(0)


def clean(text: str) -> Text:
    """Text of unknown origin for the terminal: no markup, no control characters."""
    return Text("".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text))


def flat(about: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Names and values of nested mappings, one line each."""
    for key, value in about.items():
        name = f"{prefix}{key}".replace("_", " ")
        if isinstance(value, Mapping):
            yield from flat(value, f"{name} / ")
        elif isinstance(value, list | tuple):
            yield f"{name} ({len(value)})", ", ".join(map(str, value))
        else:
            yield name, shown(value)


def print_json(value: object) -> None:
    """A result for programs, on standard output."""
    typer.echo(json.dumps(value, indent=1))


def say(*parts: str | Text) -> None:
    """A line for people, on standard error, where it is in nobody's way."""
    from rich.console import Console

    Console(stderr=True, highlight=False).print(*parts, markup=False, soft_wrap=True)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]], *, title: str = "") -> None:
    """A table without lines; numbers are to the right, and what is short is not broken."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, title=title or None, title_justify="left", title_style="bold")
    for place, column in enumerate(columns):
        numbers = all(isinstance(row[place], int | float | None) for row in rows)
        short = all(len(shown(row[place])) <= _SHORT for row in rows)
        table.add_column(column, justify="right" if numbers else "left", overflow="fold", no_wrap=short)
    for row in rows:
        table.add_row(*(clean(shown(value)) for value in row))
    Console(highlight=False).print(table)


def facts_table(about: Mapping[str, Any]) -> Table:
    """Names and values, one line each."""
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in flat(about):
        table.add_row(clean(name), clean(value))
    return table


@contextmanager
def progress_bar(name: str, total: int | None = None) -> Iterator[Callable[[int, int | None], None]]:
    """A bar with the time that is left, on standard error; what it gives is called with (done, in all)."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True, highlight=False)) as progress:
        task = progress.add_task(name, total=total)

        def show(done: int, total: int | None) -> None:
            progress.update(task, completed=done, total=total)

        yield show


@contextmanager
def working(on: str) -> Iterator[None]:
    """Shows that something goes on whose end cannot be told, on standard error."""
    from rich.console import Console

    with Console(stderr=True, highlight=False).status(on):
        yield


def shown(value: object) -> str:
    """A single value: six digits of a fraction, a comma for each thousand, a dash for nothing."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return "-" if value is None else str(value)


def size(count: int) -> str:
    """Bytes for people."""
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:,.2f} GB"
