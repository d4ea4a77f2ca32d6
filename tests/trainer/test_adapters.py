"""Importing published corpora, from miniatures of the layouts that their publishers ship."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dckt.errors import ConfigError, CorpusError
from dckt_trainer import cli
from dckt_trainer.data import adapters
from dckt_trainer.data.adapters import FORMATS, Imported, import_corpus, wikipedia
from dckt_trainer.data.corpus import Corpus, read_corpus


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (2, 2)).save(path)


def write(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def wikipedia_folder(root: Path, train: int = 4, test: int = 3) -> Path:
    """Three categories; of each, so many pairs. Text ids hold dots, as the publisher's do."""
    folder = root / "wikipedia_dataset"
    names = ("art", "biology", "warfare")
    write(folder / "categories.list", "".join(f"{name}\n" for name in names))
    for kind, size in (("train", train), ("test", test)):
        rows = []
        for number, name in enumerate(names, start=1):
            for k in range(size):
                rows.append(f"{kind}{number}-{k}.2\tp{kind}{number}{k}\t{number}\n")
                write(
                    folder / f"texts/{kind}{number}-{k}.2.xml",
                    f'<?xml version="1.0"?><document name="A & B"><text>About {name} {k}</text></document>',
                )
                picture(folder / f"images/{name}/p{kind}{number}{k}.jpg")
        write(folder / f"{kind}set_txt_img_cat.list", "".join(rows))
    return folder


NUS_CONCEPTS = ("sky", "water")


def nus_folder(root: Path, rows: list[tuple[str, str, str, bool]] | None = None) -> Path:
    """Rows of picture, tags, concepts that it shows, and whether it is there."""
    folder = root / "NUS-WIDE"
    if rows is None:
        rows = [
            (rf"actor\{k:04}_{100 + k}.jpg", f"nice {NUS_CONCEPTS[k % 2]}", NUS_CONCEPTS[k % 2], True)
            for k in range(24)
        ]
    write(folder / "ImageList/Imagelist.txt", "".join(f"{name}\r\n" for name, *_ in rows))
    numbers = [name.rpartition("_")[2].partition(".")[0] for name, *_ in rows]
    tags = "".join(f"{number}      {row[1]} \r\n" for number, row in zip(numbers, rows, strict=True))
    write(folder / "NUS_WID_Tags/All_Tags.txt", tags)
    for concept in (*NUS_CONCEPTS, "zebra"):
        values = "".join(f"{int(concept in row[2].split())}\n" for row in rows)
        write(folder / f"Groundtruth/AllLabels/Labels_{concept}.txt", values)
    for name, _, _, there in rows:
        if there:
            picture(folder / "Flickr" / name.replace("\\", "/"))
    return folder


def pascal_page(root: Path, per_class: int = 10) -> Path:
    folder = root / "pascal-sentences"
    rows = []
    for label in ("aeroplane", "bicycle"):
        for k in range(per_class):
            picture(folder / label / f"2008_{k:06}.jpg")
            cells = "".join(f"<tr><td> The {label} &amp; {k},\n  caption {c}. </td></tr>\n" for c in range(5))
            rows.append(
                f'<tr>\n<td><img src="{label}/2008_{k:06}.jpg"></td>\n<td><table>\n{cells}</table></td>\n</tr>\n'
            )
    write(folder / "index.html", f"<html><body><h1>Sentences</h1><table>\n{''.join(rows)}</table></body></html>")
    return folder


def pascal_folders(root: Path, per_class: int = 10) -> Path:
    folder = root / "PascalSentenceDataset"
    for label in ("aeroplane", "bicycle"):
        for k in range(per_class):
            picture(folder / "dataset" / label / f"2008_{k:06}.jpg")
            write(folder / "sentence" / label / f"2008_{k:06}{'' if k % 2 else '.'}txt", f"A {label}.\n\nIt is {k}.\n")
    return folder


