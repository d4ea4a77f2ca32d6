"""Checks and normalises vectors on their way into the index.

Shape letters: N vectors, D width. Everything behind this door is float32, C-contiguous, finite and of length 1, so an
inner product is a cosine similarity.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dckt.errors import ItemError

Float32Array: TypeAlias = NDArray[np.float32]

_CHUNK = 8192
_ZERO = np.float32(0)


def float32_error(dimension: int) -> float:
    """How far apart two float32 products of the same two unit vectors can be, whatever the order of summation.

    Each differs from the true value by at most (D + 2) units of 2^-24, because the products' magnitudes sum to at most
    1.
    """
    return (dimension + 2) * 2.0**-23


def unit_rows(vectors: ArrayLike, *, dimension: int) -> tuple[Float32Array, dict[int, str]]:
    """Scales every row to length 1.

    Args:
        vectors: (N, D) of any floating dtype.
        dimension: the width D that is expected.

    Returns:
        The rows as (N, D) float32, and for each row that cannot be used its place and the reason. Such a row's numbers
        mean nothing.

    Raises:
        ItemError: the array as a whole is not (N, D) floating point.
    """
    array = _array(vectors)
    if not np.issubdtype(array.dtype, np.floating):
        raise ItemError(f"vectors have dtype {array.dtype}; expected float32 (float16 and float64 are converted)")
    if array.ndim != 2 or array.shape[1] != dimension:
        raise ItemError(f"vectors have shape {array.shape}; expected (N, {dimension}), one vector a row")
    rows = np.empty(array.shape, dtype=np.float32)
    faults: dict[int, str] = {}
    for start in range(0, len(array), _CHUNK):
        part = array[start : start + _CHUNK].astype(np.float64)
        # Dividing by the largest number first keeps the squares of tiny and of huge rows inside float64.
        largest = np.abs(part).max(axis=1)
        usable = np.isfinite(largest) & (largest > 0)
        part[~usable] = 1.0
        part /= np.where(usable, largest, 1.0)[:, None]
        # Adding 0 turns -0.0 into 0.0, so that equal vectors have equal bytes.
        rows[start : start + _CHUNK] = part / np.linalg.norm(part, axis=1, keepdims=True) + 0.0
        for row in np.flatnonzero(~usable).tolist():
            faults[start + row] = (
                "every number of the vector is 0, so it has no direction"
                if largest[row] == 0
                else "the vector holds a number that is not finite"
            )
    return rows, faults


def normalised(vectors: ArrayLike, *, dimension: int, names: Sequence[str]) -> Float32Array:
    """The rows scaled to length 1, (N, D) float32.

    Args:
        vectors: (N, D) of any floating dtype.
        dimension: the width D that is expected.
        names: what to call each row in an error.

    Raises:
        ItemError: the shape or dtype is wrong, the number of names differs, or rows are not finite or all zero; every
            such row is named.
    """
    rows, faults = unit_rows(vectors, dimension=dimension)
    if len(names) != len(rows):
        raise ItemError(f"{len(rows)} vectors came with {len(names)} names; expected one name for each vector")
    if faults:
        shown = "; ".join(f"{names[row]} (row {row}): {reason}" for row, reason in list(faults.items())[:10])
        raise ItemError(f"{len(faults)} of {len(rows)} vectors cannot be used: {shown}")
    return rows


def unit_queries(queries: ArrayLike, *, dimension: int) -> Float32Array:
    """Queries scaled to length 1, (Q, D) float32, C-contiguous: as :func:`normalised`, and faster for a few rows.

    Args:
        queries: (Q, D) of any floating dtype.
        dimension: the width D that is expected.

    Raises:
        ItemError: see :func:`normalised`; a row is named by its place.
    """
    array = _array(queries)
    if array.ndim == 2 and array.shape[1] == dimension and array.dtype.kind == "f":
        wide = array.astype(np.float64, order="C")
        if array.itemsize >= 8:  # the only ones whose squares leave float64
            with np.errstate(over="ignore"):
                squares = np.vecdot(wide, wide)
        else:
            squares = np.vecdot(wide, wide)
        if len(array) == 1 and 1e-200 < (square := squares.item()) < 1e200:
            wide /= math.sqrt(square)
            row = wide.astype(np.float32)
            row += _ZERO
            return row
        # NaN compares as false. Squares of numbers far outside of this leave float64.
        if len(array) == 0 or (squares.min() > 1e-200 and squares.max() < 1e200):
            wide /= np.sqrt(squares)[:, None]
            rows = wide.astype(np.float32)
            rows += _ZERO  # -0.0 becomes 0.0
            return rows
    names = [f"query {place}" for place in range(array.shape[0] if array.ndim else 0)]
    return normalised(array, dimension=dimension, names=names)


def _array(vectors: ArrayLike) -> NDArray[np.generic]:
    try:
        return np.asarray(vectors)
    except (TypeError, ValueError) as error:  # such as rows of different widths
        raise ItemError(f"vectors are no array of numbers ({error}); expected (N, D) of a floating dtype") from error
