"""Domain consistency and the selection of target pairs (section 4 of the paper).

Shape letters: Q target pairs, C source classes. All in NumPy: no gradient runs through a selection.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dckt.metrics import cross_media_map

FEWEST = 2  # batch normalisation and MMD need two rows


def domain_consistency(
    image: NDArray[np.float32], text: NDArray[np.float32], labels: NDArray[np.int64]
) -> NDArray[np.float64]:
    """AP^q of each target pair under the source model (eq. 11 and 12): (Q,), 0 to 2.

    Every image ranks all Q texts by cosine and every text all Q images; a result with the query's target label is
    relevant, the query's own partner included. Both average precisions are added.

    Args:
        image: (Q, C) the source model's class probabilities of the target images.
        text: (Q, C) likewise of the target texts.
        labels: (Q,) target labels.
    """
    result = cross_media_map(image, text, labels)
    both: NDArray[np.float64] = result.image_to_text.per_query + result.text_to_image.per_query
    return both


def selection_probability(
    consistency: NDArray[np.float64], number: int, alpha: float, *, law: str = "paper"
) -> NDArray[np.float64]:
    """Probability with which round r selects each pair: (Q,).

    The paper (eq. 13): ``alpha * (1 - log2(1 + (max AP - AP^q) / (max AP * r)))``. The released code in effect:
    ``alpha * (1 - ln(1 + (max AP - AP^q) / min(r, 20)))``, never below 0, which is much flatter. In both the most
    consistent pair has alpha in every round, and the others come nearer to it round by round.

    Args:
        consistency: (Q,) AP^q.
        number: the round r, from 1.
        alpha: the largest probability.
        law: ``paper`` or ``released``.
    """
    highest = consistency.max()
    if law == "released":
        released: NDArray[np.float64] = alpha * (1 - np.log1p((highest - consistency) / min(number, 20)))
        return released.clip(min=0)
    if highest <= 0:  # no pair fits the source better than another
        return np.full(len(consistency), alpha)
    gap = (highest - consistency) / (highest * number)
    chances: NDArray[np.float64] = alpha * (1 - np.log2(1 + gap))
    return chances


def select(
    law: str,
    consistency: NDArray[np.float64],
    number: int,
    alpha: float,
    generator: np.random.Generator,
) -> NDArray[np.int64]:
    """Places of the target pairs that round ``number`` trains on, in rising order, at least two.

    Args:
        law: ``paper``, ``released``, ``all``, or ``random`` (as many pairs as ``paper`` expects).
        consistency: (Q,) AP^q.
        number: the round, from 1.
        alpha: see :func:`selection_probability`.
        generator: a fresh stream for each round.
    """
    pairs = len(consistency)
    if law == "all":
        return np.arange(pairs)
    chances = selection_probability(consistency, number, alpha, law="released" if law == "released" else "paper")
    if law == "random":
        chances = np.full(pairs, chances.mean())
    kept = np.flatnonzero(generator.random(pairs) < chances)
    if len(kept) >= min(FEWEST, pairs):
        return kept
    # Too few for a batch: the likeliest pairs stand in.
    order = np.lexsort((generator.random(pairs), -chances))
    return np.sort(order[:FEWEST])
