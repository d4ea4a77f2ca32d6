"""A target whose pairs are known and whose labels are not.

Every pair is taken for a class of its own. So the target's part of the cross-covariance is that of its pairs, and
average precision is the reciprocal rank of the partner, by which validation pairs choose; the source's part is still
that of its classes' means. Beside the space that this gives stands a second one, for which half of the target's
cross-covariance is that of clusters of the features of both media; each is chosen by itself. In both, side by side,
clusters of the training pairs (:mod:`dckt_trainer.linear.clusters`) have prototypes in place of the classes, and items
are compared by

    w cos(probabilities of the clusters) + (1 - w) cos(z).

The partner of an item is its nearest relative, not all of them: what is best for it is sharper than what is best for a
search by meaning. So of all spaces of a kind that are as good as the best within two standard errors the plainest is
taken (after Breiman et al., 1984), the one with most of the source, the highest power and the strongest ridge; and T
and w are fixed, for partners cannot tell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from dckt_trainer.linear.basis import Matrix
from dckt_trainer.linear.clusters import find_clusters
from dckt_trainer.linear.fit import (
    MASSES,
    POWERS,
    RIDGES,
    Candidate,
    Choice,
    Data,
    Fitted,
    Labels,
    per_pair,
    placed,
    to_model,
    unit,
)
from dckt_trainer.linear.regression import Regression, softmax
from dckt_trainer.pairs import PairSet

# Chosen on the validation labels of several corpora, where T from .1 to .2 and w from .3 to .7 are hardly worse.
STANDARD_ERRORS = 2.0
TEMPERATURE = 0.15
SHARE = 0.5
CLUSTERS_PART = 0.5  # of the second space's cross-covariance; pairs have the rest


def fit_unlabelled(
    train: PairSet,
    validation: PairSet,
    clusters: int,
    *,
    source: PairSet | None = None,
    advance: Callable[[int], None] = lambda steps: None,
) -> Fitted:
    """The model of a target of unknown labels, alone or with a source.

    Args:
        train: pairs of the target; features (N, F) of ``image`` and ``text``. Their labels are not read.
        validation: pairs of the target that choose; their labels are not read.
        clusters: K, at most N.
        source: labelled pairs of another collection, their features made in the same way.
        advance: told of each analysis that is done; there are as many as in :func:`dckt_trainer.linear.fit.steps`.

    Returns:
        A model with K clusters in place of classes; ``per_pair`` holds reciprocal ranks, and m, r and p of ``choice``
        are those of the space of pairs.
    """
    data = Data.of(as_own_classes(train), as_own_classes(validation), source)
    with_clusters = data.in_part_by(feature_clusters(data, clusters), CLUSTERS_PART)
    masses = MASSES if source else (0.0,)
    space = side_by_side([choose_space(each, masses, advance) for each in (data, with_clusters)], data)
    found = join(space, data, find_clusters(space.places(data.rows), clusters))
    return Fitted(to_model(data.bases, found), found.choice, found.per_pair)


def as_own_classes(pairs: PairSet) -> PairSet:
    """The pairs, each of them a class of its own."""
    return replace(pairs, labels=torch.arange(len(pairs)))


def feature_clusters(data: Data, clusters: int) -> Labels:
    """(N,) the cluster of each training pair, of K clusters of its image and text, one behind the other."""
    rows = unit(np.concatenate([unit(part) for part in data.rows], axis=1))
    nearest: Labels = (rows @ find_clusters(rows, clusters).T).argmax(axis=1)
    return nearest


@dataclass(frozen=True)
class Space:
    """A common space and how well partners find each other in it.

    Attributes:
        choice: m, r and p.
        maps: of images and of texts, (R, D) each.
        reciprocal_ranks: (N,) of the validation pairs, the mean of both directions.
    """

    choice: Choice
    maps: Sequence[Matrix]
    reciprocal_ranks: Matrix

    def places(self, rows: Sequence[Matrix]) -> Matrix:
        """(N, D) where pairs lie, of length 1: the mean direction of their image and text, given (N, R) of each."""
        image, text = placed(rows, self.maps)
        return unit(image + text)


def choose_space(data: Data, masses: Iterable[float], advance: Callable[[int], None] = lambda steps: None) -> Space:
    """The plainest of the spaces that validation pairs cannot tell from the best.

    Args:
        data: of validation pairs that are classes of their own.
        masses: each m to try.
        advance: told of each analysis that is done.
    """
    spaces = []
    for mass in masses:
        mixed = data.target.mixed(data.source, mass)
        for ridge in RIDGES:
            analysis = mixed.correlate(ridge)
            spaces += [_space(Choice(mass, ridge, power), analysis.weighted(power), data) for power in POWERS]
            advance(1)
    return plainest(spaces)


def plainest(spaces: Sequence[Space]) -> Space:
    """Of the spaces not clearly behind the best on validation: the largest m, then p, then r."""
    best = max(spaces, key=lambda space: float(space.reciprocal_ranks.mean()))

    def as_good(space: Space) -> bool:
        behind = best.reciprocal_ranks - space.reciprocal_ranks
        return bool(behind.mean() <= STANDARD_ERRORS * behind.std(ddof=1) / np.sqrt(len(behind)))

    return max(filter(as_good, spaces), key=lambda space: (space.choice.mass, space.choice.power, space.choice.ridge))


def side_by_side(spaces: Sequence[Space], data: Data) -> Space:
    """One space of all dimensions of several, whose training items have the same mean length; m, r, p of the first."""
    scaled = []
    for space in spaces:
        lengths = [np.linalg.norm(rows @ to, axis=1).mean() for rows, to in zip(data.rows, space.maps, strict=True)]
        scaled.append([to / np.mean(lengths) for to in space.maps])
    maps = [np.concatenate(of_medium, axis=1) for of_medium in zip(*scaled, strict=True)]
    return _space(spaces[0].choice, maps, data)


def _space(choice: Choice, maps: Sequence[Matrix], data: Data) -> Space:
    image, text = placed(data.asked, maps)
    return Space(choice, maps, per_pair(image @ text.T, data))


def join(space: Space, data: Data, prototypes: Matrix) -> Candidate:
    """The space beside the probabilities of clusters, given their prototypes (K, D); nothing is regressed."""
    image, text = placed(data.asked, space.maps)
    likely = [unit(softmax(rows @ prototypes.T / TEMPERATURE)) for rows in (image, text)]
    scores = SHARE * (likely[0] @ likely[1].T) + (1 - SHARE) * (image @ text.T)
    choice = replace(space.choice, temperature=TEMPERATURE, share=SHARE)
    none = [Regression(np.zeros((len(to), len(prototypes))), np.zeros(len(prototypes))) for to in space.maps]
    return Candidate(choice, space.maps, prototypes, scores, per_pair(scores, data), none)
