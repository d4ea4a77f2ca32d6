"""Which target pairs a round trains on (section 4 of the paper): a score, a law, and a draw.

    score(source, target, labels) -> (Q,)     how well each pair fits the source model
    law(scores, number, rounds, alpha) -> (Q,)   probability with which round ``number`` of ``rounds`` takes each pair

Both are plain functions in NumPy, named in a table; a configuration may name a function of the user's own instead, as
``module:function``. Shape letters: Q target pairs, C classes.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from dckt.errors import ConfigError, TrainingError
from dckt.metrics import cross_media_map
from dckt_trainer.config import TransferConfig

FEWEST = 2  # batch normalisation and MMD need two rows

Vectors: TypeAlias = Mapping[str, NDArray[np.float32]]
Scores: TypeAlias = NDArray[np.float64]
Score: TypeAlias = Callable[[Vectors, Vectors, NDArray[np.int64]], Scores]
Law: TypeAlias = Callable[[Scores, int, int, float], Scores]


class OnDemand(Mapping[str, NDArray[np.float32]]):
    """Vectors that are made when they are first asked for: most scores never look at the target model's."""

    def __init__(self, make: Callable[[], Vectors]) -> None:
        self._make = make
        self._made: Vectors | None = None

    def _all(self) -> Vectors:
        if self._made is None:
            self._made = self._make()
        return self._made

    def __getitem__(self, medium: str) -> NDArray[np.float32]:
        return self._all()[medium]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())


@dataclass(frozen=True)
class Selection:
    """What a round trains on.

    Attributes:
        scores: (Q,) of all target pairs, as the law saw them.
        places: of the selected pairs, in rising order, at least two.
    """

    scores: Scores
    places: NDArray[np.int64]


# --- scores ---------------------------------------------------------------------------------------------------


def domain_consistency(image: NDArray[np.float32], text: NDArray[np.float32], labels: NDArray[np.int64]) -> Scores:
    """AP^q of each target pair (eq. 11 and 12): (Q,), 0 to 2.

    Every image ranks all Q texts by cosine and every text all Q images; a result with the query's target label is
    relevant, the query's own partner included. Both average precisions are added.

    Args:
        image: (Q, C) the source model's class probabilities of the target images.
        text: (Q, C) likewise of the target texts.
        labels: (Q,) target labels.
    """
    result = cross_media_map(image, text, labels)
    both: Scores = result.image_to_text.per_query + result.text_to_image.per_query
    return both


def consistency(source: Vectors, target: Vectors, labels: NDArray[np.int64]) -> Scores:
    """Domain consistency under the source model, as the paper scores pairs; the target model is not asked.

    Of more media than two it is twice the mean AP over all directions, so that its range stays 0 to 2.
    """
    del target
    return _over_every_two(source, lambda first, second: domain_consistency(first, second, labels))


def reciprocal_rank(source: Vectors, target: Vectors, labels: NDArray[np.int64]) -> Scores:
    """One over the rank of a pair's own partner under the source model, both directions added, 0 to 2. Needs no labels.

    The rank among equal similarities is the mean one. Of more media than two it is the mean over every two.
    """
    del target, labels
    return _over_every_two({medium: _unit(rows) for medium, rows in source.items()}, _reciprocal_ranks)


def _reciprocal_ranks(first: NDArray[np.float32], second: NDArray[np.float32]) -> Scores:
    similarity = first @ second.T

    def ranks(rows: NDArray[np.float32]) -> Scores:
        own = rows.diagonal()[:, None]
        above, equal = (rows > own).sum(1), (rows == own).sum(1)
        rank: Scores = above + (equal + 1) / 2
        return rank

    scores: Scores = 1 / ranks(similarity) + 1 / ranks(similarity.T)
    return scores


def _over_every_two(vectors: Vectors, score: Callable[[NDArray[np.float32], NDArray[np.float32]], Scores]) -> Scores:
    """The mean score over every two media; with image and text alone it is theirs."""
    scores = [score(vectors[first], vectors[second]) for first, second in combinations(vectors, 2)]
    mean: Scores = sum(scores[1:], scores[0]) / len(scores)
    return mean


SCORES: Mapping[str, Score] = {"consistency": consistency, "reciprocal_rank": reciprocal_rank}

# --- laws -------------------------------------------------------------------------------------------------------


def paper(scores: Scores, number: int, rounds: int, alpha: float) -> Scores:
    """Eq. 13: ``alpha * (1 - log2(1 + (max AP - AP^q) / (max AP * r)))``.

    The most consistent pair has alpha in every round, and the others come nearer to it round by round.
    """
    del rounds
    highest = scores.max()
    if highest <= 0:  # no pair fits the source better than another
        return np.full(len(scores), alpha)
    chances: Scores = alpha * (1 - np.log2(1 + (highest - scores) / (highest * number)))
    return chances


