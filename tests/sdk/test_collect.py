"""Reading what is to be indexed: folders, texts and pairs, with all mistakes at once."""

from __future__ import annotations

import json
import os

import pytest
from PIL import Image

from dckt.collect import Collection, Item, collect_images, collect_pairs, collect_texts
from dckt.errors import ConfigError, CorpusError


@pytest.fixture
def pictures(tmp_path):
    root = tmp_path / "pictures"
    for name in ("b.png", "a.JPG", "deep/er/c.webp", ".hidden.png", ".folder/d.png", "notes.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    return root


def test_pictures_of_a_folder_and_of_the_folders_in_it(pictures):
    found = collect_images(pictures)
    assert [item.id for item in found.images] == ["a.JPG", "b.png", "deep/er/c.webp"]
    assert found.images[2] == Item(
        "deep/er/c.webp", pictures / "deep/er/c.webp", {"image": str(pictures / "deep/er/c.webp")}
    )
    assert (found.texts, found.skipped) == ((), ())


def test_one_picture_whatever_its_name(pictures):
    assert [item.id for item in collect_images(pictures / "notes.txt").images] == ["notes.txt"]


def test_metadata_is_an_absolute_path(pictures, monkeypatch):
    monkeypatch.chdir(pictures.parent)
    assert collect_images("pictures").images[0].metadata == {"image": str(pictures / "a.JPG")}


@pytest.mark.parametrize("name", ["missing", "empty"])
def test_no_pictures(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CorpusError, match="picture"):
        collect_images(tmp_path / name)


def test_a_name_that_is_not_unicode(pictures):
    (pictures / os.fsdecode(b"\xff.png")).write_bytes(b"")
    with pytest.raises(CorpusError, match="1 entries cannot be used") as caught:
        collect_images(pictures)
    assert "not Unicode" in caught.value.mistakes[0]
    found = collect_images(pictures, on_error="skip")
    assert len(found.images) == 3
    assert found.skipped == caught.value.mistakes


def test_lines_of_a_text_file(tmp_path):
    (tmp_path / "t.txt").write_bytes("\ufeffone\r\n\n  zwei \n".encode())
    assert collect_texts(tmp_path / "t.txt").texts == (
        Item("1", "one", {"text": "one"}),
        Item("3", "zwei", {"text": "zwei"}),
    )


def test_texts_as_json_lines(tmp_path):
    rows = [{"id": "a", "text": "one", "price": 3, "tags": ["x"]}, {"id": 7, "text": "two"}]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert collect_texts(tmp_path / "t.jsonl").texts == (
        Item("a", "one", {"text": "one", "price": 3, "tags": ["x"]}),
        Item("7", "two", {"text": "two"}),
    )


def test_texts_as_csv(tmp_path):
    (tmp_path / "t.csv").write_text('id,text,colour\na,"one, with\nlines",red\nb,two,\n')
    assert collect_texts(tmp_path / "t.csv").texts == (
        Item("a", "one, with\nlines", {"text": "one, with\nlines", "colour": "red"}),
        Item("b", "two", {"text": "two", "colour": ""}),
    )


BAD_LINES = [
    '{"id": "a", "text": "one"}',
    "not json",
    "[1]",
    '{"id": "b"}',
    '{"id": "b", "text": "  "}',
    '{"id": "b", "text": 3}',
    '{"id": "a", "text": "again"}',
    '{"id": ["x"], "text": "one"}',
    '{"id": true, "text": "one"}',
    '{"id": "s", "text": "\\ud800"}',
    '{"id": "z", "text": "a\\u0000b"}',
    '{"id": "last", "text": "good"}',
]


def test_every_bad_line_is_named_at_once(tmp_path):
    (tmp_path / "t.jsonl").write_text("\n".join(BAD_LINES))
    with pytest.raises(CorpusError, match=r"10 entries cannot be used.*--on-error skip") as caught:
        collect_texts(tmp_path / "t.jsonl")
    said = [
        "line 2: is not JSON",
        "line 3: is not a JSON object",
        "line 4: text is missing",
        "line 5: text is",
        "line 6: text is 3",
        "line 7: id 'a' is that of line 1 already",
        "line 8: id is ['x']",
        "line 9: id is True",
        "line 10: text is",
        "line 11: text is",
    ]
    assert len(caught.value.mistakes) == len(said)
    assert all(part in mistake for part, mistake in zip(said, caught.value.mistakes, strict=True))
    found = collect_texts(tmp_path / "t.jsonl", on_error="skip")
    assert [item.id for item in found.texts] == ["a", "last"]
    assert found.skipped == caught.value.mistakes


def test_bad_csv_rows_are_named_by_their_first_line(tmp_path):
    (tmp_path / "t.csv").write_text('id,text\na,"one\ntwo"\nb\nc,three,four\nd,"never closed')
    with pytest.raises(CorpusError) as caught:
        collect_texts(tmp_path / "t.csv")
    assert [mistake.split(":")[0] for mistake in caught.value.mistakes] == [
        "t.csv, line 4",
        "t.csv, line 5",
        "t.csv, line 6",
    ]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [("t.pdf", b"x", ".txt, .jsonl or .csv"), ("t.txt", b"\xff", "not UTF-8"), ("missing.txt", None, "cannot be read")],
)
def test_a_file_that_is_no_file_of_texts(tmp_path, name, content, said):
    if content:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError, match=said):
        collect_texts(tmp_path / name)


