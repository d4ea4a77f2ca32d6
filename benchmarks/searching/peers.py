"""The contenders: our index, and the libraries that it is compared with, each built once and kept on the disk.

Shape letters: N items, Q queries, D width. All graphs have the same M and efConstruction. A query is given as (1, D).
"""

from __future__ import annotations

import hashlib
import importlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import hnswlib
import numpy as np

import dckt.index
from dckt.index import Index
from searching.data import Rows, VectorSet

M, EF_CONSTRUCTION = 16, 200
EFFORTS = (10, 12, 16, 20, 24, 32, 40, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
PACKAGES = {"faiss": "faiss-cpu", "usearch": "usearch"}
MODEL = "0" * 64
SHOPS = ("north", "south", "east", "west")

Answers = Sequence[Sequence[int]]


def missing_packages(modules: Sequence[str]) -> list[str]:
    """Packages to install before these modules can be compared with."""
    return sorted({PACKAGES[name] for name in modules if not _installed(PACKAGES[name])})


def _installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


@dataclass(frozen=True)
class Peer:
    """A library with one set in it.

    Attributes:
        name: in the tables.
        search: from (Q, D) queries and k to what the library returns, one thread.
        rows: from what it returned to the rows of the items, one sequence for each query.
        set_effort: how many candidates a search keeps.
    """

    name: str
    search: Callable[[Rows, int], Any]
    rows: Callable[[Any], Answers]
    set_effort: Callable[[int], None]

    def answers(self, queries: Rows, k: int, effort: int) -> Answers:
        """Its answers, one query after the other; none to a query that it fails on."""
        self.set_effort(effort)
        found: list[Sequence[int]] = []
        for query in queries:
            try:
                found.extend(self.rows(self.search(query[None], k)))
            except RuntimeError:  # hnswlib: "Cannot return the results in a contiguous 2D array"
                found.append(())
        return found


class Shelf:
    """Where graphs are kept, by what is in them.

    Attributes:
        folder: may be used again by a later run, and deleted at any time.
        threads: of a build.
    """

    def __init__(self, folder: Path, threads: int) -> None:
        self.folder = folder
        self.threads = threads
        folder.mkdir(parents=True, exist_ok=True)

    def hnswlib(self, data: VectorSet) -> Peer:
        """The library that our graphs stand on, bare."""

        def build(path: Path) -> None:
            graph = hnswlib.Index(space="ip", dim=data.dimension)
            graph.init_index(max_elements=len(data.items), M=M, ef_construction=EF_CONSTRUCTION)
            graph.add_items(data.items, num_threads=self.threads)
            graph.save_index(str(path))

        graph = hnswlib.Index(space="ip", dim=data.dimension)
        graph.load_index(str(self._made("hnswlib", version("hnswlib"), data, build)))
        return Peer(
            "hnswlib",
            lambda queries, k: graph.knn_query(queries, k=k, num_threads=1),
            lambda found: found[0].astype(np.int64).tolist(),
            graph.set_ef,
        )

    def faiss(self, data: VectorSet) -> Peer:
        """The HNSW of faiss."""
        faiss = importlib.import_module("faiss")

        def build(path: Path) -> None:
            faiss.omp_set_num_threads(self.threads)
            graph = faiss.IndexHNSWFlat(data.dimension, M, faiss.METRIC_INNER_PRODUCT)
            graph.hnsw.efConstruction = EF_CONSTRUCTION
            graph.add(data.items)
            faiss.write_index(graph, str(path))

        graph = faiss.read_index(str(self._made("faiss", version("faiss-cpu"), data, build)))
        faiss.omp_set_num_threads(1)

        def set_effort(effort: int) -> None:
            graph.hnsw.efSearch = effort

        return Peer("faiss-hnsw", graph.search, lambda found: found[1].tolist(), set_effort)

    def flat(self, data: VectorSet) -> Peer:
        """Faiss without a graph: exact."""
        faiss = importlib.import_module("faiss")
        faiss.omp_set_num_threads(1)
        flat = faiss.IndexFlatIP(data.dimension)
        flat.add(data.items)
        return Peer("faiss-flat", flat.search, lambda found: found[1].tolist(), lambda effort: None)

    def usearch(self, data: VectorSet) -> Peer:
        """The HNSW of usearch."""
        module = importlib.import_module("usearch.index")

        def build(path: Path) -> None:
            graph = module.Index(
                ndim=data.dimension, metric="ip", dtype="f32", connectivity=M, expansion_add=EF_CONSTRUCTION
            )
            graph.add(np.arange(len(data.items)), data.items, threads=self.threads)
            graph.save(str(path))

        graph = module.Index.restore(str(self._made("usearch", version("usearch"), data, build)))

        def set_effort(effort: int) -> None:
            graph.expansion_search = effort

        def rows(found: Any) -> Answers:
            keys = np.atleast_2d(np.asarray(found.keys)).astype(np.int64).tolist()
            counts = getattr(found, "counts", None)  # a batch may be answered short
            return keys if counts is None else [own[:count] for own, count in zip(keys, counts, strict=True)]

        return Peer("usearch", lambda queries, k: graph.search(queries, k, threads=1), rows, set_effort)

    def ours(self, data: VectorSet, *, kind: str = "auto") -> Index:
        """Our index, opened for searching with one thread. One is built for each state of its source code."""

        def build(path: Path) -> None:
            with empty_index(path, data.dimension, kind=kind, threads=self.threads) as index:
                add_rows(index, data.items, 0)

        return Index.open(self._made(f"dckt-{kind}", source_hash(), data, build), threads=1)

    def _made(self, name: str, state: str, data: VectorSet, build: Callable[[Path], None]) -> Path:
        contents = hashlib.sha256(data.items.tobytes()).hexdigest()[:12]
        path = self.folder / f"{name}-{state}-{len(data.items)}x{data.dimension}-{contents}"
        if not path.exists():
            unfinished = path.with_name(f"{path.name}.part")
            if unfinished.is_dir():
                shutil.rmtree(unfinished)
            build(unfinished)
            unfinished.rename(path)
        return path


def empty_index(path: Path, dimension: int, *, kind: str, threads: int) -> Index:
    return Index.create(path, model_id=MODEL, representation="fc9", dimension=dimension, kind=kind, threads=threads)


def add_rows(index: Index, rows: Rows, first: int) -> None:
    """Adds rows as texts whose ids are their numbers, with a little metadata."""
    numbers = range(first, first + len(rows))
    index.add(
        "text",
        [f"{number:08d}" for number in numbers],
        rows,
        metadata=[{"shop": SHOPS[number % len(SHOPS)], "price": number % 100} for number in numbers],
    )


def hit_rows(found: Sequence[Sequence[Any]]) -> Answers:
    """The rows of the hits of our index."""
    return [[int(hit.id) for hit in hits] for hits in found]


def source_hash() -> str:
    """Of the code of the index."""
    folder = Path(dckt.index.__file__).parent
    text = b"".join(file.read_bytes() for file in sorted(folder.glob("*.py")))
    return hashlib.sha256(text).hexdigest()[:8]