def xmedianet_folder(root: Path) -> Path:
    folder = root / "XMediaNet"
    names = {"dog": 36, "owl": 0}
    for split, size in (("train", 3), ("val", 1), ("test", 2)):
        images, texts = [], []
        for k in range(size):
            for name, number in names.items():
                images.append(f"{name}/{split}{k}.jpg {number}\n")
                texts.append(f"{name}/{name} (bird)----{split}_{k}.txt {number}\n")
                picture(folder / f"image/{name}/{split}{k}.jpg")
                write(folder / f"text/{name}/{name} (bird)----{split}_{k}.txt", f"The {name}\n is {split} {k}.")
        write(folder / f"list/{split}_img.txt", "".join(images))
        # Another order of classes: what lines up is the order within a class.
        write(folder / f"list/{split}_txt.txt", "".join(sorted(texts, key=lambda line: line.split("/")[0])))
    return folder


FOLDERS: dict[str, Callable[[Path], Path]] = {
    "wikipedia": wikipedia_folder,
    "nus-wide-10k": nus_folder,
    "pascal-sentences": pascal_page,
    "xmedianet": xmedianet_folder,
}
NUS: dict[str, Any] = {"concepts": NUS_CONCEPTS, "pairs_per_class": 10}


def imported(kind: str, folder: Path, out: Path, **options: Any) -> tuple[Imported, Corpus]:
    made = import_corpus(kind, folder, out, **options)  # type: ignore[arg-type]
    return made, read_corpus(out)


def refused(kind: str, folder: Path, out: Path, **options: Any) -> CorpusError:
    before = sorted(folder.parent.iterdir())
    with pytest.raises(CorpusError) as caught:
        import_corpus(kind, folder, out, **options)  # type: ignore[arg-type]
    assert sorted(folder.parent.iterdir()) == before  # neither the corpus nor a part of it
    return caught.value


@pytest.mark.parametrize("kind", FORMATS)
def test_an_import_is_a_corpus_and_says_what_it_is(kind: str, tmp_path: Path) -> None:
    folder = FOLDERS[kind](tmp_path)
    seen: list[tuple[int, int]] = []
    options = NUS if kind == "nus-wide-10k" else {}
    made, corpus = imported(kind, folder, tmp_path / "out", progress=lambda *now: seen.append(now), **options)
    assert made.pairs == len(corpus.pairs) > 0
    assert made.splits == Counter(pair.split for pair in corpus.pairs)
    assert made.labels == Counter(pair.label for pair in corpus.pairs)
    assert corpus.skipped == ()
    assert seen == [(k, made.pairs) for k in range(1, made.pairs + 1)]
    about = json.loads((tmp_path / "out/import.json").read_text())
    assert about == {
        "format": kind,
        "source": folder.name,
        "seed": None if kind == "xmedianet" else 0,
        "pairs": made.pairs,
        "splits": made.splits,
        "labels": made.labels,
        "left_out": made.left_out,
        "decisions": list(made.decisions),
    }
    assert any("our choice" in text or "lists" in text for text in about["decisions"])


