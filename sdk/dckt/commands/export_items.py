"""``dckt export-items``: an index's items as JSON lines or CSV, and their vectors as a NumPy file."""

from __future__ import annotations

import csv
import json
import shutil
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer

from dckt.commands.options import IndexPath, Where, parse_where
from dckt.console import progress_bar, say
from dckt.errors import ConfigError, IndexFolderError, UnknownItemError
from dckt.files import atomic_file

if TYPE_CHECKING:
    from dckt.index import Index

FORMATS = ("jsonl", "csv")
_COLUMNS = ("id", "medium")

EXAMPLES = """
Examples:

  dckt export-items catalog.index --out items.jsonl

  dckt export-items catalog.index --format csv --where '{"shop": "A"}' --out shop-a.csv

  dckt export-items catalog.index --medium image --out images.jsonl --vectors images.npy
"""


def export_items_command(
    index: IndexPath,
    out: Annotated[
        Path | None, typer.Option(help="File to write; unless given, standard output.", metavar="FILE")
    ] = None,
    format_: Annotated[
        str,
        typer.Option(
            "--format",
            help="jsonl: an object a line with id, medium and metadata. csv: columns id and medium, then a column for "
            "each key of the metadata.",
        ),
    ] = "jsonl",
    where: Where = None,
    medium: Annotated[str | None, typer.Option(help="Only items of this medium.")] = None,
    vectors: Annotated[
        Path | None,
        typer.Option(
            help="Also write the vectors, float32 (items, width), as a .npy file; row i belongs to item i.",
            metavar="FILE",
        ),
    ] = None,
) -> None:
    """Writes an index's items, ordered by medium and id. Files appear whole or not at all."""
    from dckt.index import Index

    if format_ not in FORMATS:
        raise ConfigError(f"--format is {format_!r}; expected {' or '.join(FORMATS)}")
    if vectors is not None and vectors.suffix != ".npy":
        raise ConfigError(f"--vectors is {vectors}; expected a name that ends with .npy")
    wanted = parse_where(where)
    with Index.open(index) as opened, ExitStack() as files:
        try:
            target = None if out is None else files.enter_context(atomic_file(out))
            matrix = None if vectors is None else files.enter_context(atomic_file(vectors))
            count = export_items(opened, target, format_=format_, where=wanted, medium=medium, vectors=matrix)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise IndexFolderError(f"the items cannot be written ({error}); choose another place") from error
    say(f"{count:,} items")


def export_items(
    index: Index,
    out: Path | None,
    *,
    format_: str = "jsonl",
    where: Mapping[str, Any] | None = None,
    medium: str | None = None,
    vectors: Path | None = None,
) -> int:
    """Writes items, in little memory however many there are.

    Args:
        index: an open index.
        out: the file to write, None for standard output.
        format_: one of :data:`FORMATS`.
        where: a filter, see :meth:`dckt.index.Index.search`.
        medium: only this one.
        vectors: a file for the vectors, (items, D) float32 in the order of the items.

    Returns:
        How many items there were.

    Raises:
        ConfigError: the filter is wrong, or a key of the metadata is that of another column of a CSV file.
        IndexFolderError: an item went while its vector was to be written.
    """
    # All are read first: the columns of a CSV file and the size of a matrix are known at the end only, and an index may
    # change between two readings.
    with tempfile.TemporaryFile("w+", encoding="utf-8", newline="") as spool:
        keys: dict[str, None] = {}
        count = 0
        with progress_bar("reading", index.count(medium, where)) as progress:
            for item in index.items(medium, where):
                line = {"id": item.id, "medium": item.medium, "metadata": dict(item.metadata)}
                spool.write(json.dumps(line) + "\n")
                keys |= dict.fromkeys(item.metadata)
                count += 1
                progress(count, None)
        spool.seek(0)
        with ExitStack() as opened:
            file = sys.stdout if out is None else opened.enter_context(out.open("w", encoding="utf-8", newline=""))
            if format_ == "csv":
                _write_csv(map(json.loads, spool), sorted(keys), file)
            else:
                shutil.copyfileobj(spool, file)
        if vectors is not None:
            spool.seek(0)
            _write_vectors(index, map(json.loads, spool), count, vectors)
    return count


def _write_csv(rows: Iterable[Mapping[str, Any]], keys: Sequence[str], file: IO[str]) -> None:
    taken = [key for key in keys if key in _COLUMNS]
    if taken:
        raise ConfigError(f"metadata has the key {taken[0]!r}, which is a column of its own in CSV; use --format jsonl")
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow((*_COLUMNS, *keys))
    for row in rows:
        writer.writerow((row["id"], row["medium"], *(_cell(row["metadata"], key) for key in keys)))


def _cell(metadata: Mapping[str, Any], key: str) -> str:
    """Texts as they are, everything else as JSON, and nothing where there is no such key."""
    value = metadata.get(key, "")
    text = value if isinstance(value, str) else json.dumps(value)
    return text.encode(errors="backslashreplace").decode()  # JSON can hold half a character, which UTF-8 cannot


def _write_vectors(index: Index, rows: Iterable[Mapping[str, Any]], count: int, path: Path) -> None:
    import numpy as np

    with path.open("wb") as file, progress_bar("vectors", count) as progress:
        shape = (count, index.dimension)
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
        for done, row in enumerate(rows, start=1):
            try:
                vector = index.vector(row["id"], row["medium"])
            except UnknownItemError as error:
                raise IndexFolderError(f"{error}: it was deleted while it was to be written; try again") from error
            file.write(vector.astype("<f4").tobytes())
            progress(done, count)
