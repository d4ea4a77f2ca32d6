"""A corpus: pairs of a picture and a text, each with a label and a split.

A corpus is a folder with one manifest, ``pairs.jsonl``, ``pairs.csv`` or ``pairs.parquet``, and the pictures
that it names. The manifest has one pair a row and these columns; others are ignored:

========  =========================================================================================
id        text, not empty, different in every row
image     path of the picture, relative to the folder of the manifest and inside it
text      text with at least one word; several captions are joined by newlines
label     the class, as text or integer, not empty unless the reader is told that labels are unknown
split     ``train``, ``val`` or ``test``; absent from every row, or from none
========  =========================================================================================

A medium beside pictures and texts is a NumPy array of numbers in the folder ``vectors``, such as ``vectors/audio.npy``,
with a row for each row of the manifest, in its order. It is read where a training asks for that medium.

Where no row has a split, one is made. Within each label the ids are ordered by
``sha256("split:{split_seed}:{id}")``; of n pairs the first tenth (rounded, halves up) becomes ``val``, the
next tenth ``test``, the others ``train``; so a label with fewer than five pairs has train pairs only. The
same ids, labels and seed give the same split on every machine, whatever the order of the rows and the state
of the pictures.

A label with a single train pair is allowed, and named by :attr:`Corpus.warnings`.

Where labels are unknown, a pair without one has a label of its own, so that nothing but its partner fits an item; and
the split is made without regard to labels.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Protocol, TypeAlias, cast, get_args

import numpy as np
from numpy.typing import NDArray

from dckt.errors import ConfigError, CorpusError, ImageError, MissingExtraError
from dckt.features import FOLDER, read_rows
from dckt.preprocessing import decode_image, tokenize

Split: TypeAlias = Literal["train", "val", "test"]
OnBadPair: TypeAlias = Literal["raise", "skip"]
CheckImages: TypeAlias = Literal["decode", "exists"]
Labels: TypeAlias = Literal["known", "unknown"]
Progress: TypeAlias = Callable[[int, int], None]

COLUMNS = ("id", "image", "text", "label")
SPLITS: tuple[Split, ...] = get_args(Split)
_NAMED = 10


@dataclass(frozen=True)
class Pair:
    """A picture and the text that belongs to it.

    Attributes:
        id: unique within the corpus.
        image: absolute path of the picture.
        text: holds at least one word.
        label: the class.
        split: what the pair is used for.
        vectors: (F,) float32 of each other medium that was asked for, by its name.
    """

    id: str
    image: Path
    text: str
    label: str
    split: Split
    vectors: Mapping[str, NDArray[np.float32]] = field(default_factory=dict, compare=False, repr=False)


class Labelled(Protocol):
    """What every kind of pair has."""

    @property
    def id(self) -> str:
        """Unique within the corpus."""
        ...

    @property
    def label(self) -> str:
        """The class."""
        ...

    @property
    def split(self) -> Split:
        """What the pair is used for."""
        ...


@dataclass(frozen=True)
class Corpus:
    """The valid pairs of a corpus folder, in the order of the manifest.

    Attributes:
        name: name of the folder.
        root: absolute path of the folder.
        pairs: every pair that passed the checks.
        skipped: one line for each mistake of the rows that were left out; empty unless bad pairs are skipped.
    """

    name: str
    root: Path
    pairs: tuple[Pair, ...]
    skipped: tuple[str, ...] = ()

    def part(self, split: Split) -> tuple[Pair, ...]:
        """The pairs of one split, in the order of the manifest.

        Raises:
            ConfigError: there is no such split.
        """
        _one_of("split", split, SPLITS)
        return tuple(pair for pair in self.pairs if pair.split == split)

    def vectors(self, split: Split) -> dict[str, NDArray[np.float32]]:
        """For each medium of vectors those of the pairs of one split, (n, F) float32, in their order."""
        return {medium: np.stack([pair.vectors[medium] for pair in self.part(split)]) for medium in self.widths}

    @property
    def widths(self) -> dict[str, int]:
        """For each medium of vectors F, in the order in which the media were asked for."""
        return {medium: len(row) for medium, row in self.pairs[0].vectors.items()}

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
        """SHA-256, in hex, over all fields and vectors; not over the folder's place or the pictures' content."""
        rows = [[p.id, p.image.relative_to(self.root).as_posix(), p.text, p.label, p.split] for p in self.pairs]
        digest = hashlib.sha256(json.dumps(rows, ensure_ascii=False).encode())
        for medium, width in self.widths.items():
            digest.update(f"{medium} {width} ".encode())
            for pair in self.pairs:
                digest.update(pair.vectors[medium].tobytes())
        return digest.hexdigest()


def read_corpus(
    path: str | os.PathLike[str],
    *,
    vectors: Sequence[str] = (),
    labels: Labels = "known",
    on_bad_pair: OnBadPair = "raise",
    check_images: CheckImages = "decode",
    split_seed: int = 0,
    progress: Progress | None = None,
) -> Corpus:
    """Reads and checks a corpus as a whole.

    Args:
        path: a folder with one manifest, or a manifest itself (``.jsonl``, ``.csv`` or ``.parquet``).
        vectors: names of the media to read beside pictures and texts.
        labels: ``"unknown"`` takes pairs without a label, or with one that no train pair has.
        on_bad_pair: ``"raise"`` lists the mistakes of all rows in one error; ``"skip"`` leaves the bad rows
            out and records them in :attr:`Corpus.skipped`. Of rows with the same id the first one counts.
        check_images: ``"decode"`` decodes every picture, ``"exists"`` only looks for the files.
        split_seed: seed of the split that is made where no row has one.
        progress: called with (pictures checked, pictures in all).

    Raises:
        CorpusError: there is no single manifest, an array of vectors is missing or does not fit it, a row is bad, no
            pair is left, there are no train pairs, fewer than two labels have train pairs, or a label of val or test
            has none.
        ConfigError: an argument with a value that is not offered.
        MissingExtraError: a Parquet manifest, and pyarrow is not installed.
    """
    _one_of("labels", labels, get_args(Labels))
    _one_of("on_bad_pair", on_bad_pair, get_args(OnBadPair))
    _one_of("check_images", check_images, get_args(CheckImages))
    manifest = _manifest(Path(path).resolve())
    root = manifest.parent
    unit = "row" if manifest.suffix == ".parquet" else "line"
    try:
        required = COLUMNS if labels == "known" else tuple(name for name in COLUMNS if name != "label")
        found = _READERS[manifest.suffix](manifest, required)
        rows = [_row(place, raw, root, known=labels == "known") for place, raw in found]
    except OSError as error:
        raise CorpusError(f"{manifest}: cannot be read ({error}); check the file") from error
    if not rows:
        raise CorpusError(f"{manifest}: holds no pair; expected one a row")
    arrays = {medium: _vectors(manifest, medium, rows) for medium in vectors}
    _check_ids(rows, unit)
    _check_splits(rows, split_seed, by_label=labels == "known")
    _check_images(rows, root, check_images, progress)

    mistakes = tuple(f"{unit} {row.place}: {fault}" for row in rows for fault in row.faults)
    if mistakes and on_bad_pair == "raise":
        bad = sum(bool(row.faults) for row in rows)
        raise CorpusError(
            f"{manifest}: {bad} of {len(rows)} pairs cannot be used; correct them, or leave them out with "
            "on_bad_pair='skip'",
            mistakes,
        )
    pairs = tuple(
        _pair(row.fields, root, {medium: array[number] for medium, array in arrays.items()})
        for number, row in enumerate(rows)
        if not row.faults
    )
    if not pairs:
        raise CorpusError(f"{manifest}: none of {len(rows)} pairs can be used", mistakes)
    check_labels(manifest, pairs, labels)
    return Corpus(root.name, root, pairs, mistakes)


def ranked(labels: Iterable[tuple[str, str]], salt: str) -> Iterator[list[str]]:
    """The ids of each label, in an order that hangs on salt and id alone.

    Args:
        labels: (id, label) of each pair.
        salt: another one gives another order.
    """
    groups: dict[str, list[str]] = defaultdict(list)
    for key, label in labels:
        groups[label].append(key)
    for ids in groups.values():
        yield sorted(ids, key=lambda key: hashlib.sha256(f"{salt}:{key}".encode()).digest())


def labels_of(pairs: Iterable[Labelled]) -> tuple[str, ...]:
    """The labels, sorted; all of them have train pairs, but where labels are unknown."""
    return tuple(sorted({pair.label for pair in pairs}))


def warnings_of(pairs: Sequence[Labelled]) -> tuple[str, ...]:
    """What is allowed but worth knowing: labels with a single train pair, splits without pairs."""
    counts = Counter(pair.label for pair in pairs if pair.split == "train")
    single = sorted(label for label, count in counts.items() if count == 1)
    found = {pair.split for pair in pairs}
    empty = tuple(f"no {split} pairs" for split in SPLITS if split not in found)
    return (*empty, *([f"labels with a single train pair: {_named(single)}"] if single else []))


def own_label(key: str) -> str:
    """The label of a pair that has none, from its id."""
    return f"pair {key}"


def check_labels(manifest: Path, pairs: Sequence[Labelled], labels: Labels) -> None:
    """Checks that the train pairs can teach every label; where labels are unknown, that there are some.

    Raises:
        CorpusError: there are no train pairs, fewer than two labels have some, or a label of val or test has none.
    """
    counts = {split: Counter(pair.label for pair in pairs if pair.split == split) for split in SPLITS}
    if not counts["train"]:
        raise CorpusError(f"{manifest}: none of {len(pairs)} usable pairs has split 'train'; expected some")
    if labels == "unknown":
        return
    mistakes = [
        f"label {label!r} has {counts['val'][label]} val and {counts['test'][label]} test pairs, but no train pair"
        for label in sorted((counts["val"].keys() | counts["test"].keys()) - counts["train"].keys())
    ]
    if len(counts["train"]) < 2:
        mistakes.insert(0, f"all train pairs have the label {next(iter(counts['train']))!r}; expected 2 or more labels")
    if mistakes:
        raise CorpusError(f"{manifest}: the labels do not allow training", mistakes)


@dataclass
class _Row:
    place: int
    has_split: bool = False
    fields: dict[str, str] = field(default_factory=dict)  # the columns that are in order
    faults: list[str] = field(default_factory=list)


_Raw: TypeAlias = tuple[int, Mapping[str, object] | str]  # where a row starts, and its fields or what is wrong


def _manifest(path: Path) -> Path:
    expected = f"expected one of {', '.join(f'pairs{suffix}' for suffix in _READERS)}"
    if path.is_dir():
        found = [path / f"pairs{suffix}" for suffix in _READERS if (path / f"pairs{suffix}").exists()]
        if len(found) == 1:
            return found[0]
        names = " and ".join(file.name for file in found) or "none of them"
        advice = "keep one, or give the path of the one that counts" if found else "is it a corpus folder?"
        raise CorpusError(f"{path}: {expected} in the folder, found {names}; {advice}")
    if not path.exists():
        raise CorpusError(f"{path}: there is no such folder or file; expected a corpus folder")
    if path.suffix not in _READERS:
        raise CorpusError(f"{path}: not a manifest; {expected}, or a folder with one of them")
    return path


def _read_jsonl(path: Path, _required: Sequence[str]) -> Iterator[_Raw]:
    for place, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line.decode())
        except UnicodeDecodeError as error:
            yield place, f"not UTF-8 ({error.reason} at byte {error.start + 1})"
        except (ValueError, RecursionError) as error:
            yield place, f"not JSON ({error})"
        else:
            yield place, value if isinstance(value, dict) else f"not a JSON object but {_kind(value)}"


def _read_csv(path: Path, required: Sequence[str]) -> Iterator[_Raw]:
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise CorpusError(f"{path}: line {line} is not UTF-8; save the file as UTF-8") from error
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    start = 1
    try:
        for cells in reader:
            # A quoted cell may hold line breaks: a row starts behind the last line of the row before it.
            place, start = start, reader.line_num + 1
            if not cells:
                continue
            if header is None:
                header = cells
                _check_header(path, header, required)
            elif len(cells) != len(header):
                yield place, f"has {len(cells)} cells; the header has {len(header)}"
            else:
                yield place, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        yield start, f"not CSV ({error}); nothing behind it was read"


def _read_parquet(path: Path, required: Sequence[str]) -> Iterator[_Raw]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise MissingExtraError("Reading a Parquet manifest", "train", "pyarrow") from error
    try:
        with pq.ParquetFile(path) as file:
            names: list[str] = file.schema_arrow.names
            _check_header(path, names, required)
            rows: list[dict[str, Any]] = file.read([n for n in (*COLUMNS, "split") if n in names]).to_pylist()
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise CorpusError(f"{path}: not a Parquet file that can be read ({error})") from error
    yield from enumerate(rows, start=1)


_READERS: Mapping[str, Callable[[Path, Sequence[str]], Iterator[_Raw]]] = {
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _check_header(path: Path, names: Sequence[str], required: Sequence[str]) -> None:
    missing = [name for name in required if name not in names]
    twice = [name for name in (*COLUMNS, "split") if names.count(name) > 1]
    if missing or twice:
        wrong = " and ".join(
            f"{what} {_named(columns)}" for what, columns in (("lacks", missing), ("repeats", twice)) if columns
        )
        raise CorpusError(
            f"{path}: the header {wrong}; expected the columns {', '.join(required)} and, unless the split "
            "is to be made, split"
        )


def _row(place: int, raw: Mapping[str, object] | str, root: Path, *, known: bool) -> _Row:
    """Checks what a row says by itself; the picture's content, ids and splits are checked over all rows."""
    if isinstance(raw, str):
        return _Row(place, faults=[raw])
    label = raw.get("label")
    if not known and (label is None or (isinstance(label, str) and not label.strip())):
        raw = {**raw, "label": own_label(str(raw.get("id")))}
    row = _Row(place, has_split=raw.get("split") not in (None, ""))
    for name in (*COLUMNS, "split") if row.has_split else COLUMNS:
        value = raw.get(name)
        if name == "label" and isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        fault = _fault(name, value, root) if name in raw else f"{name} is missing"
        if fault:
            row.faults.append(fault)
        else:
            row.fields[name] = cast(str, value)
    return row


