"""A corpus of ready features: pairs of an image vector and a text vector in one ``.npz`` file, with no picture or word.

A corpus argument names the file, and behind a colon the arrays that are not called by the usual names::

    wikipedia/features.npz:text=text_tfidf,val=val231

============  ==========================================================================================================
key           array, N rows; in brackets the name that is looked for where the argument gives none
============  ==========================================================================================================
image         (N, F) numbers (``image``, else the only array of that shape whose name begins with ``image``)
text          (N, G) numbers (``text``, else likewise)
MEDIUM        likewise, of each other medium that a training asks for, such as ``audio``
labels        (N,) text or integers (``labels``; may be absent where the reader is told that labels are unknown)
class_names   (C,) text, the names of integer labels that count from 0 (``class_names``; may be absent)
ids           (N,) text or integers, all different (``ids``; where absent, the number of the row)
split         (N,) ``train``, ``val`` or ``test`` (``split``; where absent, every row is ``train``)
train         row numbers, from 0: exactly these rows are the train split, whatever ``split`` says (none)
val           likewise (none)
test          likewise (none)
============  ==========================================================================================================

A row that a list names belongs to that list's split. A row whose split has a list that does not name it is left out.
Arrays with Python objects would need a pickle, which can run code; they are refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from dckt.errors import CorpusError
from dckt.features import described, float32_rows
from dckt_trainer.data.corpus import (
    SPLITS,
    Corpus,
    Labels,
    OnBadPair,
    Split,
    check_labels,
    labels_of,
    own_label,
    warnings_of,
)
from dckt_trainer.media import MEDIA

KEYS = ("labels", "class_names", "ids", "split", *SPLITS)  # and the media
_SUFFIX = ".npz"


@dataclass(frozen=True)
class FeaturePair:
    """A row of the arrays.

    Attributes:
        id: unique within the corpus.
        label: the class.
        split: what the pair is used for.
        row: its place in the arrays.
        image: there is no picture.
        text: there are no words.
    """

    id: str
    label: str
    split: Split
    row: int
    image: None = None
    text: str = ""


@dataclass(frozen=True)
class FeatureCorpus:
    """The valid pairs of a feature file, in the order of its rows.

    Attributes:
        name: name of the file, without its ending.
        root: absolute path of the file.
        features: for each medium (N, F) float32, all rows of the file.
        pairs: every pair that passed the checks and has a split.
        skipped: one line for each mistake of the rows that were left out; empty unless bad pairs are skipped.
    """

    name: str
    root: Path
    features: Mapping[str, NDArray[np.float32]]
    pairs: tuple[FeaturePair, ...]
    skipped: tuple[str, ...] = ()

    def part(self, split: Split) -> tuple[FeaturePair, ...]:
        """The pairs of one split, in the order of the rows."""
        return tuple(pair for pair in self.pairs if pair.split == split)

    def vectors(self, split: Split) -> dict[str, NDArray[np.float32]]:
        """For each medium the features (n, F) float32 of the pairs of one split, in their order."""
        rows = [pair.row for pair in self.part(split)]
        return {medium: features[rows] for medium, features in self.features.items()}

    @property
    def widths(self) -> dict[str, int]:
        """For each medium F."""
        return {medium: features.shape[1] for medium, features in self.features.items()}

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """The labels, sorted. A label's place is its class number."""
        return labels_of(self.pairs)

    @cached_property
    def warnings(self) -> tuple[str, ...]:
        """What is allowed but worth knowing: labels with a single train pair, splits without pairs."""
        return warnings_of(self.pairs)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, in hex, over every pair's id, label, split and features; not over the file's place."""
        digest = hashlib.sha256(json.dumps([[p.id, p.label, p.split] for p in self.pairs]).encode())
        rows = [pair.row for pair in self.pairs]
        for medium, features in self.features.items():
            digest.update(f"{medium} {features.shape[1]} ".encode())
            for start in range(0, len(rows), 1024):  # a copy of all would take as much memory again
                digest.update(features[rows[start : start + 1024]].tobytes())
        return digest.hexdigest()


AnyCorpus: TypeAlias = Corpus | FeatureCorpus


def is_feature_corpus(path: str | os.PathLike[str]) -> bool:
    """Whether a corpus argument names a file of ready features."""
    return _file(path)[0].suffix == _SUFFIX


def read_feature_corpus(
    path: str | os.PathLike[str],
    *,
    vectors: Sequence[str] = (),
    labels: Labels = "known",
    on_bad_pair: OnBadPair = "raise",
) -> FeatureCorpus:
    """Reads and checks a file of ready features as a whole.

    Args:
        path: the file, and maybe behind a colon names of arrays: ``features.npz:image=sift,val=rows_of_val``.
        vectors: names of the media to read beside ``image`` and ``text``.
        labels: ``unknown`` takes rows without a label, each of which has then one of its own.
        on_bad_pair: ``raise`` lists the mistakes of all rows in one error; ``skip`` leaves the bad rows out and records
            them in :attr:`FeatureCorpus.skipped`. Of rows with the same id the first one counts.

    Raises:
        CorpusError: there is no such file or array, shapes do not fit, a number is not finite, an id stands twice,
            no pair is left, fewer than two labels have train pairs, or a label of val or test has none.
    """
    media = (*MEDIA, *vectors)
    file, names = _parts(path, (*media, *KEYS))
    file = file.resolve()
    try:
        if not zipfile.is_zipfile(file):
            raise ValueError("there is no such file, or it is another kind of file")
        with np.load(file, allow_pickle=False) as arrays:
            return _Reader(file, arrays, names, labels).read(media, on_bad_pair)
    except (OSError, EOFError, zipfile.BadZipFile, ValueError) as error:
        if isinstance(error, CorpusError):
            raise
        raise CorpusError(f"{file}: cannot be read as a NumPy .npz file without pickles ({error})") from error


def _file(path: str | os.PathLike[str]) -> tuple[Path, str | None]:
    """The file, and what stands behind ``.npz:`` where a name goes on there."""
    text = os.fspath(path)
    file, colon, rest = text.partition(f"{_SUFFIX}:")
    return (Path(file + _SUFFIX), rest) if colon else (Path(text), None)


def _parts(path: str | os.PathLike[str], keys: Sequence[str]) -> tuple[Path, dict[str, str]]:
    """The file, and the array by key."""
    file, rest = _file(path)
    names: dict[str, str] = {}
    if rest is None:
        return file, names
    for item in rest.split(","):
        key, equals, name = item.partition("=")
        if not equals or not name or key not in keys or key in names:
            raise CorpusError(
                f"{path}: {item!r} is not understood; expected FILE.npz:KEY=ARRAY,KEY=ARRAY with each key once, "
                f"of: {', '.join(keys)}"
            )
        names[key] = name
    return file, names


class _Reader:
    """Takes the arrays of a file apart; gathers what is wrong with single rows."""

    def __init__(
        self, file: Path, arrays: Mapping[str, NDArray[Any]], names: Mapping[str, str], labels: Labels
    ) -> None:
        self.file, self.held, self.names, self.labels = file, sorted(arrays), names, labels
        self.load = cache(arrays.__getitem__)  # each access would decompress the array again
        self.faults: dict[int, list[str]] = {}

    def read(self, media: Sequence[str], on_bad_pair: OnBadPair) -> FeatureCorpus:
        features = {medium: self._features(medium) for medium in media}
        count = len(features["image"])
        for medium, rows in features.items():
            if len(rows) != count:
                raise self._error(f"there are {count} rows of image features and {len(rows)} of {medium} features")
        ids, splits = self._ids(count), self._splits(count)
        labels = self._labels(count, ids)
        mistakes = tuple(f"row {row}: {fault}" for row in sorted(self.faults) for fault in self.faults[row])
        if mistakes and on_bad_pair == "raise":
            raise CorpusError(
                f"{self.file}: {len(self.faults)} of {count} rows cannot be used; correct them, or leave them out with "
                "on_bad_pair='skip'",
                mistakes,
            )
        pairs = tuple(
            FeaturePair(ids[row], labels[row], split, row)
            for row, split in enumerate(splits)
            if split is not None and row not in self.faults
        )
        if not pairs:
            raise CorpusError(f"{self.file}: none of {count} rows can be used", mistakes)
        check_labels(self.file, pairs, self.labels)
        return FeatureCorpus(self.file.stem, self.file, features, pairs, mistakes)

    def _features(self, medium: str) -> NDArray[np.float32]:
        array = self._array(medium)
        if array is None:
            found = [name for name in self.held if name.startswith(medium) and self.load(name).ndim == 2]
            if len(found) != 1:
                wrong = f"{' and '.join(found)} may be" if found else "no array is"
                example = f"{self.file.name}:{medium}={found[0] if found else 'ARRAY'}"
                raise self._error(f"{wrong} the {medium} features; name one, for example {example}")
            array = self.load(found[0])
        if array.ndim != 2 or not array.size or array.dtype.kind not in "fiu":
            raise self._error(f"the {medium} features are {described(array)}; expected rows of numbers")
        rows, bad = float32_rows(array)
        for row in bad:
            self._fault(row, f"the {medium} features hold a number that is not finite")
        return rows

    def _labels(self, count: int, ids: Sequence[str]) -> list[str]:
        labels = self._column("labels", count, may_lack=self.labels == "unknown")
        if labels is None and self.labels == "unknown":
            return [own_label(key) for key in ids]
        if labels is None:
            raise self._error("there are no labels; name an array with labels=ARRAY")
        names = self._array("class_names")
        if names is None or self.load(self.names.get("labels", "labels")).dtype.kind == "U":
            if "class_names" in self.names:
                raise self._error("class_names are of integer labels, and the labels are texts; leave class_names out")
            return [label if label.strip() else own_label(key) for label, key in zip(labels, ids, strict=True)]
        if names.ndim != 1 or names.dtype.kind != "U" or len(set(names.tolist())) < len(names):
            raise self._error(f"class_names is {described(names)}; expected different names")
        for row, label in enumerate(labels):
            if not 0 <= int(label) < len(names):
                self._fault(row, f"label {label} has no name; class_names has {len(names)}, counted from 0")
                labels[row] = ""
        return [str(names[int(label)]) if label else "" for label in labels]

    def _ids(self, count: int) -> list[str]:
        ids = self._column("ids", count)
        if ids is None:
            return [str(row) for row in range(count)]
        first: dict[str, int] = {}
        for row, key in enumerate(ids):
            if first.setdefault(key, row) != row:
                self._fault(row, f"id {key!r} is that of row {first[key]} already")
        return ids

    def _splits(self, count: int) -> list[Split | None]:
        named = self._column("split", count)
        splits: list[Split | None] = ["train"] * count
        if named is not None:
            for row, value in enumerate(named):
                if value in SPLITS:
                    splits[row] = value
                else:
                    splits[row] = None
                    self._fault(row, f"split is {value!r}; expected train, val or test")
        lists = {split: rows for split in SPLITS if (rows := self._rows(split, count)) is not None}
        splits = [None if split in lists else split for split in splits]
        taken: dict[int, Split] = {}
        for split, rows in lists.items():
            for row in rows:
                if row in taken:
                    raise self._error(f"row {row} is listed for {taken[row]} and for {split}, or twice")
                taken[row] = splits[row] = split
        return splits

    def _rows(self, split: Split, count: int) -> list[int] | None:
        rows = self._array(split)
        if rows is None:
            return None
        if rows.ndim != 1 or rows.dtype.kind not in "iu" or not len(rows) or rows.min() < 0 or rows.max() >= count:
            raise self._error(f"the rows of {split} are {described(rows)}; expected numbers from 0 to {count - 1}")
        return [int(row) for row in rows]

    def _column(self, key: str, count: int, *, may_lack: bool = False) -> list[str] | None:
        """An array of text or integers, as text."""
        array = self._array(key)
        if array is None:
            return None
        if array.shape != (count,) or array.dtype.kind not in "Uiu":
            raise self._error(f"{key} is {described(array)}; expected {count} texts or integers, one for each row")
        values = [str(value) for value in array.tolist()]
        for row, value in enumerate(values):
            if not value.strip() and not may_lack:
                self._fault(row, f"{key} is empty")
        return values

    def _array(self, key: str) -> NDArray[Any] | None:
        """The array of a key; None where none is named and none has the usual name. Lists of rows have no usual one."""
        name = self.names.get(key, "" if key in SPLITS else key)
        if name in self.held:
            return self.load(name)
        if key in self.names:
            raise self._error(f"there is no array {name!r} for {key}")
        return None

    def _fault(self, row: int, text: str) -> None:
        self.faults.setdefault(row, []).append(text)

    def _error(self, text: str) -> CorpusError:
        return CorpusError(f"{self.file}: {text}; the file has the arrays {', '.join(self.held)}")
