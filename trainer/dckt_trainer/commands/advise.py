"""`dckt-train advise`: which method to use on the user's own corpora."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from dckt_trainer.commands.options import BadPairs, Cache, Device, read_bad_pairs
from dckt_trainer.progress import Bars, Silent

EXAMPLES = """
Examples:

  dckt-train advise --source big --target mine --out advice

  dckt-train advise --target mine --budget 5m --seeds 3 --out advice

  dckt-train advise --source big --target mine --set image.weights=net.safetensors --out advice

The same command goes on with an advice that was stopped, and with a larger --budget tries what was left out.

Test pairs are not read; the command that the advice ends with tests what it trains.
"""


def advise_command(
    target: Annotated[Path, typer.Option(help="Corpus of the collection to search.")],
    source: Annotated[
        Path | None, typer.Option(help="Corpus that knowledge may be taken from. Without one, what needs none.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the advice, new or its own.")] = Path("advice"),
    budget: Annotated[str, typer.Option(help="Time for all calls with this --out together: 90s, 20m, 1h30m.")] = "20m",
    seeds: Annotated[int, typer.Option(help="How often each candidate is trained.")] = 1,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Setting of all candidates; repeatable."),
    ] = None,
    device: Device = "auto",
    cache: Cache = None,
    on_bad_pair: BadPairs = "raise",
    as_json: Annotated[bool, typer.Option("--json", help="Print the advice as JSON, no progress.")] = False,
) -> None:
    """Trains what is quick to train on your corpora, and says which method to use and what the source brings."""
    from dckt_trainer.advice.words import COLUMNS, NOTE, paragraphs, record, rows, seconds_of

    seconds = seconds_of(budget)
    bad_pairs = read_bad_pairs(on_bad_pair)
    # PyTorch takes seconds to load; --help does not need it.
    from dckt_trainer.advice.run import advise
    from dckt_trainer.sweep_jobs import Options

    advice = advise(
        source,
        target,
        out,
        budget=seconds,
        seeds=seeds,
        changes=changes or [],
        options=Options(device, cache, bad_pairs),
        reporter=Silent() if as_json else Bars(),
    )
    if as_json:
        typer.echo(json.dumps(record(advice), indent=1, ensure_ascii=False))
        return
    console = Console()
    table = Table(title=f"{target.name}, {advice.pairs['val']} validation pairs", caption=NOTE)
    table.add_column("", overflow="fold")
    for column in COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows(advice):
        table.add_row(*row)
    console.print(table)
    for paragraph in paragraphs(advice):
        console.print(f"\n{paragraph}", highlight=False, markup=False)
    console.print("\nTrain and test it with:\n", highlight=False)
    console.print(f"  {shlex.join(advice.command)}", soft_wrap=True, highlight=False, markup=False)
    console.print(f"\n{out / 'advice.md'}\n{out / 'advice.json'}", soft_wrap=True, highlight=False, markup=False)
