"""The media of a training: pictures and texts, and others whose items are vectors.

A medium's name is part of file names (``vectors/audio.npy``, ``audio.onnx``), of the names of directions
(``image_to_audio``) and of loss terms (``mmd/audio.fc6``), so it is a plain word.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import permutations

MEDIA = ("image", "text")  # of every corpus; it may have more
_NAME = re.compile("[a-z][a-z0-9]*")
# Keys of feature files, and words that stand for several media in names of loss terms.
_TAKEN = frozenset({*MEDIA, "labels", "ids", "split", "train", "val", "test", "common"})


def directions(media: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Every ordered pair of media, that of the queries and that of what they find, by name.

    >>> directions(("image", "text"))
    {'image_to_text': ('image', 'text'), 'text_to_image': ('text', 'image')}
    """
    return {f"{asked}_to_{found}": (asked, found) for asked, found in permutations(media, 2)}


def in_words(direction: str) -> str:
    """A direction for people.

    >>> in_words("image_to_text")
    'image to text'
    """
    return direction.replace("_", " ")


def is_direction(key: str) -> bool:
    """Whether a key of an evaluation is a direction, and not one of the figures beside them."""
    return "_to_" in key


def faulty_names(names: Sequence[str]) -> list[str]:
    """What is wrong with the names of vector-valued media, a phrase each; empty if nothing is."""
    faults = [f"{name!r} is no name of a medium; expected small letters and digits" for name in names if _wrong(name)]
    faults += [f"{name!r} has a meaning of its own; choose another name" for name in names if name in _TAKEN]
    return [*faults, *([f"{', '.join(names)}: a name occurs twice"] if len(set(names)) < len(names) else [])]


def _wrong(name: str) -> bool:
    return not _NAME.fullmatch(name)
