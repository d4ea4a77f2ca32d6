"""The command ``dckt``, put together from :mod:`dckt.commands`."""

from __future__ import annotations

from typing import Annotated

import typer

import dckt
from dckt.commands import (
    calibrate,
    compact,
    delete,
    doctor,
    engine,
    export_items,
    index,
    inspect,
    search,
    tune,
)
from dckt.console import run

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode="rich")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dckt {dckt.__version__}")
        raise typer.Exit


@app.callback()
def dckt_command(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """Searches a collection of pictures and texts with either one."""


app.command("index", epilog=index.EXAMPLES)(index.index_command)
app.command("search", epilog=search.EXAMPLES)(search.search_command)
app.command("inspect", epilog=inspect.EXAMPLES)(inspect.inspect_command)
app.command("doctor", epilog=doctor.EXAMPLES)(doctor.doctor_command)
app.command("tune", epilog=tune.EXAMPLES)(tune.tune_command)
app.command("calibrate", epilog=calibrate.EXAMPLES)(calibrate.calibrate_command)
app.command("export-items", epilog=export_items.EXAMPLES)(export_items.export_items_command)
app.command("delete", epilog=delete.EXAMPLES)(delete.delete_command)
app.command("compact", epilog=compact.EXAMPLES)(compact.compact_command)
app.command("engine", epilog=engine.EXAMPLES)(engine.engine_command)


def main() -> None:
    """Entry point of ``dckt``."""
    run(app)
