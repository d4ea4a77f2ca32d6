"""``dckt tune``: makes searches in a graph find as much as is asked."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dckt.commands.options import AsJson, IndexPath, Threads
from dckt.console import print_json, print_table, say, working
from dckt.errors import ConfigError

if TYPE_CHECKING:
    from numpy.typing import NDArray

EXAMPLES = """
Examples:

  dckt tune catalog.index

  dckt tune catalog.index --recall 0.999

  dckt tune catalog.index --recall 0.99 --queries queries.npy --json
"""


def tune_command(
    index: IndexPath,
    recall: Annotated[
        float, typer.Option(help="Share of the true ten best that a search is to find, on average over the queries.")
    ] = 0.99,
    queries: Annotated[
        Path | None,
        typer.Option(
            help="Real queries, floats (queries, width), as a .npy file. Unless given, disturbed vectors of the index.",
            metavar="FILE",
        ),
    ] = None,
    as_json: AsJson = False,
    threads: Threads = None,
) -> None:
    """Compares every graph with exact search, and stores the least effort that finds what is asked.

    What is searched exactly finds everything, and needs no tuning.
    """
    from dckt.index import Index

    vectors = None if queries is None else read_vectors(queries)
    with working("comparing with exact search"), Index.open(index, threads=threads) as opened:
        tuned = {medium: asdict(tuning) for medium, tuning in opened.tune(recall, queries=vectors).items()}
    if as_json:
        print_json({"index": str(index), "recall": recall, "media": tuned})
    elif tuned:
        columns = list(next(iter(tuned.values())))
        rows = [(medium, *tuning.values()) for medium, tuning in tuned.items()]
        print_table(["medium", *(name.replace("_", " ") for name in columns)], rows)
    else:
        say("there is nothing to tune: the index is empty")


def read_vectors(path: Path) -> NDArray[Any]:
    """The array of a ``.npy`` file; nothing in it is executed.

    Raises:
        ConfigError: there is no such file, or it is none of NumPy's.
    """
    import numpy as np

    try:
        return np.asarray(np.load(path, allow_pickle=False))
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(f"{path}: cannot be read as a .npy file ({error}); write one with numpy.save") from error
