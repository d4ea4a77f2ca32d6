"""What a person looks at after a run: report.html and its plots; and the same figures as data, analysis.json."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dckt.errors import ImageError
from dckt.files import atomic_write
from dckt.report import Card, Figure, Gallery, GalleryRow, Section, Table, thumbnail, write_report
from dckt_trainer import plots
from dckt_trainer.analysis import AnyPair, Vectors, confusions, retrieval, selection
from dckt_trainer.data.feature_corpus import AnyCorpus
from dckt_trainer.evaluate import Answers
from dckt_trainer.media import MEDIA, directions, in_words, is_direction
from dckt_trainer.runs import Run

QUERIES, WORST, SHOWN = 6, 4, 5  # queries of a gallery, of one of failures, and results of each
LONGEST_TEXT = 400  # characters of a text that a card shows
MOST_BARS = 40  # classes that a plot of bars has room for
MOST_CELLS = 60  # classes that a heat map has room for
MOST_CONFUSED = 20

_UNLABELLED = (
    "The target's labels were unknown to the training; here they say what fits, and where there are none the partner "
    "alone does, which makes average precision its reciprocal rank. "
)
_SHORT = {"image_to_text": "I → T", "text_to_image": "T → I"}
_NAMES = {"model_t0": "no transfer", "last": "last round", "best": "best round"}


def write_run_report(run: Run, corpus: AnyCorpus, before: Answers, kept: Answers) -> Path:
    """Writes report.html, its plots, and analysis.json into the run folder.

    Args:
        run: whose evaluation and events are written already.
        corpus: the target.
        before: what Model_t(0) says of the test pairs, in the corpus's order.
        kept: likewise the target model that is kept.

    Returns:
        The path of the page.
    """
    evaluation, metrics, rounds = run.evaluation, run.events("metrics"), run.events("selection")
    test, train = corpus.part("test"), corpus.part("train")
    networks = {"model_t0": before, evaluation["kept"]: kept}
    labelled = run.config.target.labels == "known"  # else the model answers with clusters, which have no true class
    analysis = {
        "kept": evaluation["kept"],
        "test": [pair.id for pair in test],
        "networks": {
            name: {
                **retrieval(said.vectors, test),
                **({"confusion": confusions(said.probability, corpus.labels, test)} if labelled else {}),
            }
            for name, said in networks.items()
        },
        "selection": selection(rounds, train),
    }
    atomic_write(run.path / "analysis.json", json.dumps(analysis, ensure_ascii=False))
    sections = [
        map_table(evaluation),
        *direction_tables(evaluation),
        _validation(evaluation["validation"]),
        _precision_recall(analysis),
        *_by_class(analysis, corpus),
        *([_confusion(analysis, corpus.labels)] if labelled else []),
        *_selection(rounds, analysis["selection"], train),
        *_losses(metrics),
        *_galleries(test, kept.vectors, analysis),
        _settings(run),
    ]
    folder = run.path / "plots"
    folder.mkdir(exist_ok=True)
    for section in sections:
        if isinstance(section, Figure):
            atomic_write(folder / f"{section.title.split(':')[0].lower().replace(' ', '-')}.png", section.png)
    path = run.path / "report.html"
    write_report(path, title="Cross-media transfer", subtitle=_subtitle(run), sections=sections)
    return path


def map_table(evaluation: dict[str, Any]) -> Table:
    """MAP on the test split, with and without transfer."""
    test, kept = evaluation["test"], evaluation["kept"]
    ways = _ways(test[kept])
    shown = ways if set(ways) == set(_SHORT) else []  # more have a table of their own
    rows = [
        (
            title + (" *" if key == kept else ""),
            str(test[key]["round"]),
            *(f"{test[key][way]:.3f}" for way in (*shown, "average")),
            "-".join(f"{bound:.3f}" for bound in test[key]["interval"]),
            f"{test[key]['lowest']:.3f}-{test[key]['highest']:.3f}",
            f"{test[key]['average_at_50']:.3f}",
        )
        for key, title in _NAMES.items()
    ]
    return Table(
        f"MAP on {test['pairs']} test pairs",
        ("target", "round", *map(_arrow, shown), "average", "95 %", "ties", "@50"),
        tuple(rows),
        "* is kept. "
        + ("" if evaluation.get("labels", "known") == "known" else _UNLABELLED)
        + ("Image to text and text to image, mean" if shown else "Means over all directions; mean")
        + " average precision over the whole ranking by cosine. Round 0 is without transfer (a linear model has one "
        "more, which takes the source in); best is the one that validation chose. 95 %: bootstrap over pairs. Equal "
        "similarities count by expectation; ties: the unluckiest and the luckiest order. @50: MAP over the first 50, "
        "divided by the relevant ones among them.",
    )


def direction_tables(evaluation: dict[str, Any]) -> list[Table]:
    """MAP of every direction on the test split, where there are more than two."""
    test, kept = evaluation["test"], evaluation["kept"]
    ways = _ways(test[kept])
    if set(ways) == set(_SHORT):
        return []
    rows = [(in_words(way), *(f"{test[key][way]:.3f}" for key in _NAMES)) for way in ways]
    columns = [title + (" *" if key == kept else "") for key, title in _NAMES.items()]
    return [Table("MAP by direction", ("direction", *columns), rows, "Queries of one medium find items of another.")]


def _ways(figures: Mapping[str, Any]) -> list[str]:
    return [key for key in figures if is_direction(key)]


def _arrow(way: str) -> str:
    return _SHORT.get(way, way.replace("_to_", " → "))


# --- what came out ----------------------------------------------------------------------------------------------


def _validation(rounds: Sequence[Mapping[str, Any]]) -> Figure:
    numbers = [entry["round"] for entry in rounds]
    series = {in_words(way): (numbers, [entry[way] for entry in rounds]) for way in (*_ways(rounds[0]), "average")}
    averages = [entry["average"] for entry in rounds]
    best = int(np.argmax(averages))
    return Figure(
        "Validation MAP",
        plots.curves({"": series}, x="round", y="validation MAP"),
        "Round 0 is the target by itself, without transfer.",
        f"Line plot of validation MAP by round; the average begins at {averages[0]:.3f}, ends at {averages[-1]:.3f}, "
        f"and is highest in round {numbers[best]} with {averages[best]:.3f}.",
    )


def _precision_recall(analysis: Mapping[str, Any]) -> Figure:
    panels = {
        in_words(way): {
            _NAMES[name]: (network[way]["recall"], network[way]["precision"])
            for name, network in analysis["networks"].items()
        }
        for way in _ways(analysis["networks"][analysis["kept"]])
    }
    return Figure(
        "Precision and recall",
        plots.curves(panels, x="recall", y="precision", whole_x=False, unit=True),
        "Mean over the test queries: how pure the results are by the time that a share of the relevant ones is found.",
        "Line plots of precision against recall on the test pairs, for each direction, with and without transfer.",
    )


def _by_class(analysis: Mapping[str, Any], corpus: AnyCorpus) -> list[Section]:
    networks, kept = analysis["networks"], analysis["kept"]
    ways = _ways(networks[kept])
    averages = {
        name: {
            label: sum(network[way]["per_class"][label] for way in ways) / len(ways)
            for label in network[ways[0]]["per_class"]
        }
        for name, network in networks.items()
    }
    order = sorted(averages[kept], key=lambda label: -averages[kept][label])
    if len(order) > MOST_BARS:
        shown, which = [*order[: MOST_BARS // 2], *order[-MOST_BARS // 2 :]], "The easiest and the hardest classes"
    else:
        shown, which = order, "All classes"
    figure = Figure(
        "MAP by class",
        plots.bars_by_class(
            {_NAMES[name]: [of[label] for label in shown] for name, of in averages.items()},
            shown,
            x=f"test MAP, mean of {'both' if len(ways) == 2 else 'all'} directions",
        ),
        f"{which}, by the MAP of the network that is kept. A class of few test pairs varies much by chance.",
        f"Bars of MAP by class; the easiest is {order[0]} with {averages[kept][order[0]]:.3f}, the hardest "
        f"{order[-1]} with {averages[kept][order[-1]]:.3f}.",
    )
    pairs = {part: _counts(corpus.part(part)) for part in ("train", "test")}
    selected = analysis["selection"]
    rows = [
        (
            label,
            pairs["train"].get(label, 0),
            pairs["test"].get(label, 0),
            *(f"{networks[name][way]['per_class'][label]:.3f}" for name in networks for way in ways),
            f"{selected['per_class'].get(label, 0):.2f}" if selected["rounds"] else None,
        )
        for label in order
    ]
    headings = [f"{_arrow(way)}, {name}" for name in ("no transfer", "kept") for way in ways]
    table = Table(
        "Every class",
        ("class", "train pairs", "test pairs", *headings, "selected"),
        rows,
        "MAP on test, easiest class first. Selected: the share of its training pairs that a round took, on average.",
        folded=True,
    )
    return [figure, table]


def _counts(pairs: Iterable[AnyPair]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for pair in pairs:
        counts[pair.label] = counts.get(pair.label, 0) + 1
    return counts


def _confusion(analysis: Mapping[str, Any], classes: Sequence[str]) -> Section:
    found = analysis["networks"][analysis["kept"]]["confusion"]
    if len(classes) <= MOST_CELLS:
        number = {label: place for place, label in enumerate(classes)}
        counts = {}
        for medium, cells in found.items():
            counts[medium] = np.zeros((len(classes), len(classes)), np.int64)
            for true, answered, count in cells:
                counts[medium][number[true], number[answered]] = count
        right = ", ".join(
            f"{np.trace(cells) / cells.sum():.3f} of the {_plural(medium)}" for medium, cells in counts.items()
        )
        return Figure(
            "Confusion of classes",
            plots.confusion(counts, classes),
            f"The likeliest class of each test item, by the network that is kept; right are {right}.",
            f"Heat maps of true against answered class; on the diagonal are {right}.",
        )
    rows = sorted(
        (-count, medium, true, answered)
        for medium, cells in found.items()
        for true, answered, count in cells
        if true != answered
    )
    return Table(
        "Classes that are confused most",
        ("medium", "true", "answered", "pairs"),
        [(medium, true, answered, -count) for count, medium, true, answered in rows[:MOST_CONFUSED]],
        "The likeliest class of each test item, by the network that is kept; analysis.json has all.",
    )


def _plural(medium: str) -> str:
    return f"{medium}s" if medium in MEDIA else f"{medium} vectors"


def _galleries(pairs: Sequence[AnyPair], vectors: Vectors, analysis: Mapping[str, Any]) -> list[Section]:
    """What test queries found among pictures and texts; of vectors there is nothing to see."""
    if not _pictured(pairs):
        return []
    units = {
        medium: rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)
        for medium, rows in vectors.items()
    }
    # Spread over the split, which is sorted by class more often than not.
    spread = np.unique(np.linspace(0, len(pairs) - 1, QUERIES).astype(int))
    galleries: list[Section] = []
    for way, (asked, found) in directions(MEDIA).items():
        precision = np.array(analysis["networks"][analysis["kept"]][way]["per_query"])
        worst = _of_different_classes(np.argsort(precision, kind="stable"), pairs)[:WORST]
        for queries, suffix, note in (
            (spread, "", "Queries spread evenly over the test pairs."),
            (worst, ": the worst", "The lowest average precision, one query of a class."),
        ):
            similarity = units[asked][queries] @ units[found].T
            ranking = np.argsort(-similarity, axis=1, kind="stable")[:, :SHOWN]
            rows = []
            for place, query in enumerate(queries):
                results = tuple(
                    _card(pairs[hit], found, f"{similarity[place, hit]:.3f}", pairs[hit].label == pairs[query].label)
                    for hit in ranking[place]
                )
                rows.append(GalleryRow(_card(pairs[query], asked, f"query, AP {precision[query]:.3f}"), results))
            galleries.append(Gallery(f"{asked.capitalize()} in, {found}s out{suffix}", rows, note))
    return galleries


def _of_different_classes(places: Iterable[int], pairs: Sequence[AnyPair]) -> list[int]:
    """The first place of each class, in the order given."""
    first: dict[str, int] = {}
    for place in places:
        first.setdefault(pairs[place].label, int(place))
    return list(first.values())


# --- how it came about ------------------------------------------------------------------------------------------


def _selection(
    events: Sequence[Mapping[str, Any]], chosen: Mapping[str, Any], pairs: Sequence[AnyPair]
) -> list[Section]:
    if not events:
        return []
    rounds = [event["round"] for event in events]
    histograms = [event["histogram"] for event in events]
    low, high = (pick(h[key] for h in histograms) for pick, key in ((min, "low"), (max, "high")))
    return [
        Figure(
            "Selection by round",
            plots.score_history(
                rounds,
                *_on_one_range(histograms, low, high),
                np.array([event["quantiles"] for event in events]),
                [event["mean_consistency_selected"] for event in events],
                [len(event["selected"]) for event in events],
            ),
            "Score: how consistent a training pair of the target is with the source network; by default the average "
            "precisions of its picture and of its text, added.",
            f"Heat map of the scores by round, the median going from {events[0]['quantiles'][2]:.3f} to "
            f"{events[-1]['quantiles'][2]:.3f}; bars of the number of selected pairs, from "
            f"{len(events[0]['selected'])} to {len(events[-1]['selected'])} of {len(pairs)}.",
        ),
        _strip(rounds, events, chosen["times"], pairs),
        *_extremes(chosen, pairs),
    ]


def _on_one_range(
    histograms: Sequence[Mapping[str, Any]], low: float, high: float
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Counts (R, bins) and the borders of their bins; a round whose scores do not reach as far is binned anew."""
    bins = len(histograms[0]["counts"])
    edges = np.linspace(low, high, bins + 1)
    rows = []
    for histogram in histograms:
        own = np.linspace(histogram["low"], histogram["high"], bins + 1)
        rows.append(np.histogram((own[:-1] + own[1:]) / 2, edges, weights=histogram["counts"])[0])
    return np.array(rows, np.int64), edges


