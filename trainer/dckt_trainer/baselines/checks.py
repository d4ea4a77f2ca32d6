"""What the closed-form baselines ask of their rows."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dckt.errors import ItemError

Matrix: TypeAlias = NDArray[np.float64]


def checked_rows(rows: ArrayLike, what: str, width: int | None = None) -> Matrix:
    """The rows in float64.

    Raises:
        ItemError: not numbers (N, F), N and F at least 1; another F than ``width``; or a number that is not finite.
    """
    values = np.asarray(rows)
    if values.ndim != 2 or 0 in values.shape or values.dtype.kind not in "fiu":
        raise ItemError(f"{what} rows are {values.dtype} {values.shape}; expected numbers (at least one row, width)")
    if width is not None and values.shape[1] != width:
        raise ItemError(f"{what} rows have width {values.shape[1]}; expected {width}, as in training")
    finite = np.isfinite(values).all(axis=1)
    if not finite.all():
        raise ItemError(f"{what} rows {np.flatnonzero(~finite)[:10].tolist()} hold numbers that are not finite")
    return values.astype(np.float64)


def checked_pairs(image: ArrayLike, text: ArrayLike) -> tuple[Matrix, Matrix]:
    """Both media's rows in float64, row i of each of the same pair.

    Raises:
        ItemError: see :func:`checked_rows`; or the media differ in their number of rows, or have fewer than two.
    """
    images, texts = checked_rows(image, "image"), checked_rows(text, "text")
    if len(images) != len(texts) or len(images) < 2:
        raise ItemError(f"{len(images)} image rows and {len(texts)} text rows; expected as many, and at least two")
    return images, texts
