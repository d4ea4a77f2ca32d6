"""``dckt index``: encodes a collection and makes it searchable."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from dckt.commands.options import AsJson, BundlePath, Device, Threads, Variant
from dckt.console import clean, print_json, progress_bar, say
from dckt.errors import ConfigError, IndexFolderError

if TYPE_CHECKING:
    from dckt.collect import Collection
    from dckt.searcher import AddReport, Failure, Searcher

_SHOWN = 20

# In a help text a blank line keeps the line break that rich would otherwise join.
EXAMPLES = """
Examples:

  dckt index shop.dckt catalog.index --images photos/ --texts descriptions.jsonl

  dckt index shop.dckt catalog.index --pairs corpus/ --split test

  dckt index shop.dckt catalog.index --images photos/ --on-error skip
"""


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
        Path | None,
        typer.Option(
            help="Corpus of pictures with texts: a folder with pairs.jsonl or pairs.csv, and vectors/MEDIUM.npy of any "
            "other medium that the bundle knows."
        ),
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
            "batch, so an interrupted run can be repeated. collect: the same, and say the kind of each error."
        ),
    ] = "raise",
    batch_size: Annotated[int, typer.Option(help="Items that are encoded at once.")] = 32,
    upsert: Annotated[
        bool,
        typer.Option(
            "--upsert", help="Replace items whose ids are there already; what did not change is not encoded again."
        ),
    ] = False,
    second_stage: Annotated[
        bool,
        typer.Option(
            "--second-stage", help="Of a new index: keep the second representation, too, for dckt search --reorder."
        ),
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Make the index anew; the old one stays until the new one is whole.")
    ] = False,
    as_json: AsJson = False,
    variant: Variant = "auto",
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Encodes a collection and makes it searchable.

    A new index appears when it is whole. An index that is there is added to, if the same model made it.
    """
    if images is texts is pairs is None:
        raise ConfigError("nothing to index; give --images, --texts or --pairs (see dckt index --help)")
    if split is not None and pairs is None:
        raise ConfigError("--split chooses among --pairs; give those too")
    collection = _collect(bundle, images, texts, pairs, split, on_error)
    options = {"variant": variant, "device": device, "threads": threads}
    new = {"kind": kind, "second_stage": second_stage or None}
    with _index_to_fill(bundle, index, new, options, stream=on_error != "raise", force=force) as searcher:
        with progress_bar("indexing", len(collection)) as progress:
            reports = searcher.add_collection(
                collection, batch_size=batch_size, on_error=on_error, upsert=upsert, progress=progress
            )
        media = searcher.index.info().media
    if as_json:
        print_json(
            {
                "index": str(index),
                "skipped": list(collection.skipped),
                "media": {medium: asdict(about) for medium, about in media.items()},
                "reports": {
                    medium: {"added": one.added, "unchanged": one.unchanged, "failed": [*map(_failed, one.failed)]}
                    for medium, one in reports.items()
                },
            }
        )
        return
    _show_failures(collection.skipped, reports)
    counts = ", ".join(
        f"{_count(about.items, medium)} ({about.unique_vectors:,} different vectors, {about.search} search)"
        for medium, about in media.items()
    )
    added = " and ".join(_count(report.added, medium) for medium, report in reports.items())
    if same := sum(report.unchanged for report in reports.values()):
        added += f", {same:,} unchanged"
    say(f"added {added}; {index} holds {counts or 'nothing'}")


def _collect(
    bundle: Path, images: Path | None, texts: Path | None, pairs: Path | None, split: str | None, on_error: str
) -> Collection:
    from dckt.bundle import Bundle
    from dckt.collect import collect_images, collect_pairs, collect_texts, media_of_corpus

    reading = "skip" if on_error == "collect" else on_error
    parts: list[Collection] = []
    if images is not None:
        parts.append(collect_images(images, on_error=reading))
    if texts is not None:
        parts.append(collect_texts(texts, on_error=reading))
    if pairs is not None:
        there = media_of_corpus(pairs)
        known = Bundle.open(bundle, verify=False).media if there else ()
        media = [medium for medium in there if medium in known]
        parts.append(collect_pairs(pairs, split=split, media=media, on_error=reading))
    return sum(parts[1:], parts[0])


@contextmanager
def _index_to_fill(
    bundle: Path, index: Path, new: Mapping[str, Any], options: Mapping[str, Any], *, stream: bool, force: bool
) -> Iterator[Searcher]:
    """The index, opened or made.

    Args:
        bundle: the model.
        index: its folder.
        new: what only a new index can be asked for; None where it was not.
        options: of any index.
        stream: keep what is done after every batch, and not only the whole.
        force: make it anew.
    """
    from dckt.searcher import Searcher

    asked = {name: value for name, value in new.items() if value is not None}
    there = index.exists() and (not index.is_dir() or any(index.iterdir()))
    if there and not force:
        if asked:
            option = next(iter(asked)).replace("_", "-")
            raise IndexFolderError(
                f"{index}: exists already and keeps its {option}; leave out --{option}, or add --force"
            )
        opened = Searcher.open(bundle, index, **options)
    elif force or not stream:
        with Searcher.replacing(bundle, index, **asked, **options) as searcher:
            yield searcher
        return
    else:
        opened = Searcher.create(bundle, index, **asked, **options)
    with opened as searcher:
        yield searcher


def _failed(failure: Failure) -> dict[str, str]:
    kind = {} if isinstance(failure.error, str) else {"kind": type(failure.error).__name__}
    return {"id": failure.id, "error": str(failure.error), **kind}


def _show_failures(skipped: Iterable[str], reports: Mapping[str, AddReport]) -> None:
    lines = list(skipped)
    for medium, report in reports.items():
        for failed in map(_failed, report.failed):
            kind = f" ({failed['kind']})" if "kind" in failed else ""
            lines.append(f"{medium} {failed['id']!r}{kind}: {failed['error']}")
    for line in lines[:_SHOWN]:
        say(Text.assemble(("left out: ", "yellow"), clean(line)))
    if len(lines) > _SHOWN:
        say(Text(f"left out: {len(lines) - _SHOWN:,} more", "yellow"))


def _count(number: int, medium: str) -> str:
    return f"{number:,} {medium}{'s' if medium in ('image', 'text') and number != 1 else ''}"
