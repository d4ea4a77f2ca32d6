"""The command ``dckt``: index a collection, search it, look into bundles and indexes.

Each command is a thin wrapper on :mod:`dckt.searcher` and :mod:`dckt.collect`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

import dckt
from dckt.commands import engine
from dckt.console import clean, flat, run
from dckt.errors import ConfigError, IndexFolderError

if TYPE_CHECKING:
    from dckt.collect import Collection
    from dckt.searcher import AddReport, Searcher, SearchResult

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode="rich")

BundlePath = Annotated[Path, typer.Argument(help="Model bundle, as dckt-export writes it.")]
Device = Annotated[str, typer.Option(help="Where the model runs: auto, cpu, or cuda (an error if it is not there).")]
Variant = Annotated[
    str, typer.Option(help="How the model is served, such as openvino-bf16 (see dckt inspect); auto: the fastest here.")
]
Threads = Annotated[int | None, typer.Option(help="Threads of the model and of decoding; every core unless given.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

# In a help text a blank line keeps the line break that rich would otherwise join.
INDEX_EXAMPLES = """
Examples:

  dckt index shop.dckt catalog.index --images photos/ --texts descriptions.jsonl

  dckt index shop.dckt catalog.index --pairs corpus/ --split test

  dckt index shop.dckt catalog.index --images photos/ --on-error skip
"""
SEARCH_EXAMPLES = """
Examples:

  dckt search shop.dckt catalog.index photo.jpg

  dckt search shop.dckt catalog.index --text "a red leather handbag" -k 5

  dckt search shop.dckt catalog.index photo.jpg --media image --json
"""
INSPECT_EXAMPLES = """
Examples:

  dckt inspect shop.dckt

  dckt inspect catalog.index --json
"""


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


@app.command("index", epilog=INDEX_EXAMPLES)
def index_command(
    bundle: BundlePath,
    index: Annotated[Path, typer.Argument(help="Index to make, or to add to.")],
    images: Annotated[
        Path | None, typer.Option(help="Folder of pictures, with all folders in it, or one picture. Ids: their paths.")
    ] = None,
    texts: Annotated[
        Path | None,
        typer.Option(help="Texts: .txt (one a line; ids: line numbers), or .jsonl or .csv with id and text."),
    ] = None,
    pairs: Annotated[
        Path | None, typer.Option(help="Corpus of pictures with texts: a folder with pairs.jsonl or pairs.csv.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Of --pairs only those of this split, such as test.")] = None,
    kind: Annotated[
        str | None,
        typer.Option(help="Of a new index: exact, hnsw, or auto: exact as long as that is fast. Unless given, auto."),
    ] = None,
    on_error: Annotated[
        str,
        typer.Option(
            help="raise: an item that cannot be used refuses all. skip: leave it out; what is done is kept after every "
            "batch, so an interrupted run can be repeated."
        ),
    ] = "raise",
    batch_size: Annotated[int, typer.Option(help="Items that are encoded at once.")] = 32,
    upsert: Annotated[bool, typer.Option("--upsert", help="Replace items whose ids are there already.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Make the index anew; the old one stays until the new one is whole.")
    ] = False,
    variant: Variant = "auto",
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Encodes a collection and makes it searchable.

    A new index appears when it is whole. An index that is there is added to, if the same model made it.
    """
    from dckt.collect import collect_images, collect_pairs, collect_texts

    if images is texts is pairs is None:
        raise ConfigError("nothing to index; give --images, --texts or --pairs (see dckt index --help)")
    if split is not None and pairs is None:
        raise ConfigError("--split chooses among --pairs; give those too")
    parts: list[Collection] = []
    if images is not None:
        parts.append(collect_images(images, on_error=on_error))
    if texts is not None:
        parts.append(collect_texts(texts, on_error=on_error))
    if pairs is not None:
        parts.append(collect_pairs(pairs, split=split, on_error=on_error))
    collection = sum(parts[1:], parts[0])
    console = Console(stderr=True, highlight=False)
    with _index_to_fill(
        bundle, index, kind=kind, on_error=on_error, force=force, variant=variant, device=device, threads=threads
    ) as searcher:
        with _progress_bar(console, "indexing", len(collection.images) + len(collection.texts)) as progress:
            reports = searcher.add_collection(
                collection, batch_size=batch_size, on_error=on_error, upsert=upsert, progress=progress
            )
        media = searcher.index.info().media
    _show_failures(console, collection.skipped, reports)
    counts = ", ".join(
        f"{_count(about.items, medium)} ({about.unique_vectors:,} different vectors, {about.search} search)"
        for medium, about in media.items()
    )
    added = " and ".join(_count(report.added, medium) for medium, report in reports.items())
    console.print(f"added {added}; {index} holds {counts or 'nothing'}", markup=False, soft_wrap=True)


