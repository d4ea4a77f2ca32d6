"""The command `dckt-train`: each subcommand is a function of this package that an application can import."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

import dckt
from dckt.console import run as run_app
from dckt.errors import ConfigError
from dckt_trainer.commands import advise, import_corpus, sweep, tensorboard
from dckt_trainer.commands import dry_run as dry_run_command
from dckt_trainer.commands.options import BadPairs, Cache, Device, read_bad_pairs
from dckt_trainer.config import dump_config, load_config, preset_names
from dckt_trainer.memory import keep_freed_memory
from dckt_trainer.progress import Bars, Silent, counted

EXAMPLES = """
Examples:

  dckt-train synthetic corpora

  dckt-train --source big --target mine --preset small --out runs/mine

  dckt-train --source big --target mine --preset small --weights net.safetensors --out run

  dckt-train --source big --target mine --set transfer.alpha=0.4 --width 1024 --out run2

  dckt-train --resume runs/mine
"""

SHOWN_COLUMNS = 6  # what fits into 80 characters

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode="rich")


@app.callback(invoke_without_command=True, epilog=EXAMPLES)
def train_command(
    context: typer.Context,
    source: Annotated[
        Path | None,
        typer.Option(help="Corpus to take knowledge from: a folder with pairs.jsonl, or a .npz file of features."),
    ] = None,
    target: Annotated[
        Path | None, typer.Option(help="Corpus of the collection to search; its labels may differ.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder to write.")] = None,
    preset: Annotated[
        str, typer.Option(help=f"One of {', '.join(preset_names())}, or a TOML file that changes some keys of paper.")
    ] = "paper",
    trunk: Annotated[str | None, typer.Option(help="Image network of torchvision, by name.")] = None,
    weights: Annotated[
        str | None, typer.Option(help="Its weights: torchvision, random, or a .safetensors file.")
    ] = None,
    width: Annotated[int | None, typer.Option(help="Outputs of fc6 to fc9.")] = None,
    rounds: Annotated[int | None, typer.Option(help="Rounds of transfer.")] = None,
    seed: Annotated[int | None, typer.Option(help="Decides every random number of the run.")] = None,
    precision: Annotated[
        str | None, typer.Option(help="Of matrix products: float32, bfloat16, or float16 on a GPU.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Of PyTorch on the CPU; 1 is best beside busy programs.")] = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Any other setting; repeatable.")
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with an interrupted run folder.")] = None,
    pretrained_from: Annotated[
        Path | None,
        typer.Option(
            help="A run whose pretraining is taken over: same corpora, other transfer.*, mmd.* or losses.mmd_*; "
            "on another target, the source's half."
        ),
    ] = None,
    device: Device = "auto",
    cache: Cache = None,
    on_bad_pair: BadPairs = "raise",
    force: Annotated[bool, typer.Option("--force", help="Replace an existing run folder.")] = False,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Write curves into the run folder while it trains, for TensorBoard.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Check everything, estimate memory and time, and stop; --out may be left out."),
    ] = False,
    show_config: Annotated[
        bool, typer.Option("--show-config", help="Print the configuration as resolved, and stop.")
    ] = False,
    show_version: Annotated[bool, typer.Option("--version", help="Print the version, and stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the evaluation as JSON, no progress.")] = False,
) -> None:
    """Trains cross-media retrieval for a small collection, with knowledge from a large one (DCKT)."""
    if context.invoked_subcommand:
        return
    if show_version:
        typer.echo(f"dckt-train {dckt.__version__}")
        return
    named = {
        "image.trunk": trunk,
        "image.weights": weights,
        "network.width": width,
        "transfer.rounds": rounds,
        "seed": seed,
        "compute.precision": precision,
        "compute.threads": threads,
    }
    reporter = Silent() if as_json else Bars()
    # PyTorch takes seconds to load; --help and --show-config do not need it.
    if resume:
        free = {"resume", "device", "cache", "tensorboard", "as_json"}
        given = [p.opts[0] for p in context.command.params if p.name not in free and _given(context, p.name)]
        if given:
            raise ConfigError(f"--resume keeps the run's own settings; leave out {', '.join(given)}")
        from dckt_trainer.train import resume as resume_run

        run = resume_run(resume, device=device, cache=cache, tensorboard=tensorboard, reporter=reporter)
        _show(run, as_json=as_json)
        return
    settings = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in named.items() if value is not None]
    config = load_config(preset, [*settings, *(changes or [])])
    if show_config:
        typer.echo(dump_config(config), nl=False)
        return
    if target is None or (out is None and not dry_run):
        raise ConfigError("a training needs --source, --target and --out; see dckt-train --help")
    how: dict[str, Any] = {
        "device": device,
        "cache": cache,
        "on_bad_pair": read_bad_pairs(on_bad_pair),
        "force": force,
        "pretrained_from": pretrained_from,
        "reporter": reporter,
    }
    if dry_run or out is None:
        from dckt_trainer.estimate import estimate

        dry_run_command.show(estimate(source, target, out, config, **how), as_json=as_json)
        return
    from dckt_trainer.train import train

    _show(train(source, target, out, config, tensorboard=tensorboard, **how), as_json=as_json)


def _given(context: typer.Context, name: str | None) -> bool:
    """Whether an option stands on the command line."""
    source = context.get_parameter_source(name or "")
    return source is not None and source.name == "COMMANDLINE"


@app.command("synthetic", epilog="Example:\n\n  dckt-train synthetic corpora --pairs 10 --seed 3")
def synthetic_command(
    folder: Annotated[Path, typer.Argument(help="Where the corpora source/ and target/ are written.")],
    seed: Annotated[int, typer.Option(help="Another seed, other classes, pictures and texts.")] = 0,
    source_classes: Annotated[int, typer.Option(help="Classes of the source.")] = 40,
    source_pairs: Annotated[int, typer.Option(help="Training pairs of each of them.")] = 50,
    classes: Annotated[int, typer.Option(help="Classes of the target.")] = 16,
    pairs: Annotated[int, typer.Option(help="Training pairs of each of them.")] = 5,
    side: Annotated[int, typer.Option(help="Side of the pictures, in pixels.")] = 96,
    audio: Annotated[bool, typer.Option("--audio", help="Add a third medium, vectors/audio.npy.")] = False,
    unrelated: Annotated[
        bool, typer.Option("--unrelated", help="No shape, texture or colour of the source occurs in the target.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace corpora that are there.")] = False,
) -> None:
    """Writes two generated corpora with different labels and shared structure, to try things out."""
    from dckt_trainer.data.synthetic import write_synthetic

    with counted(Bars(), "synthetic corpora") as progress:
        source, target = write_synthetic(
            folder,
            seed=seed,
            source_classes=source_classes,
            source_pairs_per_class=source_pairs,
            target_classes=classes,
            target_pairs_per_class=pairs,
            side=side,
            audio=audio,
            unrelated=unrelated,
            force=force,
            progress=progress,
        )
    typer.echo(f"{source}\n{target}")


app.command("advise", epilog=advise.EXAMPLES)(advise.advise_command)
app.command("import", epilog=import_corpus.EXAMPLE)(import_corpus.import_command)
app.command("sweep", epilog=sweep.EXAMPLES)(sweep.sweep_command)
app.command("tensorboard", epilog=tensorboard.EXAMPLE)(tensorboard.tensorboard_command)


def _show(run: Any, *, as_json: bool) -> None:
    if os.environ.get("RANK", "0") != "0":  # of several processes, the first one speaks
        return
    if as_json:
        typer.echo(json.dumps(run.evaluation, indent=1))
        return
    if run.trial:
        typer.echo(f"{run.path}: a trial, judged on validation alone; its figures are in evaluation.json")
        return
    from dckt_trainer.report import direction_tables, map_table

    console = Console()
    notes = ("* is kept; 95 %: bootstrap over pairs; the report has more", None)
    for figures, note in zip((map_table(run.evaluation), *direction_tables(run.evaluation)), notes, strict=False):
        table = Table(title=figures.title, caption=note)
        for place, column in enumerate(figures.columns[:SHOWN_COLUMNS]):
            table.add_column(column, justify="left" if place == 0 else "right", no_wrap=True)
        for row in figures.rows:
            table.add_row(*map(str, row[:SHOWN_COLUMNS]))
        console.print(table)
    console.print(f"report: {run.path / 'report.html'}", soft_wrap=True, highlight=False)
    if run.facts["trunk"]:  # a run on ready features has nothing to export
        console.print(f"next:   dckt-export {run.path} --out {run.path.name}.dckt", soft_wrap=True, highlight=False)


def main() -> None:
    """Entry point of `dckt-train`."""
    keep_freed_memory()
    run_app(app, extra="train")
