"""Reading and checking corpora."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dckt.errors import ConfigError, CorpusError, MissingExtraError
from dckt_trainer.data.corpus import Corpus, read_corpus
from dckt_trainer.data.subset import subset_per_class

Row = dict[str, Any]


def rows(per_label: int = 4, labels: tuple[str, ...] = ("cat", "dog")) -> list[Row]:
    """Good rows: of each label the last pair is test, the one before val, the others train."""
    splits = ["train"] * (per_label - 2) + ["val", "test"]
    return [
        {
            "id": f"{label}{k}",
            "image": f"images/{label}{k}.png",
            "text": f"one {label}",
            "label": label,
            "split": s,
        }
        for label in labels
        for k, s in enumerate(splits)
    ]


def write(folder: Path, content: list[Row] | bytes, images: list[str] | None = None) -> Path:
    (folder / "images").mkdir(exist_ok=True)
    if isinstance(content, bytes):
        (folder / "pairs.jsonl").write_bytes(content)
    else:
        (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
        images = [row["image"] for row in content] if images is None else images
    for image in images or []:
        Image.new("RGB", (2, 2)).save(folder / image)
    return folder


def mistakes(folder: Path, **options: Any) -> tuple[str, ...]:
    with pytest.raises(CorpusError) as caught:
        read_corpus(folder, **options)
    return caught.value.mistakes


def test_a_good_corpus(tmp_path: Path) -> None:
    folder = tmp_path / "shop"
    folder.mkdir()
    corpus = read_corpus(write(folder, rows()))
    assert (corpus.name, corpus.root, len(corpus.pairs)) == ("shop", folder, 8)
    assert corpus.labels == ("cat", "dog")
    assert [pair.id for pair in corpus.part("train")] == ["cat0", "cat1", "dog0", "dog1"]
    assert [pair.id for pair in corpus.part("val")] == ["cat2", "dog2"]
    assert corpus.pairs[0].image == folder / "images/cat0.png"
    assert corpus.warnings == corpus.skipped == ()
    with pytest.raises(ConfigError, match="expected one of train, val, test"):
        corpus.part("dev")  # type: ignore[arg-type]


def test_every_mistake_is_listed_with_its_line(tmp_path: Path) -> None:
    good = rows()
    bad: list[Any] = [
        {**good[0], "id": ""},
        {**good[0], "id": "cat1", "image": "images/cat1.png"},
        {**good[0], "id": "c", "text": " \n"},
        {**good[0], "id": "d", "text": "?! ..."},
        {**good[0], "id": "e", "text": ["a"], "label": None},
        {**good[0], "id": "f", "label": 1.5},
        {**good[0], "id": "g", "label": True},
        {**good[0], "id": "h", "label": " "},
        {**good[0], "id": "i", "split": "dev"},
        {**good[0], "id": "j", "split": None},
        {**good[0], "id": "k", "image": "images/none.png"},
        {**good[0], "id": "l", "image": "/etc/hostname"},
        {**good[0], "id": "m", "image": "images/../../x.png"},
        {**good[0], "id": "n", "image": "images"},
        {**good[0], "id": "o", "image": "images/\0.png"},
        {**good[0], "id": 16},
        {**good[0], "id": "q", "text": "half \ud800"},
        {"id": "r", "image": "images/cat0.png", "text": "a cat", "split": "train"},
        [1, 2],
        "text",
    ]
    lines = [json.dumps(row) for row in good + bad] + [
        "{",
        '{"id": "\\"}',
        "",
        json.dumps({**good[0], "split": 1}),
    ]
    content = "\n".join(lines).encode() + b'\n{"id": "\xff"}\n' + b"[" * 100_000
    folder = write(tmp_path, content, [row["image"] for row in good])
    (folder / "images/broken.png").write_bytes((folder / "images/cat0.png").read_bytes()[:40])
    with (folder / "pairs.jsonl").open("a") as file:
        file.write("\n" + json.dumps({**good[0], "id": "u", "image": "images/broken.png"}))

    found = mistakes(folder)
    expected = [
        (9, "id is empty"),
        (10, "id 'cat1' is that of line 2 already"),
        (11, "text is empty"),
        (12, "holds no word"),
        (13, "text is a list; expected text"),
        (13, "label is null; expected text or an integer"),
        (14, "label is the float 1.5"),
        (15, "label is a truth value"),
        (16, "label is empty"),
        (17, "split is 'dev'; expected train, val or test"),
        (18, "split is missing, but other rows have one"),
        (19, "image 'images/none.png' does not exist"),
        (20, "leaves the folder"),
        (21, "leaves the folder"),
        (22, "does not exist"),
        (23, "does not exist"),
        (24, "id is the int 16; expected text"),
        (25, "surrogate"),
        (26, "label is missing"),
        (27, "not a JSON object but a list"),
        (28, "not a JSON object but the str 'text'"),
        (29, "not JSON"),
        (30, "not JSON"),
        (32, "id 'cat0' is that of line 1 already"),
        (32, "split is the int 1"),
        (33, "not UTF-8"),
        (34, "not JSON"),
        (35, "image 'images/broken.png' cannot be used"),
    ]
    assert sorted(int(line.split()[1].rstrip(":")) for line in found) == [line for line, _ in expected]
    for line, fault in expected:
        assert any(text.startswith(f"line {line}: ") and fault in text for text in found), (line, fault)
    assert [int(line.split()[1].rstrip(":")) for line in found] == [line for line, _ in expected]

    corpus = read_corpus(folder, on_bad_pair="skip")
    assert [pair.id for pair in corpus.pairs] == [row["id"] for row in good]
    assert corpus.skipped == found


def test_the_summary_counts_bad_pairs(tmp_path: Path) -> None:
    write(tmp_path, [*rows(), {**rows()[0], "id": "x", "text": "", "label": ""}])
    with pytest.raises(CorpusError, match=r"1 of 9 pairs cannot be used.*on_bad_pair='skip'"):
        read_corpus(tmp_path)


def test_check_images_exists_does_not_decode(tmp_path: Path) -> None:
    write(tmp_path, rows())
    (tmp_path / "images/cat0.png").write_bytes(b"no picture")
    assert len(read_corpus(tmp_path, check_images="exists").pairs) == 8
    assert len(mistakes(tmp_path)) == 1
    (tmp_path / "images/cat0.png").unlink()
    assert "does not exist" in mistakes(tmp_path, check_images="exists")[0]


def test_a_broken_picture_is_a_mistake_of_each_row_that_uses_it(tmp_path: Path) -> None:
    write(tmp_path, [{**row, "image": "images/same.png"} for row in rows()])
    assert len(read_corpus(tmp_path).pairs) == 8
    (tmp_path / "images/same.png").write_bytes(b"no picture")
    assert [text.split(":")[0] for text in mistakes(tmp_path)] == [f"line {k}" for k in range(1, 9)]
    with pytest.raises(CorpusError, match="none of 8 pairs can be used"):
        read_corpus(tmp_path, on_bad_pair="skip")


def test_progress_counts_pictures_and_may_stop(tmp_path: Path) -> None:
    write(tmp_path, rows())
    calls: list[tuple[int, int]] = []
    read_corpus(tmp_path, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(k, 8) for k in range(1, 9)]

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        read_corpus(tmp_path, progress=stop)


@pytest.mark.parametrize("option", ["on_bad_pair", "check_images"])
def test_unknown_options(tmp_path: Path, option: str) -> None:
    with pytest.raises(ConfigError, match=f"{option} is 'maybe'; expected one of"):
        read_corpus(write(tmp_path, rows()), **{option: "maybe"})


def test_integer_labels_become_text(tmp_path: Path) -> None:
    write(tmp_path, [{**row, "label": len(row["label"]) + (row["label"] == "dog")} for row in rows()])
    assert read_corpus(tmp_path).labels == ("3", "4")


def test_a_byte_order_mark_and_windows_line_ends_are_fine(tmp_path: Path) -> None:
    text = "".join(json.dumps(row) + "\r\n" for row in rows())
    write(tmp_path, b"\xef\xbb\xbf" + text.encode(), [row["image"] for row in rows()])
    assert len(read_corpus(tmp_path).pairs) == 8


def test_a_line_separator_inside_a_text_does_not_end_the_line(tmp_path: Path) -> None:
    text = "\n".join(json.dumps({**row, "text": "one\u2028two"}, ensure_ascii=False) for row in rows())
    write(tmp_path, text.encode(), [row["image"] for row in rows()])
    assert read_corpus(tmp_path).pairs[0].text == "one\u2028two"


def as_csv(folder: Path, content: list[Row], **options: Any) -> None:
    (folder / "pairs.jsonl").unlink()
    with (folder / "pairs.csv").open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, content[0].keys(), **options)
        writer.writeheader()
        writer.writerows(content)


def as_parquet(folder: Path, content: list[Row]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (folder / "pairs.jsonl").unlink()
    pq.write_table(pa.Table.from_pylist(content), folder / "pairs.parquet")


@pytest.mark.parametrize("convert", [as_csv, as_parquet])
@pytest.mark.parametrize("split", [True, False])
def test_all_formats_give_the_same_corpus(tmp_path: Path, convert: Any, split: bool) -> None:
    content = [{**row, "text": 'two "lines",\nand é', "more": "x"} for row in rows(12)]
    if not split:
        content = [{k: v for k, v in row.items() if k != "split"} for row in content]
    expected = read_corpus(write(tmp_path, content))
    convert(tmp_path, content)
    found = read_corpus(tmp_path)
    assert found == expected
    assert found.fingerprint == expected.fingerprint
    assert len(found.part("val")) == 2


def test_the_manifest_itself_may_be_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, rows())
    (tmp_path / "pairs.jsonl").rename(tmp_path / "other.jsonl")
    assert read_corpus(tmp_path / "other.jsonl").root == tmp_path
    monkeypatch.chdir(tmp_path)
    assert read_corpus("other.jsonl").name == tmp_path.name


def test_there_must_be_exactly_one_manifest(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"found none of them; is it a corpus folder\?"):
        read_corpus(tmp_path)
    with pytest.raises(CorpusError, match="no such folder or file"):
        read_corpus(tmp_path / "none")
    write(tmp_path, rows())
    (tmp_path / "pairs.csv").write_text("id\n")
    with pytest.raises(CorpusError, match=r"found pairs\.jsonl and pairs\.csv; keep one"):
        read_corpus(tmp_path)
    assert len(read_corpus(tmp_path / "pairs.jsonl").pairs) == 8
    (tmp_path / "pairs.txt").write_text("")
    with pytest.raises(CorpusError, match="not a manifest"):
        read_corpus(tmp_path / "pairs.txt")


@pytest.mark.parametrize("content", [b"", b"\n\n"])
def test_an_empty_manifest(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(CorpusError, match="holds no pair"):
        read_corpus(write(tmp_path, content))


def test_a_manifest_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").mkdir()
    with pytest.raises(CorpusError, match="cannot be read"):
        read_corpus(tmp_path)


def test_csv_lines_are_those_of_the_file(tmp_path: Path) -> None:
    write(tmp_path, rows())
    content = rows()
    content[0]["text"] = "three\nlines\nlong"
    content[1]["text"] = "?\n?"
    content[3]["text"] = "!"
    as_csv(tmp_path, content)
    # header 1, rows on 2-4, 5-6, 7, 8
    assert [text.split(":")[0] for text in mistakes(tmp_path)] == ["line 5", "line 8"]


def test_csv_mistakes(tmp_path: Path) -> None:
    write(tmp_path, rows())
    as_csv(tmp_path, rows())
    file = tmp_path / "pairs.csv"
    whole = file.read_text(encoding="utf-8-sig")

    file.write_text(whole + "\na,b\n" + 'x,y,"never closed\n\n')
    found = mistakes(tmp_path)
    assert found[0] == "line 11: has 2 cells; the header has 5"
    assert found[1].startswith("line 12: not CSV (unexpected end of data)")
    assert len(found) == 2

    file.write_text(whole.replace("text", "txt", 1).replace("split", "id", 1))
    with pytest.raises(CorpusError, match="the header lacks 'text' and repeats 'id'; expected the columns id, image"):
        read_corpus(tmp_path)

    file.write_bytes(whole.replace("one dog", "ein h\u00fchnchen", 1).encode("latin-1"))
    with pytest.raises(CorpusError, match="line 6 is not UTF-8"):
        read_corpus(tmp_path)

    file.write_text(whole.splitlines()[0])
    with pytest.raises(CorpusError, match="holds no pair"):
        read_corpus(tmp_path)


def test_parquet_mistakes(tmp_path: Path) -> None:
    write(tmp_path, rows())
    content = rows()
    content[2]["text"] = None
    as_parquet(tmp_path, content)
    assert mistakes(tmp_path) == ("row 3: text is null; expected text",)

    (tmp_path / "pairs.jsonl").touch()
    as_parquet(tmp_path, [{k: v for k, v in row.items() if k != "label"} for row in content])
    with pytest.raises(CorpusError, match="the header lacks 'label'"):
        read_corpus(tmp_path)

    (tmp_path / "pairs.parquet").write_bytes(b"PAR1 no PAR1")
    with pytest.raises(CorpusError, match="not a Parquet file that can be read"):
        read_corpus(tmp_path)


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, rows())
    as_parquet(tmp_path, rows())
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(MissingExtraError, match=r"'pyarrow'.*dckt\[train\]"):
        read_corpus(tmp_path)


def unsplit(counts: dict[str, int]) -> list[Row]:
    return [
        {"id": f"{label}{k}", "image": "images/x.png", "text": "a word", "label": label}
        for label, count in counts.items()
        for k in range(count)
    ]


def test_the_split_is_stratified(tmp_path: Path) -> None:
    corpus = read_corpus(write(tmp_path, unsplit({"a": 40, "b": 14, "c": 15, "d": 5, "e": 4})))
    counts = {split: Counter(p.label for p in corpus.part(split)) for split in ("train", "val", "test")}
    assert counts["val"] == counts["test"] == {"a": 4, "b": 1, "c": 2, "d": 1}
    assert counts["train"] == {"a": 32, "b": 12, "c": 11, "d": 3, "e": 4}


def test_the_split_hangs_on_ids_labels_and_seed_alone(tmp_path: Path) -> None:
    def split(content: list[Row], **options: Any) -> dict[str, str]:
        return {p.id: p.split for p in read_corpus(write(tmp_path, content), **options).pairs}

    content = unsplit({"a": 30, "b": 30})
    first = split(content)
    for label in "ab":
        order = sorted(range(30), key=lambda k: hashlib.sha256(f"split:0:{label}{k}".encode()).hexdigest())
        parts = [first[f"{label}{k}"] for k in order]
        assert parts == ["val"] * 3 + ["test"] * 3 + ["train"] * 24
    assert {key for key, split in first.items() if split == "val"} == {"a24", "a26", "a5", "b18", "b2", "b6"}
    assert split(content[::-1]) == first
    assert split([{**row, "split": "" if k % 2 else None} for k, row in enumerate(content)]) == first
    assert split(content, split_seed=1) != first
    # A row that is skipped for its text or picture moves no other one.
    bad = [{**content[0], "text": "."}, {**content[1], "image": "images/broken.png"}, *content[2:]]
    write(tmp_path, bad)
    (tmp_path / "images/broken.png").write_bytes(b"")
    skipped = {p.id: p.split for p in read_corpus(tmp_path, on_bad_pair="skip").pairs}
    assert skipped == {key: first[key] for key in list(first)[2:]}


def test_labels_that_do_not_allow_training(tmp_path: Path) -> None:
    content = [row for row in rows() if row["id"] not in ("dog0", "dog1")]
    write(tmp_path, content)
    assert mistakes(tmp_path) == (
        "all train pairs have the label 'cat'; expected 2 or more labels",
        "label 'dog' has 1 val and 1 test pairs, but no train pair",
    )
    assert mistakes(tmp_path, on_bad_pair="skip")
    write(tmp_path, [{**row, "split": "test"} for row in content])
    with pytest.raises(CorpusError, match="none of 6 usable pairs has split 'train'"):
        read_corpus(tmp_path)


def test_warnings(tmp_path: Path) -> None:
    corpus = read_corpus(write(tmp_path, rows(3)))
    assert corpus.warnings == ("labels with a single train pair: 'cat', 'dog'",)
    many = read_corpus(write(tmp_path, unsplit({f"label {k:02}": 1 for k in range(12)})))
    names = ", ".join(f"'label {k:02}'" for k in range(10))
    assert many.warnings == (
        "no val pairs",
        "no test pairs",
        f"labels with a single train pair: {names} and 2 more",
    )


def test_fingerprint(tmp_path: Path) -> None:
    prints = []
    for place, change in enumerate([{}, {}, {"text": "x"}, {"label": "dog"}, {"split": "val"}, {"id": "x"}]):
        folder = tmp_path / str(place)
        folder.mkdir()
        content = rows()
        prints.append(read_corpus(write(folder, [{**content[0], **change}, *content[1:]])).fingerprint)
    assert prints[0] == prints[1]
    assert len(set(prints)) == 5
    Image.new("RGB", (3, 3), "red").save(tmp_path / "0/images/cat0.png")
    assert read_corpus(tmp_path / "0").fingerprint == prints[0]


def test_a_picture_that_changed_between_two_reads_is_decoded_again(tmp_path: Path) -> None:
    folder = write(tmp_path, rows())
    assert len(read_corpus(folder).pairs) == len(read_corpus(folder).pairs) == 8
    (folder / "images/cat0.png").write_bytes(b"no picture")
    with pytest.raises(CorpusError, match="1 of 8 pairs"):
        read_corpus(folder)
    Image.new("RGB", (5, 5), "red").save(folder / "images/cat0.png")
    assert len(read_corpus(folder).pairs) == 8


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return read_corpus(write(tmp_path_factory.mktemp("large"), rows(12, ("a", "b", "c")) + rows(5, ("few",))))


def test_subset_per_class(large: Corpus) -> None:
    subset = subset_per_class(large, 5, 0)
    assert Counter(pair.label for pair in subset.part("train")) == {"a": 5, "b": 5, "c": 5, "few": 3}
    assert subset.part("val") == large.part("val")
    assert subset.part("test") == large.part("test")
    assert subset.fingerprint != large.fingerprint
    assert subset == subset_per_class(large, 5, 0)
    assert subset != subset_per_class(large, 5, 1)
    assert subset_per_class(large, 100, 0) == large
    assert "single train pair" in subset_per_class(large, 1, 0).warnings[0]
    with pytest.raises(ConfigError, match="pairs_per_class is 0"):
        subset_per_class(large, 0, 0)


@given(fewer=st.integers(1, 12), more=st.integers(1, 12), seed=st.integers())
def test_subsets_of_one_seed_are_nested(large: Corpus, fewer: int, more: int, seed: int) -> None:
    small, big = (subset_per_class(large, count, seed).part("train") for count in sorted((fewer, more)))
    assert set(small) <= set(big)


@pytest.mark.data
@pytest.mark.skipif("DCKT_DATA" not in os.environ, reason="set DCKT_DATA to the folder of corpora")
@pytest.mark.parametrize(
    ("name", "labels", "counts"),
    [
        ("pascal_sentences", 20, (800, 100, 100)),
        ("caltech101", 101, (4235, 529, 529)),
        ("fashion", 66, (7068, 884, 884)),
    ],
)
def test_real_corpora_are_valid(name: str, labels: int, counts: tuple[int, int, int]) -> None:
    corpus = read_corpus(Path(os.environ["DCKT_DATA"]) / name)
    assert len(corpus.labels) == labels
    assert tuple(len(corpus.part(split)) for split in ("train", "val", "test")) == counts