@pytest.fixture
def corpus(tmp_path):
    root = tmp_path / "corpus"
    (root / "images").mkdir(parents=True)
    for name in "ab":
        Image.new("RGB", (4, 4)).save(root / f"images/{name}.png")
    rows = [
        {"id": "p1", "image": "images/a.png", "text": "one", "label": "x", "split": "train"},
        {"id": "p2", "image": "images/b.png", "text": "two", "label": 3, "split": "test"},
        {"id": "p3", "image": "images/missing.png", "text": "three", "label": "x", "split": "val"},
    ]
    (root / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


def test_pairs_give_both_media_one_id(corpus):
    found = collect_pairs(corpus, split="test")
    picture = corpus / "images/b.png"
    assert found == Collection(
        images=(Item("p2", picture, {"label": 3, "split": "test", "image": str(picture)}),),
        texts=(Item("p2", "two", {"label": 3, "split": "test", "text": "two"}),),
    )


def test_pairs_of_a_file_and_without_split(corpus):
    rows = "id,image,text\np1,images/a.png,one\n"
    (corpus / "some.csv").write_text(rows)
    found = collect_pairs(corpus / "some.csv")
    assert found.texts == (Item("p1", "one", {"text": "one"}),)


def test_a_missing_picture_is_named(corpus):
    with pytest.raises(CorpusError, match=r"line 3: image 'images/missing.png' does not exist"):
        collect_pairs(corpus)
    found = collect_pairs(corpus, on_error="skip")
    assert [item.id for item in found.images] == [item.id for item in found.texts] == ["p1", "p2"]
    assert len(found.skipped) == 1


def test_a_split_that_no_pair_has(corpus):
    with pytest.raises(CorpusError, match="no pair with split 'tset'"):
        collect_pairs(corpus, split="tset")


def test_a_folder_that_is_no_corpus(tmp_path):
    with pytest.raises(CorpusError, match=r"holds 0 of pairs.jsonl and pairs.csv"):
        collect_pairs(tmp_path)


@pytest.mark.parametrize("collect", [collect_images, collect_texts, collect_pairs])
def test_on_error_is_checked(tmp_path, collect):
    with pytest.raises(ConfigError, match="on_error is 'ignore'"):
        collect(tmp_path, on_error="ignore")


def test_collections_add_up():
    one = Collection(texts=(Item("a", "one"),), skipped=("x",))
    other = Collection(texts=(Item("b", "two"),), skipped=("y",))
    assert one + other == Collection(texts=(Item("a", "one"), Item("b", "two")), skipped=("x", "y"))
