"""Fitting: covariances, correlations, prototypes, and what validation chooses."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from dckt.metrics import average_precision
from dckt_trainer.linear.basis import SOURCE_DIRECTIONS, TARGET_DIRECTIONS, Basis, Matrix, fit_basis, svd
from dckt_trainer.linear.model import LinearModel
from dckt_trainer.linear.regression import Regression, regressions, softmax
from dckt_trainer.pairs import PairSet

Labels: TypeAlias = NDArray[np.int64]

# What validation chooses from: m, r, p, T; w and v.
MASSES = (0.3, 0.6, 0.85, 0.95)
RIDGES = (0.1, 0.5, 2.0)
POWERS = (1, 2)
TEMPERATURES = (0.05, 0.15)
SHARES = (0.0, 0.15, 0.3, 0.5, 0.7, 0.85, 1.0)
STRENGTHS = (1.0, 10.0, 100.0, 1000.0)  # of the regressions, the reciprocal of their penalty

DIRECTIONS = TARGET_DIRECTIONS + SOURCE_DIRECTIONS
FAINT = 1e-4  # a coordinate that weighs less, beside the strongest, is left out
MEDIA = ("image", "text")


@dataclass(frozen=True)
class Choice:
    """What validation chose.

    Attributes:
        mass: m, the source's part in the covariances; 0 is the target alone.
        ridge: r, what is added to each variance, as a share of the mean.
        power: p, of the correlations.
        temperature: T of the prototypes' softmax.
        share: w, of these probabilities beside the space.
        strengths: of the regressions of images and of texts.
        regression_share: v, of the regressions beside both.
    """

    mass: float = 0.0
    ridge: float = RIDGES[0]
    power: int = POWERS[0]
    temperature: float = TEMPERATURES[0]
    share: float = SHARES[0]
    strengths: tuple[float, float] = (STRENGTHS[0], STRENGTHS[0])
    regression_share: float = SHARES[0]


@dataclass(frozen=True)
class Fitted:
    """A model and how it does on validation.

    Attributes:
        model: both media to the common space.
        choice: its settings.
        per_pair: (N,) AP of each validation pair, the mean of its two items as queries.
    """

    model: LinearModel
    choice: Choice
    per_pair: Matrix

    def ahead_of(self, other: Fitted) -> tuple[float, float]:
        """How much higher MAP is than another's on the same pairs, and the standard error of that."""
        differences = self.per_pair - other.per_pair
        return float(differences.mean()), float(differences.std(ddof=1) / np.sqrt(len(differences)))


def fit_linear(
    train: PairSet,
    validation: PairSet,
    classes: int,
    *,
    source: PairSet | None = None,
    advance: Callable[[int], None] = lambda steps: None,
) -> Fitted:
    """The model that is best on validation: of the target alone, or with a source, of those that use it.

    Args:
        train: pairs of the target; features (N, F) of ``image`` and ``text``.
        validation: pairs of the target that choose.
        classes: C.
        source: labelled pairs of another collection, their features made in the same way.
        advance: told of each of the :func:`steps` analyses that is done.
    """
    data = Data.of(train, validation, source)
    best: Candidate | None = None
    for mass in MASSES if source else (0.0,):
        mixed = data.target.mixed(data.source, mass)
        for ridge in RIDGES:
            for candidate in _candidates(mixed.correlate(ridge), data, Choice(mass, ridge), classes):
                if best is None or candidate.per_pair.mean() > best.per_pair.mean():
                    best = candidate
            advance(1)
    assert best is not None  # noqa: S101 - there is no empty grid
    best = _with_regressions(best, data, classes)
    return Fitted(to_model(data.bases, best), best.choice, best.per_pair)


def steps(*, source: bool, labelled: bool = True) -> int:
    """How many analyses a fit makes; without labels there are two spaces."""
    return len(MASSES if source else (0.0,)) * len(RIDGES) * (1 if labelled else 2)


def analysis_seconds() -> float:
    """How long the largest analysis takes on this machine; what validation chooses of it takes about as long again."""
    rows = np.random.default_rng(0).normal(size=(2 * DIRECTIONS, DIRECTIONS))
    covariance = rows.T @ rows
    start = time.perf_counter()
    _Covariances(covariance, covariance, covariance).correlate(RIDGES[0])
    return 2 * (time.perf_counter() - start)


