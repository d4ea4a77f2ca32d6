"""What a segment says about itself, and about its graph.

Shape letters: N rows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dckt.index.hnsw import EF_CONSTRUCTION, SPACE, M
from dckt.index.schema import Head

SEGMENT_VERSION = 2  # of 1, it was not known which rows the graph cannot find
GRAPH = "graph.hnsw"
VECTORS = "vectors.npy"
MANIFEST = "manifest.json"
FILES = ("labels.npy", VECTORS, "items.npy", "ids.npy", "ids.bin", "metadata.npy", "metadata.bin")


class SegmentError(Exception):
    """Why a segment cannot be used; it never leaves the index."""


@dataclass(frozen=True, kw_only=True)
class GraphReport:
    """What was measured when the graph of one medium was last built or tuned.

    Attributes:
        graph: random, different for every graph that was built.
        count: rows that it covered.
        effort: of a search.
        recall: recall@10 against exact search, on a sample of the vectors, disturbed.
        accepted: whether that was enough. If not, search stays exact.
        seconds: how long building and measuring took.
        strays: rows that the graph holds and cannot find, ascending.
    """

    graph: str
    count: int
    effort: int
    recall: float
    accepted: bool
    seconds: float
    strays: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a segment says about itself, as far as it is not what every segment of its medium says.

    Attributes:
        head: the commit that it belongs to.
        rows: how many.
        total: of the checksums of its items, in SQLite.
        report: on its graph, or on one that was refused, or None.
        files: size and SHA-256 of the pieces, by name.
    """

    head: Head
    rows: int
    total: int
    report: GraphReport | None
    files: Mapping[str, tuple[int, Sequence[str]]]


def read_manifest(path: Path, *, index_id: str, medium: str, dimension: int) -> Manifest:
    """The description of a segment.

    Raises:
        SegmentError: it is damaged, of another version, or of another index.
    """
    try:
        content = json.loads((path / MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise SegmentError(f"its manifest cannot be read ({error})") from error
    if not isinstance(content, dict) or content.pop("checksum", None) != checksum_of(content):
        raise SegmentError("its manifest was altered")
    for key, value in description(index_id=index_id, medium=medium, dimension=dimension).items():
        if content.get(key) != value:
            raise SegmentError(f"its {key} is {content.get(key)!r}, expected {value!r}")
    return manifest_of(content)


def manifest_of(content: Mapping[str, Any]) -> Manifest:
    """The description from JSON, whose checksum fits."""
    try:
        report = _report(content["report"])
        manifest = Manifest(
            head=Head(content["sequence"], content["token"]),
            rows=content["rows"],
            total=content["total"],
            report=report,
            files={name: (file["bytes"], file["sha256"]) for name, file in content["files"].items()},
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise SegmentError(f"its manifest is not whole ({error!r})") from error
    sound = (
        _are_counts(manifest.head.sequence, manifest.rows, manifest.total)
        and _are(str, manifest.head.token)
        and manifest.files.keys() - {GRAPH} == set(FILES)
        and all(_are_counts(size) and _are(list, pieces) for size, pieces in manifest.files.values())
    )
    if report is not None:
        sound = sound and (
            _are(str, report.graph)
            and _are_counts(report.count, report.effort)
            and _are((int, float), report.recall, report.seconds)
            and _are(bool, report.accepted)
            and _are_counts(*report.strays)
            and max(report.strays, default=-1) < manifest.rows
        )
    if GRAPH in manifest.files:
        sound = sound and report is not None and report.accepted and min(report.count, report.effort) > 0
    if not sound:
        raise SegmentError("its manifest holds values that no segment has")
    return manifest


def _report(content: Mapping[str, Any] | None) -> GraphReport | None:
    return None if content is None else GraphReport(**{**content, "strays": tuple(content["strays"])})


def _are(kind: type | tuple[type, ...], *values: object) -> bool:
    return all(isinstance(value, kind) for value in values)


def _are_counts(*values: object) -> bool:
    return all(type(value) is int and 0 <= value < 2**63 for value in values)


def description(*, index_id: str, medium: str, dimension: int) -> dict[str, Any]:
    """What every segment of a medium says about itself."""
    return {
        "version": SEGMENT_VERSION,
        "index_id": index_id,
        "medium": medium,
        "dimension": dimension,
        "space": SPACE,
        "M": M,
        "ef_construction": EF_CONSTRUCTION,
    }


def checksum_of(content: Any) -> str:
    """Of a description, without its own."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
