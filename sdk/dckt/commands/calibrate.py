"""``dckt calibrate``: finds the similarity from which on a hit fits, and stores it in the bundle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dckt.commands.options import AsJson, BundlePath, Device, Threads, Variant
from dckt.console import print_json, print_table, progress_bar, say
from dckt.errors import CorpusError

if TYPE_CHECKING:
    from dckt.calibration import Calibration
    from dckt.collect import Item
    from dckt.model import Model

EXAMPLES = """
Examples:

  dckt calibrate shop.dckt --pairs corpus/

  dckt calibrate shop.dckt --pairs corpus/ --split test --json
"""


def calibrate_command(
    bundle: BundlePath,
    pairs: Annotated[
        Path,
        typer.Option(help="Corpus of labelled pairs that the model was not trained on, as for dckt index --pairs."),
    ],
    split: Annotated[str | None, typer.Option(help="Only pairs of this split; all: every pair.")] = "val",
    batch_size: Annotated[int, typer.Option(help="Items that are encoded at once.")] = 32,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print; do not store it in the bundle.")] = False,
    as_json: AsJson = False,
    variant: Variant = "auto",
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Measures on labelled pairs from which similarity on a hit fits, and stores the thresholds in the bundle.

    Then dckt search --calibrated drops hits that do not fit. Also says how each representation retrieves, alone and
    as a second stage. The model's vectors stay what they are, and so do its indexes.
    """
    from dckt.bundle import with_calibration
    from dckt.model import Model, open_bundle

    opened = open_bundle(bundle)
    manifest = opened.manifest
    others = [name for name in manifest.dimensions if name != manifest.representation]
    chosen = None if split == "all" else split
    with Model.open(opened, variant=variant, device=device, threads=threads, also=others) as model:
        found = calibrate_model(model, pairs, split=chosen, batch_size=batch_size)
    if not dry_run:
        with_calibration(opened, found)
    if as_json:
        print_json({"bundle": str(bundle), "stored": not dry_run, **found.as_json()})
    else:
        _show(found)
        say("not stored" if dry_run else f"stored in {bundle}")


def calibrate_model(model: Model, pairs: Path, *, split: str | None, batch_size: int = 32) -> Calibration:
    """Encodes a corpus of labelled pairs and chooses thresholds.

    Args:
        model: with every representation that is to be compared.
        pairs: see :func:`dckt.collect.collect_pairs`.
        split: only these; None: all.
        batch_size: items that are encoded at once.

    Raises:
        CorpusError: see :func:`dckt.collect.collect_pairs`; or pairs have no label.
        ImageError, TextError: an item cannot be encoded.
        ConfigError: ``batch_size`` is below 1.
    """
    from dckt.calibration import calibrate
    from dckt.collect import collect_pairs, media_of_corpus
    from dckt.errors import ConfigError

    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}; expected at least 1")
    media = [medium for medium in media_of_corpus(pairs) if medium in model.bundle.media]
    collection = collect_pairs(pairs, split=split, media=media)
    unlabelled = [item.id for item in collection.images if "label" not in item.metadata]
    if unlabelled:
        raise CorpusError(
            f"{pairs}: {len(unlabelled)} of {len(collection.images)} pairs have no label, {unlabelled[0]!r} among "
            "them; a pair fits another if both have one label"
        )
    items: dict[str, Sequence[Item[Any]]] = {
        "image": collection.images,
        "text": collection.texts,
        **collection.features,
    }
    vectors: dict[str, dict[str, Any]] = {}
    total = len(items) * len(collection.images)
    with progress_bar("encoding", total) as progress:
        done = 0
        for medium, of in items.items():

            def advance(count: int, before: int = done) -> None:
                progress(before + count, total)

            for name, rows in _encode(model, medium, of, batch_size, advance).items():
                vectors.setdefault(name, {})[medium] = rows
            done += len(of)
    return calibrate(
        vectors,
        [str(item.metadata["label"]) for item in collection.images],
        representation=model.bundle.manifest.representation,
        pairs={"corpus": pairs.name, "split": split},
    )


def _encode(
    model: Model, medium: str, items: Sequence[Item[Any]], batch_size: int, progress: Callable[[int], None]
) -> dict[str, Any]:
    """Vectors (N, D) by representation."""
    import numpy as np

    parts: dict[str, list[Any]] = {}
    for start in range(0, len(items), batch_size):
        sources = [item.source for item in items[start : start + batch_size]]
        for name, rows in model.encode(medium, model.prepare_all(medium, sources)).items():
            parts.setdefault(name, []).append(rows)
        progress(start + len(sources))
    return {name: np.concatenate(rows) for name, rows in parts.items()}


def _show(found: Calibration) -> None:
    rows = [
        (direction.replace("_", " "), name.replace("_", " "), *(getattr(threshold, figure) for figure in _FIGURES))
        for direction, of in found.thresholds.items()
        for name, threshold in of.items()
    ]
    print_table(["direction", "threshold", *_FIGURES], rows, title="keeping the hits from this similarity on")
    ranks = [
        (name, direction.replace("_", " "), quality.map, *quality.recall.values())
        for name, of in found.ranking.items()
        for direction, quality in of.items()
    ]
    cuts = next(iter(next(iter(found.ranking.values())).values())).recall
    title = (
        f"\nhow each representation retrieves; of two, the second reorders {found.candidates} candidates of the first"
    )
    print_table(["ranked by", "direction", "MAP", *(f"partner in {k}" for k in cuts)], ranks, title=title)


_FIGURES = ("similarity", "precision", "recall", "f1", "answered", "mistaken")