def _fault(name: str, value: object, root: Path) -> str | None:
    """What is wrong with the value of a column, or None."""
    if not isinstance(value, str):
        return f"{name} is {_kind(value)}; expected text{' or an integer' if name == 'label' else ''}"
    if not value.strip():
        return f"{name} is empty"
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        return f"{name} holds half of a surrogate pair, which is no text"
    if name == "text" and not tokenize(value):
        return f"text {value[:60]!r} holds no word"
    if name == "split" and value not in SPLITS:
        return f"split is {value!r}; expected train, val or test"
    if name == "image":
        relative = PurePosixPath(value)
        if relative.is_absolute() or ".." in relative.parts:
            return f"image {value!r} leaves the folder; expected a path relative to it, without '..'"
        if "\0" in value or not (root / relative).is_file():
            return f"image {value!r} does not exist in {root}"
    return None


def _check_ids(rows: Iterable[_Row], unit: str) -> None:
    first: dict[str, int] = {}
    for row in rows:
        if "id" in row.fields and first.setdefault(row.fields["id"], row.place) != row.place:
            key = row.fields["id"]
            row.faults.append(f"id {key!r} is that of {unit} {first[key]} already")


def _check_splits(rows: Sequence[_Row], seed: int, *, by_label: bool) -> None:
    """Makes the split where no row has one; otherwise a row without one is bad."""
    if any(row.has_split for row in rows):
        for row in rows:
            if row.fields and not row.has_split:
                row.faults.append("split is missing, but other rows have one; give it to all rows or to none")
        return
    labels: dict[str, str] = {}
    for row in rows:
        if "id" in row.fields and "label" in row.fields:
            labels.setdefault(row.fields["id"], row.fields["label"] if by_label else "")
    splits: dict[str, Split] = {}
    for ids in ranked(labels.items(), f"split:{seed}"):
        tenth = (len(ids) + 5) // 10
        for rank, key in enumerate(ids):
            splits[key] = "val" if rank < tenth else "test" if rank < 2 * tenth else "train"
    for row in rows:
        if row.fields.get("id") in splits:
            row.fields["split"] = splits[row.fields["id"]]


