"""Refuses arguments of an index that it cannot work with."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral, Real
from pathlib import Path

from numpy.typing import ArrayLike

from dckt.errors import ConfigError, IndexFolderError, ItemError, ModelMismatchError
from dckt.index.schema import IndexMeta
from dckt.index.vectors import Float32Array, normalised

_MEDIUM = re.compile(r"[a-z][a-z0-9_]{0,31}")


def check_model(path: Path, meta: IndexMeta, model_id: str | None, representation: str | None) -> None:
    """Refuses an index of another model than the one asked for, if one is."""
    ways_out = (
        "open it with the bundle that made it, or index the collection again with: "
        f"dckt index BUNDLE {path} --force ..."
    )
    if model_id not in {None, meta.model_id}:
        raise ModelMismatchError(
            f"{path}: its vectors were made by model {meta.model_id}, and it was opened with {model_id}; {ways_out}"
        )
    if representation not in {None, meta.representation}:
        raise ModelMismatchError(
            f"{path}: it holds the representation {meta.representation!r} of model {meta.model_id}, "
            f"and it was opened for {representation!r} of model {model_id}; {ways_out}"
        )


def check_medium(medium: object) -> None:
    """Refuses what cannot be the name of a medium."""
    if not isinstance(medium, str) or not _MEDIUM.fullmatch(medium):
        raise ConfigError(f"medium is {medium!r}; expected lower-case letters, digits and _, at most 32")


def check_search(k: object, media: object, min_score: object) -> None:
    """Refuses what cannot be asked of a search."""
    if (type(k) is not int and (isinstance(k, bool) or not isinstance(k, Integral))) or k < 1:
        raise ConfigError(f"k is {k!r}; expected an integer, at least 1")
    if media is not None and (
        isinstance(media, str) or not isinstance(media, Collection) or not all(isinstance(name, str) for name in media)
    ):
        raise ConfigError(f"media is {media!r}; expected a list such as ['image'], or None for all")
    if min_score is not None and not is_number(min_score):
        raise ConfigError(f"min_score is {min_score!r}; expected a finite number, or None")


def is_number(value: object) -> bool:
    """Whether something is a finite number."""
    return type(value) is not bool and isinstance(value, Real) and math.isfinite(value)


def check_threads(threads: int | None) -> None:
    """Refuses less than one thread; None is every core."""
    if threads is not None and threads < 1:
        raise ConfigError(f"threads is {threads}; expected at least 1, or None for every core")


@contextmanager
def folder_errors(path: Path) -> Iterator[None]:
    """Turns errors of the disk into ours."""
    try:
        yield
    except FileExistsError as error:
        raise IndexFolderError(f"{path}: exists already; open it to add to it, or choose another name") from error
    except OSError as error:
        raise IndexFolderError(f"{path}: the index cannot be written ({error})") from error


def second_vectors(meta: IndexMeta, ids: Sequence[str], second: ArrayLike | None) -> Float32Array | None:
    """Second vectors (N, D2) as they are stored; refuses some where the index keeps none, and none where it does."""
    width = meta.second_dimension
    if (second is None) != (width is None):
        raise ItemError(
            "the index keeps no second vectors, and some were given"
            if width is None
            else f"the index keeps second vectors ({meta.second!r}, {width} wide), and none were given"
        )
    return None if second is None or width is None else normalised(second, dimension=width, names=ids)