def unit(rows: Matrix) -> Matrix:
    """Rows of length 1; one of zeros stays so."""
    scaled: Matrix = rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)
    return scaled


def placed(rows: Sequence[Matrix], maps: Sequence[Matrix]) -> list[Matrix]:
    """Rows of each medium in a space, (N, D), of length 1, given (N, R) and the maps (R, D)."""
    return [unit(of_medium @ to) for of_medium, to in zip(rows, maps, strict=True)]


# --- correlations ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Covariances:
    image: Matrix  # (R, R)
    text: Matrix  # (R', R')
    across: Matrix  # (R, R')

    def mixed(self, other: _Covariances, mass: float) -> _Covariances:
        return _Covariances(
            (1 - mass) * self.image + mass * other.image,
            (1 - mass) * self.text + mass * other.text,
            (1 - mass) * self.across + mass * other.across,
        )

    def correlate(self, ridge: float) -> _Analysis:
        image, text = _whitening(self.image, ridge), _whitening(self.text, ridge)
        left, correlations, right = svd(image @ self.across @ text)
        return _Analysis(image @ left, text @ right.T, correlations)


@dataclass(frozen=True)
class _Analysis:
    image: Matrix  # (R, D)
    text: Matrix  # (R', D)
    correlations: Matrix  # (D,) falling

    def weighted(self, power: int) -> tuple[Matrix, Matrix]:
        weights = self.correlations**power
        kept = weights > FAINT * weights[0]
        return self.image[:, kept] * weights[kept], self.text[:, kept] * weights[kept]


def _covariances(rows: Sequence[Matrix], labels: Labels) -> _Covariances:
    image, text = rows
    count = len(labels)
    image_means, text_means = (class_means(part, labels)[labels] for part in rows)
    return _Covariances(image.T @ image / count, text.T @ text / count, image_means.T @ text_means / count)


def class_means(rows: Matrix, labels: Labels, classes: int | None = None) -> Matrix:
    """(C, R) the mean row of each class; 0 for one without rows."""
    count = int(labels.max()) + 1 if classes is None else classes
    sums = np.zeros((count, rows.shape[1]))
    np.add.at(sums, labels, rows)
    means: Matrix = sums / np.maximum(np.bincount(labels, minlength=count), 1)[:, None]
    return means


def _whitening(covariance: Matrix, ridge: float) -> Matrix:
    width = len(covariance)
    variances, directions = np.linalg.eigh(covariance + ridge * covariance.trace() / width * np.eye(width))
    whitening: Matrix = directions / np.sqrt(variances) @ directions.T
    return whitening


# --- candidates -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    """What every candidate is made of and judged on; sequences are of images and of texts."""

    bases: Sequence[Basis]
    target: _Covariances
    source: _Covariances  # without a source, the target's
    rows: Sequence[Matrix]  # (N, R) of the target
    labels: Labels
    asked: Sequence[Matrix]  # of validation
    relevant: NDArray[np.bool_]

    @classmethod
    def of(cls, train: PairSet, validation: PairSet, source: PairSet | None) -> Data:
        """Bases of the media, and everything in them."""
        bases = [
            fit_basis(_rows(train, medium), _rows(source, medium) if source else None, standardise=medium == "image")
            for medium in MEDIA
        ]
        each = list(zip(bases, MEDIA, strict=True))
        rows, labels = [basis.target(_rows(train, medium)) for basis, medium in each], train.labels.numpy()
        target = other = _covariances(rows, labels)
        if source:
            other = _covariances([basis.source(_rows(source, medium)) for basis, medium in each], source.labels.numpy())
        asked = [basis.target(_rows(validation, medium)) for basis, medium in each]
        return cls(bases, target, other, rows, labels, asked, _equal(validation.labels.numpy()))

    def in_part_by(self, labels: Labels, part: float) -> Data:
        """The same, where the target's cross-covariance is in part that of other classes (N,)."""
        return replace(self, target=self.target.mixed(_covariances(self.rows, labels), part))


