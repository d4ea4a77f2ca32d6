"""Canonical correlation analysis: the linear common space in which paired media correlate most (Hotelling, 1936).

With C_ii, C_tt the covariances of the centred media, C_it their cross-covariance and r the regularisation, the k-th
pair of directions is

    max a' C_it b   with   a' (C_ii + r m_i I) a = 1,   b' (C_tt + r m_t I) b = 1,   uncorrelated with those before,

where m is the mean variance of a medium's features, so that r does not depend on their scale. The maxima are the
singular values of ``T = (C_ii + r m_i I)^-1/2 C_it (C_tt + r m_t I)^-1/2 = U S V'``, and the directions are the first
columns of U and V, each behind its own whitening.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dckt.errors import ConfigError
from dckt_trainer.baselines.checks import Matrix, checked_pairs, checked_rows
from dckt_trainer.linear.basis import svd


@dataclass(frozen=True)
class CCA:
    """A fitted CCA. F image features, G text features, K components. All float64.

    Attributes:
        image_mean: (F,).
        text_mean: (G,).
        image_projection: (F, K).
        text_projection: (G, K).
        correlations: (K,) falling. Without regularisation they are the correlations of the projected training pairs,
            whose coordinates have variance 1; with it both are smaller.
    """

    image_mean: Matrix
    text_mean: Matrix
    image_projection: Matrix
    text_projection: Matrix
    correlations: Matrix

    def image(self, rows: ArrayLike) -> NDArray[np.float32]:
        """Images (N, F) in the common space (N, K), to be compared by cosine. ItemError: see :func:`checked_rows`."""
        centred = checked_rows(rows, "image", len(self.image_mean)) - self.image_mean
        return (centred @ self.image_projection).astype(np.float32)

    def text(self, rows: ArrayLike) -> NDArray[np.float32]:
        """Texts (N, G) in the common space (N, K)."""
        centred = checked_rows(rows, "text", len(self.text_mean)) - self.text_mean
        return (centred @ self.text_projection).astype(np.float32)


def fit_cca(image: ArrayLike, text: ArrayLike, components: int, regularisation: float = 1e-3) -> CCA:
    """The ``components`` most correlated pairs of directions, in closed form.

    Args:
        image: (N, F) numbers, N >= 2.
        text: (N, G); row i belongs to the same pair as row i of ``image``.
        components: K, at most F, G and N - 1.
        regularisation: r >= 0, what is added to each variance, as a share of the medium's mean variance.

    Raises:
        ItemError: shapes that do not fit, or numbers that are not finite.
        ConfigError: K or r out of range, or r too small for features that depend linearly on each other.
    """
    images, texts = checked_pairs(image, text)
    most = min(images.shape[1], texts.shape[1], len(images) - 1)
    if not 1 <= components <= most:
        raise ConfigError(
            f"components is {components}; expected 1 to {most} for {len(images)} pairs "
            f"of {images.shape[1]} image features and {texts.shape[1]} text features"
        )
    if not 0 <= regularisation < np.inf:
        raise ConfigError(f"regularisation is {regularisation}; expected a number of at least 0")
    image_mean, text_mean = images.mean(axis=0), texts.mean(axis=0)
    images -= image_mean
    texts -= text_mean
    image_whitening = _whitening(images, regularisation, "image")
    text_whitening = _whitening(texts, regularisation, "text")
    across = images.T @ texts / (len(images) - 1)
    left, correlations, right = svd(image_whitening @ across @ text_whitening)
    return CCA(
        image_mean,
        text_mean,
        image_projection=image_whitening @ left[:, :components],
        text_projection=text_whitening @ right[:components].T,
        correlations=correlations[:components],
    )


def _whitening(centred: Matrix, regularisation: float, what: str) -> Matrix:
    """``(C + r m I)^-1/2`` of centred rows: (F, F), symmetric."""
    covariance = centred.T @ centred / (len(centred) - 1)
    width = len(covariance)
    variances, directions = np.linalg.eigh(covariance + regularisation * covariance.trace() / width * np.eye(width))
    if variances[0] <= variances[-1] * width * np.finfo(np.float64).eps:  # what is below is rounding
        raise ConfigError(
            f"the covariance of {width} {what} features over {len(centred)} pairs is singular "
            f"with regularisation {regularisation}; raise it, or drop features that are constant or copies"
        )
    whitening: Matrix = directions / np.sqrt(variances) @ directions.T
    return whitening
