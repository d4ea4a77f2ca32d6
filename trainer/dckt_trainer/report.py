"""report.html of a run: figures first, then curves, then pictures of what queries found."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Plot
from numpy.typing import NDArray

from dckt.report import Card, Figure, Gallery, GalleryRow, Table, thumbnail, write_report
from dckt_trainer.data.corpus import Corpus, Pair
from dckt_trainer.evaluate import represent
from dckt_trainer.network import DomainNetwork
from dckt_trainer.pairs import PairSet
from dckt_trainer.runs import Run

QUERIES, SHOWN = 6, 5


def write_run_report(run: Run, corpus: Corpus, network: DomainNetwork, pairs: PairSet, device: torch.device) -> Path:
    """Writes report.html and its plots into the run folder.

    Args:
        run: whose evaluation and events are written already.
        corpus: the target.
        network: the target network that was kept.
        pairs: the test pairs, in the corpus's order.
        device: where the network is.
    """
    evaluation, events = run.evaluation, run.events("metrics")
    plots = {
        "validation.png": _validation_plot(evaluation["validation"]),
        "losses.png": _loss_plot([event for event in events if "weighted" in event]),
        "selection.png": _selection_plot(run.events("selection")),
    }
    for name, png in plots.items():
        (run.path / name).write_bytes(png)
    path = run.path / "report.html"
    facts = f"{run.source.name} → {run.target.name}, seed {run.config.seed}, started {run.facts['started']}"
    write_report(
        path,
        title="Cross-media transfer",
        subtitle=facts,
        sections=[
            map_table(evaluation),
            Figure("Validation MAP by round; round 0 is the target by itself", plots["validation.png"]),
            Figure("Weighted loss terms", plots["losses.png"]),
            Figure("Domain consistency and selection by round", plots["selection.png"]),
            *_galleries(corpus.part("test"), represent(network, pairs, device)),
        ],
    )
    return path


def map_table(evaluation: dict[str, Any]) -> Table:
    """MAP on the test split, with and without transfer."""
    names = {
        "model_t0": "no transfer",
        "last": "DCKT, last round",
        "best": "DCKT, best round",
    }
    test, kept = evaluation["test"], evaluation["kept"]
    rows = [
        (
            title + (" *" if key == kept else ""),
            str(test[key]["round"]),
            *(f"{test[key][way]:.3f}" for way in ("image_to_text", "text_to_image", "average")),
            "-".join(f"{bound:.3f}" for bound in test[key]["interval"]),
            f"{test[key]['lowest']:.3f}-{test[key]['highest']:.3f}",
            f"{test[key]['average_at_50']:.3f}",
        )
        for key, title in names.items()
    ]
    return Table(
        f"MAP on {test['pairs']} test pairs",
        ("target", "round", "I → T", "T → I", "average", "95 %", "ties", "@50"),
        tuple(rows),
        "* is kept. Image to text and text to image, mean average precision over the whole ranking by cosine of class "
        "probabilities; best round is that on validation, no transfer being round 0. 95 %: bootstrap over pairs. Equal "
        "similarities count by expectation; ties: the unluckiest and the luckiest order. @50: MAP over the first 50, "
        "divided by the relevant ones among them.",
    )


def _galleries(pairs: Sequence[Pair], vectors: dict[str, NDArray[np.float32]]) -> list[Gallery]:
    units = {medium: rows / np.linalg.norm(rows, axis=1, keepdims=True) for medium, rows in vectors.items()}
    # Spread over the split, which is sorted by class more often than not.
    queries = np.unique(np.linspace(0, len(pairs) - 1, QUERIES).astype(int))
    galleries = []
    for asked, found in (("image", "text"), ("text", "image")):
        similarity = units[asked][queries] @ units[found].T
        ranking = np.argsort(-similarity, axis=1, kind="stable")[:, :SHOWN]
        rows = []
        for place, query in enumerate(queries):
            results = tuple(
                _card(pairs[hit], found, f"{similarity[place, hit]:.3f}", pairs[hit].label == pairs[query].label)
                for hit in ranking[place]
            )
            rows.append(GalleryRow(_card(pairs[query], asked, "query", None), results))
        galleries.append(Gallery(f"{asked.capitalize()} in, {found}s out", tuple(rows)))
    return galleries


def _card(pair: Pair, medium: str, note: str, right: bool | None) -> Card:
    image = thumbnail(pair.image) if medium == "image" else None
    return Card(image, pair.text if medium == "text" else "", f"{pair.label} · {note}", right)


def _validation_plot(rounds: Sequence[dict[str, Any]]) -> bytes:
    plot = Plot(figsize=(8, 3.2), layout="constrained")
    axes = plot.subplots()
    for way, title in (("image_to_text", "image → text"), ("text_to_image", "text → image"), ("average", "average")):
        axes.plot([r["round"] for r in rounds], [r[way] for r in rounds], marker="o", label=title)
    axes.set(xlabel="round", ylabel="validation MAP")
    axes.legend()
    return _png(plot)


def _loss_plot(events: Sequence[dict[str, Any]]) -> bytes:
    plot = Plot(figsize=(8, 3.6), layout="constrained")
    axes = plot.subplots()
    rounds = [event for event in events if event["stage"].startswith("round/")]
    for name in rounds[0]["weighted"] if rounds else ():
        numbers = [int(event["stage"].removeprefix("round/")) for event in rounds]
        axes.plot(numbers, [event["weighted"][name] for event in rounds], marker=".", label=name)
    axes.set(xlabel="round", ylabel="weight x mean value")
    if rounds:
        axes.legend(fontsize=6, ncols=2)
    return _png(plot)


def _selection_plot(events: Sequence[dict[str, Any]]) -> bytes:
    plot = Plot(figsize=(8, 3.2), layout="constrained")
    left, right = plot.subplots(1, 2)
    numbers = [event["round"] for event in events]
    for key, title in (("mean_consistency", "all pairs"), ("mean_consistency_selected", "selected pairs")):
        left.plot(numbers, [event[key] for event in events], marker="o", label=title)
    left.set(xlabel="round", ylabel="mean AP, both directions added")
    left.legend()
    right.bar(numbers, [len(event["selected"]) for event in events])
    right.set(xlabel="round", ylabel="pairs selected")
    return _png(plot)


def _png(plot: Plot) -> bytes:
    FigureCanvasAgg(plot)
    buffer = io.BytesIO()
    plot.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
