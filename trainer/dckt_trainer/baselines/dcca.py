"""The loss of deep CCA (Andrew et al., 2013; Yan and Mikolajczyk, 2015, for images and texts).

Two networks, one for each medium, are trained so that their outputs correlate as much as CCA could make them:

    loss = -|| S11^-1/2 S12 S22^-1/2 ||_*,   S11 = H1' H1 / (N - 1) + r1 I,  S22 likewise,  S12 = H1' H2 / (N - 1),

with H the centred outputs of a batch and ``|| ||_*`` the trace norm, the sum of the singular values. These are the
canonical correlations of the batch, so the loss lies between -K and 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dckt.errors import ConfigError, ItemError, TrainingError


def dcca_loss(
    image: Tensor, text: Tensor, image_regularisation: float = 1e-4, text_regularisation: float = 1e-4
) -> Tensor:
    """Minus the sum of the canonical correlations of two batches: a scalar of the images' dtype, differentiable.

    Computed in float64 whatever the input, because whitening loses digits. A batch should be much larger than K: with
    N - 1 <= K any two batches correlate perfectly but for the regularisation.

    Args:
        image: (N, K) float outputs of the image network, N >= 2.
        text: (N, L) of the text network; row i of the same pair as row i of ``image``.
        image_regularisation: r1 >= 0, added to each variance.
        text_regularisation: r2 >= 0.

    Raises:
        ItemError: the shapes do not fit.
        ConfigError: a regularisation is below 0.
        TrainingError: an output is not finite, or a covariance is singular, which a regularisation above 0 prevents.
    """
    if image.ndim != 2 or text.ndim != 2 or len(image) != len(text) or len(image) < 2:
        raise ItemError(f"DCCA takes (N, K) and (N, L), N >= 2; got {tuple(image.shape)} and {tuple(text.shape)}")
    if not (image_regularisation >= 0 and text_regularisation >= 0):
        raise ConfigError(f"regularisations are {image_regularisation} and {text_regularisation}; expected 0 or more")
    h1, h2 = (rows.double() - rows.double().mean(0) for rows in (image, text))
    # Any whitening has the same singular values. The Cholesky factor's gradient is finite everywhere; that of
    # eigenvectors, and so of a square root by them, is not where two variances are equal.
    lower1, lower2 = _factor(h1, image_regularisation, "image"), _factor(h2, text_regularisation, "text")
    half = torch.linalg.solve_triangular(lower1, h1.T @ h2 / (len(h1) - 1), upper=False)
    whitened = torch.linalg.solve_triangular(lower2.T, half, upper=True, left=False)
    correlations: Tensor = torch.linalg.svdvals(whitened)
    return -correlations.sum().to(image.dtype)


def _factor(centred: Tensor, regularisation: float, what: str) -> Tensor:
    """The lower Cholesky factor of the regularised covariance, (K, K)."""
    if not centred.isfinite().all():
        raise TrainingError(f"the {what} outputs are not finite; lower the learning rate")
    ridge = regularisation * torch.eye(centred.shape[1], dtype=centred.dtype, device=centred.device)
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(centred.T @ centred / (len(centred) - 1) + ridge)
    if failed:
        raise TrainingError(
            f"the covariance of {len(centred)} {what} outputs of width {centred.shape[1]} is singular "
            f"with regularisation {regularisation}; raise it, or take larger batches"
        )
    return factor
