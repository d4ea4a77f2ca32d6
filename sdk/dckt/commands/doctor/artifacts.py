"""The health of a bundle and of an index."""

from __future__ import annotations

import sqlite3
from collections.abc import Generator, Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from dckt.commands.doctor.finding import Finding
from dckt.commands.doctor.machine import folder_finding
from dckt.commands.doctor.probes import ProbeError, ask
from dckt.console import size
from dckt.errors import DcktError

if TYPE_CHECKING:
    from dckt.bundle import Bundle
    from dckt.index import Index
    from dckt.index.results import MediumInfo

# Vectors outside the graph are searched exactly, which is right and slower.
_UNCOVERED = 0.1
# That compacting writes before it drops the old one.
_COPIES = 2


def read_bundle(path: Path) -> Bundle | Finding:
    """A bundle after every byte of it was compared with its hash; or why it cannot be used."""
    from dckt.bundle import Bundle

    try:
        bundle = Bundle.open(path)
        _ = bundle.vocabulary
    except DcktError as error:
        return Finding("bundle", "files", "problem", str(error), "copy it again, or export it again: dckt-export")
    return bundle


def bundle_findings(bundle: Bundle, *, devices: int) -> Iterator[Finding]:
    """What a sound bundle holds, and what of it runs here.

    Args:
        bundle: it was read with :func:`read_bundle`.
        devices: CUDA devices of this machine.
    """
    from dckt.preprocessing import tokenizer
    from dckt.runtime.tensorrt.cache import engines_folder

    manifest = bundle.manifest
    total = sum(entry.size for entry in manifest.files.values())
    yield Finding("bundle", "files", "ok", f"{len(manifest.files)} files, {size(total)}, every hash is right")
    yield Finding("bundle", "model", "ok", f"{manifest.model_id}, {manifest.representation}")
    try:
        tokenizer(manifest.text.tokenizer)
        yield Finding("bundle", "tokenizer", "ok", manifest.text.tokenizer)
    except DcktError as error:
        yield Finding("bundle", "tokenizer", "problem", str(error), "install the package that registers it")
    names = [variant.name for variant in manifest.variants]
    if devices and engines_folder(bundle.path).is_dir():
        built = yield from _engines(bundle)
        names += [f"tensorrt-{precision}" for precision in built]
    for name in names:
        yield _variant(bundle, name)
    yield _variant(bundle, "auto")


def _engines(bundle: Bundle) -> Generator[Finding, None, list[str]]:
    """Engines; gives the precisions of those that fit."""
    again = f"dckt engine {bundle.path} --force"
    try:
        answer = ask("engines", bundle.path)
    except ProbeError as error:
        yield Finding("bundle", "engines", "note", str(error), again)
        return []
    for name, reason in answer["others"].items():
        yield Finding("bundle", f"engine {name}", "note", reason, again)
    return list(dict.fromkeys(answer["fitting"]))


def _variant(bundle: Bundle, name: str) -> Finding:
    try:
        runs_on = ask("variant", bundle.path, name)["runs_on"]
    except ProbeError as error:
        if name == "auto":
            return Finding("bundle", "auto", "problem", str(error), "install what the variants above need")
        return Finding("bundle", f"variant {name}", "note", f"does not run here: {error}")
    if name == "auto":
        return Finding("bundle", "auto", "ok", f"takes {', '.join(runs_on)}")
    return Finding("bundle", f"variant {name}", "ok", f"runs, on {', '.join(one.split(' on ')[1] for one in runs_on)}")


# --- index --------------------------------------------------------------------------------------------------------


def index_findings(path: Path, bundle: Bundle | None) -> Iterator[Finding]:
    """Everything about an index.

    Args:
        path: its folder.
        bundle: the model that is to search it, or None.
    """
    from dckt.index import Index
    from dckt.index.store import INDEX_VERSION, ITEMS

    if path.is_dir():
        held = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        yield folder_finding("index", "folder", path, needed=_COPIES * held)
    version = _version(path / ITEMS)
    if version is not None and version < INDEX_VERSION:
        yield Finding(
            "index",
            "format",
            "note",
            f"format {version}; whatever opens it makes it format {INDEX_VERSION}, which an older dckt cannot read; "
            "nothing else was looked at, for that would open it",
            f"copy it if an older dckt is to read it; then dckt inspect {path}, and this again",
        )
        return
    try:
        with Index.open(path) as index:
            index.verify()
            yield from _opened(index, bundle)
    except DcktError as error:
        anew = f"restore a copy of it, or make it anew: dckt index BUNDLE {path} --force ..."
        yield Finding("index", "items", "problem", str(error), anew)


def _opened(index: Index, bundle: Bundle | None) -> Iterator[Finding]:
    info = index.info()
    items = sum(about.items for about in info.media.values())
    found = f"{items:,} items, {size(info.bytes)}, format {info.format_version}; all of it was read and is right"
    yield Finding("index", "items", "ok", found)
    model = f"{info.model_id}, {info.representation}"
    if bundle is None:
        yield Finding("index", "model", "ok", f"filled by {model}; no bundle was given to compare with")
    elif (info.model_id, info.representation) == (bundle.manifest.model_id, bundle.manifest.representation):
        yield Finding("index", "model", "ok", "filled by this bundle's model")
    else:
        yield Finding(
            "index",
            "model",
            "problem",
            f"filled by {model}; the bundle is {bundle.manifest.model_id}, {bundle.manifest.representation}",
            f"search with the bundle that filled it, or: dckt index {bundle.path} {info.path} --force ...",
        )
    for name, about in info.media.items():
        yield medium_finding(name, about, info.path)


def medium_finding(name: str, about: MediumInfo, path: str) -> Finding:
    """How one medium is searched, and whether that is as good as it should be.

    Args:
        name: of the medium.
        about: its state.
        path: of the index.
    """
    found = f"{about.items:,} items, {about.unique_vectors:,} different vectors, {about.search} search"
    if about.recall_at_10 is not None:
        graph = f"graph of {about.in_graph:,} vectors, ef {about.ef}" if about.search == "hnsw" else "a graph"
        found += f"; {graph}, recall at 10 {about.recall_at_10:.4f}"
    if about.search != "hnsw":
        if about.recall_at_10 is None:
            return Finding("index", name, "ok", found)
        found += ", which missed its target, so it is not used"
        return Finding("index", name, "note", found, f"for speed, ask for less: dckt tune {path} --recall 0.95")
    if about.in_graph < (1 - _UNCOVERED) * about.unique_vectors:
        return Finding("index", name, "note", f"{found}; the others are searched one by one", f"dckt compact {path}")
    return Finding("index", name, "ok", found)


def _version(path: Path) -> int | None:
    """The format of an index, read without changing anything; None where that cannot be known."""
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as connection:
            row = connection.execute("SELECT value FROM meta WHERE key = 'version'").fetchone()
        return int(row[0])
    except (sqlite3.Error, TypeError, ValueError):
        return None
