"""How every command of dckt ends: our errors without a traceback, with exit code 2; Ctrl-C with 130."""

from __future__ import annotations

import sys
from typing import NoReturn

import typer

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