@pytest.mark.parametrize("kind", FORMATS)
def test_a_folder_of_another_layout_is_refused(kind: str, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    error = refused(kind, tmp_path / "other", tmp_path / "out")
    assert "other" in str(error)
    assert "expected" in str(error)
    assert "there is no such folder" in str(refused(kind, tmp_path / "nowhere", tmp_path / "out"))


# --- Wikipedia


def test_wikipedia_pairs(tmp_path: Path) -> None:
    made, corpus = imported("wikipedia", wikipedia_folder(tmp_path), tmp_path / "wiki")
    assert made.splits == {"train": 12, "val": 3, "test": 6}
    assert made.left_out == {}
    assert corpus.labels == ("art", "biology", "warfare")
    first = corpus.pairs[0]
    assert (first.id, first.text, first.label, first.split) == ("train1-0.2", "About art 0", "art", "train")
    assert first.image == tmp_path / "wiki/images/art/ptrain10.jpg"
    assert {pair.split for pair in corpus.pairs if pair.id.startswith("train")} == {"train"}


def test_wikipedia_val_is_a_third_of_each_category_by_seed(tmp_path: Path) -> None:
    folder = wikipedia_folder(tmp_path, train=1, test=7)  # a third of 21 is 7: 2 of each category, and one of one
    val = {}
    for seed in (0, 1):
        _, corpus = imported("wikipedia", folder, tmp_path / f"wiki{seed}", seed=seed)
        val[seed] = {pair.id for pair in corpus.part("val")}
        assert sorted(Counter(pair.label for pair in corpus.part("val")).values()) == [2, 2, 3]
    assert val[0] != val[1]
    _, again = imported("wikipedia", folder, tmp_path / "again")
    assert {pair.id for pair in again.part("val")} == val[0]


@pytest.mark.parametrize(("size", "third"), [(693, 231), (1, 0), (2, 1), (4, 1), (5, 2)])
def test_wikipedia_sizes(size: int, third: int, tmp_path: Path) -> None:
    lists = {"train": ["t p 1\n"], "test": [f"t{k} p{k} {1 + k % 10}\n" for k in range(size)]}
    write(tmp_path / "categories.list", "".join(f"c{k}\n" for k in range(10)))
    for kind, lines in lists.items():
        write(tmp_path / f"{kind}set_txt_img_cat.list", "".join(lines))
    counts = Counter(item.split for item in wikipedia.read(tmp_path).items)
    assert (counts["val"], counts["test"]) == (third, size - third)


@pytest.mark.parametrize(
    ("xml", "text"),
    [
        ("<text>Sun &amp; moon, caf&eacute; &#8211; R&D</text>", "Sun & moon, café – R&D"),
        ("<document><text>a <b>bold</b><br/>word\n\n and more</text></document>", "a bold word and more"),
        ("<p>no</p><text id='1'>one</text><!-- <text>not</text> --><TEXT>two</TEXT>", "one two"),
        ("<text><![CDATA[if a < b and c > d]]></text>", "if a < b and c > d"),
        ("<text>written &lt;b&gt;so&lt;/b&gt;</text>", "written <b>so</b>"),
        (b"<text>na\xefve</text>", "naïve"),
        ("\ufeff<text>Grüße 你好</text>", "Grüße 你好"),
    ],
)
def test_wikipedia_text(xml: str | bytes, text: str, tmp_path: Path) -> None:
    folder = wikipedia_folder(tmp_path)
    write(folder / "texts/train1-0.2.xml", xml)
    _, corpus = imported("wikipedia", folder, tmp_path / "wiki")
    assert corpus.pairs[0].text == text


def test_wikipedia_lines_of_another_form(tmp_path: Path) -> None:
    folder = wikipedia_folder(tmp_path)
    path = folder / "testset_txt_img_cat.list"
    for line in ("only two", "a b 4", "a b 0", "a b c", "a b 1 extra"):
        write(path, f"x y 1\n{line}\n")
        message = str(refused("wikipedia", folder, tmp_path / "out"))
        assert f"{path}: line 2 is {line!r}; expected text id, picture id and number of the category, 1 to 3" in message
    write(path, "\n")
    assert "is empty" in str(refused("wikipedia", folder, tmp_path / "out"))
    path.unlink()
    assert f"{path}: cannot be read" in str(refused("wikipedia", folder, tmp_path / "out"))


def test_bad_pairs_are_all_named_or_left_out_and_counted(tmp_path: Path) -> None:
    folder = wikipedia_folder(tmp_path)
    (folder / "images/art/ptrain10.jpg").unlink()
    write(folder / "images/art/ptrain11.jpg", b"no picture")
    (folder / "texts/train2-0.2.xml").unlink()
    write(folder / "texts/train2-1.2.xml", "<text>never closed")
    write(folder / "texts/test1-0.2.xml", "<text> ... </text>")
    with (folder / "trainset_txt_img_cat.list").open("a") as lines:
        lines.write("train3-0.2 ptrain30 3\n")
    error = refused("wikipedia", folder, tmp_path / "out")
    assert "6 of 22 pairs cannot be used" in str(error)
    places = [mistake.partition(" (")[0] for mistake in error.mistakes]
    assert places == [
        "trainset_txt_img_cat.list: line 1: picture is missing",
        "trainset_txt_img_cat.list: line 2: picture cannot be decoded",
        "trainset_txt_img_cat.list: line 5: the text's file cannot be read",
        "trainset_txt_img_cat.list: line 6: the text's file has no <text> element",
        "trainset_txt_img_cat.list: line 13: another pair has the same id",
        "testset_txt_img_cat.list: line 1: the text holds no word",
    ]
    made, corpus = imported("wikipedia", folder, tmp_path / "out", on_bad_pair="skip")
    assert made.pairs == 16
    assert set(made.left_out.values()) == {1}
    assert len(made.left_out) == 6
    assert made.left_out == json.loads((tmp_path / "out/import.json").read_text())["left_out"]
    assert not (tmp_path / "out/images/art/ptrain11.jpg").exists()
    assert "train1-0.2" not in {pair.id for pair in corpus.pairs}


def test_what_is_left_must_be_a_corpus(tmp_path: Path) -> None:
    folder = wikipedia_folder(tmp_path)
    for path in (folder / "images/art").glob("ptrain*"):
        path.unlink()
    error = refused("wikipedia", folder, tmp_path / "out", on_bad_pair="skip")
    assert "what can be used of it is no corpus: pairs.jsonl: the labels do not allow training" in str(error)
    assert error.mistakes == ("label 'art' has 1 val and 2 test pairs, but no train pair",)


# --- NUS-WIDE-10k


def test_nus_wide_pairs(tmp_path: Path) -> None:
    made, corpus = imported("nus-wide-10k", nus_folder(tmp_path), tmp_path / "nus", **NUS)
    assert made.labels == {"sky": 10, "water": 10}
    assert Counter((pair.label, pair.split) for pair in corpus.pairs) == {
        (label, split): count for label in NUS_CONCEPTS for split, count in (("train", 8), ("val", 1), ("test", 1))
    }
    assert made.left_out == {"not drawn, its concept has enough": 4}
    ids = [pair.id for pair in corpus.pairs]
    assert ids == sorted(ids)  # the publisher's order
    assert all(pair.text == f"nice {pair.label}" for pair in corpus.pairs)
    assert corpus.pairs[0].image == tmp_path / f"nus/images/{ids[0]}.jpg"
    other = imported("nus-wide-10k", tmp_path / "NUS-WIDE", tmp_path / "other", seed=1, **NUS)[1]
    assert {pair.id for pair in other.pairs} != set(ids)


def test_nus_wide_rules(tmp_path: Path) -> None:
    rows = [
        (r"a\1_1.jpg", "one two", "sky", True),
        (r"C:\ImageData\Flickr\b\2_2.jpg", "two", "water zebra", True),  # zebra is none of the two concepts
        (r"a\3_3.jpg", "three", "sky water", True),
        (r"a\4_4.jpg", "four", "zebra", True),
        (r"a\5_5.jpg", "", "sky", True),
        (r"a\6_6.jpg", "!!!", "sky", True),
        (r"a\7_7.jpg", "seven", "water", False),
        (r"b\8_1.jpg", "one", "water", True),  # the photograph of the first line
        (r"a\9_9.jpg", "九 neun", "sky", True),
        (r"a\10_10.jpg", "ten", "water", True),
    ]
    folder = nus_folder(tmp_path, [*rows[:1], (r"b\2_2.jpg", *rows[1][1:]), *rows[2:]])
    names = "".join(f"{name}\n" for name, *_ in rows)
    write(folder / "ImageList/Imagelist.txt", names)
    made, corpus = imported("nus-wide-10k", folder, tmp_path / "nus", concepts=NUS_CONCEPTS, pairs_per_class=2)
    assert {pair.id: (pair.text, pair.label) for pair in corpus.pairs} == {
        "a/1_1": ("one two", "sky"),
        "b/2_2": ("two", "water"),
        "a/9_9": ("九 neun", "sky"),
        "a/10_10": ("ten", "water"),
    }
    assert made.left_out == {
        "several of the concepts": 1,
        "none of the concepts": 1,
        "no tag": 2,
        "picture is missing": 1,
        "photograph is listed already": 1,
    }


def test_nus_wide_refuses_lists_that_do_not_line_up(tmp_path: Path) -> None:
    folder = nus_folder(tmp_path)
    tags, labels = folder / "NUS_WID_Tags/All_Tags.txt", folder / "Groundtruth/AllLabels/Labels_sky.txt"
    good = {path: path.read_bytes() for path in (folder / "ImageList/Imagelist.txt", tags, labels)}
    for path, content, message in (
        (folder / "ImageList/Imagelist.txt", b"nothing\n", "line 1 is 'nothing'; expected folder and picture"),
        (tags, good[tags].replace(b"103 ", b"999 "), "line 4 is '999      nice water '; expected the number of a"),
        (tags, good[tags][:-100], "lines; expected 24, as many as the image list"),
        (labels, b"1\n", "has 1 lines; expected 24"),
        (labels, good[labels].replace(b"0", b"-1130179", 1), "line 2 is '-1130179'; expected 0 or 1"),
    ):
        write(path, content)
        error = refused("nus-wide-10k", folder, tmp_path / "out", **NUS)
        assert str(error).startswith(str(path))
        assert message in str(error)
        write(path, good[path])
    labels.unlink()
    message = str(refused("nus-wide-10k", folder, tmp_path / "out", **NUS))
    assert f"{labels}: there is no such list; expected one of a concept, there is water, zebra" in message


def test_nus_wide_too_few_photographs(tmp_path: Path) -> None:
    error = refused("nus-wide-10k", nus_folder(tmp_path), tmp_path / "out", concepts=("sky", "zebra"))
    assert "expected 1000 of each concept" in str(error)
    assert error.mistakes == ("sky: 12", "zebra: 0")


def test_nus_wide_arguments(tmp_path: Path) -> None:
    folder = nus_folder(tmp_path)
    for concepts in ([], ["sky"], ["sky", "sky"]):
        with pytest.raises(ConfigError, match="expected two or more, each once"):
            import_corpus("nus-wide-10k", folder, tmp_path / "out", concepts=concepts)
    with pytest.raises(ConfigError, match="pairs_per_class is 0; expected at least 1"):
        import_corpus("nus-wide-10k", folder, tmp_path / "out", pairs_per_class=0)
    with pytest.raises(ConfigError, match="leave them out for xmedianet"):
        import_corpus("xmedianet", folder, tmp_path / "out", pairs_per_class=3)


# --- Pascal Sentences


@pytest.mark.parametrize("layout", [pascal_page, pascal_folders])
def test_pascal_sentences_split(layout: Callable[[Path, int], Path], tmp_path: Path) -> None:
    folder = layout(tmp_path, 50)
    made, corpus = imported("pascal-sentences", folder, tmp_path / "out")
    assert made.splits == {"train": 80, "val": 10, "test": 10}
    assert Counter((pair.label, pair.split) for pair in corpus.pairs if pair.split != "train") == {
        (label, split): 5 for label in ("aeroplane", "bicycle") for split in ("val", "test")
    }
    other = imported("pascal-sentences", folder, tmp_path / "other", seed=1)[1]
    assert {pair.id for pair in other.part("test")} != {pair.id for pair in corpus.part("test")}


def test_pascal_sentences_from_the_page(tmp_path: Path) -> None:
    _, corpus = imported("pascal-sentences", pascal_page(tmp_path), tmp_path / "out")
    first = corpus.pairs[0]
    assert first.id == "aeroplane/2008_000000"
    assert first.image == tmp_path / "out/images/aeroplane/2008_000000.jpg"
    assert first.text.split("\n") == [f"The aeroplane & 0, caption {c}." for c in range(5)]


def test_pascal_sentences_page_without_ends_and_with_pictures_elsewhere(tmp_path: Path) -> None:
    """What a parser of pages must stand: open cells, other cases, full addresses, and a picture of the page itself."""
    folder = tmp_path / "page"
    rows = []
    for label in ("cat", "dog"):
        picture(folder / f"images/{label}/a b.jpg")
        address = f"http://vision.cs.uiuc.edu/pascal-sentences/{label}/a%20b.jpg"
        rows.append(f"<TR><TD><IMG SRC='{address}'><TD><TABLE><TR><TD>one {label}<TR><TD>two</TABLE>")
    write(folder / "page.htm", "<img src='logo.png'><table><tr><td>Welcome" + "".join(rows) + "</table>")
    _, corpus = imported("pascal-sentences", folder, tmp_path / "out")
    assert {pair.id: pair.text for pair in corpus.pairs} == {"cat/a b": "one cat\ntwo", "dog/a b": "one dog\ntwo"}


def test_pascal_sentences_from_folders(tmp_path: Path) -> None:
    folder = pascal_folders(tmp_path)
    (folder / "dataset/bicycle/2008_000003.jpg").unlink()
    (folder / "sentence/bicycle/2008_000004.txt").unlink()
    error = refused("pascal-sentences", folder, tmp_path / "out")
    assert [mistake.partition(" (")[0] for mistake in error.mistakes] == [
        "bicycle/2008_000003: picture is missing",
        "bicycle/2008_000004: the text holds no word",
    ]
    _, corpus = imported("pascal-sentences", folder, tmp_path / "out", on_bad_pair="skip")
    assert len(corpus.pairs) == 18
    assert corpus.pairs[0].text == "A aeroplane.\nIt is 0."
    assert corpus.pairs[1].text == "A aeroplane.\nIt is 1."  # from the text without a dot


def test_pascal_sentences_in_one_folder_of_classes(tmp_path: Path) -> None:
    folder = tmp_path / "classes"
    for label in ("cat", "dog"):
        picture(folder / label / "1.jpg")
        write(folder / label / "1.txt", f"A {label}.")
    _, corpus = imported("pascal-sentences", folder, tmp_path / "out")
    assert [(pair.id, pair.text) for pair in corpus.pairs] == [("cat/1", "A cat."), ("dog/1", "A dog.")]


def test_pascal_sentences_pages_that_do_not_say_the_class(tmp_path: Path) -> None:
    folder = pascal_page(tmp_path)
    page = folder / "index.html"
    text = page.read_text()
    write(page, text.replace("aeroplane/", "page_files/").replace("bicycle/", "page_files/"))
    message = str(refused("pascal-sentences", folder, tmp_path / "out"))
    assert "names 20 pictures, all of the class 'page_files'" in message
    assert "not one that a browser saved" in message
    write(folder / "second.html", text)
    assert "holds index.html and second.html" in str(refused("pascal-sentences", folder, tmp_path / "out"))


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    folder = tmp_path / "page"
    (folder / "index.html").mkdir(parents=True)
    assert "cannot be read" in str(refused("pascal-sentences", folder, tmp_path / "out"))


# --- XMediaNet


def test_xmedianet_pairs_by_class_and_order(tmp_path: Path) -> None:
    made, corpus = imported("xmedianet", xmedianet_folder(tmp_path), tmp_path / "out", seed=5)
    assert made.splits == {"train": 6, "val": 2, "test": 4}
    assert corpus.labels == ("dog", "owl")
    for pair in corpus.pairs:
        number = pair.image.stem.removeprefix(pair.split)
        assert pair.text == f"The {pair.label} is {pair.split} {number}."
        assert pair.id == f"{pair.label}/{pair.split}{number}.jpg"


def test_xmedianet_counts_what_has_no_partner(tmp_path: Path) -> None:
    folder = xmedianet_folder(tmp_path)
    images, texts = folder / "list/train_img.txt", folder / "list/train_txt.txt"
    write(images, images.read_text().replace("dog/train1.jpg 36\n", ""))
    write(texts, texts.read_text().replace("owl/owl (bird)----train_0.txt 0\nowl/owl (bird)----train_1.txt 0\n", ""))
    made, corpus = imported("xmedianet", folder, tmp_path / "out")
    assert made.left_out == {"picture without a text of its class": 2, "text without a picture of its class": 1}
    assert {pair.id: pair.text for pair in corpus.part("train")} == {
        "dog/train0.jpg": "The dog is train 0.",
        "dog/train2.jpg": "The dog is train 1.",
        "owl/train0.jpg": "The owl is train 2.",
    }


def test_xmedianet_training_lists_alone(tmp_path: Path) -> None:
    folder = xmedianet_folder(tmp_path)
    for path in (folder / "list").glob("[!t]*"):
        path.unlink()
    for path in (folder / "list").glob("test*"):
        path.unlink()
    made, _ = imported("xmedianet", folder, tmp_path / "out")
    assert made.splits == {"train": 6, "val": 0, "test": 0}


def test_xmedianet_names_that_are_not_utf8(tmp_path: Path) -> None:
    """The lists have some names in the encoding of the machine that wrote them; a disk may have them decoded."""
    folder = tmp_path / "XMediaNet"
    stored = [
        "Portière.txt".encode("gb18030"),
        "Portière.txt".encode(),
        b"Porti\xa8\xa8re.txt".decode("latin-1").encode(),
    ]
    for k, name in enumerate(stored):
        for label in ("curtain", "owl"):
            raw = f"{label}/{k}".encode() + name
            picture(folder / f"image/{label}/{k}.jpg")
            write(folder / "text" / os.fsdecode(raw), f"text {k}")
    listed = "Portière.txt".encode("gb18030")
    rows = [(label, k) for k in range(3) for label in ("curtain", "owl")]
    write(folder / "train_img.txt", "".join(f"{label}/{k}.jpg {label == 'owl':d}\n" for label, k in rows))
    write(
        folder / "train_txt.txt",
        b"".join(b"%s/%d%s %d\n" % (name.encode(), k, listed, name == "owl") for name, k in rows),
    )
    _, corpus = imported("xmedianet", folder, tmp_path / "out")
    assert [pair.text for pair in corpus.pairs] == [f"text {k}" for _, k in rows]


def test_xmedianet_errors(tmp_path: Path) -> None:
    folder = xmedianet_folder(tmp_path)
    images = folder / "list/train_img.txt"
    good = images.read_text()
    for line in ("dog/x.jpg", "dog/x.jpg dog", "36"):
        write(images, f"{good}{line}\n")
        message = str(refused("xmedianet", folder, tmp_path / "out"))
        assert f"{images}: line 7 is {line!r}; expected a path and the number of its class" in message
    write(images, f"{good}cat/x.jpg 36\n")
    message = str(refused("xmedianet", folder, tmp_path / "out"))
    assert "train_img.txt: line 7: class 36 is 'cat', but 'dog' before" in message
    write(images, good)
    write(images, f"{good}dog//train0.jpg 36\n")
    write(folder / "list/train_txt.txt", (folder / "list/train_txt.txt").read_text() * 2)
    assert refused("xmedianet", folder, tmp_path / "out").mistakes == (
        "train_img.txt: line 7: another pair has the same id (dog/train0.jpg)",
    )
    (folder / "image").rename(tmp_path / "elsewhere")
    message = str(refused("xmedianet", folder, tmp_path / "out"))
    assert "none of the first files that train_img.txt names, like dog/train0.jpg" in message
    (tmp_path / "elsewhere").rename(folder / "image")
    (folder / "list/val_txt.txt").unlink()
    assert "one of val_img.txt and val_txt.txt is missing" in str(refused("xmedianet", folder, tmp_path / "out"))


def test_a_list_does_not_lead_out_of_the_corpus(tmp_path: Path) -> None:
    folder = xmedianet_folder(tmp_path)
    picture(tmp_path / "dog/secret.jpg")
    images = folder / "list/train_img.txt"
    write(images, images.read_text().replace("dog/train0.jpg", "../../dog/secret.jpg"))
    error = refused("xmedianet", folder, tmp_path / "out")
    assert error.mistakes == ("train_img.txt: line 1: the picture's path leaves the folder (../../dog/secret.jpg)",)


# --- The writer


def test_pictures_are_linked_or_copied(tmp_path: Path) -> None:
    folder = wikipedia_folder(tmp_path)
    source = folder / "images/art/ptrain10.jpg"
    real = source.rename(tmp_path / "real.jpg")
    source.symlink_to(real)
    _, linked = imported("wikipedia", folder, tmp_path / "linked")
    _, copied = imported("wikipedia", folder, tmp_path / "copied", link=False)
    assert linked.pairs[0].image.samefile(real)
    assert not linked.pairs[0].image.is_symlink()
    assert linked.pairs[1].image.samefile(folder / "images/art/ptrain11.jpg")
    for pair in copied.pairs:
        assert pair.image.stat().st_nlink == 1
    assert copied.pairs[0].image.read_bytes() == real.read_bytes()


def test_pictures_are_copied_where_links_do_not_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, "another file system")

    folder = wikipedia_folder(tmp_path)
    monkeypatch.setattr(adapters.os, "link", refuse)
    _, corpus = imported("wikipedia", folder, tmp_path / "out")
    assert corpus.pairs[0].image.stat().st_nlink == 1


