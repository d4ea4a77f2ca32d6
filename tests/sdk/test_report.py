from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from dckt.errors import ConfigError, ImageError
from dckt.report import Card, Figure, Gallery, GalleryRow, Table, thumbnail, write_report

VOID = {"meta", "img", "link", "br"}
NASTY = "<script>alert('x')</script> & \"quoted\" 'q' {style} </section>"


class Page(HTMLParser):
    """Parses a page, and fails where its tags do not nest."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def named(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == name]


def page(tmp_path: Path, *sections: Table | Figure | Gallery, title: str = "Title", subtitle: str = "") -> Page:
    write_report(tmp_path / "report.html", title=title, sections=sections, subtitle=subtitle)
    return Page((tmp_path / "report.html").read_text(encoding="utf-8"))


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(buffer, "PNG")
    return buffer.getvalue()


def test_everything_is_shown(tmp_path: Path) -> None:
    shown = page(
        tmp_path,
        Table("Scores", ["direction", "MAP"], [["image to text", 0.51239], ["text to image", None]], note="table note"),
        Figure("Loss", png(), note="figure note"),
        Gallery("Found", [GalleryRow(Card(text="query text"), (Card(caption="a caption"),))], note="gallery note"),
        subtitle="sub",
    )
    text = "".join(shown.text)
    for expected in (
        *("Title", "sub", "Scores", "direction", "image to text", "0.5124", "–", "table note", "Loss", "figure note"),
        *("Found", "query text", "a caption", "gallery note"),
    ):
        assert expected in text
    assert len(shown.named("section")) == 3


@pytest.mark.parametrize(
    ("cell", "shown"),
    [
        (1, "1"),
        (0.123456, "0.1235"),
        (1e-9, "1e-09"),
        (123456.7, "123,457"),
        ("<b>", "<b>"),
        (None, "–"),
        (True, "True"),
    ],
)
def test_cells(tmp_path: Path, cell: str | float | None, shown: str) -> None:
    assert shown in page(tmp_path, Table("t", ["c"], [[cell]])).text


def test_columns_of_numbers_stand_right(tmp_path: Path) -> None:
    shown = page(tmp_path, Table("t", ["name", "value"], [["a", 1], ["b", None]]))
    assert [tag.get("class") for tag in shown.named("th")] == [None, "number"]
    assert [tag.get("class") for tag in shown.named("td")] == [None, "number", None, "number"]


def test_everything_is_escaped(tmp_path: Path) -> None:
    card = Card(text=NASTY, caption=NASTY)
    shown = page(
        tmp_path,
        Table(NASTY, [NASTY], [[NASTY]], note=NASTY),
        Figure(NASTY, png(), note=NASTY),
        Gallery(NASTY, [GalleryRow(card, (card,))], note=NASTY),
        title=NASTY,
        subtitle=NASTY,
    )
    assert shown.named("script") == []
    # Title twice and subtitle; 4 in the table, 2 + the alt text of the figure, 2 + 2 cards x 2 in the gallery.
    assert shown.text.count(NASTY) == 3 + 4 + 2 + 6
    assert shown.named("img")[0]["alt"] == NASTY
    assert len(shown.named("section")) == 3


def test_half_a_surrogate_pair_does_not_spoil_the_page(tmp_path: Path) -> None:
    assert "a?b" in page(tmp_path, Table("t", ["c"], [["a\ud800b"]])).text


def test_nothing_is_loaded_from_elsewhere(tmp_path: Path) -> None:
    picture = thumbnail(Image.new("RGB", (9, 9)))
    shown = page(tmp_path, Figure("f", png()), Gallery("g", [GalleryRow(Card(image=picture), (Card(image=picture),))]))
    html = (tmp_path / "report.html").read_text()
    without_pictures = re.sub(r"base64,[A-Za-z0-9+/=]+", "", html)
    assert not re.search(r"https?:|//|@import|url\(", without_pictures)
    sources = [str(image["src"]) for image in shown.named("img")]
    assert [source.split(",")[0] for source in sources] == ["data:image/png;base64", *["data:image/jpeg;base64"] * 2]
    assert base64.b64decode(sources[0].split(",")[1]) == png()
    assert base64.b64decode(sources[1].split(",")[1]) == picture
    policy = next(tag for tag in shown.named("meta") if tag.get("http-equiv") == "Content-Security-Policy")
    assert str(policy["content"]).startswith("default-src 'none'")


def test_dark_and_narrow(tmp_path: Path) -> None:
    page(tmp_path)
    html = (tmp_path / "report.html").read_text()
    assert "prefers-color-scheme: dark" in html
    assert 'name="viewport"' in html


def test_right_and_wrong_show_by_edge_and_by_mark(tmp_path: Path) -> None:
    results = (Card(caption="r", right=True), Card(caption="w", right=False), Card(caption="u"))
    shown = page(tmp_path, Gallery("g", [GalleryRow(Card(text="q"), results)]))
    assert [tag["class"] for tag in shown.named("figure")] == ["card", "card right", "card wrong", "card"]
    text = "".join(shown.text)
    assert text.count("✓") == 1
    assert text.count("✗") == 1
    assert text.index("✓") < text.index("✗")


def test_mark_without_caption(tmp_path: Path) -> None:
    assert "✓" in "".join(page(tmp_path, Gallery("g", [GalleryRow(Card(), (Card(right=True),))])).text)


def test_empty_parts(tmp_path: Path) -> None:
    shown = page(tmp_path, Table("t", ["c"], []), Gallery("g", []), Gallery("h", [GalleryRow(Card(text="q"), ())]))
    assert "q" in shown.text


def test_rows_must_fit_the_columns() -> None:
    with pytest.raises(ConfigError, match=r"row 1 of table 'T' has 1 cells; expected 2"):
        Table("T", ["a", "b"], [[1, 2], [3]])


def test_existing_report_is_replaced_whole(tmp_path: Path) -> None:
    page(tmp_path, title="old")
    assert "new" in page(tmp_path, title="new").text
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_thumbnail_is_a_small_upright_jpeg() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.new("RGB", (400, 200), "red").save(buffer, "JPEG", exif=exif)
    with Image.open(io.BytesIO(thumbnail(buffer.getvalue()))) as small:
        assert (small.format, small.size) == ("JPEG", (80, 160))
    with Image.open(io.BytesIO(thumbnail(buffer.getvalue(), side=50))) as small:
        assert small.size == (25, 50)
    with Image.open(io.BytesIO(thumbnail(Image.new("RGB", (3, 2))))) as small:
        assert small.size == (3, 2), "never enlarged"


def test_thumbnail_does_not_touch_its_source() -> None:
    image = Image.new("RGB", (400, 200))
    thumbnail(image)
    assert image.size == (400, 200)


def test_bad_thumbnails() -> None:
    with pytest.raises(ImageError):
        thumbnail(b"no picture")
    with pytest.raises(ConfigError, match="side is 0"):
        thumbnail(Image.new("RGB", (3, 3)), side=0)


def test_pictures_have_words_for_those_who_cannot_see_them(tmp_path: Path) -> None:
    picture = thumbnail(Image.new("RGB", (9, 9)))
    row = GalleryRow(Card(image=picture, alt=NASTY), (Card(image=picture),))
    shown = page(tmp_path, Figure("title", png(), alt="a falling line"), Gallery("g", [row]))
    assert [image["alt"] for image in shown.named("img")] == ["a falling line", NASTY, ""]


def test_a_folded_table_says_what_it_hides(tmp_path: Path) -> None:
    shown = page(tmp_path, Table("t", ["c"], [[1], [2]], folded=True), Table("u", ["c"], [[1]]))
    assert len(shown.named("details")) == 1
    assert "Show 2 rows" in shown.text
    assert len(shown.named("td")) == 3


@pytest.mark.parametrize(("count", "listed"), [(6, False), (7, True)])
def test_a_long_report_begins_with_its_contents(tmp_path: Path, count: int, listed: bool) -> None:
    shown = page(tmp_path, *[Table(f"{NASTY} {number}", ["c"], []) for number in range(count)])
    places = [f"#{section['id']}" for section in shown.named("section")]
    assert len(set(places)) == count
    assert [link["href"] for link in shown.named("a")] == (places if listed else [])
    assert "".join(shown.text).count(f"{NASTY} 0") == 1 + listed
