"""The graph of one medium on disk: ``graph.MEDIUM.hnsw``, described by ``graph.MEDIUM.json``.

A cache and nothing else. The description holds the checksum of the graph and its own; when anything does not match, the
snapshot counts as absent and the graph is built again from the items. hnswlib never sees a byte that was not verified.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dckt.files import atomic_write, sha256_file
from dckt.index.hnsw import EF_CONSTRUCTION, PAGE, SPACE, HnswGraph, M

SNAPSHOT_VERSION = 1


class SnapshotError(Exception):
    """Why a snapshot cannot be used; it never leaves the index."""


@dataclass(frozen=True, kw_only=True)
class GraphReport:
    """What was measured when the graph of one medium was last built.

    Attributes:
        count: unique vectors that it covered.
        ef: effort of a search.
        recall: recall@10 against exact search, on a sample of the vectors, disturbed.
        accepted: whether that was enough. If not, search stays exact.
        seconds: how long building and measuring took.
    """

    count: int
    ef: int
    recall: float
    accepted: bool
    seconds: float


def write_snapshot(
    folder: Path, *, index_id: str, medium: str, dimension: int, report: GraphReport, graph: HnswGraph | None
) -> None:
    """Writes the graph and then its description, each whole or not at all.

    Args:
        folder: of the index.
        index_id: of the index, so that a graph copied from another one is noticed.
        medium: whose vectors these are.
        dimension: their width.
        report: what was measured.
        graph: None when it was measured and not accepted; then only that is kept.

    Raises:
        OSError: the disk refuses.
    """
    path = _graph_path(folder, medium)
    digest = None
    if graph is None:
        path.unlink(missing_ok=True)
    else:
        partial = path.with_name(f".{path.name}.partial")
        try:
            graph.save(partial)
            digest = sha256_file(partial)
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    content = {
        **_description(index_id=index_id, medium=medium, dimension=dimension),
        **asdict(report),
        "sha256": digest,
    }
    # atomic_write also makes the rename of the graph durable.
    atomic_write(_description_path(folder, medium), json.dumps({**content, "checksum": _checksum(content)}, indent=1))


def read_snapshot(
    folder: Path, *, index_id: str, medium: str, dimension: int
) -> tuple[GraphReport, HnswGraph | None] | None:
    """The graph as it was last written, or None when none was written.

    Raises:
        SnapshotError: there is one and it is damaged, of another version, or of another index.
    """
    try:
        content = json.loads(_description_path(folder, medium).read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise SnapshotError(f"its description cannot be read ({error})") from error
    if not isinstance(content, dict) or content.pop("checksum", None) != _checksum(content):
        raise SnapshotError("its description was altered")
    expected = _description(index_id=index_id, medium=medium, dimension=dimension)
    for key, value in expected.items():
        if content[key] != value:
            raise SnapshotError(f"its {key} is {content[key]!r}, expected {value!r}")
    report = GraphReport(**{key: content[key] for key in GraphReport.__dataclass_fields__})
    if not report.accepted:
        return report, None
    path = _graph_path(folder, medium)
    try:
        if sha256_file(path) != content["sha256"]:
            raise SnapshotError("the graph is not the one that was written")
        graph = HnswGraph.load(path, dimension=dimension, ef=report.ef)
    except OSError as error:
        raise SnapshotError(f"the graph cannot be read ({error})") from error
    return report, graph


def _graph_path(folder: Path, medium: str) -> Path:
    return folder / f"graph.{medium}.hnsw"


def _description_path(folder: Path, medium: str) -> Path:
    return folder / f"graph.{medium}.json"


def _description(*, index_id: str, medium: str, dimension: int) -> dict[str, Any]:
    return {
        "version": SNAPSHOT_VERSION,
        "index_id": index_id,
        "medium": medium,
        "dimension": dimension,
        "space": SPACE,
        "M": M,
        "ef_construction": EF_CONSTRUCTION,
        "page": PAGE,
    }


def _checksum(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
