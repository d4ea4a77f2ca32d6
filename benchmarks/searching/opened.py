"""Opens an index in a fresh process and says how long that took and how much memory came with it.

python -m searching.opened dckt FOLDER 200
python -m searching.opened hnswlib FILE 200
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import hnswlib
import numpy as np

from dckt.index import Index
from searching.data import unit_rows

SEARCHES = 100


def main() -> None:
    kind, path, dimension = sys.argv[1], sys.argv[2], int(sys.argv[3])
    queries = unit_rows(np.random.default_rng(0).standard_normal((SEARCHES, dimension), dtype=np.float32))
    before = memory()
    start = time.perf_counter()
    if kind == "dckt":
        index = Index.open(path, threads=1)
        seconds = time.perf_counter() - start
        opened = memory()
        for query in queries:
            index.search(query[None])
    else:
        graph = hnswlib.Index(space="ip", dim=dimension)
        graph.load_index(path)
        seconds = time.perf_counter() - start
        opened = memory()
        graph.set_ef(64)
        for query in queries:
            graph.knn_query(query[None], k=10, num_threads=1)
    after = memory()
    print(
        json.dumps(
            {
                "seconds": seconds,
                "opened": opened["VmRSS"] - before["VmRSS"],
                "searched": after["VmRSS"] - before["VmRSS"],
                "own": after["RssAnon"] - before["RssAnon"],
                "peak": after["VmHWM"] - before["VmRSS"],
            }
        )
    )


def memory() -> dict[str, int]:
    """Bytes of this process: in memory (VmRSS), of those no file's (RssAnon), and the most so far (VmHWM)."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {words[0].rstrip(":"): 1024 * int(words[1]) for words in lines if words[-1] == "kB"}


if __name__ == "__main__":
    main()