def _strip(
    rounds: Sequence[int], events: Sequence[Mapping[str, Any]], times: Mapping[str, int], pairs: Sequence[AnyPair]
) -> Figure:
    ordered = sorted(pairs, key=lambda pair: (pair.label, -times[pair.id]))
    taken = [set(event["selected"]) for event in events]
    selected = np.array([[pair.id in ids for pair in ordered] for ids in taken])
    never = sum(count == 0 for count in times.values())
    unselected = f"{never} of {len(pairs)} pairs were never selected"
    return Figure(
        "Which pairs were selected",
        plots.selection_strip(rounds, selected, _counts(ordered)),
        "Below, each column is a training pair and each row a round, blue where it was selected; within a class the "
        f"most often selected stand first. Above, the mean share of each class. {unselected}.",
        f"Strip of training pairs by round, and bars of the share selected in each class. {unselected}.",
    )


def _extremes(chosen: Mapping[str, Any], pairs: Sequence[AnyPair]) -> list[Section]:
    times, rounds = chosen["times"], chosen["rounds"]
    ordered = sorted(pairs, key=lambda pair: (-times[pair.id], pair.id))
    ends = {"most often": ordered[:SHOWN], "least often": ordered[::-1][:SHOWN]}
    title = "Most and least often selected"
    note = "Of pairs that were selected equally often, the first and the last by id."
    if not _pictured(pairs):
        rows = [(end, pair.id, pair.label, times[pair.id]) for end, some in ends.items() for pair in some]
        return [Table(title, ("", "pair", "class", f"of {rounds} rounds"), rows, note)]
    return [
        Gallery(
            title,
            [
                GalleryRow(
                    Card(text=f"Selected {end}"),
                    tuple(_card(pair, "both", f"{times[pair.id]} of {rounds} rounds") for pair in some),
                )
                for end, some in ends.items()
            ],
            note,
        )
    ]


