"""``dckt search``: what belongs to a picture or to a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dckt.commands.options import AsJson, BundlePath, Device, IndexPath, Threads, Variant, Where, parse_where
from dckt.console import clean, print_json
from dckt.errors import ConfigError, ImageError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from dckt.report import Card
    from dckt.searcher import Hit, SearchResult

EXAMPLES = """
Examples:

  dckt search shop.dckt catalog.index photo.jpg

  dckt search shop.dckt catalog.index --text "a red leather handbag" -k 5

  dckt search shop.dckt catalog.index photo.jpg --where '{"shop": "A", "price": {"lt": 20}}' --calibrated

  dckt search shop.dckt catalog.index one.jpg two.jpg --media image --html found.html --json
"""


def search_command(
    bundle: BundlePath,
    index: IndexPath,
    queries: Annotated[list[str], typer.Argument(help="Paths of pictures; with --text, texts.", metavar="QUERY")],
    text: Annotated[bool, typer.Option("--text", "-t", help="The queries are texts.")] = False,
    features: Annotated[
        str | None,
        typer.Option(help="The queries are .npy files, each with the features of one item of this medium."),
    ] = None,
    k: Annotated[int, typer.Option("-k", help="How many hits.")] = 10,
    media: Annotated[
        list[str] | None,
        typer.Option(help="Find only these, such as image; repeatable. Unless given, every medium but the query's."),
    ] = None,
    where: Where = None,
    min_score: Annotated[float | None, typer.Option(help="Leave out hits below this similarity, -1 to 1.")] = None,
    calibrated: Annotated[
        bool, typer.Option("--calibrated", help="Leave out hits that do not fit, by the bundle's calibration.")
    ] = False,
    reorder: Annotated[
        int,
        typer.Option(
            help="Reorder so many candidates by the second representation; the index must have one "
            "(dckt index --second-stage).",
            metavar="N",
        ),
    ] = 0,
    html: Annotated[
        Path | None, typer.Option(help="Also write a page with queries and hits, pictures inside it.", metavar="FILE")
    ] = None,
    as_json: AsJson = False,
    variant: Variant = "auto",
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Finds what belongs to a picture, to a text, or to an item of another medium.

    With --json a single query gives an object, several give a list of them.
    """
    from dckt.features import read_one
    from dckt.searcher import Searcher

    if calibrated and min_score is not None:
        raise ConfigError("--calibrated and --min-score both set the lowest similarity; give one of them")
    if text and features is not None:
        raise ConfigError("--text and --features both say what the queries are; give one of them")
    wanted = parse_where(where)
    rows = None if features is None else [read_one(Path(query)) for query in queries]
    with Searcher.open(bundle, index, variant=variant, device=device, threads=threads) as searcher:
        results = searcher.search_batch(
            None if text or features else queries,
            texts=queries if text else None,
            features=rows,
            medium=features,
            k=k,
            media=media or None,
            where=wanted,
            min_score="calibrated" if calibrated else min_score,
            reorder=reorder,
        )
        provider = searcher.providers[results[0].query_medium]
    if html is not None:
        write_page(html, queries, results)
    if as_json:
        found = [_as_json(query, result, provider) for query, result in zip(queries, results, strict=True)]
        print_json(found if len(found) > 1 else found[0])
    else:
        for query, result in zip(queries, results, strict=True):
            _show(query if len(queries) > 1 else "", result)
        _show_timings(results[0], provider)


def write_page(path: Path, queries: Sequence[str], results: Sequence[SearchResult]) -> None:
    """Writes queries with their hits as one HTML file that needs no other.

    Raises:
        ConfigError: the file cannot be written.
    """
    from dckt.report import Gallery, GalleryRow, write_report

    rows = [
        GalleryRow(_card(result.query_medium, query, "query"), tuple(map(_hit_card, result)))
        for query, result in zip(queries, results, strict=True)
    ]
    try:
        write_report(path, title="Search", sections=[Gallery("Queries, and what they found, best first", rows)])
    except OSError as error:
        raise ConfigError(f"{path}: the page cannot be written ({error}); choose another --html") from error


def _hit_card(hit: Hit) -> Card:
    source = hit.metadata.get(hit.medium, "")
    return _card(hit.medium, source if isinstance(source, str) else "", f"{hit.score:.4f}  {hit.id}")


def _card(medium: str, source: str, caption: str) -> Card:
    """A picture, unless it is gone or cannot be read, which the card then says; or a text."""
    from dckt.report import Card, thumbnail

    if medium != "image":
        return Card(text=source, caption=caption)
    if not source:
        return Card(text="no path was stored", caption=caption)
    try:
        return Card(image=thumbnail(source), caption=caption, alt=source)
    except ImageError as error:
        return Card(text=str(error), caption=caption)


def _as_json(query: str, result: SearchResult, provider: str) -> dict[str, Any]:
    facts = {"query": query, "query_medium": result.query_medium, "provider": provider}
    return {**facts, "timings": dict(result.timings), "hits": [asdict(hit) for hit in result]}


def _show(query: str, result: SearchResult) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    if query:
        console.print(clean(query), style="bold")
    if not result:
        console.print("no hits: nothing of that medium is in the index (dckt inspect INDEX), or nothing fits")
        return
    table = Table(box=None, pad_edge=False, expand=True)
    table.add_column("rank", justify="right", no_wrap=True)
    table.add_column("score", justify="right", no_wrap=True)
    table.add_column("medium", no_wrap=True)
    table.add_column("id", overflow="fold", max_width=32, min_width=8)
    table.add_column("about", overflow="ellipsis", no_wrap=True, ratio=1)
    for rank, hit in enumerate(result, start=1):
        table.add_row(str(rank), f"{hit.score:.4f}", hit.medium, clean(hit.id), _about(hit))
    console.print(table)


def _about(hit: Hit) -> RenderableType:
    """What a reader looks for comes first: the text, or the picture's path, which is not cut, so it can be copied."""
    from rich.console import Group

    facts = sorted(hit.metadata.items(), key=lambda fact: fact[0] != hit.medium)
    path = clean(str(facts.pop(0)[1])) if hit.medium == "image" and "image" in hit.metadata else None
    rest = clean(" ".join(", ".join(f"{key}: {value}" for key, value in facts).split()))
    if path is None:
        return rest
    path.overflow, path.no_wrap = "fold", False
    return Group(path, rest) if rest else path


def _show_timings(result: SearchResult, provider: str) -> None:
    from rich.console import Console

    spent = ", ".join(f"{stage} {1000 * seconds:.1f} ms" for stage, seconds in result.timings.items())
    Console(highlight=False).print(f"{spent}; {provider}", style="dim", markup=False)
