"""The command `dckt-export`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer
from rich.console import Console
from rich.table import Table

from dckt.console import run as run_app
from dckt_trainer.progress import Bars, Silent

if TYPE_CHECKING:
    from dckt.bundle import Manifest
    from dckt_trainer.data.corpus import Split

EXAMPLES = """
Examples:

  dckt-export runs/shop --out shop.dckt

  dckt-export runs/shop --out shop-fc9.dckt --representation fc9

  dckt-export runs/shop --out shop.dckt --pairs corpora/shop --split test --force
"""

app = typer.Typer(add_completion=False, rich_markup_mode="rich")


@app.command(epilog=EXAMPLES, no_args_is_help=True)
def export_command(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run, as dckt-train wrote it.")],
    out: Annotated[Path, typer.Option(help="Bundle to write, by custom NAME.dckt.")],
    representation: Annotated[
        str, typer.Option(help="What an index stores: probability, as in the paper, or fc9.")
    ] = "probability",
    pairs: Annotated[
        Path | None, typer.Option(help="Corpus to compare the models on; without it, the run's target corpus.")
    ] = None,
    split: Annotated[str, typer.Option(help="Part of that corpus: train, val or test.")] = "val",
    limit: Annotated[int, typer.Option(help="At most so many pairs, spread evenly.")] = 500,
    opset: Annotated[int, typer.Option(help="Version of the ONNX operators, 18 to 23.")] = 20,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing bundle.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was measured as JSON, no progress.")] = False,
) -> None:
    """Exports a trained run to ONNX, as one bundle that serves without PyTorch.

    Nothing is written unless both rank real pairs alike: cosine of each vector >= 0.9999, same MAP to 3 digits.
    """
    # PyTorch takes seconds to load; --help does not need it.
    from dckt_export.export import export_bundle

    bundle = export_bundle(
        run,
        out,
        representation=representation,
        pairs=pairs,
        split=cast("Split", split),  # checked where it is used
        limit=limit,
        opset=opset,
        force=force,
        reporter=Silent() if as_json else Bars(),
    )
    manifest = bundle.manifest
    if as_json:
        facts = {"bundle": str(bundle.path), "model_id": manifest.model_id, "measured": manifest.measured}
        typer.echo(json.dumps(facts, indent=1))
        return
    console = Console()
    for table in _tables(manifest):
        console.print(table)
    size = sum(entry.size for entry in manifest.files.values()) / 1e6
    lines = (
        f"bundle: {bundle.path} ({size:.1f} MB, model {manifest.model_id[:12]})",
        f"next:   dckt index {bundle.path} catalog.index --images DIR --texts FILE",
    )
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def _tables(manifest: Manifest) -> list[Table]:
    pairs, parity = manifest.measured["pairs"], manifest.measured["parity"]
    title = f"ONNX Runtime against PyTorch, {pairs['count']} {pairs['split']} pairs of {pairs['corpus']}"
    vectors = _table(title, ["representation", "medium", "cosine min", "1 %", "median", "largest difference"])
    rankings = _table("", ["representation", "direction", "MAP PyTorch", "MAP ONNX", "change", "top 10 kept"])
    for name, one in parity.items():
        for medium, row in one["media"].items():
            cosines = (f"{row[key]:.7f}" for key in ("cosine_min", "cosine_p1", "cosine_median"))
            vectors.add_row(name, medium, *cosines, f"{row['max_difference']:.1e}")
        for direction, row in one["directions"].items():
            before, after = row["map_torch"], row["map_onnx"]
            rankings.add_row(
                name,
                direction.replace("_", " "),
                f"{before:.4f}",
                f"{after:.4f}",
                f"{after - before:+.1e}",
                f"{row['top10_overlap']:.1%}",
            )
    return [vectors, rankings]


def _table(title: str, columns: list[str]) -> Table:
    table = Table(title=title or None)
    for place, column in enumerate(columns):
        table.add_column(column, justify="left" if place < 2 else "right")
    return table


def main() -> None:
    """Entry point of `dckt-export`."""
    run_app(app, extra="export")
