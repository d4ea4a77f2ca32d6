"""What a bundle holds, as JSON holds it, and as tables for ``dckt inspect``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table

from dckt.bundle import MANIFEST, Bundle, Manifest
from dckt.console import clean, flat, shown, size
from dckt.errors import BundleError
from dckt.runtime.onnx import graph_ports
from dckt.runtime.tensorrt.cache import ENGINE, engines_folder, read_engine

_HASH = 16  # digits that people compare; JSON has all of them

Rows = Sequence[Sequence[str]]


def describe_bundle(path: Path) -> dict[str, Any]:
    """The manifest, and what it leaves to the files: size, hash, inputs and outputs of each graph; engines.

    Raises:
        BundleError: see :meth:`dckt.bundle.Bundle.open`.
        BundleCorruptError: ONNX Runtime cannot load a graph.
    """
    bundle = Bundle.open(path)
    manifest = bundle.manifest
    about = asdict(manifest)
    for precision, of in about["graphs"].items():
        for medium, graph in of.items():
            inputs, outputs = graph_ports(bundle.graph(medium, precision))
            graph |= {
                "share": _share(graph["layers"], precision),
                "bytes": _bytes(manifest, graph["file"]),
                "inputs": [port._asdict() for port in inputs],
                "outputs": [port._asdict() for port in outputs],
            }
    return {
        "what": "bundle",
        "path": str(path),
        "format_version": json.loads((path / MANIFEST).read_text(encoding="utf-8"))["version"],
        "bytes": sum(entry.size for entry in manifest.files.values()),
        **about,
        "precisions": {
            precision: {
                "share": _share(_sum(graph["layers"] for graph in of.values()), precision),
                "bytes": sum(graph["bytes"] for graph in of.values()),
            }
            for precision, of in about["graphs"].items()
        },
        "engines": [_engine(file.parent) for file in sorted(engines_folder(path).glob(f"[!.]*/{ENGINE}"))],
    }


def bundle_tables(about: Mapping[str, Any]) -> Group:
    """What :func:`describe_bundle` found, for the terminal."""
    fp32 = about["precisions"]["fp32"]["bytes"]
    precisions = [
        (name, _percent(one["share"]), size(one["bytes"]), f"{one['bytes'] / fp32:.1%}")
        for name, one in about["precisions"].items()
    ]
    graphs = [graph for of in about["graphs"].values() for graph in of.values()]
    layers = [(graph["file"], _layers(graph["layers"]), size(graph["bytes"])) for graph in graphs]
    ports = [(graph["file"], _ports(graph["inputs"]), _ports(graph["outputs"])) for graph in graphs]
    files = [(name, size(entry["size"]), entry["sha256"][:_HASH]) for name, entry in sorted(about["files"].items())]
    measured = dict(about["measured"])
    tried = measured.pop("variants", {})
    parts = [
        _table("", ["", ""], _head(about), header=False),
        _table("precisions", ["graphs in", "layers that compute in it", "size", "of fp32"], precisions),
        _table("graphs", ["file", "layers by precision", "size"], layers),
        _table("inputs and outputs", ["graph", "takes", "gives"], ports),
        *_variants(about["variants"], tried if isinstance(tried, Mapping) else {}),
        _table("measured", ["", ""], list(flat(measured)), header=False) if measured else None,
        _table("files", ["file", "size", f"sha256, first {_HASH} digits"], files),
        _table("engines", ["folder", "precision", "built for"], [_engine_row(engine) for engine in about["engines"]])
        if about["engines"]
        else None,
    ]
    return Group(*(part for part in parts if part is not None))


# --- the parts ----------------------------------------------------------------------------------------------------


def _head(about: Mapping[str, Any]) -> list[tuple[str, str]]:
    widths = dict(about["dimensions"])
    default = about["representation"]
    others = [f"{name} ({width})" for name, width in widths.items() if name != default]
    smallest, usual, largest = about["profile"]
    return [
        ("bundle", f"{about['path']}, format {about['format_version']}, {size(about['bytes'])}"),
        ("model id", about["model_id"]),
        ("made", f"{about['created']}, by {_sentence(about['produced_by'])}"),
        ("representation", f"{default} ({widths[default]})" + (f"; also {', '.join(others)}" if others else "")),
        (f"labels ({len(about['labels'])})", ", ".join(about["labels"])),
        ("pictures", _sentence(about["image"])),
        ("texts", _sentence(about["text"])),
        ("profile", f"engines take batches of {smallest} to {largest}, and are fastest at {usual}"),
    ]


def _variants(variants: Sequence[Mapping[str, str]], tried: Mapping[str, Any]) -> Iterator[Table]:
    """The variants that serve; then a table for each kind of figure that was measured of them."""
    names = [variant["name"] for variant in variants]
    rows = [(variant["name"], variant["runtime"], variant["graph"], variant["precision"]) for variant in variants]
    yield _table("variants, fastest on a CPU first", ["name", "runtime", "graphs", "computes in"], rows)
    order = [name for name in names if name in tried] + [name for name in tried if name not in names]
    kinds: dict[tuple[int, tuple[str, ...]], list[tuple[str, tuple[str, ...], list[str]]]] = {}
    for name in order:
        for where, values in _figures(tried[name]):
            row = (name, where, [shown(value) for value in values.values()])
            kinds.setdefault((len(where), tuple(values)), []).append(row)
    for (depth, keys), found in kinds.items():
        # What all rows have in common is the title; what differs is a column.
        common = [level for level in range(depth) if len({where[level] for _, where, _ in found}) == 1]
        title = ", ".join(found[0][1][level] for level in common) or "size and speed"
        figures: list[tuple[str, ...]] = [
            (name, " / ".join(part for level, part in enumerate(where) if level not in common), *values)
            for name, where, values in found
        ]
        yield _table(title, ["variant", "", *keys], figures, numbers=len(keys))
    refused = [
        (name, str(reason))
        for name in order
        if isinstance(tried[name], Mapping)
        for reason in tried[name].get("refused", ())
    ]
    if refused:
        yield _table("refused by the gate", ["variant", "why"], refused)


def _figures(of: object, where: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """Every mapping in nested mappings that holds single values, with the keys that lead to it; lists are left out."""
    if not isinstance(of, Mapping):
        return
    repeated = () if where else ("name", "runtime", "graph", "precision")  # the table of variants has these
    values = {
        key: value for key, value in of.items() if isinstance(value, str | int | float | None) and key not in repeated
    }
    if values:
        yield where, values
    for key, value in of.items():
        yield from _figures(value, (*where, str(key).replace("_", " ")))


def _engine(folder: Path) -> dict[str, Any]:
    try:
        engine = read_engine(folder)
    except BundleError as error:
        return {"name": folder.name, "error": str(error)}
    return {"name": folder.name, "precision": engine.precision, "machine": asdict(engine.machine)}


def _engine_row(engine: Mapping[str, Any]) -> tuple[str, str, str]:
    if "error" in engine:
        return engine["name"], "-", engine["error"]
    return engine["name"], engine["precision"], _sentence(engine["machine"])


# --- how things are written ---------------------------------------------------------------------------------------


def _table(title: str, columns: Sequence[str], rows: Rows, *, header: bool = True, numbers: int = 0) -> Table:
    """A table without lines. The last ``numbers`` columns are to the right; a first cell is not written twice."""
    table = Table(
        box=None,
        show_header=header,
        pad_edge=False,
        title=f"\n{title}" if title else None,
        title_justify="left",
        title_style="bold",
        header_style="dim",
    )
    for place, column in enumerate(columns):
        right = place >= len(columns) - numbers
        table.add_column(
            clean(column.replace("_", " ")),
            justify="right" if right else "left",
            overflow="fold",
            style="bold" if not header and place == 0 else "",
            no_wrap=place == 0,
        )
    before = None
    for row in rows:
        first = "" if header and row[0] == before else row[0]
        table.add_row(*map(clean, (first, *row[1:])))
        before = row[0]
    return table


def _sentence(of: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in flat(of))


def _ports(ports: Sequence[Mapping[str, Any]]) -> str:
    return "; ".join(
        f"{port['name']} {port['dtype']} ({', '.join('any' if size is None else str(size) for size in port['shape'])})"
        for port in ports
    )


def _layers(layers: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {precision}" for precision, count in layers.items()) or "not counted"


def _percent(share: float | None) -> str:
    return "not counted" if share is None else f"{share:.1%}"


def _bytes(manifest: Manifest, file: str) -> int:
    """Of a graph with its external data."""
    return sum(entry.size for name, entry in manifest.files.items() if name in {file, f"{file}.data"})


def _share(layers: Mapping[str, int], precision: str) -> float | None:
    total = sum(layers.values())
    return layers.get(precision, 0) / total if total else None


def _sum(counts: Iterator[Mapping[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for one in counts:
        for precision, count in one.items():
            total[precision] = total.get(precision, 0) + count
    return total