@pytest.mark.parametrize("force", [False, True])
def test_a_failure_leaves_what_was_there(force: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = wikipedia_folder(tmp_path)
    out = tmp_path / "out"
    if force:
        import_corpus("wikipedia", folder, out)
    before = sorted(tmp_path.rglob("*"))

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "disk is full")

    monkeypatch.setattr(adapters, "_copy", fail)
    with pytest.raises(CorpusError, match=r"cannot be written .*disk is full"):
        import_corpus("wikipedia", folder, out, force=force)
    assert sorted(tmp_path.rglob("*")) == before


def test_only_a_corpus_is_replaced_and_only_by_force(tmp_path: Path) -> None:
    folder = wikipedia_folder(tmp_path)
    out = tmp_path / "out"
    import_corpus("wikipedia", folder, out)
    assert "exists already" in str(refused("wikipedia", folder, out))
    import_corpus("wikipedia", folder, out, seed=1, force=True)
    assert json.loads((out / "import.json").read_text())["seed"] == 1
    (tmp_path / "papers").mkdir()
    assert "is no corpus, so it is not replaced" in str(refused("wikipedia", folder, tmp_path / "papers", force=True))


def test_the_corpus_lies_outside_the_published_folder(tmp_path: Path) -> None:
    folder = wikipedia_folder(tmp_path)
    for out in (folder, folder / "corpus", tmp_path):
        with pytest.raises(ConfigError, match="overlap; write the corpus elsewhere"):
            import_corpus("wikipedia", folder, out, force=True)
    assert (folder / "categories.list").exists()