@lru_cache(maxsize=1 << 17)
def _undecodable(path: Path, _state: tuple[int, ...]) -> str:
    """Why a picture cannot be used, or nothing.

    Decoding is most of the time that reading a corpus takes, and a sweep reads one for each run; so a picture whose
    file did not change since is not decoded again in one process.
    """
    try:
        decode_image(path)
    except ImageError as error:
        return str(error)
    return ""


def _check_images(rows: Iterable[_Row], root: Path, check: CheckImages, progress: Progress | None) -> None:
    users: dict[str, list[_Row]] = defaultdict(list)
    for row in rows:
        if "image" in row.fields:
            users[row.fields["image"]].append(row)

    def fault(image: str) -> str | None:
        if check == "decode":
            found = (root / image).stat()
            why = _undecodable(root / image, (found.st_size, found.st_mtime_ns, found.st_ino))
            return f"image {image!r} cannot be used: {why}" if why else None
        return None

    # Pillow decodes without the interpreter's lock, so threads are enough.
    executor = ThreadPoolExecutor(os.cpu_count())
    try:
        for done, (image, found) in enumerate(zip(users, executor.map(fault, users), strict=True), start=1):
            if found:
                for row in users[image]:
                    row.faults.append(found)
            if progress:
                progress(done, len(users))
    finally:
        executor.shutdown(cancel_futures=True)


def _vectors(manifest: Path, medium: str, rows: Sequence[_Row]) -> NDArray[np.float32]:
    file = manifest.parent / FOLDER / f"{medium}.npy"
    array, bad = read_rows(file, len(rows), manifest.name)
    for number in bad:
        rows[number].faults.append(f"{FOLDER}/{file.name} holds a number that is not finite in row {number}, from 0")
    return array


def _pair(fields: Mapping[str, str], root: Path, vectors: Mapping[str, NDArray[np.float32]]) -> Pair:
    split = cast(Split, fields["split"])
    return Pair(fields["id"], root / fields["image"], fields["text"], fields["label"], split, vectors)


def _kind(value: object) -> str:
    names = {type(None): "null", dict: "an object", list: "a list", bool: "a truth value"}
    return names.get(type(value), f"the {type(value).__name__} {value!r}"[:60])


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(repr(name) for name in names[:_NAMED]) + more


def _one_of(name: str, value: str, offered: Sequence[str]) -> None:
    if value not in offered:
        raise ConfigError(f"{name} is {value!r}; expected one of {', '.join(offered)}")
