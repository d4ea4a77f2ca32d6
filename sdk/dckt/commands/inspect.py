"""``dckt inspect``: what a bundle or an index holds."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from dckt.commands.options import AsJson
from dckt.console import facts_table, print_json
from dckt.errors import ConfigError

EXAMPLES = """
Examples:

  dckt inspect shop.dckt

  dckt inspect catalog.index --json
"""


def inspect_command(
    path: Annotated[Path, typer.Argument(help="A bundle or an index.")], as_json: AsJson = False
) -> None:
    """Says what a bundle or an index holds, after checking all of it."""
    about = describe(path)
    if as_json:
        print_json(about)
        return
    from rich.console import Console

    console = Console(highlight=False)
    if about["what"] == "bundle":
        from dckt.commands.bundle_tables import bundle_tables

        console.print(bundle_tables(about))
    else:
        console.print(facts_table(about))


def describe(path: Path) -> dict[str, Any]:
    """What a bundle or an index says about itself.

    Raises:
        ConfigError: the path is neither.
        DcktError: see :meth:`dckt.bundle.Bundle.open` and :meth:`dckt.index.Index.open`.
    """
    from dckt.bundle import MANIFEST
    from dckt.commands.bundle_tables import describe_bundle
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
