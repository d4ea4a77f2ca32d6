"""Reports as one HTML file: no script, no network, light and dark, with every picture inside it.

All text is escaped, and a content security policy in the page forbids it to load anything.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TypeAlias

from dckt.errors import ConfigError
from dckt.files import atomic_write
from dckt.preprocessing import ImageSource, decode_image

Cell: TypeAlias = str | int | float | None
UNLISTED_SECTIONS = 6  # so many are found by scrolling


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        title: heading of the section.
        columns: heading of each column.
        rows: cells, as many in each row as there are columns. Floats are shown with four significant digits (whole
            from 10,000 on), None as a dash.
        note: a sentence below.
        folded: the rows are hidden until the reader opens them; for long tables.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""
    folded: bool = False

    def __post_init__(self) -> None:
        for number, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ConfigError(
                    f"row {number} of table {self.title!r} has {len(row)} cells; expected {len(self.columns)}"
                )


@dataclass(frozen=True)
class Figure:
    """A picture, such as a plot.

    Attributes:
        title: heading of the section.
        png: bytes of a PNG file.
        note: a sentence below.
        alt: what the picture shows, for those who cannot see it; the title if empty.
    """

    title: str
    png: bytes
    note: str = ""
    alt: str = ""


@dataclass(frozen=True)
class Card:
    """One item of a gallery.

    Attributes:
        image: bytes of a JPEG file, for example from :func:`thumbnail`; None for an item that has no picture.
        text: what the item says.
        caption: a short line below, for example its label and score.
        right: whether it is a right answer; None where that is unknown or not asked.
        alt: what the picture shows, for those who cannot see it.
    """

    image: bytes | None = None
    text: str = ""
    caption: str = ""
    right: bool | None = None
    alt: str = ""


@dataclass(frozen=True)
class GalleryRow:
    """A query and what it found, best first."""

    query: Card
    results: tuple[Card, ...]


@dataclass(frozen=True)
class Gallery:
    """Queries with their results.

    Attributes:
        title: heading of the section.
        rows: the queries.
        note: a sentence below.
    """

    title: str
    rows: Sequence[GalleryRow]
    note: str = ""


Section: TypeAlias = Table | Figure | Gallery


def write_report(path: str | Path, *, title: str, sections: Sequence[Section], subtitle: str = "") -> None:
    """Writes a report, whole or not at all. One of many sections begins with a list of them.

    Args:
        path: the HTML file; its folder exists.
        title: heading of the page.
        sections: what it shows, in this order.
        subtitle: a line below the heading.
    """
    body = "\n".join(_section(number, section) for number, section in enumerate(sections))
    if len(sections) > UNLISTED_SECTIONS:
        body = f"{_contents(sections)}\n{body}"
    lead = f'\n<p class="lead">{escape(subtitle)}</p>' if subtitle else ""
    page = _PAGE.format(title=escape(title), style=_STYLE, lead=lead, body=body)
    # JSON can smuggle in half a surrogate pair, which UTF-8 cannot hold.
    atomic_write(Path(path), page.encode(errors="replace"))


def thumbnail(source: ImageSource, side: int = 160) -> bytes:
    """A picture as JPEG bytes, upright, its longer side at most ``side`` pixels.

    Raises:
        ImageError: the picture cannot be decoded.
        ConfigError: ``side`` is below 1.
    """
    if side < 1:
        raise ConfigError(f"side is {side}; expected at least 1 pixel")
    image = decode_image(source)
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def _contents(sections: Sequence[Section]) -> str:
    links = "\n".join(
        f'<li><a href="#section-{number}">{escape(section.title)}</a></li>' for number, section in enumerate(sections)
    )
    return f'<nav aria-label="Contents"><ul>\n{links}\n</ul></nav>'


def _section(number: int, section: Section) -> str:
    if isinstance(section, Table):
        content = _table(section)
        if section.folded:
            content = f"<details><summary>Show {len(section.rows)} rows</summary>\n{content}\n</details>"
    elif isinstance(section, Figure):
        alt = escape(section.alt or section.title)
        content = f'<div class="wide"><img class="figure" alt="{alt}" src="{_data_uri("png", section.png)}"></div>'
    else:
        content = "\n".join(map(_gallery_row, section.rows))
    note = f'\n<p class="note">{escape(section.note)}</p>' if section.note else ""
    return f'<section id="section-{number}">\n<h2>{escape(section.title)}</h2>\n{content}{note}\n</section>'


def _table(table: Table) -> str:
    # Numbers stand to the right, under a heading that does too.
    kinds = [
        "" if any(isinstance(row[place], str) for row in table.rows) else ' class="number"'
        for place in range(len(table.columns))
    ]
    head = "".join(
        f'<th scope="col"{kind}>{escape(column)}</th>' for column, kind in zip(table.columns, kinds, strict=True)
    )
    rows = "\n".join(
        "<tr>"
        + "".join(f"<td{kind}>{escape(_shown(cell))}</td>" for cell, kind in zip(row, kinds, strict=True))
        + "</tr>"
        for row in table.rows
    )
    return f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>'


def _shown(cell: Cell) -> str:
    if cell is None:
        return "–"
    if isinstance(cell, float):
        return f"{cell:,.0f}" if abs(cell) >= 1e4 else f"{cell:.4g}"
    return str(cell)


def _gallery_row(row: GalleryRow) -> str:
    results = "".join(f"<li>{_card(card)}</li>" for card in row.results)
    return f'<div class="query">{_card(row.query)}<ol>{results}</ol></div>'


def _card(card: Card) -> str:
    state, mark = {
        None: ("", ""),
        True: (" right", '<span class="mark" title="right">✓ </span>'),
        False: (" wrong", '<span class="mark" title="wrong">✗ </span>'),
    }[card.right]
    image = f'<img alt="{escape(card.alt)}" src="{_data_uri("jpeg", card.image)}">' if card.image is not None else ""
    text = f"<p>{escape(card.text)}</p>" if card.text else ""
    caption = f"<figcaption>{mark}{escape(card.caption)}</figcaption>" if card.caption or mark else ""
    return f'<figure class="card{state}">{image}{text}{caption}</figure>'


def _data_uri(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


_STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --soft: #60676f; --line: #e2e5e9; --page: #fbfbfa; --card: #fff;
  --right: #18864b; --wrong: #c8372d; --link: #1f5fa8; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8eaed; --soft: #9aa2ab; --line: #32373d; --page: #16181b; --card: #1e2125;
    --right: #4cc38a; --wrong: #ff7a6e; --link: #79b8ff; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 3rem 1.5rem 5rem; max-width: 72rem; background: var(--page); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
h1 { margin: 0; font-size: 2rem; line-height: 1.2; letter-spacing: -.02em; }
h2 { margin: 3rem 0 1rem; font-size: 1.25rem; letter-spacing: -.01em; }
.lead, .note { color: var(--soft); }
.lead { margin: .5rem 0 0; font-size: 1.1rem; }
.note { margin: .75rem 0 0; font-size: .9rem; max-width: 44rem; }
.wide { overflow-x: auto; }
nav ul { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; margin: 1.5rem 0 0; padding: 0; list-style: none; }
a, summary { color: var(--link); }
summary { cursor: pointer; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem 1.25rem .4rem 0; text-align: left; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-size: .85rem; font-weight: 600; }
.number { text-align: right; }
img { display: block; max-width: 100%; height: auto; }
.figure { border: 1px solid var(--line); border-radius: .5rem; background: #fff; }
.query { display: grid; grid-template-columns: 10rem 1fr; gap: 1.25rem; padding: 1.25rem 0;
  border-top: 1px solid var(--line); }
ol { display: grid; grid-template-columns: repeat(auto-fill, minmax(8rem, 1fr)); gap: .75rem; margin: 0; padding: 0;
  list-style: none; }
.card { margin: 0; overflow: hidden; border: 1px solid var(--line); border-radius: .5rem; background: var(--card);
  font-size: .85rem; line-height: 1.4; }
.card img { width: 100%; aspect-ratio: 1; object-fit: cover; }
.card p { margin: 0; padding: .5rem .6rem; max-height: 8.5rem; overflow: auto; overflow-wrap: anywhere; }
.card figcaption { padding: .35rem .6rem; color: var(--soft); overflow-wrap: anywhere;
  font-variant-numeric: tabular-nums; }
.right { border-color: var(--right); box-shadow: inset 0 3px var(--right), 0 0 0 1px var(--right); }
.wrong { border-color: var(--wrong); box-shadow: inset 0 3px var(--wrong), 0 0 0 1px var(--wrong); }
.right .mark { color: var(--right); font-weight: 700; }
.wrong .mark { color: var(--wrong); font-weight: 700; }
/* A plot that shrank to a phone's width could not be read; it is moved with the finger instead. */
@media (max-width: 40rem) { .query { grid-template-columns: 1fr; } .query > .card { max-width: 10rem; }
  .figure { max-width: none; width: 36rem; } body { padding: 2rem 1rem 4rem; } }
@media print { body { max-width: none; padding: 0; } .query { break-inside: avoid; } }
"""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header>
<h1>{title}</h1>{lead}
</header>
<main>
{body}
</main>
</body>
</html>
"""
