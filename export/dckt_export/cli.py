"""The command `dckt-export`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer
from rich.console import Console

from dckt.console import run as run_app
from dckt.errors import ConfigError
from dckt_trainer.progress import Bars, Silent

if TYPE_CHECKING:
    from dckt.bundle import Bundle
    from dckt.report import Table
    from dckt_trainer.data.corpus import Split

EXAMPLES = """
Examples:

  dckt-export runs/shop --out shop.dckt

  dckt-export runs/shop --out shop.dckt --fp16 --int8

  dckt-export runs/shop --out shop.dckt --fp16 --tensorrt --profile 1,8,64

  dckt-export runs/shop --out shop-fc9.dckt --representation fc9

  dckt-export runs/shop --out shop.dckt --pairs corpora/shop --split test --force
"""

app = typer.Typer(add_completion=False, rich_markup_mode="rich")


@app.command(epilog=EXAMPLES, no_args_is_help=True)
def export_command(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run, as dckt-train wrote it.")],
    out: Annotated[Path, typer.Option(help="Bundle to write, by custom NAME.dckt.")],
    fp16: Annotated[bool, typer.Option("--fp16", help="Add graphs in float16, for GPUs and TensorRT.")] = False,
    int8: Annotated[bool, typer.Option("--int8", help="Add graphs in 8 bits, for CPUs and GPUs.")] = False,
    tensorrt: Annotated[
        bool,
        typer.Option(
            "--tensorrt/--no-tensorrt",
            help="Build TensorRT engines, which fit this machine's GPU alone. Elsewhere: dckt engine NAME.dckt there.",
        ),
    ] = False,
    profile: Annotated[str, typer.Option(help="Batch sizes MIN,OPT,MAX that an engine is built for.")] = "1,8,32",
    representation: Annotated[
        str | None,
        typer.Option(
            help="What an index stores: probability, as in the paper, or fc9; of a linear model, joined or probability;"
            " if left out, the first.",
            show_default=False,
        ),
    ] = None,
    pairs: Annotated[
        Path | None,
        typer.Option(help="Corpus to compare and calibrate on; without it, the run's target corpus."),
    ] = None,
    split: Annotated[str, typer.Option(help="Part of that corpus to compare on: train, val or test.")] = "val",
    limit: Annotated[int, typer.Option(help="At most so many pairs, spread evenly.")] = 500,
    calibration: Annotated[
        int, typer.Option(help="So many training pairs tell the ranges for float16 and 8 bits.")
    ] = 128,
    thresholds: Annotated[
        Path | None, typer.Option(help="TOML file with other thresholds of the gate; docs/export.md shows one.")
    ] = None,
    seconds: Annotated[float, typer.Option(help="How long to time each batch size of each variant.")] = 1.0,
    opset: Annotated[int, typer.Option(help="Version of the ONNX operators, 18 to 23.")] = 20,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing bundle.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was measured as JSON, no progress.")] = False,
) -> None:
    """Exports a trained run to ONNX, as one bundle that serves without PyTorch.

    Every variant, that is precision and runtime, must rank real pairs as PyTorch does, or it is refused; if float32,
    or a precision that you asked for, is refused, no bundle is written. Where OpenVINO is installed it is tried too.
    """
    # PyTorch takes seconds to load; --help does not need it.
    from dckt_export.export import export_bundle

    bundle = export_bundle(
        run,
        out,
        fp16=fp16,
        int8=int8,
        tensorrt=tensorrt,
        profile=_profile(profile),
        representation=representation,
        pairs=pairs,
        split=cast("Split", split),  # checked where it is used
        limit=limit,
        calibration=calibration,
        thresholds=thresholds,
        seconds=seconds,
        opset=opset,
        force=force,
        reporter=Silent() if as_json else Bars(),
        told=None if as_json else _show,
    )
    manifest = bundle.manifest
    if as_json:
        variants = [variant.name for variant in manifest.variants]
        facts = {"bundle": str(bundle.path), "model_id": manifest.model_id, "variants": variants}
        typer.echo(json.dumps({**facts, "measured": manifest.measured}, indent=1))
        return
    _show_bundle(bundle)


def _profile(text: str) -> tuple[int, int, int]:
    try:
        least, usual, most = map(int, text.split(","))
    except ValueError as error:
        raise ConfigError(f"--profile is {text!r}; expected three batch sizes, such as 1,8,32") from error
    return least, usual, most


def _show(tables: Sequence[Table]) -> None:
    from dckt_export.report import rich_table

    console = Console()
    for table in tables:
        console.print(rich_table(table))


def _show_bundle(bundle: Bundle) -> None:
    manifest = bundle.manifest
    size = sum(entry.size for entry in manifest.files.values()) / 1e6
    best = manifest.variants[0].name
    lines = [
        f"bundle: {bundle.path} ({size:.1f} MB, model {manifest.model_id[:12]}); report: {bundle.path / 'report.html'}",
        f"on a CPU: {best}"
        + (" (pip install 'dckt[openvino]' where it serves)" if best.startswith("openvino") else ""),
        f"next:   dckt index {bundle.path} catalog.index --images DIR --texts FILE",
    ]
    console = Console()
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def main() -> None:
    """Entry point of `dckt-export`."""
    run_app(app, extra="export")