@app.command("search", epilog=SEARCH_EXAMPLES)
def search_command(
    bundle: BundlePath,
    index: Annotated[Path, typer.Argument(help="Index that dckt index wrote.")],
    query: Annotated[str, typer.Argument(help="A picture's path; with --text, a text.")],
    text: Annotated[bool, typer.Option("--text", "-t", help="QUERY is a text.")] = False,
    k: Annotated[int, typer.Option("-k", help="How many hits.")] = 10,
    media: Annotated[
        list[str] | None,
        typer.Option(help="Find only these: image, text; repeatable. Unless given, the medium that the query is not."),
    ] = None,
    as_json: AsJson = False,
    variant: Variant = "auto",
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Finds the texts that belong to a picture, or the pictures that belong to a text."""
    from dckt.searcher import Searcher

    with Searcher.open(bundle, index, variant=variant, device=device, threads=threads) as searcher:
        wanted = media or None
        result = searcher.search(text=query, k=k, media=wanted) if text else searcher.search(query, k=k, media=wanted)
        provider = searcher.providers[result.query_medium]
    if as_json:
        facts = {"query_medium": result.query_medium, "provider": provider, "timings": dict(result.timings)}
        typer.echo(json.dumps({**facts, "hits": [asdict(hit) for hit in result]}, indent=1))
    else:
        _show_hits(result, provider)


@app.command("inspect", epilog=INSPECT_EXAMPLES)
def inspect_command(
    path: Annotated[Path, typer.Argument(help="A bundle or an index.")], as_json: AsJson = False
) -> None:
    """Says what a bundle or an index holds, after checking all of it."""
    about = _describe(path)
    if as_json:
        typer.echo(json.dumps(about, indent=1))
        return
    console = Console(highlight=False)
    if about["what"] == "bundle":
        from dckt.commands.inspect import bundle_tables

        console.print(bundle_tables(about))
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in flat(about):
        table.add_row(clean(name), clean(value))
    console.print(table)


app.command("engine", epilog=engine.EXAMPLES)(engine.engine_command)


def _describe(path: Path) -> dict[str, Any]:
    from dckt.bundle import MANIFEST
    from dckt.commands.inspect import describe_bundle
    from dckt.index import Index
    from dckt.index.store import ITEMS

    if (path / MANIFEST).exists():
        return describe_bundle(path)
    if (path / ITEMS).exists():
        with Index.open(path) as opened:
            return {"what": "index", **asdict(opened.info())}
    raise ConfigError(
        f"{path}: is neither a bundle (no {MANIFEST}) nor an index (no {ITEMS}); "
        "dckt-export writes bundles, dckt index writes indexes"
    )


@contextmanager
def _index_to_fill(
    bundle: Path,
    index: Path,
    *,
    kind: str | None,
    on_error: str,
    force: bool,
    variant: str,
    device: str,
    threads: int | None,
) -> Iterator[Searcher]:
    from dckt.searcher import Searcher

    there = index.exists() and (not index.is_dir() or any(index.iterdir()))
    if there and not force:
        if kind is not None:
            raise IndexFolderError(f"{index}: exists already and keeps its kind; leave out --kind, or add --force")
        opened = Searcher.open(bundle, index, variant=variant, device=device, threads=threads)
    elif force or on_error == "raise":
        with Searcher.replacing(
            bundle, index, kind=kind or "auto", variant=variant, device=device, threads=threads
        ) as searcher:
            yield searcher
        return
    else:
        opened = Searcher.create(bundle, index, kind=kind or "auto", variant=variant, device=device, threads=threads)
    with opened as searcher:
        yield searcher


@contextmanager
def _progress_bar(console: Console, name: str, total: int) -> Iterator[Any]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(name, total=total)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _show_failures(console: Console, skipped: Iterable[str], reports: Mapping[str, AddReport]) -> None:
    lines = [
        *skipped,
        *(f"{medium} {item!r}: {why}" for medium, report in reports.items() for item, why in report.failed),
    ]
    for line in lines[:20]:
        console.print(Text.assemble(("left out: ", "yellow"), clean(line)), soft_wrap=True)
    if len(lines) > 20:
        console.print(f"left out: {len(lines) - 20:,} more", style="yellow")


def _show_hits(result: SearchResult, provider: str) -> None:
    table = Table(box=None, pad_edge=False, expand=True)
    table.add_column("rank", justify="right", no_wrap=True)
    table.add_column("score", justify="right", no_wrap=True)
    table.add_column("medium", no_wrap=True)
    table.add_column("id", overflow="fold", max_width=32, min_width=8)
    table.add_column("about", overflow="ellipsis", no_wrap=True, ratio=1)
    for rank, hit in enumerate(result, start=1):
        # What a reader looks for comes first.
        facts = sorted(hit.metadata.items(), key=lambda fact: fact[0] != "text")
        about = " ".join(", ".join(f"{key}: {value}" for key, value in facts).split())
        table.add_row(str(rank), f"{hit.score:.4f}", hit.medium, clean(hit.id), clean(about))
    console = Console(highlight=False)
    if not result:
        console.print("no hits; is there anything of that medium in the index? (dckt inspect INDEX)")
        return
    console.print(table)
    spent = ", ".join(f"{stage} {1000 * seconds:.1f} ms" for stage, seconds in result.timings.items())
    console.print(f"{spent}; {provider}", style="dim", markup=False)


def _count(number: int, medium: str) -> str:
    return f"{number:,} {medium}{'' if number == 1 else 's'}"


def main() -> None:
    """Entry point of ``dckt``."""
    run(app)
