"""``dckt compact``: makes an index small and quick again."""

from __future__ import annotations

from dckt.commands.options import AsJson, IndexPath, Threads
from dckt.console import print_json, say, size, working

EXAMPLES = """
Examples:

  dckt compact catalog.index

  dckt compact catalog.index --json
"""


def compact_command(index: IndexPath, as_json: AsJson = False, threads: Threads = None) -> None:
    """Drops what no item uses, builds graphs anew that need it, and gives room on the disk back.

    Searches go on, here and in other processes. While it works it needs room for two more copies of the index.
    """
    from dckt.index import Index

    with working("compacting"), Index.open(index, threads=threads) as opened:
        before = opened.info().bytes
        opened.compact()
        after = opened.info().bytes
    if as_json:
        print_json({"index": str(index), "bytes_before": before, "bytes_after": after})
    else:
        say(f"{index}: {size(before)} became {size(after)}")