def released(scores: Scores, number: int, rounds: int, alpha: float) -> Scores:
    """The released code in effect: ``alpha * (1 - ln(1 + (max AP - AP^q) / min(r, 20)))``, at least 0.

    It is much flatter than the paper's.
    """
    del rounds
    chances: Scores = alpha * (1 - np.log1p((scores.max() - scores) / min(number, 20)))
    return chances.clip(min=0)


def everything(scores: Scores, number: int, rounds: int, alpha: float) -> Scores:
    """Every pair, in every round: the ablation DCKT_All."""
    del number, rounds, alpha
    return np.ones(len(scores))


def at_random(scores: Scores, number: int, rounds: int, alpha: float) -> Scores:
    """As many pairs as :func:`paper` expects to take, whichever they are: the ablation DCKT_Random."""
    return np.full(len(scores), paper(scores, number, rounds, alpha).mean())


LAWS: Mapping[str, Law] = {
    "paper": paper,
    "released": released,
    "all": everything,
    "random": at_random,
}

# --- both together ----------------------------------------------------------------------------------------------


def select(
    settings: TransferConfig,
    number: int,
    source: Vectors,
    target: Vectors,
    labels: NDArray[np.int64],
    generator: np.random.Generator,
) -> Selection:
    """Scores all target pairs and takes those that round ``number`` trains on.

    Args:
        settings: score, law, and how pairs are drawn.
        number: the round, from 1.
        source: by medium, (Q, C) class probabilities under the source model.
        target: by medium, (Q, C') under the target model.
        labels: (Q,) target labels.
        generator: where pairs are drawn from.

    Raises:
        ConfigError: a function of the user's own cannot be found.
        TrainingError: it returns something else than Q finite numbers, or probabilities out of 0 to 1.
    """
    score: Score = _function("transfer.score", settings.score, SCORES)
    law: Law = _function("transfer.law", settings.law, LAWS)
    scores = _checked(settings.score, score(source, target, labels), len(labels))
    chances = _checked(settings.law, law(scores, number, settings.rounds, settings.alpha), len(labels))
    if chances.min() < 0 or chances.max() > 1:
        raise TrainingError(
            f"transfer.law {settings.law}: probabilities {chances.min()} to {chances.max()}; expected 0 to 1"
        )
    return Selection(scores, draw(chances, generator, labels if settings.stratified else None))


def draw(chances: Scores, generator: np.random.Generator, strata: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
    """Places that are drawn, each with its own probability, in rising order, at least two.

    Args:
        chances: (Q,) probabilities.
        generator: of random numbers.
        strata: (Q,) classes; of each the number that is expected is taken, rounded up or down at random. Without them
            every pair is drawn independently.
    """
    if strata is None:
        kept = np.flatnonzero(generator.random(len(chances)) < chances)
    else:
        kept = np.sort(
            np.concatenate([_systematic(np.flatnonzero(strata == s), chances, generator) for s in np.unique(strata)])
        )
    if len(kept) >= min(FEWEST, len(chances)):
        return kept
    # Too few for a batch: the likeliest pairs stand in.
    order = np.lexsort((generator.random(len(chances)), -chances))
    return np.sort(order[:FEWEST])


def _systematic(places: NDArray[np.int64], chances: Scores, generator: np.random.Generator) -> NDArray[np.int64]:
    """Systematic sampling: the probabilities, one behind the other in random order, are hit by marks one apart.

    Each place is hit with exactly its probability, and their number is the sum of them, rounded up or down.
    """
    order = generator.permutation(places)
    ends = chances[order].cumsum() + generator.random()
    hit = np.floor(ends) > np.floor(np.concatenate([[ends[0] - chances[order[0]]], ends[:-1]]))
    taken: NDArray[np.int64] = order[hit]
    return taken


def _function(key: str, name: str, known: Mapping[str, Any]) -> Any:
    if name in known:
        return known[name]
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"{key} is {name!r}, which cannot be had ({error}); expected one of {', '.join(known)}, or module:function "
            "of a module that Python finds"
        ) from error


def check_functions(settings: TransferConfig) -> None:
    """Refuses a score or a law that cannot be found, before anything is trained.

    Raises:
        ConfigError: see above.
    """
    _function("transfer.score", settings.score, SCORES)
    _function("transfer.law", settings.law, LAWS)


def _checked(name: str, values: Any, count: int) -> Scores:
    array = np.asarray(values, dtype=np.float64)
    if array.shape != (count,) or not np.isfinite(array).all():
        raise TrainingError(f"{name} gave an array of shape {array.shape}; expected {count} finite numbers, one a pair")
    return array


def _unit(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.where(norms > 0, norms, 1), np.float32)
