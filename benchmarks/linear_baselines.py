"""What a target of few pairs can do with nothing but linear algebra, no source and no network: two baselines.

Both take the rows that `modern` takes of the target alone (:mod:`dckt_trainer.linear.basis`), so that what differs is
the method. Validation chooses each one's settings; the test pairs are looked at once, with what it chose.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from dckt_trainer.baselines import fit_cca
from dckt_trainer.evaluate import Evaluation, Vectors, score
from dckt_trainer.linear.basis import fit_basis
from dckt_trainer.linear.regression import regressions
from dckt_trainer.pairs import PairSet

PARTS = ("train", "val", "test")
MEDIA = ("image", "text")
STRENGTHS = (0.1, 1.0, 10.0, 100.0, 1000.0)  # C of the regressions, one for each medium
RIDGES = (0.01, 0.1, 0.5, 2.0, 8.0)
COMPONENTS = (5, 10, 20, 50, 100, 200)

Rows = Mapping[str, Mapping[str, NDArray[np.float64]]]  # of each part and medium, (N, R)


@dataclass(frozen=True)
class Measured:
    """How a baseline does with the settings that validation chose.

    Attributes:
        settings: the chosen ones, for people.
        validation: average MAP.
        test: of the test pairs.
    """

    settings: str
    validation: float
    test: Evaluation


def semantic_matching(pairs: Mapping[str, PairSet]) -> Measured:
    """A logistic regression for each medium; class probabilities are compared by cosine (Rasiwasia et al., 2010).

    Args:
        pairs: ``target.train``, ``target.val`` and ``target.test``.
    """
    rows, labels = _rows(pairs), pairs["target.train"].labels.numpy()
    classes = 1 + max(int(pairs[f"target.{part}"].labels.max()) for part in PARTS)
    paths = {medium: regressions(rows["train"][medium], labels, classes, STRENGTHS) for medium in MEDIA}

    def probabilities(part: str, strengths: tuple[int, int]) -> Vectors:
        chosen = zip(MEDIA, strengths, strict=True)
        return {
            medium: paths[medium][place].probabilities(rows[part][medium]).astype(np.float32)
            for medium, place in chosen
        }

    places = range(len(STRENGTHS))
    figures = {both: score(probabilities("val", both), pairs["target.val"]).average for both in product(places, places)}
    best = max(figures, key=lambda both: figures[both])
    image, text = (STRENGTHS[place] for place in best)
    return Measured(
        f"C = {image:g} of images, {text:g} of texts",
        figures[best],
        score(probabilities("test", best), pairs["target.test"]),
    )


def canonical_correlations(pairs: Mapping[str, PairSet]) -> Measured:
    """Regularised CCA of the pairs, which needs no labels; its ridge and width are chosen by MAP all the same.

    Args:
        pairs: ``target.train``, ``target.val`` and ``target.test``.
    """
    rows = _rows(pairs)
    image, text = (rows["train"][medium] for medium in MEDIA)
    most = min(image.shape[1], text.shape[1], len(image) - 1)
    found: tuple[float, float, int] | None = None
    for ridge in RIDGES:
        space = fit_cca(image, text, most, regularisation=ridge)
        spaces = {medium: getattr(space, medium)(rows["val"][medium]) for medium in MEDIA}
        for width in sorted({min(width, most) for width in COMPONENTS}):
            narrow = {medium: there[:, :width] for medium, there in spaces.items()}
            figure = score(narrow, pairs["target.val"]).average
            if found is None or figure > found[0]:
                found = figure, ridge, width
    assert found is not None  # there is no empty grid
    figure, ridge, width = found
    space = fit_cca(image, text, width, regularisation=ridge)
    test = {medium: getattr(space, medium)(rows["test"][medium]) for medium in MEDIA}
    return Measured(f"ridge {ridge:g}, {width} components", figure, score(test, pairs["target.test"]))


def _rows(pairs: Mapping[str, PairSet]) -> Rows:
    features = {
        part: {medium: pairs[f"target.{part}"].features[medium].numpy().astype(np.float64) for medium in MEDIA}
        for part in PARTS
    }
    bases = {medium: fit_basis(features["train"][medium], None, standardise=medium == "image") for medium in MEDIA}
    return {part: {medium: bases[medium].target(of[medium]) for medium in MEDIA} for part, of in features.items()}