def test_arguments_that_are_not_offered(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="format is 'flickr'; expected one of wikipedia, nus-wide-10k"):
        import_corpus("flickr", tmp_path, tmp_path / "out")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="on_bad_pair is 'ignore'; expected one of raise, skip"):
        import_corpus("wikipedia", tmp_path, tmp_path / "out", on_bad_pair="ignore")  # type: ignore[arg-type]


# --- The command


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[Any, str, str]]:
    """Runs ``dckt-train import``; gives its exit code, stdout and stderr."""

    def run(*arguments: object) -> tuple[Any, str, str]:
        monkeypatch.setattr(sys, "argv", ["dckt-train", "import", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "160")
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return ended.value.code, captured.out, captured.err

    return run


def test_the_command_reports_counts(command: Callable[..., tuple[Any, str, str]], tmp_path: Path) -> None:
    folder = nus_folder(tmp_path)
    out = tmp_path / "nus"
    options = ["--concepts", "sky, water", "--pairs-per-class", 10, "--seed", 3, "--copy"]
    code, printed, err = command("nus-wide-10k", folder, "--out", out, *options)
    assert code == 0
    lines = printed.splitlines()
    assert lines[0] == f"{out}: 20 pairs of 2 classes (train 16, val 2, test 2)"
    assert lines[1] == "left out: 4 (not drawn, its concept has enough)"
    assert all(line.startswith("note: ") for line in lines[2:])
    assert "drawn by seed 3" in lines[2]
    assert "pictures" in err  # progress is not mixed with the report
    corpus = read_corpus(out)
    assert len(corpus.pairs) == 20
    assert corpus.pairs[0].image.stat().st_nlink == 1
    code, _, err = command("nus-wide-10k", folder, "--out", out, *options)
    assert code == 2
    assert "exists already" in err
    assert command("nus-wide-10k", folder, "--out", out, "--force", *options)[0] == 0


def test_the_command_names_bad_pairs(command: Callable[..., tuple[Any, str, str]], tmp_path: Path) -> None:
    folder = wikipedia_folder(tmp_path)
    (folder / "images/art/ptrain10.jpg").unlink()
    code, printed, err = command("wikipedia", folder, "--out", tmp_path / "out")
    assert (code, printed) == (2, "")
    assert "error: " in err
    assert "trainset_txt_img_cat.list: line 1: picture is missing" in err
    assert "Traceback" not in err
    code, printed, _ = command("wikipedia", folder, "--out", tmp_path / "out", "--on-bad-pair", "skip")
    assert code == 0
    assert "left out: 1 (picture is missing)" in printed


def test_the_command_explains_itself(command: Callable[..., tuple[Any, str, str]]) -> None:
    code, printed, _ = command("--help")
    assert code == 0
    assert "dckt-train import wikipedia wikipedia_dataset --out wikipedia" in printed
    code, _, err = command("flickr", ".", "--out", "out")
    assert code == 2
    assert "expected one of wikipedia, nus-wide-10k, pascal-sentences, xmedianet" in err
