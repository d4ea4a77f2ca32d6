"""How every command of dckt ends: our errors without a traceback, with exit code 2; Ctrl-C with 130."""

from __future__ import annotations

import sys
from typing import NoReturn

import click
import typer

from dckt.errors import DcktError


def run(app: typer.Typer) -> NoReturn:
    """Runs a command line program and exits.

    A :class:`~dckt.errors.DcktError` is printed to standard error as it is; anything else that escapes is a defect of ours
    and keeps its traceback.
    """
    try:
        code = app(standalone_mode=False)
    except DcktError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201 - this is the command line
        sys.exit(2)
    except click.exceptions.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.exceptions.Abort, KeyboardInterrupt):
        print("stopped", file=sys.stderr)  # noqa: T201
        sys.exit(130)
    sys.exit(code or 0)