@dataclass(frozen=True)
class Candidate:
    """A model before it is made into one, with what it came to on validation."""

    choice: Choice
    space: Sequence[Matrix]  # (R, D) of each medium
    prototypes: Matrix  # (C, D)
    scores: Matrix  # (N, N) of validation images by texts
    per_pair: Matrix  # (N,)
    regressions: Sequence[Regression] = ()


def _candidates(analysis: _Analysis, data: Data, choice: Choice, classes: int) -> Iterator[Candidate]:
    for power in POWERS:
        space = analysis.weighted(power)
        means = [class_means(rows, data.labels, classes) for rows in placed(data.rows, space)]
        prototypes = unit(np.sum(means, axis=0))
        image, text = placed(data.asked, space)
        near = image @ text.T
        for temperature in TEMPERATURES:
            likely = [unit(softmax(rows @ prototypes.T / temperature)) for rows in (image, text)]
            alike = likely[0] @ likely[1].T
            for share in SHARES:
                scores = share * alike + (1 - share) * near
                chosen = replace(choice, power=power, temperature=temperature, share=share)
                yield Candidate(chosen, space, prototypes, scores, per_pair(scores, data))


def _with_regressions(best: Candidate, data: Data, classes: int) -> Candidate:
    """The best pair of regressions by themselves, and then their share beside the rest."""
    paths = [regressions(rows, data.labels, classes, STRENGTHS) for rows in data.rows]
    likely = [[unit(one.probabilities(rows)) for one in path] for path, rows in zip(paths, data.asked, strict=True)]
    tables = {(i, t): likely[0][i] @ likely[1][t].T for i, t in product(range(len(STRENGTHS)), range(len(STRENGTHS)))}
    image, text = max(tables, key=lambda places: float(per_pair(tables[places], data).mean()))
    chosen = replace(best.choice, strengths=(STRENGTHS[image], STRENGTHS[text]))
    best = replace(best, choice=chosen, regressions=(paths[0][image], paths[1][text]))
    for share in SHARES[1:]:
        scores = share * tables[image, text] + (1 - share) * best.scores
        found = per_pair(scores, data)
        if found.mean() > best.per_pair.mean():
            # The scores stay those of the rest, with which each share is mixed.
            best = replace(best, choice=replace(chosen, regression_share=share), per_pair=found)
    return best


def per_pair(scores: Matrix, data: Data) -> Matrix:
    """(N,) AP of each validation pair, the mean of its two items as queries, given scores of images by texts."""
    found = [average_precision(table, data.relevant).expected for table in (scores, scores.T)]
    mean: Matrix = np.mean(found, axis=0)
    return mean


def _equal(labels: Labels) -> NDArray[np.bool_]:
    return np.equal.outer(labels, labels)


# --- to and from the trainer ----------------------------------------------------------------------------------


def _rows(pairs: PairSet, medium: str) -> Matrix:
    return pairs.features[medium].numpy().astype(np.float64)


def to_model(bases: Sequence[Basis], chosen: Candidate) -> LinearModel:
    """The model of a candidate, whose regressions are there."""
    maps = dict(zip(MEDIA, (basis.affine(to) for basis, to in zip(bases, chosen.space, strict=True)), strict=True))
    classes, width = chosen.prototypes.shape
    model = LinearModel({medium: len(weight) for medium, (weight, _) in maps.items()}, width, classes)
    state: dict[str, Matrix | float] = {
        "prototypes": chosen.prototypes,
        "temperature": chosen.choice.temperature,
        "share": chosen.choice.share,
        "regression_share": chosen.choice.regression_share,
    }
    for (medium, _), basis, regression in zip(maps.items(), bases, chosen.regressions, strict=True):
        weight, bias = basis.affine(regression.weight)
        state |= {f"regressions.{medium}.weight": weight.T, f"regressions.{medium}.bias": bias + regression.bias}
    for medium, (weight, bias) in maps.items():
        state |= {f"spaces.{medium}.weight": weight.T, f"spaces.{medium}.bias": bias}
    model.load_state_dict({name: torch.tensor(np.asarray(value), dtype=torch.float32) for name, value in state.items()})
    return model.eval()