def _losses(events: Sequence[Mapping[str, Any]]) -> list[Section]:
    def of(stage: str) -> list[Mapping[str, Any]]:
        return [event for event in events if event["stage"].startswith(stage)]

    sections: list[Section] = []
    rounds = [event for event in of("round/") if "weighted" in event]
    if rounds:
        numbers = [int(event["stage"].removeprefix("round/")) for event in rounds]
        panels: dict[str, dict[str, tuple[Sequence[float], Sequence[float]]]] = {
            "total": {"total": (numbers, [event["total"] for event in rounds])}
        }
        for name in rounds[0]["weighted"]:
            kind, _, where = name.partition("/")
            panels.setdefault(kind, {})[where or kind] = (numbers, [event["weighted"][name] for event in rounds])
        sections.append(
            Figure(
                "Loss terms of the transfer",
                plots.curves(panels, x="round", y="weight × mean value"),
                "Means over each round, times their weights. Unbiased estimates of MMD may be a little below zero.",
                f"Line plots of the weighted loss terms by round; the total goes from {rounds[0]['total']:.3f} to "
                f"{rounds[-1]['total']:.3f}.",
            )
        )
    panels = {}
    for domain in ("source", "target"):
        if parts := of(f"pretrain/{domain}"):
            steps = np.cumsum([event["steps"] for event in parts]).tolist()
            panels[domain] = {"total": (steps, [event["total"] for event in parts])}
            for name in parts[0]["weighted"]:
                short = name.replace(f"/{domain}.", ", ")
                panels[domain][short] = (steps, [event["weighted"][name] for event in parts])
    if panels:
        sections.append(
            Figure(
                "Pretraining",
                plots.curves(panels, x="solver steps", y="weight × mean value"),
                "Each domain by itself, before the transfer. A point is the mean since the one before.",
                "Line plots of the weighted loss terms of each domain's pretraining.",
            )
        )
    words = {domain: parts for domain in ("source", "target") if (parts := of(f"word-cnn/{domain}"))}
    if words:
        panels = {
            title: {
                domain: ([event["epoch"] for event in parts], [event[key] for event in parts])
                for domain, parts in words.items()
            }
            for key, title in (("validation_accuracy", "validation accuracy"), ("loss", "training loss"))
        }
        ends = ", ".join(f"{domain} {parts[-1]['validation_accuracy']:.3f}" for domain, parts in words.items())
        sections.append(
            Figure(
                "Word CNN",
                plots.curves(panels, x="epoch", y=""),
                "How well texts alone tell the class. The epoch of the highest validation accuracy is kept.",
                f"Line plots of validation accuracy and training loss by epoch; the accuracy ends at {ends}.",
            )
        )
    return sections


