"""`dckt-train sweep`: settings times seeds, and one table of them."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from dckt.errors import ConfigError, RunError
from dckt_trainer.commands.options import BadPairs, Cache, Device, read_bad_pairs
from dckt_trainer.progress import Bars
from dckt_trainer.sweep import grid_sweep, read_sweep, sweep_names

EXAMPLES = """
Examples:

  dckt-train sweep table3 --source big --target mine --overlap car,dog --out sweeps/table3

  dckt-train sweep figure4 --source big --target mine --preset small --seeds 3 --jobs 2 --out sweeps/figure4

  dckt-train sweep --grid transfer.alpha=0.1,0.2,0.4 --grid transfer.law=paper,all --source big --target mine --out s

The same command goes on with a sweep that was stopped, tries failed runs again, and adds rows and seeds that are new.
"""


def sweep_command(
    target: Annotated[Path, typer.Option(help="Corpus to search; {seed} in it stands for the seed.")],
    out: Annotated[Path, typer.Option(help="Folder of the sweep, new or its own.")],
    name: Annotated[
        str | None, typer.Argument(metavar="[SWEEP]", help=f"One of {', '.join(sweep_names())}, or a TOML file.")
    ] = None,
    source: Annotated[
        Path | None, typer.Option(help="Corpus to take knowledge from; likewise. Without one, the target alone.")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="What the rows change; the sweep's own unless given.")] = None,
    seeds: Annotated[int | None, typer.Option(help="Runs of each row; the sweep's own number unless given.")] = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Setting of all rows; repeatable.")
    ] = None,
    grid: Annotated[
        list[str] | None,
        typer.Option(metavar="SECTION.KEY=VALUE,VALUE", help="Instead of a SWEEP: every combination; repeatable."),
    ] = None,
    overlap: Annotated[
        str, typer.Option(metavar="LABEL,LABEL", help="Labels of the source that the target has too, for table3.")
    ] = "",
    jobs: Annotated[int, typer.Option(help="Runs side by side, each in a process of its own.")] = 1,
    keep_models: Annotated[
        bool, typer.Option("--keep-models", help="Keep models and checkpoints, not figures and reports alone.")
    ] = False,
    device: Device = "auto",
    cache: Cache = None,
    on_bad_pair: BadPairs = "raise",
) -> None:
    """Trains several settings over several seeds, and compares them in one table."""
    if (name is None) == (not grid):
        raise ConfigError(f"give either a sweep ({', '.join(sweep_names())}, or a TOML file) or --grid")
    bad_pairs = read_bad_pairs(on_bad_pair)
    labels = [label.strip() for label in overlap.split(",") if label.strip()]
    if grid and labels:
        raise ConfigError("--overlap is for a SWEEP with a row that asks for it; with --grid use --set source.exclude")
    sweep = grid_sweep(grid) if grid else read_sweep(str(name), overlap=labels)
    # PyTorch takes seconds to load; --help does not need it.
    from dckt_trainer.sweep_jobs import Options
    from dckt_trainer.sweep_run import run_sweep
    from dckt_trainer.sweep_table import COLUMNS, write_table

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the processes of --jobs are ended, not left alone
    result = run_sweep(
        sweep,
        source,
        target,
        out,
        preset=preset,
        changes=changes or [],
        seeds=seeds,
        processes=jobs,
        keep_models=keep_models,
        options=Options(device, cache, bad_pairs),
        reporter=Bars(),
    )
    lines = write_table(result)
    console = Console()
    # Three columns fit into 80 characters; the rest is in the files.
    table = Table(title=f"{sweep.name}, test MAP", caption="difference to the first row, with its 95 % interval")
    table.add_column("row", overflow="fold")
    for column in COLUMNS[2:4]:
        table.add_column(column, justify="right", no_wrap=True)
    for line in lines:
        table.add_row(line.row.title, *line.cells[2:4])
    console.print(table)
    for file in ("report.html", "table.md", "table.csv"):
        console.print(str(out / file), soft_wrap=True, highlight=False)
    if result.failures:
        raise RunError(
            f"{len(result.failures)} runs failed, and the table lacks them:\n"
            + "\n".join(f"  {path}: {why}" for path, why in result.failures.items())
            + "\nThe same command tries them again."
        )
