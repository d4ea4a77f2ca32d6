r"""NUS-WIDE-10k: ten concepts of NUS-WIDE (Chua et al. 2009), 1,000 pairs each (Feng et al. 2014).

Read are these files, as the publisher's archives unpack side by side; line n of each list is the same photograph:

========================================  =========================================================================
``ImageList/Imagelist.txt``               269,648 lines like ``actor\0001_2124494179.jpg``; the digits at the end
                                          are the number that Flickr gave to the photograph
``NUS_WID_Tags/All_Tags.txt``             that number and the tags, separated by white space
``Groundtruth/AllLabels/Labels_C.txt``    1 where the photograph shows concept C, else 0
``Flickr/actor/0001_2124494179.jpg``      the photographs, in the folders that the list names
========================================  =========================================================================

``Imagelist.txt`` and ``All_Tags.txt`` may also lie in the folder itself, and the photographs in ``images/``.

A photograph is taken when it shows exactly one of the ten concepts, has a tag, is there, and is the first with its
number (some are listed twice, with different labels). Of these, as many of each concept as are asked for are drawn
by a hash, and split 80/10/10 within the concept. The text is all tags as they stand, joined by blanks.

The ten concepts are those that Feng et al. name as the largest. Ranked by their number of photographs alone, by a
public count that we could not repeat, another ten come first, of which some have under 1,000 photographs that show
none of the others; so that rank is no usable default.

Not verifiable without the files: the encoding of the tags, some of which are not English. They are read as UTF-8, or
line by line as Windows-1252 where they are not UTF-8. The photographs that the paper drew are not published.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from dckt.errors import ConfigError, CorpusError
from dckt.preprocessing import tokenize
from dckt_trainer.data.adapters.records import Item, Reading, bad_line, decoded, find, ranked, read_lines, tenths

CONCEPTS = ("animal", "clouds", "flowers", "food", "grass", "person", "sky", "toy", "water", "window")
PAIRS_PER_CLASS = 1000

_PICTURE = re.compile(r"(?:.*Flickr[\\/])?([^\\/]+)[\\/]([^\\/]+_(\d+)\.\w+)")


class _Photo(NamedTuple):
    stored: str
    number: str
    line: int

    @property
    def id(self) -> str:
        return self.stored.rpartition(".")[0]


def read(
    folder: Path,
    *,
    seed: int = 0,
    concepts: Sequence[str] = CONCEPTS,
    pairs_per_class: int = PAIRS_PER_CLASS,
) -> Reading:
    """Reads the lists and draws the pairs.

    Args:
        folder: where the publisher's archives were unpacked.
        seed: another seed, another choice of pairs and of their split.
        concepts: the classes, by the names of the label files.
        pairs_per_class: pairs of each of them.

    Raises:
        ConfigError: fewer than two concepts, one twice, or ``pairs_per_class`` below 1.
        CorpusError: a list is missing, lists differ in length or order, a line is not of the form above, or there
            are too few photographs of a concept.
    """
    if len(concepts) < 2 or len(set(concepts)) < len(concepts):
        raise ConfigError(f"concepts are {', '.join(concepts) or 'none'}; expected two or more, each once")
    if pairs_per_class < 1:
        raise ConfigError(f"pairs_per_class is {pairs_per_class}; expected at least 1")
    source = find(folder, ["ImageList/Imagelist.txt", "Imagelist.txt"], "the list of all photographs of NUS-WIDE")
    photos = _photos(source)
    tags = _tags(find(folder, ["NUS_WID_Tags/All_Tags.txt", "All_Tags.txt"], "the tags of NUS-WIDE"), photos)
    labels = _labels(find(folder, ["Groundtruth/AllLabels"], "the label lists of NUS-WIDE"), concepts, len(photos))
    pictures = find(folder, ["Flickr", "images"], "the folder of photographs of NUS-WIDE")

    left_out: Counter[str] = Counter()
    groups: dict[str, list[str]] = defaultdict(list)
    candidates: list[tuple[_Photo, str, str]] = []
    seen: set[str] = set()
    for photo, carried, text in zip(photos, labels, tags, strict=True):
        reason = None
        if photo.number in seen:
            reason = "photograph is listed already"
        elif len(carried) != 1:
            reason = "several of the concepts" if carried else "none of the concepts"
        elif not tokenize(text):
            reason = "no tag"
        elif not (pictures / photo.stored).is_file():
            reason = "picture is missing"
        seen.add(photo.number)
        if reason:
            left_out[reason] += 1
        else:
            candidates.append((photo, carried[0], text))
            groups[carried[0]].append(photo.id)

    few = [f"{name}: {len(groups[name])}" for name in concepts if len(groups[name]) < pairs_per_class]
    if few:
        raise CorpusError(
            f"{folder}: too few photographs that can be used; expected {pairs_per_class} of each concept. Add the "
            "missing pictures, name other concepts, or ask for fewer pairs of each class",
            few,
        )
    salt = f"nus-wide:{seed}"
    splits = {
        key: split
        for ids in groups.values()
        for key, split in tenths(ranked(ids, salt)[:pairs_per_class], salt).items()
    }
    left_out["not drawn, its concept has enough"] = len(candidates) - len(splits)
    items = tuple(
        Item(p.id, pictures / p.stored, p.stored, text, label, splits[p.id], f"{source.name}: line {p.line}")
        for p, label, text in candidates
        if p.id in splits
    )
    return Reading(
        items,
        +left_out,
        (
            f"the pairs are our choice: {pairs_per_class} of each concept, drawn by seed {seed} among the photographs "
            "that are there and show exactly one of the concepts. The ids of the published subset are not public.",
            f"the split is our choice: 80/10/10 within each concept, by seed {seed}. "
            "NUS-WIDE's own train and test lists are not used.",
            f"the concepts are {', '.join(concepts)}.",
        ),
    )


def _photos(path: Path) -> list[_Photo]:
    expected = r"folder and picture, like actor\0001_2124494179.jpg"
    photos = []
    for number, line in enumerate(read_lines(path, expected), start=1):
        match = _PICTURE.fullmatch(decoded(line).strip())
        if not match:
            raise bad_line(path, number, line, expected)
        photos.append(_Photo(f"{match[1]}/{match[2]}", match[3], number))
    return photos


def _tags(path: Path, photos: Sequence[_Photo]) -> list[str]:
    expected = "the number of a photograph and its tags"
    lines = read_lines(path, expected)
    _check_length(path, len(lines), len(photos))
    texts = []
    for line, photo in zip(lines, photos, strict=True):
        number, _, tags = decoded(line).strip().replace("\t", " ").partition(" ")
        if number != photo.number:
            raise bad_line(path, photo.line, line, f"{expected}; the photograph is {photo.number} by the image list")
        texts.append(" ".join(tags.split()))
    return texts


def _labels(folder: Path, concepts: Sequence[str], length: int) -> list[list[str]]:
    """The concepts that each photograph shows."""
    carried: list[list[str]] = [[] for _ in range(length)]
    for concept in concepts:
        path = folder / f"Labels_{concept}.txt"
        if not path.is_file():
            known = ", ".join(sorted(p.stem.removeprefix("Labels_") for p in folder.glob("Labels_*.txt")))
            raise CorpusError(f"{path}: there is no such list; expected one of a concept, there is {known or 'none'}")
        lines = read_lines(path, "0 or 1")
        _check_length(path, len(lines), length)
        for number, line in enumerate(lines, start=1):
            value = line.strip()
            if value == b"1":
                carried[number - 1].append(concept)
            elif value != b"0":
                raise bad_line(path, number, line, "0 or 1")
    return carried


def _check_length(path: Path, length: int, expected: int) -> None:
    if length != expected:
        raise CorpusError(f"{path}: has {length} lines; expected {expected}, as many as the image list")
