"""`dckt-train import`: a published corpus becomes a corpus folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

import typer

from dckt_trainer.commands.options import BadPairs
from dckt_trainer.data.adapters import FORMATS, Format, import_corpus
from dckt_trainer.data.corpus import OnBadPair
from dckt_trainer.progress import Bars, counted

EXAMPLE = """
Examples:

  dckt-train import wikipedia wikipedia_dataset --out wikipedia

  dckt-train import nus-wide-10k NUS-WIDE --out nus --concepts sky,water
"""


def import_command(
    format: Annotated[str, typer.Argument(metavar="FORMAT", help=f"One of {', '.join(FORMATS)}.")],  # noqa: A002
    folder: Annotated[Path, typer.Argument(help="The corpus as its publisher ships it; it is only read.")],
    out: Annotated[Path, typer.Option(help="Corpus folder to write.")],
    seed: Annotated[int, typer.Option(help="Draws what the publisher does not fix, such as val and test.")] = 0,
    copy: Annotated[
        bool, typer.Option("--copy", help="Copy the pictures. Unless given, they are hard-linked where that works.")
    ] = False,
    on_bad_pair: BadPairs = "raise",
    concepts: Annotated[
        str | None, typer.Option(help="For nus-wide-10k: other classes, joined by commas, like sky,water.")
    ] = None,
    pairs_per_class: Annotated[
        int | None, typer.Option(help="For nus-wide-10k: pairs of each class. Unless given, 1000.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a corpus that is there.")] = False,
) -> None:
    """Writes a published corpus as a corpus folder, and says what it holds and what was left out."""
    with counted(Bars(), "pictures") as progress:
        imported = import_corpus(
            cast(Format, format),  # checked there
            folder,
            out,
            seed=seed,
            link=not copy,
            on_bad_pair=cast(OnBadPair, on_bad_pair),
            concepts=None if concepts is None else [name.strip() for name in concepts.split(",")],
            pairs_per_class=pairs_per_class,
            force=force,
            progress=progress,
        )
    splits = ", ".join(f"{split} {count}" for split, count in imported.splits.items())
    typer.echo(f"{out}: {imported.pairs} pairs of {len(imported.labels)} classes ({splits})")
    for reason, count in imported.left_out.items():
        typer.echo(f"left out: {count} ({reason})")
    for decision in imported.decisions:
        typer.echo(f"note: {decision}")
