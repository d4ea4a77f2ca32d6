"""PKU XMediaNet (Peng et al.): the pictures and texts of its five media, 200 classes.

Read are these files:

=========================================  ========================================================================
``train_img.txt``, ``train_txt.txt``       32,000 lines each of a path and the number of its class, 0 to 199, as in
                                           ``dog/28e5648e7c5690c86878e435e4f2efb3.jpg 36`` and
                                           ``dog/Dog----Paragraph_80.txt 36``
``val_img.txt``, ``val_txt.txt``           the same for val, where they are; ``valid_`` and ``validation_`` too
``test_img.txt``, ``test_txt.txt``         the same for test, where they are
the pictures and texts                     at those paths, in the folder or in a folder of it
=========================================  ========================================================================

The lists lie in the folder or in a folder directly in it; where the paths begin is found by looking, at most two
folders deep. A class is called as the folder of its pictures, or by its number where paths have no folder.

Pictures and texts were collected apart: the k-th picture of a class is paired with the k-th text of the class in the
same split, so a pair says that both are of one class, not that the text is about the picture.

The form of the lists is that of the training lists that the publisher's laboratory put out with its programs. Not
verifiable without the data: how the data itself is laid out (hence the looking), the names of the lists of val and
test, and the encoding of names and texts. Some names in the lists are not UTF-8; a file is then looked for under its
bytes as they are, and under their reading as GB 18030 and Latin-1. Texts are read as UTF-8, or as Windows-1252 where
they are not UTF-8.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple, get_args

from dckt.errors import CorpusError
from dckt_trainer.data.adapters.records import Fault, Item, Reading, bad_line, decoded, find, read_lines
from dckt_trainer.data.corpus import Split

_PREFIXES = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
_EXPECTED = "a path and the number of its class, like dog/Dog----Paragraph_80.txt 36"


class _Entry(NamedTuple):
    raw: bytes  # the path as the list has it
    number: str
    place: str

    @property
    def names(self) -> list[str]:
        """What the file may be called on this machine, most likely first."""
        names = [os.fsdecode(self.raw)]
        for encoding in ("gb18030", "latin-1"):
            try:
                names.append(self.raw.decode(encoding))
            except UnicodeDecodeError:
                continue
        return names

    @property
    def name(self) -> str:
        """The path as text, in one form for all spellings of it."""
        return PurePosixPath(decoded(self.raw, "gb18030")).as_posix()

    @property
    def label(self) -> str:
        return PurePosixPath(self.name).parent.name or self.number


def read(folder: Path) -> Reading:
    """Reads the lists as they are; nothing is drawn.

    Args:
        folder: the lists, pictures and texts.

    Raises:
        CorpusError: a list is missing, a line is not of the form above, a class number has two names, or no file of
            a list is there.
    """
    what = "the lists, pictures and texts of XMediaNet, with train_img.txt and train_txt.txt"
    find(folder, ["."], what)
    items: list[Item] = []
    left_out: Counter[str] = Counter()
    names: dict[str, str] = {}
    for split in get_args(Split):
        lists = [_list(folder, split, kind) for kind in ("img", "txt")]
        if lists == [None, None] and split != "train":
            continue
        pictures, texts = (_entries(path, what, split, folder) for path in lists)
        for entry in pictures:
            if names.setdefault(entry.number, entry.label) != entry.label:
                raise CorpusError(
                    f"{folder}: {entry.place}: class {entry.number} is {entry.label!r}, but {names[entry.number]!r} "
                    "before; expected one name a class"
                )
        items += _paired(split, pictures, _root(folder, pictures), texts, _root(folder, texts), left_out)
    return Reading(
        tuple(items),
        left_out,
        (
            "pictures and texts are paired by class and order within each list: a pair is of one class, "
            "but its text is not about its picture.",
            "the splits are those of the lists; nothing is drawn, so the seed has no effect.",
        ),
    )


def _list(folder: Path, split: Split, kind: str) -> Path | None:
    for prefix in _PREFIXES[split]:
        name = f"{prefix}_{kind}.txt"
        for path in (folder / name, *sorted(folder.glob(f"*/{name}"))):
            if path.is_file():
                return path
    return None


def _entries(path: Path | None, what: str, split: Split, folder: Path) -> list[_Entry]:
    if path is None:
        raise CorpusError(f"{folder}: one of {split}_img.txt and {split}_txt.txt is missing; expected {what}")
    entries = []
    for number, line in enumerate(read_lines(path, _EXPECTED), start=1):
        name, _, label = line.strip().replace(b"\t", b" ").rpartition(b" ")
        if not name.strip() or not label.isdigit():
            raise bad_line(path, number, line, _EXPECTED)
        entries.append(_Entry(name.strip(), str(int(label)), f"{path.name}: line {number}"))
    return entries


def _root(folder: Path, entries: Sequence[_Entry]) -> Path:
    """Where the paths of a list begin: the first place with one of its first files."""
    for places in ([folder], folder.glob("*/"), folder.glob("*/*/")):
        for place in sorted(places):
            if any((place / name).is_file() for entry in entries[:20] for name in entry.names):
                return place
    raise CorpusError(
        f"{folder}: none of the first files that {entries[0].place.partition(':')[0]} names, like {entries[0].name}, "
        "is in the folder or up to two folders deeper; expected the data beside the lists"
    )


def _paired(
    split: Split,
    pictures: Sequence[_Entry],
    picture_root: Path,
    texts: Sequence[_Entry],
    text_root: Path,
    left_out: Counter[str],
) -> Iterator[Item]:
    waiting: dict[str, list[_Entry]] = defaultdict(list)
    for entry in reversed(texts):
        waiting[entry.number].append(entry)
    for picture in pictures:
        if not waiting[picture.number]:
            left_out["picture without a text of its class"] += 1
            continue
        text, fault = _text(text_root, waiting[picture.number].pop())
        image = _file(picture_root, picture)
        yield Item(picture.name, image, picture.name, text, picture.label, split, picture.place, fault)
    left_out["text without a picture of its class"] += sum(map(len, waiting.values()))


def _text(root: Path, entry: _Entry) -> tuple[str, Fault | None]:
    path = _file(root, entry)
    try:
        return " ".join(decoded(path.read_bytes()).split()), None
    except OSError as error:
        return "", Fault("the text's file cannot be read", f"{entry.name}, {entry.place}: {error.strerror}")


def _file(root: Path, entry: _Entry) -> Path:
    names = entry.names
    return next((root / name for name in names if (root / name).is_file()), root / names[0])
