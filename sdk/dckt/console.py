"""What every command of dckt shares: how it ends, and how it prints what it was given.

Errors of ours end it without a traceback and with exit code 2, Ctrl-C with 130.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import typer
from rich.text import Text

from dckt.errors import DcktError, MissingExtraError


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


def shown(value: object) -> str:
    """A single value: six digits of a fraction, a comma for each thousand, a dash for nothing."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return "-" if value is None else str(value)
