"""Pascal Sentences of Rashtchian et al., "Collecting Image Annotations Using Amazon's Mechanical Turk", 2010.

1,000 photographs in 20 classes, with five sentences each, most of them. Read is one of two layouts:

* The published page, one ``.html`` file, beside the folders of its pictures. Each row of the page's table is a
  picture, ``<img src="CLASS/PICTURE.jpg">``, and a table of its sentences, one a cell. The pictures lie in
  ``CLASS/`` beside the page, or in ``dataset/CLASS/`` or ``images/CLASS/``.
* Folders, as public download scripts make them of that page: ``dataset/CLASS/PICTURE.jpg`` and
  ``sentence/CLASS/PICTURE.txt`` with one sentence a line. ``images`` and ``sentences``, or one folder of classes
  that holds both kinds, are read too, and a text that lacks the dot (``PICTUREtxt``), which one such script writes.

A page that a browser saved "complete" has all pictures in one folder; it no longer says the classes and is refused.

The sentences are joined by newlines. There is no official split; ours is 80/10/10 within each class, so 40/5/5.

Not verifiable without the page: its encoding (read as UTF-8, or Windows-1252 where it is not), and whether it holds
pictures that are not of the set; a picture that no sentence follows is taken for a bad pair.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from dckt.errors import CorpusError
from dckt_trainer.data.adapters.records import Item, Reading, decoded, find, tenths

_PICTURES = ("dataset", "images")
_SENTENCES = ("sentence", "sentences")
_SUFFIXES = (".jpg", ".jpeg", ".png")


class _Row(NamedTuple):
    image: Path
    label: str
    text: str
    place: str

    @property
    def id(self) -> str:
        return f"{self.label}/{self.image.stem}"


class _Page(HTMLParser):
    """Collects (line, address of a picture, sentences) of a page."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.rows: list[tuple[int, str, list[str]]] = []
        self._cell: list[str] | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Opens a picture or a cell."""
        if tag in ("td", "tr"):
            self._end_cell()
        if tag == "td":
            self._cell = []
        elif tag == "img":
            self._cell = None
            self.rows.append((self.getpos()[0], dict(attrs).get("src") or "", []))

    def handle_endtag(self, tag: str) -> None:
        """Closes a cell; pages may leave the end of a cell out."""
        if tag in ("td", "tr", "table"):
            self._end_cell()

    def handle_data(self, data: str) -> None:
        """Text counts inside a cell."""
        if self._cell is not None:
            self._cell.append(data)

    def _end_cell(self) -> None:
        sentence = " ".join("".join(self._cell or ()).split())
        if sentence and self.rows:
            self.rows[-1][2].append(sentence)
        self._cell = None


def read(folder: Path, *, seed: int = 0) -> Reading:
    """Reads the page or the folders.

    Args:
        folder: holds the page, or the folders of pictures and sentences.
        seed: another seed, another split.

    Raises:
        CorpusError: there is neither, or more than one page, or the pictures do not say their classes.
    """
    find(folder, ["."], "the page of Pascal Sentences, or its folders of pictures and sentences")
    pages = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".html", ".htm"))
    if len(pages) > 1:
        raise CorpusError(
            f"{folder}: holds {' and '.join(page.name for page in pages)}; keep the page of the set alone"
        )
    rows = list(_from_page(pages[0]) if pages else _from_folders(folder))
    groups: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        groups[row.label].append(row.id)
    if len(groups) < 2:
        found = f"{len(rows)} pictures, all of the class {rows[0].label!r}" if rows else "no picture with a class"
        raise CorpusError(
            f"{pages[0] if pages else folder}: names {found}; expected pictures as CLASS/PICTURE.jpg, of 20 classes. "
            "A page must be the published one, not one that a browser saved together with its pictures"
        )
    splits = {key: split for ids in groups.values() for key, split in tenths(ids, f"pascal-sentences:{seed}").items()}
    return Reading(
        tuple(Item(r.id, r.image, f"{r.label}/{r.image.name}", r.text, r.label, splits[r.id], r.place) for r in rows),
        {},
        (
            f"the split is our choice: 80/10/10 within each class (40/5/5 of 50), by seed {seed}. "
            "The set has no official split, and papers do not publish theirs.",
        ),
    )


def _from_page(page: Path) -> Iterator[_Row]:
    parser = _Page()
    parser.feed(decoded(page.read_bytes()))
    parser.close()
    named = [(line, PurePosixPath(unquote(urlsplit(src).path)), texts) for line, src, texts in parser.rows]
    named = [(line, path, texts) for line, path, texts in named if path.parent.name]
    roots = [page.parent, *(page.parent / name for name in _PICTURES)]
    root = next((r for r in roots if any((r / path.parent.name).is_dir() for _, path, _ in named)), page.parent)
    for line, path, texts in named:
        label = path.parent.name
        yield _Row(root / label / path.name, label, "\n".join(texts), f"{page.name}: line {line}")


def _from_folders(folder: Path) -> Iterator[_Row]:
    pictures = _first(folder, _PICTURES)
    sentences = _first(folder, _SENTENCES)
    for label in sorted({path.name for root in (pictures, sentences) for path in root.iterdir() if path.is_dir()}):
        images = {p.stem: p for p in _files(pictures / label) if p.suffix.lower() in _SUFFIXES}
        texts = {p.name.removesuffix("txt").removesuffix("."): p for p in _files(sentences / label, ending="txt")}
        for stem in sorted(images.keys() | texts.keys()):
            lines = decoded(texts[stem].read_bytes()).splitlines() if stem in texts else []
            sentences_of = "\n".join(" ".join(line.split()) for line in lines if line.strip())
            image = images.get(stem, pictures / label / f"{stem}.jpg")
            yield _Row(image, label, sentences_of, f"{label}/{stem}")


def _first(folder: Path, names: Sequence[str]) -> Path:
    return next((folder / name for name in names if (folder / name).is_dir()), folder)


def _files(folder: Path, ending: str = "") -> list[Path]:
    return [path for path in folder.glob(f"*{ending}") if path.is_file()]
