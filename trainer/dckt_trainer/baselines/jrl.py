"""Joint representation learning (Zhai, Peng and Xiao, 2014): one linear map of each medium to the labels.

X (N, F) are the standardised training rows of a medium, Y (N, C) the one-hot labels, P (F, C) a projection. Over both
media, i and t, the objective is

    semantic * (|X_i P_i - Y|^2 + |X_t P_t - Y|^2) + correlation * |X_i P_i - X_t P_t|^2
    + smoothness * (tr(P_i' A_i' L_i A_i P_i) + the same of t) + sparsity * (|P_i|_21 + |P_t|_21)

with squared Frobenius norms. A (M, F) are the training rows and, if given, unlabelled ones below them.
``L = I - D^-1/2 K D^-1/2`` is the Laplacian of their graph, where K joins each row to its nearest ones by Euclidean
distance, and D are the degrees. ``|P|_21`` is the sum over the rows p of P of ``|p| = sqrt(p' p + tiny)``.

A round puts each medium where the other one's last value wants it:

    P_i <- (sparsity diag(1 / (2 |p|)) + smoothness A_i' L_i A_i + (correlation + semantic) X_i' X_i)^-1
           X_i' (correlation X_t P_t + semantic Y)

Both media move at once (Jacobi), and still the objective cannot rise, so nothing is damped. Replacing ``|p|`` by
``(|p|^2 / |p_old| + |p_old|) / 2``, which is nowhere smaller, makes the objective a convex quadratic. There a Jacobi
step with exactly two blocks shrinks every eigencomponent of the error, and the objective is a sum over these.

What is not fixed by the above: edges weigh 1; means and deviations are those of the training rows; a neighbour's weight
in a prediction falls like a Gaussian of its distance; the start is random with projections of variance near 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dckt.errors import ConfigError, ItemError
from dckt_trainer.baselines.checks import Matrix, checked_pairs, checked_rows

_TINY = 1e-16  # squared: keeps 1 / |p| finite for a row that sparsity drives to zero


@dataclass(frozen=True)
class JRLSettings:
    """Weights of the objective, and how it is minimised. The defaults are the authors'.

    The weights are not divided by the number of pairs. With few pairs the default sparsity is so strong that the
    minimum is near ``P = 0``, and only the early stop and the scale-free prediction keep a model; so choose smoothness
    and sparsity on validation pairs.

    Attributes:
        semantic: above 0, the weight of being near the labels.
        correlation: at least 0, of the partners being near each other.
        smoothness: at least 0, of neighbours being near each other.
        sparsity: above 0, of using few features.
        neighbours: of a row, in the graph and in predictions; at least 1 and below the number of training pairs.
        rounds: at most so many, at least 1.
        tolerance: stop after a round that lowers the objective by a smaller share than this.
        seed: of the random start.
    """

    semantic: float = 1.0
    correlation: float = 1.0
    smoothness: float = 1000.0
    sparsity: float = 1000.0
    neighbours: int = 100
    rounds: int = 5
    tolerance: float = 0.02
    seed: int = 1

    def __post_init__(self) -> None:
        weights = (self.semantic, self.correlation, self.smoothness, self.sparsity)
        if not np.isfinite(weights).all() or min(weights) < 0 or self.semantic == 0 or self.sparsity == 0:
            raise ConfigError(f"{self}; expected weights of at least 0, and semantic and sparsity above 0")
        if self.neighbours < 1 or self.rounds < 1 or not self.tolerance >= 0:
            raise ConfigError(f"{self}; expected at least 1 neighbour and 1 round, and a tolerance of at least 0")


@dataclass(frozen=True)
class JRLMedium:
    """One medium of a fitted JRL, float64.

    Attributes:
        mean: (F,) of the training rows.
        deviation: (F,) likewise; 1 for a feature that is constant there.
        projection: (F, C).
        train: (N, C) the projected training rows.
    """

    mean: Matrix
    deviation: Matrix
    projection: Matrix
    train: Matrix


@dataclass(frozen=True)
class JRL:
    """A fitted JRL. C classes.

    New items are not compared by cosine but by :meth:`similarity`, which asks the training items near them. So an index
    of vectors cannot serve this model.

    Attributes:
        classes: (C,) the labels, rising; column c of a projection and of probabilities stands for ``classes[c]``.
        one_hot: (N, C) labels of the training pairs.
        images: what was learned of the images.
        texts: what was learned of the texts.
        neighbours: how many training items a prediction asks.
        objective: at the start and after each round.
    """

    classes: NDArray[np.int64]
    one_hot: Matrix
    images: JRLMedium
    texts: JRLMedium
    neighbours: int
    objective: tuple[float, ...]

    def image(self, rows: ArrayLike) -> NDArray[np.float32]:
        """Images (N, F) projected to (N, C). ItemError: see :func:`checked_rows`."""
        return _project(self.images, rows, "image").astype(np.float32)

    def text(self, rows: ArrayLike) -> NDArray[np.float32]:
        """Texts (N, G) projected to (N, C)."""
        return _project(self.texts, rows, "text").astype(np.float32)

    def image_probability(self, rows: ArrayLike) -> NDArray[np.float32]:
        """Class probabilities (N, C) of images (N, F): the labels of the nearest projected training images."""
        return self._probability(self.images, rows, "image")

    def text_probability(self, rows: ArrayLike) -> NDArray[np.float32]:
        """Class probabilities (N, C) of texts (N, G)."""
        return self._probability(self.texts, rows, "text")

    def similarity(self, image: ArrayLike, text: ArrayLike) -> NDArray[np.float32]:
        """The probability that each of N images and each of M texts are of one class, (N, M)."""
        return self.image_probability(image) @ self.text_probability(text).T

    def _probability(self, medium: JRLMedium, rows: ArrayLike, what: str) -> NDArray[np.float32]:
        distances = _squared_distances(_project(medium, rows, what), medium.train)
        nearest = np.argpartition(distances, self.neighbours - 1, axis=1)[:, : self.neighbours]
        near = np.take_along_axis(distances, nearest, axis=1)
        scale = np.maximum(near.mean(axis=1, keepdims=True), np.finfo(np.float64).tiny)
        weights = np.exp(-near / scale)
        weights /= weights.sum(axis=1, keepdims=True)
        probability: Matrix = np.einsum("nk,nkc->nc", weights, self.one_hot[nearest])
        return probability.astype(np.float32)


def fit_jrl(
    image: ArrayLike,
    text: ArrayLike,
    labels: ArrayLike,
    settings: JRLSettings | None = None,
    *,
    unlabelled_image: ArrayLike | None = None,
    unlabelled_text: ArrayLike | None = None,
) -> JRL:
    """Learn both projections. Memory: three matrices of M x M float64 at a time, for M rows of a medium.

    The authors give the test items as unlabelled rows. Figures that were made so must be called transductive.

    Args:
        image: (N, F) numbers of the training images.
        text: (N, G) of the texts; row i belongs to the same pair as row i of ``image``.
        labels: (N,) integers.
        settings: the authors' if None.
        unlabelled_image: (U, F) further images, which shape the graph alone.
        unlabelled_text: (V, G) further texts.

    Raises:
        ItemError: shapes that do not fit, or numbers that are not finite.
        ConfigError: a setting is out of range; see :class:`JRLSettings`.
    """
    settings = settings or JRLSettings()
    images, texts = checked_pairs(image, text)
    classes, one_hot = _one_hot(labels, len(images))
    if settings.neighbours >= len(images):
        raise ConfigError(f"neighbours is {settings.neighbours} for {len(images)} pairs; expected fewer than pairs")
    sides = (
        _side(images, unlabelled_image, "unlabelled image", settings),
        _side(texts, unlabelled_text, "unlabelled text", settings),
    )
    generator = np.random.default_rng(settings.seed)
    widths = [len(side.mean) for side in sides]
    projections = [generator.standard_normal((width, len(classes))) / np.sqrt(width) for width in widths]
    objective = [_objective(sides, projections, one_hot, settings)]
    for _ in range(settings.rounds):
        wanted = [side.rows @ projection for side, projection in zip(sides, projections, strict=True)][::-1]
        projections = [
            _moved(side, projection, settings.correlation * other + settings.semantic * one_hot, settings)
            for side, projection, other in zip(sides, projections, wanted, strict=True)
        ]
        objective.append(_objective(sides, projections, one_hot, settings))
        if objective[-2] - objective[-1] < settings.tolerance * objective[-2]:
            break
    media = [
        JRLMedium(side.mean, side.deviation, projection, side.rows @ projection)
        for side, projection in zip(sides, projections, strict=True)
    ]
    return JRL(classes, one_hot, media[0], media[1], settings.neighbours, tuple(objective))


@dataclass(frozen=True)
class _Side:
    """What one medium brings to every round: X, and the constant parts of the linear system."""

    mean: Matrix
    deviation: Matrix
    rows: Matrix  # X (N, F)
    penalty: Matrix  # smoothness A' L A (F, F)
    system: Matrix  # penalty + (correlation + semantic) X' X (F, F)


def _side(given: Matrix, unlabelled: ArrayLike | None, what: str, settings: JRLSettings) -> _Side:
    mean, deviation = given.mean(axis=0), given.std(axis=0)
    deviation[np.ptp(given, axis=0) == 0] = 1
    rows = (given - mean) / deviation
    everything = rows
    if unlabelled is not None:
        everything = np.concatenate([rows, (checked_rows(unlabelled, what, len(mean)) - mean) / deviation])
    penalty = settings.smoothness * _roughness(everything, settings.neighbours)
    return _Side(mean, deviation, rows, penalty, penalty + (settings.correlation + settings.semantic) * rows.T @ rows)


def _moved(side: _Side, projection: Matrix, wanted: Matrix, settings: JRLSettings) -> Matrix:
    """The next projection (F, C), given what the other medium and the labels want of this one's rows, (N, C)."""
    system = side.system + settings.sparsity * np.diag(0.5 / _norms(projection))
    return np.asarray(np.linalg.solve(system, side.rows.T @ wanted), dtype=np.float64)


