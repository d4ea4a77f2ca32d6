"""What a report shows beside MAP, as data: by class, by recall, by confusion, and which pairs were selected.

Shape letters: N test pairs, C classes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from dckt.metrics import map_per_label, mean_average_precision, precision_recall_curve
from dckt_trainer.data.corpus import Pair
from dckt_trainer.data.feature_corpus import FeaturePair
from dckt_trainer.media import directions

AnyPair: TypeAlias = Pair | FeaturePair
Vectors: TypeAlias = Mapping[str, NDArray[np.float32]]  # for each medium (N, C) class probabilities


def retrieval(vectors: Vectors, pairs: Sequence[AnyPair]) -> dict[str, Any]:
    """Every direction of one network on the test pairs.

    Args:
        vectors: what the network says of the pairs.
        pairs: N pairs.

    Returns:
        For ``image_to_text`` and every other direction the AP of each query (``per_query``, in the order of the pairs),
        MAP by class (``per_class``, of the classes that have test pairs) and the ``precision`` at each ``recall``.
    """
    labels = np.array([pair.label for pair in pairs])
    figures = {}
    for name, (asked, found) in directions(vectors).items():
        precision = mean_average_precision(vectors[asked], labels, vectors[found], labels).per_query
        curve = precision_recall_curve(vectors[asked], labels, vectors[found], labels)
        figures[name] = {
            "per_query": precision.tolist(),
            "per_class": {label: mean.map for label, mean in map_per_label(precision, labels).items()},
            "recall": curve.recall.tolist(),
            "precision": curve.precision.tolist(),
        }
    return figures


def confusions(
    vectors: Vectors, classes: Sequence[str], pairs: Sequence[AnyPair]
) -> dict[str, list[tuple[str, str, int]]]:
    """For each medium how often a class was answered with a class: (true, answered, count), most frequent first.

    The answer is the likeliest class, and of equally likely ones the first.
    """
    return {
        medium: [
            (true, answered, count)
            for (true, answered), count in Counter(
                (pair.label, classes[place]) for pair, place in zip(pairs, rows.argmax(axis=1), strict=True)
            ).most_common()
        ]
        for medium, rows in vectors.items()
    }


def selection(events: Sequence[Mapping[str, Any]], pairs: Sequence[AnyPair]) -> dict[str, Any]:
    """Which training pairs were selected.

    Args:
        events: of selection.jsonl, one a round.
        pairs: the target's training pairs.

    Returns:
        ``rounds``; ``times``: for each pair's id in how many of them it was selected; ``per_class``: for each class the
        mean share of its pairs that a round took.
    """
    counts = Counter(key for event in events for key in event["selected"])
    times = {pair.id: counts[pair.id] for pair in pairs}
    by_class: dict[str, list[int]] = {}
    for pair in pairs:
        by_class.setdefault(pair.label, []).append(times[pair.id])
    rounds = max(1, len(events))
    return {
        "rounds": len(events),
        "times": times,
        "per_class": {label: float(np.mean(of_class)) / rounds for label, of_class in sorted(by_class.items())},
    }


def score_spread(scores: NDArray[np.float64], bins: int = 40) -> dict[str, Any]:
    """The distribution of a round's scores: quantiles, and a histogram from 0 to 2, the range of AP^q.

    Scores of another kind may lie outside; then the histogram reaches as far as they do.
    """
    counts, edges = np.histogram(scores, bins, (min(0.0, scores.min()), max(2.0, scores.max())))
    return {
        "quantiles": np.quantile(scores, [0, 0.25, 0.5, 0.75, 1]).tolist(),
        "histogram": {"low": float(edges[0]), "high": float(edges[-1]), "counts": counts.tolist()},
    }
