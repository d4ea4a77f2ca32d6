"""Items of a medium beside pictures and texts, such as audio: rows of numbers, read and checked.

Shape letters: N rows, F numbers a row.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dckt.errors import CorpusError, ItemError

FOLDER = "vectors"  # of a corpus, with an array MEDIUM.npy for each medium


def read_rows(file: Path, count: int, manifest: str) -> tuple[NDArray[np.float32], list[int]]:
    """The features of one medium: an ``.npy`` file with a row for each row of a corpus's manifest, in its order.

    Args:
        file: the array.
        count: N, how many rows the manifest has.
        manifest: its name, for errors.

    Returns:
        See :func:`float32_rows`.

    Raises:
        CorpusError: there is no such file, it is another kind of file, or the array is not N rows of numbers.
    """
    expected = f"expected a NumPy array of {count} rows of numbers, one for each row of {manifest}, in its order"
    array = _loaded(file, expected)
    if not _numbers(array) or array.ndim != 2 or len(array) != count or not array.shape[1]:
        raise CorpusError(f"{file}: is {described(array)}; {expected}")
    return float32_rows(array)


def read_one(file: Path) -> NDArray[Any]:
    """The features (F,) of one item, from an ``.npy`` file.

    Raises:
        CorpusError: there is no such file, or the array is not one row of numbers.
    """
    expected = "expected a NumPy array of numbers with one dimension"
    array = _loaded(file, expected)
    if not _numbers(array) or array.ndim != 1:
        raise CorpusError(f"{file}: is {described(array)}; {expected}")
    return array


def float32_rows(array: NDArray[Any]) -> tuple[NDArray[np.float32], list[int]]:
    """Rows of numbers (N, F) in float32, and those, from 0, that hold a number that is not finite."""
    with np.errstate(over="ignore"):  # what is too large for float32 is then not finite
        rows = array.astype(np.float32, copy=False)
    return rows, np.flatnonzero(~np.isfinite(rows).all(axis=1)).tolist()


def checked_rows(features: ArrayLike, width: int, medium: str) -> tuple[NDArray[np.float32], list[int]]:
    """Rows for a model that takes F numbers an item; see :func:`float32_rows`.

    Raises:
        ItemError: no rows of F numbers.
    """
    try:
        array = np.asarray(features)
    except ValueError as error:  # rows of unequal length
        raise ItemError(f"{medium} features are no array ({error}); expected rows of {width} numbers") from error
    if not _numbers(array) or array.ndim != 2 or array.shape[1] != width:
        raise ItemError(f"{medium} features are {described(array)}; expected rows of {width} numbers")
    return float32_rows(array)


def described(array: NDArray[Any]) -> str:
    """An array in words, for errors."""
    return f"an array of {array.dtype} with shape {array.shape}"


def _numbers(array: NDArray[Any]) -> bool:
    return array.dtype.kind in "fiu"


def _loaded(file: Path, expected: str) -> NDArray[Any]:
    try:
        array = np.load(file, allow_pickle=False)
    except FileNotFoundError as error:
        raise CorpusError(f"{file}: there is no such file; {expected}") from error
    except (OSError, EOFError, ValueError) as error:
        raise CorpusError(f"{file}: no NumPy .npy file without pickles ({error}); {expected}") from error
    if not isinstance(array, np.ndarray):
        array.close()
        raise CorpusError(f"{file}: holds several arrays; {expected}")
    return array