def _objective(sides: tuple[_Side, _Side], projections: list[Matrix], one_hot: Matrix, settings: JRLSettings) -> float:
    projected = [side.rows @ projection for side, projection in zip(sides, projections, strict=True)]
    value = settings.correlation * np.square(projected[0] - projected[1]).sum()
    for side, rows, projection in zip(sides, projected, projections, strict=True):
        value += settings.semantic * np.square(rows - one_hot).sum()
        value += np.vdot(projection, side.penalty @ projection) + settings.sparsity * _norms(projection).sum()
    return float(value)


def _norms(projection: Matrix) -> Matrix:
    """The length of each row, (F,), never quite zero."""
    norms: Matrix = np.sqrt(np.square(projection).sum(axis=1) + _TINY)
    return norms


def _roughness(rows: Matrix, neighbours: int) -> Matrix:
    """A' L A (F, F): how much a projection of the rows (M, F) changes along the edges of their graph."""
    distances = _squared_distances(rows, rows)
    np.fill_diagonal(distances, np.inf)  # a row is not its own neighbour
    nearest = np.argpartition(distances, neighbours - 1, axis=1)[:, :neighbours]
    edges = np.zeros_like(distances)
    np.put_along_axis(edges, nearest, 1, axis=1)
    edges = np.maximum(edges, edges.T)
    scaled = rows / np.sqrt(edges.sum(axis=1, keepdims=True))
    roughness: Matrix = rows.T @ rows - scaled.T @ (edges @ scaled)
    return roughness


def _squared_distances(rows: Matrix, others: Matrix) -> Matrix:
    """(N, F) and (M, F) to (N, M)."""
    distances: Matrix = rows @ (-2 * others.T)
    distances += np.square(rows).sum(axis=1)[:, None]
    distances += np.square(others).sum(axis=1)
    return np.maximum(distances, 0, out=distances)


def _project(medium: JRLMedium, rows: ArrayLike, what: str) -> Matrix:
    values = checked_rows(rows, what, len(medium.mean))
    projected: Matrix = (values - medium.mean) / medium.deviation @ medium.projection
    return projected


def _one_hot(labels: ArrayLike, pairs: int) -> tuple[NDArray[np.int64], Matrix]:
    given = np.asarray(labels)
    if given.shape != (pairs,) or given.dtype.kind not in "iu":
        raise ItemError(f"labels are {given.dtype} {given.shape} for {pairs} pairs; expected an integer for each")
    classes, codes = np.unique(given.astype(np.int64), return_inverse=True)
    return classes, np.eye(len(classes))[codes]
