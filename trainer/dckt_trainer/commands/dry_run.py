"""How `dckt-train --dry-run` shows what a training would cost."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from dckt_trainer.estimate import Estimate


def show(estimate: Estimate, *, as_json: bool) -> None:
    """Prints an estimate, as tables or as JSON."""
    if as_json:
        typer.echo(json.dumps(estimate.as_dict(), indent=1))
        return
    console = Console()
    console.print("Everything that a training reads was checked. Nothing was written.", highlight=False)
    table = Table("", "memory", title="Memory at the peak")
    for name, size in estimate.memory.items():
        table.add_row(name, _size(size))
    table.add_section()
    table.add_row("together", _size(sum(estimate.memory.values())))
    table.add_row("free now", _size(estimate.free_memory))
    console.print(table)
    table = Table("", "written", "free there", title="Disk")
    for name, size in estimate.disk.items():
        table.add_row(name, _size(size), _size(estimate.free_disk[name]))
    console.print(table)
    table = Table("", "time", title="Time")
    for name, seconds in estimate.seconds.items():
        more = f", {estimate.pictures} pictures" if name == "image features" else ""
        table.add_row(name + more, "not timed" if seconds is None else _time(seconds))
    console.print(table)
    console.print("Word vectors, Word CNNs and validation come on top.", highlight=False)
    for line in estimate.warnings:
        console.print(f"warning: {line}", highlight=False, markup=False, soft_wrap=True)


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))
