"""``dckt delete``: takes items out of an index."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dckt.commands.options import AsJson, IndexPath, Where, parse_where
from dckt.console import clean, print_json, say
from dckt.errors import ConfigError

if TYPE_CHECKING:
    from dckt.index import Index

_SHOWN = 20

EXAMPLES = """
Examples:

  dckt delete catalog.index --ids bag-17 --ids bag-18

  dckt delete catalog.index --ids-file gone.txt --medium text

  dckt delete catalog.index --where '{"shop": "A"}' --dry-run
"""


def delete_command(
    index: IndexPath,
    ids: Annotated[list[str] | None, typer.Option(help="Id of an item; repeatable.", metavar="ID")] = None,
    ids_file: Annotated[Path | None, typer.Option(help="File with an id a line, UTF-8.", metavar="FILE")] = None,
    where: Where = None,
    medium: Annotated[str | None, typer.Option(help="Only items of this medium; unless given, of each.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be deleted.")] = False,
    as_json: AsJson = False,
) -> None:
    """Deletes items by id, or those whose metadata is so.

    Each medium is one step, which is done whole or not at all. An id that is not there is named and is no error. Room
    on the disk comes back with dckt compact.
    """
    from dckt.index import Index

    wanted = parse_where(where)
    named = [*(ids or ()), *(_read_ids(ids_file) if ids_file is not None else ())]
    if bool(named) == (wanted is not None):
        raise ConfigError("give --ids (or --ids-file), or --where, one of them (see dckt delete --help)")
    if wanted == {}:
        raise ConfigError("--where is {}, which every item meets; to empty an index, make it anew: dckt index --force")
    with Index.open(index) as opened:
        chosen = _by_where(opened, wanted, medium) if wanted is not None else _by_id(opened, named, medium)
        if not dry_run:
            for name, found in chosen.items():
                opened.delete(name, found)
    there = {item for found in chosen.values() for item in found}
    missing = [item for item in dict.fromkeys(named) if item not in there]
    if as_json:
        counts = {name: len(found) for name, found in chosen.items()}
        print_json({"index": str(index), "dry_run": dry_run, "deleted": counts, "missing": missing})
        return
    for item in missing[:_SHOWN]:
        say("not there:", clean(item))
    if len(missing) > _SHOWN:
        say(f"not there: {len(missing) - _SHOWN:,} more")
    counted = " and ".join(f"{len(found):,} of medium {name}" for name, found in chosen.items()) or "nothing"
    say(f"{'would delete' if dry_run else 'deleted'} {counted}")


def _by_where(index: Index, where: dict[str, object], medium: str | None) -> dict[str, list[str]]:
    chosen: dict[str, list[str]] = {}
    for item in index.items(medium, where):
        chosen.setdefault(item.medium, []).append(item.id)
    return chosen


def _by_id(index: Index, ids: list[str], medium: str | None) -> dict[str, list[str]]:
    media = index.media if medium is None else [medium]
    found = {name: sorted(index.existing(name, ids)) for name in media}
    return {name: there for name, there in found.items() if there}


def _read_ids(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as UTF-8 ({error}); expected an id a line") from error
    return [line.rstrip("\r") for line in lines if line.strip()]