def _settings(run: Run) -> Table:
    def rows(prefix: str, value: object) -> list[tuple[str, str]]:
        if isinstance(value, dict):
            return [row for key, inner in value.items() for row in rows(f"{prefix}.{key}" if prefix else key, inner)]
        return [(prefix, ", ".join(map(str, value)) if isinstance(value, tuple) else str(value))]

    versions = [(f"version of {name}", text) for name, text in run.facts.get("versions", {}).items()]
    return Table(
        "Settings",
        ("setting", "value"),
        [*rows("", dataclasses.asdict(run.config)), *versions],
        "config.toml holds the same and starts the same training.",
        folded=True,
    )


# --- cards ------------------------------------------------------------------------------------------------------


def _subtitle(run: Run) -> str:
    names = [Path(facts["path"]).name for name in ("source", "target") if (facts := run.facts.get(name))]
    return f"{' → '.join(names)}, seed {run.config.seed}, started {run.facts['started']}"


def _pictured(pairs: Iterable[AnyPair]) -> bool:
    return any(pair.image for pair in pairs)


def _card(pair: AnyPair, medium: str, note: str, right: bool | None = None) -> Card:
    picture, text = None, ""
    if medium in ("image", "both"):
        picture = _picture(pair)
        text = "" if picture else "(the picture cannot be read any more)"
    if medium in ("text", "both"):
        whole = pair.text
        text = whole if len(whole) <= LONGEST_TEXT else f"{whole[:LONGEST_TEXT]}…"
    return Card(picture, text, f"{pair.label} · {note}", right, alt=f"{pair.label}, {pair.id}")


def _picture(pair: AnyPair) -> bytes | None:
    """A small picture; None where the file was lost since, which must not cost a run its end."""
    try:
        return thumbnail(pair.image) if pair.image else None
    except ImageError:
        return None
