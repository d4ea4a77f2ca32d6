"""What an adapter hands over, and what adapters share: finding and reading lists, and drawing by a hash."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from dckt.errors import CorpusError
from dckt_trainer.data.corpus import Split


class Fault(NamedTuple):
    """Why a pair cannot be used: a reason that many pairs share, and what it is about here."""

    reason: str
    detail: str


@dataclass(frozen=True)
class Item:
    """A pair as its publisher has it; its picture and its text are not checked yet.

    Attributes:
        id: expected to be unique.
        image: the picture in the publisher's folder.
        stored: path of the picture under ``images/`` of the corpus, with ``/``.
        text: the text, ready for the corpus.
        label: the class.
        split: what the pair is used for.
        place: where the publisher names it, for messages.
        fault: what the adapter found wrong already.
    """

    id: str
    image: Path
    stored: str
    text: str
    label: str
    split: Split
    place: str
    fault: Fault | None = None


@dataclass(frozen=True)
class Reading:
    """All that an adapter makes of a publisher's folder.

    Attributes:
        items: the pairs, in the publisher's order.
        left_out: how many the data set's own rules leave out, by reason.
        decisions: what the publisher does not say and the adapter decided, a sentence each.
    """

    items: tuple[Item, ...]
    left_out: Mapping[str, int]
    decisions: tuple[str, ...]


def find(folder: Path, places: Sequence[str], what: str) -> Path:
    """The first of some places, relative to the folder, where there is a file or folder.

    Raises:
        CorpusError: the folder or all places are missing; ``what`` says what was looked for.
    """
    if not folder.is_dir():
        raise CorpusError(f"{folder}: there is no such folder; expected {what}")
    for place in places:
        if (folder / place).exists():
            return folder / place
    raise CorpusError(f"{folder}: {' or '.join(places)} is missing; expected {what}")


def read_lines(path: Path, what: str) -> list[bytes]:
    """The lines of a list, without line ends; empty lines at its end do not count.

    Raises:
        CorpusError: the file is missing or cannot be read, or is empty; ``what`` says what one line holds.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CorpusError(f"{path}: cannot be read ({error.strerror}); expected {what} a line") from error
    lines = [line.rstrip(b"\r") for line in data.removeprefix(b"\xef\xbb\xbf").rstrip().split(b"\n")]
    if lines == [b""]:
        raise CorpusError(f"{path}: is empty; expected {what} a line")
    return lines


def bad_line(path: Path, number: int, line: bytes, expected: str) -> CorpusError:
    """The error for a line that is not of its list's form."""
    return CorpusError(f"{path}: line {number} is {decoded(line)[:80]!r}; expected {expected}")


def decoded(data: bytes, fallback: str = "cp1252") -> str:
    """Text that is UTF-8, or else of another encoding, whose unknown bytes become U+FFFD."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode(fallback, errors="replace")


def ranked(ids: Iterable[str], salt: str) -> list[str]:
    """The ids in an order that hangs on salt and id alone, not on the machine or the order of the list."""
    return sorted(ids, key=lambda key: hashlib.sha256(f"{salt}:{key}".encode()).digest())


def tenths(ids: Sequence[str], salt: str) -> dict[str, Split]:
    """A split of one class: a tenth (rounded, halves up) is val, the next tenth test, the others train."""
    tenth = (len(ids) + 5) // 10
    return {
        key: "val" if rank < tenth else "test" if rank < 2 * tenth else "train"
        for rank, key in enumerate(ranked(ids, salt))
    }
