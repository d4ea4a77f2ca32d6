"""Reads what is to be indexed: folders of pictures, files of texts, and corpora of pairs.

Every reader checks all of its input and reports the mistakes at once, each with its line. Pictures are looked for, not
decoded; that happens when they are encoded.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from dckt.errors import ConfigError, CorpusError
from dckt.features import FOLDER, read_rows
from dckt.index.items import is_id

PICTURES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
ON_ERROR = ("raise", "skip")

Source = TypeVar("Source", Path, str, NDArray[np.float32])
# The place of a row in its file, and its fields or what is wrong with it.
_Row: TypeAlias = tuple[int, Mapping[str, Any] | ValueError]


@dataclass(frozen=True)
class Item(Generic[Source]):
    """One item to index.

    Attributes:
        id: different from that of every other item of its medium.
        source: path of the picture, the text itself, or the features (F,) of another medium.
        metadata: what is stored with it.
    """

    id: str
    source: Source
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Collection:
    """What was read.

    Attributes:
        images: pictures, in the order of the input.
        texts: texts, in the order of the input.
        features: for each other medium its items, in the order of the input: rows of numbers.
        skipped: one line for each mistake that was passed over.
    """

    images: tuple[Item[Path], ...] = ()
    texts: tuple[Item[str], ...] = ()
    features: Mapping[str, tuple[Item[NDArray[np.float32]], ...]] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()

    def __len__(self) -> int:
        """How many items there are, of all media."""
        return len(self.images) + len(self.texts) + sum(map(len, self.features.values()))

    def __add__(self, other: Collection) -> Collection:
        """Both, one behind the other."""
        return Collection(
            images=self.images + other.images,
            texts=self.texts + other.texts,
            features={
                medium: (*self.features.get(medium, ()), *other.features.get(medium, ()))
                for medium in {**self.features, **other.features}
            },
            skipped=self.skipped + other.skipped,
        )


def collect_images(path: str | Path, *, on_error: str = "raise") -> Collection:
    """The pictures of a folder and of the folders in it, in the order of their names; or one picture.

    An item's id is its path relative to the folder. Hidden files and folders are passed over. Metadata: ``image``, the
    absolute path.

    Args:
        path: a folder, or a picture.
        on_error: ``raise``, or ``skip`` names that are not Unicode.

    Raises:
        CorpusError: there is no such path, it holds no picture, or a name is not Unicode.
    """
    _check_on_error(on_error)
    path = Path(path)
    if path.is_file():
        root, files = path.parent, [path]
    elif path.is_dir():
        root, files = path, list(_pictures(path))
    else:
        raise CorpusError(f"{path}: there is no such folder or file; expected pictures")
    named = [(file.relative_to(root).as_posix(), file) for file in files]
    mistakes = [f"{name!a}: the name is not Unicode; rename the file" for name, _ in named if not is_id(name)]
    _settle_mistakes(path, mistakes, on_error)
    images = tuple(Item(name, file, {"image": _absolute(file)}) for name, file in named if is_id(name))
    if not images:
        raise CorpusError(f"{path}: holds no picture; expected files that end with {', '.join(sorted(PICTURES))}")
    return Collection(images=images, skipped=tuple(mistakes))


def collect_texts(path: str | Path, *, on_error: str = "raise") -> Collection:
    """The texts of a file.

    ==========  ==================================================================================================
    ``.txt``    one text a line; its id is the number of the line; empty lines are passed over
    ``.jsonl``  one object a line with ``id`` and ``text``; its other fields become metadata
    ``.csv``    a header with ``id`` and ``text``; the other columns become metadata
    ==========  ==================================================================================================

    Metadata: ``text``, the text itself, and the other fields.

    Args:
        path: the file, UTF-8.
        on_error: ``raise``, or ``skip`` bad lines.

    Raises:
        CorpusError: there is no such file, or lines are bad; each is named.
    """
    _check_on_error(on_error)
    path = Path(path)
    if path.suffix == ".txt":
        lines = enumerate(_read(path).split("\n"), start=1)
        rows: Iterator[_Row] = (
            (place, {"id": str(place), "text": line.strip()}) for place, line in lines if line.strip()
        )
    else:
        rows = _rows(path, ("id", "text"), "expected .txt, .jsonl or .csv")
    texts, mistakes = _checked(path, rows, _text_item, on_error)
    return Collection(texts=tuple(texts), skipped=tuple(mistakes))


def media_of_corpus(path: str | Path) -> list[str]:
    """The media that a corpus has beside pictures and texts, by the files in its folder ``vectors``."""
    path = Path(path)
    return sorted(file.stem for file in ((path if path.is_dir() else path.parent) / FOLDER).glob("*.npy"))


def collect_pairs(
    path: str | Path, *, split: str | None = None, media: Sequence[str] = (), on_error: str = "raise"
) -> Collection:
    """The pictures and texts of a corpus of pairs, and features of other media; all of a pair get its id.

    Args:
        path: a folder with ``pairs.jsonl`` or ``pairs.csv``, or such a file. A row has ``id``, ``image`` (path relative
            to the file's folder), ``text``, and may have ``label`` and ``split``.
        split: only pairs of this split, such as ``test``.
        media: those to read from ``vectors/MEDIUM.npy``, which has a row for each row of the corpus, in its order.
        on_error: ``raise``, or ``skip`` bad rows.

    Metadata: ``label``, ``split``, and ``image`` (absolute path) or ``text``.

    Raises:
        CorpusError: there is no such corpus, an array is missing or does not fit it, rows are bad (each is named), or
            none has that split.
    """
    _check_on_error(on_error)
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in ("pairs.jsonl", "pairs.csv") if (path / name).is_file()]
        if len(found) != 1:
            raise CorpusError(f"{path}: holds {len(found)} of pairs.jsonl and pairs.csv; expected one of them")
        path = found[0]
    root = path.parent

    def pair(fields: Mapping[str, Any]) -> tuple[Item[Path], Item[str]]:
        picture = root / _text(fields, "image")
        if not picture.is_file():
            raise ValueError(f"image {fields['image']!r} does not exist in {root}")
        about = {key: fields[key] for key in ("label", "split") if fields.get(key) not in (None, "")}
        name, text = _id(fields), _text(fields, "text")
        return Item(name, picture, {**about, "image": _absolute(picture)}), Item(name, text, {**about, "text": text})

    read = list(_rows(path, ("id", "image", "text"), "expected pairs.jsonl or pairs.csv"))
    rows = iter(read)
    if split is not None:
        rows = ((place, row) for place, row in rows if isinstance(row, ValueError) or row.get("split") == split)
    pairs, mistakes = _checked(path, rows, pair, on_error)
    if not pairs:
        raise CorpusError(f"{path}: holds no pair" + (f" with split {split!r}" if split is not None else ""), mistakes)
    texts = tuple(text for _, text in pairs)
    features = {medium: _features(path, medium, read, texts, on_error, mistakes) for medium in media}
    return Collection(
        images=tuple(image for image, _ in pairs), texts=texts, features=features, skipped=tuple(mistakes)
    )


def _features(
    path: Path, medium: str, rows: Sequence[_Row], texts: Sequence[Item[str]], on_error: str, mistakes: list[str]
) -> tuple[Item[NDArray[np.float32]], ...]:
    """Those of the pairs whose texts are given; what is not finite is a mistake more."""
    array, bad = read_rows(path.parent / FOLDER / f"{medium}.npy", len(rows), path.name)
    numbers: dict[str, int] = {}
    for number, (_, row) in enumerate(rows):
        if not isinstance(row, ValueError):
            numbers.setdefault(str(row["id"]), number)
    unusable = set(bad)
    faults = [
        f"{FOLDER}/{medium}.npy, row {numbers[text.id]} from 0, pair {text.id!r}: holds a number that is not finite"
        for text in texts
        if numbers[text.id] in unusable
    ]
    _settle_mistakes(path, faults, on_error)
    mistakes += faults
    return tuple(
        Item(text.id, array[numbers[text.id]], {key: value for key, value in text.metadata.items() if key != "text"})
        for text in texts
        if numbers[text.id] not in unusable
    )


def _pictures(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith(".") and Path(name).suffix.lower() in PICTURES:
                yield Path(parent, name)


# --- rows ---


def _rows(path: Path, columns: Sequence[str], expected: str) -> Iterator[_Row]:
    readers: Mapping[str, Callable[[str], Iterator[_Row]]] = {".jsonl": _jsonl_rows, ".csv": _csv_rows}
    if path.suffix not in readers:
        raise CorpusError(f"{path}: its name ends with {path.suffix!r}; {expected}")
    for place, row in readers[path.suffix](_read(path)):
        missing = [] if isinstance(row, ValueError) else [name for name in columns if row.get(name) in (None, "")]
        yield place, ValueError(f"{' and '.join(missing)} is missing or empty") if missing else row


def _jsonl_rows(content: str) -> Iterator[_Row]:
    for place, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield place, ValueError(f"is not JSON ({error})")
        else:
            yield place, row if isinstance(row, dict) else ValueError("is not a JSON object")


def _csv_rows(content: str) -> Iterator[_Row]:
    reader = csv.DictReader(io.StringIO(content, newline=""), strict=True)
    place = 2
    try:
        for row in reader:
            if None in row or None in row.values():
                yield place, ValueError(f"has not as many cells as the header ({len(reader.fieldnames or ())})")
            else:
                yield place, dict(row)
            # A quoted cell may hold line breaks: the next row starts behind the last line of this one.
            place = reader.line_num + 1
    except csv.Error as error:
        yield place, ValueError(f"is not CSV ({error}); nothing behind it was read")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise CorpusError(f"{path}: cannot be read ({error}); check the path") from error
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path}: is not UTF-8 ({error}); save it as UTF-8") from error


_Made = TypeVar("_Made")


def _checked(
    path: Path, rows: Iterator[_Row], make: Callable[[Mapping[str, Any]], _Made], on_error: str
) -> tuple[list[_Made], list[str]]:
    """What the good rows become, and a line for each bad one; a :class:`ValueError` of ``make`` says what is wrong."""
    made: list[_Made] = []
    mistakes: list[str] = []
    first: dict[str, int] = {}
    for place, row in rows:
        try:
            if isinstance(row, ValueError):
                raise row
            name = _id(row)
            if name in first:
                raise ValueError(f"id {name!r} is that of line {first[name]} already")
            made.append(make(row))
            first[name] = place
        except ValueError as error:
            mistakes.append(f"{path.name}, line {place}: {error}")
    _settle_mistakes(path, mistakes, on_error)
    return made, mistakes


def _text_item(fields: Mapping[str, Any]) -> Item[str]:
    text = _text(fields, "text")
    return Item(_id(fields), text, {**{key: value for key, value in fields.items() if key != "id"}, "text": text})


def _id(fields: Mapping[str, Any]) -> str:
    value = fields["id"]
    name = str(value) if type(value) in (str, int) else ""
    if not is_id(name):
        raise ValueError(f"id is {value!r}; expected a text or an integer")
    return name


def _text(fields: Mapping[str, Any], name: str) -> str:
    value = fields[name]
    if not isinstance(value, str) or not value.strip() or not is_id(value) or "\0" in value:
        raise ValueError(f"{name} is {value!r}; expected a text that is not empty")
    return value


def _settle_mistakes(path: Path, mistakes: Sequence[str], on_error: str) -> None:
    if mistakes and on_error == "raise":
        raise CorpusError(
            f"{path}: {len(mistakes)} entries cannot be used; correct them, or leave them out with on_error='skip' "
            "(--on-error skip)",
            mistakes,
        )


def _check_on_error(on_error: str) -> None:
    if on_error not in ON_ERROR:
        raise ConfigError(f"on_error is {on_error!r}; expected raise or skip")


def _absolute(path: Path) -> str:
    return str(path.absolute())
