"""The Wikipedia set of Rasiwasia et al., "A New Approach to Cross-Modal Multimedia Retrieval", 2010.

Read are these files of the publisher's folder ``wikipedia_dataset``:

=================================  ================================================================================
``categories.list``                the name of a category a line; line 1 is category 1
``trainset_txt_img_cat.list``      2,173 lines of text id, picture id and number of the category, separated by tabs
``testset_txt_img_cat.list``       693 such lines
``texts/TEXT.xml``                 the section of an article; its ``<text>`` elements are the text of the pair
``images/CATEGORY/PICTURE.jpg``    its picture
=================================  ================================================================================

Many of the XML files are not well-formed, so no XML parser is used: what stands between ``<text>`` and ``</text>``
counts, without tags and comments, with entities decoded and white space made into single blanks.

Not verifiable without the files: whether a line of ``categories.list`` ever holds more than the name, and the
encoding of the texts. They are read as UTF-8, or as Windows-1252 where they are not UTF-8.
"""

from __future__ import annotations

import html
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dckt_trainer.data.adapters.records import Fault, Item, Reading, bad_line, decoded, find, ranked, read_lines
from dckt_trainer.data.corpus import Split

_TEXT = re.compile(r"<text\b[^>]*>(.*?)</text\s*>", re.DOTALL | re.IGNORECASE)
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_CDATA = re.compile(r"<!\[CDATA\[(.*?)\]\]>", re.DOTALL)
# A tag begins with a letter, so that "a < b and c > d" stays, as it stands in files that escape nothing.
_TAG = re.compile(r"</?[A-Za-z][^<>]*>")


@dataclass(frozen=True)
class _Line:
    text: str
    picture: str
    label: str
    place: str


def read(folder: Path, *, seed: int = 0) -> Reading:
    """Reads the set; a third of its test list becomes val, drawn within each category.

    Args:
        folder: the publisher's folder.
        seed: another seed, another choice of val.

    Raises:
        CorpusError: a list is missing, or a line of it is not of the form above.
    """
    path = find(folder, ["categories.list"], "the folder of the Wikipedia set, with categories.list")
    names = [decoded(line).strip() for line in read_lines(path, "the name of a category")]
    train = list(_lines(folder / "trainset_txt_img_cat.list", names))
    test = list(_lines(folder / "testset_txt_img_cat.list", names))
    val = _third(test, f"wikipedia:{seed}")
    items = [_item(folder, line, "train") for line in train]
    items += [_item(folder, line, "val" if line.text in val else "test") for line in test]
    return Reading(
        tuple(items),
        {},
        (
            f"val and test are our choice: of the published test list, a third ({len(val)} of {len(test)}) is val, "
            f"drawn within each category by seed {seed}. Papers that use 231 and 462 pairs do not publish theirs.",
        ),
    )


def _lines(path: Path, names: Sequence[str]) -> Iterator[_Line]:
    expected = f"text id, picture id and number of the category, 1 to {len(names)}"
    for number, line in enumerate(read_lines(path, expected), start=1):
        cells = decoded(line).split()
        if len(cells) != 3 or cells[2] not in map(str, range(1, len(names) + 1)):
            raise bad_line(path, number, line, expected)
        yield _Line(cells[0], cells[1], names[int(cells[2]) - 1], f"{path.name}: line {number}")


def _third(lines: Sequence[_Line], salt: str) -> set[str]:
    """Text ids of a third of the lines, spread over the labels by largest remainder."""
    groups: dict[str, list[str]] = defaultdict(list)
    for line in lines:
        groups[line.label].append(line.text)
    sizes = {label: len(ids) // 3 for label, ids in groups.items()}
    missing = (2 * len(lines) + 3) // 6 - sum(sizes.values())  # a third of all, rounded
    for label in sorted(groups, key=lambda label: (-(len(groups[label]) % 3), label))[:missing]:
        sizes[label] += 1
    return {key for label, ids in groups.items() for key in ranked(ids, salt)[: sizes[label]]}


def _item(folder: Path, line: _Line, split: Split) -> Item:
    stored = f"{line.label}/{line.picture}.jpg"
    xml = folder / "texts" / f"{line.text}.xml"
    text, fault = "", None
    try:
        parts = _TEXT.findall(_COMMENT.sub(" ", decoded(xml.read_bytes())))
    except OSError as error:
        fault = Fault("the text's file cannot be read", f"{xml}: {error.strerror}")
    else:
        if not parts:
            fault = Fault("the text's file has no <text> element", str(xml))
        text = _plain(" ".join(parts))
    return Item(line.text, folder / "images" / stored, stored, text, line.label, split, line.place, fault)


def _plain(xml: str) -> str:
    # Entities come last: what they stand for is text, even where it looks like a tag.
    return " ".join(html.unescape(_TAG.sub(" ", _CDATA.sub(r"\1", xml))).split())
