"""One medium's features, centred, scaled, and reduced to the directions in which they vary.

Few pairs span few directions, so the target loses nothing, and the source little. What is reduced is small enough for
many analyses in seconds, whatever the trunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.linalg
from numpy.typing import NDArray
from scipy.sparse.linalg import svds

Matrix = NDArray[np.float64]

TARGET_DIRECTIONS, SOURCE_DIRECTIONS = 300, 200
FLOOR = 0.05  # of a feature's variance, as a share of the mean: few pairs tell little of it
DENSE = 1500  # rows or columns up to which an eigendecomposition is quicker than Lanczos' method


@dataclass(frozen=True)
class Basis:
    """An affine map of features (N, F) to (N, R) for each domain.

    The target's rows are centred at their mean and the source's at theirs, for what transfers is how features vary
    together, and not where they lie. Each domain's total variance is 1.

    Attributes:
        directions: (F, R) orthonormal, behind a scale for each feature.
        target_mean: (F,)
        target_length: what the target's rows are divided by.
        source_mean: (F,); without a source it means nothing, nor does the next.
        source_length: likewise.
    """

    directions: Matrix
    target_mean: Matrix
    target_length: float
    source_mean: Matrix
    source_length: float

    def target(self, rows: Matrix) -> Matrix:
        """Rows of the target, (N, R)."""
        return (rows - self.target_mean) @ self.directions / self.target_length

    def source(self, rows: Matrix) -> Matrix:
        """Rows of the source, (N, R)."""
        return (rows - self.source_mean) @ self.directions / self.source_length

    def affine(self, projection: Matrix) -> tuple[Matrix, Matrix]:
        """The target's features straight to (N, D), given (R, D): a weight (F, D) and a bias (D,)."""
        weight = self.directions @ projection / self.target_length
        return weight, -self.target_mean @ weight


def fit_basis(target: Matrix, source: Matrix | None, *, standardise: bool) -> Basis:
    """The basis of a medium.

    Args:
        target: (N, F) training rows of the target.
        source: (N', F) rows of the source, if there is one.
        standardise: whether each feature is divided by its standard deviation in the target. Texts are not, for that
            would make the rarest word weigh most.
    """
    mean = target.mean(0)
    scale = np.sqrt(target.var(0) + FLOOR * target.var(0).mean()) if standardise else np.ones(len(mean))
    centred = (target - mean) / scale
    directions = leading(centred, TARGET_DIRECTIONS)
    source_mean, source_length = mean, 1.0
    if source is not None:
        source_mean = source.mean(0)
        others = (source - source_mean) / scale
        rest = leading(others - others @ directions @ directions.T, SOURCE_DIRECTIONS)
        directions = np.concatenate([directions, rest], axis=1)
        source_length = _length(others @ directions)
    return Basis(directions / scale[:, None], mean, _length(centred @ directions), source_mean, source_length)


def leading(rows: Matrix, count: int) -> Matrix:
    """The strongest right singular directions of rows, orthonormal columns (F, at most ``count``)."""
    if min(rows.shape) > max(DENSE, count):
        strengths, found = svds(rows, k=count, v0=np.ones(min(rows.shape)))[1:]
        order = np.argsort(-strengths)
        directions, strengths = found[order].T, strengths[order]
    elif len(rows) < rows.shape[1]:
        squares, own = np.linalg.eigh(rows @ rows.T)
        strengths = np.sqrt(np.maximum(squares[::-1][:count], 0))
        directions = rows.T @ own[:, ::-1][:, :count] / np.maximum(strengths, np.finfo(float).tiny)
    else:
        squares, own = np.linalg.eigh(rows.T @ rows)
        strengths = np.sqrt(np.maximum(squares[::-1][:count], 0))
        directions = own[:, ::-1][:, :count]
    kept: Matrix = directions[:, strengths > strengths.max(initial=0) * 1e-4]
    return kept


def svd(matrix: Matrix) -> tuple[Matrix, Matrix, Matrix]:
    """U (R, D), the singular values (D,), falling, and V' (D, R') of a finite matrix (R, R').

    LAPACK's divide and conquer, which is quick, fails to converge on a rare matrix; then the older method serves.
    """
    try:
        return np.linalg.svd(matrix, full_matrices=False)
    except np.linalg.LinAlgError:
        left, values, right = scipy.linalg.svd(matrix, full_matrices=False, lapack_driver="gesvd")
        return left, values, right


def _length(rows: Matrix) -> float:
    return float(np.sqrt(rows.var(0).sum()))
